"""The megatron-core model computes what MiniMind computes: logits, losses, gradients, in every layout.

The oracles are the transformers model with the same weights, and a MiniMind in plain torch, written
below from its description. Each check runs in processes of its own (this file is also their program),
with the installed megatron-core and, where MCORE_012_DIR names its directory, with 0.12.1.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.weight_tables import hf_to_mcore
from torch import Tensor

from minimind_mcore.models import weights
from minimind_mcore.models.config import ROUTER_WEIGHTS, ModelConfig, MoEConfig, RouterWeight
from minimind_mcore.models.presets import PRESETS

CORES = {"installed": None, "0.12.1": os.environ.get("MCORE_012_DIR")}

LOGITS = {name: config for name, config in PRESETS.items() if name.endswith("_tiny")}
LOGITS["untied"] = PRESETS["minimind3_tiny"].replace(tie_embeddings=False)
LOGITS["minimind3"] = PRESETS["minimind3"]

_MOE3 = PRESETS["minimind3_moe_tiny"].replace(vocab_size=512)
_TOP1 = MoEConfig(topk=1, ffn_hidden_size=64, load_balancing="aux_loss", aux_loss_coeff=0.2)
_TOP2 = MoEConfig(topk=2, ffn_hidden_size=64, norm_topk_prob=False, load_balancing="aux_loss", aux_loss_coeff=0.2)
GRADIENTS = {
    "minimind3": PRESETS["minimind3_tiny"].replace(vocab_size=512),
    "minimind3_moe": _MOE3.replace(moe=dataclasses.replace(_TOP1, router_weight="normalized")),
    "minimind3_moe_softmax": _MOE3.replace(moe=dataclasses.replace(_TOP1, router_weight="softmax")),
    "minimind3_moe_straight_through": _MOE3.replace(moe=dataclasses.replace(_TOP1, router_weight="straight_through")),
    "minimind3_moe_top2": _MOE3.replace(moe=_TOP2),
    "minimind2_moe": PRESETS["minimind2_moe_tiny"].replace(vocab_size=512),
}
LAYOUTS: dict[str, dict[str, int]] = {
    "single": {},
    "tp2_sp": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "dp2": {},
    "ep2": {"ep": 2},
}
PROCESSES = {"single": 1, "tp2_sp": 2, "pp2": 2, "pp2_vpp2": 2, "dp2": 2, "ep2": 2}
MICRO_BATCHES, BATCH, SEQUENCE = 4, 2, 24


# The tests: each process count runs once per version of megatron-core, its results are shared.


def results(core: str, processes: int) -> dict[str, Any]:
    """What the program below found with so many processes."""
    if core != "installed" and not CORES[core]:
        pytest.skip("MCORE_012_DIR is not set: no megatron-core 0.12.1 to test against")
    output, found = run(core, processes)
    assert found is not None, output
    return found


@functools.cache
def run(core: str, processes: int) -> tuple[str, dict[str, Any] | None]:
    """What the program printed, and what it found unless it failed."""
    directory = CORES[core]
    environment = os.environ | {"OMP_NUM_THREADS": str(3 - processes), "DEVICE": "cpu"}
    paths = [directory, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as work:
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, work, str(rank), str(processes)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
        file = Path(work) / "results.json"
        finished = all(worker.returncode == 0 for worker in workers) and file.exists()
        return "\n".join(outputs), json.loads(file.read_text(encoding="utf-8")) if finished else None


def _wants_experts(layout: str) -> bool:
    return layout == "ep2"


@pytest.mark.parametrize("model", LOGITS)
@pytest.mark.parametrize("core", CORES)
def test_logits_equal_those_of_transformers(core: str, model: str) -> None:
    found = results(core, 1)["logits"][model]
    assert found["spread"] > 0.1, "logits of nearly nothing prove nothing"
    assert found["difference"] <= 1e-4 and found["argmax_equal"]
    assert found["masked_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("model", "layout"),
    [(m, lay) for m, c in GRADIENTS.items() for lay in LAYOUTS if c.moe or not _wants_experts(lay)],
)
@pytest.mark.parametrize("core", CORES)
def test_loss_and_gradients_equal_plain_torch(core: str, model: str, layout: str) -> None:
    found = results(core, PROCESSES[layout])["gradients"][f"{model} {layout}"]
    assert found["loss"] == pytest.approx(found["expected_loss"], rel=1e-5)
    assert found["worst_gradient"] <= 1e-4, found["worst_name"]
    if GRADIENTS[model].moe:
        assert found["aux_loss"] == pytest.approx(found["expected_aux_loss"], rel=1e-5)


@pytest.mark.parametrize("core", CORES)
def test_the_router_learns_from_the_language_model_loss_as_in_transformers(core: str) -> None:
    found = results(core, 1)["routers"]
    for rule in ROUTER_WEIGHTS:
        assert found[rule]["loss"] == pytest.approx(found[rule]["expected_loss"], rel=1e-6)
    assert found["softmax"]["gradient"] > 1e-3 and found["softmax"]["difference"] < 1e-4
    assert found["normalized"]["gradient"] < 1e-6
    # transformers computes 1 as s / s, whose gradient is 0. Plain torch holds the gradients above.
    assert found["straight_through"]["loss"] == found["normalized"]["loss"]
    assert found["straight_through"]["gradient"] > 1e-3


@pytest.mark.parametrize("core", CORES)
def test_packed_sequences_do_not_see_each_other(core: str) -> None:
    assert results(core, 1)["packed_difference"] <= 1e-5


@pytest.mark.parametrize("core", CORES)
def test_post_training_computes_logits_only_where_there_is_a_loss(core: str) -> None:
    found = results(core, 1)["masked"]
    assert found["logits"] == found["with_loss"] < found["positions"]
    assert found["loss_difference"] <= 1e-5
    assert found["gradient_difference"] <= 1e-5
    assert found["without_any"] == 0


@pytest.mark.parametrize("core", CORES)
def test_every_layout_starts_from_the_same_weights(core: str) -> None:
    assert results(core, 2)["initial_weights_equal"]


@pytest.mark.parametrize("core", CORES)
def test_context_parallelism_is_refused_by_name(core: str) -> None:
    assert "--context-parallel-size 2 is not supported" in results(core, 1)["context_parallel"]


# MiniMind in plain torch: the functions of model_minimind.py, on a dict of its weights.


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Native weights with norms far from 1 and a router that decides."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for rule in weights.rules(config, "native"):
        for name, shape in zip(rule.hf, rule.shapes, strict=True):
            noise = torch.randn(shape, generator=generator)
            state[name] = 1 + 0.3 * noise if len(shape) == 1 else (0.3 if "mlp.gate." in name else 0.08) * noise
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def minimind_loss(w: dict[str, Tensor], config: ModelConfig, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and auxiliary loss of one micro-batch; ids and labels [batch, sequence]."""
    x = w["model.embed_tokens.weight"][ids]
    aux = x.new_zeros(())
    for i in range(config.num_layers):
        p = f"model.layers.{i}."
        x = x + _attention(w, p + "self_attn.", config, _norm(x, w[p + "input_layernorm.weight"], config))
        y = _norm(x, w[p + "post_attention_layernorm.weight"], config)
        if config.moe is None:
            x = x + _mlp(w, p + "mlp.", y)
        else:
            out, loss = _experts(w, p + "mlp.", config.moe, y)
            x, aux = x + out, aux + loss
    logits = _norm(x, w["model.norm.weight"], config) @ w["lm_head.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), aux


def _norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps)


