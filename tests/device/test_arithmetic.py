"""The kit's operations on the device at hand: a GPU where there is one, else the CPU. DEVICE chooses.

benchmarks/gpu_check.sh runs these on a GPU; everywhere else they run with the other tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minimind_mcore.inference.decoder import Cache, Decoder
from minimind_mcore.inference.sampling import Sampler, SamplingParams
from minimind_mcore.inference.sampling import choose as choose_tokens
from minimind_mcore.models.moe import straight_through
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.platform import device
from minimind_mcore.platform.fused import elementwise
from minimind_mcore.platform.fused.adam import FusedAdam
from minimind_mcore.platform.fused.attention import scaled_dot_product
from minimind_mcore.platform.patches import _l2_norm, add_weight_gradient
from minimind_mcore.posttrain.data import batch_of
from minimind_mcore.posttrain.dpo import pair_log_probs
from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine, choose
from minimind_mcore.rl.runtime.engines.protocol import RolloutSamplingParams
from minimind_mcore.rl.runtime.vocab_parallel import log_probs_and_entropy
from minimind_mcore.training.mfu import matmul_rate, mfu

PLACE = device.current().torch_device
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64 on the CPU."""
    wide = found.detach().cpu().double()
    return float((wide - expected.detach()).norm() / expected.detach().norm())


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


ANGLES = normal(7, 1, 1, 4, seed=9)


def rotate(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * ANGLES.cos() - right * ANGLES.sin(), right * ANGLES.cos() + left * ANGLES.sin()), dim=-1)


def rotate_on_device(x: Tensor) -> Tensor:
    angles = ANGLES.to(x.device)
    return elementwise.rotate(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


Function = Callable[..., Tensor]
CHAINS: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: elementwise.rms_norm(x, w, 1e-5), rms_norm, [(7, 2, 8), (8,)]),
    "torch's rms_norm": (lambda x, w: torch.nn.functional.rms_norm(x, (8,), w, 1e-5), rms_norm, [(7, 2, 8), (8,)]),
    "swiglu": (elementwise.swiglu, swiglu, [(7, 2, 16)]),
    "rotate": (rotate_on_device, rotate, [(7, 2, 4, 8)]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHAINS)
