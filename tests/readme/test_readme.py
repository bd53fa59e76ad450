"""Every command of the README and of the guides that follow it runs.

Training commands run as dry runs here, so that one test covers all sizes; the first command runs
for real, shortened, and in full under `-m slow`. Commands for other hardware or hosts are dry runs
that only print. `tests/run.sh` is what runs these tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from helpers.pages import commands

ROOT = Path(__file__).resolve().parents[2]
TRAINS = re.compile(r"(pretrain|tune|dpo)_minimind_\w*ptd\.sh|grpo_minimind_single\.sh")
# In this order: a command uses what earlier ones made. Other pages have tests of their own.
PAGES = ("start", "pretrain", "posttrain", "convert", "generate", "rl_config", "ascend", "docker")
ELSEWHERE = re.compile(r"my\.yaml|MINDSPEED_RL_HOME=|export-verl|rlaif")  # needs files that only a user has
FIRST = "bash examples/mcore/minimind/pretrain_minimind_ptd.sh"


def run(command: str, checkout: Path, timeout: float = 240) -> str:
    """Run a command as a user would, in the checkout; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "PYTHONPATH", "DATA_DIR")}
    if (checkout / ".venv").is_symlink():
        environment["PYTHON"] = str(checkout / ".venv/bin/python")  # no installation into somebody's environment
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env={**environment, "DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with this environment as its .venv, after the first command, shortened."""
    copy = tmp_path_factory.mktemp("readme") / "my kit"  # white space in paths must not matter
    left_behind = shutil.ignore_patterns(
        ".git", ".venv", "data", "outputs", "build", "*.egg-info", "__pycache__", ".*_cache"
    )

    def ignored(folder: str, names: list[str]) -> set[str]:
        return left_behind(folder, names) - (set() if Path(folder) == ROOT else {"data"})  # examples/data is a source

    shutil.copytree(ROOT, copy, ignore=ignored)
    if not (ROOT / ".venv").is_dir():
        pytest.skip("the READMEs' commands use .venv, which tests/run.sh makes")
    (copy / ".venv").symlink_to(ROOT / ".venv")
    out = run(f"{FIRST} --train-iters 3 --eval-iters 1", copy)
    assert "finished at iteration 3 of 3" in out
    return copy


def test_the_readme_begins_with_two_commands() -> None:
    assert commands("README.md") == [FIRST, "bash examples/quickstart.sh"]


def test_first_command_leaves_what_the_readme_lists(checkout: Path) -> None:
    out = checkout / "outputs" / "minimind3_tiny"
    for name in ("loss.png", "report.html", "metrics.jsonl", "logs/train.log"):
        assert (out / name).stat().st_size > 0, name
    assert list((out / "logs" / "tensorboard").glob("events.*"))
    assert (out / "checkpoints" / "iter_0000003" / "mp_rank_01" / "model_optim_rng.pt").is_file()
    assert (out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"


def assert_serves(command: str, checkout: Path) -> None:
    """The command starts a server, which answers and ends with status 0 at a signal."""
    environment = os.environ | {"PYTHON": str(checkout / ".venv/bin/python"), "DEVICE": "cpu"}
    process = subprocess.Popen(
        ["bash", "-c", f"exec env {command}"], cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    printed = []
    for line in process.stderr:
        printed.append(line)
        if line.startswith("serving"):
            break
    assert printed[-1].startswith("serving"), "".join(printed)
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}).encode()
    address = printed[-1].split()[1] + "/chat/completions"
    asked = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        assert json.load(reply)["choices"][0]["message"]["role"] == "assistant"
    process.terminate()
    process.stderr.read()
    assert process.wait(60) == 0


def of_the_guides() -> list[str]:
    """The commands of the pages, each once."""
    found = dict.fromkeys(command for page in PAGES for command in commands(f"docs/{page}.md"))
    return [command for command in found if command != FIRST and not ELSEWHERE.search(command)]


@pytest.mark.parametrize("command", of_the_guides())
def test_command_runs(command: str, checkout: Path) -> None:
    if "mindspeed-llm" in command:  # a host without it: the command says where it looked
        home = checkout.parent / "MindSpeed-LLM"
        home.mkdir(exist_ok=True)
        (home / "pretrain_gpt.py").touch()
        command = command.replace("MINDSPEED_LLM_HOME=/workspace/MindSpeed-LLM", f"MINDSPEED_LLM_HOME={home}")
    if "NNODES=2" in command:  # the first command's checkpoint is of 3 iterations, whose schedule is another one
        command = f"OUTPUT_DIR='{checkout.parent / 'two hosts'}' {command}"
    if "serve_minimind" in command:
        assert_serves(command.replace("bash examples", "PORT=0 bash examples"), checkout)
    elif "quickstart" in command:  # every stage, shortened; test_quickstart.py has it in full
        short = "QUICKSTART_PRETRAIN_ITERS=60 QUICKSTART_SFT_ITERS=60 LEAST=0"
        assert "unseen sums" in run(f"{short} {command}", checkout)
    elif TRAINS.search(command):
        out = run(command.removesuffix(" --dry-run") + " --dry-run", checkout)
        assert re.search(r"(pre|post)train_gpt\.py|train_grpo\.py", out)
        assert "mindspeed-llm" in command or "everything is valid" in out
    else:
        assert run(command, checkout).strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_first_command_on_an_empty_machine(tmp_path: Path) -> None:
    """Installation included, in full: done in minutes, and the loss falls."""
    clone = tmp_path / "kit"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    start = time.monotonic()
    out = run(FIRST, clone, timeout=1500)
    print(f"{time.monotonic() - start:.0f} s")
    losses = [float(x) for x in re.findall(r"\| lm loss: (\S+)", out)]
    assert losses[0] > 7 and losses[-1] < 5
