"""The manager's page with a real training, and the chat page on its weights: start, watch, stop, resume, chat."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.manager import TOKEN, manager

if TYPE_CHECKING:
    from playwright.sync_api import Page

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MINUTES = 5 * 60_000  # in ms
VALUES = {
    "Iterations TRAIN_ITERS": 4000, "Micro-batch MBS": 2, "Global batch GBS": 2, "Sequence length SEQ_LENGTH": 32,
    "Processes NPUS_PER_NODE": 1, "Tensor parallel TP": 1, "Log every LOG_INTERVAL": 1,
    "Evaluation batches EVAL_ITERS": 0,
}  # fmt: skip


def test_a_real_training_from_start_to_chat(tmp_path: Path, new_page: Callable[..., Page]) -> None:
    with manager(tmp_path / "jobs", DATA_DIR=str(tmp_path / "data"), OMP_NUM_THREADS="1") as (client, _):
        page = new_page(f"{client.base_url}/#token={TOKEN}")
        page.get_by_role("link", name="New job").click()
        page.get_by_label("Name").fill("real")
        for summary in ("Parallel layout", "Checkpoints and metrics"):
            page.get_by_text(summary).click()
        for label, value in VALUES.items():
            page.get_by_label(label).fill(str(value))
        page.get_by_role("button", name="Review and start").click()
        dialog = page.get_by_role("dialog")
        expect(dialog.locator("dd", has_text="1.71M parameters")).to_be_visible(timeout=MINUTES)
        expect(dialog.locator("dd", has_text="4000 iterations")).to_be_visible()
        dialog.get_by_role("button", name="Start", exact=True).click()
        main = page.get_by_role("main")
        expect(main.get_by_role("img", name=re.compile("lm_loss"))).to_be_visible(timeout=MINUTES)
        expect(main.get_by_role("progressbar")).to_be_visible()
        [job] = client.get("/api/jobs").json()["jobs"]
        client.rows(job["id"], 20, seconds=300)
        main.get_by_role("button", name="Stop", exact=True).click()
        expect(main.get_by_text("Stopped", exact=True)).to_be_visible(timeout=MINUTES)
        checkpoints = tmp_path / "jobs" / job["id"] / "pretrain/checkpoints"
        saved = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
        before = client.rows(job["id"], 1)
        assert before[-1]["iteration"] == saved
        main.get_by_role("button", name="Resume").click()
        expect(main.get_by_text(re.compile("== attempt 2"))).to_be_attached()
        after = client.rows(job["id"], saved + 2, seconds=300)
        assert after[:saved] == before and [row["iteration"] for row in after] == [*range(1, len(after) + 1)]
        main.get_by_role("button", name="Stop", exact=True).click()
        expect(main.get_by_text("Stopped", exact=True)).to_be_visible(timeout=MINUTES)
        main.get_by_role("button", name="Chat", exact=True).click()
        link = main.get_by_role("link", name="Open chat")
        expect(link).to_be_visible(timeout=MINUTES)
        with page.context.expect_page() as opened:
            link.click()
        chat = opened.value
        expect(chat.get_by_text("The model continues it.")).to_be_visible()  # it is only pretrained
        chat.get_by_label("Max tokens").fill("8")
        chat.get_by_role("button", name="17+25=").click()
        expect(chat.locator(".statistics")).to_have_text(re.compile(r"\+ [1-8] tokens"), timeout=MINUTES)
        main.get_by_role("button", name="Stop", exact=True).click()
        expect(main.get_by_text("Stopped", exact=True)).to_be_visible(timeout=MINUTES)
        for one in (chat, page):  # the console must not see the end of the manager
            one.close()
