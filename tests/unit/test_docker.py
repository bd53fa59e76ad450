"""Images and shell scripts: linted, pinned to the matrix, and what can be run of them without a docker engine.

No engine was at hand: no image has been built by these tests. The steps of Dockerfile.cpu are run one by one in a
scratch directory (`-m slow`); of the others the versions, the arguments and the run command are checked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.engine import ROOT

from minimind_mcore.doctor import matrix

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
SHELL = sorted(
    path for path in ROOT.rglob("*.sh") if not path.relative_to(ROOT).parts[0].startswith((".venv", "outputs", "data"))
)
RUN_ASCEND = DOCKER / "run_ascend.sh"


def tool(name: str) -> str:
    """A linter of requirements/test.txt, beside this interpreter."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not installed: pip install -r requirements/test.txt"
    return found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint(file: Path) -> None:
    done = subprocess.run([tool("hadolint"), "--no-color", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck() -> None:
    """Every script of the repository; those that are sourced set variables for others (SC2034)."""
    assert len(SHELL) > 20
    for sourced in (True, False):
        files = [str(p) for p in SHELL if p.read_text(encoding="utf-8").startswith("# Sourced") == sourced]
        command = [tool("shellcheck"), *(["--exclude=SC2034"] if sourced else []), *files]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout


def instructions(file: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions and their arguments, continued lines joined."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def arguments(file: Path) -> dict[str, str]:
    """Its build arguments with their defaults."""
    return {
        name: value
        for name, _, value in (rest.partition("=") for word, rest in instructions(file) if word == "ARG")
        if value
    }


def test_ascend_image_is_pinned_to_the_matrix() -> None:
    found, pins = arguments(DOCKER / "Dockerfile.ascend"), matrix.data()["pins"]
    stack = matrix.newest("npu", "mindspeed-llm")
    assert found["MEGATRON_COMMIT"] == pins["Megatron-LM"]["commit"]
    assert found["MINDSPEED_COMMIT"] == pins["MindSpeed"]["commit"]
    assert found["MINDSPEED_LLM_COMMIT"] == pins["MindSpeed-LLM"]["commit"]
    newer = dict(re.findall(r"--build-arg (\w+_COMMIT)=(\w{40})", (DOCKER / "Dockerfile.ascend").read_text()))
    names = {"MEGATRON_COMMIT": "Megatron-LM core_v0.16.1", "MINDSPEED_COMMIT": "MindSpeed core_r0.16.0"}
    assert newer == {argument: pins[name]["commit"] for argument, name in names.items()}
    assert stack.judge("torch", found["TORCH_VERSION"]) == "ok"
    assert stack.judge("torch_npu", found["TORCH_NPU_VERSION"]) == "ok"
    base = re.fullmatch(r".*/cann:(?P<cann>[\d.]+)-910b-\w+[\d.]+-py(?P<python>[\d.]+)", found["BASE_IMAGE"])
    assert base and stack.judge("CANN", base["cann"]) == stack.judge("Python", base["python"]) == "ok"
    pair = matrix.torch_npu_pair(found["TORCH_NPU_VERSION"])
    assert pair and base["cann"].startswith(pair["CANN"])


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_images_do_not_run_as_root(name: str) -> None:
    """On an NPU the driver decides (see the file). A run may write to data/ and outputs/ as any user."""
    found = instructions(DOCKER / f"Dockerfile.{name}")
    assert [rest for word, rest in found if word == "USER"] == ["1000"]
    assert [word for word, _ in found].index("USER") > max(i for i, (word, _) in enumerate(found) if word == "RUN")
    assert any("chmod 1777 data outputs" in rest for word, rest in found if word == "RUN")


def test_sources_are_pinned_by_commit() -> None:
    """Every repository that an image clones is checked out at a commit; a branch could change between two builds."""
    for file in DOCKERFILES:
        clones = [rest for word, rest in instructions(file) if word == "RUN" and "git clone" in rest]
        for rest in clones:
            assert rest.count("git clone") == rest.count(" checkout "), file.name
        for name in {name for rest in clones for name in re.findall(r'checkout --quiet "\$(\w+)"', rest)}:
            assert name.endswith("_COMMIT"), name
            default = arguments(file).get(name)
            assert default is None or re.fullmatch("[0-9a-f]{40}", default), (name, default)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_take_mirrors_and_no_secrets(file: Path) -> None:
    found = arguments(file)
    assert {"BASE_IMAGE", "PIP_INDEX_URL"} <= set(found)
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"(TOKEN|PASSWORD|SECRET|API_KEY)\w*=", text)
    assert "sslVerify" not in text and "trusted-host" not in text
    for name, value in found.items():  # each is used, or it is no setting
        assert re.search(rf"\$\{{?{name}\b", text), (name, value)


# ------------------------------------------------------------------------------------------------ run_ascend.sh


def run(*argv: str, cwd: Path | str | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    environ = {key: os.environ[key] for key in ("PATH", "HOME")}
    return subprocess.run(
        ["bash", str(RUN_ASCEND), *argv],
        cwd=cwd,
        env=environ | settings,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def options(done: subprocess.CompletedProcess[str], flag: str) -> list[str]:
    words = shlex.split(done.stdout)
    return [words[n + 1] for n, word in enumerate(words) if word == flag]


@pytest.mark.parametrize(
    ("cards", "numbers"), [("1", [0]), ("4", [0, 1, 2, 3]), ("4,5", [4, 5]), ("4,", [4]), ("8", list(range(8)))]
)
def test_run_ascend_passes_the_cards(cards: str, numbers: list[int]) -> None:
    done = run("--dry-run", "python3", "-c", "print('a b')", CARDS=cards, IMAGE="mine:1")
    managers = ["/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"]
    assert options(done, "--device") == [f"/dev/davinci{n}" for n in numbers] + managers
    assert shlex.split(done.stdout)[-4:] == ["mine:1", "python3", "-c", "print('a b')"]


def test_run_ascend_leaves_the_command_to_the_image() -> None:
    """Which begins with the doctor."""
    assert shlex.split(run("--dry-run", CARDS="1", IMAGE="mine:1").stdout)[-1] == "mine:1"
    assert dict(instructions(DOCKER / "Dockerfile.ascend"))["CMD"].startswith(
        '["bash", "-c", "python3 -m minimind_mcore.cli doctor;'
    )


def test_run_ascend_passes_mounts_and_settings(tmp_path: Path) -> None:
    done = run("--dry-run", CARDS="2", DATA="/d a", MODELS="/m", OUTPUTS="/o", SHM="8g", MODEL="minimind3", TP="2")
    volumes = options(done, "--volume")
    kit = "/workspace/minimind-mcore"
    assert {"/d a:/data:ro", "/m:/models:ro", f"/o:{kit}/outputs"} <= set(volumes)
    assert "/usr/local/Ascend/driver:/usr/local/Ascend/driver:ro" in volumes
    assert options(done, "--env") == [f"DATA_DIR={kit}/outputs/data", "MODEL", "TP"]
    assert options(done, "--shm-size") == ["8g"]


def test_run_ascend_makes_paths_absolute(tmp_path: Path) -> None:
    """To docker, `--volume data:/data` is a volume of that name, and empty."""
    (tmp_path / "kit").mkdir()
    paths = {"DATA": "data", "MODELS": "../m", "OUTPUTS": "~/o", "CODE": "kit", "DRIVER": "./driver"}
    volumes = options(run("--dry-run", CARDS="1", cwd=tmp_path, **paths), "--volume")
    expected = {f"{tmp_path}/data:/data:ro", f"{tmp_path}/../m:/models:ro", f"{tmp_path}/kit:/workspace/algorithm"}
    assert expected | {f"{os.environ['HOME']}/o:/workspace/minimind-mcore/outputs"} <= set(volumes)
    assert all(volume.startswith("/") for volume in volumes)


def test_run_ascend_has_outputs_in_the_working_copy_too(tmp_path: Path) -> None:
    """Where the scripts of CODE write by default."""
    done = run("--dry-run", CARDS="1", CODE=str(tmp_path), OUTPUTS="/o")
    kits = ["/workspace/minimind-mcore", "/workspace/algorithm"]
    assert [v for v in options(done, "--volume") if v.startswith("/o:")] == [f"/o:{kit}/outputs" for kit in kits]
    assert options(done, "--workdir") == kits[1:]


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [("CODE", "/nowhere", "error: CODE=/nowhere: there is no such directory"), ("DATA", "/a:b", "error: /a:b: docker")],
)
def test_run_ascend_names_paths_that_it_cannot_mount(name: str, path: str, message: str) -> None:
    done = run("--dry-run", CARDS="1", **{name: path})
    assert done.returncode == 1 and not done.stdout and done.stderr.startswith(message)


# What the heads of the scripts and their `${NAME:-default}` name, and is not passed on: of this host, the image's, or
# no setting.
NOT_PASSED = set(
    "HOME NAME JSON DRY_RUN DATA_KIND PENDING LEADER RL_BACKEND PYTHON PYTHONPATH CANN_HOME NNAL_HOME "
    "ASCEND_TOOLKIT_HOME REHEARSAL".split()
)


# Of the pipeline: downloads are the host's, and the others are what it gives to docker compose.
HOST_ONLY = {"HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "DATA", "OUTPUTS", "MODELS", "MOUNTS", "USER_ID", "GROUP_ID"}


def settings_of_scripts() -> set[str]:
    found: set[str] = set()
    for file in (ROOT / "examples").rglob("*.sh"):
        text = file.read_text(encoding="utf-8")
        head = re.match(r"(#.*\n)+", text)
        assert head
        for words in re.findall(r"^#\s+((?:[A-Z][A-Z0-9_]+(?:\(\S*\))?(?:,? +|$))+)", head[0], re.MULTILINE):
            found.update(re.findall(r"[A-Z][A-Z0-9_]+", re.sub(r"\(.*?\)", "", words)))
        found.update(re.findall(r"\$\{([A-Z][A-Z0-9_]+):[-+]", text))
    spec = importlib.util.spec_from_file_location("record_names", ROOT / "tests/contract/record_names.py")
    assert spec and spec.loader
    recorder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recorder)
    return (found | recorder.read_by_commands(ROOT)) - NOT_PASSED - HOST_ONLY


def test_run_ascend_passes_each_setting_of_the_scripts() -> None:
    names = settings_of_scripts() | {"HCCL_IF_BASE_PORT", "GLOO_SOCKET_IFNAME"}
    assert {"SEED", "LORA_R", "NOOP_LAYERS", "MAX_NEW_TOKENS", "HCCL_EXEC_TIMEOUT", "RAY_FLAGS"} <= names
    done = run("--dry-run", CARDS="1", **dict.fromkeys(names, "x"))
    assert {word.partition("=")[0] for word in options(done, "--env")} == names
    assert "DATA_DIR=x" in options(done, "--env")


def test_run_ascend_mounts_more_paths_at_their_own(tmp_path: Path) -> None:
    done = run("--dry-run", CARDS="1", MOUNTS=f"{tmp_path}/my teacher\n/data/x.jsonl", cwd=tmp_path)
    mounts = options(done, "--volume")
    assert f"{tmp_path}/my teacher:{tmp_path}/my teacher:ro" in mounts and "/data/x.jsonl:/data/x.jsonl:ro" in mounts


def test_run_ascend_mounts_the_hostfile(tmp_path: Path) -> None:
    done = run("--dry-run", CARDS="1", HOSTFILE="my hosts", cwd=tmp_path)
    assert f"{tmp_path}/my hosts:/workspace/hostfile:ro" in options(done, "--volume")
    assert "HOSTFILE=/workspace/hostfile" in options(done, "--env")


def test_run_ascend_starts_docker_with_what_the_dry_run_prints(tmp_path: Path) -> None:
    """With a stand-in for docker, a host of two cards, and a driver."""
    devices, driver, program = tmp_path / "dev", tmp_path / "driver", tmp_path / "docker"
    for folder in (devices, driver):
        folder.mkdir()
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (devices / name).touch()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    host = {"DEVICE_ROOT": str(devices), "DRIVER": str(driver), "DOCKER": str(program)}
    host |= {name: str(tmp_path / name) for name in ("DATA", "MODELS", "OUTPUTS")}
    done = run("bash", "-c", "echo 'a  b'", **host)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[0] == "run" and words[-3:] == ["bash", "-c", "echo 'a  b'"]
    found = [words[n + 1] for n, word in enumerate(words) if word == "--device"]
    assert found[:2] == ["/dev/davinci0", "/dev/davinci1"] and len(found) == 5
    assert (tmp_path / "OUTPUTS").is_dir()
    refused = run(CARDS="0,2", **host)
    assert refused.returncode == 1 and "error: card 2: this host has 0 1" in refused.stderr
    assert "error: HOSTFILE=/nowhere: there is no such file" in run(HOSTFILE="/nowhere", **host).stderr
    assert "must be directories" in run(**host | {"DATA": str(program)}).stderr
    driver.rmdir()
    assert "no driver at" in run(CARDS="1", **host).stderr


@pytest.mark.parametrize("cards", ["many", "-1", "1.5", "0", "08", "4,x", ",4", "4,,5", "4 5"])
def test_run_ascend_refuses_other_cards(cards: str) -> None:
    done = run("--dry-run", CARDS=cards)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(f"error: CARDS={cards}: expected ")


def test_run_ascend_says_where_there_are_no_cards(tmp_path: Path) -> None:
    for cards in ("all", "2"):
        done = run(DEVICE_ROOT=str(tmp_path), CARDS=cards)
        assert done.returncode == 1 and "no Ascend cards" in done.stderr


# ------------------------------------------------------------------------------------------------ compose.yaml


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = content["services"]
    return found


def test_compose_builds_these_images(services: dict[str, Any]) -> None:
    images = {file.suffix[1:] for file in DOCKERFILES}
    assert set(services) == images | {"serve", "serve-vllm-cuda", "serve-vllm-ascend", "manager"}
    assert services["serve"]["build"] == services["manager"]["build"] == services["cpu"]["build"]
    for name, service in services.items():
        if name not in images:
            continue
        file = ROOT / service["build"]["dockerfile"]
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT and file.name == f"Dockerfile.{name}"
        defaults = arguments(file)
        for argument, value in service["build"]["args"].items():
            assert value == f"${{{argument}:-{defaults[argument]}}}"


def test_compose_has_the_mounts_of_run_ascend(services: dict[str, Any]) -> None:
    done = run("--dry-run", CARDS="8")
    assert services["ascend"]["devices"] == options(done, "--device")
    inside = {volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in options(done, "--volume")}
    mounted = {re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume) for volume in services["ascend"]["volumes"]}
    paths = {volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in mounted}
    # what not every host has: run_ascend.sh looks whether it is there, compose cannot
    assert inside - paths == {"/usr/local/sbin/npu-smi", "/etc/hccn.conf"} and paths <= inside


def test_compose_config() -> None:
    """What the docker client makes of the file; needs its compose plugin, no engine."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no docker client with the compose plugin here")
    command = ["docker", "compose", "-f", str(DOCKER / "compose.yaml"), "--profile", "*", "config", "--format", "json"]
    shown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert {"cpu", "cuda", "ascend", "serve"} <= set(shown["services"])


def test_compose_up_serves_and_nothing_else(services: dict[str, Any]) -> None:
    """In the root, where seeds of users run it; every server has a health check and is published on loopback."""
    assert yaml.safe_load((ROOT / "compose.yaml").read_text())["include"] == ["docker/compose.yaml"]
    assert [name for name, service in services.items() if "profiles" not in service] == ["serve"]
    for name, service in services.items():
        if name.startswith("serve"):
            assert service["healthcheck"]["test"][:3] == ["CMD", "python3", "-c"]
            compile(service["healthcheck"]["test"][3], "healthcheck", "exec")
            assert service["ports"] == ["127.0.0.1:${PORT:-8998}:8998"]
            assert service.get("profiles", [name]) == [name]


def test_the_manager_of_compose_is_for_this_host_alone(services: dict[str, Any]) -> None:
    """It uses the host's network, so its own address decides who reaches it."""
    from minimind_mcore.manager.main import parser

    service = services["manager"]
    assert service["command"][:2] == ["minimind-mcore", "manager"]
    args = parser().parse_args(service["command"][2:])
    assert args.host == "127.0.0.1" and args.allow == ["/data", "/models"]
    assert service["network_mode"] == "host" and "ports" not in service
    assert service["init"] is True  # reaps what jobs leave
    mounted = {volume.rpartition(":")[0] if volume.endswith(":ro") else volume for volume in service["volumes"]}
    assert {volume.rpartition(":")[2] for volume in mounted} >= {"/data", "/models"}
    compile(service["healthcheck"]["test"][3], "healthcheck", "exec")


def test_the_command_of_compose_serves(services: dict[str, Any], tmp_path: Path) -> None:
    """Its dry run without a container, with the model that its setting names."""
    from helpers.weights_on_disk import SMALL, state_dict, write_hf

    from minimind_mcore.preprocess import train_tokenizer

    service, model = services["serve"], tmp_path / "model"
    config = SMALL["minimind3"].replace(vocab_size=310)
    train_tokenizer.save(
        train_tokenizer.train(iter(["assistant user system 你好 " * 9]), 310), str(tmp_path / "tokenizer")
    )
    write_hf(model, config, state_dict(config, "hf"))
    shutil.copytree(tmp_path / "tokenizer", model, dirs_exist_ok=True)
    settings = {name: value for name, value in service["environment"].items() if not value.startswith("${")}
    environ = os.environ | settings | {"LOAD_DIR": str(model), "PYTHON": sys.executable, "DEVICE": "cpu"}
    environ.pop("API_KEY", None)
    command = [*service["command"], "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "a dry run: everything is valid, nothing was served" in done.stdout, done.stderr
    assert "0.0.0.0" in done.stdout


def test_the_commands_of_vllm_are_the_presets(services: dict[str, Any]) -> None:
    from minimind_mcore.inference.vllm_engine import head_size_problem
    from minimind_mcore.models.presets import PRESETS
    from minimind_mcore.serve.vllm import STRUCTURED_OUTPUTS

    for name in ("serve-vllm-cuda", "serve-vllm-ascend"):
        words = services[name]["command"]
        assert {"--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=qwen3"} <= set(words)
        values = dict(word.split("=", 1) for word in words if "=" in word)
        assert json.loads(values["--default-chat-template-kwargs"]) == {"enable_thinking": False}
        assert json.loads(values["--structured-outputs-config"]) == STRUCTURED_OUTPUTS
    assert services["serve-vllm-ascend"]["command"][0] == "--model=${LOAD_DIR:-/models/minimind-3-128}"
    assert head_size_problem(PRESETS["minimind3"], "npu")


# ------------------------------------------------------------------------------------------------ the CPU image


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_steps_of_the_cpu_image(tmp_path: Path) -> None:
    """Its COPY and RUN instructions, in a scratch directory in place of the image, and what it then starts."""
    kit, environ = tmp_path / "kit", {**os.environ, **arguments(DOCKER / "Dockerfile.cpu"), "PYTHON": sys.executable}
    for name in ("PIP_INDEX_URL", "TORCH_INDEX_URL", "PYTHONPATH"):
        environ.pop(name, None)  # this machine's own
    kit.mkdir()
    ignored = (DOCKER.parent / ".dockerignore").read_text().split()
    for word, rest in instructions(DOCKER / "Dockerfile.cpu"):
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    place = kit / target
                    shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignored))
                else:
                    place = kit / target / source if target.endswith("/") else kit / target
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
        elif word == "RUN" and "useradd" not in rest:  # not on the machine that runs the tests
            # --index-url of the image's arguments would leave this machine's mirror
            command = re.sub(r'\b(PIP|TORCH)_INDEX_URL="\$\w+"', "", rest)
            subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=kit, env=environ, check=True, timeout=1500)
    environ["PATH"] = f"{kit}/.venv/bin:{environ['PATH']}"
    done = subprocess.run(
        ["minimind-mcore", "doctor"], cwd=kit, env=environ | {"DEVICE": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "A job would run here." in done.stdout, done.stdout
