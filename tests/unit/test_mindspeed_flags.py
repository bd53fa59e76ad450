"""What the kit's command line becomes for MindSpeed-LLM: its traps are refused or worked round, and named."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from minimind_mcore.errors import UserError
from minimind_mcore.mindspeed.flags import complete
from minimind_mcore.models.presets import PRESETS

RUN = ["--transformer-impl", "local", "--ckpt-format", "torch", "--split", "100,0,0", "--data-path", "data", "--bf16"]
SFT = ["--stage", "sft", "--is-instruction-dataset"]


def flags_of(model: str = "minimind3", more: Sequence[str] = (), without: str = "") -> list[str]:
    """A complete command line, less one flag and its value."""
    words = [*PRESETS[model].megatron_flags(), *RUN, *more]
    if without:
        at = words.index(without)
        stop = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[at:stop]
    return words


@pytest.mark.parametrize("model", PRESETS)
def test_every_model_passes(model: str) -> None:
    flags, remarks = complete("pretrain_gpt.py", flags_of(model))
    assert not remarks and "--no-gradient-accumulation-fusion" in flags
    assert ("alltoall_seq" in flags) == (PRESETS[model].moe is not None)


PROBLEMS = {
    "dropout": (flags_of(without="--attention-dropout"), "default is 0.1"),
    "padded vocabulary": (flags_of(without="--padded-vocab-size"), "multiple of 128"),
    "split": (flags_of(without="--split"), "96.9%"),
    "D6": (flags_of(without="--transformer-impl"), "D6"),
    "D8": (flags_of(more=[*SFT, "--reset-attention-mask"]), "D8"),
    "D9": (
        flags_of(more=[*SFT, "--neat-pack", "--reset-attention-mask", "--micro-batch-size", "2"]), "D9",
    ),
    "neat pack": (flags_of(more=[*SFT, "--neat-pack"]), "would see each other"),
    "checkpoint format": (flags_of(more=["--save", "x", "--ckpt-format", "torch_dist"]), "torch checkpoints only"),
    "top 1": (flags_of("minimind3_moe", without="--moe-router-pre-softmax"), "always 1"),
    "normalised weights": (
        flags_of("minimind3_moe", more=["--moe-router-load-balancing-type", "seq_aux_loss"]), "is ignored with",
    ),
    "LoRA experts": (
        flags_of("minimind3_moe", ["--lora-target-modules", "linear_qkv", "--moe-token-dispatcher-type", "alltoall"]),
        "alltoall_seq",
    ),
    "DPO at TP": (flags_of(more=["--stage", "dpo", "--tensor-model-parallel-size", "2"]), "first token of each"),
    "stage": (flags_of(more=["--stage", "distill"]), "has no distill; BACKEND=native has (argument --stage: "),
    "loss": (flags_of(more=["--stage", "dpo", "--dpo-loss-type", "simpo"]), "has no simpo; BACKEND=native has ("),
    "rotary base": (flags_of(more=["--rotary-base", "1e6"]), "invalid int value: '1e6'"),
    "unknown": (flags_of(more=["--num-layer", "8"]), "did you mean --num-layers?"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_would_go_wrong_is_refused(name: str) -> None:
    flags, message = PROBLEMS[name]
    with pytest.raises(UserError) as error:
        complete("posttrain_gpt.py", flags)
    assert message in str(error.value)


def test_flags_of_the_dry_run_are_no_remark() -> None:
    _, remarks = complete("pretrain_gpt.py", flags_of(more=["--dry-run", "--data-pending", "--keep-last", "3"]))
    assert remarks == ["MindSpeed-LLM has no --keep-last: it keeps every checkpoint"]


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        complete("pretrain_gpt.py", ["--num-layers", "8", "--data-path", "x"])
    assert all(part in str(error.value) for part in ("dropout", "D6", "multiple of 128", "96.9%"))


def test_a_hugging_face_model_is_not_converted_on_the_fly(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for flag in ("--load", "--pretrained-checkpoint", "--ref-model"):
        with pytest.raises(UserError, match=r"D1, D2.*\n.*ckpt_convert_minimind_hf2mcore"):
            complete("posttrain_gpt.py", flags_of(more=[flag, str(tmp_path)]))


def test_fp32_leaves_out_the_distributed_optimizer() -> None:
    given = flags_of(more=["--use-distributed-optimizer"])
    flags, remarks = complete("pretrain_gpt.py", given)
    assert "--use-distributed-optimizer" in flags and not remarks
    flags, remarks = complete("pretrain_gpt.py", [flag for flag in given if flag != "--bf16"])
    assert "--use-distributed-optimizer" not in flags and "could not be resumed" in remarks[0]


def test_what_it_has_not_is_left_out_and_said() -> None:
    flags, remarks = complete(
        "pretrain_gpt.py", flags_of(more=["--decay-all", "--minimind-init", "normal", "--seed", "7"])
    )
    assert flags[-3:-1] == ["--seed", "7"] and "normal" not in flags
    assert [remark.split(":")[0] for remark in remarks] == [
        "MindSpeed-LLM has no --decay-all", "MindSpeed-LLM has no --minimind-init",
    ]  # fmt: skip


@pytest.mark.parametrize("trained", [True, False])
def test_converted_weights_begin_at_iteration_0_and_runs_go_on(tmp_path: Path, trained: bool) -> None:
    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1\n")
    # the name is also one of an argument, which the file carries
    content = {"args": argparse.Namespace(override_opt_param_scheduler=False), "model": {"x": torch.zeros(2)}}
    if trained:
        content["opt_param_scheduler"] = {}
    torch.save(content, folder / "model_optim_rng.pt")
    flags, remarks = complete("pretrain_gpt.py", flags_of(more=["--load", str(tmp_path)]))
    assert ("--finetune" in flags) == (not trained) == bool(remarks)
