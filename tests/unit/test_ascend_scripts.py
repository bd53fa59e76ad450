"""What the scripts do on an Ascend host, run here: CANN is faked with files, torch_npu is the stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT, Corpus

SCRIPTS = ROOT / "examples/mcore/minimind"
STAND_IN = ROOT / "rehearsal/minimind_mcore_rehearsal/python"
# As CANN's own: unset variables, commands that fail, a look at the arguments, a status that says nothing.
SET_ENV = """\
export LD_LIBRARY_PATH=/{name}/lib64:$LD_LIBRARY_PATH
grep -q nothing /dev/null
false | true
for argument in "$@"; do [ -z "$argument" ] || export {name}_GOT=$argument; done
export {name}_SEEN=1
return 3
"""
# Sourced before ascend.sh: of common.sh, what it uses.
BEFORE = 'set -euo pipefail; fail() { echo "error: $*" >&2; exit 1; }; set -- --an-argument; '
# The function stands for bash's own `[`.
ON_ASCEND = '[() { case "$*" in "-e /dev/davinci_manager ]") return 0 ;; esac; builtin [ "$@"; }\n'


def clean(**settings: str) -> dict[str, str]:
    """This environment without what an Ascend host has in its own."""
    ours = ("HCCL", "GLOO", "MASTER", "CANN", "NNAL", "ASCEND", "NNODES", "NODE_RANK", "HOSTFILE", "DEVICE", "REHEARSE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith((*ours, "LD_LIBRARY_PATH"))}
    return kept | {"OMP_NUM_THREADS": "1"} | settings


@pytest.fixture
def cann(tmp_path: Path) -> Path:
    """The folder of a toolkit, with nnal beside it."""
    for name, folder in (("cann", tmp_path / "Ascend/cann"), ("nnal", tmp_path / "Ascend/nnal/atb")):
        folder.mkdir(parents=True)
        (folder / "set_env.sh").write_text(SET_ENV.format(name=name))
    return tmp_path / "Ascend/cann"


def source(after: str = "printenv", **settings: str) -> subprocess.CompletedProcess[str]:
    """Source ascend.sh alone, and do something after it."""
    command = ["bash", "-c", f"{BEFORE} source '{SCRIPTS}/ascend.sh'; {after}"]
    return subprocess.run(command, env=clean(**settings), capture_output=True, text=True)


def test_both_set_env_scripts_are_sourced_whatever_their_commands_return(cann: Path) -> None:
    done = source(CANN_HOME=str(cann))
    assert done.returncode == 0, done.stderr
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    found = {name: value for name, _, value in pairs}
    assert found["cann_SEEN"] == found["nnal_SEEN"] == "1" and "cann_GOT" not in found
    assert found["LD_LIBRARY_PATH"].startswith("/nnal/lib64:/cann/lib64:")
    assert found["HCCL_CONNECT_TIMEOUT"] == found["HCCL_EXEC_TIMEOUT"] == "1800"
    assert (found["TASK_QUEUE_ENABLE"], found["CPU_AFFINITY_CONF"]) == ("2", "2")
    assert found["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    given = source("echo $HCCL_CONNECT_TIMEOUT", CANN_HOME=str(cann), HCCL_CONNECT_TIMEOUT="60")
    assert given.stdout == "60\n"


@pytest.mark.parametrize("after", ["echo $unset", "false; echo on", "false | true; echo on"])
def test_errors_end_the_script_again_after_them(after: str, cann: Path) -> None:
    done = source(after, CANN_HOME=str(cann))
    assert done.returncode == 1 and not done.stdout


def test_cann_is_found_where_the_environment_or_the_installer_has_it(cann: Path, tmp_path: Path) -> None:
    if Path("/usr/local/Ascend").exists():
        pytest.skip("this host has a CANN of its own")
    (cann / "latest").mkdir()
    for settings in (
        {"HOME": str(tmp_path)},
        {"ASCEND_TOOLKIT_HOME": str(cann)},
        {"ASCEND_TOOLKIT_HOME": f"{cann}/latest"},
    ):
        done = source("echo $CANN_HOME $cann_SEEN $nnal_SEEN", **settings)
        assert done.stdout.split() == [str(cann), "1", "1"], (settings, done.stderr)
    (cann / "set_env.sh").unlink()
    missing = source(HOME=str(tmp_path))
    assert missing.returncode == 1 and "error: found no /usr/local/Ascend/cann/set_env.sh" in missing.stderr


def test_a_toolkit_without_nnal_will_do(cann: Path) -> None:
    (cann.parent / "nnal/atb/set_env.sh").unlink()
    done = source("echo ${nnal_SEEN:-none}", CANN_HOME=str(cann))
    assert done.stdout == "none\n", done.stderr


@pytest.mark.parametrize("name", ["CANN_HOME", "NNAL_HOME"])
def test_a_home_that_is_none_is_named(name: str, cann: Path) -> None:
    settings = {"CANN_HOME": str(cann)} | {name: "/opt/there is none"}
    done = source(**settings)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: found no /opt/there is none/set_env.sh: set {name} to the folder that has it" in done.stderr


# ------------------------------------------------------------------------------------------------ a whole script


@pytest.fixture
def ascend(cann: Path, tmp_path: Path, corpus: Corpus) -> dict[str, str]:
    """The environment of a host with eight NPUs, with data and a MindSpeed-LLM that is only named."""
    (tmp_path / "ascend_host.sh").write_text(ON_ASCEND)
    llm = tmp_path / "MindSpeed-LLM"
    llm.mkdir()
    for program in ("pretrain_gpt.py", "posttrain_gpt.py"):
        (llm / program).touch()
    return clean(
        BASH_ENV=str(tmp_path / "ascend_host.sh"), CANN_HOME=str(cann), MINDSPEED_LLM_HOME=str(llm),
        PYTHON=sys.executable, PYTHONPATH=os.pathsep.join(map(str, (STAND_IN, ROOT))), DATA_PATH=str(corpus.prefix),
        TRAIN_ITERS="10", TOKENIZER_PATH=str(corpus.tokenizer), MODEL="minimind3", OUTPUT_DIR=str(tmp_path / "out"),
    )  # fmt: skip


def script(environ: dict[str, str], *arguments: str, name: str = "pretrain") -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / f"{name}_minimind_ptd.sh"), *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)


def test_on_an_ascend_host_mindspeed_llm_runs_on_all_cards(ascend: dict[str, str]) -> None:
    done = script(ascend, "--dry-run")
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("cd ")]
    assert line.startswith(f"cd {ascend['MINDSPEED_LLM_HOME']} && ")
    assert " -m minimind_mcore.mindspeed.program pretrain_gpt.py --spec " in line  # its failures are failures
    assert "--nproc-per-node 8 --nnodes 1 --node-rank 0 --master-addr 127.0.0.1" in line and " --bf16" in line


@pytest.mark.parametrize("backend", ["mindspeed-llm", "native"])
def test_a_checkpoint_that_is_given_must_be_there(backend: str, ascend: dict[str, str], tmp_path: Path) -> None:
    if backend == "native":  # without an NPU, where MindSpeed would be needed
        ascend |= {"DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    (tmp_path / "empty").mkdir()
    done = script(ascend | {"BACKEND": backend, "CKPT_LOAD_DIR": str(tmp_path / "empty")}, "--dry-run")
    assert done.returncode == 1 and f"{tmp_path}/empty: found no checkpoint there" in done.stderr, done.stderr


def test_a_hostfile_gives_the_flags_of_torchrun_and_the_network(ascend: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("198.51.100.77 slots=8\nnode-2 slots=8\n")
    hosts = {"HOSTFILE": str(tmp_path / "hosts"), "NODE_RANK": "1", "HCCL_SOCKET_IFNAME": "=lo"}
    done = script(ascend | hosts, "--dry-run")
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr 198.51.100.77 --master-port 29500" in done.stdout
    assert "network: HCCL_SOCKET_IFNAME==lo GLOO_SOCKET_IFNAME=lo" in done.stderr
    python = "from minimind_mcore.cli import launcher; launcher.read_settings([]); import os; "
    python += "print(os.environ['HCCL_SOCKET_IFNAME'])"
    shown = 'source "$0/common.sh"; exec "$PYTHON" -c "$1; print(os.environ[\'GLOO_SOCKET_IFNAME\'])"'
    told = subprocess.run(
        ["bash", "-c", shown, str(SCRIPTS), python], env=ascend | hosts, capture_output=True, text=True
    )
    assert told.stdout.splitlines() == ["=lo", "lo"], told.stderr
    refused = script(ascend | hosts | {"HCCL_SOCKET_IFNAME": "roce9"})  # no dry run: it stops before anything is made
    assert refused.returncode == 1 and "error: HCCL_SOCKET_IFNAME=roce9 matches no interface" in refused.stderr


def test_cann_is_looked_for_before_anything_else(ascend: dict[str, str]) -> None:
    done = script(ascend | {"CANN_HOME": "/nowhere"}, "--dry-run")
    assert done.returncode == 1 and done.stderr.startswith("error: found no /nowhere/set_env.sh")
