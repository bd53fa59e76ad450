"""Damaged flags, config.json, YAML, manifests and trackers, for the fuzz."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.fuzz import NOT_JSON, WRONG, Case, flipped, write
from helpers.fuzz_files import open_all
from helpers.weights_on_disk import SMALL, config_json, state_dict, write_hf
from minimind_mcore import arguments
from minimind_mcore.converters.main import main_v1, main_v2
from minimind_mcore.inference import evaluation
from minimind_mcore.inference import main as inference
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import get_preset
from minimind_mcore.preprocess import main as preprocess
from minimind_mcore.preprocess.templates import template_entry
from minimind_mcore.rl.config.lint import lint
from minimind_mcore.storage import check_manifest, file_entry, write_manifest

# ------------------------------------------------------------------------------------------------------- flags

_INT = ("abc", "1.5", "", "nan", "-1", "1" + "0" * 30, "0x10", "9" * 5000)
_FLOAT = ("abc", "", "nan", "inf", "-inf", "-1", "1e999", "1,5")
_HF = ["--load-dir", "none", "--save-dir", "out", "--save-model-type", "hf"]
_V1 = ["--model-type", "GPT", "--use-mcore-models", "--loader", "hf", "--saver", "mg", "--load-dir", "none"]
_V1 += ["--save-dir", "out", "--tokenizer-model", "none"]
_LOAD = ["--load", "none", "--prompt", "a"]


def _train(words: list[str]) -> None:
    arguments.parse([*get_preset("minimind3_tiny").megatron_flags(), *words])


def _posttrain(words: list[str]) -> None:
    arguments.parse([*get_preset("minimind3_tiny").megatron_flags(), "--stage", "dpo", *words], posttrain=True)


def _programs() -> Sequence[tuple[str, Callable[[list[str]], None], Sequence[str], Sequence[str], Sequence[str]]]:
    """Name, program, its whole numbers, its other numbers, flags that it has not or that have few values."""
    return [
        (
            "pretrain",
            _train,
            "num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels num-query-groups seq-length "
            "max-position-embeddings micro-batch-size global-batch-size train-iters log-interval eval-interval "
            "save-interval padded-vocab-size tensor-model-parallel-size keep-last seed num-workers num-experts "
            "moe-router-topk lr-decay-iters".split(),
            "lr min-lr weight-decay clip-grad adam-beta1 adam-beta2 adam-eps norm-epsilon init-method-std "
            "attention-dropout lr-warmup-fraction moe-aux-loss-coeff".split(),
            ["--sq-length 3", "--lr-decay-style up", "--split a,b", "--split -1,2", "--moe-layer-freq 7", "--zz"],
        ),
        (
            "posttrain",
            _posttrain,
            "lora-r lora-alpha pad-to-multiple-of".split(),
            "dpo-beta dpo-label-smoothing pref-ftx gamma-beta-ratio distill-alpha distill-temperature".split(),
            ["--stage nothing", "--dpo-loss-type other"],
        ),
        (
            "preprocess",
            lambda words: preprocess.main(["--input", "none", "--tokenizer-name-or-path", "none", *words]),
            "workers n-subs seq-length".split(),
            "max-reject-rate system-ratio empty-think-ratio thinking-ratio".split(),
            ["--map-keys {", "--dtype int7", "--config none.yaml", "--inputs a"],
        ),
        (
            "convert_ckpt_v2",
            lambda words: main_v2([*_HF, *words]),
            "target-tensor-parallel-size target-pipeline-parallel-size target-expert-parallel-size padded-vocab-size "
            "true-vocab-size make-vocab-size-divisible-by num-attention-heads".split(),
            "max-shard-size norm-epsilon".split(),
            ["--save-model-type xyz", "--num-layer-list a,b", "--format x", "--verify no", "--noop-layers x"],
        ),
        (
            "convert_ckpt",
            lambda words: main_v1([*_V1, *words]),
            ["target-tensor-parallel-size", "target-pipeline-parallel-size"],
            ["max-shard-size"],
            ["--model-type BERT", "--params-dtyp fp32"],
        ),
        (
            "inference",
            lambda words: inference.main([*_LOAD, *words]),
            "max-new-tokens prompt-batch-size seed".split(),
            "temperature top-p repetition-penalty".split(),
            ["--task gready", "--engine x", "--params-dtype fp8", "--tools none.json"],
        ),
        (
            "evaluation",
            lambda words: evaluation.main(["--load", "none", "--task", "ceval", "--task-data-path", "none", *words]),
            ["max-eval-samples", "evaluation-batch-size", "num-fewshot"],
            [],
            ["--task nothing", "--tsk x"],
        ),
    ]


def flag_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A bad value of a flag, a flag that does not exist, or a damaged file that a flag names."""
    yield from option_file_cases(folder)
    for program, main, whole, others, words in _programs():
        lines = [[f"--{flag}", value] for flag in whole for value in rng.sample(_INT, 4)]
        lines += [[f"--{flag}", value] for flag in others for value in rng.sample(_FLOAT, 4)]
        for line in [*lines, *(word.split(" ") for word in words)]:
            yield Case("flags", f"{program} {line[0]} {line[-1][:40]}", lambda m=main, w=line: m(list(w)), line[0])  # type: ignore[misc]


