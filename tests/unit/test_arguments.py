"""Megatron's flags are the interface: all are known, and none is silently ignored where it would change a run."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.engine import ROOT, as_flags

from minimind_mcore import arguments
from minimind_mcore.arguments import IMPLEMENTED, NO_EFFECT, POSTTRAIN, POSTTRAIN_NO_EFFECT, parse
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import build_parser, flag_table, supported_values
from minimind_mcore.models.config import _FIXED_ARGS, ModelConfig
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.models.recipes import RECIPES
from minimind_mcore.training import config
from minimind_mcore.validation import validate

TABLE = flag_table()
BY_DEST = {record["dest"]: record for record in TABLE.values()}
EXAMPLES = {
    "int": ("3", 3),
    "float": ("0.25", 0.25),
    "json": ("[1, 0]", [1, 0]),
    "truth": ("true", True),
    "bool": ("1", True),
}


def command_line(preset: str = "minimind3_tiny", **changes: Any) -> list[str]:
    """A valid command line; changes by flag name, None leaves one out."""
    values = {"seq_length": 64, "micro_batch_size": 2, "global_batch_size": 8, "lr": 1e-3, "train_iters": 10}
    return [*PRESETS[preset].megatron_flags(), *as_flags(values | changes)]


def test_every_flag_has_the_default_of_the_reference() -> None:
    defaults = vars(build_parser().parse_args([]))
    for dest, record in BY_DEST.items():
        default = record.get("default")
        if record.get("action") in ("store_true", "store_false") and "default" not in record:
            default = record["action"] == "store_false"
        if record.get("type") in ("int", "float") and isinstance(default, str):
            default = float(default)
        assert defaults[dest] == default, dest


def test_every_flag_takes_a_value_of_its_type() -> None:
    for flag, record in TABLE.items():
        if "action" in record or record.get("nargs") == 0:
            words, expected = [flag], record.get("action") != "store_false"
        else:
            choices = [choice for choice in record.get("choices", []) if choice is not None]
            word, expected = (
                (str(choices[-1]), choices[-1]) if choices else EXAMPLES.get(record.get("type", ""), ("a", "a"))
            )
            words = [flag, *[word] * (record["nargs"] if isinstance(record.get("nargs"), int) else 1)]
            expected = [expected] * (len(words) - 1) if "nargs" in record and record["nargs"] != "?" else expected
        if record.get("action") in (None, "store_true", "store_false"):
            assert getattr(build_parser().parse_args(words), record["dest"]) == expected, flag


def test_unknown_flag_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown flag --micro-batchsize; did you mean --micro-batch-size\?"):
        parse([*command_line(), "--micro-batchsize", "4"])
    with pytest.raises(UserError, match="unknown flag --num-layer; "):  # Megatron's argparse would take the prefix
        parse([*command_line(), "--num-layer", "4"])


@pytest.mark.parametrize(
    ("flag", "origin"),
    [("--multi-latent-attention", "Megatron-LM core_v0.12.1"), ("--moe-fb-overlap", "MindSpeed"), ("--skip-train", "")],
)
def test_flag_that_is_not_implemented_is_refused_by_name_and_origin(flag: str, origin: str) -> None:
    with pytest.raises(UserError, match=rf"{flag}: known to {origin}.*not implemented by the native engine"):
        parse([*command_line(), flag])


def test_flags_without_effect_are_listed() -> None:
    args = parse([*command_line(), "--use-fused-rmsnorm", "--no-rope-fusion", "--use-flash-attn"])
    assert args.no_effect == ["--use-fused-rmsnorm", "--no-rope-fusion", "--use-flash-attn"]


def test_support_of_a_flag_is_said_once() -> None:
    sets = (IMPLEMENTED, NO_EFFECT, POSTTRAIN, POSTTRAIN_NO_EFFECT)
    assert len(frozenset().union(*sets)) == sum(map(len, sets))
    assert BY_DEST.keys() >= frozenset().union(*sets)
    assert supported_values().keys() <= IMPLEMENTED


def test_every_implemented_flag_is_read_somewhere() -> None:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    # `fields_from` hands the settings over that have the names of these fields.
    kinds = (GPTDatasetConfig, DistributedDataParallelConfig, OptimizerConfig)
    read = set(supported_values()) | FIELDS & {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for folder in (ROOT / "minimind_mcore", ROOT / "models"):
        for file in folder.rglob("*.py"):
            if not {"inference", "mindspeed", "serve"} & set(file.parts):  # flags of their own, and of MindSpeed-LLM
                read |= names_read(file)
    assert not (IMPLEMENTED | POSTTRAIN) - read, "in IMPLEMENTED, but nothing looks at it"
    assert not (NO_EFFECT | POSTTRAIN_NO_EFFECT) & read, "in NO_EFFECT, but something looks at it"


# The fields of the sections of TrainConfig.
FIELDS = {
    field.name
    for section in vars(config).values()
    if dataclasses.is_dataclass(section) and section is not config.TrainConfig
    for field in dataclasses.fields(section)
}


def names_read(file: Path) -> set[str]:
    """x of every `args.x` and `flags.get("x")`, the settings that training reads, and what a model fixes."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            of_args = getattr(owner, "id", getattr(owner, "attr", "")) == "args"
            if of_args or (node.attr in FIELDS and {"training", "posttrain"} & set(file.parts)):
                names.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "flags.get":
            names.add(getattr(node.args[0], "value", ""))
    if file.parent.name == "models" and file.name == "config.py":
        names |= {name for name, _, _ in _FIXED_ARGS}
    return names


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_implemented_flags_only(name: str) -> None:
    flags = [word for word in PRESETS[name].megatron_flags() if word.startswith("--")]
    assert {TABLE[flag]["dest"] for flag in flags} <= IMPLEMENTED


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_give_implemented_flags_only(name: str) -> None:
    ours = {"--lr-at-iteration-end", "--decay-all", "--minimind-init", "--distill-alpha", "--distill-temperature"}
    flags = [word for word in RECIPES[name].megatron_flags() if word.startswith("--") and word not in ours]
    assert {TABLE[flag]["dest"] for flag in flags} <= IMPLEMENTED | POSTTRAIN


