"""The rollout engine over SGLang's HTTP protocol, against a stand-in server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import engine, rl_ray, rl_trees
from helpers.sglang_server import StandIn, serve
from torch import Tensor

from minimind_mcore.errors import UserError
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.models.weights import mcore_shapes
from minimind_mcore.rl.config.schema import MiniMindConfig
from minimind_mcore.rl.runtime.engines.decoder import DecoderEngine
from minimind_mcore.rl.runtime.engines.protocol import RolloutSamplingParams
from minimind_mcore.rl.runtime.engines.sglang import SGLangEngine
from minimind_mcore.rl.runtime.workers.rollout import RolloutWorker

DRAWN = RolloutSamplingParams(max_tokens=6, temperature=0.7, top_k=40, top_p=0.9, stop=(2,))
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


def model(name: str) -> ModelConfig:
    return PRESETS[f"{name}_tiny"].replace(vocab_size=128)


def weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=numbers) * 0.1 + (len(s) == 1) for n, s in mcore_shapes(config).items()}


class Source:
    """Stands for a `WeightSource`."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def tensors(self) -> Any:
        return iter(self.state.items())


@pytest.fixture
def sglang() -> Iterator[tuple[str, StandIn]]:
    with serve() as found:
        yield found


def connect(url: str, folder: Path, config: ModelConfig, timeout: float = 20.0) -> SGLangEngine:
    settings = MiniMindConfig(sglang_shared_path=str(folder / "shared"), sglang_timeout_s=timeout)
    return SGLangEngine(settings, url, config, config.vocab_size, torch.float32)


@pytest.mark.parametrize("name", ["minimind3", "minimind3_moe", "minimind2_moe"])
def test_log_probabilities_are_the_embedded_decoder_s(
    name: str, sglang: tuple[str, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in reads the weights with transformers."""
    monkeypatch.setattr("minimind_mcore.rl.runtime.engines.sglang.BUCKET_BYTES", 1 << 18)  # several files
    config = model(name)
    served, embedded = connect(sglang[0], tmp_path, config), DecoderEngine(config, 128, torch.float32, 8)
    for seed in range(2):
        served.load_weights(weights(config, seed).items())
        embedded.load_weights(weights(config, seed).items())
        for row, response in enumerate(served.generate(PROMPTS, 2, DRAWN, [0, 1, 2, 3])):
            prompt, ids = PROMPTS[row // 2], response.ids.tolist()
            logits = embedded.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert (expected - torch.from_numpy(response.logp)).abs().max() < 1e-4
            assert response.finished == (ids[-1] == 2) and len(ids) <= 6
    assert not list((tmp_path / "shared").iterdir())  # nothing is left of the weights
    assert sglang[1].asked.count("/flush_cache") == sglang[1].asked.count("/update_weights_from_disk")


def test_the_check_notices_a_server_that_keeps_its_weights(sglang: tuple[str, StandIn], tmp_path: Path) -> None:
    config = model("minimind3")
    worker = RolloutWorker.__new__(RolloutWorker)
    worker.engine = connect(sglang[0], tmp_path, config)
    worker.load(Source(weights(config)))  # type: ignore[arg-type]
    assert worker.check(Source(weights(config))) == []  # type: ignore[arg-type]
    loads: list[str] = []

    def keep_the_second(path: str, answer: Any) -> Any:
        if path == "/update_weights_from_disk":
            loads.append(path)
            return answer | ({"kept": True} if len(loads) > 1 else {})
        return answer

    sglang[1].change = keep_the_second
    assert worker.check(Source(weights(config))) == ["log-probabilities"]  # type: ignore[arg-type]


def without_log_probabilities(path: str, answer: Any) -> Any:
    for one in answer if path == "/generate" else []:
        one["meta_info"]["output_token_logprobs"].pop()
    return answer


def with_null(path: str, answer: Any) -> Any:
    for one in answer if path == "/generate" else []:
        one["meta_info"]["output_token_logprobs"][0][0] = None
    return answer


def refused(path: str, answer: Any) -> Any:
    return {"success": False, "message": "no such file"} if path == "/update_weights_from_disk" else answer


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            without_log_probabilities,
            "gave 5 log-probabilities for a response of 6 tokens, expected one for each",
        ),
        (with_null, "gave 5 log-probabilities for a response of 6 tokens, expected one for each"),
        (lambda path, answer: answer[:1] if path == "/generate" else answer, "gave 1 responses, expected 2"),
        (lambda path, answer: None if path == "/generate" else answer, r"/generate answered 500"),
        (refused, "did not take the weights: no such file"),
    ],
)
def test_a_wrong_answer_is_an_error(
    change: Callable[[str, Any], Any], says: str, sglang: tuple[str, StandIn], tmp_path: Path
) -> None:
    config = model("minimind3")
    served = connect(sglang[0], tmp_path, config)
    sglang[1].change = change
    endless = RolloutSamplingParams(max_tokens=6)
    with pytest.raises(UserError, match=says):
        served.load_weights(weights(config).items())
        served.generate(PROMPTS, 1, endless, [0, 1])


def test_no_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/health did not answer .*within 2 s"):
        connect("http://127.0.0.1:9", tmp_path, model("minimind3"), timeout=2.0)


def test_grpo_with_sglang(
    server: engine.Server, sglang: tuple[str, StandIn], corpus: engine.Corpus, tmp_path: Path
) -> None:
    """A whole run: the trainer and the server agree about every response."""
    tree = rl_trees.run_tree(corpus, rl_trees.write_prompts(tmp_path / "prompts"), tmp_path / "run")
    tree["megatron_training"]["train_iters"] = 3
    shared = str(tmp_path / "shared")
    tree["minimind"] |= {"rollout_engine": "sglang", "sglang_base_url": [sglang[0]], "sglang_shared_path": shared}
    (tmp_path / "tree.json").write_text(json.dumps(tree), encoding="utf-8")
    server.run(["--tree", str(tmp_path / "tree.json")], tmp_path / "run", module="helpers.rl_local")
    rows = rl_ray.rows(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert all(row["rollout/logp_diff"] < 1e-5 for row in rows)
