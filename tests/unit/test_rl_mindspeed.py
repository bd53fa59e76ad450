"""MindSpeed-RL's launcher and setup hook, with a checkout made here. (tests/contract has the real one.)"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers.engine import ROOT

from minimind_mcore.errors import UserError
from minimind_mcore.mindspeed import rl_hook, rl_launch
from minimind_mcore.platform import after_import as patching

MODULES = {
    "workers/resharding/weight_adaptor.py": """
class QwenMVWeightAdaptor: ...
class Qwen3MoeMVWeightAdaptor: ...
WEIGHT_ADAPTOR_REGISTRY = {"Qwen3MoeForCausalLM": "its own"}
""",
    "utils/tokenizer.py": """
class _HuggingFaceTokenizer:
    def __init__(self, pad): self._pad = pad
    pad = property(lambda self: self._pad, lambda self, value: setattr(self, "_pad", value))
""",
    "models/rollout/vllm_engine.py": """
class VLLMInferEngine:
    def generate_sequences(self, idx_list, **kwargs):
        return self.llm.generate(prompts=[str(ids) for ids in idx_list], sampling_params=kwargs)
""",
    "models/base/base_training_engine.py": """
class BaseTrainingEngine:
    shuffle_mini_batch, temperature = True, 1.0
    def _forward_backward_batch(self, batch, forward_only=False): return self.shuffle_mini_batch
""",
    "workers/base_worker.py": """
from types import SimpleNamespace
ProfilerConfig = MsprobeConfig = lambda settings, role: SimpleNamespace(role=role)
class BaseWorker:
    def __init__(self, profiler_config=None, msprobe_config=None):
        self.profiler_config, self.msprobe_config = profiler_config, msprobe_config
class ActorHybridWorker(BaseWorker):
    def initialize(self): return self.profiler_config.role
""",
    "models/rule_verifier.py": """
def verifier(responses, data, config, **kwargs):
    return [0.0] * len(responses), {f"{name}_rewards/mean": 0 for name in config.verifier_function if name == "acc"}

def compute_verifier_score(batch, megatron_config, rl_config, tokenizer, ignore_token=-100):
    names = megatron_config.dataset_additional_keys
    extra = {name: tokenizer.batch_decode(batch[name], skip_special_tokens=True) for name in names}
    if rl_config.multi_turn_enable:
        extra["tool_call_num"] = batch["tool_call_num"]
    responses = tokenizer.batch_decode(batch["responses"], skip_special_tokens=True)
    return verifier(responses, extra, rl_config)
""",
    "config_cls/megatron_config.py": "self.moe_intermediate_size = None",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout of MindSpeed-RL 2.2.0 with what the hook and the launcher look at, importable."""
    for name, text in MODULES.items():
        file = tmp_path / "mindspeed_rl" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for folder in (tmp_path / "mindspeed_rl", *(tmp_path / "mindspeed_rl").rglob("*/")):
        (folder / "__init__.py").write_text("")
    others = {name: found for name, found in sys.modules.items() if name.partition(".")[0] == "mindspeed_rl"}
    for name in others:
        del sys.modules[name]
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "train_grpo.py").write_text("")
    monkeypatch.setenv("MINDSPEED_RL_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(patching, "_FINDER", patching._Finder())
    yield tmp_path
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, patching._Finder)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "mindspeed_rl"]:
        del sys.modules[name]
    sys.modules.update(others)


def module(name: str) -> Any:
    return importlib.import_module(f"mindspeed_rl.{name}")


@pytest.mark.parametrize("first", [True, False], ids=["hook-first", "module-first"])
def test_a_module_is_changed_whenever_it_is_imported(first: bool, home: Path) -> None:
    if not first:
        module("workers.resharding.weight_adaptor")
    rl_hook.setup()
    registry = module("workers.resharding.weight_adaptor").WEIGHT_ADAPTOR_REGISTRY
    assert registry["LlamaForCausalLM"].__name__ == "QwenMVWeightAdaptor"
    assert registry["Qwen3MoeForCausalLM"] == "its own"


