"""configs/templates.json gives MindSpeed-LLM, the kit and MiniMind's chat templates the same ids and labels."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import upstream_templates as upstream
from helpers.engine import ROOT
from transformers import AutoTokenizer

from minimind_mcore.inputs.flags import flag_table
from minimind_mcore.preprocess.conversations import Conversation
from minimind_mcore.preprocess.templates import Settings, SlotTemplate, read_templates, template_entry
from minimind_mcore.preprocess.tokenize import load_encoder

CASES = upstream.cases()
ROLES = {"observation": "tool", "function": "assistant"}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(upstream.GOLDEN.read_text(encoding="utf-8"))["table"]
    return table


def conversation(dialogue: str) -> Conversation:
    """A dialogue in the kit's form."""
    given = upstream.DIALOGUES[dialogue]
    messages: list[dict[str, Any]] = [{"role": "system", "content": given["system"]}] if "system" in given else []
    for role, content in given["messages"]:
        message = {"role": ROLES.get(role, role), "content": content}
        if role == "function":
            message |= {"content": "", "tool_calls": json.loads(content)}
        messages.append(message)
    return Conversation(messages, given.get("tools"))


def by_the_kit(tokenizer: Path, setting: str, dialogue: str) -> tuple[list[int], list[int]]:
    """Ids and labels from the kit's implementation of these templates."""
    name, thinking = upstream.SETTINGS[setting]
    template = SlotTemplate(
        template_entry(name, str(upstream.TEMPLATES)), Settings("<|im_start|>", "<|im_end|>", thinking)
    )
    encoder = load_encoder(str(tokenizer), "tokenizers")
    turns = []
    for pieces in template.render(conversation(dialogue)):
        tokens, sizes = encoder.encode(pieces)
        assert sum(sizes) == len(tokens)
        turns.append(tokens)
    ids, labels, cut = template.label(turns)
    assert not cut
    return ids.tolist(), labels.tolist()


@pytest.mark.parametrize(("setting", "dialogue"), CASES, ids=lambda value: str(value))
def test_kit_equals_mindspeed(setting: str, dialogue: str, published_tokenizer: Path, golden: dict[str, Any]) -> None:
    expected = golden[published_tokenizer.name][setting][dialogue]
    assert by_the_kit(published_tokenizer, setting, dialogue) == (expected["ids"], expected["labels"])


# Which template writes what a generation's own chat template writes. (chatml_de is v3 less empty thoughts.)
SAME = {"v3": ("qwen3 thinking", "chatml_de"), "v2": ("chatml",)}
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("dialogue", upstream.DIALOGUES)
def test_mindspeed_equals_minimind(dialogue: str, published_tokenizer: Path, golden: dict[str, Any]) -> None:
    """Ids as transformers writes the published chat template; labels on each answer and its end."""
    generation = published_tokenizer.name
    reference = AutoTokenizer.from_pretrained(published_tokenizer)
    whole = conversation(dialogue)
    text = reference.apply_chat_template(list(whole.messages), tools=whole.tools, tokenize=False)
    for setting in SAME[generation]:
        if dialogue not in golden[generation][setting] or (setting == "chatml_de" and dialogue == "thoughts"):
            continue
        written = text.replace(EMPTY, "") if setting == "chatml_de" else text
        encoded = reference(written, return_offsets_mapping=True)
        answers = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", written, re.S)]
        labels = [
            token if any(start <= a and b <= stop for start, stop in answers) else -100
            for token, (a, b) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        ]
        assert golden[generation][setting][dialogue] == {"ids": encoded.input_ids, "labels": labels}, setting


def test_golden_table_is_what_mindspeed_makes(golden: dict[str, Any]) -> None:
    homes = [os.environ.get(name) for name in ("MINDSPEED_LLM_HOME", "MINIMIND_TOKENIZER_DIR")]
    if not homes[0] or not homes[1]:
        pytest.skip("MINDSPEED_LLM_HOME and MINIMIND_TOKENIZER_DIR are not both set: no code of theirs to run")
    assert upstream.record(Path(homes[0]), Path(homes[1]))["table"] == golden


# Prompts of tasks for reinforcement learning, see test_rl_data. MindSpeed-RL takes any name.
OF_TASKS = {"empty", "qwen_r1", "minimind_r1"}


def test_one_file_under_names_that_mindspeed_allows() -> None:
    assert upstream.TEMPLATES.resolve() == ROOT / "preprocess/templates.json"  # what ships in the package
    names = set(read_templates(str(upstream.TEMPLATES))) - OF_TASKS
    assert names <= set(flag_table()["--prompt-type"]["choices"])
    assert names == {name for name, _ in upstream.SETTINGS.values()}
