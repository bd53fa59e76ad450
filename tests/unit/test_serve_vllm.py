"""vLLM as the engine of `serve`: its flags, and the head sizes that it takes. tests/real_vllm runs vLLM itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.weights_on_disk import state_dict, write_hf

from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.inference.vllm_engine import head_size_problem
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.serve import vllm
from minimind_mcore.serve.engines import ServerOptions


@pytest.mark.parametrize(
    ("name", "kind", "fits"),
    [
        *[(name, kind, True) for name in PRESETS if not name.endswith("_tiny") for kind in ("cpu", "cuda")],
        *[(name, "npu", False) for name in PRESETS],  # heads of 64 with fewer key-value heads, 80 and 96
        ("minimind3_tiny", "cpu", True),
        ("minimind2_small_tiny", "cpu", False),
    ],
)
def test_head_sizes(name: str, kind: str, fits: bool) -> None:
    problem = head_size_problem(PRESETS[name], kind)
    assert (problem is None) == fits
    if kind == "npu":
        assert f"size {PRESETS[name].head_dim}" in (problem or "")
        if "minimind2_moe" in name:  # vLLM computes hidden_size / heads for a Qwen2-MoE, whatever head_dim says
            assert "Use the embedded engine" in (problem or "")
            assert "ignores head_dim" in (head_size_problem(PRESETS[name].replace(head_dim=128), "cpu") or "")
            return
        assert "--pad-head-dim 128" in (problem or "")
        assert head_size_problem(PRESETS[name].replace(head_dim=128), "npu") is None
        assert (
            head_size_problem(PRESETS[name].replace(head_dim=64, num_kv_heads=PRESETS[name].num_heads), "npu") is None
        )


def flags(folder: Path, tokenizer: Path, options: ServerOptions) -> dict[str, str]:
    config = PRESETS["minimind3_tiny"]
    source = open_source(write_hf(folder / "model", config, state_dict(config, "hf")))
    words = vllm.flags(source, tokenizer_info(tokenizer), options)
    environ = vllm.environment(source, options)
    found = {word: words[n + 1] if n + 1 < len(words) else "" for n, word in enumerate(words) if word.startswith("--")}
    return found | {name: environ.get(name, "") for name in ("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", "API_KEY")}


def test_the_preset_follows_the_tokenizer(
    published_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    options = ServerOptions(
        host="127.0.0.1", port=8998, name="mine", api_key="secret", defaults=(("temperature", 0.7),)
    )
    found = flags(tmp_path, published_tokenizer, options)
    assert found["--tool-call-parser"] == "hermes" and "--enable-auto-tool-choice" in found
    assert json.loads(found["--override-generation-config"]) == {"temperature": 0.7}
    assert found["--dtype"] == "float32" and found["--max-model-len"] == "32768" and found["--allowed-origins"] == "[]"
    assert (found["VLLM_API_KEY"], found["API_KEY"]) == ("secret", "") and "secret" not in found.get("--api-key", "")
    assert int(found["VLLM_CPU_KVCACHE_SPACE"]) >= 1
    if published_tokenizer.name == "v3":
        assert found["--reasoning-parser"] == "qwen3"
        assert json.loads(found["--default-chat-template-kwargs"]) == {"enable_thinking": False}
    else:  # its tags are text
        assert "--reasoning-parser" not in found


def test_a_base_model_has_no_chats(tokenizer: str, tmp_path: Path) -> None:
    options = ServerOptions(host="127.0.0.1", port=8998, name="minimind", raw=True, max_model_len=512)
    found = flags(tmp_path, Path(tokenizer), options)
    assert found["--max-model-len"] == "512" and not {"--tool-call-parser", "--reasoning-parser"} & set(found)


def test_enable_thinking_opens_the_thought(tokenizer: str, tmp_path: Path) -> None:
    """In the template that vLLM gets; without it the prompt is the one of the tokenizer's own template."""
    from minimind_mcore.inference.loading import load_tokenizer

    loaded = load_tokenizer(tokenizer_info(tokenizer))
    changed = vllm._chat_template(tmp_path, tokenizer_info(tokenizer)).read_text(encoding="utf-8")
    messages = [{"role": "user", "content": "hello"}]

    def prompt(template: str | None, **kwargs: bool) -> str:
        return str(loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                              chat_template=template, **kwargs))  # fmt: skip

    assert prompt(changed) == prompt(changed, enable_thinking=False) == prompt(None)
    assert prompt(changed, enable_thinking=True) == prompt(None, open_thinking=True) != prompt(None)
