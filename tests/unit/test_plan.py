"""What a dry run says of memory follows from what is trained."""

from __future__ import annotations

import pytest

from minimind_mcore import arguments
from minimind_mcore.models.presets import get_preset
from minimind_mcore.training import checkpointing
from minimind_mcore.training.layout import validate
from minimind_mcore.training.plan import memory_estimate

RUN = "--seq-length 64 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 2".split()
LORA = "--lora-r 4 --lora-target-modules linear_qkv linear_fc2".split()


def estimate(*flags: str, name: str = "minimind3_tiny", sequences: int = 1) -> tuple[dict[str, float], int]:
    """The estimate for one process, and the bytes of a checkpoint."""
    args = arguments.parse([*get_preset(name).megatron_flags(), *RUN, *flags], posttrain=True)
    return memory_estimate(args, validate(args, 1), sequences), checkpointing.expected_bytes(args)


@pytest.mark.parametrize("name", ["minimind3_tiny", "minimind3_moe_tiny", "minimind2_moe_tiny"])
def test_lora_has_gradients_and_moments_of_adapters_alone(name: str) -> None:
    model = get_preset(name)
    adapters = model.num_adapter_parameters(4, ["linear_qkv", "linear_fc2"])
    (full, saved), (lora, saved_lora) = estimate(name=name), estimate(*LORA, name=name)
    assert full["gradients"] == 4 * model.num_parameters() and full["optimizer"] == 8 * model.num_parameters()
    assert lora["weights"] == full["weights"] + 4 * adapters
    assert lora["gradients"] == 4 * adapters and lora["optimizer"] == 8 * adapters
    assert saved == 12 * model.num_parameters() and saved_lora == 12 * adapters


def test_a_pair_has_the_activations_of_two_samples() -> None:
    (one, _), (two, _) = estimate(), estimate(sequences=2)
    assert {name for name in one if two[name] == 2 * one[name]} == {"activations", "logits"}
    assert all(two[name] == one[name] for name in ("weights", "gradients", "optimizer"))
