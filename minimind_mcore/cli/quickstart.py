"""Settings with which a MiniMind of 1.7M parameters learns the sample data in minutes on a CPU."""

from __future__ import annotations

from minimind_mcore.errors import UserError

MODEL = "minimind3_tiny"
BATCH = 8  # global batch size; each process has one micro-batch
WARM_UP = 50  # iterations
MATH_SFT_ITERATIONS = 700
# Flags that give training data the form of a prompt in chat: no system prompt, and an empty reasoning block.
FORM = ("--system-ratio", "0", "--empty-think-ratio", "1")


def sizes(processes: int, batch: int = BATCH) -> dict[str, str]:
    """Return the settings of a training.

    Raises:
        UserError: the batch size is not divisible by the number of processes.
    """
    if batch % processes:
        raise UserError(f"NPUS_PER_NODE={processes}: expected a divisor of {batch}, the batch of the sample data")
    return {
        "MODEL": MODEL, "TP": "1", "SEQ_LENGTH": "256", "GBS": str(batch), "MBS": str(batch // processes),
        "LR": "3e-3", "LOG_INTERVAL": "50", "EVAL_INTERVAL": "200",
    }  # fmt: skip


def math_sft(processes: int, iterations: int) -> dict[str, str]:
    """Return the settings of fine-tuning on the sample problems, from which reinforcement learning begins."""
    return {**sizes(processes), "PROMPT_TYPE": "chatml_de", "PACK": "1", "TRAIN_ITERS": str(iterations)}


def schedule(iterations: int) -> list[str]:
    """Return the flags of the learning rate schedule and Adam."""
    return ["--lr-warmup-iters", str(min(WARM_UP, iterations // 4)), "--adam-beta2", "0.99"]
