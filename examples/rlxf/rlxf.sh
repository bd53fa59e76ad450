# Sourced by the scripts next to it: their settings.
# shellcheck shell=bash
#
# Settings, from the environment:
#   CONFIG         a YAML of configs/rlxf, or the path of another (default: on a CPU and in a rehearsal
#                  grpo_minimind_tiny, elsewhere grpo_minimind3)
#   BACKEND        embedded, or mindspeed-rl (default: mindspeed-rl on an NPU, embedded elsewhere)
#   MASTER_PORT    Ray's port on the head (default 6766, as in MindSpeed-RL's scripts; its older guides have 6344; on a
#                  single host a free one)
#   SOCKET_IFNAME  interface by which this host talks to the others (default: that of the way to the head)
#   NUM_CPUS       that Ray gives away on this host (default: all cores)
#   RAY_TMPDIR     where Ray logs, and keeps its sockets (default: a new directory, /tmp/minimind-ray-XXXXXX, which is
#                  removed at the end unless the run fails)
#   RAY_FLAGS      more flags of `ray start`, such as "--min-worker-port 20000 --max-worker-port 20999"
#   WAIT_SECONDS   how long to wait for the head or for hosts (default 600)
# Arguments are hydra overrides, such as actor_config.lr=1e-6; paths in the YAML and in them are relative to the
# repository. --dry-run checks everything, shows what would be run, and starts nothing.
# common.sh has the settings of Python, device and data.
REHEARSAL=rl # what REHEARSE=1 runs: MindSpeed-RL
source "$(dirname "${BASH_SOURCE[0]}")/../mcore/minimind/common.sh"
