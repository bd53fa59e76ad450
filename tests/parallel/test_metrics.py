"""What a run leaves for people to look at."""

from __future__ import annotations

import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.engine import Corpus, Run, Server, read_rows

from minimind_mcore.models.presets import PRESETS
from minimind_mcore.training.metrics import forget_after, read_history


@pytest.fixture(scope="module")
def resumed(server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run, Path]:
    """A run to iteration 6 that saved at 4, and another from there to 8, with the same outputs."""
    folder = tmp_path_factory.mktemp("metrics")
    flags = {
        "train_iters": 8, "ckpt_format": "torch", "save": folder / "saved", "split": "80,20,0", "eval_iters": 1,
        "eval_interval": 2, "tensorboard_dir": folder / "tensorboard", "log_num_zeros_in_grad": True,
    }  # fmt: skip
    argv = corpus.flags(PRESETS["minimind3_moe_tiny"], **flags, exit_interval=6, save_interval=4)
    first = server.run(argv, folder / "out")
    (folder / "saved" / "latest_checkpointed_iteration.txt").write_text("4")
    argv = corpus.flags(PRESETS["minimind3_moe_tiny"], **flags, load=folder / "saved")
    return first, server.run(argv, folder / "out"), folder


def test_rows_of_a_resumed_run_are_there_once(resumed: tuple[Run, Run, Path]) -> None:
    rows = read_rows(resumed[2] / "out")
    assert [row["iteration"] for row in rows if "lm_loss" in row] == list(range(1, 9))
    assert [row["iteration"] for row in rows if "validation_loss" in row] == [2, 4, 6, 8]
    expected = {
        "iteration", "consumed_samples", "consumed_tokens", "learning_rate", "global_batch_size", "lm_loss",
        "load_balancing_loss", "grad_norm", "skipped_iterations", "seconds_per_iteration", "tokens_per_second",
        "eta_seconds", "memory_bytes", "zero_gradients", "tflops_per_device",
    }  # fmt: skip
    assert expected <= rows[0].keys()
    assert rows[0]["consumed_tokens"] == 8 * 32


def test_log_has_megatrons_line(resumed: tuple[Run, Run, Path]) -> None:
    assert re.search(
        r"iteration +1/ +8 \| consumed samples: +8 \| elapsed time per iteration \(ms\): [\d.]+ \| "
        r"learning rate: 1\.000000E-03 \| global batch size: +8 \| lm loss: 6\.\d+E\+00 \| "
        r"load balancing loss: 1\.\d+E\+00 \| grad norm: [\d.]+ \| number of skipped iterations: +0 \| "
        r"number of nan iterations: +0 \|",
        resumed[0].output,
    ), resumed[0].output


def test_picture_is_a_png(resumed: tuple[Run, Run, Path]) -> None:
    data = (resumed[2] / "out" / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    position, kinds = 8, []
    while position < len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        checked = data[position + 4 : position + 8 + size]
        assert zlib.crc32(checked) == int.from_bytes(data[position + 8 + size : position + 12 + size], "big")
        kinds.append(kind)
        position += size + 12
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"


class _References(HTMLParser):
    """Everything that a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.figures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.figures += tag == "svg"
        self.found += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]
        assert tag not in ("script", "link", "iframe")


def test_report_needs_nothing_else(resumed: tuple[Run, Run, Path]) -> None:
    page = _References()
    page.feed((resumed[2] / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.found == [] and page.figures >= 6


def test_tensorboard_has_every_iteration_once(resumed: tuple[Run, Run, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed[2] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("lm loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("validation loss")] == [2, 4, 6, 8]


def test_line_cut_off_by_a_kill_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"itera', encoding="utf-8")
    assert read_history(file) == [{"iteration": 1}, {"iteration": 2}, {"iteration": 3}]
    forget_after(file, 3)  # no whole row is dropped, but the next one must not be appended to half a line
    assert file.read_text(encoding="utf-8") == '{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n'
    forget_after(file, 2)
    assert file.read_text(encoding="utf-8") == '{"iteration": 1}\n{"iteration": 2}\n'


def lose_float64() -> None:
    """Called in every rank: all_reduce sums a copy of a float64 tensor, as MindSpeed 26.1.0 has it."""
    import torch
    import torch.distributed as dist

    all_reduce = dist.all_reduce

    def losing(tensor: Any, *arguments: Any, **options: Any) -> Any:
        return all_reduce(tensor.float() if tensor.dtype == torch.double else tensor, *arguments, **options)

    dist.all_reduce = losing


def test_all_data_parallel_ranks_count_where_float64_cannot_be_reduced(
    server: Server, corpus: Corpus, tmp_path: Path
) -> None:
    flags = corpus.flags(PRESETS["minimind3_tiny"], train_iters=2, split="80,20,0", eval_iters=1)
    plain = server.run(flags, tmp_path / "plain", 2)
    hooked = server.run(flags, tmp_path / "hooked", 2, hook=f"{__file__}:lose_float64")
    assert plain.column() == pytest.approx(hooked.column(), rel=1e-6)
    validation = [[row["validation_loss"] for row in read_rows(run.folder)[-1:]] for run in (plain, hooked)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-6)
    for row in hooked.rows:  # 8 samples of 32 tokens in a step
        assert row["tokens_per_second"] * row["seconds_per_iteration"] == pytest.approx(256, rel=1e-6)
