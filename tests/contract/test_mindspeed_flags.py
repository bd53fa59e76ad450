"""What the scripts pass to MindSpeed-LLM's programs is what these accept, and obeys the rules they assert.

The scripts run as dry runs with BACKEND=mindspeed-llm, which prints the command. flags.json has every flag of
MindSpeed-LLM 26.1.0 with its arity, type and choices; RULES are the checks that its code makes after parsing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.engine import ROOT, Corpus
from helpers.weights_on_disk import write_arguments

from minimind_mcore.inputs.flags import build_parser, flag_table
from minimind_mcore.mindspeed.flags import spelled
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.models.recipes import get_recipe

SCRIPTS = ROOT / "examples/mcore/minimind"


@dataclass(frozen=True)
class Command:
    """What a script would start: torchrun's flags, the program, and its flags as it parses them."""

    torchrun: dict[str, str]
    program: str
    words: list[str]
    args: argparse.Namespace

    @property
    def world(self) -> int:
        return int(self.torchrun["--nproc-per-node"]) * int(self.torchrun["--nnodes"])

    def given(self, *flags: str) -> bool:
        return set(flags) <= {word.split("=", 1)[0] for word in self.words}


# Every script that trains, every architecture, every kind of parallelism. (script, settings, kind of data)
RUNS: dict[str, tuple[str, dict[str, str], str]] = {
    "pretrain minimind3 TP": ("pretrain_minimind_ptd.sh", {"MODEL": "minimind3", "TP": "2"}, "text"),
    "pretrain minimind3_moe EP": ("pretrain_minimind_ptd.sh", {"MODEL": "minimind3_moe", "EP": "4"}, "text"),
    "pretrain minimind2 PP VPP": ("pretrain_minimind_ptd.sh", {"MODEL": "minimind2", "PP": "4", "VPP": "2"}, "text"),
    "pretrain minimind2_moe TP EP": (
        "pretrain_minimind_ptd.sh",
        {"MODEL": "minimind2_moe", "TP": "2", "EP": "2"},
        "text",
    ),
    "sft minimind3": ("tune_minimind_full_ptd.sh", {"MODEL": "minimind3", "TP": "2"}, "sft"),
    "sft minimind3 packed": ("tune_minimind_full_ptd.sh", {"MODEL": "minimind3", "PACK": "1"}, "sft"),
    "lora minimind2": ("tune_minimind_lora_ptd.sh", {"MODEL": "minimind2"}, "sft"),
    "lora minimind3_moe": ("tune_minimind_lora_ptd.sh", {"MODEL": "minimind3_moe"}, "sft"),
    "dpo minimind3": ("dpo_minimind_ptd.sh", {"MODEL": "minimind3"}, "dpo"),
}
TRAINING = re.compile(r"^run (?:pretrain|tune|lora|dpo)\b", re.M)


