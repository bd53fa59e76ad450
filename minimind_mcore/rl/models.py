"""Write the presets as MindSpeed-RL's `model/*.yaml`.

    python -m minimind_mcore.rl.models --output configs/rlxf/model      # writes a file per preset

A test compares the files with the presets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from minimind_mcore.errors import run
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.rl.config.schema import value_type
from minimind_mcore.storage import atomic_write_text


def model_section(config: ModelConfig) -> dict[str, Any]:
    """Return the architecture as keys of MegatronConfig."""
    keys: dict[str, Any] = {"use_mcore_models": True}
    words = config.megatron_flags()
    for place, word in enumerate(words):
        if not word.startswith("--"):
            continue
        key = word[2:].replace("-", "_")
        if key == "moe_router_pre_softmax":  # MindSpeed-RL has no such key: norm_topk_prob alone implies it
            continue
        if key == "moe_shared_expert_intermediate_size":
            keys["n_shared_experts"] = int(words[place + 1]) // keys["moe_ffn_hidden_size"]
            continue
        kind = value_type("MegatronConfig", key)
        keys[key] = True if kind is bool else kind(words[place + 1])
    return keys


def model_yaml(name: str) -> str:
    """Return the text of `model/NAME.yaml`: the name as the top key, with the model's keys below."""
    text = yaml.safe_dump({name: model_section(PRESETS[name])}, sort_keys=False)
    return f"# Written by `python -m minimind_mcore.rl.models`, from configs/models.yaml.\n{text}"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file of every preset."""
    parser = argparse.ArgumentParser(prog="minimind-mcore rl models", description=main.__doc__)
    parser.add_argument("--output", required=True, type=Path, help="directory: configs/rlxf/model")
    args = parser.parse_args(argv)
    for name in PRESETS:
        atomic_write_text(args.output / f"{name}.yaml", model_yaml(name))
        print(args.output / f"{name}.yaml")


if __name__ == "__main__":
    run(main)
