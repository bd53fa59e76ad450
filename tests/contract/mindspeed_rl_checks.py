"""What test_mindspeed_rl_config.py asks MindSpeed-RL's own modules, each in a process of its own.

python mindspeed_rl_checks.py CHECK HOME [ARGUMENT ...]
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from helpers.upstream_rl import Source

SECTIONS = ("actor", "rl", "generate")


def complete(source: Source) -> None:
    """What the emptied packages re-export, and the profiler's marks."""
    import torch_npu  # a stand-in  # pyright: ignore[reportMissingImports]

    torch_npu.npu.mstx = MagicMock()
    for module, name in (("loggers", "Loggers"), ("tokenizer", "get_tokenizer"), ("utils", "is_multimodal")):
        setattr(
            sys.modules["mindspeed_rl.utils"],
            name,
            lambda *_, m=module, n=name: getattr(source.module(f"utils.{m}"), n)(*_),
        )


def configs(source: Source, folder: str) -> None:
    """Its classes and validations accept the YAML files of a folder; prints what they made of them."""
    print(json.dumps({name: validated() for name, validated in read_all(source, folder).items()}))


def refusals(source: Source, folder: str) -> None:
    """Prints what its validations say against each YAML of a folder; `NAME-N.yaml` is for a cluster of N hosts."""
    said = {}
    for name, validated in read_all(source, folder).items():
        nodes = int(name.rpartition("-")[2])
        source.module("config_cls.validate_config").get_node_nums = lambda nodes=nodes: nodes
        try:
            validated()
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
    print(json.dumps(said))


