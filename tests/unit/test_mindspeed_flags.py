"""What the kit's command line becomes for MindSpeed-LLM: its traps are refused or worked round, and named."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weights_on_disk import write_arguments

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import build_parser
from minimind_mcore.mindspeed.flags import complete, require_files
from minimind_mcore.mindspeed.launch import size
from minimind_mcore.models.presets import PRESETS

RUN = ["--transformer-impl", "local", "--ckpt-format", "torch", "--split", "100,0,0", "--data-path", "data", "--bf16"]
RUN += ["--seq-length", "64", "--micro-batch-size", "1", "--train-iters", "10", "--lr", "1e-3", "--sequence-parallel"]
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
    "blend without weights": (flags_of(more=["--data-path", "one", "two"]), "--data-path has 2 sets and no weights"),
    "blend with a weight of 0": (flags_of(more=["--data-path", "0", "one", "1", "two"]), "the weight of one is 0"),
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
    "stage": (flags_of(more=["--stage", "distill"]), "has no distill; BACKEND=native has it (argument --stage: "),
    "loss": (flags_of(more=["--stage", "dpo", "--dpo-loss-type", "simpo"]), "has no simpo; BACKEND=native has it ("),
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


def test_another_sample_order_is_one_warning_with_both_values(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000004" / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4\n")
    given = flags_of(more=["--load", str(tmp_path)])
    args = build_parser(prog="pretrain_gpt.py").parse_args(given)
    args.seed, args.data_path = 7, ["elsewhere"]
    torch.save({"args": args, "model": {}, "opt_param_scheduler": {}}, folder / "model_optim_rng.pt")
    flags, remarks = complete("pretrain_gpt.py", given)
    assert "--finetune" not in flags and len(remarks) == 1
    assert "--seed is 7 there and 1234 here; --data-path is elsewhere there and" in remarks[0]
    args.seed, args.data_path = 1234, build_parser(prog="pretrain_gpt.py").parse_args(given).data_path
    torch.save({"args": args, "model": {}, "opt_param_scheduler": {}}, folder / "model_optim_rng.pt")
    assert complete("pretrain_gpt.py", given)[1] == []


def resumed_run(folder: Path, *words: str, **saved: Any) -> list[str]:
    """Flags of a run that resumes from a checkpoint whose arguments are those flags with `saved`."""
    (folder / "iter_0000004" / "mp_rank_00").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("4\n")
    given = flags_of(more=["--load", str(folder), *words])
    args = build_parser(prog="pretrain_gpt.py").parse_args(given)
    vars(args).update(saved, iteration=4)
    torch.save(
        {"args": args, "model": {}, "opt_param_scheduler": {}}, folder / "iter_0000004/mp_rank_00/model_optim_rng.pt"
    )
    return given


def test_an_override_that_megatron_does_not_follow_is_refused(tmp_path: Path) -> None:
    given = resumed_run(tmp_path, "--override-opt_param-scheduler", "--lr", "1e-4", "--min-lr", "1e-5", lr=1e-3)
    with pytest.raises(UserError, match=r"--lr is 0\.001 in .*iter_0000004 and 0\.0001 on the command line") as error:
        complete("pretrain_gpt.py", given)
    assert "--min-lr" not in str(error.value) and "BACKEND=native" in str(error.value)
    assert complete("pretrain_gpt.py", [*given, "--finetune"])[1] == []
    assert complete("pretrain_gpt.py", [*given, "--lr", "1e-3"])[1] == []


def test_a_resumed_run_says_which_values_the_checkpoint_decides(tmp_path: Path) -> None:
    given = resumed_run(tmp_path, "--adam-beta2", "0.95", adam_beta2=0.999)
    _, remarks = complete("pretrain_gpt.py", given)
    assert len(remarks) == 1 and "--adam-beta2 is 0.999 there and 0.95 here. The run uses the check" in remarks[0]
    _, remarks = complete("pretrain_gpt.py", [*given, "--no-load-optim"])
    assert len(remarks) == 1 and "begins the learning-rate schedule at 0" in remarks[0] and "iteration 4" in remarks[0]


# ------------------------------------------------------------------------------------------------ layouts


def sizes(tp: int = 1, pp: int = 1, ep: int = 1) -> list[str]:
    """Flags of a layout."""
    named = {"tensor": tp, "pipeline": pp, "expert": ep}
    return [word for name, size in named.items() for word in (f"--{name}-model-parallel-size", str(size))]


# Model, layout, processes, what is said.
LAYOUTS = {
    "heads": ("minimind3_tiny", sizes(tp=8), 8, "--num-attention-heads 4 is not a multiple of TP=8"),
    "layers": ("minimind3_tiny", sizes(pp=3), 3, "--num-layers 4 is not a multiple of PP=3"),
    "experts": ("minimind3_moe_tiny", sizes(ep=3), 3, "--num-experts 4 is not a multiple of EP=3"),
    "devices": ("minimind3_moe_tiny", sizes(tp=2, ep=2), 2, "does not divide the 1 data-parallel ranks of TP=2 PP=1"),
    "batch": ("minimind3_tiny", ["--global-batch-size", "3"], 2, "not a multiple of --micro-batch-size 1 x DP 2"),
    "length": ("minimind3_tiny", ["--seq-length", "40000"], 1, "expected at most --max-position-embeddings"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_does_not_divide_is_refused_before_ranks_start(name: str) -> None:
    model, more, count, message = LAYOUTS[name]
    with pytest.raises(UserError) as error:
        complete("pretrain_gpt.py", flags_of(model, more), count)
    assert message in str(error.value)


def test_layouts_that_only_mindspeed_llm_has_are_left_to_it() -> None:
    for more in (["--context-parallel-size", "2"], ["--expert-tensor-parallel-size", "1"]):
        complete("pretrain_gpt.py", flags_of("minimind3_moe_tiny", [*sizes(tp=2, ep=2), *more]), 2)
    uneven = ["--num-layer-list", "1,3", *sizes(pp=2)]
    complete("pretrain_gpt.py", flags_of("minimind3_tiny", uneven), 2)


def test_data_that_is_not_there_yet_does_not_tell_the_length_of_the_run() -> None:
    flags = flags_of(without="--train-iters")
    complete("pretrain_gpt.py", [*flags, "--data-pending", "--dry-run"])
    with pytest.raises(UserError, match="--train-iters is missing"):
        complete("pretrain_gpt.py", flags)


def test_processes_are_those_of_all_hosts() -> None:
    assert size(["--nproc-per-node", "8", "--nnodes", "2", "--node-rank", "0"]) == (16, 2)
    assert size(["--nnodes=1", "--nproc-per-node=4"]) == (4, 1)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints of minimind3_tiny at TP=1 and TP=2, one of another model, one of torch_dist, an empty directory."""
    for name, model, layout in (
        ("whole", "minimind3_tiny", sizes()),
        ("two", "minimind3_tiny", sizes(tp=2)),
        ("other", "minimind2_tiny", sizes()),
        ("cut", "minimind3_tiny", sizes(tp=2)),
    ):
        write_arguments(tmp_path / name, [*PRESETS[model].megatron_flags(), *layout])
    (tmp_path / "cut/iter_0000001/mp_rank_01/model_optim_rng.pt").unlink()
    (tmp_path / "dist/iter_0000001").mkdir(parents=True)
    (tmp_path / "dist/latest_checkpointed_iteration.txt").write_text("1")
    (tmp_path / "dist/iter_0000001/metadata.json").write_text("{}")
    (tmp_path / "none").mkdir()
    return tmp_path


