"""The native engine does what MindSpeed-LLM 26.1.0 did in a rehearsal: same data files, losses, checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import engine, golden, rehearsal
from helpers.engine import ROOT, worst_difference
from helpers.rehearsal import Inputs

HANDLERS = {
    "text.jsonl": ["GeneralPretrainHandler", "--json-keys", "text", "--prepend-bos", "--append-eod"],
    "chats.jsonl": ["MiniMindInstructionHandler", "--seq-length", "128"],
    "pairs.jsonl": ["MiniMindPairwiseHandler", "--seq-length", "128"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The recorded runs' inputs, made again."""
    return rehearsal.make_inputs(tmp_path_factory.mktemp("golden") / "inputs")


@pytest.mark.parametrize("name", golden.CASES)
def test_the_native_engine_equals_the_recorded_rehearsal(
    name: str, inputs: Inputs, server: engine.Server, tmp_path: Path
) -> None:
    case = golden.CASES[name]
    recorded = json.loads((golden.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    flags = golden.special(recorded["flags"], inputs, tmp_path)
    if case.router_weight:
        assert recorded["router_weight"] == case.router_weight
        flags += ["--router-weight", case.router_weight]

    prefix = rehearsal.value(flags, "--data-path")
    if not list(Path(prefix).parent.glob(Path(prefix).name + "*")):
        convert(inputs.folder / case.data, prefix.removesuffix("_text_document"), inputs.tokenizer, HANDLERS[case.data])
    assert golden.digests(inputs, prefix) == recorded["data"]

    weights = ["--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", str(inputs.model(case.model))]
    program("convert_ckpt_v2.py", *weights, "--save-dir", str(tmp_path / "weights"))
    run = server.run(flags, tmp_path / "out", posttrain=case.posttrain)
    assert worst_difference(run.column(), recorded["losses"]) < 1e-5
    assert worst_difference(run.column("grad_norm"), recorded["grad_norms"]) < 1e-3
    assert golden.table(tmp_path / "run/checkpoints") == recorded["checkpoint"]


def convert(source: Path, prefix: str, tokenizer: Path, handler: list[str]) -> None:
    """Convert raw data as the scripts do."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    program(
        "preprocess_data.py", "--input", str(source), "--tokenizer-type", "PretrainedFromHF", "--workers", "1",
        "--tokenizer-name-or-path", str(tokenizer), "--output-prefix", prefix, "--handler-name", *handler,
    )  # fmt: skip


def program(name: str, *flags: str) -> None:
    """Run one of the kit's programs."""
    done = subprocess.run([sys.executable, str(ROOT / name), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