def test_every_script_that_trains_is_run() -> None:
    train = {path.name for path in SCRIPTS.glob("*_ptd.sh") if TRAINING.search(path.read_text(encoding="utf-8"))}
    assert {script for script, _, _ in RUNS.values()} == train


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MindSpeed-LLM that is only named."""
    folder = tmp_path_factory.mktemp("work space") / "MindSpeed-LLM"
    folder.mkdir()
    for program in ("pretrain_gpt.py", "posttrain_gpt.py"):
        (folder / program).touch()
    return folder


DryRun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def dry_run(home: Path, corpus: Corpus, dialogues: Corpus) -> DryRun:
    """Runs one of RUNS, with further settings and arguments, as a dry run."""
    prefixes = {"text": corpus.prefix, "sft": dialogues.prefix, "dpo": dialogues.prefix.with_name("pairs")}

    def weights(name: str) -> Path:
        """What a stage of post-training begins with: it is looked at, and not loaded."""
        root, (_, settings, _) = home.parent / f"weights of {name}", RUNS[name]
        if not root.exists():
            tp = ["--tensor-model-parallel-size", settings.get("TP", "1")]
            write_arguments(root, [*PRESETS[settings["MODEL"]].megatron_flags(), *tp])
        return root

    def run(name: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        script, settings, kind = RUNS[name]
        environ = {
            **{key: value for key, value in os.environ.items() if key not in ("REHEARSE", "PYTHONPATH")},
            **{"DEVICE": "cpu", "BACKEND": "mindspeed-llm", "MINDSPEED_LLM_HOME": str(home), "PYTHON": sys.executable},
            **{"NPUS_PER_NODE": "8", "TP": "1", "PRECISION": "bf16", "TRAIN_ITERS": "100"},
            **{"DATA_PATH": str(prefixes[kind]), "TOKENIZER_PATH": str(corpus.tokenizer)},
            **{"OUTPUT_DIR": str(home.parent / name)},
            **({"CKPT_LOAD_DIR": str(weights(name))} if kind != "text" else {}),
            **settings,
            **more,
        }
        command = ["bash", str(SCRIPTS / script), "--dry-run", *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)

    return run


@pytest.fixture(scope="module")
def commands(home: Path, dry_run: DryRun) -> dict[str, Command]:
    """What each of RUNS prints, two at a time."""

    def command(name: str) -> Command:
        done = dry_run(name)
        assert done.returncode == 0, done.stderr
        return parsed(command_line(done), home)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(command, RUNS), strict=True))


def command_line(done: subprocess.CompletedProcess[str]) -> str:
    [line] = [line for line in done.stdout.splitlines() if line.startswith("cd ")]
    return line


def parsed(line: str, home: Path) -> Command:
    words = shlex.split(line)
    assert words[:3] == ["cd", str(home), "&&"]
    at = next(n for n, word in enumerate(words) if word.endswith("_gpt.py"))
    start = words.index("minimind_mcore.launch") + 1
    torchrun = dict(zip(words[start:at:2], words[start + 1 : at : 2], strict=True))
    flags = words[at + 1 :]
    # argparse, with every flag of theirs: an unknown flag, a wrong arity, type or choice is an error
    return Command(torchrun, words[at], flags, build_parser().parse_args(flags))


@pytest.mark.parametrize("name", RUNS)
def test_flags_are_known(name: str, commands: dict[str, Command]) -> None:
    command = commands[name]
    given = [word.split("=", 1)[0] for word in command.words if word.startswith("--")]
    assert set(given) <= set(flag_table())
    twice = {flag for flag in given if given.count(flag) > 1}
    assert not twice, "the last one wins, which hides a mistake"
    assert command.program == ("pretrain_gpt.py" if name.startswith("pretrain") else "posttrain_gpt.py")


def divides(part: int, whole: int | None) -> bool:
    return whole is not None and whole % part == 0


# What MindSpeed-LLM 26.1.0, MindSpeed and Megatron-LM core_v0.12.1 check or assume, and where it was read.
# G: Megatron-LM, megatron/training/arguments.py unless named; L: mindspeed_llm; S: mindspeed.
Rule = Callable[[Command, argparse.Namespace], bool]
RULES: dict[str, Rule] = {
    "positions reach the sequence length (G:696)": lambda c, a: a.max_position_embeddings >= a.seq_length,
    "min-lr <= lr (G:702)": lambda c, a: a.min_lr <= a.lr,
    "save needs save-interval (G:704)": lambda c, a: not a.save or a.save_interval > 0,
    "grouped gemm in bf16 only (G:712)": lambda c, a: not a.moe_grouped_gemm or a.bf16,
    "fp16 or bf16, not both (G validate_args)": lambda c, a: not (a.fp16 and a.bf16),
    "fp16 has no expert parallelism (G validate_args)": lambda c, a: a.expert_model_parallel_size == 1 or not a.fp16,
    "processes are TP x PP x CP x DP": lambda c, a: divides(
        a.tensor_model_parallel_size * a.pipeline_model_parallel_size * a.context_parallel_size, c.world
    ),
    "heads and groups are split by TP": lambda c, a: (
        divides(a.tensor_model_parallel_size, a.num_attention_heads)
        and divides(a.tensor_model_parallel_size, a.num_query_groups)
    ),
    "MLP is split by TP": lambda c, a: divides(a.tensor_model_parallel_size, a.ffn_hidden_size),
    "layers are split by PP": lambda c, a: divides(a.pipeline_model_parallel_size, a.num_layers),
    "virtual stages split a stage (G validate_args; PP = 2 allowed by S training_basic.py:69-76)": lambda c, a: (
        a.num_layers_per_virtual_pipeline_stage is None
        or (
            a.pipeline_model_parallel_size >= 2
            and divides(a.num_layers_per_virtual_pipeline_stage, a.num_layers // a.pipeline_model_parallel_size)
        )
    ),
    "noop-layers or num-layer-list, not both": lambda c, a: not (a.noop_layers and a.num_layer_list),
    "experts are split by EP (G validate_args)": lambda c, a: divides(a.expert_model_parallel_size, a.num_experts or 1),
    "EP without experts (G validate_args)": lambda c, a: a.num_experts or a.expert_model_parallel_size == 1,
    "experts under TP need sequence parallelism (G moe_layer)": lambda c, a: (
        not a.num_experts or a.tensor_model_parallel_size == 1 or a.sequence_parallel
    ),
    "batch is split by micro-batch and DP": lambda c, a: divides(
        a.micro_batch_size
        * (c.world // (a.tensor_model_parallel_size * a.pipeline_model_parallel_size * a.context_parallel_size)),
        a.global_batch_size,
    ),
    "micro-batch size is given (G validate_args)": lambda c, a: a.micro_batch_size is not None,
    "top-1 needs pre-softmax (G transformer_config.py:976)": lambda c, a: (
        not a.num_experts or a.moe_router_topk > 1 or a.moe_router_pre_softmax
    ),
    "norm-topk-prob has effect, or none is needed (L router.py:553,572)": lambda c, a: (
        not a.norm_topk_prob
        or not a.moe_router_pre_softmax  # the softmax over the chosen ones has normalised them
        or a.moe_router_load_balancing_type in ("aux_loss", "softmax_topk")
    ),
    "LoRA with experts wants alltoall_seq (L lora.py:62)": lambda c, a: (
        not (a.num_experts and a.lora_target_modules) or a.moe_token_dispatcher_type == "alltoall_seq"
    ),
    "LoRA targets are Megatron's": lambda c, a: (
        set(a.lora_target_modules or []) <= {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    ),
    "neat-pack needs reset-attention-mask (L training_basic.py:54)": lambda c, a: (
        not a.neat_pack or a.reset_attention_mask
    ),
    "fine-tuning resets attention only when packed (D8)": lambda c, a: (
        a.stage is None or not a.reset_attention_mask or a.neat_pack
    ),
    "stage names its data": lambda c, a: {None: True, "sft": a.is_instruction_dataset, "dpo": a.is_pairwise_dataset}[
        a.stage
    ],
    "layers are local (D6)": lambda c, a: a.transformer_impl == "local",
    "checkpoints are ones that converters read": lambda c, a: a.ckpt_format == "torch",
    "no dropout (default 0.1)": lambda c, a: (
        a.attention_dropout == a.hidden_dropout == 0.0 and c.given("--attention-dropout", "--hidden-dropout")
    ),
    "vocabulary is not padded (default 128 x TP)": lambda c, a: (
        a.make_vocab_size_divisible_by == 1 and divides(a.tensor_model_parallel_size, a.padded_vocab_size)
    ),
    "rotary base is an int": lambda c, a: isinstance(a.rotary_base, int) and a.rotary_base >= 10000,
    "groups are given with their switch": lambda c, a: a.group_query_attention and a.num_query_groups > 1,
    "MLP width is given (default 8h/3)": lambda c, a: c.given("--ffn-hidden-size", "--kv-channels"),
    "split is given (default 969,30,1; G:397)": lambda c, a: a.split is not None,
    "MiniMind's layer": lambda c, a: (
        # Here only pretraining begins with new weights: minimind3_moe then learns by straight_through.
        a.spec
        == [
            "minimind_mcore.models.minimind_spec",
            ("straight_through_" if a.moe_router_topk == 1 and a.num_experts and not a.stage else "") + "layer_spec",
        ]
        and (a.normalization, a.position_embedding_type) == ("RMSNorm", "rope")
        and a.swiglu
        and not a.add_bias_linear
        and not a.untie_embeddings_and_output_weights
    ),
    "fused kernels": lambda c, a: (
        a.use_flash_attn and a.use_fused_rmsnorm and a.use_fused_swiglu and a.use_fused_rotary_pos_emb
    ),
    "tokenizer is a directory of Hugging Face": lambda c, a: (
        a.tokenizer_type == "PretrainedFromHF" and Path(a.tokenizer_name_or_path, "tokenizer.json").is_file()
    ),
    "paths are absolute, as the program runs in a folder of its own": lambda c, a: all(
        os.path.isabs(path) for path in (a.load, a.save, a.tensorboard_dir, a.tokenizer_name_or_path, *a.data_path)
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_is_obeyed(rule: str, commands: dict[str, Command]) -> None:
    broken = [name for name, command in commands.items() if not RULES[rule](command, command.args)]
    assert not broken


# A command line that breaks a rule, so that none of them always holds: the flags that break it.
BREAKS: dict[str, list[str]] = {
    "positions reach": ["--max-position-embeddings", "8"],
    "min-lr": ["--min-lr", "1"],
    "processes are": ["--context-parallel-size", "3"],
    "heads and groups": ["--tensor-model-parallel-size", "3"],
    "layers are split": ["--pipeline-model-parallel-size", "3"],
    "experts are split": ["--num-experts", "4", "--expert-model-parallel-size", "3"],
    "EP without": ["--expert-model-parallel-size", "2"],
    "top-1 needs": ["--num-experts", "4", "--moe-router-topk", "1"],
    "neat-pack needs": ["--neat-pack"],
    "layers are local": ["--transformer-impl", "transformer_engine"],
    "no dropout": ["--hidden-dropout", "0.1"],
    "vocabulary": ["--make-vocab-size-divisible-by", "128"],
    "batch is split": ["--global-batch-size", "7"],
    "LoRA with experts": ["--num-experts", "4", "--lora-target-modules", "linear_qkv"],
    "MiniMind's layer": ["--untie-embeddings-and-output-weights"],
}


@pytest.mark.parametrize("start", BREAKS)
def test_rule_can_be_broken(start: str, commands: dict[str, Command]) -> None:
    [rule] = [name for name in RULES if name.startswith(start)]
    whole = commands["pretrain minimind3 TP"]
    words = [*whole.words, *BREAKS[start]]
    args = build_parser().parse_args(words)
    assert not RULES[rule](Command(whole.torchrun, whole.program, words, args), args)


PACKED = "sft minimind3 packed"


def test_packed_samples_come_one_in_a_micro_batch(home: Path, dry_run: DryRun) -> None:
    """D9; the global batch stays that of the recipe on eight ranks."""
    recipe = get_recipe("minimind3_sft")
    assert recipe.micro_batch_size > 1
    batch = recipe.global_batch_size(8)
    for settings, said in (({}, True), ({"MBS": "1"}, False)):
        done = dry_run(PACKED, **settings)
        assert done.returncode == 0, done.stderr
        assert ("PACK=1: micro-batches of 1 (MBS=1)" in done.stderr) == said
        args = parsed(command_line(done), home).args
        assert (args.micro_batch_size, args.global_batch_size, args.neat_pack) == (1, batch, True)
    native = dry_run(PACKED, BACKEND="native", NPUS_PER_NODE="1")  # ends where there are no weights to begin with
    assert "--micro-batch-size 16" in native.stdout and "PACK=1" not in native.stderr
    unpacked = parsed(command_line(dry_run(PACKED, PACK="0")), home).args
    assert (unpacked.micro_batch_size, unpacked.global_batch_size, unpacked.neat_pack) == (16, batch, False)


@pytest.mark.parametrize(("arguments", "settings"), [((), {"MBS": "2"}), (("--micro-batch-size", "2"), {})])
def test_packed_samples_are_refused_in_larger_micro_batches(
    arguments: tuple[str, ...], settings: dict[str, str], dry_run: DryRun
) -> None:
    done = dry_run(PACKED, *arguments, **settings)
    assert done.returncode == 1 and "(D9); use MBS=1" in done.stderr and "PACK=1: micro" not in done.stderr


def test_fp16_begins_with_a_loss_scale_that_fits(dry_run: DryRun) -> None:
    """Megatron's 2^32 skips the first steps; a save before the first applied step is a KeyError in its optimizer."""

    def scales(*flags: str, precision: str = "fp16", backend: str = "mindspeed-llm") -> list[str]:
        done = dry_run("pretrain minimind3 TP", *flags, PRECISION=precision, BACKEND=backend, NPUS_PER_NODE="2")
        words = next(line for line in done.stdout.splitlines() if "_gpt.py" in line).split()
        return [words[i + 1] for i, word in enumerate(words) if word == "--initial-loss-scale"]

    assert scales() == scales(backend="native") == scales("--fp16", precision="fp32") == ["65536"]
    assert scales("--initial-loss-scale", "1024") == ["1024"] and scales("--loss-scale", "128") == []
    assert scales(precision="bf16") == []


