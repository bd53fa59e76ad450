"""Configurations of reinforcement learning: what they mean, what the linter finds, what MindSpeed-RL gets."""

from __future__ import annotations

import dataclasses
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.engine import ROOT
from helpers.rl_trees import DISPATCH, RECIPES, run_tree

from minimind_mcore.arguments import parse
from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.rl.commands import main
from minimind_mcore.rl.config.lint import TARGETS, check, lint
from minimind_mcore.rl.config.load import CONFIGS, compose, megatron_flags, resolve
from minimind_mcore.rl.config.migrate import RENAMED, migrate
from minimind_mcore.rl.config.schema import Config, MiniMindConfig, defaults, fits, value_type
from minimind_mcore.rl.main import grpo
from minimind_mcore.rl.models import model_yaml
from minimind_mcore.rl.rewards.verifiers import VERIFIERS
from minimind_mcore.rl.runtime.dry_run import check_before_start

NAMES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def config(*overrides: str, name: str = "grpo_minimind3", device: str = "none") -> Config:
    return resolve(compose(name, overrides, device=device))


# What the files say


@pytest.mark.parametrize("name", PRESETS)
def test_model_files_are_the_presets(name: str) -> None:
    assert (CONFIGS / "model" / f"{name}.yaml").read_text() == model_yaml(name)


@pytest.mark.parametrize("device", ["cpu", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_the_native_parser_reads_the_model_of_every_configuration(name: str, device: str) -> None:
    found = config(name=name, device=device)
    for section in filter(None, (found.actor, found.ref, found.critic, found.reward)):
        args = parse(megatron_flags(section))
        assert ModelConfig.from_args(args) == PRESETS[found.model]
        assert args.bf16 == (device != "cpu") and args.lr == section.lr


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ref_config.load=null"], "outputs/minimind3/sft/checkpoints"),
        (["ref_config.load=null", "actor_config.load=other"], "other"),
        (["ref_config.load=mine"], "mine"),
        (["ref_config.load=null", "actor_config.load=null"], None),
        (["ref_config.load=null", "actor_config.load=a", "actor_config.pretrained_checkpoint=b"], "a"),
        (
            [
                *("ref_config.load=null", "actor_config.load=a", "actor_config.pretrained_checkpoint=b"),
                "actor_config.lora_target_modules=[linear_qkv]",
            ],
            "b",
        ),
    ],
)
def test_a_reference_apart_has_the_weights_of_the_actor_unless_it_names_others(
    overrides: list[str], expected: str | None
) -> None:
    assert config(*overrides, name="grpo_minimind3_separate").ref.load == expected


def test_a_list_of_one_data_path_is_that_path() -> None:
    assert config("megatron_training.data_path=[data/a]").actor.data_path == "data/a"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_fit_for_every_target(name: str, target: str) -> None:
    findings, _, changes = lint(name, target, device="cpu")
    errors = {finding.key for finding in findings if finding.level == "error"}
    assert not changes and ("minimind.reward_model" in errors) == (name in RECIPES and target != "embedded")
    assert not errors or name in RECIPES


def test_the_device_found_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_mcore.platform import device

    monkeypatch.setenv("DEVICE", "cpu")
    device.current.cache_clear()
    found = resolve(compose("grpo_minimind3"))
    assert (found.minimind.precision, found.generate.dtype, found.actor.bf16) == ("fp32", "float32", False)


def test_fp16_is_the_precision_of_the_training_too() -> None:
    found = config("minimind.precision=fp16", name="ppo_minimind3")
    assert found.generate.dtype == "float16"
    for section in filter(None, (found.actor, found.ref, found.critic)):
        args = parse(megatron_flags(section))
        assert args.fp16 and not args.bf16 and args.initial_loss_scale == 65536
    args = parse(megatron_flags(config("minimind.precision=fp16", "actor_config.initial_loss_scale=1024").actor))
    assert args.initial_loss_scale == 1024
    assert not parse(megatron_flags(config().actor)).fp16


# What they mean


def test_a_section_is_its_model_then_megatron_training_then_itself() -> None:
    found = config("megatron_training.weight_decay=0.5", "actor_config.clip_grad=2", "megatron_training.clip_grad=3")
    assert (found.actor.num_layers, found.actor.weight_decay, found.actor.clip_grad) == (8, 0.01, 2)
    assert found.ref is found.actor and found.actor.add_qkv_bias is False
    apart = config(name="grpo_minimind3_separate")
    assert apart.ref is not apart.actor and apart.rl.reference_resource.num_npus == apart.rl.actor_resource.num_npus


