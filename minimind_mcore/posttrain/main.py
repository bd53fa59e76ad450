"""posttrain_gpt.py: the training loop of pretraining with the job of `--stage`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from minimind_mcore import arguments
from minimind_mcore.errors import UserError
from minimind_mcore.posttrain.base import PostTraining
from minimind_mcore.posttrain.distill import Distill
from minimind_mcore.posttrain.dpo import DPO
from minimind_mcore.posttrain.sft import SFT, Reason
from minimind_mcore.training import pretrain

STAGES: dict[str, type[PostTraining]] = {"sft": SFT, "dpo": DPO, "reason": Reason, "distill": Distill}


def main(argv: Sequence[str] | None = None) -> None:
    """Post-train with the flags of a command line."""
    args = arguments.parse(sys.argv[1:] if argv is None else argv, posttrain=True)
    pretrain.run(STAGES[stage_of(args)], args)


def stage_of(args: argparse.Namespace) -> str:
    """Return `--stage`, or the stage that follows from the kind of data.

    Raises:
        UserError: neither is given, or they contradict each other.
    """
    stages = {"--is-instruction-dataset": "sft", "--is-pairwise-dataset": "dpo"}
    flags = zip(stages, (args.is_instruction_dataset, args.is_pairwise_dataset), strict=True)
    given = [flag for flag, is_given in flags if is_given]
    if not args.stage and len(given) != 1:
        raise UserError(f"--stage is missing: expected one of {', '.join(STAGES)}")
    stage = str(args.stage or stages[given[0]])
    expected = "--is-pairwise-dataset" if stage == "dpo" else "--is-instruction-dataset"
    if wrong := [flag for flag in given if flag != expected]:
        raise UserError(f"--stage {stage} with {wrong[0]}: this stage reads {expected} data")
    return stage
