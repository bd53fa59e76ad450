"""Inputs and runs that the rehearsals share; all of them skip where there are no sources of MindSpeed-LLM."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import rehearsal
from helpers.engine import ROOT
from helpers.rehearsal import Inputs, Pretrain, Result


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Texts, tokenizer, weights; and the environment of the rehearsal."""
    if reason := rehearsal.missing():
        pytest.skip(reason)
    done = subprocess.run(["bash", str(ROOT / "requirements/rehearse.sh")], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"requirements/rehearse.sh could not make .venv-rehearsal: {done.stderr[-500:]}")
    return rehearsal.make_inputs(tmp_path_factory.mktemp("rehearsal"))


@pytest.fixture(scope="session")
def weights(inputs: Inputs) -> Callable[..., Path]:
    """The Megatron checkpoint of a model in a layout, as ckpt_convert_minimind_hf2mcore.sh makes it."""

    @functools.cache
    def convert(model: str, tp: int, pp: int, ep: int) -> Path:
        target = inputs.folder / f"{model}-{tp}-{pp}-{ep}"
        rehearsal.run_script(
            "ckpt_convert_minimind_hf2mcore.sh",
            LOAD_DIR=str(inputs.model(model)), SAVE_DIR=str(target), TP=str(tp), PP=str(pp), EP=str(ep),
        )  # fmt: skip
        return target

    # A cache tells a default that is given from one that is left out.
    return lambda model, tp=1, pp=1, ep=1: convert(model, tp, pp, ep)


@pytest.fixture(scope="session")
def pretrain(inputs: Inputs, weights: Callable[..., Path]) -> Pretrain:
    """Rehearse ten updates from the converted weights, saved after five and ten."""

    @functools.cache
    def run(model: str, tp: int, pp: int, ep: int, precision: str, load: Path | None) -> tuple[Result, Path]:
        folder = inputs.folder / f"run-{model}-{tp}-{pp}-{ep}-{precision}{'-resumed' if load else ''}"
        environment = rehearsal.SETTINGS | inputs.environment | rehearsal.layout(tp, pp, ep)
        environment |= {"MODEL": str(inputs.model(model)), "DATA_PATH": str(inputs.folder / "text.jsonl")}
        environment |= {"OUTPUT_DIR": str(folder), "PRECISION": precision, "SAVE_INTERVAL": "5"}
        environment["CKPT_LOAD_DIR"] = str(load or weights(model, tp, pp, ep))
        result = rehearsal.run_script("pretrain", **environment)
        return result, folder / "checkpoints"

    return lambda model, tp=1, pp=1, ep=1, precision="fp32", load=None: run(model, tp, pp, ep, precision, load)
