"""Real vLLM on a CPU, from an environment of its own: `bash requirements/vllm.sh` makes .venv-vllm.

    VLLM_PYTHON=.venv-vllm/bin/python python -m pytest tests/real_vllm -m slow

transformers is the reference. Where vLLM takes another token, the logits of both must be a tie of at most TIE.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai  # pyright: ignore[reportMissingImports]
import pytest
import torch
import yaml
from helpers import openai_suite, serving
from helpers.engine import ROOT
from helpers.inference_models import twin
from helpers.serving import vocabulary, wait_until_ready, write_served
from helpers.vllm_models import NAMES, PADDED, shrunk
from helpers.weights_on_disk import state_dict, write_hf

from minimind_mcore import hosts
from minimind_mcore.converters.main import main_v2
from minimind_mcore.serve import protocol

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON is not set: the interpreter of requirements/vllm.sh"),
]
KEY = {"API_KEY": "secret"}
TIE = 1e-3  # of two logits, in fp32
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": 1.0}  # fmt: skip
SCRIPT = """
import json, sys, vllm
given = json.load(sys.stdin)
engine = vllm.LLM(model=given["model"], dtype="float32", max_model_len=given["length"], enforce_eager=True,
                  skip_tokenizer_init=True, max_num_seqs=8)
how = vllm.SamplingParams(max_tokens=given["tokens"], temperature=0, ignore_eos=True, detokenize=False)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in given["prompts"]], how)
print("FOUND", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def write(folder: Path, name: str, **changes: Any) -> Path:
    """A directory as a conversion writes it."""
    config = shrunk(name)
    write_hf(folder / "raw", config, state_dict(config, "hf"), **changes)
    main_v2(["--save-model-type", "hf", "--load-dir", str(folder / "raw"), "--save-dir", str(folder / "model")])
    return folder / "model"


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 160, (length,), generator=generator).tolist() for length in lengths]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "DEVICE": "cpu"}