VALUE_ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"moe_router_score_function": "sigmoid"},
        "--moe-router-score-function: found sigmoid, the native engine has softmax",
    ),
    ({"ckpt_format": "zarr"}, "--ckpt-format: found zarr, the native engine has torch, torch_dist"),
    ({"tokenizer_type": "Llama2Tokenizer"}, "--tokenizer-type: found Llama2Tokenizer"),
    ({"dataloader_type": "cyclic"}, "--dataloader-type: found cyclic, the native engine has single"),
    ({"sparse_mode": 4}, "--sparse-mode: found 4"),
    ({"optimizer_selection": "fused_ema_adamw"}, "--optimizer-selection: found fused_ema_adamw"),
    ({"moe_layer_freq": 2}, "--moe-layer-freq: found 2"),
    ({"seq_length": "long"}, "invalid int value: 'long'"),
]


@pytest.mark.parametrize(("changes", "message"), VALUE_ERRORS, ids=[str(c) for c, _ in VALUE_ERRORS])
def test_value_that_would_train_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(command_line(**changes))


def test_another_layer_spec_is_refused() -> None:
    ours = ["--spec", "minimind_mcore.models.minimind_spec", "layer_spec"]
    assert parse([*command_line(), *ours]).spec == ours[1:]
    with pytest.raises(UserError, match="--spec: found"):
        parse([*command_line(), "--spec", "mindspeed_llm.tasks.models.spec.qwen3_spec", "layer_spec"])