def test_mini_batches_count_sequences_as_in_mindspeed_rl() -> None:
    assert config("rl_config.mini_batch_size=16").rl.mini_batch_size == 16 * 8


def test_a_configuration_travels_and_is_not_changed() -> None:
    found = config()
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(AttributeError, match="cannot be changed"):
        found.rl.epochs = 2
    with pytest.raises(AttributeError, match="did you mean tensor_model_parallel_size"):
        _ = found.actor.tensor_parallel_size


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl_config.clip_rato=0.1", "rl_config.clip_rato: unknown key; did you mean clip_ratio"),
        ("generate_config.sampling_config.temprature=1", "did you mean temperature"),
        ("rl_config.actor_resource.gpus=1", "actor_resource.gpus: unknown"),
        ("minimind.algoritm=grpo", "minimind.algoritm: unknown key; did you mean algorithm"),
        ("minimind.algorithm=gpro", "found 'gpro', expected one of grpo, dr_grpo"),
        ("minimind.sample_interval=often", "found 'often', expected int"),
        ("minimind.spo_rho=[0.5]", "found 1 values, expected 2"),
        ("minimind.rewards=[{weight: 1}]", "rewards\\[0\\].path is missing"),
        ("actor_config.model=minimind4", "model 'minimind4' is not defined"),
        ("+rlconfig.epochs=1", "rlconfig: unknown section; did you mean rl_config"),
        ("rl_config.epochs=[", "grpo_minimind3.yaml"),
    ],
)
def test_what_there_is_not_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(override)


def test_a_missing_file_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean grpo_minimind3"):
        compose("grpo_minimnd3")


def test_settings_become_what_their_annotations_say() -> None:
    found = config("minimind.rewards=[my.module:f, {path: other:g, weight: 2}]", "minimind.spo_rho=[0.1, 1]").minimind
    assert [(reward.path, reward.weight) for reward in found.rewards] == [("my.module:f", 1.0), ("other:g", 2.0)]
    assert found.spo_rho == (0.1, 1.0)


def test_flags_the_native_engine_lacks_are_refused_unless_at_their_default() -> None:
    assert "--use-ascend-coc" not in megatron_flags(config().actor)
    with pytest.raises(UserError, match="lora_r: 16"):
        megatron_flags(config("actor_config.lora_r=16").actor)


@pytest.mark.parametrize("version", ["master", "2.2.0"])
@pytest.mark.parametrize("reader", ["MegatronConfig", "RLConfig", "GenerateConfig"])
def test_every_default_is_of_its_type(reader: str, version: str) -> None:
    assert all(fits(value, value_type(reader, key, version)) for key, value in defaults(reader, version).items())


# What older guides show

GUIDE: dict[str, Any] = {
    "defaults": [{"model": ["minimind3"]}],
    "megatron_training": {
        "model": "minimind-3",
        "global_batch_size": 64,
        "seq_length": 1024,
        "stage": "ray_grpo",
        "train_iters": 9,
    },
    "actor_config": {"model": "minimind3", "micro_batch_size": 4, "save": "out", "moe_intermediate_size": 8},
    "ref_config": {"model": "minimind3", "micro_batch_size": 4},
    "rl_config": {
        **{"shuffle_minibatch": False, "colocate_actor_ref": False, "colocate_all_models": True},
        **{"n_samples_per_prompt": 8, "mini_batch_size": 512, "actor_resource": {"num_npus": 4}},
    },
}


def test_what_older_guides_show_becomes_what_is_read_now() -> None:
    new, changes = migrate(GUIDE, "master")
    rl = new["rl_config"]
    assert rl == {
        **{"n_samples_per_prompt": 8, "mini_batch_size": 64, "actor_resource": {"num_npus": 4}},
        **{"shuffle_mini_batch": False, "use_integrated_worker": False, "reference_resource": {"num_npus": 4}},
    }
    assert new["reward_config"] == GUIDE["ref_config"] and new["megatron_training"]["model"] == "minimind3"
    assert new["actor_config"]["moe_ffn_hidden_size"] == 8
    assert len(changes) == 9 and migrate(new, "master") == (new, [])


def test_keys_go_to_the_other_version_and_back() -> None:
    tree = {"actor_config": {**dict.fromkeys(RENAMED.values(), 1), "lora_r": 8, "lora_alpha": 3}}
    older, _ = migrate(tree, "2.2.0")
    assert set(RENAMED) <= set(older["actor_config"]) and "lora_r" not in older["actor_config"]
    assert older["actor_config"]["lora_alpha"] == 3  # not at its default: for the linter to name
    newer, _ = migrate(older, "master")
    assert set(RENAMED.values()) <= set(newer["actor_config"])


