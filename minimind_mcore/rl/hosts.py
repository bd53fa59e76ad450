"""Hosts of a Ray cluster, for the scripts of examples/rlxf; RAY_ADDRESS names the head, HOST:PORT.

python -m minimind_mcore.rl.hosts wait --nodes 2 --seconds 600    # until it has so many hosts
python -m minimind_mcore.rl.hosts reach --seconds 600             # until it answers
python -m minimind_mcore.rl.hosts follow                          # until it is gone
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import time
from typing import Any

from minimind_mcore.errors import UserError, run
from minimind_mcore.rl.metrics import say

POLL_SECONDS = 2.0
SAY_EVERY_SECONDS = 10.0
GONE_AFTER = 5  # failures to reach the head in a row


def answers(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=POLL_SECONDS):
            return True
    except OSError:
        return False


def reach(address: str, seconds: float) -> None:
    """Wait until the head answers.

    Raises:
        UserError: it does not within so many seconds.
    """
    began, said = time.monotonic(), 0.0
    while not answers(address):
        waited = time.monotonic() - began
        if waited > seconds:
            raise UserError(f"no Ray head at {address} after {seconds:g} s: is grpo_minimind_head.sh running there?")
        if waited >= said:
            say(f"waiting for the head at {address} ({waited:.0f} of {seconds:g} s)")
            said = waited + SAY_EVERY_SECONDS
        time.sleep(POLL_SECONDS)


def wait(address: str, nodes: int, seconds: float) -> None:
    """Wait until the cluster has so many hosts.

    Raises:
        UserError: it does not within so many seconds; it says which are there.
    """
    reach(address, seconds)
    import ray

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    api: Any = ray
    began, said = time.monotonic(), 0.0
    try:
        while True:
            there = [node["NodeManagerAddress"] for node in api.nodes() if node["Alive"]]
            waited = time.monotonic() - began
            found = f"{len(there)} of {nodes} hosts are there: {', '.join(there)}"
            if len(there) >= nodes:
                say(found)
                return
            if waited > seconds:
                raise UserError(f"after {seconds:g} s {found}; start grpo_minimind_worker.sh on the others")
            if waited >= said:
                say(f"{found} (waiting, {waited:.0f} of {seconds:g} s)")
                said = waited + SAY_EVERY_SECONDS
            time.sleep(POLL_SECONDS)
    finally:
        ray.shutdown()


def follow(address: str) -> None:
    """Return when the head no longer answers."""
    say(f"this host belongs to the cluster of {address} until that ends")
    failures = 0
    while failures < GONE_AFTER:
        failures = 0 if answers(address) else failures + 1
        time.sleep(POLL_SECONDS)
    say(f"the head at {address} is gone: leaving")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="minimind_mcore.rl.hosts", description=__doc__)
    parser.add_argument("what", choices=("wait", "reach", "follow"))
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600.0)
    args = parser.parse_args()
    address = os.environ.get("RAY_ADDRESS", "")
    if not address.rpartition(":")[2].isdigit():
        raise UserError(f"RAY_ADDRESS={address!r}: expected HOST:PORT of the head")
    if args.what == "wait":
        wait(address, args.nodes, args.seconds)
    elif args.what == "reach":
        reach(address, args.seconds)
    else:
        follow(address)


if __name__ == "__main__":
    run(main)
