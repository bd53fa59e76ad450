"""lm-evaluation-harness on a model in memory, where it is installed: `--harness TASK...`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.inference.loading import Loaded


def run_harness(loaded: Loaded, tasks: Sequence[str], shots: int, batch: int, limit: int | None) -> dict[str, Any]:
    """Its results by task.

    Raises:
        UserError: it is not installed.
    """
    require_harness()
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch)
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), num_fewshot=shots, limit=limit)
    results: dict[str, Any] = found["results"]
    return results


def require_harness() -> None:
    """Raise a `UserError` unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--harness: lm-evaluation-harness is not installed (pip install lm-eval); C-Eval, CMMLU, MMLU, OpenBookQA "
            "and perplexity run without it, by --task"
        )
