"""Start one of MindSpeed-LLM's own programs with the flags of this kit's scripts.

    python -m minimind_mcore.mindspeed.launch --nproc-per-node 8 pretrain_gpt.py --num-layers 8 ...

Torchrun's flags come before the program's name. The program runs unmodified in its own folder, with MiniMind as its
layer spec.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.errors import UserError, run
from minimind_mcore.mindspeed.flags import complete, require_files, router_weight_of, spelled
from minimind_mcore.models.config import LAYER_SPEC
from minimind_mcore.paths import CHECKOUT

logger = logging.getLogger("minimind_mcore.mindspeed.launch")

SPEC = ["--spec", *LAYER_SPEC]
RANK = ["-m", "minimind_mcore.mindspeed.program"]  # runs the program that follows


def sources(name: str, program: str, instead: str) -> Path:
    """Return the source folder of a MindSpeed project: from its variable, else next to this checkout, else in
    /workspace.

    Args:
        name: project such as MindSpeed-LLM, whose variable is MINDSPEED_LLM_HOME.
        program: a file of the project.
        instead: a setting that works without the project, for the message.

    Raises:
        UserError: the project is in none of these places.
    """
    variable = name.upper().replace("-", "_") + "_HOME"
    given = os.environ.get(variable)
    places = [Path(given)] if given else [CHECKOUT.parent / name, Path("/workspace") / name]
    for place in places:
        if (place / program).is_file():
            return place
    raise UserError(f"found no {name} in {' or '.join(map(str, places))}; set {variable} to its folder, or {instead}")


def home() -> Path:
    """Return MindSpeed-LLM's folder; see `sources`."""
    return sources("MindSpeed-LLM", "pretrain_gpt.py", "BACKEND=native to run the kit's own engine")


def size(words: Sequence[str]) -> tuple[int, int]:
    """Return the number of processes and the number of hosts of the job, from torchrun's flags."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--nproc-per-node", "--nnodes"):
        parser.add_argument(flag, type=int, default=1)
    given, _ = parser.parse_known_args(words)
    return given.nproc_per_node * given.nnodes, given.nnodes


def main(argv: Sequence[str] | None = None) -> None:
    """Print the command, and replace this process by torchrun, which runs the program. `--dry-run` only prints.

    Raises:
        UserError: no program is named, or MindSpeed-LLM is not found.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        raise UserError("no program is named; expected torchrun's flags, a program such as pretrain_gpt.py, its flags")
    folder = home()
    flags, remarks = complete(words[at], words[at + 1 :], *size(words[:at]))
    if not {"--data-pending", "--weights-pending"} & set(words):
        require_files(flags)
    for remark in remarks:
        logger.warning(remark)
    if "--num-experts" in flags:
        logger.info(f"router weight: {router_weight_of(flags)}")
    program = [*RANK, words[at], *([] if "--spec" in flags else SPEC), *spelled(flags, folder)]
    command = [sys.executable, "-m", "minimind_mcore.launch", *words[:at], *program]
    print(f"cd {shlex.quote(str(folder))} && {shlex.join(command)}", flush=True)
    if "--dry-run" in words:
        return
    paths = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.chdir(folder)
    os.execv(command[0], command)


if __name__ == "__main__":
    run(main)
