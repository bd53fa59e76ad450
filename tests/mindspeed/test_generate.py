"""Generation, chat and evaluation on the stand-in, from what MindSpeed-LLM trained."""

from __future__ import annotations

import json
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


def test_perplexity_and_chat_are_those_of_the_cpu(inputs: Inputs, pretrain: Pretrain, tmp_path: Path) -> None:
    _, checkpoints = pretrain("minimind3", tp=2)
    settings = {"LOAD_DIR": str(checkpoints), "TOKENIZER_PATH": str(inputs.tokenizer), "PRECISION": "fp32"}
    scores, said = [], []
    for rehearse in (True, False):
        folder = tmp_path / str(rehearse)
        task = {"TASK": "perplexity", "TASK_DATA_PATH": str(inputs.folder / "text.jsonl"), "OUTPUT_DIR": str(folder)}
        rehearsal.run_script("evaluate", rehearse=rehearse, **settings, **task)
        scores.append(json.loads((folder / "scores.json").read_text()))
        chat = {"MAX_NEW_TOKENS": "8", "TEMPERATURE": "0"}
        done = rehearsal.run_script("chat", rehearse=rehearse, **settings, **chat, stdin="小明 喜欢\nthe cat likes\n")
        said.append([line for line in done.output[done.output.index("you>") :].splitlines() if "tokens/s" not in line])
    assert scores[0] == scores[1] and scores[0]["perplexity"]
    assert said[0] == said[1] and len(said[0]) == 4  # two questions, two answers