def _attention(w: dict[str, Tensor], p: str, config: ModelConfig, x: Tensor) -> Tensor:
    b, s, _ = x.shape
    d = config.head_dim
    q, k, v = ((x @ w[f"{p}{n}_proj.weight"].T).view(b, s, -1, d) for n in "qkv")
    if config.qk_layernorm:
        q, k = _norm(q, w[p + "q_norm.weight"], config), _norm(k, w[p + "k_norm.weight"], config)
    angles = torch.outer(torch.arange(s), 1.0 / config.rope_theta ** (torch.arange(0, d, 2) / d)).repeat(1, 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    q, k = (t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], -1) * sin for t in (q, k))
    groups = config.num_heads // config.num_kv_heads
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / d**0.5
    scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), float("-inf"))
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v).flatten(2) @ w[p + "o_proj.weight"].T


def _mlp(w: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    gated = F.silu(x @ w[p + "gate_proj.weight"].T) * (x @ w[p + "up_proj.weight"].T)
    return gated @ w[p + "down_proj.weight"].T


class StraightThrough(torch.autograd.Function):
    """1 forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        """Ones of that shape."""
        return torch.ones_like(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient of the scores."""
        return gradient


def _experts(w: dict[str, Tensor], p: str, moe: MoEConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = (x @ w[p + "gate.weight"].T).softmax(-1)  # [b, s, E]
    chosen, index = scores.topk(moe.topk, dim=-1)
    if moe.router_weight == "straight_through":
        chosen = StraightThrough.apply(chosen)
    elif moe.norm_topk_prob:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    all_outputs = torch.stack([_mlp(w, f"{p}experts.{e}.", x) for e in range(moe.num_experts)], dim=2)
    picked = all_outputs.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))
    out = (picked * chosen[..., None]).sum(2)
    for i in range(moe.shared_ffn_hidden_size // moe.ffn_hidden_size):
        out = out + _mlp(w, f"{p}shared_experts.{i}.", x)
    hits = F.one_hot(index, moe.num_experts).float()  # [b, s, k, E]
    if moe.load_balancing == "seq_aux_loss":
        counts = hits.sum((1, 2)) * moe.num_experts / (x.shape[1] * moe.topk)
        return out, moe.aux_loss_coeff * (counts * scores.mean(1)).sum(1).mean()
    load = hits.flatten(0, 1).mean(0)  # [k, E], and so k times the Switch loss
    aux = (load * scores.flatten(0, 1).mean(0)).sum() * moe.num_experts
    return out, moe.aux_loss_coeff / moe.topk * aux


# The program.


def main(work: str, rank: int, processes: int) -> None:
    """Run every check that takes so many processes; rank 0 writes the results."""
    from minimind_mcore.platform import device

    device.setup()
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{work}/rendezvous", rank=rank, world_size=processes)
    found: dict[str, Any] = {"gradients": {}}
    if processes == 1:
        with model_parallel({}):
            found["logits"] = {name: check_logits(config) for name, config in LOGITS.items()}
            found["routers"] = {rule: check_router(rule) for rule in ROUTER_WEIGHTS}
            found["packed_difference"] = check_packed()
            found["masked"] = check_masked()
            found["context_parallel"] = check_context_parallel()
    else:
        found["initial_weights_equal"] = check_initial_weights()
    for layout in LAYOUTS:
        for name, config in GRADIENTS.items():
            if PROCESSES[layout] == processes and (config.moe or not _wants_experts(layout)):
                found["gradients"][f"{name} {layout}"] = check_gradients(config, layout)
    if rank == 0:
        (Path(work) / "results.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


class model_parallel:
    """megatron-core's parallel state, for a while."""

    def __init__(self, layout: dict[str, int]) -> None:
        self.layout = layout

    def __enter__(self) -> None:
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.layout.get("tp", 1),
            pipeline_model_parallel_size=self.layout.get("pp", 1),
            virtual_pipeline_model_parallel_size=self.layout.get("vpp"),
            expert_model_parallel_size=self.layout.get("ep", 1),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        aux_loss_log().clear()

    def __exit__(self, *exception: object) -> None:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        # 0.12.1 forgets to forget them, and would find itself in a group of the last layout.
        parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = parallel_state._EMBEDDING_GLOBAL_RANKS = None


def aux_loss_log() -> dict[str, Any]:
    """megatron-core's log of auxiliary losses."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    where: Any = moe_utils if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker") else parallel_state
    log: dict[str, Any] = where.get_moe_layer_wise_logging_tracker()
    return log


def build(config: ModelConfig, layout: dict[str, int], parallel_output: bool = False, **overrides: Any) -> list[Any]:
    """This rank's chunks, with weights not yet set."""
    from megatron.core import parallel_state

    from minimind_mcore.models.core_config import build_gpt_model

    core_config = config.transformer_config(
        tensor_model_parallel_size=layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1),
        virtual_pipeline_model_parallel_size=layout.get("vpp"),
        expert_model_parallel_size=layout.get("ep", 1),
        sequence_parallel="tp" in layout,
        pipeline_dtype=torch.float32,
        # Interleaved on two ranks, the next and the previous are the same one: a batch of sends and
        # receives would pair an activation with a gradient. Megatron's arguments insist on this too.
        overlap_p2p_comm="vpp" in layout,
        batch_p2p_comm="vpp" not in layout,
        perform_initialization=False,
        **overrides,
    )
    stages, rank = layout.get("vpp", 1), parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for stage in range(stages):
        if "vpp" in layout:
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        chunks.append(
            build_gpt_model(
                config,
                core_config,
                pre_process=rank == 0 and stage == 0,
                post_process=rank == layout.get("pp", 1) - 1 and stage == stages - 1,
                vp_stage=stage if "vpp" in layout else None,
                parallel_output=parallel_output,
            )
        )
    return chunks


def check_logits(config: ModelConfig) -> dict[str, Any]:
    """Logits of the mcore model against those of transformers, causal and with that mask spelled out."""
    import transformers

    from minimind_mcore.models.loading import load_into

    torch.manual_seed(3)
    twin = transformers.AutoModelForCausalLM.from_config(config.hf_config()).eval()
    absent = {n for rule in weights.rules(config, "hf_fused") if isinstance(rule, weights.Zeros) for n in rule.hf}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.dim() == 1 and name not in absent:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name in absent:
                parameter.zero_()
            else:
                parameter.mul_(2)
        (model,) = build(config, {})
        load_into([model], hf_to_mcore(twin.state_dict(), config).__getitem__)
        model.eval()
        ids = torch.randint(0, config.vocab_size, (2, 48))
        positions = torch.arange(48).expand(2, 48)
        expected = twin(ids).logits
        logits = model(ids, positions, None)
        masked = model(ids, positions, torch.ones(1, 1, 48, 48).triu(1).bool())
    return {
        "difference": (logits - expected).abs().max().item(),
        "masked_difference": (masked - expected).abs().max().item(),
        "argmax_equal": bool((logits.argmax(-1) == expected.argmax(-1)).all()),
        "spread": expected.std().item(),
    }


def check_router(rule: RouterWeight) -> dict[str, float]:
    """Language-model loss and gradients of the routers against transformers' Qwen3-MoE, without an auxiliary loss."""
    import transformers

    from minimind_mcore.models.loading import load_into

    moe = dataclasses.replace(_TOP1, router_weight=rule, aux_loss_coeff=0.0)
    config = PRESETS["minimind3_moe_tiny"].replace(vocab_size=512, moe=moe)
    torch.manual_seed(3)
    twin = transformers.AutoModelForCausalLM.from_config(config.hf_config(), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.mul_(10 if name.endswith("mlp.gate.weight") else 1)  # a router that decides
    (model,) = build(config, {}, parallel_output=True)
    load_into([model], hf_to_mcore(twin.state_dict(), config).__getitem__)
    ids = torch.randint(0, config.vocab_size, (2, 33))
    labels = ids[:, 1:].contiguous()
    expected = F.cross_entropy(twin(ids[:, :-1]).logits.flatten(0, 1), labels.flatten())
    loss = model(ids[:, :-1], torch.arange(32).expand(2, 32), None, labels=labels).mean()
    expected.backward()
    loss.backward()
    pairs = [
        (ours.mlp.router.weight.grad, theirs.mlp.gate.weight.grad)
        for ours, theirs in zip(model.decoder.layers, twin.model.layers, strict=True)
    ]
    return {
        "loss": loss.item(),
        "expected_loss": expected.item(),
        "gradient": max(ours.norm().item() for ours, _ in pairs),
        "difference": max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs),
    }


def check_packed() -> float:
    """Samples packed into the rows of a micro-batch of post-training against each by itself."""
    from minimind_mcore.models.init import initialize
    from minimind_mcore.posttrain import data
    from minimind_mcore.posttrain.base import run_model

    config = GRADIENTS["minimind3"]
    (model,) = build(config, {})
    initialize([model], config, scheme="torch", seed=1)
    model.eval()
    rows = [[11, 19], [1, 7, 13, 4]]  # lengths of the samples in each; the second row is padded
    tokens = [np.arange(sum(row), dtype=np.int32) * 7 % config.vocab_size for row in rows]
    numbers = [np.repeat(np.arange(1, len(row) + 1, dtype=np.int32), row) for row in rows]
    batch = data.flatten_packed(data.batch_of(tokens, tokens, 32), data.pad(numbers, 32, 0))
    # A sample's last token predicts nothing.
    assert batch["loss_mask"].sum() == sum(n - 1 for row in rows for n in row)
    with torch.no_grad():
        found = run_model(model, batch)[0].split(32)
        pairs = [
            (packed, model(torch.from_numpy(part)[None].long(), None, None)[0])
            for row, ids, logits in zip(rows, tokens, found, strict=True)
            for packed, part in zip(logits[: sum(row)].split(row), np.split(ids, np.cumsum(row)[:-1]), strict=True)
        ]
    assert [len(alone) for _, alone in pairs] == [11, 19, 1, 7, 13, 4]
    return max(float((packed - alone).abs().max()) for packed, alone in pairs)


def check_masked() -> dict[str, float]:
    """The losses of post-training, computed where the mask is 1, against those of all positions."""
    from minimind_mcore.models.init import initialize
    from minimind_mcore.posttrain.base import run_model
    from minimind_mcore.training.job import MicroBatch

    config = GRADIENTS["minimind3"]
    (model,) = build(config, {}, parallel_output=True)
    initialize([model], config, scheme="torch", seed=1)
    torch.manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (3, 33))
    tokens, labels, positions = ids[:, :-1], ids[:, 1:].contiguous(), torch.arange(32).expand(3, 32)
    batch: MicroBatch = {
        "tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": (torch.rand(3, 32) < 0.3).float()
    }  # fmt: skip
    weights = torch.rand(3, 32)
    rows: list[int] = []
    model.output_layer.register_forward_hook(lambda module, inputs, output: rows.append(output[0].shape[:-1].numel()))
    expected = model(tokens, positions, None, labels=labels) * batch["loss_mask"]
    (expected * weights).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = run_model(model, batch, labels=labels)
    (losses * weights).sum().backward()
    pairs = zip(gradients, (p.grad for p in model.parameters()), strict=True)
    batch["loss_mask"] = torch.zeros(3, 32)
    return {
        "positions": rows[0],
        "logits": rows[1],
        "with_loss": int((expected != 0).sum()),
        "loss_difference": float((losses - expected).abs().max()),
        "gradient_difference": max(float((a - b).norm() / a.norm()) for a, b in pairs),
        "without_any": float(run_model(model, batch, labels=labels).abs().sum()),
    }