# What the linter finds

BROKEN = [
    ("rl_config.actor_resource.num_npus=6", "embedded", "micro_batch_size"),
    ("rl_config.actor_resource.num_npus=6", "mindspeed-rl-master", "global_batch_size"),
    ("rl_config.kl_penalty=lowvar", "embedded", "kl_penalty"),
    ("rl_config.kl_penalty=k3", "mindspeed-rl-2.2.0", "kl_penalty"),
    ("rl_config.kl_ctrl_type=adptive", "mindspeed-rl-master", "kl_ctrl_type"),
    ("rl_config.adv_estimator=mean", "mindspeed-rl-2.2.0", "adv_estimator"),
    ("megatron_training.stage=grpo", "mindspeed-rl-master", "stage"),
    ("rl_config.filter_groups_enable=true rl_config.filter_groups_metric=acc", "embedded", "filter_groups_metric"),
    ("actor_config.tensor_model_parallel_size=3", "embedded", "actor_config"),
    ("actor_config.micro_batch_size=7", "embedded", "actor_config.micro_batch_size"),
    ("actor_config.pipeline_model_parallel_size=3", "embedded", "actor_config.pipeline_model_parallel_size"),
    ("rl_config.mini_batch_size=48", "embedded", "rl_config.mini_batch_size"),
    ("rl_config.adv_dispatch_size=100", "embedded", "rl_config.adv_dispatch_size"),
    ("generate_config.max_model_len=512", "embedded", "generate_config.max_model_len"),
    ("rl_config.max_prompt_length=1024", "embedded", "megatron_training.seq_length"),
    ("rl_config.verifier_weight=[1.0, 2.0]", "embedded", "rl_config.verifier_weight"),
    ("rl_config.verifier_function=[math_17k_ac]", "embedded", "rl_config.verifier_function"),
    ("rl_config.verifier_function=[retool_reward]", "mindspeed-rl-2.2.0", "rl_config.verifier_function"),
    ("megatron_training.dataset_additional_keys=[]", "mindspeed-rl-2.2.0", "megatron_training.dataset_additional_keys"),
    ("generate_config.sampling_config.temperature=0", "embedded", "generate_config.sampling_config.temperature"),
    ("generate_config.infer_tensor_parallel_size=8", "embedded", "generate_config.infer_tensor_parallel_size"),
    ("generate_config.infer_pipeline_parallel_size=2", "embedded", "generate_config.infer_pipeline_parallel_size"),
    ("rl_config.integrated_mode_config={a: 1} rl_config.use_integrated_worker=false", "embedded", "ref_config"),
    ("rl_config.clip_higher_enable=true rl_config.clip_ratio_low=0.3", "embedded", "rl_config.clip_ratio_low"),
    ("rl_config.overlong_buffer_enable=true", "mindspeed-rl-master", "rl_config.rollout_max_tokens"),
    ("minimind.algorithm=dapo rl_config.rollout_max_tokens=512", "embedded", "rl_config.rollout_max_tokens"),
    ("minimind.algorithm=dapo rl_config.overlong_buffer=1024", "embedded", "rl_config.overlong_buffer"),
    ("rl_config.epochs=twice", "embedded", "rl_config.epochs"),
    ("generate_config.dtype=float16", "mindspeed-rl-master", "generate_config.dtype"),
    ("rl_config.multi_turn_enable=true", "mindspeed-rl-2.2.0", "rl_config.multi_turn_enable"),
    ("minimind.algorithm=cispo", "mindspeed-rl-master", "minimind.algorithm"),
    ("rl_config.actor_resource.num_npus=1", "mindspeed-rl-master", "rl_config.zmq_communication"),
    ("rl_config.actor_resource.num_npus=1", "mindspeed-rl-2.2.0", "rl_config.zmq_communication"),
    (
        "rl_config.actor_resource.num_npus=1 rl_config.zmq_communication=false rl_config.guarantee_order=true",
        "mindspeed-rl-master",
        "rl_config.guarantee_order",
    ),
    ("minimind.algorithm=dapo", "mindspeed-rl-master", "megatron_training.stage"),
    ("minimind.save_rollouts=x", "mindspeed-rl-master", "minimind.save_rollouts"),
    ("minimind.rollout_engine=transformers", "mindspeed-rl-master", "minimind.rollout_engine"),
    ("actor_config.n_shared_experts=1 actor_config.num_experts=4", "mindspeed-rl-master", "actor_config.model"),
    (
        "actor_config.num_experts=4 actor_config.moe_router_topk=1",
        "mindspeed-rl-master",
        "megatron_training.use_distributed_optimizer",
    ),
    ("minimind.algorithm=gspo", "mindspeed-rl-master", "minimind.algorithm"),
    ("minimind.dual_clip=3", "mindspeed-rl-2.2.0", "minimind.dual_clip"),
    ("minimind.policy_loss=no_such_module:loss", "embedded", "minimind.policy_loss"),
    ("minimind.advantage=helpers.rl_trees:unclipped", "embedded", "minimind.advantage"),
    ("rl_config.verifier_function=[no_such_module:reward]", "embedded", "rl_config.verifier_function"),
    ("minimind.rewards=[{path:'helpers.rl_trees:nothing',weight:1.0}]", "embedded", "rl_config.verifier_function"),
    ("minimind.rewards=[{path:'json:loads',weight:1.0}]", "embedded", "json:loads"),
    ("minimind.policy_loss=helpers.rl_trees:unclipped", "mindspeed-rl-master", "minimind.policy_loss"),
]


