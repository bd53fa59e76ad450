"""Every command on a page is run, or dry-run where it needs other hardware, or has a reason why it is only read.

`RULES` says what is done with each command. The first rule that matches decides, so a new command of a page needs a
rule. Under `-m slow` the commands run in the order of the pages, in a copy of the checkout: what one page makes, a
later page uses. The chapters need the quickstart's model. It is copied if the checkout has it, else it is trained.

    python -m pytest tests/readme/test_every_command.py -m slow -k "learn_"    # the pages of a part
    PYTHONPATH=tests python tests/readme/test_every_command.py                 # list every command and its rule
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.engine import ROOT
from helpers.pages import all_commands, english_pages

FIRST = "bash examples/mcore/minimind/pretrain_minimind_ptd.sh"
SHORT = "--train-iters 2 --eval-iters 1"
# What is done with a command. The reason of `read` follows it.
RUN = "run"  # as it is on the page
QUIET = "run, without output"  # it writes a file
FEW = "run with two iterations"
DRY = "dry run"
SERVE = "start, ask and stop the server"
HELP = "print the help of"
READ = "only read"


@dataclass(frozen=True)
class Rule:
    """What is done with the commands that match a pattern.

    Attributes:
        pages: a pattern of names of pages.
        command: a pattern that is searched in the command.
        how: one of the words above.
        reason: why it is not run as it is, or the test that runs it.
    """

    pages: str
    command: str
    how: str
    reason: str = ""


DAYS = "64M parameters take days of a CPU"
FILES = "needs data or weights that are downloaded"
RULES = [
    # Run in full by other tests.
    Rule("extending", "", READ, "tests/readme/test_extending.py runs it"),
    Rule("ascend", "^(export MINDSPEED|REHEARSE)", READ, "tests/device runs rehearsals, tests/mindspeed the real ones"),
    Rule("contribute", r"tests/run\.sh", READ, "runs the tests themselves"),
    Rule("contribute", r"docs/build\.sh", READ, "tests/unit/test_site.py runs it"),
    Rule("contribute", r"release\.sh", READ, "tests/unit/test_release.py runs it"),
    Rule("contribute", r"helpers\.pages", READ, "needs the history of git; tests/unit/test_pages.py runs it"),
    Rule("manager", "^(minimind-mcore manager|curl)", READ, "tests/unit/test_manager*.py starts and asks it"),
    Rule("rl", "my_module", READ, "tests/readme/test_extending.py runs one"),
    Rule("rl|rl_cluster", "NNODES|MASTER_ADDR", READ, "needs two hosts; tests/faults/test_rl_hosts.py has two"),
    Rule("rl_config", "MINDSPEED_RL_HOME", READ, "needs MindSpeed-RL; tests/unit/test_rl_mindspeed.py runs it"),
    Rule("tools", r"quickstart_tools\.sh", READ, "tests/readme/test_quickstart.py runs it"),
    Rule("tools", "BACKEND=api", READ, "needs a server; tests/unit/test_toolcall.py has one"),
    Rule("vllm", r"requirements/vllm\.sh|ENGINE=vllm|--engine vllm", READ, "installs 4 GB; tests/real_vllm runs it"),
    Rule("contribute", r"-m helpers\.reference$|test_flag_page\.py$", QUIET),
    # Need another machine, and have no dry run.
    Rule(".*", "^docker ", READ, "needs docker; tests/unit/test_docker.py reads the files"),
    Rule("install_ascend|fusionone", "^minimind-mcore doctor", RUN),
    Rule("install_ascend", r"^\./|npu-smi|^source|^cp ", READ, "needs an Ascend server"),
    Rule("install_ascend", r"^(apt|pip|python|git|cd|bash scripts/|export)", READ, "installs Ascend's programs"),
    Rule("fusionone", "^(cd|export)", READ, "prepares the next command, in the platform's container"),
    Rule("benchmarks", r"gpu_(check|wheels)\.sh", READ, "needs a GPU; tests/unit/test_gpu_check.py runs its parts"),
    Rule("benchmarks", r"gpu_check\.presets", READ, "writes the bounds of the GPU check again"),
    # Need the network.
    Rule("manager|run", "pip install", READ, "installs packages from a registry"),
    Rule("run|rl_config", r"download (data|weights)", READ, FILES),
    Rule("rl_config", r"rlaif|my\.yaml|my_math", READ, "needs a reward model or a file of the reader"),
    Rule("generate", "TASK=\"ceval", READ, FILES + "; tests/unit/test_inference_evaluate.py has small ones"),
    # Servers and chats.
    Rule(".*", r"serve_minimind\.sh", SERVE),
    # Take minutes to hours.
    Rule(".*", r"benchmarks/\w+\.py", HELP, "takes minutes to hours"),
    Rule("run", "--sample all serve", DRY, "takes an hour; tests/readme/test_pipeline_interrupted.py runs most stages"),
    Rule("run", r"run_all\.sh zero", DRY, DAYS),
    Rule(".*", r"^bash \S+/grpo_minimind_single\.sh$", FEW, "tests/readme/test_rl_learns.py runs it in full"),
    Rule("rl", r"train_grpo\.py", FEW, "100 iterations take 4 minutes"),
    Rule("rl|rewards|rl_config", r"grpo_minimind_single\.sh", DRY, DAYS),
    Rule("ascend", "mindspeed-llm", DRY, "needs an NPU"),
    Rule("install_ascend", r"^bash docker/run_ascend\.sh", READ, "counts cards; tests/unit/test_docker.py has some"),
    Rule("fusionone|install_ascend", r"run_ascend\.sh", DRY, "needs an NPU"),
    Rule("fusionone", "training_task", READ, "needs the platform's folders; tests/unit/test_fusionone.py has them"),
    Rule(".*", r"MODEL=minimind3(_moe)? ", DRY, DAYS),
    Rule("fusionone", r"pretrain_minimind_ptd\.sh", DRY, DAYS),
    Rule("pretrain", "NNODES=2", DRY, "needs two hosts; tests/parallel has two"),
    Rule("README|start", r"quickstart\.sh", READ, "tests/readme/test_quickstart.py runs it in full"),
    Rule("rl_config", "export-verl grpo_minimind3 ", READ, "needs its weights; tests/unit/test_rl_verl.py exports it"),
    # The chapters' commands are run as they are, the guides' trainings with two iterations.
    Rule("learn_.*", "", RUN),
    Rule(".*", r"(pretrain|tune|dpo)_minimind_\w*ptd\.sh", FEW, "takes minutes"),
    Rule(".*", r"\.venv/bin|bash examples|docker/run_ascend\.sh", RUN),
]  # fmt: skip


def rule(page: str, command: str) -> Rule:
    """The rule of a command."""
    for one in RULES:
        if re.fullmatch(one.pages, page) and re.search(one.command, command):
            return one
    return Rule(page, command, "no rule")


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
# In this order, then the other pages: a command uses what earlier ones made.
ORDER = ("README", "start", "pretrain", "posttrain", "convert", "generate")
NAMES = sorted((page.stem for page in english_pages()), key=lambda name: (*ORDER, name).index(name))
EVERY = [(name, command) for name in NAMES for command in all_commands(name)]


def test_every_command_has_a_rule_and_every_rule_a_command() -> None:
    used = [rule(page, command) for page, command in EVERY]
    assert [(one.pages, one.command) for one in used if one not in RULES] == []
    assert [one for one in RULES if one not in used] == []
    assert all(one.reason for one in RULES if one.how in (READ, DRY, HELP))
    named = {name for one in RULES for name in re.findall(r"tests/[\w/]+(?:\.py)?(?![\w*])", one.reason)}
    assert len(named) > 10 and all((ROOT / name).exists() for name in named)


def test_commands_are_shell() -> None:
    """Also those that are only read."""
    for page, command in EVERY:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page}: {command}\n{done.stderr}"


# Below: the commands themselves.


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    """A copy of the sources after the first command, with an environment whose kit is the copy."""
    copy = tmp_path_factory.mktemp("pages") / "kit"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy / ".venv"], check=True)
    # Paths in a .pth file are searched in this order. Those of the environment of the tests come second.
    [packages] = (copy / ".venv/lib").glob("python*/site-packages")
    (packages / "kit.pth").write_text("\n".join([str(copy), *(p for p in sys.path if "site-packages" in p)]))
    program = copy / ".venv/bin/minimind-mcore"
    lines = [f"#!{copy}/.venv/bin/python", "import sys", "from minimind_mcore.cli import main"]
    lines += ["if __name__ == '__main__':  # multiprocessing imports the script again", "    sys.exit(main())", ""]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    assert f"{copy}/minimind_mcore" in run("python -c 'import minimind_mcore; print(minimind_mcore.__file__)'", copy)
    run(f"{FIRST} {SHORT}", copy)
    prepare(copy, Path(tokenizer))
    return copy


def prepare(copy: Path, tokenizer: Path) -> None:
    """Put small files where the pages have large ones or the reader's: hf/minimind-3, /data, /models and others."""
    convert = "bash examples/mcore/minimind/ckpt_convert_minimind_mcore2hf.sh"
    run(f"LOAD_DIR=outputs/minimind3_tiny/checkpoints SAVE_DIR=hf/minimind-3 {convert}", copy)
    answered = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    called = [
        {"from": "system", "value": f"<tools>{json.dumps([TOOL])}</tools>"},
        {"from": "human", "value": "What is 1 + 2?"},
        {"from": "gpt", "value": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'},
    ]
    texts = {
        "alpaca.jsonl": json.dumps({"instruction": "add", "input": "1 and 2", "output": "3"}) + "\n",
        "mount/data/sft_t2t_mini.jsonl": json.dumps({"conversations": answered}) + "\n",
    }
    links = {"dataset/tokenizer": "hf/minimind-3"}
    for place in ("data", "models", "shared"):
        links |= {f"mount/{place}/minimind-3": "hf/minimind-3", f"mount/{place}/hf": "hf"}
        links |= {
            f"mount/{place}/pretrain_t2t_mini.jsonl": "data/sample.jsonl",
            f"mount/{place}/mindspeed": "outputs/minimind3_tiny",
        }
    for name, target in links.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).symlink_to(copy / target)
    for name, text in texts.items():
        (copy / name).write_text(text * 50)
    (copy / "func-calling.json").write_text(json.dumps([{"conversations": called, "tools": json.dumps([TOOL])}] * 50))
    [brief] = re.findall(r"```python\n(def brief.*?)```", (ROOT / "docs/rewards.md").read_text(encoding="utf-8"), re.S)
    (copy / "my_module.py").write_text(brief)