def check_context_parallel() -> str:
    """What the attention says when it is asked for context parallelism."""
    from megatron.core.transformer.enums import AttnMaskType

    from minimind_mcore.errors import UserError
    from minimind_mcore.models.attention import SDPACoreAttention

    config = GRADIENTS["minimind3"].transformer_config(context_parallel_size=2)
    try:
        SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    except UserError as error:
        return str(error)
    return "no error"


def check_initial_weights() -> bool:
    """Parameters after `initialize` in several layouts against those of the whole model."""
    from minimind_mcore.models.init import initial_tensor, initialize

    config = GRADIENTS["minimind2_moe"]
    for layout in LAYOUTS.values():
        with model_parallel(layout):
            chunks = build(config, layout)
            initialize(chunks, config, scheme="megatron", seed=5)
            for name, parameter, part_of in parts(chunks):
                whole = initial_tensor(name, weights.mcore_shapes(config)[name], config, scheme="megatron", seed=5)
                if not torch.equal(parameter.detach(), part_of(whole)):
                    return False
    return True


def parts(chunks: list[Any]) -> Iterator[tuple[str, Any, Callable[[Tensor], Tensor]]]:
    """Name, parameter, and how this rank's part is cut out of the whole."""
    from minimind_mcore.models import loading

    for name, parameter in loading.whole_model_parameters(chunks):
        rank, size = loading.tensor_parallel_rank(name)
        yield name, parameter, functools.partial(weights.shard, name, tp_rank=rank, tp_size=size)