@pytest.mark.parametrize("version", ["master", "2.2.0"])
@pytest.mark.parametrize(("overrides", "nodes", "refused"), DISPATCH)
def test_what_is_handed_out_at_once_divides_as_each_version_wants_it(
    overrides: str, nodes: int, refused: str, version: str
) -> None:
    findings, _, _ = lint("grpo_minimind3", f"mindspeed-rl-{version}", overrides.split(), nodes=nodes)
    errors = [str(finding) for finding in findings if finding.level == "error"]
    assert bool(errors) == (refused in ("both", version)), errors
    assert all(re.search("_dispatch_size|_batch_size|padding|reset_", error) for error in errors)


@pytest.mark.parametrize(("size", "groups", "warned"), [(96, 4, True), (128, 4, False), (64, 4, True), (64, 8, False)])
def test_the_linter_knows_the_heads_of_vllm_ascend(size: int, groups: int, warned: bool) -> None:
    overrides = [f"model.minimind3.kv_channels={size}", f"model.minimind3.num_query_groups={groups}"]
    findings, _, _ = lint("grpo_minimind3", "mindspeed-rl-master", overrides)
    assert not [finding for finding in findings if finding.level == "error"]
    assert any(f.level == "warning" and f.key.endswith(".kv_channels") for f in findings) == warned


@pytest.mark.parametrize(("overrides", "target", "key"), BROKEN, ids=[case[0] for case in BROKEN])
def test_the_linter_names_what_cannot_run(overrides: str, target: str, key: str) -> None:
    device = "none" if "num_npus" in overrides or "infer" in overrides else "cpu"
    words = re.split(r" (?=rl_config|actor_config)", overrides)
    findings, _, _ = lint("grpo_minimind3", target, words, device=device)
    assert key.split(".")[-1] in {f.key.split(".")[-1] for f in findings if f.level == "error"}


@pytest.mark.parametrize(("own", "noted"), [("", True), ("minimind.rollout_resource.num_npus=2", False)])
def test_engines_without_devices_of_their_own_are_noted(own: str, noted: bool) -> None:
    words = ["rl_config.blocking=false", *filter(None, [own])]
    findings, _, _ = lint("grpo_minimind_tiny", "embedded", words)
    assert [f.key for f in findings if "devices that train" in f.message] == ["rl_config.blocking"] * noted


@pytest.mark.parametrize(
    ("name", "overrides", "nodes", "cores"),
    [
        ("grpo_minimind3", "rl_config.actor_resource.num_npus=2", 1, 2 * 8 + 10 + 1 + 1),
        ("grpo_minimind3", "rl_config.actor_resource.num_npus=1 rl_config.zmq_communication=false", 1, 8 + 10 + 1 + 1),
        ("grpo_minimind3", "rl_config.num_cpus_for_placement_group=4 rl_config.rule_reward=false", 1, 8 * 4 + 10 + 1),
        ("grpo_minimind3", "rl_config.num_cpus_for_local_task=2", 2, 8 * 8 + 10 + 1 + 2 * 2),
        ("grpo_minimind3_separate", "", 1, (4 + 4) * 8 + 10 + 1 + 1),
        ("ppo_minimind3", "", 1, 4 * 8 + 10 + 1 + 1),
        ("dapo_minimind3", "", 1, 8 * 8 + 2 * 10 + 1 + 1 + 1),
        ("dapo_minimind3", "rl_config.data_strategy=tq", 1, 8 * 8 + 10 + 1 + 1 + 1),
    ],
)
def test_every_core_that_mindspeed_rl_reserves_is_counted(name: str, overrides: str, nodes: int, cores: int) -> None:
    findings, _, _ = lint(name, "mindspeed-rl-master", overrides.split(), nodes=nodes)
    (said,) = [f.message for f in findings if f.key == "rl_config.num_cpus_for_placement_group"]
    assert re.search(r"(\d+) CPU cores", said)[1] == str(cores)  # type: ignore[index]


