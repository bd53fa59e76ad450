"""The commands that docs/from_*.md put next to those of other kits: each one runs as a dry run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from helpers.engine import ROOT
from helpers.serving import write_served

from minimind_mcore.cli import dispatch
from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.pipeline import main, serving
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.training import summary

PAGES = ("from_minimind_ascend", "from_minimind", "from_mindspeed")


def rows(page: str) -> list[tuple[str, str]]:
    """The commands of a page, the other kit's and ours."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", text, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_commands(page: str) -> None:
    assert len(rows(page)) > 10


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    """A directory with small files of the names that the pages use."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tokenizer").symlink_to(tokenizer)
    config = PRESETS["minimind3_tiny"].replace(vocab_size=tokenizer_info(str(folder / "tokenizer")).vocab_size)
    (folder / "hf").mkdir()
    write_served(folder / "hf/minimind-3", config, folder / "tokenizer")
    conversion = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", str(folder / "hf/minimind-3")]
    dispatch(["convert_ckpt_v2.py", *conversion, "--save-dir", str(folder / "outputs/minimind3/checkpoints")])
    lines = {
        "data": {"text": "a text that is long enough " * 20},
        "alpaca": {"instruction": "add", "input": "1 and 2", "output": "3"},
        "sft": {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    }
    for name, record in lines.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 50)
    return folder


DONE: dict[str, int] = {}  # dry runs of trainings that several pages ask for


def in_process(command: Sequence[str], changes: Mapping[str, str | None] | None = None) -> int:
    """A command of the kit in this process, once."""
    key = json.dumps([command, dict(changes or {})], sort_keys=True)
    if key not in DONE:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(Path.cwd())
            for name, value in (changes or {}).items():
                patch.setenv(name, value or "")
            before = dict(os.environ)
            try:
                DONE[key] = dispatch(list(command[3:]))
            except SystemExit as end:
                DONE[key] = int(end.code or 0)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                DONE[key] = 1
            finally:  # commands put settings into the environment of their process
                os.environ.clear()
                os.environ.update(before)
    return DONE[key]


@pytest.mark.parametrize("page", PAGES[:2])
@pytest.mark.timeout(900)
def test_commands_of_the_pipeline_dry_run(
    page: str, own: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "wait_for", in_process)
    monkeypatch.setattr(serving, "wait_for", in_process)
    # A row is one stage of a run whose earlier stages are done; here they are not, and no server runs.
    monkeypatch.setattr(main, "require_inputs", lambda *_: None)
    monkeypatch.setattr(serving, "page", lambda _: None)
    monkeypatch.setattr(summary, "require_memory", lambda *_: None)  # the commands are for cards of 64 GB
    data, reward = own / "dataset", own / "reward"
    data.mkdir(exist_ok=True)
    reward.mkdir(exist_ok=True)
    (reward / "config.json").write_text('{"architectures": ["InternLM2ForRewardModel"]}')
    if not (own / "out/hf").exists():
        (own / "out").mkdir(exist_ok=True)
        (own / "out/hf").symlink_to(own / "hf/minimind-3")
    for name in ("pretrain_hq", "sft_mini_512", "lora_identity", "lora_medical", "dpo", "r1_mix_1024", "rlaif-mini"):
        (data / f"{name}.jsonl").write_text("{}\n")  # a dry run of a training without a tokenizer does not read it
    for _, command in rows(page):
        text = command.replace("/path/to/internlm2-1_8b-reward", str(reward)).replace("=dataset/", f"={data}/")
        settings, _, words = text.partition("bash examples/run_all.sh ")
        with monkeypatch.context() as patch:
            patch.chdir(own)
            changes = dict(word.split("=", 1) for word in shlex.split(settings))
            changes |= {"DATA_DIR": str(data), "OUTPUT_DIR": str(own / "out"), "DEVICE": "cpu"}
            for name, value in changes.items():
                patch.setenv(name, value)
            try:
                status = main.main([*shlex.split(words), "--dry-run"])
            except SystemExit as end:  # --help
                status = int(end.code or 0)
        captured = capfd.readouterr()
        assert status == 0, f"{command}\n{captured.err[-3000:]}"


@pytest.mark.parametrize("command", [ours for _, ours in rows("from_mindspeed")])
def test_commands_of_mindspeed_dry_run(command: str, own: Path) -> None:
    command += " --dry-run"
    text = command.replace(".venv/bin/python ", f"{sys.executable} ")
    for name in ("data.jsonl", "alpaca.jsonl", "sft.jsonl", "hf/minimind-3", "tokenizer"):
        text = re.sub(rf"(?<=[ =]){re.escape(name)}(?=[ /]|$)", str(own / name), text)
    text = re.sub(r"(?<=[ =])(outputs|data)/", rf"{own}/\1/", text)
    places = {"OUTPUT_DIR": str(own / "out"), "DATA_DIR": str(own / "data")}
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu", **places}
    done = subprocess.run(["bash", "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{text}\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