LORA = ["--lora-target-modules", "linear_qkv"]
DPO = ["--stage", "dpo", "--is-pairwise-dataset"]
# A training from `whole`, with a checkpoint of these flags; None: it is accepted.
BEGIN = ["--load", "{}/none", "--pretrained-checkpoint", "{}/whole"]
CHECKPOINTS: dict[str, tuple[list[str], str | None]] = {
    "nothing yet": (["--load", "{}/none"], None),
    "resumed": (["--load", "{}/whole"], None),
    "fine-tuned": ([*SFT, *BEGIN], None),
    "resumed, and its beginning is gone": ([*SFT, "--load", "{}/whole", "--pretrained-checkpoint", "{}/none"], None),
    "TP=2": ([*SFT, "--load", "{}/none", "--pretrained-checkpoint", "{}/two", *sizes(tp=2)], None),
    "no weights": ([*SFT, "--load", "{}/none", "--pretrained-checkpoint", "{}/no"], "checkpoint {}/no: found no"),
    "of LoRA": ([*SFT, *LORA, "--load", "{}/none", "--pretrained-checkpoint", "{}/none"], "checkpoint {}/none: found"),
    "no reference": ([*DPO, *BEGIN, "--ref-model", "{}/none"], "--ref-model {}/none: found no checkpoint"),
    "no adapters": ([*SFT, *LORA, *BEGIN, "--lora-load", "{}/none"], "--lora-load {}/none: found no checkpoint"),
    "random weights, fine-tuned": (["--load", "{}/none", "--finetune"], "--load {}/none: found no checkpoint"),
    "a checkpoint that must be": (["--load", "{}/none", "--exit-on-missing-checkpoint"], "found no checkpoint"),
    "an iteration that is not there": (["--load", "{}/whole", "--ckpt-step", "7"], "iter_0000007, which is not there"),
    "of two": (["--load", "{}/two"], "has the layout TP=2 PP=1 EP=1, and the run has TP=1 PP=1 EP=1"),
    "of one": ([*SFT, *BEGIN, *sizes(tp=2)], "TP=2 PP=1 EP=1 bash examples/mcore/minimind/ckpt_convert_minimind_mcore"),
    "of another model": (["--load", "{}/other"], "num_attention_heads is 8 there and 4 on the command line"),
    "the reference of another model": ([*DPO, *BEGIN, "--ref-model", "{}/other"], "{}/other/iter_0000001: num_att"),
    "adapters of another layout": ([*SFT, *LORA, *BEGIN, "--lora-load", "{}/two"], "/two/iter_0000001 has the layout"),
    "a part is missing": (["--load", "{}/cut", *sizes(tp=2)], "missing mp_rank_01/model_optim_rng.pt"),
    "torch_dist": (["--load", "{}/dist"], "is of the format torch_dist"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_would_not_load_is_refused_before_ranks_start(name: str, saved: Path) -> None:
    more, message = CHECKPOINTS[name]
    flags = flags_of("minimind3_tiny", [word.format(saved) for word in more])
    if message is None:
        complete("posttrain_gpt.py", flags, 2)
        return
    with pytest.raises(UserError) as error:
        complete("posttrain_gpt.py", flags, 2)
    assert message.format(saved) in str(error.value)


def test_each_of_several_hosts_may_have_its_own_part(saved: Path) -> None:
    complete("pretrain_gpt.py", flags_of("minimind3_tiny", ["--load", f"{saved}/cut", *sizes(tp=2)]), 2, hosts=2)


def test_files_of_a_job_are_there(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").touch()
    for name in ("a b.idx", "chats_packed_input_ids_document.idx"):
        (tmp_path / name).touch()
    good = ["--data-path", "0.3", f"{tmp_path}/a b", "0.7", f"{tmp_path}/chats"]
    good += ["--tokenizer-name-or-path", f"{tmp_path}/tokenizer", "--save", f"{tmp_path}/new/checkpoints"]
    require_files(good)
    wrong = {
        "--data-path": (f"{tmp_path}/none", r"no \S+none.idx, and no dataset of instructions or pairs"),
        "--tokenizer-name-or-path": (f"{tmp_path}/none", "no tokenizer.json there"),
        "--prompt-type-path": (f"{tmp_path}/none.json", "no such file"),
        "--save": (f"{tmp_path}/a b.idx/checkpoints", "cannot be written"),
    }
    for flag, (value, message) in wrong.items():
        with pytest.raises(UserError, match=message):
            require_files([*good, flag, value])