COMBINATIONS: list[tuple[int, dict[str, Any], str]] = [
    (4, {"tensor_model_parallel_size": 4}, "--num-query-groups 2 is not a multiple of TP=4"),
    (3, {"tensor_model_parallel_size": 3}, "--num-attention-heads 4 is not a multiple of TP=3"),
    (3, {"pipeline_model_parallel_size": 3}, "--num-layers 4 is not a multiple of PP=3"),
    (3, {"tensor_model_parallel_size": 2}, "3 processes cannot be split into TP=2 x PP=1: expected a multiple of 2"),
    (2, {"context_parallel_size": 2}, "--context-parallel-size 2"),
    (2, {"expert_model_parallel_size": 2}, "--expert-model-parallel-size 2 needs a model with experts"),
    (1, {"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size: found 0, expected 1 or more"),
    (1, {"global_batch_size": 7}, "--global-batch-size 7 is not a multiple of --micro-batch-size 2 x DP 1 = 2"),
    (8, {"global_batch_size": 8}, "--global-batch-size 8 is not a multiple of --micro-batch-size 2 x DP 8 = 16"),
    (1, {"micro_batch_size": None}, "--micro-batch-size is missing"),
    (1, {"seq_length": 40000}, "--seq-length: found 40000, expected at most --max-position-embeddings 32768"),
    (1, {"lr": None}, "--lr is missing"),
    (1, {"min_lr": 0.1}, "--min-lr 0.1 is above --lr 0.001"),
    (1, {"train_iters": None}, "--train-iters is missing"),
    (1, {"train_samples": 80}, "--train-iters and --train-samples say the same thing"),
    (1, {"lr_warmup_iters": 10}, "--lr-warmup-iters 10 leaves nothing of the 10 iterations"),
    (1, {"lr_decay_style": "WSD"}, "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    (1, {"start_weight_decay": 0.1}, "--start-weight-decay and --end-weight-decay: give both, or neither"),
    (1, {"weight_decay_incr_style": "linear"}, "--weight-decay-incr-style linear needs --start-weight-decay"),
    (1, {"bf16": True, "fp16": True}, "--bf16 and --fp16: give one"),
    (1, {"save_interval": 5}, "--save-interval needs --save"),
    (1, {"overlap_param_gather": True}, "--overlap-param-gather needs --use-distributed-optimizer"),
    (1, {"recompute_granularity": "full"}, "--recompute-granularity full needs --recompute-method"),
    (1, {"num_layers_per_virtual_pipeline_stage": 1}, "needs --pipeline-model-parallel-size 2 or more"),
    (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "global_batch_size": 6},
        "interleaved pipeline: 3 micro-batches are not a multiple of PP=2",
    ),
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 63}, "--seq-length 63 is not"),
]  # fmt: skip


@pytest.mark.parametrize(("processes", "changes", "message"), COMBINATIONS, ids=[m[:50] for _, _, m in COMBINATIONS])
def test_contradiction_is_named_with_what_was_found_and_expected(
    processes: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        validate(parse(command_line(**changes)), processes)


def test_experts_with_tensor_parallelism_need_sequence_parallelism() -> None:
    with pytest.raises(UserError, match="need --sequence-parallel"):
        validate(parse(command_line("minimind3_moe_tiny", tensor_model_parallel_size=2)), 2)
    with pytest.raises(UserError, match="--expert-model-parallel-size 3 does not divide the 2 data-parallel ranks"):
        validate(parse(command_line("minimind3_moe_tiny", expert_model_parallel_size=3)), 2)


def test_validation_fills_in_what_follows_under_megatrons_names() -> None:
    args = parse(command_line(tensor_model_parallel_size=2, train_samples=80, train_iters=None, bf16=True))
    layout = validate(args, 4)
    assert (layout.dp, args.data_parallel_size, args.num_microbatches) == (2, 2, 2)
    assert (args.train_iters, args.lr_decay_iters, args.world_size) == (10, 10, 4)
    assert args.accumulate_allreduce_grads_in_fp32


def test_flags_that_say_the_same_thing_give_the_same_model() -> None:
    plain = ModelConfig.from_args(parse(command_line()))
    words = command_line()
    at = words.index("--padded-vocab-size")
    by_vocab = ["--vocab-size", "6398", "--make-vocab-size-divisible-by", "128"]
    assert ModelConfig.from_args(parse([*words[:at], *words[at + 2 :], *by_vocab])) == plain
    at = words.index("--position-embedding-type")
    assert ModelConfig.from_args(parse([*words[:at], *words[at + 2 :]])) == plain
    words = command_line("minimind2_moe_tiny")
    at = words.index("--moe-shared-expert-intermediate-size")
    shared = ModelConfig.from_args(parse([*words[:at], *words[at + 2 :], "--n-shared-experts", "1"]))
    assert shared == PRESETS["minimind2_moe_tiny"]


@pytest.mark.parametrize(("per_chunk", "rank", "warnings"), [(2, 0, 1), (1, 0, 0), (2, 1, 0)])
def test_a_pipeline_that_is_not_virtual(
    per_chunk: int, rank: int, warnings: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag counts layers, not chunks: with 2 of the 2 layers of a stage, each stage is one chunk."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", str(rank))
    words = command_line(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=per_chunk)
    layout = validate(parse(words), 2)
    assert layout.vpp == (2 if per_chunk == 1 else None)
    assert capsys.readouterr().err.count("warning: ") == warnings


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments.parse(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--num-layers", "--use-fused-rmsnorm", "--keep-last", "--decay-all"))
