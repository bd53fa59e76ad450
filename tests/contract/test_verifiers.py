"""Verifiers score as MindSpeed-RL's do: verifiers.json holds what those gave (`record_verifiers.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import upstream_rl

from minimind_mcore.rl.rewards.verifiers import VERIFIERS

TABLE = json.loads(Path(__file__).with_name("verifiers.json").read_text(encoding="utf-8"))
MINDSPEED_RL = ("acc", "format", "step", "strict_format", "base_acc", "math_17k_acc", "acc_for_dapo", "acc_for_ppo",
                "math_verify_reward", "retool_reward")  # fmt: skip


@pytest.mark.parametrize("name", MINDSPEED_RL)
def test_scores_are_mindspeed_rls(name: str) -> None:
    for case in TABLE[name]:
        context = {"tool_calls": case["tool_calls"]} if "tool_calls" in case else {}
        found = VERIFIERS[name].score(case["response"], case["label"], **context)
        assert found == case["score"], f"{name}, {case['branch']}: {case}"
        quick = VERIFIERS[name].quick
        if quick is not None:  # may not tell, but never tells otherwise
            assert quick(case["response"], case["label"]) in (None, case["score"]), case


def test_right_and_wrong_are_both_in_the_table() -> None:
    assert set(TABLE) == set(MINDSPEED_RL)
    for name, cases in TABLE.items():
        scores = {case["score"] for case in cases}
        assert 1.0 in scores, name
        assert VERIFIERS[name].wrong in scores, name


@pytest.fixture
def source() -> Iterator[upstream_rl.Source]:
    source = upstream_rl.source()
    yield source
    source.forget()


def test_the_table_is_what_mindspeed_rl_scores(source: upstream_rl.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import record_verifiers

    assert record_verifiers.record(source) == TABLE
