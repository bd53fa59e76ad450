"""minimind-mcore docs figures: train the models of the documentation's chapters and write their figures.

    minimind-mcore docs figures                     # all, into docs/figures; with the trainings 15 minutes of two cores
    minimind-mcore docs figures attention rope      # some

Each figure is a JSON file of up to 100 kB with the SHA-256 of the weights that it shows. The site is built from these
files. The dense model is the quickstart's. A figure trains only the models that it shows, and models that an earlier
call has trained are used again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minimind_mcore.errors import require
from minimind_mcore.figures import devices, layers, layouts, learning, tokens
from minimind_mcore.figures.study import Study, train
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.paths import default_outputs

logger = logging.getLogger(__name__)

LIMIT = 100_000  # bytes of a file: a page carries it
# figure: the function that makes it, and the models that it reads. None: not even the tokenizer.
FIGURES: dict[str, tuple[Callable[[Study], dict[str, Any]], tuple[str, ...] | None]] = {
    "tokenizer": (tokens.tokenizer, ()),
    "embeddings": (tokens.embeddings, ("full_sft",)),
    "attention": (layers.attention, ("full_sft",)),
    "rope": (layers.rope, ("full_sft",)),
    "norm": (layers.norm, ("full_sft",)),
    "moe": (layers.moe, ("moe", "moe_normalized")),
    "mask": (tokens.mask, ("full_sft",)),
    "schedule": (learning.schedule, None),
    "parallel": (layouts.parallel, None),
    "checkpoint": (layouts.checkpoint, ("full_sft",)),
    "lora": (learning.lora, ("pretrain", "full_sft")),
    "dpo": (learning.dpo, ("early_sft",)),
    "grpo": (learning.grpo, ("early_sft",)),
    "sampling": (tokens.sampling, ("full_sft", "moe")),
    "cache": (layouts.cache, ("full_sft",)),
    "devices": (devices.devices, None),
}


def make(name: str, study: Study) -> str:
    """Return the JSON of a figure.

    Raises:
        UserError: it is too large for a page.
    """
    function, models = FIGURES[name]
    content = {"digests": {model: study.digest(model) for model in models or ()}, **function(study)}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    size = len(text.encode())
    require(size <= LIMIT, f"figure {name}: {size} bytes, expected at most {LIMIT}; show less in it")
    return text


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        UserError: a training failed.
    """
    parser = documented_parser("minimind-mcore docs", __doc__)
    parser.add_argument("what", choices=["figures"], help="what to make")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)} (default: all)")
    parser.add_argument(
        "--output", type=Path, default=default_outputs() / "docs/figures", help="directory of the JSON files"
    )
    args = parser.parse_args(argv)
    if unknown := sorted({*args.names} - FIGURES.keys()):
        parser.error(f"no figure is called {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    names = args.names or list(FIGURES)
    needs = [FIGURES[name][1] for name in names]
    study = train(
        {model for models in needs for model in models or ()}, tokenizer=any(models is not None for models in needs)
    )
    args.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        (args.output / f"{name}.json").write_text(make(name, study), encoding="utf-8")
        logger.info(f"figure {name}: {args.output / name}.json")