def test_the_hook_imports_nothing(home: Path) -> None:
    rl_hook.setup()
    assert not [name for name in sys.modules if name.startswith("mindspeed_rl")]


def test_a_pad_id_of_zero_counts(home: Path) -> None:
    rl_hook.setup()
    tokenizer = module("utils.tokenizer")._HuggingFaceTokenizer
    assert (tokenizer(0).pad or 2) == 0 and (tokenizer(None).pad or 2) == 2
    changed = tokenizer(0)
    changed.pad = 7
    assert changed.pad == 7


def test_rollouts_get_ids(home: Path) -> None:
    rl_hook.setup()
    engine = module("models.rollout.vllm_engine").VLLMInferEngine()
    generate = lambda prompts, sampling_params: prompts  # noqa: E731
    engine.llm = SimpleNamespace(generate=generate)
    assert engine.generate_sequences([[1, 2]]) == [{"prompt_token_ids": [1, 2]}]
    assert engine.llm.generate is generate


def test_separate_workers_have_a_profiler(home: Path) -> None:
    rl_hook.setup()
    workers = module("workers.base_worker")
    assert workers.ActorHybridWorker().initialize() == "integrated"  # master: 'NoneType' object has no attribute 'role'
    assert workers.ActorHybridWorker(workers.ProfilerConfig({}, role="mine")).initialize() == "mine"


def test_only_updates_are_shuffled(home: Path) -> None:
    rl_hook.setup()
    engine = module("models.base.base_training_engine").BaseTrainingEngine()
    passes = [engine._forward_backward_batch({}, forward_only=only) for only in (True, False)]
    assert passes == [False, True] and engine.shuffle_mini_batch
    engine.temperature = 0.0
    with pytest.raises(UserError, match="temperature"):
        engine._forward_backward_batch({})


MINE = """
def told(response, label, prompt, length, level, **context):
    return 1000 * (prompt == "<3> <0> <4>") + 100 * length + 10 * len(level) + len(label) + context.get("tool_calls", 0)

def length(response, label, weights, **context):
    return len(response) * float(weights)

def spotty(response, label, **context):
    if response == "<9>": raise RuntimeError("boom")
    return -1.0

def needy(response, label, prompt, colour, **context): return 0.0
"""


class Words:
    """A tokenizer of numbers; 0 is special, and the padding."""

    pad_token_id, eos_token_id = 0, 9

    def batch_decode(self, rows: Any, skip_special_tokens: bool = False) -> list[str]:
        return [" ".join(f"<{int(one)}>" for one in row if int(one) or not skip_special_tokens) for row in rows]


@pytest.fixture
def scored(home: Path) -> Any:
    """The module that scores, and a configuration of it."""
    (home / "hooked_rewards.py").write_text(MINE)
    rl_hook.setup()
    yield module("models.rule_verifier"), lambda *names: SimpleNamespace(
        verifier_function=list(names), verifier_weight=[1.0, 0.5][: len(names)], verifier_timeout=60,
        verifier_parallel=1, multi_turn_enable=True,
    )  # fmt: skip
    sys.modules.pop("hooked_rewards", None)
    rl_hook._rewards.cache_clear()


def test_rewards_may_be_import_paths_and_must_exist(scored: Any) -> None:
    rules, config = scored
    names = ("acc", "hooked_rewards:length")
    rewards, metrics = rules.verifier(["ab", "abcd"], {"labels": ["", ""], "weights": ["1", "2"]}, config(*names))
    assert rewards == [1.0, 4.0] and metrics["hooked_rewards:length_rewards/mean"] == [2.0, 8.0]
    with pytest.raises(UserError, match="retool_reward: unknown to this MindSpeed-RL"):
        rules.verifier(["a"], {"labels": [""]}, config("acc", "retool_reward"))