@pytest.fixture(scope="module")
def quickstart(checkout: Path) -> Path:
    """The copy with the quickstart's data and model."""
    if (ROOT / "outputs/quickstart/full_sft/checkpoints/iter_0001000").is_dir():
        for name in ("data/quickstart", "outputs/quickstart"):
            shutil.copytree(ROOT / name, checkout / name)
    else:
        run("bash examples/quickstart.sh", checkout, timeout=5000)
    return checkout


def environment(checkout: Path) -> dict[str, str]:
    """Of a reader whose .venv is the checkout's."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DATA_DIR")}
    path = f"{checkout}/.venv/bin{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PYTHON": f"{checkout}/.venv/bin/python", "DEVICE": "cpu", "PATH": path}


def run(command: str, checkout: Path, stdin: str = "", timeout: float = 600) -> str:
    """Run a command in the checkout; return what it printed."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=checkout, env=environment(checkout), input=stdin, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@contextlib.contextmanager
def serving(command: str, checkout: Path) -> Iterator[str]:
    """Start a server; give its address; end it with a signal."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec env {command}"],
        cwd=checkout,
        env=environment(checkout),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        printed: list[str] = []
        for line in process.stderr:
            printed.append(line)
            if line.startswith("serving"):
                break
        assert printed[-1].startswith("serving"), "".join(printed)
        yield printed[-1].split()[1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def asked(address: str, key: str) -> str:
    """The role of a server's answer."""
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    address = address.replace("0.0.0.0", "127.0.0.1")
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}/chat/completions", body, headers), timeout=60
    ) as reply:
        return str(json.load(reply)["choices"][0]["message"]["role"])


