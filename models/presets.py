"""MiniMind's published models by name, and a tiny variant of each.

    python -m minimind_mcore.models.presets minimind3     # its Megatron flags, one word a line
    python -m minimind_mcore.models.presets path/to/config.json
    python -m minimind_mcore.models.presets --list

Sizes: jingyaogong/minimind, model/model_minimind.py, of 2026-08 (minimind-3) and of 2026-02
(MiniMind2). "145M" is the 640x8 mixture of experts; the 768x16 one, which its training command
builds at that size, has 406M.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from minimind_mcore.errors import UserError, did_you_mean, run
from minimind_mcore.models.config import ModelConfig, MoEConfig

T = TypeVar("T")

_MINIMIND3 = ModelConfig(
    hidden_size=768,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=96,
    ffn_hidden_size=2432,  # 64 * ceil(pi * hidden / 64)
    qk_layernorm=True,
    norm_eps=1e-6,
)
_MINIMIND3_MOE = _MINIMIND3.replace(
    moe=MoEConfig(topk=1, ffn_hidden_size=2432, load_balancing="aux_loss", aux_loss_coeff=5e-4),
)
_MINIMIND2_SMALL = ModelConfig(
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    ffn_hidden_size=1408,  # 64 * ceil(8/3 * hidden / 64)
    qk_layernorm=False,
    norm_eps=1e-5,
)
_MINIMIND2 = _MINIMIND2_SMALL.replace(hidden_size=768, num_layers=16, head_dim=96, ffn_hidden_size=2048)
_MINIMIND2_MOE = _MINIMIND2_SMALL.replace(
    hidden_size=640,
    head_dim=80,
    ffn_hidden_size=1728,
    moe=MoEConfig(
        topk=2,
        ffn_hidden_size=1728,
        shared_ffn_hidden_size=1728,
        load_balancing="seq_aux_loss",
        aux_loss_coeff=0.01,  # 0.1 before 2025-12-05
    ),
)


def _with_experts_of(dense: ModelConfig, mixture: ModelConfig) -> ModelConfig:
    """`dense` with the experts of `mixture`, each as wide as its MLP."""
    assert mixture.moe is not None
    width = dense.ffn_hidden_size
    shared = width if mixture.moe.shared_ffn_hidden_size else 0
    return dense.replace(moe=replace(mixture.moe, ffn_hidden_size=width, shared_ffn_hidden_size=shared))


# Four layers for PP 2 with two virtual stages, two key-value heads for TP 2.
_MINIMIND3_TINY = _MINIMIND3.replace(
    hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, ffn_hidden_size=448
)
_MINIMIND2_TINY = _MINIMIND2.replace(hidden_size=128, num_layers=4, head_dim=16, ffn_hidden_size=384)

PRESETS: dict[str, ModelConfig] = {
    "minimind3": _MINIMIND3,
    "minimind3_moe": _MINIMIND3_MOE,
    "minimind2_small": _MINIMIND2_SMALL,
    "minimind2": _MINIMIND2,
    "minimind2_moe": _MINIMIND2_MOE,
    "minimind2_moe_768": _with_experts_of(_MINIMIND2, _MINIMIND2_MOE),
    "minimind3_tiny": _MINIMIND3_TINY,
    "minimind3_moe_tiny": _with_experts_of(_MINIMIND3_TINY, _MINIMIND3_MOE),
    "minimind2_small_tiny": _MINIMIND2_TINY.replace(hidden_size=64, head_dim=8, ffn_hidden_size=192),
    "minimind2_tiny": _MINIMIND2_TINY,
    "minimind2_moe_tiny": _with_experts_of(_MINIMIND2_TINY, _MINIMIND2_MOE),
    "minimind2_moe_768_tiny": _with_experts_of(_MINIMIND2_TINY.replace(num_layers=8), _MINIMIND2_MOE),
}


def lookup(kind: str, table: Mapping[str, T], name: str) -> T:
    """The entry of that name; case and `-` for `_` do not matter.

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    key = name.lower().replace("-", "_")
    if key in table:
        return table[key]
    hint = did_you_mean(key, table, begin=". Did") or "."
    raise UserError(f"no {kind} is called {name!r}{hint} Known: {', '.join(table)}")


def get_preset(name: str) -> ModelConfig:
    """The preset of that name, or a `UserError` that suggests the nearest."""
    return lookup("model preset", PRESETS, name)


def find_model(name: str) -> ModelConfig:
    """The preset of that name, or the model that an HF directory or `config.json` of that path describes."""
    if name.lower().replace("-", "_") in PRESETS:  # even where a directory has that name
        return get_preset(name)
    path = Path(name)
    is_path = path.suffix == ".json" or len(path.parts) > 1 or path.exists()
    return ModelConfig.from_hf_config(name) if is_path else get_preset(name)


def table() -> str:
    """The presets as an aligned text table."""
    lines = [f"{'name':<24}{'parameters':>12}{'active':>12}{'layers':>8}{'hidden':>8}"]
    for name, config in PRESETS.items():
        total, active = config.num_parameters(), config.num_active_parameters()
        lines.append(f"{name:<24}{total:>12,}{active:>12,}{config.num_layers:>8}{config.hidden_size:>8}")
    return "\n".join(lines)


def flags_of(name: str) -> list[str]:
    """Return a model's Megatron flags, and say what training leaves out."""
    config = find_model(name)
    if config.inference_rope_scaling:
        print(f"note: {name} has inference_rope_scaling; training runs without it, as MiniMind's", file=sys.stderr)
    return config.megatron_flags()


def main(argv: Sequence[str] | None = None) -> None:
    """Print a preset's Megatron flags, one word a line, or the table."""
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
