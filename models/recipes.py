"""MiniMind's training recipes as Megatron flags.

    python -m minimind_mcore.models.recipes minimind3_pretrain                 # one word per line
    python -m minimind_mcore.models.recipes --model minimind3 --stage dpo      # the recipe for a model
    python -m minimind_mcore.models.recipes --list

configs/recipes.yaml has the hyperparameters. MiniMind's learning rate is `lr * (0.1 + 0.45 * (1 + cos(pi * t / T)))`.
This is Megatron's cosine from `lr` to `lr / 10` without warm-up. But Megatron's first step has t = 0, and MiniMind's
has t = 1. Three flags of this kit add what Megatron lacks: `--lr-at-iteration-end` starts with t = 1. `--minimind-init`
selects a scheme of `minimind_mcore.models.init`. `--decay-all` decays every parameter, including the norms.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import yaml

from minimind_mcore.errors import UserError, run
from minimind_mcore.inputs.ranges import flag_type
from minimind_mcore.inputs.splits import parse_split
from minimind_mcore.models.config import format_flags
from minimind_mcore.models.presets import PRESETS, find_model, lookup
from minimind_mcore.paths import CONFIGS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training stage. Batch sizes are per data-parallel rank, as in MiniMind."""

    epochs: int
    lr: float
    seq_length: int
    micro_batch_size: int
    accumulation: int
    init: str | None = None  # a scheme of minimind_mcore.models.init; None: training starts from a checkpoint
    flags: Mapping[str, object] = field(default_factory=dict)  # further flags of the stage

    def global_batch_size(self, data_parallel_size: int) -> int:
        """Return the number of samples of one update."""
        return self.micro_batch_size * self.accumulation * data_parallel_size

    def iterations(self, samples: float, global_batch_size: int) -> int:
        """Return the number of updates in `epochs` passes over the samples (texts of `seq_length`, conversations or
        pairs)."""
        return max(1, int(self.epochs * samples / global_batch_size))

    def megatron_flags(self, data_parallel_size: int = 1, global_batch_size: int | None = None) -> list[str]:
        """Return the Megatron flags, in the form of `sys.argv`. `--train-iters` is missing, as it depends on the
        data."""
        flags: dict[str, object] = {
            "--seq-length": self.seq_length,
            "--micro-batch-size": self.micro_batch_size,
            "--global-batch-size": global_batch_size or self.global_batch_size(data_parallel_size),
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
        return format_flags(flags | dict(self.flags))


RECIPES = {
    name: Recipe(**row) for name, row in yaml.safe_load((CONFIGS / "recipes.yaml").read_text(encoding="utf-8")).items()
}


def get_recipe(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        UserError: the recipe does not exist. The message suggests the nearest name.
    """
    return lookup("recipe", RECIPES, name)


def recipe_for(model: str, stage: str = "pretrain") -> str:
    """Return the name of the recipe for a model (a preset, a Hugging Face directory or config.json) and a stage."""
    name = model.lower().replace("-", "_")
    if name in PRESETS and name.endswith("_tiny"):
        return f"tiny_{stage}"
    return f"minimind3_{stage}" if find_model(model).qk_layernorm else f"minimind2_{stage}"


def count_samples(data: Sequence[str], seq_length: int) -> float:
    """Count the samples of datasets, given as for `--data-path`: prefixes, or weights and prefixes.

    Text is split into samples of `seq_length` tokens. A conversation or a pair is one sample.
    """
    from minimind_mcore.preprocess.blends import parse_blend
    from minimind_mcore.preprocess.indexed import idx_path, read_index

    total = 0.0
    for prefix in parse_blend(data).prefixes:
        columns = [f"{prefix}_packed_{name}_document" for name in ("input_ids", "chosen_input_ids")]
        found = [column for column in columns if idx_path(column).is_file()]
        if found:
            total += read_index(found[0]).sequences
        else:
            total += int(read_index(prefix).lengths.sum(dtype="int64")) / seq_length
    return total


def training_share(split: str) -> float:
    """Return the training share of a `--split` such as "99,1,0"."""
    return parse_split(split)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a recipe's Megatron flags, one word per line, or the names of all recipes."""
    print("\n".join(words(argv)))


def words(argv: Sequence[str] | None = None) -> list[str]:
    """Return the words that `main` prints: flags and their values, or names of recipes.

    Raises:
        UserError: the recipe does not exist, or the micro-batches of all ranks do not divide the global batch.
    """
    parser = argparse.ArgumentParser(prog="minimind-mcore recipes", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="a recipe (default: the recipe for --model)")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--model", help="a preset, or an HF directory or config.json")
    parser.add_argument("--stage", default="pretrain", help="with --model: pretrain, sft, lora, dpo, distill or reason")
    parser.add_argument(
        "--data-parallel-size", type=flag_type("data_parallel_size"), default=1, help="multiplies the global batch"
    )
    parser.add_argument("--data", nargs="+", help="the dataset, as for --data-path: determines --train-iters")
    parser.add_argument("--split", default="1", help="as for Megatron: an epoch is one pass over the training part")
    parser.add_argument(
        "--train-iters", type=flag_type("train_iters"), help="overrides the number from data and epochs"
    )
    for name in ("global-batch-size", "epochs", "lr", "seq-length", "micro-batch-size"):
        parser.add_argument(f"--{name}", type=flag_type(name.replace("-", "_")), help="overrides the recipe's")
    args = parser.parse_args(argv)
    if args.list:
        return list(RECIPES)
    share = training_share(args.split)
    if args.name is None and args.model is None:
        parser.error("give a recipe's name, or --model, or --list")
    recipe = get_recipe(args.name or recipe_for(args.model, args.stage))
    # The global batch comes from the recipe's own micro-batch size. So --micro-batch-size changes only the memory, and
    # not the training result.
    batch = args.global_batch_size or recipe.global_batch_size(args.data_parallel_size)
    names = ("epochs", "lr", "seq_length", "micro_batch_size")
    recipe = replace(recipe, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    at_once = recipe.micro_batch_size * args.data_parallel_size
    if batch % at_once:
        raise UserError(
            f"a global batch of {batch} does not divide into micro-batches of {recipe.micro_batch_size} on "
            f"{args.data_parallel_size} data-parallel ranks: set MBS or GBS (--micro-batch-size, --global-batch-size)"
        )
    flags = recipe.megatron_flags(args.data_parallel_size, batch)
    if args.train_iters:
        flags += ["--train-iters", str(args.train_iters)]
    elif args.data:
        samples = count_samples(args.data, recipe.seq_length) * share
        flags += ["--train-iters", str(recipe.iterations(samples, batch))]
    return flags


if __name__ == "__main__":
    run(main)
