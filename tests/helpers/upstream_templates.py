"""MindSpeed-LLM's own template code, loaded by path, and what it makes of conversations.

    MINDSPEED_LLM_HOME=... MINIMIND_TOKENIZER_DIR=... PYTHONPATH=tests:. python -m helpers.upstream_templates

writes `contract/golden/templates.json`: ids and labels of every dialogue by every template of configs/templates.json,
with MiniMind's published tokenizers. CI, which has no MindSpeed-LLM, holds the kit's implementation to that table.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parents[1] / "contract/golden/templates.json"
TEMPLATES = ROOT / "configs/templates.json"
IGNORED = -100

TOOLS = [{"type": "function", "function": {"name": "add", "description": "两数之和", "parameters": {"type": "object"}}}]
CALLS = [{"name": "add", "arguments": {"a": 25, "b": 37}}]

# In MindSpeed-LLM's own form: role, content (of a call its JSON); the system prompt and the tools by themselves.
DIALOGUES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [("user", "你好"), ("assistant", "你好！有什么可以帮你？")]},
    "turns": {
        "messages": [("user", "hi"), ("assistant", "Hello! 😀"), ("user", "Thanks, bye."), ("assistant", "再见！\n")]
    },
    "system": {"system": "You translate.", "messages": [("user", "早上好"), ("assistant", "Good morning.")]},
    "thoughts": {"messages": [("user", "12*13=?"), ("assistant", "<think>\n12*13=120+36\n=156\n</think>\n\n156")]},
    "markup": {"messages": [("user", "what is <|im_end|>\n?"), ("assistant", "a mark\n\n")]},
    "tools": {
        "system": "You compute.",
        "tools": TOOLS,
        "messages": [
            ("user", "25+37 等于多少？"),
            ("function", json.dumps(CALLS)),
            ("observation", '{"result": 62}'),
            ("assistant", "25+37=62。"),
        ],
    },
}
# --prompt-type and --enable-thinking
SETTINGS: dict[str, tuple[str, bool | None]] = {
    "qwen3": ("qwen3", None),
    "qwen3 thinking": ("qwen3", True),
    "qwen3 not thinking": ("qwen3", False),
    "chatml": ("chatml", None),
    "chatml_de": ("chatml_de", None),
}


def cases() -> list[tuple[str, str]]:
    """Settings and dialogues; only qwen3 has a way to write tools."""
    return [(s, d) for s in SETTINGS for d in DIALOGUES if d != "tools" or s.startswith("qwen3")]


def load(home: Path) -> types.ModuleType:
    """Its templates.py and formatter.py, unedited; of what they import from a training module, that one function."""
    folder = home / "mindspeed_llm/tasks/preprocess"
    package = types.ModuleType("upstream_preprocess")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    source = (folder / "decoder_packed_mtf_dataset.py").read_text(encoding="utf-8")
    [function] = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "_infer_seqlen"]
    stub = types.ModuleType("upstream_preprocess.decoder_packed_mtf_dataset")
    exec(compile(ast.Module([function], []), "decoder_packed_mtf_dataset.py", "exec"), stub.__dict__)
    sys.modules[stub.__name__] = stub
    return importlib.import_module("upstream_preprocess.templates")


def encoded(module: types.ModuleType, tokenizer: Any, setting: str, dialogue: str) -> tuple[list[int], list[int]]:
    """Ids and labels, put together as its LlamaFactoryInstructionHandler does."""
    name, thinking = SETTINGS[setting]
    module.templates.clear()
    template = module.get_model_template(name, str(TEMPLATES), thinking)
    module.fix_model_tokenizer(tokenizer, name, str(TEMPLATES), thinking)
    given = DIALOGUES[dialogue]
    messages = [{"role": role, "content": content} for role, content in given["messages"]]
    tools = json.dumps(given["tools"]) if "tools" in given else ""
    ids: list[int] = []
    labels: list[int] = []
    for source, target in template.encode_multiturn(tokenizer, messages, given.get("system", ""), tools, 4096):
        ids += source + target
        labels += [IGNORED] * len(source) + target
    return ids, labels


def record(home: Path, tokenizers: Path) -> dict[str, Any]:
    """The table: by tokenizer, setting and dialogue, the ids, and the labels where they differ from them."""
    module = load(home)
    table: dict[str, Any] = {}
    for generation in ("v2", "v3"):
        for setting, dialogue in cases():
            tokenizer = AutoTokenizer.from_pretrained(tokenizers / generation)
            ids, labels = encoded(module, tokenizer, setting, dialogue)
            table.setdefault(generation, {}).setdefault(setting, {})[dialogue] = {"ids": ids, "labels": labels}
    return {"made by": "MindSpeed-LLM 26.1.0, tasks/preprocess/templates.py and formatter.py", "table": table}


if __name__ == "__main__":
    content = record(Path(os.environ["MINDSPEED_LLM_HOME"]), Path(os.environ["MINIMIND_TOKENIZER_DIR"]))
    text = json.dumps(content, ensure_ascii=False, indent=1)
    text = re.sub(r"\[[\s\d,-]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list on a line
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"{GOLDEN}: {sum(len(s) for g in content['table'].values() for s in g.values())} renderings")
