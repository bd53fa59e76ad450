"""MiniMind's published models by name, and a tiny variant of each.

        python -m minimind_mcore.models.presets minimind3     # prints its Megatron flags, one word per line
    python -m minimind_mcore.models.presets path/to/config.json
    python -m minimind_mcore.models.presets --list

configs/models.yaml has the sizes. Other models are described by their config.json.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml

from minimind_mcore.errors import UserError, did_you_mean, run
from minimind_mcore.models.config import ModelConfig, MoEConfig
from minimind_mcore.paths import CONFIGS

logger = logging.getLogger("minimind_mcore.models.presets")

T = TypeVar("T")


def _read() -> dict[str, ModelConfig]:
    rows = yaml.safe_load((CONFIGS / "models.yaml").read_text(encoding="utf-8"))
    return {
        name: ModelConfig(**row | ({"moe": MoEConfig(**row["moe"])} if "moe" in row else {}))
        for name, row in rows.items()
    }


PRESETS = _read()


def lookup(kind: str, table: Mapping[str, T], name: str) -> T:
    """Return the entry of a name. Case is ignored, and `-` equals `_`.

    Raises:
        UserError: the name is unknown. The message suggests the nearest name.
    """
    key = name.lower().replace("-", "_")
    if key in table:
        return table[key]
    hint = did_you_mean(key, table, begin=". Did") or "."
    raise UserError(f"no {kind} is called {name!r}{hint} Known: {', '.join(table)}")


def get_preset(name: str) -> ModelConfig:
    """Return the preset of a name. A `UserError` suggests the nearest name."""
    return lookup("model preset", PRESETS, name)


def is_path(name: str) -> bool:
    """Return whether a name is the path of a Hugging Face directory or `config.json`, not a preset."""
    if name.lower().replace("-", "_") in PRESETS:  # a preset wins over a directory of the same name
        return False
    path = Path(name)
    return path.suffix == ".json" or len(path.parts) > 1 or path.exists()


def find_model(name: str) -> ModelConfig:
    """Return the preset of a name, or the model of a Hugging Face directory or `config.json`."""
    return ModelConfig.from_hf_config(name) if is_path(name) else get_preset(name)


def table() -> str:
    """Return the presets as an aligned text table."""
    lines = [f"{'name':<24}{'parameters':>12}{'active':>12}{'layers':>8}{'hidden':>8}"]
    for name, config in PRESETS.items():
        total, active = config.num_parameters(), config.num_active_parameters()
        lines.append(f"{name:<24}{total:>12,}{active:>12,}{config.num_layers:>8}{config.hidden_size:>8}")
    return "\n".join(lines)


def flags_of(name: str) -> list[str]:
    """Return a model's Megatron flags, and log what training ignores."""
    config = find_model(name)
    if config.inference_rope_scaling:
        logger.info(f"note: {name} has inference_rope_scaling; training runs without it, as MiniMind's")
    return config.megatron_flags()


def main(argv: Sequence[str] | None = None) -> None:
    """Print a preset's Megatron flags, one word per line, or the table."""
    parser = argparse.ArgumentParser(prog="minimind-mcore presets", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="a preset, or an HF directory or config.json")
    parser.add_argument("--list", action="store_true", help="print the table of presets")
    args = parser.parse_args(argv)
    if args.list:
        print(table())
        return
    if args.name is None:
        parser.error("give a preset's name, or --list")
    print("\n".join(flags_of(args.name)))


if __name__ == "__main__":
    run(main)