@pytest.mark.parametrize(("cores", "refused"), [(1, True), (2, False)])
def test_actor_and_critic_need_a_core_each(cores: int, refused: bool) -> None:
    words = [f"rl_config.num_cpus_for_placement_group={cores}"]
    findings, _, _ = lint("ppo_minimind3", "mindspeed-rl-master", words)
    errors = {finding.key for finding in findings if finding.level == "error"}
    assert errors == ({"rl_config.num_cpus_for_placement_group"} if refused else set())


UNHEEDED = [
    "rl_config.multi_turn_enable=true rl_config.async_engine=true",
    "rl_config.rule_reward=false",
    "rl_config.adv_estimator=gae",
    "generate_config.sampling_config.seed=1",
    "megatron_training.stage=ray_dapo",
    "rl_config.filter_groups_train_batch_size=16 rl_config.filter_groups_enable=true",
    "rl_config.integrated_mode_config={ref_model_load_path: other}",
    "minimind.staleness=2",
    "minimind.rollout_filter=nowhere:none rl_config.filter_groups_max_batches=2",
    "megatron_training.bf16=false minimind.precision=bf16",
]


@pytest.mark.parametrize("overrides", UNHEEDED)
def test_keys_that_the_embedded_trainer_does_not_heed_are_refused(overrides: str) -> None:
    words = [overrides] if "{" in overrides else overrides.split()
    findings, _, _ = lint("grpo_minimind3", "embedded", words, device="cpu")
    assert [f.key for f in findings if f.level == "error"] == [overrides.split("=")[0]]


CONTRADICTIONS = [
    ("minimind.algorithm=gspo rl_config.token_level_loss=true", "rl_config.token_level_loss", "mean over responses"),
    ("minimind.algorithm=rloo rl_config.n_samples_per_prompt=1", "rl_config.n_samples_per_prompt", "rloo compares"),
    ("rl_config.n_samples_per_prompt=1", "rl_config.n_samples_per_prompt", "found 1: grpo compares"),
    ("minimind.algorithm=cispo minimind.dual_clip=3", "minimind.dual_clip", "the policy loss of cispo is cispo"),
    ("minimind.algorithm=gspo minimind.dual_clip=3", "minimind.dual_clip", "the policy loss of gspo is gspo"),
    (
        "rl_config.use_dynamic_bsz=true rl_config.update_max_packing_token_size=1024",
        "rl_config.update_max_packing_token_size",
        "found 1024, expected at least seq_length 1536",
    ),
    (
        "minimind.algorithm=spo rl_config.blocking=false",
        "minimind.rollout_correction",
        "none: the loss of spo has no ratio to the older weights",
    ),
    (
        "minimind.algorithm=spo rl_config.partial_rollout_max_split=4 rl_config.guarantee_order=false",
        "minimind.rollout_correction",
        "Set minimind.rollout_correction: tis",
    ),
    (
        "minimind.algorithm=spo rl_config.epochs=4",
        "rl_config.epochs",
        "4 updates per step: the loss of spo has no ratio, so it is correct for one update only. Set rl_config.epochs",
    ),
    ("minimind.algorithm=spo rl_config.mini_batch_size=32", "rl_config.mini_batch_size", "2 updates per step"),
    # textwrap.indent can be called with three arguments, as both functions are.
    (
        "minimind.rollout_filter=textwrap:indent",
        "rl_config.filter_groups_max_batches",
        "found 1: 1 batch has global_batch_size groups",
    ),
    (
        "minimind.rollout_function=textwrap:indent rl_config.partial_rollout_max_split=4 "
        "rl_config.guarantee_order=false",
        "minimind.rollout_function",
        "partial_rollout_max_split 4 would call the function in the middle of a turn",
    ),
    (
        "minimind.rollout_engine=sglang minimind.sglang_base_url=http://a:1 minimind.rollout_resource.num_npus=3",
        "minimind.sglang_base_url",
        "found 1 servers, expected 3, one for each rollout engine",
    ),
    ("minimind.dual_clip=1.1", "minimind.dual_clip", "found 1.1, expected more than 1 + the upper clip range = 1.2"),
]


