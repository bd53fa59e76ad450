"""The router weight: its field in configs, flags and checkpoints, and the refusal of what cannot be computed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import Corpus, Server, load
from helpers.weights_on_disk import MODELS, SMALL, config_json, state_dict, write_arguments, write_hf

from minimind_mcore import arguments
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import build_parser
from minimind_mcore.mindspeed.flags import complete, router_weight_of
from minimind_mcore.mindspeed.rl_launch import require_grouped, require_normalized
from minimind_mcore.models.config import ROUTER_WEIGHTS, ModelConfig, MoEConfig, RouterWeight
from minimind_mcore.models.hf_config import to_native_config
from minimind_mcore.models.moe import straight_through
from minimind_mcore.models.presets import PRESETS, get_preset
from minimind_mcore.rl.config.lint import TARGETS, lint
from minimind_mcore.rl.config.load import compose, megatron_flags, resolve

TOP1 = MoEConfig(topk=1, ffn_hidden_size=64, load_balancing="aux_loss", aux_loss_coeff=5e-4)
RUN = "--seq-length 64 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 2".split()
MINDSPEED = [*RUN, *"--transformer-impl local --ckpt-format torch --split 100,0,0 --data-path data".split()]
SPEC = ["--spec", "minimind_mcore.models.minimind_spec", "straight_through_layer_spec"]


def with_rule(rule: RouterWeight | None, topk: int = 1) -> ModelConfig:
    """minimind3_moe_tiny with a rule."""
    moe = MoEConfig(
        topk=topk, ffn_hidden_size=448, router_weight=rule, load_balancing="aux_loss", aux_loss_coeff=5e-4
    )  # fmt: skip
    return PRESETS["minimind3_moe_tiny"].replace(moe=moe)


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_straight_through_weights_are_exactly_one_and_pass_the_gradient_of_the_scores(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4096, 4, generator=generator).to(dtype).requires_grad_()
    scores = logits.softmax(-1)
    chosen = torch.nn.functional.one_hot(scores.argmax(-1), 4).bool()
    weights = straight_through(scores * chosen, chosen)
    assert torch.equal(weights, chosen.to(dtype))  # exactly: no value of 0.9999999
    outputs = torch.randn(4096, 4, generator=generator).to(dtype)
    (weights * outputs).sum().backward()
    (expected,) = torch.autograd.grad((logits.softmax(-1) * chosen * outputs).sum(), logits)
    assert logits.grad is not None and torch.equal(logits.grad, expected) and expected.abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("rule", ROUTER_WEIGHTS)
def test_flags_and_configs_lead_back_to_the_rule(rule: RouterWeight) -> None:
    config = with_rule(rule)
    assert ModelConfig.from_args(arguments.parse([*config.megatron_flags(), *RUN])) == config
    for fields in (config.hf_config().to_dict(), to_native_config(config)):
        assert fields["router_weight"] == rule and fields["norm_topk_prob"] == (rule != "softmax")
        assert ModelConfig.from_hf_config(fields) == config


def test_norm_topk_prob_alone_distinguishes_softmax_only() -> None:
    fields = config_json(PRESETS["minimind3_moe_tiny"])
    for normalizes, rule in ((True, None), (False, "softmax")):
        moe = ModelConfig.from_hf_config(fields | {"norm_topk_prob": normalizes}).moe
        assert moe and moe.router_weight == rule


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"router_weight": "sigmoid"}, "found 'sigmoid', expected one of normalized, softmax, straight_through"),
    "two experts": ({"router_weight": "straight_through", "num_experts_per_tok": 2}, "with 2 experts per token"),
    "contradiction": ({"router_weight": "straight_through", "norm_topk_prob": False}, "contradict each other"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_cannot_be_computed_is_refused(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf_config(config_json(PRESETS["minimind3_moe_tiny"]) | changes)


def test_a_dense_model_refuses_the_flag() -> None:
    with pytest.raises(UserError, match="the model has no experts"):
        arguments.parse([*PRESETS["minimind3_tiny"].megatron_flags(), *RUN, "--router-weight", "softmax"])


# ---------------------------------------------------------------------------------------------------- training


def test_new_training_is_straight_through_and_the_checkpoint_keeps_the_rule(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    model = get_preset("minimind3_moe_tiny")
    saved = tmp_path / "saved"
    run = server.run(
        corpus.flags(model, train_iters=4, exit_interval=2, ckpt_format="torch", save=saved), tmp_path / "new"
    )
    assert "straight_through (the default of new training)" in run.output
    file = saved / "iter_0000002/mp_rank_00/model_optim_rng.pt"
    assert load(file)["args"].router_weight == "straight_through"

    resumed = server.run(corpus.flags(model, train_iters=4, load=saved), tmp_path / "resumed")
    assert "straight_through (the rule of the loaded weights)" in resumed.output
    refused = server.run(
        corpus.flags(model, train_iters=4, load=saved, router_weight="softmax"), tmp_path / "refused", check=False
    )  # fmt: skip
    assert refused.codes == [1] and "the router weight is straight_through there and softmax" in refused.output
    other = server.run(corpus.flags(model, train_iters=4, load=saved, router_weight="normalized"), tmp_path / "other")
    assert "normalized (from the command line)" in other.output
    two = server.run([*corpus.flags(model), "--moe-router-topk", "2", "--router-weight", "straight_through"],
                     tmp_path / "two", check=False)  # fmt: skip
    assert two.codes == [1] and "straight_through with 2 experts per token" in two.output


def test_the_language_model_loss_moves_the_router_in_new_training(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    # Plain gradient descent without auxiliary loss: a weight moves by its gradient of the language-model loss.
    flags = {
        "train_iters": 1,
        "moe_aux_loss_coeff": 0.0,
        "optimizer": "sgd",
        "sgd_momentum": 0.0,
        "ckpt_format": "torch",
    }
    flags |= {"weight_decay": 0.0, "clip_grad": 0.0, "lr_decay_style": "constant"}
    states = []
    for lr in (0.0, 1.0):
        folder = tmp_path / str(lr)
        argv = corpus.flags(get_preset("minimind3_moe_tiny"), **flags, lr=lr, min_lr=lr, save=folder)
        server.run(argv, tmp_path / f"run {lr}")
        states.append(load(folder / "iter_0000001/mp_rank_00/model_optim_rng.pt")["model"])
    routers = [name for name in states[0] if name.endswith("mlp.router.weight")]
    assert len(routers) == 4
    for name in routers:
        assert (states[1][name] - states[0][name]).abs().max() > 1e-4


@pytest.mark.parametrize("fields", [{}, {"router_weight": "straight_through"}, {"norm_topk_prob": False}])
def test_training_from_weights_keeps_their_rule(
    fields: dict[str, Any], server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    config = SMALL["minimind3_moe"].replace(vocab_size=corpus.vocab_size)
    hf = write_hf(tmp_path / "hf", config, state_dict(config, "hf"), **fields)
    read = ModelConfig.from_hf_config(hf)
    rule = read.moe and (read.moe.router_weight or "normalized")
    flags = corpus.flags(read, train_iters=1, load=hf, ckpt_format="torch", save=tmp_path / "saved")
    flags = [word for word in flags if word not in ("--router-weight", "straight_through")]
    run = server.run(flags, tmp_path / "run")
    assert f"weight {rule} (" in run.output
    saved: argparse.Namespace = load(tmp_path / "saved/iter_0000001/mp_rank_00/model_optim_rng.pt")["args"]
    assert saved.router_weight == rule


# ---------------------------------------------------------------------------------------------------- MindSpeed


def mindspeed(rule: str | None = None, more: list[str] | None = None, model: str = "minimind3_moe_tiny") -> list[str]:
    """The flags that MindSpeed-LLM gets."""
    named = ["--router-weight", rule] if rule else []
    return complete("pretrain_gpt.py", [*PRESETS[model].megatron_flags(), *named, *MINDSPEED, *(more or [])])[0]


def test_mindspeed_llm_gets_each_rule_by_flags_that_it_knows() -> None:
    for rule in ROUTER_WEIGHTS:
        flags = mindspeed(rule)
        assert router_weight_of(flags) == rule and "--router-weight" not in flags
        assert ("--norm-topk-prob" in flags) == (rule == "normalized") and "--moe-router-pre-softmax" in flags
        assert (" ".join(SPEC) in " ".join(flags)) == (rule == "straight_through")
    assert router_weight_of(mindspeed()) == "straight_through"
    assert router_weight_of(mindspeed(model="minimind2_moe_tiny")) == "normalized"
    softmax = mindspeed("softmax", model="minimind2_moe_tiny")
    assert "--moe-router-pre-softmax" in softmax and "--norm-topk-prob" not in softmax


@pytest.mark.parametrize("rule", [None, *ROUTER_WEIGHTS])
def test_mindspeed_llm_continues_with_the_rule_of_the_checkpoint(rule: RouterWeight | None, tmp_path: Path) -> None:
    config = with_rule(rule)
    write_arguments(tmp_path / "saved", config.megatron_flags())
    kept = [word for word in config.megatron_flags() if word not in ("--router-weight", rule)]
    flags = complete("pretrain_gpt.py", [*kept, *MINDSPEED, "--load", str(tmp_path / "saved")])[0]
    assert router_weight_of(flags) == (rule or "normalized")


def test_mindspeed_llm_writes_the_rule_into_its_checkpoints_by_the_spec(tmp_path: Path) -> None:
    # MindSpeed-LLM saves the arguments that it parsed: they have --spec and no --router-weight.
    parsed = build_parser().parse_args(mindspeed("straight_through"))
    assert not hasattr(parsed, "router_weight")
    moe = ModelConfig.from_args(parsed).moe
    assert moe and moe.router_weight == "straight_through"


def test_what_mindspeed_llm_cannot_compute_is_refused() -> None:
    with pytest.raises(UserError, match="straight_through with 2 experts per token"):
        mindspeed("straight_through", model="minimind2_moe_tiny")
    with pytest.raises(UserError, match="sinkhorn"):
        mindspeed("straight_through", ["--moe-router-load-balancing-type", "sinkhorn"])
    with pytest.raises(UserError, match="found 'sigmoid', expected one of"):
        mindspeed("sigmoid")


@pytest.mark.parametrize("rule", [None, *ROUTER_WEIGHTS])
def test_mindspeed_rl_trains_normalized_only(rule: RouterWeight | None, tmp_path: Path) -> None:
    write_arguments(tmp_path / "saved", with_rule(rule).megatron_flags())
    if rule in (None, "normalized"):
        require_normalized(str(tmp_path / "saved"))
        return
    with pytest.raises(UserError, match=f"its router weight is {rule}"):
        require_normalized(str(tmp_path / "saved"))


@pytest.mark.parametrize("grouped", [True, False])
def test_mindspeed_rl_takes_grouped_experts_only(grouped: bool, tmp_path: Path) -> None:
    write_arguments(tmp_path / "saved", with_rule("normalized").megatron_flags())
    if grouped:
        for file in (tmp_path / "saved").rglob("*.pt"):
            content = torch.load(file, weights_only=False)
            content["args"].moe_grouped_gemm = True
            torch.save(content, file)
        require_grouped(str(tmp_path / "saved"))
        return
    with pytest.raises(UserError, match="sends only grouped experts to vLLM"):
        require_grouped(str(tmp_path / "saved"))


@pytest.mark.parametrize("target", TARGETS)
def test_norm_topk_prob_false_in_a_yaml_is_softmax_or_refused(target: str) -> None:
    override = "megatron_training.norm_topk_prob=false"
    found, _, _ = lint("grpo_minimind3_moe", target, [override])
    errors = [finding.message for finding in found if finding.level == "error"]
    if target == "embedded":
        actor = resolve(compose("grpo_minimind3_moe", [override], device="cpu")).actor
        moe = ModelConfig.from_args(arguments.parse(megatron_flags(actor))).moe
        assert moe and moe.router_weight == "softmax" and not errors
    else:
        assert len(errors) == 1 and "false is the router weight softmax" in errors[0]


# ---------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("rule", [None, *ROUTER_WEIGHTS])
def test_conversions_carry_the_rule_to_checkpoints_and_back(rule: RouterWeight | None, tmp_path: Path) -> None:
    from minimind_mcore.converters.main import main_v2

    config = MODELS["minimind3_moe"].replace(moe=MoEConfig(
        topk=1, ffn_hidden_size=48, router_weight=rule, load_balancing="aux_loss", aux_loss_coeff=5e-4,
    ))  # fmt: skip
    hf = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    main_v2(["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", str(hf),
             "--save-dir", str(tmp_path / "mcore")])  # fmt: skip
    main_v2(["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", str(tmp_path / "mcore"),
             "--save-dir", str(tmp_path / "back")])  # fmt: skip
    fields = json.loads((tmp_path / "back/config.json").read_text())
    assert fields["router_weight"] == (rule or "normalized")
    assert fields["norm_topk_prob"] == (rule != "softmax")


def test_a_pth_is_assumed_to_be_normalized_and_the_assumption_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from minimind_mcore.converters.main import main_v2

    config = PRESETS["minimind3_moe_tiny"].replace(vocab_size=96)
    torch.save(state_dict(config, "native"), tmp_path / "pretrain_128.pth")
    flags = ["--load-model-type", "hf", "--save-model-type", "hf", "--load-dir", str(tmp_path / "pretrain_128.pth")]
    main_v2([*flags, "--save-dir", str(tmp_path / "assumed")])
    assert "router_weight = normalized (replace it with --router-weight)" in capfd.readouterr().out
    assert json.loads((tmp_path / "assumed/config.json").read_text())["router_weight"] == "normalized"

    given = tmp_path / "given"
    given.mkdir()
    (given / "config.json").write_text(json.dumps(to_native_config(with_rule("softmax").replace(vocab_size=96))))
    main_v2([*flags, "--save-dir", str(tmp_path / "softmax"), "--hf-cfg-dir", str(given)])
    assert "router_weight =" not in capfd.readouterr().out
    assert json.loads((tmp_path / "softmax/config.json").read_text())["norm_topk_prob"] is False

    main_v2([*flags, "--save-dir", str(tmp_path / "flag"), "--router-weight", "straight_through"])
    assert "router_weight =" not in capfd.readouterr().out
    assert json.loads((tmp_path / "flag/config.json").read_text())["router_weight"] == "straight_through"