def read_all(source: Source, folder: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """The YAML files of a folder by name, read by its classes; a call validates one, and says what was made of it."""
    from hydra import compose, initialize_config_dir

    megatron = source.module("config_cls.megatron_config")
    rl = source.module("config_cls.rl_config")
    generate = source.module("config_cls.generate_config")
    validation = source.module("config_cls.validate_config")
    validation.get_node_nums = lambda: 1
    found = {}
    with initialize_config_dir(config_dir=folder, version_base=None):
        for file in sorted(Path(folder).glob("*.yaml")):
            if file.stem == "runtime_env":
                continue
            tree = compose(config_name=file.stem)

            def read(section: str, tree: Any = tree) -> Any:
                return megatron.MegatronConfig({**tree.megatron_training, **tree[section]}, tree.model)

            actor, rl_config, generation = (
                read("actor_config"),
                rl.RLConfig(tree.rl_config),
                generate.GenerateConfig(tree.generate_config),
            )
            apart = not rl_config.use_integrated_worker
            assert apart or not {"ref_config", "reward_config"} & set(tree)
            reference, reward = (read("ref_config"), read("reward_config")) if apart else (actor, actor)
            critic = [read("critic_config")] if "critic_config" in tree else []
            values = {
                name: plain(vars(cls)) for name, cls in zip(SECTIONS, (actor, rl_config, generation), strict=True)
            }
            values["argv"] = argv(source, actor)

            def validated(values: Any, *arguments: Any) -> dict[str, Any]:
                validation.validate_rl_args(*arguments)
                return dict(values)

            arguments = (actor, reference, reward, rl_config, generation, *critic)
            found[file.stem] = partial(validated, values, *arguments)
    return found


def argv(source: Source, actor: Any) -> list[str]:
    """The command line that it makes for MindSpeed-LLM's parser."""
    sys.argv = ["program"]
    source.module("utils.utils").parse_args_from_config(actor.dict())
    return sys.argv[1:]


def plain(value: Any) -> Any:
    """Its values without OmegaConf's containers."""
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if isinstance(value, DictConfig | ListConfig):
        return OmegaConf.to_container(value, resolve=True)
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def convert(source: Source, request: str) -> None:
    """Its handler writes data as its cli/preprocess_data.py does."""
    config = source.module("config_cls.data_handler_config").DataHandlerConfig(json.loads(request))
    module = source.module("datasets.data_handler")
    tokenizer = source.module("utils.tokenizer").get_tokenizer(config.tokenizer_name_or_path)
    data = module.build_dataset(config)
    module.get_dataset_handler(config, data, tokenizer, None).serialize_to_disk()


def hook(source: Source) -> None:
    """The setup hook changes its real modules as they are imported."""
    import torch

    from minimind_mcore.mindspeed import rl_hook

    rl_hook.setup()
    adaptors = source.module("workers.resharding.weight_adaptor")
    assert adaptors.get_weight_adaptor("LlamaForCausalLM") is adaptors.QwenMVWeightAdaptor
    assert adaptors.get_weight_adaptor("Qwen3MoeForCausalLM") is adaptors.Qwen3MoeMVWeightAdaptor

    tokenizer = source.module("utils.tokenizer").get_tokenizer(os.environ["TOKENIZER"])
    assert tokenizer.pad == 0 and tokenizer.pad and (tokenizer.pad if tokenizer.pad else tokenizer.eod) == 0
    cut = source.module("utils.pad_process").remove_padding_and_split_to_list
    rows = torch.tensor([[5, 6, 2, 0, 0], [5, 6, 7, 8, 9]])
    kept = cut(rows, tokenizer.eod, tokenizer.pad if tokenizer.pad else tokenizer.eod)
    assert [row.tolist() for row in kept] == [[5, 6, 2], [5, 6, 7, 8, 9]]

    check_rollout(source)
    check_order(source)
    check_rewards(source)
    print("ok")


def check_rollout(source: Source) -> None:
    """The engine is given ids."""
    module = source.module("models.rollout.vllm_engine")
    module.is_multimodal = lambda: False
    engine = object.__new__(module.VLLMInferEngine)
    seen: list[Any] = []
    engine.llm = SimpleNamespace(generate=lambda prompts=None, **options: seen.append((prompts, options)) or "response")
    engine.init_cache_engine = engine.free_cache_engine = lambda: None
    engine.tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: "text"))
    engine.sampling_params = SimpleNamespace()
    engine._post_process_outputs = lambda response: response
    assert engine.generate_sequences([[1, 7, 2]]) == "response"
    [(prompts, options)] = seen
    ids = options.get("prompt_token_ids") or [prompt["prompt_token_ids"] for prompt in prompts]
    assert ids == [[1, 7, 2]]


def check_order(source: Source) -> None:
    """A pass without learning is not shuffled, and a temperature of 0 is refused."""
    from minimind_mcore.errors import UserError

    cls = source.module("models.base.base_training_engine").BaseTrainingEngine
    engine = object.__new__(cls)
    shuffles: list[bool] = []

    def split(batch: Any, batch_size: int, shuffle_mini_batch: bool) -> None:
        shuffles.append(shuffle_mini_batch)
        raise StopIteration

    engine.use_dynamic_bsz, engine.shuffle_mini_batch, engine.micro_batch_size = False, True, 1
    engine.temperature, engine._split_batches = 1.0, split
    for forward_only in (True, False):
        with contextlib.suppress(StopIteration):
            engine._forward_backward_batch({}, forward_only=forward_only)
    assert shuffles == [False, True] and engine.shuffle_mini_batch is True
    engine.temperature = 0.0
    try:
        engine._forward_backward_batch({}, forward_only=True)
    except UserError:
        return
    raise AssertionError("a temperature of 0 was let through")


def exact(response: str, label: str, level: str, **context: Any) -> float:
    """A user's reward, that sees another column, and the prompt and length where MindSpeed-RL itself scores."""
    asked = float(context["prompt"] == "a b" and context["length"] == 1) if "prompt" in context else 0.0
    return float(response == label) + (0.5 if level == "hard" else 0.0) + asked


