"""Full fine-tuning, LoRA and DPO through MindSpeed-LLM equal the native engine on the same command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import engine
import pytest
import rehearsal
from engine import worst_difference
from rehearsal import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STAGES = {
    "sft": ("tune_minimind_full_ptd.sh", "chats.jsonl", {}),
    "sft packed": ("tune_minimind_full_ptd.sh", "chats.jsonl", {"PACK": "1"}),
    "lora": ("tune_minimind_lora_ptd.sh", "chats.jsonl", {}),
    "dpo": ("dpo_minimind_ptd.sh", "pairs.jsonl", {}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_native_engines(
    stage: str, inputs: Inputs, weights: Callable[..., Path], server: engine.Server, tmp_path: Path
) -> None:
    script, data, more = STAGES[stage]
    environment = rehearsal.SETTINGS | inputs.environment | rehearsal.layout()
    environment |= {"MODEL": str(inputs.model("minimind3")), "DATA_PATH": str(inputs.folder / data)}
    environment |= {"SEQ_LENGTH": "128", "LR": "1e-3", "OUTPUT_DIR": str(tmp_path / "theirs")}
    environment |= {"CKPT_LOAD_DIR": str(weights("minimind3"))}
    if more:  # packed when it is converted
        packed = rehearsal.run_script(
            "data_convert_minimind_instruction.sh", "--pack", "--neat-pack", **environment
        )  # fmt: skip
        environment |= more | {"DATA_PATH": packed.output.strip().splitlines()[-1]}
    theirs = rehearsal.run_script(script, **environment)
    flags = rehearsal.program_flags(theirs)
    flags = [*rehearsal.drop(flags, "--load", "--save"), "--save", str(tmp_path / "checkpoints")]
    ours = server.run(flags, tmp_path / "run", posttrain=True)
    assert theirs.iterations == list(range(1, 11))
    assert worst_difference(ours.column(), theirs.losses) < 1e-5  # 1e-4 is promised
    assert worst_difference(ours.column("grad_norm"), theirs.grad_norms) < 1e-3