def test_a_reward_is_called_as_the_embedded_trainer_calls_it(scored: Any) -> None:
    """With prompt and length, which MindSpeed-RL gives to no verifier, and with every column."""
    rules, config = scored
    batch = {
        "prompts": torch.tensor([[3, 0, 4, 0], [6, 0, 0, 0]]), "responses": torch.tensor([[1, 2], [1, 0]]),
        "response_length": torch.tensor([[2], [1]]), "labels": torch.tensor([[1], [1]]),
        "level": torch.tensor([[1, 2], [1, 0]]), "tool_call_num": [5, 6],
    }  # fmt: skip
    columns = SimpleNamespace(dataset_additional_keys=["labels", "level"])
    rewards, metrics = rules.compute_verifier_score(batch, columns, config("hooked_rewards:told"), Words())
    expected = [1000 + 200 + 10 * len("<1> <2>") + 3 + 5, 100 + 10 * len("<1>") + 3 + 6]
    assert rewards == [float(value) for value in expected]
    assert metrics["hooked_rewards:told_rewards/failure_share"] == [0.0, 0.0]
    with pytest.raises(UserError, match=r"argument: 'colour'.*context has prompt, length, record, turns, level"):
        rules.compute_verifier_score(batch, columns, config("hooked_rewards:needy"), Words())


