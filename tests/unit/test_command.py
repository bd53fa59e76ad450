"""minimind-mcore: every command explains itself, and ends quietly when nobody reads its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT

from minimind_mcore import cli
from minimind_mcore.cli import settings

# Root programs and their like print hundreds of flags of MindSpeed-LLM, which takes seconds: one of them will do.
EXPLAINED = [*cli.COMMANDS, "preprocess_data.py"]


@pytest.mark.parametrize("command", EXPLAINED)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(cli.dispatch([command, "--help"]))
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > 2 and (command in shown or command == "tune"), shown


def test_help_lists_every_command_and_an_unknown_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in cli.COMMANDS | cli.PROGRAMS)
    with pytest.raises(cli.UserError, match="no command 'pretrian'; did you mean pretrain"):
        cli.dispatch(["pretrian"])


@pytest.mark.parametrize("module", ["models.presets", "models.recipes", "cli"])
def test_a_reader_that_has_ended_is_not_an_error(module: str) -> None:
    words = ["--list"] if module != "cli" else ["presets", "--list"]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", f"minimind_mcore.{module}", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("program", ["cli/train_grpo.py", "train_grpo.py"])
def test_mindspeed_rl_s_paths_are_aliases(program: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / program), "--config-name", "none_such"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"DEVICE": "cpu"})
    assert done.returncode == 1 and "none_such" in done.stderr and "Traceback" not in done.stderr


def test_an_empty_setting_counts_as_not_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"TOP_K": "3", "LR": "", "LORA_DIR": "a/../b"}.items():
        monkeypatch.setenv(name, value)
    assert settings.flags("TOP_K", "LR --lr", "MAX_LENGTH") == ["--top-k", "3"]
    assert settings.path_flags("LORA_DIR --lora-load", "LR") == ["--lora-load", str(tmp_path / "b")]
    with pytest.raises(cli.UserError, match=r"LORA_DIR=a/\.\./b: expected a whole number of 1 or more"):
        settings.count("LORA_DIR", 1)