def adapted(page: str, command: str, checkout: Path) -> str:
    """The command with this machine's small files in place of those that the page names."""
    if page == "fusionone" and "pretrain_minimind_ptd" in command:
        [settings] = [one for one in all_commands(page) if one.startswith("export ")]
        command = f"{settings} && {command}"
    if page == "pretrain" and "NNODES=2" in command:
        # The checkpoint of the first command has the learning-rate schedule of two iterations.
        command = f"OUTPUT_DIR=outputs/two_hosts {command}"
    if "/workspace/MindSpeed-LLM" in command:  # the dry run reads its sources
        if not (home := os.environ.get("MINDSPEED_LLM_HOME")):
            pytest.skip("needs MindSpeed-LLM: set MINDSPEED_LLM_HOME")
        command = command.replace("/workspace/MindSpeed-LLM", home)
    if "CONFIG=grpo_minimind3 " in command and rule(page, command).how == DRY:
        command = f"{command} --data-pending"  # its weights and tokenizer are not here
    if "CKPT_LOAD_DIR=" in command:  # hf/minimind-3 is a tiny model here
        command = command.replace("MODEL=minimind3 ", "MODEL=minimind3_tiny ")
    command = re.sub(r"(?<=[ =])/(data|models|shared)/", rf"{checkout}/mount/\1/", command)
    if "ascend" in page and re.search(r"(pretrain|tune)_minimind\S*\.sh", command) and "OUTPUT_DIR=" not in command:
        # Checkpoints of earlier pages have another layout and schedule.
        command = f"OUTPUT_DIR=outputs/{page} {command}"
    return re.sub("outputs/minimind3/(grpo/)?", "outputs/minimind3_tiny/", command)