@pytest.mark.parametrize(("overrides", "key", "message"), CONTRADICTIONS, ids=[case[0] for case in CONTRADICTIONS])
def test_settings_that_contradict_the_algorithm_are_refused(overrides: str, key: str, message: str) -> None:
    words = [*overrides.split(), "actor_config.micro_batch_size=1"]
    found = [f for f in lint("grpo_minimind3", "embedded", words, device="cpu")[0] if f.level == "error"]
    assert [f.key for f in found] == [key] and message in found[0].message


def test_one_response_to_a_prompt_is_enough_where_the_batch_or_a_critic_is_the_expectation() -> None:
    for name in ("reinforce_plus_plus", "spo"):
        words = [f"minimind.algorithm={name}", "rl_config.n_samples_per_prompt=1", "actor_config.micro_batch_size=1"]
        assert not [f for f in lint("grpo_minimind3", "embedded", words, device="cpu")[0] if f.level == "error"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rl_config.max_packing_token_size=512"], "rl_config.max_packing_token_size (ref_, actor_ and update_"),
        (["minimind.algorithm=cispo", "rl_config.clip_ratio=0.1"], "rl_config.clip_ratio (cispo: minimind.cispo_clip"),
        (["minimind.cispo_clip=4"], "minimind.cispo_clip (the policy loss of grpo is clip)"),
        (["minimind.algorithm=gspo", "rl_config.clip_ratio=0.1"], ""),
        (["minimind.algorithm=dr_grpo", "rl_config.init_kl_coef=0.1"], "rl_config.init_kl_coef 0.1 (dr_grpo"),
        (["minimind.algorithm=spo"], "rl_config.adv_estimator group_norm (spo"),
        (["minimind.algorithm=dapo", "rl_config.blocking=false"], "rl_config.blocking false"),
        (["minimind.algorithm=dapo"], ""),
        (
            ["minimind.algorithm=dapo", "rl_config.filter_groups_max_batches=1"],
            "rl_config.filter_groups_max_batches 1 (1 batch has",
        ),
        (["minimind.algorithm=dapo", "rl_config.overlong_buffer=0"], "rl_config.overlong_buffer 0 (no token has"),
        (["minimind.algorithm=dr_grpo", "rl_config.use_kl_in_reward=true"], ""),
        (["rl_config.kl_ctrl_type=adaptive"], "rl_config.kl_ctrl_type adaptive (grpo's KL term is in the loss"),
        (["rl_config.kl_ctrl_type=adaptive", "rl_config.use_kl_in_reward=true"], ""),
        (["rl_config.critic_resource={num_npus: 2}"], "rl_config.critic_resource (grpo has no critic)"),
        (["+profiler_config.integrated.profile=true"], "profiler_config (the embedded trainer has no profiler"),
        (["actor_config.lora_r=8"], "actor_config.lora_r (the native engine does not have it)"),
        (["megatron_training.lora_r=8"], "megatron_training.lora_r (the native engine does not have it)"),
        (["megatron_training.use_ascend_coc=false"], ""),
        (["rl_config.lam=0.5"], "rl_config.lam (only ppo"),
        (["rl_config.lam=0.95", "rl_config.gamma=1.0"], ""),
        (["rl_config.update_max_packing_token_size=512"], "rl_config.update_max_packing_token_size (only with use_dyn"),
        (["rl_config.use_dynamic_bsz=true", "rl_config.update_max_packing_token_size=512"], ""),
        (["minimind.spo_half_life=0.5"], "minimind.spo_half_life (only spo"),
        (["minimind.rollout_correction_cap=5"], "minimind.rollout_correction_cap (only with rollout_correction: tis"),
        (["minimind.rollout_correction_cap=5", "minimind.rollout_correction=tis"], ""),
        (["minimind.sglang_timeout_s=3"], "minimind.sglang_timeout_s (only with rollout_engine: sglang"),
        (["minimind.reward_model_weight=2"], "minimind.reward_model_weight (only with minimind.reward_model"),
        (
            ["minimind.eval_samples=8", "megatron_training.data_path=none"],
            "minimind.eval_samples (only with minimind.e",
        ),
        ([], ""),
    ],
)
def test_what_has_no_effect_is_said(overrides: list[str], said: str) -> None:
    found = [str(f) for f in lint("grpo_minimind_tiny", "embedded", overrides, device="cpu")[0] if f.level != "warning"]
    assert (said in found[0] and len(found) == 1) if said else not found, found


