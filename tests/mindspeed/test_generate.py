"""Generation on the stand-in, from what MindSpeed-LLM trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import rehearsal
from helpers.rehearsal import Inputs, Pretrain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_greedy_text_is_that_of_the_cpu(inputs: Inputs, pretrain: Pretrain, tmp_path: Path) -> None:
    _, checkpoints = pretrain("minimind3", tp=2)
    written = []
    for rehearse in (True, False):
        output = tmp_path / f"{rehearse}.jsonl"
        prompts = ["--prompt", "小明", "--prompt", "the cat likes", "--output", str(output)]
        settings = {"LOAD_DIR": str(checkpoints), "TOKENIZER_PATH": str(inputs.tokenizer), "PRECISION": "fp32"}
        settings |= {"RAW": "1", "MAX_NEW_TOKENS": "24"}
        rehearsal.run_script("generate", *prompts, rehearse=rehearse, **settings)
        written.append(output.read_text())
    assert written[0] == written[1] and written[0].count("\n") == 2
