# Sourced: lets one process at a time do what several may start together, on this host or on others that share the
# directory. `mkdir` succeeds for one of them on every filesystem; flock is missing on macOS and on some network shares.
# shellcheck shell=bash

# lock DIRECTORY: make it, or wait until whoever made it has removed it.
lock() {
    local waited=0
    mkdir -p "$(dirname "$1")"
    until mkdir "$1" 2> /dev/null; do
        [ -w "$(dirname "$1")" ] || fail "cannot write to $(dirname "$1")"
        [ "$waited" != 0 ] || echo "waiting for another process; if there is none, remove the directory $1" >&2
        [ "$waited" -lt 600 ] || fail "waited 10 minutes; if nothing else is running here, remove the directory $1"
        sleep 2
        waited=$((waited + 2))
    done
    LOCKED=$1
    trap unlock EXIT
}

unlock() {
    rmdir "$LOCKED" 2> /dev/null || true
    trap - EXIT
}
