"""What a dry run says of memory follows from what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.weights_on_disk import write_arguments

from minimind_mcore import arguments
from minimind_mcore.errors import UserError
from minimind_mcore.forecast import machines, memory
from minimind_mcore.models.presets import get_preset
from minimind_mcore.training import checkpointing
from minimind_mcore.training.checkpointing import previews
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.summary import workload
from minimind_mcore.validation import validate

RUN = "--seq-length 64 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 2".split()
LORA = "--lora-r 4 --lora-target-modules linear_qkv linear_fc2".split()


def estimate(*flags: str, name: str = "minimind3_tiny", sequences: int = 1) -> tuple[dict[str, float], int]:
    """The estimate for one process, and the bytes of a checkpoint."""
    args = arguments.parse([*get_preset(name).megatron_flags(), *RUN, *flags], posttrain=True)
    config = TrainConfig.from_args(args, validate(args, 1))
    found = memory.of_training(workload(config, sequences), machines.machine("cpu"))
    return found, checkpointing.expected_bytes(config)


@pytest.mark.parametrize("name", ["minimind3_tiny", "minimind3_moe_tiny", "minimind2_moe_tiny"])
def test_lora_has_gradients_and_moments_of_adapters_alone(name: str) -> None:
    model = get_preset(name)
    adapters = model.num_adapter_parameters(4, ["linear_qkv", "linear_fc2"])
    (full, saved), (lora, saved_lora) = estimate(name=name), estimate(*LORA, name=name)
    assert full["gradients"] == 4 * model.num_parameters() and full["moments"] == 8 * model.num_parameters()
    assert lora["weights"] == full["weights"] + 4 * adapters
    assert lora["gradients"] == 4 * adapters and lora["moments"] == 8 * adapters
    assert saved == 12 * model.num_parameters() and saved_lora == 12 * adapters


def test_a_pair_has_the_activations_of_two_samples() -> None:
    (one, _), (two, _) = estimate(), estimate(sequences=2)
    assert {name for name in one if two[name] == 2 * one[name] > 0} == {"activations", "logits", "fragmentation"}
    assert all(two[name] == one[name] for name in ("weights", "gradients", "moments"))


LAYOUT = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
# What a run of minimind3_tiny on one process would take of checkpoints of its own, of TP=2, of minimind2_tiny.
PREVIEWS: dict[str, tuple[list[str], str]] = {
    "its own": (["--load", "{}/own"], "load {}/own/iter_0000001"),
    "to begin with": (["--load", "{}/none", "--pretrained-checkpoint", "{}/own"], "begin with {}/own/iter_0000001"),
    "of two, to begin with": (["--pretrained-checkpoint", "{}/two"], "begin with {}/two/iter_0000001"),
    "of two, resharded": (["--load", "{}/two", "--reshard"], "load {}/two/iter_0000001"),
    "adapters of LoRA": ([*LORA, "--pretrained-checkpoint", "{}/own", "--load", "{}/none"], "load nothing in {}/none"),
    "of two": (["--load", "{}/two"], "layout TP=2 PP=1 EP=1, and the run has TP=1 PP=1 EP=1; give --reshard"),
    "of another model": (["--load", "{}/other"], "num_attention_heads is 8 there and 4"),
    "to begin with of another": (["--pretrained-checkpoint", "{}/other"], "num_attention_heads is 8 there and 4"),
    "the base of another": ([*LORA, "--pretrained-checkpoint", "{}/other"], "num_attention_heads is 8 there and 4"),
    "the reference of another": (["--load", "{}/own", "--ref-model", "{}/other"], "num_attention_heads is 8"),
    "nothing to begin with": (["--pretrained-checkpoint", "{}/none"], "{}/none: found no checkpoint there"),
    "nothing to fine-tune": (["--load", "{}/none", "--finetune"], "{}/none: found no checkpoint there"),
    "nothing that must be": (["--load", "{}/none", "--exit-on-missing-checkpoint"], "found no checkpoint there"),
}


@pytest.mark.parametrize("name", PREVIEWS)
def test_a_dry_run_looks_at_what_the_run_would_load(name: str, tmp_path: Path) -> None:
    own, other = (get_preset(model).megatron_flags() for model in ("minimind3_tiny", "minimind2_tiny"))
    for folder, flags in {"own": own, "two": [*own, *LAYOUT], "other": other}.items():
        write_arguments(tmp_path / folder, flags)
    (tmp_path / "none").mkdir()
    more, expected = PREVIEWS[name]
    flags = [*own, *RUN, *(word.format(tmp_path) for word in more)]
    try:
        args = arguments.parse(flags, posttrain=True)
        config = TrainConfig.from_args(args, validate(args, 1))
        found = " ".join(f"{key} {text}" for key, text in previews(config).items())
    except UserError as error:
        found = str(error)
    assert expected.format(tmp_path) in found