def test_keys_of_mindspeed_rl_alone_are_listed() -> None:
    keys = {
        "rl_config.use_dp_batch_balance": "true",
        "rl_config.use_remove_padding": "true",
        "rl_config.require_max_age_all_finished": "false",
        "rl_config.dynamic_max_batch_size": "2",
        "rl_config.actor_update_dispatch_size": "64",
        "rl_config.max_tool_calls": "3",
        "rl_config.share_backbone": "true",
        "generate_config.infer_expert_parallel_size": "4",
        "generate_config.enable_expert_parallel": "true",
    }
    lora = ["actor_config.lora_target_modules=[linear_proj]", "megatron_training.reset_attention_mask=true"]
    words = [*lora, *(f"{key}={value}" for key, value in keys.items())]
    findings, _, _ = lint("grpo_minimind_tiny", "embedded", words, device="cpu")
    (said,) = [f.message for f in findings if f.key == "no effect on the embedded trainer"]
    assert not [f for f in findings if f.level == "error"] and not [key for key in keys if f"{key} (" not in said]


def test_a_critic_s_own_devices_have_no_effect_unless_they_are_the_actor_s() -> None:
    for count, said in ((1, True), (2, False)):
        words = [f"rl_config.critic_resource.num_npus={count}", "rl_config.actor_resource.num_npus=2"]
        findings = [str(found) for found in lint("ppo_minimind_tiny", "embedded", words, device="none")[0]]
        assert ("rl_config.critic_resource 1 (the critic's ranks share the 2 devices" in str(findings)) == said


def test_every_verifier_of_the_trainer_is_fit_for_it_and_only_its_own_for_mindspeed_rl() -> None:
    words = [
        f"rl_config.verifier_function=[{','.join(VERIFIERS)}]",
        f"rl_config.verifier_weight={[1.0] * len(VERIFIERS)}",
    ]
    for target, refused in (("embedded", set()), ("mindspeed-rl-master", {"minimind_shape", "minimind_reason"})):
        findings, _, _ = lint("grpo_minimind3", target, words, device="cpu")
        assert {f.message.split()[0] for f in findings if f.level == "error"} == refused


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["rl_config.n_samples_per_prompt=abc"], ["n_samples_per_prompt: found 'abc', expected int"]),
        (["rl_config.mini_batch_size=null"], ["mini_batch_size: found None, expected int"]),
        (["rl_config.actor_resource.num_npus=two"], ["actor_resource.num_npus: found 'two', expected int"]),
        (["rl_config.actor_resource=null"], ["rl_config.actor_resource: found None"]),
        (["megatron_training.global_batch_size=null"], ["global_batch_size: found None, expected a whole number"]),
        (["megatron_training.data_path=[data/a,data/b]"], ["found ['data/a', 'data/b'], expected one prefix"]),
        (["rl_config.verifier_function=acc"], ["verifier_function: found 'acc', expected list"]),
        (["rl_config.verifier_weight=[x]"], ["verifier_weight: found ['x'], expected a list of numbers"]),
        (["generate_config.sampling_config.max_tokens=4000"], ["max_tokens 4000 do not fit in 256"]),
        (["minimind.replay_rollouts=/nope"], ["minimind.replay_rollouts: /nope has no rollouts"]),
        (["rl_config.use_integrated_worker=false"], ["ref_config: missing", "reference_resource: missing"]),
        (
            ["rl_config.epochs=0", "rl_config.clip_ratio=-1", "rl_config.kl_penalty=low_vr_kl"],
            ["3 things are wrong", "did you mean low_var_kl", "clip_ratio: found -1", "epochs: found 0"],
        ),
        (
            ["rl_config.clip_ratio=x", "rl_config.clip_rato=1", "minimind.sample_interval=x"],
            ["clip_ratio: found 'x'", "clip_rato: unknown", "lint --fix", "sample_interval: found 'x', expected int"],
        ),
    ],
)
def test_a_run_says_all_that_is_wrong_before_it_begins(
    overrides: list[str], messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKEND", "embedded")
    with pytest.raises(UserError) as error:
        grpo(["--config-name", "grpo_minimind_tiny", "--device", "cpu", "--dry-run", "--data-pending", *overrides])
    assert not [message for message in messages if message not in str(error.value)], error.value


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_missing_logger_is_named_by_the_key_that_asks_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"rl_config.use_{name} needs the package {name}, .* pip install {name}"):
        check_before_start(config(f"rl_config.use_{name}=true"))