@pytest.mark.parametrize("preset", PRESETS)
def test_flags_of_every_model(preset: str) -> None:
    """The presets' own flags, by themselves: names, arities and types."""
    args = build_parser().parse_args(PRESETS[preset].megatron_flags())
    assert args.hidden_size == PRESETS[preset].hidden_size
    assert (args.attention_dropout, args.hidden_dropout, args.make_vocab_size_divisible_by) == (0.0, 0.0, 1)
    assert args.num_experts is None or args.moe_router_topk > 1 or (args.moe_router_pre_softmax and args.norm_topk_prob)


def test_ranks_get_one_connection() -> None:
    """Megatron asserts CUDA_DEVICE_MAX_CONNECTIONS=1 where TP or CP is more than one (G:779)."""
    shown = subprocess.run(
        ["bash", "-c", f"source '{SCRIPTS}/common.sh' && printenv CUDA_DEVICE_MAX_CONNECTIONS"],
        env={**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == "1", shown.stderr


@pytest.mark.parametrize(("flag", "expected"), [("--variable-seq-lengths", 0), ("--no-pad-to-seq-lengths", 1)])
def test_an_older_release_gets_its_own_names(flag: str, expected: int, tmp_path: Path) -> None:
    definitions = tmp_path / "mindspeed_llm/features_manager/finetune/finetune.py"
    definitions.parent.mkdir(parents=True)
    definitions.write_text(f"group.add_argument('{flag}', action='store_true')\n")
    names = ["--variable-seq-lengths", "--no-pad-to-seq-lengths"]
    assert spelled(["--no-pad-to-seq-lengths", "--bf16"], tmp_path) == [names[expected], "--bf16"]
    packed = ["--neat-pack"] if expected else ["--neat-pack", "--reset-position-ids"]
    assert spelled(["--neat-pack"], tmp_path) == packed