def test_fused_operations_and_their_gradients(name: str, dtype: torch.dtype) -> None:
    found, expected, shapes = CHAINS[name]
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    wide = [x.clone().requires_grad_() for x in inputs]
    narrow = [x.to(PLACE, dtype).requires_grad_() for x in inputs]
    right, out = expected(*wide), found(*(x * 1 for x in narrow))
    grad = normal(*right.shape, seed=5)
    right.backward(grad)
    out.backward(grad.to(PLACE, dtype))
    assert distance(out, right) < TOLERANCE[dtype]
    for a, b in zip(narrow, wide, strict=True):
        assert a.grad is not None and b.grad is not None
        assert distance(a.grad, b.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("kind", ["causal", "mask", "all"])
def test_attention_with_grouped_heads(kind: str, kv_heads: int, dtype: torch.dtype) -> None:
    batch, heads, length, width = 2, 4, 24, 16
    q, k, v = (normal(batch, n, length, width, seed=n + i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    visible = torch.ones(length, length, dtype=torch.bool)
    if kind != "all":
        visible = visible.tril()
    mask = None
    if kind == "mask":
        visible = visible & (torch.arange(length) >= 3) | torch.eye(length, dtype=torch.bool)
        mask = visible[None, None].expand(batch, 1, length, length).to(PLACE)
    scores = q @ k.repeat_interleave(heads // kv_heads, 1).mT / math.sqrt(width)
    expected = scores.masked_fill(~visible, -math.inf).softmax(-1) @ v.repeat_interleave(heads // kv_heads, 1)
    inputs = [x.to(PLACE, dtype).requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product(inputs[0], inputs[1], inputs[2], mask, kind == "causal", 1 / math.sqrt(width))
    out.sum().backward()
    assert out.shape == (batch, heads, length, width)
    assert distance(out, expected) < TOLERANCE[dtype]
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in inputs)


def test_adam_is_torchs_adamw() -> None:
    start = normal(6, 5)
    ours, theirs = (torch.nn.Parameter(start.float().to(place)) for place in (PLACE, torch.device("cpu")))
    fused = FusedAdam([ours], lr=1e-2, weight_decay=0.1, eps=1e-8)
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, eps=1e-8)
    for step in range(4):
        grad = normal(6, 5, seed=step + 1).float()
        ours.grad, theirs.grad = grad.to(PLACE), grad.clone()
        fused.step()
        reference.step()
    assert distance(ours, theirs.detach().double()) < 1e-6
    assert fused.param_groups[0]["step"] == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_sums_and_their_norm(dtype: torch.dtype) -> None:
    inputs, grad = normal(40, 3), normal(40, 4, seed=1)
    total = torch.ones(4, 3, device=PLACE)
    add_weight_gradient(inputs.to(PLACE, dtype), grad.to(PLACE, dtype), total)
    assert distance(total, 1 + grad.t() @ inputs) < TOLERANCE[dtype]
    parts = [normal(3000, seed=2), normal(17, seed=3)]
    norm, _ = _l2_norm(0, None, [[part.to(PLACE, torch.float32) for part in parts]], False)
    assert norm.shape == (1,)
    assert float(norm) == pytest.approx(float(torch.cat(parts).norm()), rel=1e-6)


def test_log_probabilities_of_labels() -> None:
    logits, targets = normal(5, 11), torch.tensor([0, 10, 4, 4, 7])
    log_p = logits.log_softmax(-1)
    found, entropy = log_probs_and_entropy(logits.float().to(PLACE), targets.to(PLACE))
    assert distance(found, log_p.gather(1, targets[:, None]).squeeze(1)) < 1e-5
    assert distance(entropy, -(log_p.exp() * log_p).sum(-1)) < 1e-5
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    losses = normal(4, 3)
    pairs = pair_log_probs(mask.to(PLACE), losses.to(PLACE))
    assert distance(pairs, -(losses * mask).sum(1).view(2, -1)) < 1e-5


def model_of(name: str) -> Any:
    """transformers' model of a preset's size, random and not small, so that its greedy tokens are clear."""
    import transformers

    torch.manual_seed(3)
    config = PRESETS[name].replace(vocab_size=64)
    model: Any = transformers.AutoModelForCausalLM.from_config(config.hf_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.to(PLACE)


@pytest.mark.parametrize("name", ["minimind3_tiny", "minimind3_moe_tiny", "minimind2_small_tiny"])
@torch.inference_mode()
def test_decoder_gives_transformers_logits(name: str) -> None:
    model = model_of(name)
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    padding = [0, 2]
    ids = torch.tensor([prompts[0], [10, 10, *prompts[1]]], device=PLACE)
    whole = [model(torch.tensor([[*prompt, 20, 21]], device=PLACE)).logits[0] for prompt in prompts]
    cache, decoder = Cache(2, padding), Decoder(model)
    for step, token in enumerate((20, 21, None)):
        logits = decoder(ids, cache)
        for row, prompt in enumerate(prompts):
            expected = whole[row][len(prompt) - 1 + step].cpu().double()
            assert distance(logits[row], expected) < 1e-4
        ids = torch.full((2, 1), token or 0, device=PLACE)


def test_sampling_stays_within_top_k() -> None:
    logits = normal(3, 50).float().to(PLACE)
    likeliest = logits.topk(5, dim=-1).indices.tolist()
    samplers = [Sampler(SamplingParams(top_k=5, seed=row), []) for row in range(3)]
    for _ in range(20):
        chosen = choose_tokens(logits, samplers)
        assert all(token in row for token, row in zip(chosen, likeliest, strict=True))
    assert choose_tokens(logits, [Sampler(SamplingParams(temperature=0), [])] * 3) == logits.argmax(-1).tolist()


@torch.inference_mode()
def test_rollouts_end_at_the_stop_token_and_know_their_log_probabilities() -> None:
    model = model_of("minimind3_tiny")
    engine = DecoderEngine(PRESETS["minimind3_tiny"].replace(vocab_size=64), 64, torch.float32, batch=8)
    engine.model, engine.decoder = model, Decoder(model)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    draw = RolloutSamplingParams(temperature=8.0, max_tokens=24, stop=tuple(range(20, 44)))
    responses = engine.generate(prompts, 4, draw, list(range(8)))
    assert {len(response.ids) for response in responses} != {24}
    for number, response in enumerate(responses):
        prompt = prompts[number // 4]
        ended = [at for at, token in enumerate(response.ids) if token in draw.stop]
        assert ended == ([len(response.ids) - 1] if response.finished else [])
        logits = model(torch.tensor([[*prompt, *response.ids]], device=PLACE)).logits[0, len(prompt) - 1 : -1]
        log_p = (logits.double() / draw.temperature).log_softmax(-1).cpu()
        expected = log_p.gather(1, torch.tensor(response.ids)[:, None]).squeeze(1)
        assert distance(torch.tensor(response.logp), expected) < 1e-3


def test_a_number_chooses_the_token_at_its_place() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]], device=PLACE).expand(4, -1)
    numbers = torch.tensor([0.05, 0.15, 0.59, 0.61], device=PLACE)
    draw = RolloutSamplingParams(temperature=1.0, max_tokens=1)
    tokens, logp = choose(p.log(), 4, draw, numbers)
    assert tokens.tolist() == [0, 1, 2, 3]
    assert logp.exp().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-5)


def test_random_state_of_the_device_is_restored() -> None:
    state = device.rng_state()
    first = torch.rand(5, device=PLACE)
    device.set_rng_state(state)
    assert torch.equal(first, torch.rand(5, device=PLACE))


def test_measuring_the_matrix_rate_leaves_the_random_numbers_of_dropout_alone() -> None:
    state = device.rng_state()
    matmul_rate(torch.float32, largest=64, repeats=1)
    assert torch.equal(state, device.rng_state())


def test_mfu_of_a_run_at_the_measured_rate_is_one() -> None:
    rate = matmul_rate(torch.float32, largest=256, repeats=2)
    config = PRESETS["minimind3"]
    assert rate > 0
    assert mfu(config, 340, rate / config.flops_per_token(340), rate) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_straight_through_router_weight_is_one_and_has_the_gradient_of_the_score(dtype: torch.dtype) -> None:
    logits, grad = normal(9, 4), normal(9, 4, seed=1)
    chosen = torch.nn.functional.one_hot(logits.argmax(-1), 4).bool()
    wide = logits.clone().requires_grad_()
    (wide.softmax(-1) * chosen * grad).sum().backward()
    narrow = logits.to(PLACE, dtype).requires_grad_()
    routing_map = chosen.to(PLACE)
    weights = straight_through(narrow.softmax(-1) * routing_map, routing_map)
    (weights * grad.to(PLACE, dtype)).sum().backward()
    assert torch.equal(weights.cpu(), chosen.to(dtype))
    assert narrow.grad is not None and wide.grad is not None
    assert distance(narrow.grad, wide.grad) < TOLERANCE[dtype]


def test_a_batch_of_fine_tuning_can_be_pinned() -> None:
    rows = [np.array([5, 6, 7]), np.array([8, 9])]
    batch: Any = batch_of(rows, rows, 4)
    for name, tensor in batch.items():
        # torch refuses to pin a tensor whose elements share memory; a CPU without a device cannot pin at all.
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size(), (
            name
        )
        if PLACE.type == "cuda":
            assert torch.equal(tensor.pin_memory().to(PLACE, non_blocking=True).cpu(), tensor)