def test_what_the_embedded_trainer_does_not_need_is_not_asked_for(tmp_path: Path) -> None:
    corpus: Any = SimpleNamespace(vocab_size=600, tokenizer=tmp_path)
    tree = run_tree(corpus, tmp_path / "prompts", tmp_path)
    apart = {"use_integrated_worker": False, "reference_resource": {"num_npus": 1}}
    dynamic = {"filter_groups_enable": True, "mini_batch_size": 3, "n_samples_per_prompt": 4}
    three = {"megatron_training": tree["megatron_training"] | {"global_batch_size": 3}}
    for more in (
        {},
        {"rl_config": tree["rl_config"] | apart, "ref_config": {"model": "minimind3_tiny", "micro_batch_size": 4}},
        {"rl_config": tree["rl_config"] | dynamic | {"actor_resource": {"num_npus": 3}}} | three,
        {"minimind": tree["minimind"] | {"algorithm": "dapo"}},
    ):
        assert not [str(found) for found in check(tree | more, "embedded") if found.level == "error"]


def test_traps_are_repaired_by_the_hook_or_named(tmp_path: Path) -> None:
    overrides = ["rl_config.async_engine=false", "rl_config.shuffle_mini_batch=true"]
    keys = {"rl_config.async_engine", "rl_config.shuffle_mini_batch", "tokenizer"}
    for environment, level in ((None, "note"), (tmp_path / "env.yaml", "warning")):
        words = [*overrides, *([f"rl_config.runtime_env_path={environment}"] if environment else [])]
        findings, _, _ = lint("grpo_minimind3", "mindspeed-rl-master", words)
        assert {f.key for f in findings if f.level == level} >= keys


def test_prompts_that_write_the_thought_themselves_do_not_go_with_format_rewards(tmp_path: Path) -> None:
    for end, errors in (("<think>\n", 1), ("assistant\n", 0)):
        (tmp_path / "x_packed_prompts.jsonl").write_text(f'{{"prompt": "hi{end.encode("unicode_escape").decode()}"}}\n')
        words = [f"megatron_training.data_path={tmp_path}/x", "rl_config.verifier_function=[format]"]
        findings, _, _ = lint("grpo_minimind3", "embedded", words, device="cpu")
        assert sum(f.level == "error" for f in findings) == errors


def test_prompts_that_do_not_ask_for_the_form_of_a_verifier_are_named(tmp_path: Path) -> None:
    for asked, warnings in (("hi", 1), ("End with a line: Answer: N", 0)):
        (tmp_path / "x_packed_prompts.jsonl").write_text(f'{{"prompt": "{asked}"}}\n')
        words = [f"megatron_training.data_path={tmp_path}/x", "rl_config.verifier_function=[acc_for_dapo]"]
        findings, _, _ = lint("grpo_minimind3", "embedded", words, device="cpu")
        assert sum("acc_for_dapo" in f.message for f in findings if f.level == "warning") == warnings


def test_lint_rewrites_a_file_that_is_then_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = {"infer_tensor_parallel_size": 1, "max_model_len": 2048, "sampling_config": {"max_tokens": 256}}
    tree = {**GUIDE, "actor_config": {"model": "minimind3", "micro_batch_size": 4}, "generate_config": generate}
    tree["megatron_training"] = {**tree["megatron_training"], "dataset_additional_keys": ["labels"], "data_path": "x"}
    file = tmp_path / "a kit" / "old.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(tree))
    main(["lint", str(file), "--device", "none", "--fix"])
    said = capsys.readouterr().out
    assert "shuffle_minibatch: is called shuffle_mini_batch" in said and "::" not in said
    assert yaml.safe_load((file.parent / "old.yaml.orig").read_text()) == tree
    main(["lint", str(file), "--device", "none"])
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(UserError, match="1 error for embedded"):
        main(["lint", str(file), "--device", "none", "rl_config.epochs=twice"])


@pytest.mark.parametrize("page", ["docs/rl_config.md", "docs/rl_config_zh.md"])
def test_the_tables_of_keys_have_every_key_of_minimind_and_no_other(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    first, second, *_ = re.findall(r"^\| (?:key|键) \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.M)
    rows = [line.split("|")[1] for line in first.splitlines()]
    named = [key for row in rows for key in re.findall(r"`([^`]+)`", row)]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(MiniMindConfig))
    config = resolve(compose("grpo_minimind_tiny", [], device="cpu"))
    sections = {"rl_config": config.rl, "actor_config": config.actor, "generate_config": config.generate}
    keys = [key for line in second.splitlines() for key in re.findall(r"`(\w+\.\w+)`", line.split("|")[1])]
    assert len(keys) > 15
    for key in keys:
        section, _, name = key.partition(".")
        assert hasattr(sections[section], name), key