def of_vllm(folder: Path, given: Sequence[Sequence[int]], tokens: int, length: int = 1024) -> list[list[int]]:
    """The tokens that vLLM adds to prompts."""
    asked = {"model": str(folder), "prompts": given, "tokens": tokens, "length": length}
    done = subprocess.run([PYTHON, "-c", SCRIPT], input=json.dumps(asked), capture_output=True, text=True,
                          env=environment(), timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found: list[list[int]] = json.loads(line.removeprefix("FOUND "))
    return found


@torch.no_grad()
def require_greedy(folder: Path, given: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> None:
    """Every token is transformers' own choice for what precedes it, or ties with that choice."""
    model = twin(folder)
    for prompt, added in zip(given, found, strict=True):
        logits = model(torch.tensor([[*prompt, *added]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(added)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < TIE


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder, given = write(tmp_path, name), prompts(3, 40, 200)
    require_greedy(folder, given, of_vllm(folder, given, 64))


@pytest.mark.parametrize("name", PADDED)
def test_padded_heads_generate_the_same_tokens(name: str, tmp_path: Path) -> None:
    """The reference is the model before its heads were padded."""
    folder, padded, given = write(tmp_path, name), tmp_path / "padded", prompts(3, 40, 200)
    main_v2(["--save-model-type", "hf", "--load-dir", str(folder), "--save-dir", str(padded), "--pad-head-dim", "128"])
    require_greedy(folder, given, of_vllm(padded, given, 64))


@pytest.mark.parametrize("name", ["minimind3", "minimind2"])
def test_yarn_past_the_trained_length(name: str, tmp_path: Path) -> None:
    folder, given = write(tmp_path, name, rope_scaling=YARN), prompts(40, 2600)
    found = of_vllm(folder, given, 32, length=4096)
    require_greedy(folder, given, found)
    plain = write(tmp_path / "plain", name)
    with pytest.raises(AssertionError):  # without scaling the tokens are others
        require_greedy(plain, given, found)


@contextmanager
def server(command: Sequence[str], port: int, log: Path, settings: dict[str, str]) -> Iterator[None]:
    """A server that answers /health, as a process."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment() | settings, stdout=file, stderr=file)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", 600)
        yield
    finally:
        process.terminate()
        process.wait(60)


def published_tokenizer(generation: str) -> Path:
    found = Path(os.environ.get("MINIMIND_TOKENIZER_DIR", "/nowhere")) / generation
    if not found.is_dir():
        pytest.skip("MINIMIND_TOKENIZER_DIR is not set")
    return found


@pytest.fixture(scope="module", params=["minimind3", "minimind2_small"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a server on vLLM, started by the command line."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = published_tokenizer("v3" if request.param == "minimind3" else "v2")
    write_served(folder / "model", serving.shrunk(request.param, vocabulary(tokenizer)), tokenizer)
    port = hosts.free_port()
    command = [PYTHON, "-m", "minimind_mcore.cli", "serve", "--load", str(folder / "model"), "--engine", "vllm"]
    with server([*command, "--port", str(port)], port, folder / "log", KEY):
        yield f"http://127.0.0.1:{port}/v1"


@pytest.mark.parametrize("version", ["newest", "1.x"])
def test_the_official_client(served: str, version: str) -> None:
    """Every endpoint, field and error; tests/helpers/openai_suite.py says where vLLM is not like OpenAI."""
    path = [os.environ.get("OPENAI_1_DIR", "")] if version == "1.x" else []
    if path == [""]:
        pytest.skip("OPENAI_1_DIR is not set: there is no openai 1.x")
    done = subprocess.run(
        [sys.executable, "-m", "helpers.openai_suite", served, "--vllm"],
        env=os.environ | KEY | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT / "tests"), str(ROOT)])},
        capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["serve-vllm-cuda", "serve-vllm-ascend"])
def test_the_command_of_compose(name: str, tmp_path: Path) -> None:
    """What docker/compose.yaml starts, but for the device and the address: it is healthy, and knows tools and thoughts.

    The service for NPUs gets a model with padded heads, as docs/vllm.md says.
    """
    tokenizer, port, model = published_tokenizer("v3"), hosts.free_port(), tmp_path / "model"
    write_served(tmp_path / "raw", serving.shrunk("minimind3", vocabulary(tokenizer)), tokenizer)
    padding = ["--pad-head-dim", "128"] if name == "serve-vllm-ascend" else []
    main_v2(["--save-model-type", "hf", "--load-dir", str(tmp_path / "raw"), "--save-dir", str(model), *padding])
    for file in tokenizer.iterdir():
        shutil.copy(file, model)
    service = interpolated(yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8")),
                           KEY | {"LOAD_DIR": str(model)})["services"][name]  # fmt: skip
    assert service["command"][0] == f"--model={model}" and service["environment"]["VLLM_API_KEY"] == KEY["API_KEY"]
    command = [PYTHON, *service["entrypoint"][1:], *service["command"]]
    here = ["--host=127.0.0.1", f"--port={port}", "--enforce-eager"]  # what a flag says last holds
    with server([*command, *here], port, tmp_path / "log", service["environment"]):
        probe = service["healthcheck"]["test"][3].replace("8998", str(port))
        assert subprocess.run([sys.executable, "-c", probe], timeout=30).returncode == 0
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY["API_KEY"], max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        hello: Any = {"model": "minimind", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        assert client.chat.completions.create(**hello, max_tokens=8).choices[0].message.content
        unit = {"type": "object", "properties": {"unit": {"enum": ["celsius"]}}, "required": ["unit"]}
        parameters = unit | {"additionalProperties": False}
        tool = {"type": "function", "function": {"name": "get_time", "strict": True, "parameters": parameters}}
        forced: Any = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "get_time"}},
                       "logit_bias": openai_suite.no_blanks(client)}  # fmt: skip
        [call] = client.chat.completions.create(**hello | forced, max_tokens=60).choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == {"unit": "celsius"}


def interpolated(content: Any, environ: dict[str, str]) -> Any:
    """A compose file with `${NAME:-default}` replaced, as compose does it."""
    if isinstance(content, dict):
        return {key: interpolated(value, environ) for key, value in content.items()}
    if isinstance(content, list):
        return [interpolated(value, environ) for value in content]
    if not isinstance(content, str):
        return content
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: environ.get(found[1]) or found[2], content)


FIELDS = """
import json
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
def defaults(kind):
    found = {name: field for name, field in kind.model_fields.items() if not field.is_required()}
    return {name: field.get_default(call_default_factory=True) for name, field in found.items()}
print("FOUND", json.dumps([defaults(kind) for kind in (ChatCompletionRequest, CompletionRequest)], default=str))
"""


def test_the_embedded_server_knows_every_field_of_vllm() -> None:
    """It refuses what it does not implement, unless the field has vLLM's default."""
    done = subprocess.run([PYTHON, "-c", FIELDS], env=environment(), capture_output=True, text=True, timeout=300)
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    chats, completions = json.loads(line.removeprefix("FOUND "))
    assert len(chats) > 50 and len(completions) > 40
    bodies: tuple[tuple[Any, dict[str, Any]], ...] = (
        (protocol.ChatBody, chats),
        (protocol.CompletionBody, completions),
    )
    for body, fields in bodies:
        assert not fields.keys() - body.model_fields.keys() - body.unsupported.keys()
        assert all(fields[name] in values for name, values in body.unsupported.items() if name in fields)
