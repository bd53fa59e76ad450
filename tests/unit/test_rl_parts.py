"""Parts of the trainer of reinforcement learning that need neither Ray nor a process group."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from helpers import engine, rl_trees

from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.rl.config.load import compose, plain, resolve
from minimind_mcore.rl.config.objective import objective
from minimind_mcore.rl.config.schema import Config
from minimind_mcore.rl.runtime import batch as batches
from minimind_mcore.rl.runtime import dry_run, weight_sync
from minimind_mcore.rl.runtime.advantages import Advantages
from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine, choose
from minimind_mcore.rl.runtime.engines.protocol import RolloutSamplingParams, uniforms
from minimind_mcore.rl.runtime.experience import Experience, replayed, save
from minimind_mcore.rl.runtime.metrics import SAME_WEIGHTS, Log, line, table
from minimind_mcore.rl.runtime.rank import Rank
from minimind_mcore.rl.runtime.sharding import Division, Shard, Share, trained
from minimind_mcore.rl.runtime.stop import Stop
from minimind_mcore.rl.runtime.supervise import Lost, Restarts
from minimind_mcore.rl.runtime.vocab_parallel import log_probs_and_entropy
from minimind_mcore.training.metrics import read_history


def example() -> batches.Batch:
    """Prompts of 2 and 4 tokens, with responses of 3 and 1."""
    return batches.make([[5, 6], [5, 6, 7, 8]], [[1, 2, 3], [9]], [[-0.1, -0.2, -0.3], [-0.9]], [True, False], [0, 1])


def test_a_batch_finds_the_responses_wherever_they_begin() -> None:
    batch = example()
    assert batch.tokens.tolist() == [[5, 6, 1, 2, 3], [5, 6, 7, 8, 9]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.responses[batch.mask.bool()].tolist() == [1, 2, 3, 9]


def test_parts_of_a_batch_lose_padding_and_join_to_the_same() -> None:
    batch = example()
    second = batch.select(torch.tensor([1]))
    assert second.width == 1 and second.rollout_logp is not None and second.rollout_logp.shape == (1, 1)
    whole = batches.concat([batch.select(torch.tensor([True, False])), second])
    for name, tensor in batch.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name


def test_a_rare_fault_never_ends_a_run_and_one_that_comes_back_does() -> None:
    said: list[str] = []
    restarts = Restarts("ranks", 2, said.append, lambda: None)
    for step in range(1, 10):
        for _ in range(2):
            restarts.another(Lost(["rank 0"], "died"))
        restarts.finished(step)
    assert [line[-8:] for line in said] == ["(1 of 2)", "(2 of 2)"] * 9
    for _ in range(2):  # always at step 10, with step 9 done once more
        restarts.another(Lost(["rank 0"], "died"))
        restarts.finished(9)
    with pytest.raises(UserError, match=r"Replaced 2 times already without a new step between \(minimind.max_restarts"):
        restarts.another(Lost(["rank 0"], "died"))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropy_equal_torch_s_with_their_gradients(temperature: float) -> None:
    numbers = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 11, generator=numbers)).double().float().requires_grad_()
    targets, up = torch.randint(11, (6,), generator=numbers), torch.randn(2, 6, generator=numbers)
    expected = torch.log_softmax(logits / temperature, -1)
    logp, entropy = expected.gather(1, targets[:, None]).squeeze(1), -(expected.exp() * expected).sum(-1)
    (grad,) = torch.autograd.grad((up[0] * logp + up[1] * entropy).sum(), logits)
    found = log_probs_and_entropy(logits, targets, temperature)
    (mine,) = torch.autograd.grad((up[0] * found[0] + up[1] * found[1]).sum(), logits)
    assert torch.allclose(found[0], logp, atol=1e-5) and torch.allclose(found[1], entropy, atol=1e-5)
    assert torch.allclose(mine, grad, atol=1e-5)


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 5.0]])
    draw = RolloutSamplingParams(max_tokens=1, temperature=0.5)
    numbers = torch.from_numpy(uniforms(range(20_000), 1))[:, 0]
    tokens, logp = choose(logits.expand(len(numbers), -1), 4, draw, numbers)  # the fifth is no token
    p = (logits[0, :4] / 0.5).softmax(0)
    counts = torch.bincount(tokens, minlength=4)
    expected = p * len(numbers)
    assert float(((counts - expected) ** 2 / expected).sum()) < 11.3  # chi squared, 3 degrees of freedom, 1 %
    assert torch.allclose(logp, (logits[0] / 0.5).log_softmax(0)[tokens])


@pytest.mark.parametrize(
    ("draw", "allowed"),
    [
        (RolloutSamplingParams(max_tokens=1, top_k=2), {0, 2}),
        (RolloutSamplingParams(max_tokens=1, top_p=0.6), {0}),
        (RolloutSamplingParams(max_tokens=1, top_p=0.7), {0, 2}),
        (RolloutSamplingParams(max_tokens=1, min_p=0.3), {0, 2}),
        (RolloutSamplingParams(max_tokens=1, min_p=0.5), {0}),
    ],
)
def test_top_k_top_p_and_min_p_leave_what_they_say(draw: RolloutSamplingParams, allowed: set[int]) -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])  # probabilities 0.64, 0.09, 0.24, 0.03
    numbers = torch.linspace(0, 1, 500)
    tokens, _ = choose(logits.expand(500, -1), 4, draw, numbers)
    assert set(tokens.tolist()) == allowed


@pytest.fixture(scope="module")
def rollout() -> DecoderEngine:
    """An engine with weights of chance."""
    from minimind_mcore.models.weights import mcore_shapes

    config = PRESETS["minimind3_tiny"].replace(vocab_size=64)
    numbers = torch.Generator().manual_seed(0)
    made = DecoderEngine(config, 60, torch.float32, batch=5)
    made.load_weights((n, torch.randn(s, generator=numbers) * 0.1) for n, s in mcore_shapes(config).items())
    return made


PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11, 12], [13]]


def test_responses_do_not_depend_on_the_batch_they_are_written_in(rollout: DecoderEngine) -> None:
    draw, seeds = (
        RolloutSamplingParams(max_tokens=150, stop=(7, 8, 9)),
        list(range(8)),
    )  # the cache grows; some end early
    together = rollout.generate(PROMPTS, 2, draw, seeds)
    alone = [rollout.generate([PROMPTS[i // 2]], 1, draw, [seeds[i]])[0] for i in range(8)]
    assert [r.ids.tolist() for r in together] == [r.ids.tolist() for r in alone]
    assert any(r.finished for r in together) and len({len(r.ids) for r in together}) > 2
    for response in together:
        assert response.finished == (response.ids[-1] in draw.stop)
        assert not set(response.ids[:-1]) & set(draw.stop)


def test_a_long_context_leaves_the_other_responses_their_room(
    rollout: DecoderEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has 40 positions: a context of 35 tokens has room for 5, and one of 3 for all 20."""
    monkeypatch.setattr(rollout, "config", rollout.config.replace(max_position_embeddings=40))
    draw, prompts = RolloutSamplingParams(max_tokens=20), [[3, 4, 5], list(range(3, 38))]
    together = rollout.generate(prompts, 2, draw, [0, 1, 2, 3])
    assert [len(response.ids) for response in together] == [20, 20, 5, 5]
    assert not any(response.finished for response in together)
    alone = rollout.generate(prompts[:1], 2, draw, [0, 1])
    assert [r.ids.tolist() for r in together[:2]] == [r.ids.tolist() for r in alone]