def check_rewards(source: Source) -> None:
    """A verifier by import path is called, an unknown one refused."""
    from minimind_mcore.errors import UserError

    module = source.module("models.rule_verifier")
    verifier = module.verifier
    config = SimpleNamespace(
        verifier_function=["step", "mindspeed_rl_checks:exact"], verifier_weight=[0.0, 2.0], verifier_timeout=60,
        verifier_parallel=1, n_samples_per_prompt=1, multi_turn_enable=False, overlong_buffer_enable=False,
    )  # fmt: skip
    data = {"labels": ["a", "b"], "level": ["hard", "easy"]}
    rewards, metrics = verifier(["a", "c"], data, config)
    assert rewards == [3.0, 0.0] and metrics["mindspeed_rl_checks:exact_rewards/mean"] == [1.5, 0.0]
    check_scores(module, config)
    config.verifier_function = ["step", "setp"]
    try:
        verifier(["a"], {"labels": ["a"]}, config)
    except UserError as error:
        assert "setp" in str(error)
        return
    raise AssertionError("an unknown verifier was let through")


def check_scores(module: Any, config: Any) -> None:
    """Its own scoring of a batch hands prompts and lengths on."""
    import torch

    letters = "_abc"

    def decode(rows: Any, skip_special_tokens: bool = False) -> list[str]:
        return [" ".join(letters[int(one)] for one in row if int(one) or not skip_special_tokens) for row in rows]

    tokenizer = SimpleNamespace(batch_decode=decode, pad_token_id=0, eos_token_id=0)
    rows = {"prompts": [[1, 2, 0], [3, 1, 2]], "responses": [[3], [3]], "labels": [[3], [3]], "level": [[1], [2]]}
    batch = {name: torch.tensor(row) for name, row in rows.items()} | {"response_length": torch.tensor([[1], [1]])}
    megatron = SimpleNamespace(dataset_additional_keys=["labels", "level"])
    scores, _ = module.compute_verifier_score(batch, megatron, config, tokenizer)
    assert scores.tolist() == [[4.0], [2.0]], scores


def ray(source: Source) -> None:
    """The setup hook runs in a task and in an actor that it begins, which has variables of its own."""
    import ray

    home = str(source.home)
    environment = {
        "worker_process_setup_hook": "minimind_mcore.mindspeed.rl_hook.setup",
        "env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]},
    }

    class Worker:
        def adaptor(self) -> tuple[str, str]:
            from helpers.upstream_rl import Source

            sources = Source(Path(home))
            sys.modules["mindspeed_rl.utils"].Loggers = sources.module("utils.loggers").Loggers  # type: ignore[attr-defined]
            found = sources.module("workers.resharding.weight_adaptor").get_weight_adaptor("LlamaForCausalLM")
            return found.__name__, os.environ.get("OF_THE_ACTOR", "")

    @ray.remote(num_cpus=0.1)
    def train() -> list[tuple[str, str]]:
        options = {"num_cpus": 0.1, "runtime_env": {"env_vars": {"OF_THE_ACTOR": "1"}}}
        actor = ray.remote(Worker).options(**options).remote()
        return [Worker().adaptor(), ray.get(actor.adaptor.remote())]

    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    print(json.dumps(ray.get(train.remote(), timeout=150)))
    ray.shutdown()


def names(source: Source, inference: str) -> None:
    """The names in training of a vLLM model's parameters, by the adaptor of its class."""
    from minimind_mcore.mindspeed import rl_hook

    rl_hook.setup()
    module = source.module("workers.resharding.weight_adaptor")
    found = {}
    for cls, parameters in json.loads(inference).items():
        adaptor = module.get_weight_adaptor(cls)(SimpleNamespace(lora_target_modules=None))
        found[cls] = [adaptor.replace_name_i2t(name) for name in parameters]
    print(json.dumps(found))


if __name__ == "__main__":
    sys.modules["mindspeed_rl_checks"] = sys.modules["__main__"]
    check, home, *arguments = sys.argv[1:]
    sources = Source(Path(home))
    complete(sources)
    globals()[check](sources, *arguments)