def option_file_cases(folder: Path) -> Iterator[Case]:
    """A JSON file that a flag names and that is damaged."""
    file = folder / "options.json"
    described = ["--handler-name", "LlamaFactoryInstructionHandler", "--dataset-dir", str(folder)]
    programs: dict[str, Callable[[], object]] = {
        "--tools": lambda: inference.main([*_LOAD, "--tools", str(file)]),
        "--prompt-type-path": lambda: template_entry("qwen3", str(file)),
        "--dataset-dir": lambda: preprocess.main(["--input", "a", "--tokenizer-name-or-path", "none", *described]),
    }
    for flag, program in programs.items():
        target = folder / "dataset_info.json" if flag == "--dataset-dir" else file
        for name, text in NOT_JSON.items():

            def read(target: Path = target, program: Callable[[], object] = program, text: bytes = text) -> None:
                target.write_bytes(text)
                program()

            yield Case("flags", f"{flag} {name}", read, str(target))
    deep = ["--map-keys", "[" * 100_000]
    yield Case("flags", "--map-keys deep", lambda: _programs()[2][1](deep), "--map-keys")


def config_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A config.json with a wrong, missing or contradicting value."""
    configs = {name: config_json(config) for name, config in SMALL.items()}
    native = {key: value for key, value in configs["minimind3_moe"].items() if key != "torch_dtype"}
    configs["native"] = native | {"model_type": "minimind", "use_moe": True}
    v1 = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, norm_eps=1e-5, max_seq_len=64, hidden_dim=64)
    configs["v1"] = v1 | {"model_type": "minimind", "multiple_of": 64, "dropout": 0.0, "use_moe": False}
    optional = {"torch_dtype", "hidden_act", "tie_word_embeddings", "head_dim", "num_key_value_heads", "n_kv_heads"}
    optional |= {"hidden_dim", "multiple_of", "use_moe", "dropout", "router_weight", "intermediate_size", "rope_theta"}
    file = folder / "config.json"

    def read(content: Any) -> None:
        write(file, content)
        ModelConfig.from_hf_config(folder)

    for form, config in configs.items():
        for key in config:
            wrong = [value for value in WRONG if not (key == "mlp_only_layers" and value == [])]
            if isinstance(config[key], bool):
                wrong = [value for value in wrong if value is not True]
            if key == "torch_dtype":
                continue
            for value in rng.sample(wrong, 2):
                yield Case(
                    "config.json",
                    f"{form} {key} = {str(value)[:30]}",
                    lambda c=config | {key: value}: read(c),
                    str(file),
                )  # type: ignore[misc]
            if key not in optional:
                rest = {name: found for name, found in config.items() if name != key}
                yield Case("config.json", f"{form} without {key}", lambda c=rest: read(c), str(file))  # type: ignore[misc]
    for name, text in NOT_JSON.items():
        yield Case("config.json", name, lambda c=text: read(c), str(file))  # type: ignore[misc]
    for key, value in (("num_attention_heads", 3), ("num_experts_per_tok", 9), ("rope_scaling", {"type": "linear"})):
        content = configs["minimind3_moe"] | {key: value}
        yield Case("config.json", f"contradiction {key} {value}", lambda c=content: read(c), str(file))  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------- YAML

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
_NOT_YAML = {
    "bomb": BOMB.encode(),
    "merge bomb": b"a0: &a0 {k0: 1, k1: 1}\n"
    + b"".join(b"a%d: &a%d {x: [%s]}\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)),
    "itself": b"a: &a [*a]\n",
    "unknown alias": b"a: *b\n",
    "unbalanced": b"a: [1, 2\n",
    "tab": b"a:\n\tb: 1\n",
    "not UTF-8": b"a: \xff\xfe\n",
    "a list": b"- 1\n- 2\n",
    "a word": b"hello\n",
    "empty": b"",
    "Python object": b"a: !!python/object/apply:os.system ['true']\n",
    "unknown tag": b"a: !zzz 3\n",
    "deep": b"a: " + b"[" * 50_000,
    "date": b"a: 2001-99-99\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "control bytes": b"a: \x00\x01\n",
    "list as key": b"? [1, 2]\n: 3\n",
    "unknown section": b"megatron_trainin: {}\n",
}


def yaml_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A YAML file of reinforcement learning, or of preprocess_data.py, with a wrong value or no YAML at all."""
    file = folder / "run.yaml"

    def case(name: str, text: bytes, read: Callable[[], list[str] | None], named: str = "run.yaml") -> Case:
        def write_and_read() -> list[str] | None:
            file.write_bytes(text)
            return read()

        return Case("yaml", name, write_and_read, named)

    def check() -> list[str]:
        findings, _, _ = lint(str(file), "embedded", device="cpu")
        return [f"{finding.key}: {finding.message}" for finding in findings if finding.level == "error"]

    def flags() -> None:
        preprocess.parse(["--config", str(file)])

    named = {"empty": "this section is missing", "unknown section": "megatron_trainin", "a word": "hello"}
    for name, text in _NOT_YAML.items():
        yield case(f"rl {name}", text, check, named.get(name, "run.yaml"))
        if name != "unknown section":
            yield case(f"preprocess {name}", text, flags)
    for key, values in (
        *[(key, ("nan", "-1", "x", "[2]", "1e400")) for key in ("max_reject_rate", "thinking_ratio")],
        *[(key, ("0", "x", "1.5", "{a: 1}")) for key in ("workers", "n_subs", "seq_length")],
        *[("inputs", ("a",)), ("dtype", ("int7",)), ("enable_thinking", ("perhaps",)), ("map_keys", ("[",))],
    ):
        for value in values:
            yield case(
                f"preprocess {key}: {value}",
                f"{key}: {value}\n".encode(),
                flags,
                "run.yaml" if value == "[" else key.replace("_", "-"),
            )
    bad = ("-1", ".nan", ".inf", "x", "[1, 2]", "{a: 1}", "true")
    keys = [
        *["megatron_training." + key for key in ("global_batch_size", "seq_length", "train_iters", "save_interval")],
        *["megatron_training." + key for key in ("tensor_model_parallel_size", "attention_dropout", "seed")],
        *["actor_config." + key for key in ("micro_batch_size", "lr", "min_lr", "weight_decay", "clip_grad")],
        *["actor_config." + key for key in ("adam_beta1", "lr_warmup_fraction", "num_layers")],
        *["rl_config." + key for key in ("n_samples_per_prompt", "mini_batch_size", "clip_ratio", "gamma", "lam")],
        *["rl_config." + key for key in ("init_kl_coef", "epochs", "max_prompt_length", "verifier_timeout")],
        *["generate_config." + key for key in ("max_num_seqs", "max_model_len", "gpu_memory_utilization")],
        *["generate_config.sampling_config." + key for key in ("max_tokens", "temperature", "top_p", "min_p")],
        *["minimind." + key for key in ("keep_last", "cispo_clip", "actor_timeout_s", "max_restarts", "eval_prompts")],
        *["minimind." + key for key in ("algorithm", "resume_schedule", "reward_failure_limit")],
    ]
    for key in keys:
        for value in rng.sample(bad, 2):
            *sections, last = key.split(".")
            text = "defaults:\n  - grpo_minimind_tiny\n  - _self_\n"
            for depth, section in enumerate(sections):
                text += "  " * depth + section + ":\n"
            text += "  " * len(sections) + f"{last}: {value}\n"
            yield case(f"rl {key}: {value}", text.encode(), check, last)
    for section in ("megatron_training", "rl_config", "minimind", "generate_config"):
        text = f"defaults:\n  - grpo_minimind_tiny\n  - _self_\n{section}:\n  no_such_key: 1\n"
        yield case(f"rl unknown key of {section}", text.encode(), check, "no_such_key")
        text = f"defaults:\n  - grpo_minimind_tiny\n  - _self_\n{section}: 3\n"
        yield case(f"rl {section} is a number", text.encode(), check, section)


