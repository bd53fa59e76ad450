"""Post-training that stopped and went on is the run that never stopped; the reference of DPO is computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.engine import TRACKER, Corpus, Run, Server, facts, load, same
from helpers.posttrain_oracle import DYNAMIC, FLAGS, LAYOUTS, MODEL, PACKED

from minimind_mcore.models.presets import PRESETS

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DP2": ("chat", DYNAMIC | {"stage": "sft", "split": "80,20,0", "eval_iters": 2, "eval_interval": 3}),
    "PP2": ("packed", PACKED | {"stage": "reason", "attention_dropout": 0.1}),
}


def run_stage(server: Server, dialogues: Corpus, folder: Path, place: str, data: str, **flags: Any) -> Run:
    """One run."""
    processes, parallel = LAYOUTS[place]
    options = FLAGS | parallel | {"ckpt_format": "torch", "data_path": dialogues.prefix.with_name(data)} | flags
    return server.run(dialogues.flags(PRESETS[MODEL], **options), folder, processes, posttrain=True)


@pytest.mark.parametrize("place", CASES)
def test_resumed_run_equals_the_uninterrupted_one(
    server: Server, dialogues: Corpus, tmp_path: Path, place: str
) -> None:
    data, flags = CASES[place]
    saves = {"save": tmp_path / "a", "save_interval": 5}
    straight = run_stage(server, dialogues, tmp_path / "one", place, data, **flags, **saves)
    (tmp_path / "a" / TRACKER).write_text("5")
    goes_on = {"load": tmp_path / "a", "save": tmp_path / "b"}
    resumed = run_stage(server, dialogues, tmp_path / "two", place, data, **flags, **goes_on)
    assert facts(resumed) == [row for row in facts(straight) if row["iteration"] > 5] != []
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a" / "iter_0000010").rglob("*.pt"))
    assert files and all(same(load(tmp_path / "a" / file), load(tmp_path / "b" / file)) for file in files)


def test_reference_is_computed_once_for_its_weights(
    server: Server, dialogues: Corpus, start: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"stage": "dpo", "pretrained_checkpoint": start, "dpo_beta": 0.3, "seed": 77}
    saves = {"save": tmp_path / "a", "load": tmp_path / "a", "save_interval": 5}
    straight = run_stage(server, dialogues, tmp_path / "one", "one", "pairs", **flags, **saves)
    assert "reference: log-probabilities of 24 pairs" in straight.output
    assert straight.rows[0]["rewards/margins"] == 0.0, "the policy begins as the reference"
    (tmp_path / "a" / TRACKER).write_text("5")
    resumed = run_stage(server, dialogues, tmp_path / "two", "one", "pairs", **flags, **saves)
    assert "reference:" not in resumed.output and facts(resumed) == facts(straight)[5:] != []
    assert len(list(tmp_path.glob("reference-*.npy"))) == 1

    # Another model as the reference is another reference, computed anew; live it is the same.
    flags |= {"ref_model": tmp_path / "a"}
    other = run_stage(server, dialogues, tmp_path / "three", "one", "pairs", **flags, save=tmp_path / "c")
    assert len(list(tmp_path.glob("reference-*.npy"))) == 2 and other.rows[0]["rewards/margins"] != 0.0
    live = run_stage(server, dialogues, tmp_path / "four", "one", "pairs", **flags, reference_live=True)
    assert "reference:" not in live.output
    assert live.column("rewards/margins") == pytest.approx(other.column("rewards/margins"), rel=1e-4, abs=1e-6)
    assert live.column() == pytest.approx(other.column(), rel=1e-6)
