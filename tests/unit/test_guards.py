"""Rules of the code that no linter knows."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.engine import ROOT

PACKAGES = ("minimind_mcore", "models", "preprocess", "converters", "rehearsal")
FILES = sorted(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))
DEVICE_WORDS = re.compile(r"cuda|npu(?![t])|nccl|hccl", re.IGNORECASE)
# Who names devices: the device layer, what touches MindSpeed, what connects hosts, and what examines one.
DEVICE_FILES = (
    "minimind_mcore/platform/device.py", "minimind_mcore/platform/cpu_as_cuda.py", "minimind_mcore/platform/ascend.py",
    "minimind_mcore/hosts.py", "minimind_mcore/mindspeed/", "minimind_mcore/doctor/", "rehearsal/",
)  # fmt: skip
# Names that upstream gave: Megatron's functions and keys of its files, flags without effect here, one preset of theirs.
UPSTREAM_NAMES = {
    "minimind_mcore/cli/launcher.py": ("NPUS_PER_NODE",),
    "minimind_mcore/cli/quickstart.py": ("NPUS_PER_NODE",),
    "minimind_mcore/cli/rl.py": ("NPU",),  # Ray's name of the resource
    "minimind_mcore/figures/study.py": ("NPUS_PER_NODE",),
    "minimind_mcore/manager/ascend_api.py": ("npu", "npu-smi"),  # minimind-ascend's path
    "minimind_mcore/manager/options.py": ("NPUS_PER_NODE",),
    "minimind_mcore/manager/queue.py": ("NPUS_PER_NODE",),
    "minimind_mcore/platform/patches.py": ("fused_weight_gradient_mlp_cuda",),
    "minimind_mcore/rl/config/check.py": ("num_npus",),
    "minimind_mcore/rl/config/schema.py": ("num_npus",),
    "minimind_mcore/rl/runtime/placement.py": ("num_npus",),
    "models/attention.py": ("get_cuda_rng_tracker",),
    "converters/probe.py": ("model_parallel_cuda_manual_seed",),
    "minimind_mcore/training/checkpoint_torch.py": ("cuda_rng_state", "get_cuda_rng_tracker"),
    "minimind_mcore/training/distributed.py": ("model_parallel_cuda_manual_seed",),
    "minimind_mcore/checkpoint/unpickling.py": ("CudaGraphScope",),
    "minimind_mcore/platform/fused/compiled.py": ("cuda",),  # whether Triton can compile for the device
    "minimind_mcore/training/model.py": ("cuda",),  # Transformer Engine exists for nothing else
}  # fmt: skip


# Who may print, and what: the product of a command. Everything else is logged, see minimind_mcore/log.py.
MAY_PRINT = {
    "converters/conversion.py": "the verdict of a dry run",
    "minimind_mcore/cli/__init__.py": "the list of commands",
    "minimind_mcore/cli/data.py": "words of --data-path",
    "minimind_mcore/cli/quickstart_tools.py": "the results of the quickstart",
    "minimind_mcore/cli/rl.py": "help, and the commands of a dry run",
    "minimind_mcore/cli/settings.py": "help, and the command of a dry run",
    "minimind_mcore/doctor/main.py": "the report",
    "minimind_mcore/forecast/main.py": "the forecast",
    "minimind_mcore/hosts.py": "settings that a shell reads",
    "minimind_mcore/inference/chat.py": "the conversation",
    "minimind_mcore/inference/evaluation.py": "the scores, and the verdict of a dry run",
    "minimind_mcore/inference/main.py": "the generated text, and the verdict of a dry run",
    "minimind_mcore/log.py": "messages",
    "minimind_mcore/manager/main.py": "the address, with the token",
    "minimind_mcore/manager/runner.py": "the commands of a job, into its log",
    "minimind_mcore/mindspeed/launch.py": "the command of MindSpeed-LLM",
    "minimind_mcore/pipeline/download.py": "the list of downloads",
    "minimind_mcore/pipeline/main.py": "the plan of a dry run, and the accuracy",
    "minimind_mcore/pipeline/report.py": "the files that were written",
    "minimind_mcore/pipeline/serving.py": "the answer and the address of the server",
    "minimind_mcore/platform/device.py": "settings that a shell reads",
    "minimind_mcore/rl/commands.py": "configurations, and the findings of lint",
    "minimind_mcore/rl/main.py": "the name of a program that a shell reads",
    "minimind_mcore/rl/models.py": "the files that were written",
    "minimind_mcore/rl/runtime/dry_run.py": "the plan of a dry run",
    "minimind_mcore/serve/embedded.py": "the address, for which scripts wait",
    "minimind_mcore/serve/main.py": "the verdict of a dry run",
    "minimind_mcore/training/report.py": "the files that were written",
    "minimind_mcore/training/summary.py": "the plan of a dry run",
    "models/presets.py": "the table, and flags that a shell reads",
    "models/recipes.py": "flags that a shell reads",
    "preprocess/main.py": "words of --data-path, and what a dataset holds",
}


def relative(file: Path) -> str:
    """Its path in the repository."""
    return file.relative_to(ROOT).as_posix()


def code_tokens(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every name and string, docstrings and comments left out."""
    source = file.read_text(encoding="utf-8")
    documentation = {
        (node.body[0].lineno, node.body[0].end_lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        documented = any(first <= token.start[0] <= (last or first) for first, last in documentation)
        if not documented and token.type in (tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield token.start[0], token.string


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_devices_are_named_in_one_place(file: Path) -> None:
    if relative(file).startswith(DEVICE_FILES):
        return
    allowed = UPSTREAM_NAMES.get(relative(file), ())
    for line, text in code_tokens(file):
        for name in allowed:
            text = re.sub(rf"\b{name}\b", "", text)
        # A message to the user may say NPU; code may not.
        found = DEVICE_WORDS.search(text)
        prose = " " in text and found and found[0].isupper()
        assert not found or prose, f"{relative(file)}:{line}: {text}"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_mindspeed_is_imported_in_one_place(file: Path) -> None:
    if relative(file).startswith(("minimind_mcore/mindspeed/", "minimind_mcore/platform/ascend.py")):
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"mindspeed", "mindspeed_llm", "mindspeed_rl"}, f"{relative(file)}:{node.lineno}"


def prints(file: Path) -> bool:
    """Whether a file calls `print`, or writes to a standard stream."""
    calls = [
        ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)
    ]
    return any(call in ("print", "sys.stdout.write", "sys.stderr.write") for call in calls)


def test_only_products_are_printed() -> None:
    found = {relative(file) for file in FILES if prints(file) and not relative(file).startswith("rehearsal/")}
    assert found == MAY_PRINT.keys(), "log the message, or say in MAY_PRINT what the module's command exists to print"


def test_messages_go_to_the_logger_of_the_kit() -> None:
    sources = {relative(file): file.read_text(encoding="utf-8") for file in FILES}
    programs = [name for name, source in sources.items() if '__name__ == "__main__"' in source]
    wrong = [name for name in programs if "getLogger(__name__)" in sources[name]]
    assert not wrong, "a program's __name__ is __main__, which is not below minimind_mcore: give the module's name"


PROGRAMS = sorted(file.stem for file in ROOT.glob("*.py") if file.stem != "setup")


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_import_megatron_after_the_device_is_ready(program: str) -> None:
    code = f"import sys, {program}; print(*(m for m in sys.modules if m.startswith('megatron.core')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_functions_and_files_stay_readable(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count("\n") <= 600, f"{relative(file)} has more than 600 lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 80, f"{relative(file)}:{node.lineno}: {node.name} has {lines} lines"


def test_allowed_names_are_still_in_use() -> None:
    for name, words in UPSTREAM_NAMES.items():
        found = " ".join(text for _, text in code_tokens(ROOT / name)) + (ROOT / name).read_text(encoding="utf-8")
        assert all(re.search(rf"\b{word}\b", found) for word in words), name