def check_gradients(config: ModelConfig, layout_name: str) -> dict[str, Any]:
    """One step's loss, auxiliary loss and gradients in a layout, against plain torch."""
    layout = LAYOUTS[layout_name]
    with model_parallel(layout):
        return _check_gradients(config, layout)


def _check_gradients(config: ModelConfig, layout: dict[str, int]) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from minimind_mcore.models.loading import load_into

    native = random_weights(config)
    mcore = hf_to_mcore(native, config)
    generator = torch.Generator().manual_seed(11)
    data = torch.randint(0, config.vocab_size, (MICRO_BATCHES, BATCH, SEQUENCE + 1), generator=generator)
    expected_loss, expected_aux, expected = reference_gradients(native, config, data)

    ddp = DistributedDataParallelConfig()
    chunks = build(config, layout, parallel_output=True, finalize_model_grads_func=finalize_model_grads)
    load_into(chunks, mcore.__getitem__)
    chunks = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    losses = forward_backward(chunks, data[rank::ranks])
    worst, worst_name = 0.0, ""
    for name, parameter, part_of in parts(chunks):
        whole = expected[name]
        difference = (parameter.main_grad - part_of(whole)).abs().max() / whole.abs().max()
        if difference.item() > worst:
            worst, worst_name = difference.item(), name
    return {
        "loss": mean_everywhere(losses),
        "expected_loss": expected_loss,
        "aux_loss": logged_aux_loss(config, len(data) // ranks),
        "expected_aux_loss": expected_aux,
        "worst_gradient": max_everywhere(worst),
        "worst_name": worst_name,
    }


def reference_gradients(
    native: dict[str, Tensor], config: ModelConfig, data: Tensor
) -> tuple[float, float, dict[str, Tensor]]:
    """Mean loss and auxiliary loss over the micro-batches, and gradients by megatron-core's names."""
    leaves = {n: t.clone().requires_grad_() for n, t in native.items() if n != "lm_head.weight"}
    tied = leaves if not config.tie_embeddings else leaves | {"lm_head.weight": leaves["model.embed_tokens.weight"]}
    losses = [minimind_loss(tied, config, batch[:, :-1], batch[:, 1:]) for batch in data]
    lm, aux = (torch.stack(part).mean() for part in zip(*losses, strict=True))
    (lm + aux).backward()
    gradients = {n: t.grad if t.grad is not None else torch.zeros_like(t) for n, t in leaves.items()}
    # The table only moves numbers here, so it maps gradients as it maps weights.
    return lm.item(), aux.item(), hf_to_mcore(gradients, config)


def forward_backward(chunks: list[Any], data: Tensor) -> list[float]:
    """One step through megatron-core's own schedule; the losses of the micro-batches, on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
        output = model(batch[:, :-1], positions, None, labels=batch[:, 1:].contiguous())
        return output, lambda loss: (loss.float().mean(), {"lm": loss.detach().float().mean()})

    for chunk in chunks:
        chunk.zero_grad_buffer()
    reduced = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(data) for _ in chunks] if len(chunks) > 1 else iter(data),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(data),
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    return [entry["lm"].item() for entry in reduced]


def logged_aux_loss(config: ModelConfig, micro_batches: int) -> float:
    """The auxiliary loss that a training loop prints, times its coefficient, of all layers."""
    from minimind_mcore.models.moe import collect_aux_losses

    if config.moe is None:
        return 0.0
    (loss,) = collect_aux_losses(micro_batches).values()
    assert set(collect_aux_losses(micro_batches).values()) == {0.0}, "they are forgotten once read"
    return loss * config.num_layers * config.moe.aux_loss_coeff


def mean_everywhere(values: list[float]) -> float:
    """Mean of the values that all ranks hold (only last stages hold any)."""
    total = torch.tensor([sum(values), len(values)], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


def max_everywhere(value: float) -> float:
    """The largest of all ranks."""
    largest = torch.tensor([value], dtype=torch.float64)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return float(largest)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
