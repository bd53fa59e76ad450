"""MiniMind's training recipes as Megatron flags.

    python -m minimind_mcore.models.recipes minimind3_pretrain     # one word a line
    python -m minimind_mcore.models.recipes --list

Hyper-parameters: jingyaogong/minimind, trainer/train_pretrain.py and train_full_sft.py, of 2026-08
(minimind-3) and of 2026-02 (MiniMind2). Its learning rate,
`lr * (0.1 + 0.45 * (1 + cos(pi * t / T)))`, is Megatron's cosine from `lr` to `lr / 10` without
warm-up, except that Megatron counts from t = 0. What Megatron lacks are flags of this kit:
`--lr-at-iteration-end` (t = 1), `--minimind-init` (see `minimind_mcore.models.init`), and
`--decay-all`, weight decay for every parameter, the norms too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from minimind_mcore.errors import run
from minimind_mcore.models.config import format_flags
from minimind_mcore.models.presets import lookup


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training stage. Batches are per data-parallel rank, as MiniMind gives them.

    `epochs` is what MiniMind trains; Megatron counts iterations, so the caller turns it into
    `--train-iters` with the size of the data set.
    """

    epochs: int
    lr: float
    seq_length: int
    micro_batch_size: int
    accumulation: int
    init: str | None = None  # a scheme of minimind_mcore.models.init; None: starts from weights

    def megatron_flags(self, data_parallel_size: int = 1) -> list[str]:
        """The Megatron flags of this recipe, in the form of `sys.argv`."""
        flags: dict[str, object] = {
            "--seq-length": self.seq_length,
            "--micro-batch-size": self.micro_batch_size,
            "--global-batch-size": self.micro_batch_size * self.accumulation * data_parallel_size,
            "--lr": self.lr,
            "--min-lr": self.lr / 10,
            "--lr-decay-style": "cosine",
            "--lr-warmup-iters": 0,
            "--lr-at-iteration-end": True,
            "--adam-beta1": 0.9,
            "--adam-beta2": 0.999,
            "--adam-eps": 1e-8,
            "--weight-decay": 0.01,
            "--decay-all": True,
            "--clip-grad": 1.0,
        }
        if self.init:
            flags["--minimind-init"] = self.init
        return format_flags(flags)


_PRETRAIN = Recipe(epochs=2, lr=5e-4, seq_length=340, micro_batch_size=32, accumulation=8, init="normal")
_SFT = Recipe(epochs=2, lr=1e-5, seq_length=768, micro_batch_size=16, accumulation=1)

RECIPES: dict[str, Recipe] = {
    "minimind3_pretrain": _PRETRAIN,
    "minimind3_sft": _SFT,
    "minimind2_pretrain": replace(_PRETRAIN, epochs=1, init="torch"),
    "minimind2_sft": replace(_SFT, lr=1e-6, seq_length=340),
}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, or a `UserError` that suggests the nearest."""
    return lookup("recipe", RECIPES, name)


def main() -> None:
    """Print a recipe's Megatron flags, one word a line, or the names of all."""
    parser = argparse.ArgumentParser(prog="minimind_mcore.models.recipes", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="a recipe")
    parser.add_argument("--data-parallel-size", type=int, default=1, help="scales the global batch")
    parser.add_argument("--list", action="store_true", help="print the names")
    args = parser.parse_args()
    if args.name is None and not args.list:
        parser.error("give a recipe's name, or --list")
    words = list(RECIPES) if args.list else get_recipe(args.name).megatron_flags(args.data_parallel_size)
    print("\n".join(words))


if __name__ == "__main__":
    run(main)