IDS = [f"{page}-{rule(page, command).how}-{number}" for number, (page, command) in enumerate(EVERY)]


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize(("page", "command"), EVERY, ids=IDS)
def test_command(page: str, command: str, checkout: Path, request: pytest.FixtureRequest) -> None:
    one = rule(page, command)
    if one.how == READ:
        pytest.skip(one.reason)
    if re.search("quickstart|grpo_minimind_single", command) or page.startswith("learn_"):
        request.getfixturevalue("quickstart")
    began = time.monotonic()
    text = adapted(page, command, checkout)
    if one.how == SERVE:
        key = "".join(re.findall(r"API_KEY=(\w+)", text))
        port = "" if "PORT=" in text else "PORT=0 "
        with serving(port + text, checkout) as address:
            assert asked(address, key) == "assistant"
    elif one.how == HELP:
        assert "usage:" in run(f"{text} --help", checkout)
    elif one.how == DRY:
        assert run(text if "--dry-run" in text else with_flag(text, "--dry-run"), checkout).strip()
    elif one.how == FEW:
        # The sample GRPO run fine-tunes the quickstart's model for 700 iterations first.
        assert run(few(text), checkout, timeout=3000).strip()
    else:
        assert bool(run(text, checkout, stdin="17+25=?\n/quit\n").strip()) == (one.how == RUN)
    print(f"{time.monotonic() - began:.0f} s")


def layouts() -> dict[str, tuple[str, str]]:
    """The experiments of the chapter on parallelism: the command of each, and the layout that its log must name."""
    text = (ROOT / "docs/learn_parallel.md").read_text(encoding="utf-8")
    [base] = [command for command in all_commands("learn_parallel") if "CKPT_LOAD_DIR=" in command]
    found = {}
    for name, settings, layout in re.findall(r"^\| (.+?) \| `(\w+=.*?)` \| `(TP=.*?)` \|$", text, re.M):
        command = base.replace("PP=2 TP=1", settings).replace("layouts/PP", f"layouts/{name.split()[0].strip(',')}")
        if "without" in name:
            command = re.sub(r"CKPT_LOAD_DIR=\S+ | --reshard| --finetune", "", command)
        found[name] = (command, layout)
    return found


def test_the_chapter_on_parallelism_has_an_experiment_for_each_layout() -> None:
    text = " ".join(layouts())
    assert re.findall(r"\b[A-Z]P\b|VPP", text) == ["PP", "VPP", "TP", "SP", "DP", "EP"]
    assert len({command for command, _ in layouts().values()}) == len(layouts()) == 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_layouts_of_the_chapter_on_parallelism(checkout: Path, quickstart: object) -> None:
    """The log names the layout of the table, and the runs of one model have the same losses."""
    losses = {}
    for name, (command, layout) in layouts().items():
        printed = run(command, checkout)
        assert re.search(rf"^layout: +{layout} on 2 processes$", printed, re.M), printed
        losses[name] = [float(loss) for loss in re.findall(r"\| lm loss: (\S+) \|", printed)]
        assert len(losses[name]) == 2  # of iterations 10 and 20
    first, *others = [found for name, found in losses.items() if not name.startswith("EP")]
    assert len(others) == 3 and all(found == pytest.approx(first, rel=1e-4) for found in others)


def with_flag(command: str, flag: str) -> str:
    """The flag stands behind the kit's own program."""
    return re.sub(r"(run_ascend\.sh)", rf"\1 {flag}", command) if "run_ascend.sh" in command else f"{command} {flag}"


def few(command: str) -> str:
    """A training of two iterations."""
    if "grpo" in command:
        return f"{command} megatron_training.train_iters=2"
    return f"{command} {SHORT}"


if __name__ == "__main__":
    for page, command in EVERY:
        found = rule(page, command)
        print(f"{page}: {found.how}{f' ({found.reason})' if found.reason else ''}: {command}")
