"""benchmarks/gpu_check.sh: the whole of it on the CPU with small sizes, and its pieces."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers.engine import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from gpu_check import plan, presets, rows, runner, wheels

from minimind_mcore.models.presets import PRESETS
from minimind_mcore.training.mfu import mfu


def run_script(*flags: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("OUT", "PYTHONPATH", "DEVICE")}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.timeout(1500)
def test_the_whole_check_on_the_cpu(tmp_path: Path) -> None:
    done = run_script("--tiny", "--device", "cpu", timeout=1450, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.log"]
    assert all(path.stat().st_size < 10_000_000 for path in tmp_path.iterdir())
    found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert list(found["parts"]) == ["wheels", "environment", "speed", "rest", "correctness"]
    named = {row["name"]: row for part in found["parts"].values() for row in part}
    assert not [row for row in named.values() if row["status"] == "failed"]
    for name in (
        "matrix products, bf16", "matrix products, fp32", "copy bandwidth", "minimind3_tiny, fp32: logits",
        "minimind3_tiny, bf16: losses", "resume: losses of the same steps", "SFT: loss falls", "LoRA: loss falls",
        "DPO: loss falls", "generation: a padded batch", "TP2: losses", "DP2: losses", "tests/device: passed",
        "minimind3_tiny, 2 x 34: native engine, MFU", "minimind3_moe_tiny, 1 x 64: plain loop, MFU",
        "minimind3_tiny, fp32, batch 1: kit", "serving, fp32: greedy tokens are transformers'",
    ):  # fmt: skip
        assert named[name]["status"] == "ok" and named[name]["value"] is not None, name
    assert named["PP2"]["status"] == named["EP2"]["status"] == "not measured"
    assert named["tests/device: passed"]["value"] >= 30
    assert sum(name.startswith("operator ") for name in named) == 10
    assert "DP2: losses" in done.stdout and "pretraining: loss falls" in (tmp_path / "gpu_check.log").read_text()


def test_a_dry_run_needs_no_gpu_and_writes_nothing(tmp_path: Path) -> None:
    done = run_script("--dry-run", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for word in (
        *plan.PARTS,
        "TP2 and DP2",
        "EP2: not measured",
        "MFU",
        "copy bandwidth",
        "at most 410 s in all",
        "nothing was run",
    ):
        assert word in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_one_part_has_its_time_and_what_it_needs() -> None:
    done = run_script("--dry-run", "--part", "speed")
    assert done.returncode == 0, done.stderr
    assert "at most 190 s in all" in done.stdout
    assert "== environment" in done.stdout and "== correctness" not in done.stdout


def test_without_a_gpu_the_check_says_so(tmp_path: Path) -> None:
    done = run_script("--part", "environment", OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr and "--dry-run" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_parts_fit_into_seven_minutes() -> None:
    assert plan.TOTAL_SECONDS < 420
    assert max(plan.LIMITS.values()) <= 200
    left, spent = plan.TOTAL_SECONDS, 0.0
    for number, part in enumerate(plan.PARTS):  # the worst case: each takes what it may
        seconds = plan.limit(part, plan.PARTS[number + 1 :], left)
        assert seconds >= plan.RESERVED[part] - 1
        left, spent = left - seconds, spent + seconds
    assert spent <= plan.TOTAL_SECONDS
    assert {check.part for check in plan.checks(tiny=False)} == set(plan.PARTS)


def check_of(name: str, code: str, seconds: float = 20, **more: Any) -> plan.Check:
    return plan.Check("rest", name, ("-c", code), seconds, "", needs=(), **more)


def test_a_program_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    hang = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "print('going to hang', flush=True)\n"
        "time.sleep(600)\n"
    )
    good = "from gpu_check.rows import emit; emit('after', 3.5, 'm')"
    fails = "from gpu_check.rows import emit; emit('before', 1); raise SystemExit(7)"
    checks = [check_of("hangs", hang, 6), check_of("good", good), check_of("fails", fails)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    started = time.monotonic()
    outcomes = runner.run_part(checks, variables, 100, 2, tmp_path)
    assert time.monotonic() - started < 80
    (hung,), (after,), (before, failed) = (outcome.rows for outcome in outcomes)
    assert (hung.name, hung.status) == ("hangs", "failed")
    assert "ended after 6 s" in hung.note and "going to hang" in hung.note
    assert after == rows.Row("after", 3.5, "m")
    assert before.status == "ok" and failed.status == "failed" and "exit status 7" in failed.note
    with pytest.raises(ProcessLookupError):  # a zombie of a reaped group is gone too
        for _ in range(100):
            os.kill(int((tmp_path / "child").read_text()), 0)
            time.sleep(0.1)


def test_what_lacks_a_package_is_not_measured(tmp_path: Path) -> None:
    check = plan.Check("rest", "speed of light", ("-c", "1/0"), 5, "", needs=("json", "no_such_package"))
    (outcome,) = runner.run_part([check], dict(os.environ), 10, 1, tmp_path)
    expected = rows.Row("speed of light", status="not measured", note="not installed here: no_such_package")
    assert outcome.rows == [expected]


def test_a_wheel_that_cannot_be_read_does_not_end_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_check import __main__ as check

    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/lacking-1.0-py3-none-any.whl").write_text("no zip archive")
    monkeypatch.setattr(check, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--tiny", "--device", "cpu", "--part", "environment", "--output", str(tmp_path / "out")]
    assert check.main(flags) == 1
    parts = json.loads((tmp_path / "out/gpu_check.json").read_text(encoding="utf-8"))["parts"]
    assert parts["wheels"][0]["status"] == "failed" and "BadZipFile" in parts["wheels"][0]["note"]
    assert any(row["name"] == rows.MATMUL_RATE and row["status"] == "ok" for row in parts["environment"])


def test_a_stage_that_fails_is_a_row_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_check import smoke

    def exits() -> None:
        raise SystemExit("error: no such flag")

    monkeypatch.setenv(rows.ROWS_FILE, str(tmp_path / "rows.jsonl"))
    smoke.guarded("first", exits)
    smoke.guarded("second", lambda: rows.emit("second", 2))
    first, second = rows.read_rows(tmp_path / "rows.jsonl")
    assert (first.name, first.status, first.note) == ("first", "failed", "SystemExit: error: no such flag")
    assert (second.status, second.value) == ("ok", 2)


def test_table_and_document() -> None:
    parts = {
        "first": [rows.Row("rate", 1234567.0, "tokens/s", note="measured"), rows.Row("tiny", 1.5e-7)],
        "second": [rows.Row("broken", None, "", "failed", "exit status 1"), rows.Row("PP2", status="not measured")],
    }
    text = rows.table(parts).splitlines()
    assert text[0] == "== first" and text[3] == "== second"
    assert text[1].split() == ["rate", "ok", "1,234,567", "tokens/s", "measured"]
    assert text[2].split() == ["tiny", "ok", "1.50e-07"]
    assert text[4].split() == ["broken", "failed", "exit", "status", "1"]
    assert rows.failed(parts) == ["second: broken"]
    found = json.loads(rows.document({"seconds": 3.0}, parts))
    assert found["seconds"] == 3.0
    assert found["parts"]["second"][0] == {
        "name": "broken", "value": None, "unit": "", "status": "failed", "note": "exit status 1",
    }  # fmt: skip


def test_a_document_is_cut_to_its_limit() -> None:
    parts = {"first": [rows.Row(f"row {i}", note="x" * 50_000) for i in range(400)]}
    text = rows.document({}, parts)
    assert len(text) < 10_000_000
    assert len(json.loads(text)["parts"]["first"]) == 400


def test_mfu_equals_a_calculation_by_hand() -> None:
    # minimind3: per layer 768 x 96 x (8 + 8 + 4 + 4) of attention, 3 x 768 x 2432 of the MLP, 2 x 768 + 2 x 96 of norms
    layers = 8 * (1_769_472 + 5_603_328 + 1_728) + 768
    assert layers == 58_996_992
    output, attention = 6400 * 768, 8 * 8 * 96 * 340
    flops = 6 * (layers + output + attention)
    assert flops == 396_006_912
    assert mfu(PRESETS["minimind3"], 340, 1e6, 8e14) == pytest.approx(0.49500864, rel=1e-12)
    # of the four experts one computes; the router has 4 x 768 weights in each layer
    mixture = PRESETS["minimind3_moe"]
    assert mixture.flops_per_token(340) == flops + 6 * 8 * 4 * 768


def test_recorded_values_tell_a_wrong_result() -> None:
    recorded = json.loads(presets.FILE.read_text(encoding="utf-8"))["presets"]
    assert set(recorded) == set(presets.PRESETS) == {name for name in PRESETS if name.endswith("_tiny")}
    for values in recorded.values():
        assert len(values["losses"]) == presets.STEPS and len(values["logits"]) == 2 * 8 * 32
        assert all(map(math.isfinite, [*values["losses"], *values["logits"]]))
        wrong = {"logits": [1.001 * x for x in values["logits"]], "losses": [*values["losses"][:-1], 7.0]}
        nan = {"logits": [math.nan, *values["logits"][1:]], "losses": [math.nan] * 10}
        one = {"logits": [2 * values["logits"][0], *values["logits"][1:]], "losses": values["losses"]}

        def apart(found: dict[str, list[float]], key: str, values: Any = values) -> float:
            return presets.difference(found, values, key)

        assert apart(values, "logits") == apart(values, "losses") == 0
        assert apart(wrong, "logits") == pytest.approx(1e-3)
        assert apart(wrong, "losses") > 1e-2
        assert math.isnan(apart(nan, "logits")) and math.isnan(apart(nan, "losses"))
        assert apart(one, "logits") > 1e-3


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def test_wheels_that_are_missing_are_unpacked(tmp_path: Path) -> None:
    files = {
        "lacking/__init__.py": "x = 5",
        "lacking-1.0.data/purelib/more.py": "y = 6",
        "lacking-1.0.data/scripts/a": "",
    }
    make_wheel(tmp_path / "wheels", "lacking", "1.0", files)
    make_wheel(tmp_path / "wheels", "numpy", "0.1", {"numpy/__init__.py": "raise ImportError"})
    assert wheels.unpack_missing(tmp_path / "wheels", tmp_path / "site") == ["lacking 1.0"]
    found = sorted(path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.py"))
    assert found == ["lacking/__init__.py", "more.py"]
    assert wheels.unpack_missing(tmp_path / "nothing", tmp_path / "site") == []
    bad = make_wheel(tmp_path / "bad", "bad", "1.0", {"../outside.py": "z"})
    with pytest.raises(ValueError, match=r"\.\./outside\.py"):
        wheels.unpack(bad, tmp_path / "site")


PIP = """#!{python}
import pathlib, sys
words = sys.argv[1:]
if "--version" in words:
    sys.exit(0)
assert words[:2] == ["-m", "pip"] and "--no-deps" in words and "3.12" in words, words
folder = pathlib.Path(words[words.index("--dest") + 1])
folder.mkdir(parents=True, exist_ok=True)
for word in words[words.index("--dest") + 2 :]:
    name, _, version = word.partition("==")
    with open(folder / f"{{name.replace('-', '_')}}-{{version or 1}}-py3-none-any.whl", "wb") as f:
        f.truncate({size} if name == "megatron-core" else 10)
"""


@pytest.mark.parametrize(("megabytes", "status", "newer"), [(2, 0, True), (40, 0, False), (80, 1, False)])
def test_collected_wheels_have_a_limit(megabytes: int, status: int, newer: bool, tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(PIP.format(python=sys.executable, size=megabytes * 1_000_000))
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub), "FOLDER": str(tmp_path / "wheels")}
    command = ["bash", str(ROOT / "benchmarks/gpu_wheels.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    assert "checkout and wheels: " in done.stdout
    assert (tmp_path / "wheels/megatron_core-0.16.1-py3-none-any.whl").is_file()
    assert bool(list(tmp_path.glob("wheels/newer/*.whl"))) is newer
    assert newer or "60 MB" in done.stderr
