"""MindSpeed-LLM's own preprocess_data.py, run by path on a host without Ascend software.

    PYTHONPATH=tests:. python -m helpers.upstream_preprocess HOME FLAG...

The program, its handlers, templates, parsers and its changes to megatron-core's writer are those of HOME. The modules
around them import MindSpeed and Megatron-LM's training program, which the conversion does not use: of these only the
needed functions are taken, by name.
"""

from __future__ import annotations

import ast
import importlib
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import AutoTokenizer


def function(file: Path, name: str) -> Callable[..., Any]:
    """Return one function of a file, without the file's imports."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    [node] = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name]
    names: dict[str, Any] = {}
    exec(compile(ast.Module([node], type_ignores=[]), str(file), "exec"), names)
    found: Callable[..., Any] = names[name]
    return found


def build_tokenizer(args: Any) -> Any:
    """Return a tokenizer in the form of MindSpeed-LLM's build_tokenizer."""
    inner = AutoTokenizer.from_pretrained(args.tokenizer_name_or_path)
    return types.SimpleNamespace(tokenizer=inner, vocab_size=len(inner), eod=inner.eos_token_id)


def auto_coverage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as it is."""
    return function


def main(home: Path, flags: list[str]) -> None:
    """Run HOME/preprocess_data.py."""
    tasks = home / "mindspeed_llm/tasks"
    functions = {
        "tasks.posttrain.utils": [function(tasks / "posttrain/utils.py", "convert_token_to_id")],
        "tasks.preprocess.decoder_packed_mtf_dataset": [
            function(tasks / "preprocess/decoder_packed_mtf_dataset.py", "_infer_seqlen")
        ],
        "training.tokenizer": [build_tokenizer],
        "training.utils": [auto_coverage],
    }
    for name in ("", "core", "core.datasets", "tasks", "tasks.preprocess", "tasks.posttrain", "training"):
        package = types.ModuleType(f"mindspeed_llm.{name}".rstrip("."))
        package.__path__ = [str(home / "mindspeed_llm" / name.replace(".", "/"))]
        sys.modules[package.__name__] = package
    for name, found in functions.items():
        module = types.ModuleType(f"mindspeed_llm.{name}")
        vars(module).update({one.__name__: one for one in found})
        sys.modules[module.__name__] = module
    writer: Any = IndexedDatasetBuilder
    changes = importlib.import_module("mindspeed_llm.core.datasets.indexed_dataset")
    writer.__init__ = changes.indexed_dataset_builder_init_wrapper(writer.__init__)
    writer.add_item = changes.add_item_wrapper(writer.add_item)
    writer.finalize = changes.finalize_wrapper(writer.finalize)
    program = home / "preprocess_data.py"
    sys.argv = [str(program), *flags]
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
