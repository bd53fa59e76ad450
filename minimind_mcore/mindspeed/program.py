"""Run one rank of a MindSpeed-LLM program, and turn silent failures into errors.

    torchrun --nproc-per-node 8 -m minimind_mcore.mindspeed.program pretrain_gpt.py --num-layers 8 ...

The program runs unmodified in this process.
"""

from __future__ import annotations

import runpy
import sys
from traceback import walk_tb
from types import TracebackType

from minimind_mcore.errors import UserError, run

# Modules of Megatron-LM 0.12.1 that print an error and call `sys.exit()`, with status 0. The job would look successful
# without having trained. Regular exits, as of --exit-interval, come from `megatron.training.training`.
GIVE_UP = {
    "megatron.training.checkpointing": "could not load the checkpoint",
    "megatron.training.arguments": "refuses these flags",
    "megatron.training.global_vars": "could not begin",
}


def main() -> None:
    """Run the program of the first argument with the remaining arguments.

    Raises:
        UserError: the program gave up with status 0.
    """
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if not end.code and (what := GIVE_UP.get(_module(end.__traceback__))):
            raise UserError(f"{sys.argv[0]} {what} (see above); nothing was trained") from end
        raise


def _module(traceback: TracebackType | None) -> str:
    """Return the name of the module that ended the program."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(traceback)]
    return next((str(name) for name in reversed(names) if name != "_sitebuiltins"), "")  # where `exit` is


if __name__ == "__main__":
    run(main)
