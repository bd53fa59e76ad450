"""A pipeline that is ended at random moments and started again gives the weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.engine import ROOT

STAGES = ("pretrain", "full_sft", "dpo", "reason")
INTERRUPTIONS = 5


def start(folder: Path) -> subprocess.Popen[bytes]:
    settings = {"OUTPUT_DIR": str(folder / "out"), "DATA_DIR": str(folder / "data"), "TRAIN_ITERS": "20"}
    command = [sys.executable, "-m", "minimind_mcore.cli", "run", "--sample", *STAGES]
    environment = os.environ | settings | {"DEVICE": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def weights(folder: Path) -> dict[str, str]:
    return {name: json.loads((folder / f"out/records/{name}.json").read_text())["weights"] for name in STAGES}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_interrupted_runs_give_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    began = time.monotonic()
    assert start(undisturbed).wait() == 0, (undisturbed / "log").read_text()[-3000:]
    seconds = time.monotonic() - began

    generator = random.Random(20)
    for number in range(INTERRUPTIONS):
        process = start(disturbed)
        with pytest.raises(subprocess.TimeoutExpired):  # all five together are shorter than the undisturbed run
            process.wait(generator.uniform(0.05, 0.18) * seconds)
        if number % 2:
            process.send_signal(signal.SIGTERM)  # the training saves first
        else:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(300) != 0
        print(f"ended by {'SIGTERM' if number % 2 else 'SIGKILL'}; finished: {finished(disturbed)}")
        time.sleep(10)  # ranks whose launcher is gone save and end
    assert start(disturbed).wait() == 0, (disturbed / "log").read_text()[-3000:]
    assert weights(disturbed) == weights(undisturbed)


def finished(folder: Path) -> list[str]:
    records = {name: folder / f"out/records/{name}.json" for name in STAGES}
    return [name for name, file in records.items() if file.is_file() and json.loads(file.read_text()).get("finished")]
