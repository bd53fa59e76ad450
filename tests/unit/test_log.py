"""Messages: levels, streams, ranks, LOG_LEVEL; and what a closed pipe does to commands that print."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT

from minimind_mcore import log

KIT = logging.getLogger("minimind_mcore.training.metrics")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code as a program of the kit."""
    imports = "import logging, sys\nfrom minimind_mcore import errors\n"
    return subprocess.run(
        [sys.executable, "-c", imports + code], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | environment,
    )  # fmt: skip


def speak() -> None:
    """One message of each level."""
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        KIT.log(level, f"{logging.getLevelName(level)} 5 %")


@pytest.mark.parametrize(
    ("level", "out", "err"),
    [
        ("debug", "DEBUG 5 %\nINFO 5 %\n", "warning: WARNING 5 %\nerror: ERROR 5 %\n"),
        ("", "INFO 5 %\n", "warning: WARNING 5 %\nerror: ERROR 5 %\n"),
        ("INFO", "INFO 5 %\n", "warning: WARNING 5 %\nerror: ERROR 5 %\n"),
        ("warning", "", "warning: WARNING 5 %\nerror: ERROR 5 %\n"),
        ("error", "", "error: ERROR 5 %\n"),
    ],
)
def test_levels_and_streams(
    level: str, out: str, err: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOG_LEVEL", level)
    log.setup()
    log.setup()  # once more prints nothing twice
    speak()
    assert capsys.readouterr() == (out, err)


def test_another_rank_prints_warnings_only_with_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "3")
    speak()
    log.warn_once(KIT, "every rank found this")
    assert capsys.readouterr() == ("", "warning: rank 3: WARNING 5 %\nerror: ERROR 5 %\n")


def test_the_rank_that_a_scheduler_gave_to_a_host_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")
    KIT.info("shown")
    assert capsys.readouterr().out == "shown\n"


def test_commands_whose_product_is_on_stdout_tell_about_themselves_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in log.ON_STDERR:
        logging.getLogger(name.rstrip(".")).info("x")
    logging.getLogger("minimind_mcore.rl.configuration").info("y")  # only looks like one of them
    assert capsys.readouterr() == ("y\n", "x\n" * len(log.ON_STDERR))


def test_a_wrong_level_is_an_error_of_the_user() -> None:
    done = run("errors.run(lambda: print('went on'))", LOG_LEVEL="loud")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: LOG_LEVEL=loud: expected one of debug, info, warning, error\n"


def test_other_loggers_keep_their_handlers_and_levels() -> None:
    code = """
logging.basicConfig(level=logging.INFO, format="host %(message)s", stream=sys.stdout)
before = logging.root.handlers, logging.root.level
def main():
    logging.getLogger("megatron.core").info("upstream")
    logging.getLogger("minimind_mcore.training").info("kit")
    assert before == (logging.root.handlers, logging.root.level)
errors.run(main)
"""
    done = run(code, LOG_LEVEL="debug")
    assert (done.returncode, done.stdout, done.stderr) == (0, "host upstream\nkit\n", "")


def test_the_plug_in_of_mindspeed_rl_leaves_the_root_logger_alone() -> None:
    code = """
logging.basicConfig(level=logging.WARNING, format="host %(message)s", stream=sys.stdout)
before = list(logging.root.handlers)
from minimind_mcore.mindspeed import rl_hook
rl_hook.setup()
rl_hook._log("a change")
assert (logging.root.handlers, logging.root.level) == (before, logging.WARNING)
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "minimind: a change\n")


def test_the_product_is_printed_at_every_level() -> None:
    command = [sys.executable, "-m", "minimind_mcore.cli", "presets", "--list"]
    shown = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"LOG_LEVEL": level}).stdout
        for level in ("info", "error")
    ]
    assert shown[0] == shown[1] and "minimind3_tiny" in shown[0]


COMMANDS = {
    "usage": "-m minimind_mcore.cli --help",
    "presets": "-m minimind_mcore.cli presets --list",
    "presets flags": "-m minimind_mcore.models.presets minimind3",
    "recipes": "-m minimind_mcore.cli recipes --list",
    "help of a setting": "-m minimind_mcore.cli sft --help",
    "help of flags": "-m minimind_mcore.cli preprocess_data.py --help",
    "doctor": "-m minimind_mcore.cli doctor",
    "configuration": "-m minimind_mcore.cli rl show --config-name grpo_minimind_tiny",
    "hosts": "-m minimind_mcore.hosts",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_has_ended_ends_a_command_quietly(command: str, tmp_path: Path) -> None:
    # `head -n 0` ends before anything is written: a short text would else fit into the pipe.
    script = 'set -o pipefail; "$0" "$@" | head -n 0; exit "${PIPESTATUS[0]}"'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"DEVICE": "cpu", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode in (141, 0) and done.stderr == "", done  # 0: argparse ignores that its help is not read


def test_a_locale_without_chinese_does_not_end_a_command() -> None:
    program = "from minimind_mcore import errors; errors.run(lambda: print('\\u7b54\\u6848 42'))"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout == b"\\u7b54\\u6848 42\n", done.stderr