# ------------------------------------------------------------------------------------------ manifests and trackers


def manifest_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A manifest that was changed, or files beside it."""
    made = folder / "made"
    made.mkdir()
    for name in ("a.bin", "b.bin"):
        (made / name).write_bytes(rng.randbytes(100))
    write_manifest(made, {name: file_entry(made / name) for name in ("a.bin", "b.bin")})
    file = made / "manifest.json"
    kept = {path: path.read_bytes() for path in made.iterdir()}
    data = kept[file]
    good = json.loads(data)

    def case(name: str, changes: dict[Path, bytes | None]) -> Case:
        def read() -> list[str]:
            for path, content in (kept | changes).items():
                path.unlink(missing_ok=True)
                if content is not None:
                    path.write_bytes(content)
            return check_manifest(made)

        return Case("manifest", name, read, str(made))

    for _ in range(30):
        yield case(f"bit at {(at := rng.randrange(len(data) - 1))}", {file: flipped(data, at, rng)})
    for _ in range(10):
        yield case(f"cut at {(cut := rng.randrange(len(data) - 2))}", {file: data[:cut]})
    for name, text in NOT_JSON.items():
        yield case(name, {file: text})
    for value in (
        "x",
        3,
        None,
        [],
        {"a.bin": 3},
        {"a.bin": {}},
        {"../x": good["files"]["a.bin"]},
        {"a.bin": {"bytes": "x"}},
    ):
        yield case(f"files = {value}", {file: json.dumps({"files": value}).encode()})
    for key, value in (
        ("bytes", 10**30),
        ("bytes", -1),
        ("bytes", True),
        ("sha256", 3),
        ("sha256", None),
        ("bytes", "100"),
    ):
        entry = good["files"]["a.bin"] | {key: value}
        yield case(f"{key} = {value}", {file: json.dumps({"files": good["files"] | {"a.bin": entry}}).encode()})
    for path in (made / "a.bin", made / "b.bin"):
        yield case(f"no {path.name}", {path: None})
        for _ in range(5):
            yield case(f"bit of {path.name}", {path: flipped(kept[path], rng.randrange(100), rng)})
    config = SMALL["minimind3"]
    model = write_hf(folder / "model", config, state_dict(config, "hf"))
    entries = {path.name: file_entry(path) for path in model.iterdir()}
    others = {
        "weights a word": json.dumps({"files": entries, "weights": "x"}).encode(),
        "another digest": json.dumps({"files": entries, "weights": {"xxh3_128": 3}}).encode(),
    }
    for name, text in (NOT_JSON | others).items():

        def convert(text: bytes = text) -> None:
            (model / "manifest.json").write_bytes(text)
            shutil.rmtree(folder / "out", ignore_errors=True)
            main_v2(["--load-dir", str(model), "--save-dir", str(folder / "out"), "--save-model-type", "mg"])

        yield Case("manifest", f"convert {name}", convert, str(model))


def tracker_cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """A latest_checkpointed_iteration.txt that names nothing."""
    root = folder / "checkpoints"
    for name in ("iter_0000001", "iter_0000002"):
        (root / name / "mp_rank_00").mkdir(parents=True)
    texts = [
        b"",
        b" ",
        b"abc",
        b"-1",
        b"3",
        b"1.5",
        b"1e3",
        b"0x1",
        b"release",
        b"9" * 30,
        b"9" * 5000,
        b"\xff\xfe1",
        b"\0",
    ]
    texts += ["١".encode(), "²".encode(), b"1\n2", b"../x", b"iter_0000001", b"nan", b"True", b"+1", b"1_0"]
    texts += [rng.randbytes(rng.randrange(1, 9)) for _ in range(20)]
    for text in texts:

        def read(text: bytes = text) -> None:
            (root / "latest_checkpointed_iteration.txt").write_bytes(text)
            open_all(root)

        yield Case("tracker", repr(text[:30]), read, str(root))
