"""`--split` is read alike by every program: the recipes, both kinds of training, MindSpeed-LLM's flags, RL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.engine import ROOT
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

from minimind_mcore import arguments
from minimind_mcore.errors import UserError
from minimind_mcore.mindspeed.flags import complete
from minimind_mcore.models import recipes
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.posttrain.data import split_ranges
from minimind_mcore.preprocess.indexed import IndexedWriter
from minimind_mcore.rl.runtime.data import PromptDataset

EXPECTED = "expected the weights of training, validation and test, such as 99,1,0"
WRONG = ["90,abc5,5", "-1,1,0", "1,2,3,4", "0,0,0", "90,,5", "nan,1,0", "inf,1,0", "1e2,1,0", "90;5;5", ""]
RIGHT = ["99,1,0", "969, 30, 1", "1", "80,20", "0.5,.25,0.25", "90/5/5", "3.,1,0"]


def prompts(tmp_path: Path, count: int = 20) -> str:
    """Write `count` prompts of one token each."""
    for name in ("input_ids", "labels"):
        with IndexedWriter(f"{tmp_path}/rl_packed_{name}_document") as writer:
            writer.add(np.arange(count, dtype=np.uint32), np.ones(count, np.int64))
    return f"{tmp_path}/rl"


@pytest.mark.parametrize("split", WRONG)
def test_a_wrong_split_is_refused_by_every_program(split: str, tmp_path: Path) -> None:
    message = f"--split {split}: {EXPECTED}"
    flags = [*PRESETS["minimind3"].megatron_flags(), "--transformer-impl", "local", "--data-path", "data"]
    for words in ([f"--split={split}"], ["--split", split]):
        for posttrain in (False, True):
            with pytest.raises(UserError) as error:
                arguments.parse([*flags, *words], posttrain=posttrain)
            assert str(error.value) == message
        with pytest.raises(UserError) as error:
            complete("pretrain_gpt.py", [*flags, *words])
        assert message in str(error.value).splitlines()[-1]
    with pytest.raises(UserError) as error:
        recipes.training_share(split)
    assert str(error.value) == message
    if split:  # posttrain_gpt.py passes None for Megatron's default
        with pytest.raises(UserError) as error:
            split_ranges(split, 100)
        assert str(error.value) == message
    with pytest.raises(UserError) as error:
        PromptDataset(prompts(tmp_path), split=split)
    assert str(error.value) == message.removeprefix("--")


@pytest.mark.parametrize("split", RIGHT)
def test_a_split_has_megatrons_shares(split: str, tmp_path: Path) -> None:
    reference = parse_and_normalize_split(split)
    assert recipes.training_share(split) == pytest.approx(reference[0], abs=1e-12)
    assert [len(part) for part in split_ranges(split, 1000)] == [round(1000 * share) for share in reference]
    prefix = prompts(tmp_path, 1000)
    for part, share in enumerate(reference):
        if share:
            assert len(PromptDataset(prefix, split=split, part=part)) == round(1000 * share)


@pytest.mark.parametrize("split", ["90,abc5,5", "-1,1,0"])
@pytest.mark.parametrize("script", ["pretrain_minimind_ptd.sh", "tune_minimind_full_ptd.sh"])
@pytest.mark.parametrize("flags", [["--dry-run"], []])
def test_a_script_refuses_a_wrong_split_before_it_makes_anything(
    script: str, flags: list[str], split: str, tmp_path: Path
) -> None:
    settings = {"SPLIT": split, "TRAIN_ITERS": "1", "DATA_DIR": f"{tmp_path}/data", "OUTPUT_DIR": f"{tmp_path}/out"}
    settings |= {"PYTHON": sys.executable, "DEVICE": "cpu", "NPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "examples/mcore/minimind" / script), *flags]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert done.stderr.splitlines()[-1] == f"error: --split {split}: {EXPECTED}"
    assert not list(tmp_path.iterdir())
