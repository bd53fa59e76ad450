# Sourced by the scripts next to it.
# shellcheck shell=bash
#
# Settings, which --help describes:
# BACKEND CONFIG MASTER_PORT NUM_CPUS RAY_FLAGS RAY_TMPDIR SOCKET_IFNAME WAIT_SECONDS
# common.sh has the settings of Python, device and data.
REHEARSAL=rl # what REHEARSE=1 runs: MindSpeed-RL
source "$(dirname "${BASH_SOURCE[0]}")/../mcore/minimind/common.sh"
