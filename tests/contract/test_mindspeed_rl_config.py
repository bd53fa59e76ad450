"""MindSpeed-RL's own modules accept what this kit hands it. MINDSPEED_RL_HOME is a checkout, of 2.2.0 or of master."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.engine import ROOT
from helpers.rl_trees import DISPATCH, RECIPES

from minimind_mcore.inputs.flags import flag_table
from minimind_mcore.preprocess.convert import convert
from minimind_mcore.preprocess.options import ChatOptions, Options
from minimind_mcore.rl.config.load import CONFIGS, compose, resolve

HOME = os.environ.get("MINDSPEED_RL_HOME", "")
TOKENIZERS = os.environ.get("MINIMIND_TOKENIZER_DIR", "")
CHECKS = Path(__file__).with_name("mindspeed_rl_checks.py")
NAMES = sorted({file.stem for file in CONFIGS.glob("*.yaml")} - {*RECIPES})
pytestmark = pytest.mark.skipif(not HOME, reason="MINDSPEED_RL_HOME is not set: MindSpeed-RL's sources are not here")


def ask(check: str, *arguments: str, folder: Path) -> str:
    """What a check prints last."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZER": f"{TOKENIZERS}/v3"}
    done = subprocess.run(
        [sys.executable, str(CHECKS), check, HOME, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().rpartition("\n")[2]


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What its classes make of each YAML that the launcher writes."""
    from minimind_mcore.mindspeed.rl_launch import prepare

    folder = tmp_path_factory.mktemp("configs")
    for name in NAMES:
        program = "train_ppo.py" if name.startswith("ppo") else "train_grpo.py"
        job = prepare(program, name, [f"minimind.output_dir={folder / name}"])
        (folder / f"{name}.yaml").write_bytes(job.config.read_bytes())
    found: dict[str, Any] = json.loads(ask("configs", str(folder), folder=folder))
    return found


def test_its_classes_and_validations_accept_every_configuration(accepted: dict[str, Any]) -> None:
    assert sorted(accepted) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_what_we_read(name: str, accepted: dict[str, Any]) -> None:
    ours = resolve(compose(name, device="npu"))
    paths = {"runtime_env_path", "data_path", "tokenizer_name_or_path", "load", "save", "prompt_type_path"}
    for section, theirs in (("actor", ours.actor), ("rl", ours.rl), ("generate", ours.generate)):
        for key, value in vars(theirs).items():
            if key not in paths and key in accepted[name][section]:
                found = accepted[name][section][key]
                if key == "sampling_config":
                    found = {**vars(value), **found}
                if key == "moe_grouped_gemm":  # the launcher sets it for mixtures: see rl_launch.require_grouped
                    value = value or bool(ours.actor.num_experts)
                assert plain(value) == found, f"{section}.{key}"


def plain(value: Any) -> Any:
    return {key: plain(item) for key, item in vars(value).items()} if hasattr(value, "__dict__") else value


def test_mindspeed_llm_knows_every_flag_that_it_makes(accepted: dict[str, Any]) -> None:
    known = flag_table()
    for name, found in accepted.items():
        assert {word for word in found["argv"] if word.startswith("--")} <= set(known), name


def test_its_validations_refuse_what_the_linter_refuses_and_nothing_else(tmp_path: Path) -> None:
    from minimind_mcore.mindspeed.rl_launch import version
    from minimind_mcore.rl.config.lint import dump, lint

    target, ours = version(Path(HOME)), {}
    for number, (overrides, nodes, _) in enumerate(DISPATCH):
        findings, tree, _ = lint("grpo_minimind3", target, overrides.split(), nodes=nodes)
        ours[f"{number}-{nodes}"] = any(finding.level == "error" for finding in findings)
        (tmp_path / f"{number}-{nodes}.yaml").write_text(dump(tree))
    theirs = json.loads(ask("refusals", str(tmp_path), folder=tmp_path))
    assert {name: bool(said) for name, said in theirs.items()} == ours, theirs


def test_ray_s_workers_get_its_environment() -> None:
    from minimind_mcore.mindspeed.rl_launch import runtime_environment, version

    theirs = yaml.safe_load((Path(HOME) / "configs/envs/runtime_env.yaml").read_text(encoding="utf-8"))["env_vars"]
    ours = runtime_environment(version(Path(HOME)))["env_vars"]
    assert {key: ours.get(key) for key in theirs} == theirs


@pytest.mark.skipif("2.2.0" in HOME, reason="our files have master's keys; the launcher translates them for 2.2.0")
def test_it_reads_the_directory_of_configurations_as_it_is(tmp_path: Path) -> None:
    assert set(json.loads(ask("configs", str(CONFIGS), folder=tmp_path))) == {*NAMES, *RECIPES}


@pytest.mark.skipif(not TOKENIZERS, reason="MINIMIND_TOKENIZER_DIR is not set")
def test_the_hook_changes_its_real_modules(tmp_path: Path) -> None:
    assert ask("hook", folder=tmp_path) == "ok"


def test_the_hook_runs_in_ray_s_tasks_and_actors(tmp_path: Path) -> None:
    assert json.loads(ask("ray", folder=tmp_path)) == [["QwenMVWeightAdaptor", ""], ["QwenMVWeightAdaptor", "1"]]


LAYER = (
    "input_layernorm",
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)


def test_its_adaptors_name_our_parameters(tmp_path: Path) -> None:
    vllm = {
        "LlamaForCausalLM": LAYER,
        "Qwen3ForCausalLM": (*LAYER, "self_attn.q_norm", "self_attn.k_norm"),
    }
    asked = {
        cls: ["model.embed_tokens.weight", *(f"model.layers.0.{name}.weight" for name in names), "model.norm.weight"]
        for cls, names in vllm.items()
    }
    found = json.loads(ask("names", json.dumps(asked), folder=tmp_path))
    for cls, preset in (("LlamaForCausalLM", "minimind2_tiny"), ("Qwen3ForCausalLM", "minimind3_tiny")):
        assert set(found[cls]) == {name for name in training_names(preset) if "layers." not in name or ".0." in name}


def training_names(preset: str) -> list[str]:
    """The parameters of our model of one layer's layout, as Megatron names them."""
    from minimind_mcore.models.presets import PRESETS
    from minimind_mcore.models.weights import mcore_shapes

    return list(mcore_shapes(PRESETS[preset]))


RECORDS = [
    {"question": "What is 17+25?", "answer": "42"},
    {"question": "表：KD=37，QX=52。QX是多少？", "answer": "52"},
    {"question": "Solve $x^2=9$.", "answer": "\\pm 3"},
]
COLUMNS = {"prompt": "question", "query": "", "response": "answer", "system": ""}
MATH17K = [
    {
        "prompt": [{"role": "user", "content": row["question"]}],
        "reward_model": {"ground_truth": row["answer"], "style": "rule"},
    }
    for row in RECORDS
]
MATH17K_COLUMNS = {"prompt": "prompt", "query": "", "response": "reward_model", "system": ""}
R1, R1_MATH17K = "R1AlpacaStyleInstructionHandler", "Math17kAlpacaStyleInstructionHandler"


@pytest.mark.skipif(not TOKENIZERS, reason="MINIMIND_TOKENIZER_DIR is not set")
@pytest.mark.parametrize("generation", ["v2", "v3"])
@pytest.mark.parametrize(
    ("handler", "records", "columns"),
    [(R1, RECORDS, COLUMNS), (R1_MATH17K, MATH17K, MATH17K_COLUMNS)],
    ids=["r1", "math17k"],
)
@pytest.mark.parametrize("template", ["qwen_r1", "empty", "minimind_r1"])
def test_its_handlers_write_the_same_bytes(
    handler: str, records: list[Any], columns: dict[str, str], template: str, generation: str, tmp_path: Path
) -> None:
    source, tokenizer = tmp_path / "raw.jsonl", f"{TOKENIZERS}/{generation}"
    source.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    convert(
        Options(
            str(source),
            tokenizer,
            output_prefix=str(tmp_path / "ours"),
            handler=handler,
            chat=ChatOptions(map_keys=columns, prompt_type=template),
        )
    )
    request = {
        "input": str(source),
        "tokenizer_name_or_path": tokenizer,
        "output_prefix": str(tmp_path / "theirs"),
        "handler_name": handler,
        "prompt_type": template,
        "prompt_type_path": str(ROOT / "preprocess" / "templates.json"),
        "map_keys": columns,
        "dataset_additional_keys": ["labels"],
        "cache_dir": str(tmp_path / "cache"),
    }
    ask("convert", json.dumps(request), folder=tmp_path)
    for key in ("input_ids", "attention_mask", "labels"):
        for end in ("bin", "idx"):
            ours, theirs = (tmp_path / f"{name}_packed_{key}_document.{end}" for name in ("ours", "theirs"))
            assert ours.read_bytes() == theirs.read_bytes(), f"{key}.{end}"