def test_vllm_draws_other_responses_with_another_seed_of_the_run() -> None:
    """The run's seed is above bit 64 of a response's seed; vLLM takes 63 bits."""
    from minimind_mcore.rl.runtime.engines.vllm import VLLMEngine

    asked: list[int] = []

    def generate(inputs: Any, parameters: list[Any], **_: Any) -> list[Any]:
        asked.extend(one.seed for one in parameters)
        return []

    served = VLLMEngine.__new__(VLLMEngine)
    served.vllm, served.allowed = SimpleNamespace(SamplingParams=lambda **given: SimpleNamespace(**given)), None
    served.engine = SimpleNamespace(apply_model=lambda function: None, generate=generate)
    for run in (1, 2, 3):
        served.generate([[5]], 4, RolloutSamplingParams(max_tokens=1), [(run << 64) + row for row in range(4)])
    assert len(set(asked)) == 12 and all(0 <= seed < 2**63 for seed in asked)


def test_log_probabilities_are_those_of_transformers(rollout: DecoderEngine) -> None:
    draw = RolloutSamplingParams(max_tokens=12, temperature=0.7, top_k=10, stop=(7,))
    for row, response in enumerate(rollout.generate(PROMPTS, 2, draw, list(range(8)))):
        ids = torch.tensor([[*PROMPTS[row // 2], *response.ids]])
        logp = (rollout.model(ids).logits[0] / 0.7).log_softmax(-1)[len(PROMPTS[row // 2]) - 1 : -1]
        expected = logp.gather(1, torch.tensor(response.ids).long()[:, None]).squeeze(1)
        assert np.allclose(response.logp, expected, atol=1e-4)


def test_a_spoilt_engine_is_restored_by_a_sync(rollout: DecoderEngine) -> None:
    before = rollout.weights()
    from helpers.weight_tables import hf_to_mcore

    weights = hf_to_mcore({k: v for k, v in before.items() if k != "lm_head.weight"}, rollout.config)
    rollout.perturb()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in rollout.weights().items())
    rollout.load_weights(weights.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in rollout.weights().items())


def shard(name: str, rank: int, size: int, tensor: torch.Tensor) -> weight_sync.WeightShard:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return weight_sync.WeightShard(
        name, rank, size, data, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    )


def test_shards_join_in_any_order_and_a_missing_one_is_an_error() -> None:
    name, whole = "decoder.layers.0.mlp.linear_fc1.weight", torch.randn(8, 3).to(torch.bfloat16)
    gate, up = whole.chunk(2)  # each rank has its part of both
    parts = [shard(name, r, 2, torch.cat([gate.chunk(2)[r], up.chunk(2)[r]])) for r in (1, 0)]
    assert torch.equal(weight_sync.join([[part] for part in parts])[name], whole)
    with pytest.raises(RuntimeError, match=r"parts .1. of 2"):
        weight_sync.join([parts[:1]])


def test_keys_of_the_yaml_replace_what_the_algorithm_says(corpus: engine.Corpus) -> None:
    tree = rl_trees.tree(corpus)
    del tree["rl_config"]["init_kl_coef"]
    assert objective(resolve(tree)).kl_coef == 0.01
    for algorithm, keys, expected in (
        ("grpo", {"clip_ratio": 0.1}, {"clip_low": 0.1, "clip_high": 0.1}),
        ("dapo", {}, {"clip_low": 0.2, "clip_high": 0.28, "kl": "none", "dynamic_sampling": True}),
        ("dapo", {"filter_groups_enable": False}, {"dynamic_sampling": False}),
        ("cispo", {"clip_ratio": 0.1}, {"clip_high": 5.0}),
        ("grpo", {"init_kl_coef": 0}, {"kl": "none"}),
        ("grpo", {"token_level_loss": False}, {"aggregation": "seq-mean-token-mean"}),
    ):
        changed = copy.deepcopy(tree)
        changed["minimind"]["algorithm"] = algorithm
        changed["rl_config"] |= keys
        found = objective(resolve(changed))
        assert {name: getattr(found, name) for name in expected} == expected, (algorithm, keys)


class OneWeight(Rank):
    """A rank whose log-probabilities are all its first weight; the second one is frozen."""

    def __init__(self, config: Config) -> None:
        self.config, self.earlier = config, {}
        self.training = cast(Any, SimpleNamespace(parallel=SimpleNamespace(overlap_param_gather=False)))
        layer = torch.nn.Linear(1, 1)
        layer.bias.requires_grad_(False)
        self.model, self.weight = cast(Any, [layer]), layer.weight

    def measure(self, shard: Shard, reference: bool = False) -> Share:
        rows = [row for mini in shard.mini_batches for part in mini.micro_batches for row in part]
        return Share(rows, {"logp": self.weight.expand(len(rows), shard.batch.width).detach().clone()})


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_difference_from_the_engine_is_that_of_the_weights_that_generated(
    epochs: int, corpus: engine.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update moves log-probabilities by 4e-4, below the limit; the engines are 0, 1 or 2 steps behind."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    tree = rl_trees.tree(corpus)
    tree["rl_config"] |= {"blocking": False, "epochs": epochs}
    tree["minimind"] |= {"staleness": 2}
    rank, division = OneWeight(resolve(tree)), Division(1, 1, 1, 1, 1, "token-mean", 1)
    for step, behind in enumerate((0, 1, 2, 0, 1, 2), 1):
        present, wrote = (-1 + 4e-4 * (step - 1 - late) for late in (0, behind))
        with torch.no_grad():
            rank.weight.fill_(present)
        batch = batches.make([[5], [5]], [[1, 2, 3], [9]], [[wrote - 1e-5] * 3, [wrote - 1e-5]], [True] * 2, [0, 0])
        [shard] = trained(batch, division, [torch.arange(2)] * epochs, weights=step - 1 - behind)
        assert rank._same_weights(shard, step) == {SAME_WEIGHTS: pytest.approx(1e-5, abs=1e-6)}
        assert rank.weight.item() == pytest.approx(present)
        assert 1 <= len(rank.earlier) <= 2 and all(len(kept) == 1 for kept in rank.earlier.values())
        [saved] = trained(batch, division, [torch.arange(2)] * epochs)  # replayed: nobody knows
        assert rank._same_weights(saved, step) == {}


def test_the_kl_term_of_reinforce_plus_plus_is_in_the_returns_and_that_of_rloo_in_the_reward(
    corpus: engine.Corpus,
) -> None:
    """Responses of 3 and 1 tokens, rewards 1 and 2, KL coefficient 0.1 and log-ratios d to the reference."""
    tree = rl_trees.tree(corpus)
    tree["rl_config"] |= {"n_samples_per_prompt": 2, "init_kl_coef": 0.1, "advantage_whiten": False}
    d = torch.tensor([[0.1, -0.2, 0.3], [0.5, 9.0, 9.0]])
    for algorithm, expected in (
        ("reinforce_plus_plus", [1 - 0.1 * 0.2, 1 - 0.1 * 0.1, 1 - 0.1 * 0.3, 2 - 0.1 * 0.5]),
        ("rloo", [(1 - 0.1 * 0.2) - (2 - 0.1 * 0.5)] * 3 + [(2 - 0.1 * 0.5) - (1 - 0.1 * 0.2)]),
    ):
        tree["minimind"]["algorithm"] = algorithm
        config = resolve(tree)
        batch = dataclasses.replace(example(), rewards=torch.tensor([1.0, 2.0]), values=torch.ones(2, 3))
        assert batch.rollout_logp is not None
        batch.ref_logp = batch.rollout_logp - d
        metrics = Advantages(config, objective(config)).fill(batch)
        assert batch.advantages is not None
        assert batch.advantages[batch.mask.bool()].tolist() == pytest.approx(expected, abs=1e-6)
        assert metrics["actor/reward_kl"] == pytest.approx((0.1 - 0.2 + 0.3 + 0.5) / 4, abs=1e-6)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"temperature.*more than 0"):
        RolloutSamplingParams(max_tokens=1, temperature=0.0)


def test_saved_rollouts_are_read_again(tmp_path: Path) -> None:
    filled = {"rewards": torch.tensor([1.0, 0.0]), "advantages": torch.tensor([[0.0, 0.5, 1.0], [-1.0, 9.0, 9.0]])}
    experience = Experience(dataclasses.replace(example(), **filled), [{"prompt": "x"}], [], 7)
    experience.scores["acc"] = filled["rewards"]
    save(experience, tmp_path, 3, 1)
    found = replayed(tmp_path, 3, 1)
    assert found.consumed == 7 and found.texts == experience.texts
    assert all(torch.equal(found.batch.state_dict()[n], t) for n, t in experience.batch.state_dict().items())
    [line] = (tmp_path / "rollouts-0000003.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 3, "prompt": "x", "prompt_tokens": 2, "response_tokens": 3, "finished": True, "reward": 1.0,
        "advantage": 0.5, "rewards": {"acc": 1.0},
    }  # fmt: skip
    with pytest.raises(UserError, match="rollouts-0000004"):
        replayed(tmp_path, 4, 1)


def test_rollouts_with_other_groups_are_refused(tmp_path: Path) -> None:
    save(Experience(example(), [], [], 7), tmp_path, 1, 1)
    with pytest.raises(UserError, match=r"found 1 responses to each prompt, expected 2 .*n_samples_per_prompt"):
        replayed(tmp_path, 1, 2)
    file = tmp_path / "rollouts-0000001.pt"
    assert len(replayed(tmp_path, 1, 1, 2).batch) == 2
    with pytest.raises(UserError, match=r"found responses to 2 prompts, expected 4 .*global_batch_size"):
        replayed(tmp_path, 1, 1, 4)
    older = torch.load(file, weights_only=True)
    del older["n_samples_per_prompt"]
    torch.save(older, file)
    assert len(replayed(tmp_path, 1, 2).batch) == 2
    with pytest.raises(UserError, match="found 2 responses, no multiple of 4"):
        replayed(tmp_path, 1, 4)


STEP = {
    "timing/all": 2.13, "timing/rollout": 1.0, "actor/pg_loss": -0.01234, "actor/lr": 1e-6, "grpo/score/mean": 0.42187,
    "response_length/mean": 12.25, "e2e_tps": 1234.4, "actor/kl_loss": 0.00119, "grpo/score/max": 1.0,
}  # fmt: skip
BUSY = {
    "timing/all": 123.4, "actor/pg_loss": -0.01234, "grpo/score/mean": -0.42187, "response_length/mean": 1024.0,
    "e2e_tps": 123456.0, "actor/reward_kl": -0.00119,
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "step", "left", "width", "expected"),
    [
        (STEP, 3, 120.2, 120,
         "step 3/60  reward 0.422  len 12  KL 0.0012  loss -0.012  2.1s  1234 tok/s  ETA 2m00s"),
        (STEP, 3, 120.2, 80, "step 3/60 reward 0.422 len 12 KL 0.0012 loss -0.012 2.1s 1234 tok/s ETA 2m00s"),
        (BUSY, 1000, 45_240.0, 80,
         "1000/60 reward -0.422 len 1024 KL -0.0012 loss -0.012 123s 123k tok/s ETA 12h34m"),
        ({"eval/accuracy": 0.125}, 0, None, 80, "step 0/60  eval/accuracy 0.125"),
    ],
)  # fmt: skip
def test_a_step_is_one_line_that_fits_the_terminal(
    row: dict[str, float], step: int, left: float | None, width: int, expected: str
) -> None:
    assert line(step, 60, row, left, width) == expected
    assert len(expected) <= width


def test_the_log_prints_the_line_and_keeps_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = [f"minimind.output_dir={tmp_path}", "megatron_training.train_iters=60", "rl_config.use_tensorboard=false"]
    log = Log(resolve(compose("grpo_minimind_tiny", words, device="cpu")), 0)
    log.step(3, STEP)
    printed = capsys.readouterr().out
    assert printed == "step 3/60 reward 0.422 len 12 KL 0.0012 loss -0.012 2.1s 1234 tok/s ETA 2m01s\n"
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.items() >= STEP.items() and row["iteration"] == 3


def test_samples_are_a_table_that_fits() -> None:
    rows = [{"reward": 1, "response": "答案是\n四十二" * 20}, {"reward": 0, "response": "short"}]
    lines = table(rows, {"reward": 6, "response": 30}).splitlines()
    assert lines[0].startswith("reward  response") and "\\n" in lines[2] and "..." in lines[2]
    assert lines[3] == "0       short"


def test_samples_and_the_time_that_is_left_are_on_disk(tmp_path: Path) -> None:
    """The manager shows both; a run that continues writes the samples after its checkpoint again."""
    words = [
        "rl_config.use_tensorboard=false",
        f"minimind.output_dir={tmp_path}",
        "megatron_training.train_iters=10",
    ]
    config = resolve(compose("grpo_minimind_tiny", words, device="cpu"))
    sample = {"reward": "0.50", "label": "四十二", "prompt": "6*7=", "response": "答案是\n" + "42" * 99}
    log = Log(config, 0)
    for step in (1, 2):
        log.step(step, {"timing/all": 2.0, "grpo/score/mean": 0.5})
        log.sample(step, [sample])
    assert [row["eta_seconds"] for row in read_history(tmp_path / "metrics.jsonl")] == [18.0, 16.0]
    assert read_history(tmp_path / "samples.jsonl") == [{"iteration": 1, **sample}, {"iteration": 2, **sample}]
    Log(config, 1)
    assert read_history(tmp_path / "samples.jsonl") == [{"iteration": 1, **sample}]


def test_swanlab_gets_all_that_the_configuration_says_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    board = SimpleNamespace(finish=lambda: None, log=lambda row, step: None)
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(init=lambda **given: seen.update(given) or board))
    words = ["project=p", "mode=local", "exp_name=e", f"save_dir={tmp_path}/s"]
    overrides = [f"rl_config.swanlab_{word}" for word in words]
    config = resolve(
        compose(
            "grpo_minimind_tiny",
            [
                *overrides,
                "rl_config.use_swanlab=true",
                "rl_config.use_tensorboard=false",
                f"minimind.output_dir={tmp_path}",
            ],
            device="cpu",
        )
    )
    Log(config, 0).close()
    wanted = {"project": "p", "mode": "local", "experiment_name": "e", "logdir": f"{tmp_path}/s"}
    assert seen.items() >= wanted.items() and (tmp_path / "s").is_dir()


def test_a_wait_of_thirty_seconds_names_who_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from minimind_mcore.rl.runtime import supervise

    clock, said = [0.0], list[str]()
    monkeypatch.setattr(supervise.time, "monotonic", lambda: clock[0])

    def wait(refs: list[str], **_: Any) -> tuple[list[str], list[str]]:
        clock[0] += 1.0
        done = [ref for ref in refs if ref == "quick" or clock[0] > 70]
        return done, [ref for ref in refs if ref not in done]

    monkeypatch.setattr(supervise.ray, "wait", wait)
    monkeypatch.setattr(supervise.ray, "get", lambda ref, **_: ref.upper())
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text))
    names = ["actor rank 0", "actor rank 1"]
    assert supervise.collect(["quick", "slow"], names, "actor: update", 1800.0) == ["QUICK", "SLOW"]
    assert len(said) == 2, said  # after 30 s and after 60 s
    assert "waiting for actor rank 1 (actor: update, 31 of 1800 s; actor rank 0 answered)" in said[0]


def test_a_signal_while_hosts_are_waited_for_ends_the_run_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        stop = Stop()
        with stop.later():
            with pytest.raises(SystemExit) as left, stop.at_once():
                os.kill(os.getpid(), signal.SIGTERM)
            assert left.value.code == 143 and "saving after" not in capfd.readouterr().err
            os.kill(os.getpid(), signal.SIGTERM)  # in a step it is noted, and the wait that follows ends
            with pytest.raises(SystemExit) as left, stop.at_once():
                pytest.fail("waited")
        assert left.value.code == 143 and "leaving without saving" in capfd.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_dry_run_compares_the_weights_with_the_model(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, load = rl_trees.write_prompts(tmp_path / "prompts"), tmp_path / "model"
    words = [f"megatron_training.data_path={prompts}", f"megatron_training.tokenizer_name_or_path={tokenizer}"]
    config = resolve(plain(compose("grpo_minimind_tiny", [*words, f"actor_config.load={load}"], None, "cpu")))
    monkeypatch.setattr(dry_run, "prompt_dataset", lambda *_: range(12))
    for preset in ("minimind3_tiny", "minimind2_tiny"):
        transformers.AutoModelForCausalLM.from_config(PRESETS[preset].hf_config()).save_pretrained(load)
        if preset == "minimind3_tiny":
            dry_run.print_plan(config, pending=False)
            assert f"begins      with the weights of {load}" in capsys.readouterr().out
        else:
            with pytest.raises(UserError, match=rf"--load {load}: \w+ is .* there and .* on the command line"):
                dry_run.print_plan(config, pending=False)