def test_a_reward_that_raises_costs_its_response_and_ends_the_job_where_most_fail(
    scored: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rules, config = scored
    mine = config("hooked_rewards:spotty")
    rewards, metrics = rules.verifier(["<1>"] * 31 + ["<9>"], {"labels": ["x"] * 32}, mine)
    assert rewards == [-1.0] * 32 and metrics["hooked_rewards:spotty_rewards/failure_share"] == [1 / 32] * 32
    assert "hooked_rewards:spotty: RuntimeError: boom" in capsys.readouterr().err
    with pytest.raises(UserError, match="could not score 9 of the last 40 responses"):
        rules.verifier(["<9>"] * 8, {"labels": ["x"] * 8}, mine)


def test_what_is_launched_has_its_version_s_keys_and_absolute_paths(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "my.module", SimpleNamespace(f=lambda response, label: 0.0))
    overrides = [f"minimind.output_dir={tmp_path}/out", "minimind.rewards=[my.module:f]", "rl_config.epochs=3"]
    job = rl_launch.prepare("train_grpo.py", "grpo_minimind3_moe", overrides)
    tree = yaml.safe_load(job.config.read_text())
    assert set(tree) == {"model", "megatron_training", "actor_config", "rl_config", "generate_config"}
    assert "moe_intermediate_size" in tree["model"]["minimind3_moe"] and tree["rl_config"]["epochs"] == 3
    assert tree["megatron_training"]["moe_grouped_gemm"] is True  # its weight adaptor knows grouped experts only
    paths = [tree["megatron_training"][key] for key in ("data_path", "tokenizer_name_or_path")]
    paths += [tree["actor_config"]["load"], tree["actor_config"]["save"], tree["rl_config"]["runtime_env_path"]]
    assert all(Path(path).is_absolute() for path in paths)
    assert tree["rl_config"]["verifier_function"] == ["math_17k_acc", "my.module:f"]
    assert tree["rl_config"]["verifier_weight"] == [1.0, 1.0]
    environment = yaml.safe_load(Path(tree["rl_config"]["runtime_env_path"]).read_text())
    hook, _, function = environment["worker_process_setup_hook"].rpartition(".")
    assert getattr(importlib.import_module(hook), function) is rl_hook.setup
    assert str(ROOT) in environment["env_vars"]["PYTHONPATH"].split(":")
    assert environment["env_vars"]["VLLM_VERSION"] == "0.9.1"  # of 2.2.0
    assert job.folder == home and job.command[1:] == [
        *("cli/train_grpo.py", "--config-dir", str(job.config.parent), "--config-name", "grpo_minimind3_moe"),
        f"hydra.run.dir={tmp_path}/out/hydra",
    ]


def test_a_host_with_too_few_cores_is_told_before_ray_waits(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config-name", "grpo_minimind3", "--dry-run", "rl_config.actor_resource.num_npus=2"]
    words.append(f"minimind.output_dir={tmp_path}/out")
    for cores, warned in ((24, True), (28, False)):
        monkeypatch.setattr(rl_launch, "usable_cores", lambda cores=cores: cores)
        rl_launch.run("train_grpo.py", words)
        said = capsys.readouterr().err
        assert ("this host has 24 CPU cores and Ray needs 28" in said) == warned
        assert ("num_cpus_for_placement_group=6, or start Ray with --num-cpus=28" in said) == warned


# env_vars of configs/envs/runtime_env.yaml at MindSpeed-RL 05a90d77 (master, 2026-04)
UPSTREAM_ENVIRONMENT = {
    "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "true",
    "TOKENIZERS_PARALLELISM": "true",
    "NCCL_DEBUG": "WARN",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    "HCCL_CONNECT_TIMEOUT": "1800",
    "HCCL_EXEC_TIMEOUT": "3600",
    "HCCL_IF_BASE_PORT": "12345",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "HYDRA_FULL_ERROR": "1",
    "VLLM_DP_SIZE": "1",
    "USING_LCCL_COM": "0",
    "HCCL_BUFFSIZE": "256",
    "VLLM_USE_V1": "1",
    "VLLM_VERSION": "0.11.0",
    "VLLM_ASCEND_ENABLE_TOPK_OPTIMIZE": "1",
    "VLLM_ASCEND_ACL_OP_INIT_MODE": "0",
    "VLLM_ASCEND_ENABLE_NZ": "0",
    "TASK_QUEUE_ENABLE": "2",
    "CPU_AFFINITY_CONF": "1",
    "LCAL_COMM_ID": "127.0.0.1:27001",
}


def test_ray_s_workers_get_the_environment_of_mindspeed_rl() -> None:
    ours = yaml.safe_load((ROOT / "configs/rlxf/envs/runtime_env.yaml").read_text(encoding="utf-8"))["env_vars"]
    assert ours == UPSTREAM_ENVIRONMENT


@pytest.mark.parametrize(
    ("program", "name", "override", "message"),
    [
        ("train_grpo.py", "grpo_minimind3", "minimind.algorithm=cispo", "not valid for mindspeed-rl-2.2.0"),
        ("train_grpo.py", "grpo_minimind3", "minimind.rewards=[nosuch_module:f]", "cannot import 'nosuch_module:f'"),
        ("train_grpo.py", "grpo_minimind3", "rl_config.verifier_function=[json:f]", "cannot import 'json:f'"),
        (
            "train_ppo.py",
            "grpo_minimind3",
            "rl_config.epochs=1",
            "ray_grpo is run by train_grpo.py, not by train_ppo.py",
        ),
    ],
)
def test_what_mindspeed_rl_cannot_do_is_not_launched(
    program: str, name: str, override: str, message: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        rl_launch.prepare(program, name, [override, f"minimind.output_dir={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("nodes", "said"), [("3", "64 prompts are not a multiple of the 3 hosts of the Ray cluster"), ("two", "NNODES=two")]
)
def test_prompts_divide_among_the_hosts_that_the_scripts_wait_for(
    nodes: str,
    said: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NNODES", nodes)
    with pytest.raises(UserError) as error:
        rl_launch.prepare("train_grpo.py", "grpo_minimind3", [f"minimind.output_dir={tmp_path}/out"])
    assert said in f"{error.value} {capsys.readouterr().err}"


def test_a_missing_checkout_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINDSPEED_RL_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"found no MindSpeed-RL in .*nowhere; set MINDSPEED_RL_HOME"):
        rl_launch.home()
