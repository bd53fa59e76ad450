"""The report of a run of reinforcement learning shows its last responses."""

from __future__ import annotations

import json
from pathlib import Path

from minimind_mcore.training.report import write_report


def test_the_report_shows_the_last_responses_by_source_and_sign_of_the_advantage(tmp_path: Path) -> None:
    parts = [("policy", "6 < 7?", True), ("environment", "<script>alert(1)</script>", False), ("policy", "42", False)]
    sample = {
        "prompt": "6*7=<|im_end|>",
        "response": "unused",
        "label": "42",
        "reward": "1.00",
        "segments": [{"source": kind, "text": text, "tokens": 3, "in_loss": used} for kind, text, used in parts],
    }
    older = {"iteration": 1, **sample, "prompt": "older"}
    rows = [older, {"iteration": 2, **sample, "advantage": 0.5}, {"iteration": 2, **sample, "advantage": -0.5}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 2, "grpo/score/mean": 0.5}) + "\n")
    write_report(tmp_path, "A run", ("grpo/score/mean",), "reward.png")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = page[page.index("<h2>") :]
    assert "Responses of step 2" in shown and "older" not in shown and "http" not in shown
    assert shown.count('<div class="response above">') == shown.count('<div class="response below">') == 1
    assert '<span class="environment">&lt;script&gt;alert(1)&lt;/script&gt;</span>' in shown and "<script" not in page
    assert '<span class="policy">6 &lt; 7?</span>' in shown and '<span class="policy unused">42</span>' in shown
    (tmp_path / "samples.jsonl").unlink()
    write_report(tmp_path, "A run", ("grpo/score/mean",), "reward.png")
    assert "Responses of step" not in (tmp_path / "report.html").read_text(encoding="utf-8")
