"""The table "Differences from minimind and minimind-ascend" of docs/data.md: each row has a test.

What minimind does is written here from its dataset/lm_dataset.py and trainer/train_pretrain.py, with transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.engine import ROOT
from transformers import AutoTokenizer

from minimind_mcore.preprocess.indexed import IndexedWriter
from minimind_mcore.preprocess.options import ChatOptions, Options
from minimind_mcore.preprocess.readers import Reject
from minimind_mcore.preprocess.stages import Encoded, make_stage
from minimind_mcore.preprocess.tokenize import load_encoder, tokenizer_info
from minimind_mcore.training.data import DatasetTokenizer, micro_batch_indices

LENGTH = 16
AS_IT_IS = ChatOptions(system_ratio=0.0, empty_think_ratio=1.0, thinking_ratio=0.0)
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "潮位", "parameters": {"type": "object"}}}]
SYSTEM = {"role": "system", "content": "S", "tools": json.dumps(TOOLS, ensure_ascii=False)}
USER, ANSWER = {"role": "user", "content": "潮位？"}, {"role": "assistant", "content": "2m。"}


@pytest.fixture(scope="module")
def theirs(tokenizer: str) -> Any:
    """The tokenizer as minimind loads it."""
    return AutoTokenizer.from_pretrained(tokenizer)


def encoded_by(handler: str, record: Any, tokenizer: str, **options: Any) -> Encoded | Reject:
    given = Options("-", tokenizer, handler=handler, **{"chat": AS_IT_IS, **options})
    stage = make_stage(given, tokenizer_info(tokenizer), load_encoder(tokenizer, "tokenizers"))
    prepared = stage.prepare(record)
    return prepared if isinstance(prepared, Reject) else stage.encode([prepared])


def ids_by(handler: str, record: Any, tokenizer: str, key: str = "input_ids", **options: Any) -> list[int]:
    encoded = encoded_by(handler, record, tokenizer, **options)
    assert isinstance(encoded, Encoded)
    ids: list[int] = encoded.sequences[key][0].tolist()
    return ids


def pretraining_text(text: str, tokenizer: str) -> list[int]:
    """The ids of a text in the kit's pretraining data, as the scripts make it."""
    options = {"chat": ChatOptions(), "prepend_bos": True, "append_eod": True}
    return ids_by("GeneralPretrainHandler", {"text": text}, tokenizer, "text", **options)


def minimind_row(text: str, theirs: Any) -> tuple[list[int], list[int]]:
    """minimind's PretrainDataset: ids and labels of one text."""
    ids = theirs(text, add_special_tokens=False, max_length=LENGTH - 2, truncation=True).input_ids
    ids = [theirs.bos_token_id, *ids, theirs.eos_token_id]
    ids += [theirs.pad_token_id] * (LENGTH - len(ids))
    return ids, [-100 if token == theirs.pad_token_id else token for token in ids]


def sequences(tokenizer: str, texts: list[str], tmp_path: Path) -> list[dict[str, Any]]:
    """What pretraining reads of texts: megatron-core's dataset with the kit's tokenizer."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    with IndexedWriter(tmp_path / "d") as writer:
        for text in texts:
            ids = pretraining_text(text, tokenizer)
            writer.add(np.array(ids, np.uint32), np.array([len(ids)] if ids else [], np.int64))
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH, split="1,0,0", create_attention_mask=False,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        tokenizer=DatasetTokenizer(tokenizer, 6400), path_to_cache=str(tmp_path / "cache"),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    indexed = IndexedDataset(str(tmp_path / "d"))
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, str(tmp_path / "d"), documents, None, Split.train, config)
    return [dataset[number] for number in range(len(dataset))]


def test_tools_of_rlaif_and_dpo_are_written(tokenizer: str, theirs: Any) -> None:
    messages = [SYSTEM, USER]
    asked = {"tokenize": False, "add_generation_prompt": True, "open_thinking": False}
    upstream = theirs.apply_chat_template(messages, **asked)
    assert "tide" not in upstream
    ours = ids_by("MiniMindPromptHandler", {"conversations": [*messages, ANSWER]}, tokenizer)
    assert ours == theirs(theirs.apply_chat_template(messages, tools=TOOLS, **asked)).input_ids
    whole = [*messages, ANSWER]
    assert "tide" not in theirs.apply_chat_template(whole, tokenize=False)
    ours = ids_by("MiniMindPairwiseHandler", {"chosen": whole, "rejected": whole}, tokenizer, "chosen_input_ids")
    assert ours == theirs(theirs.apply_chat_template(whole, tools=TOOLS, tokenize=False)).input_ids


def test_only_an_answer_is_dropped(tokenizer: str, theirs: Any) -> None:
    asked = {"tokenize": False, "add_generation_prompt": True, "open_thinking": False}
    messages = [{"role": "system", "content": "S"}, USER]
    assert "潮位" not in theirs.apply_chat_template(messages[:-1], **asked)  # minimind's prompt
    ours = ids_by("MiniMindPromptHandler", {"conversations": messages}, tokenizer)
    assert ours == theirs(theirs.apply_chat_template(messages, **asked)).input_ids


def test_roles_are_the_record_s(tokenizer: str, theirs: Any) -> None:
    messages = [{"role": "system", "content": "S"}, USER, ANSWER]
    by_position = [{"role": ("user", "assistant")[i % 2], "content": m["content"]} for i, m in enumerate(messages)]
    ours = theirs.decode(ids_by("MiniMindPromptHandler", {"conversations": messages}, tokenizer))
    assert ours.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n潮位？<|im_end|>\n")
    forked = theirs.apply_chat_template(by_position[:-1], tokenize=False, add_generation_prompt=True)
    assert forked.startswith("<|im_start|>user\nS<|im_end|>\n<|im_start|>assistant\n")


def test_a_wrong_order_is_rejected(tokenizer: str, theirs: Any) -> None:
    wrong = [USER, USER, ANSWER]
    assert theirs.apply_chat_template(wrong, tokenize=False).count("潮位？") == 2  # minimind trains on it
    rejected = encoded_by("MiniMindInstructionHandler", {"conversations": wrong}, tokenizer)
    assert isinstance(rejected, Reject) and "message 2 is of role 'user' after 'user'" in rejected.reason


def test_an_answer_may_have_no_labels(tokenizer: str, theirs: Any) -> None:
    talk = [USER, {**ANSWER, "loss": False}, USER, {**ANSWER, "content": "3m。"}]
    labels = ids_by("MiniMindInstructionHandler", {"conversations": talk}, tokenizer, "labels")
    assert theirs.decode([label for label in labels if label != -100]).count("m。<|im_end|>") == 1


def test_random_changes_are_drawn_once(tokenizer: str, theirs: Any) -> None:
    def texts(seed: int) -> list[list[int]]:
        talks = [[{**USER, "content": f"{number}?"}, ANSWER] for number in range(30)]
        chat = ChatOptions(seed=seed)
        return [ids_by("MiniMindInstructionHandler", {"conversations": t}, tokenizer, chat=chat) for t in talks]

    first = texts(1)
    assert first == texts(1) != texts(2)
    given = sum(theirs.decode(ids).startswith("<|im_start|>system") for ids in first)
    assert 0 < given < 30


def test_long_texts_are_kept_whole(tokenizer: str, theirs: Any, tmp_path: Path) -> None:
    text = "海边的风很大，" * 9
    body = theirs(text, add_special_tokens=False).input_ids
    assert len(body) > 2 * LENGTH
    ours = pretraining_text(text, tokenizer)
    assert ours == [theirs.bos_token_id, *body, theirs.eos_token_id]
    assert minimind_row(text, theirs)[0][1:-1] == body[: LENGTH - 2]
    read = [token for sample in sequences(tokenizer, [text], tmp_path) for token in sample["tokens"].tolist()]
    assert read and sorted(read) != sorted(body[: LENGTH - 2]) and set(read) <= set(ours)
    assert len(read) == (len(ours) - 1) // LENGTH * LENGTH


def test_short_texts_follow_each_other(tokenizer: str, theirs: Any, tmp_path: Path) -> None:
    texts = ["风", "海"] * 20
    assert minimind_row(texts[0], theirs)[1].count(-100) > 0
    for sample in sequences(tokenizer, texts, tmp_path):
        assert sample["loss_mask"].tolist() == [1.0] * LENGTH
        assert sample["tokens"].tolist().count(theirs.bos_token_id) > 2


def test_empty_texts_are_left_out(tokenizer: str, theirs: Any) -> None:
    ids, labels = minimind_row("", theirs)
    assert ids[:2] == labels[:2] == [theirs.bos_token_id, theirs.eos_token_id]
    options = {"chat": ChatOptions(), "prepend_bos": True, "append_eod": True}
    encoded = encoded_by("GeneralPretrainHandler", {"text": ""}, tokenizer, **options)
    assert isinstance(encoded, Encoded)
    assert [part.tolist() for part in encoded.sequences["text"]] == [[], [0]]


def test_the_padding_token_inside_a_text_has_a_loss(tokenizer: str, theirs: Any, tmp_path: Path) -> None:
    text = f"a{theirs.pad_token}b"
    place = theirs(text, add_special_tokens=False).input_ids.index(theirs.pad_token_id) + 1
    assert minimind_row(text, theirs)[1][place] == -100
    assert pretraining_text(text, tokenizer)[place] == theirs.pad_token_id
    for sample in sequences(tokenizer, [text] * 20, tmp_path):
        padding = sample["labels"] == theirs.pad_token_id
        assert padding.any() and (sample["loss_mask"][padding] == 1).all()


def updates(steps: int, accumulation: int, offset: int, rest: bool) -> list[int]:
    """How many micro-batches the updates of one epoch have, by the condition in a trainer's loop."""
    sizes, size = [], 0
    for step in range(1, steps + 1):
        size += 1
        if (step + offset) % accumulation == 0:
            sizes, size = [*sizes, size], 0
    return [*sizes, size] if rest and size else sizes


def test_every_update_has_as_many_micro_batches() -> None:
    assert updates(10, 4, offset=0, rest=True) == [4, 4, 2]  # minimind
    assert updates(10, 4, offset=1, rest=False) == [3, 4]  # minimind-ascend: 3 micro-batches are left over
    read = list(micro_batch_indices(total=20, consumed=0, mbs=1, rank=0, dp=1))  # two epochs of 10
    groups = [read[first : first + 4] for first in range(0, len(read), 4)]
    assert [len(group) for group in groups] == [4] * 5
    assert [index for group in read for index in group] == list(range(20))


ROWS: dict[str, tuple[str, Callable[..., None]]] = {
    "tools in RLAIF and DPO records": ("RLAIF 和 DPO 记录里的工具", test_tools_of_rlaif_and_dpo_are_written),
    "last message of an RLAIF record": ("RLAIF 记录的最后一条消息", test_only_an_answer_is_dropped),
    "roles of an RLAIF record": ("RLAIF 记录的角色", test_roles_are_the_record_s),
    "order of turns": ("轮次顺序", test_a_wrong_order_is_rejected),
    "loss of single answers": ("单个回答的损失", test_an_answer_may_have_no_labels),
    "random system prompts and empty thoughts": ("随机系统提示和空思考", test_random_changes_are_drawn_once),
    "long pretraining texts": ("预训练长文本", test_long_texts_are_kept_whole),
    "short pretraining texts": ("预训练短文本", test_short_texts_follow_each_other),
    "empty pretraining texts": ("预训练空文本", test_empty_texts_are_left_out),
    "<code>&lt;\\|endoftext\\|&gt;</code> inside a text": (
        "文本里的 <code>&lt;\\|endoftext\\|&gt;</code>", test_the_padding_token_inside_a_text_has_a_loss,
    ),
    "micro-batches of an update": ("一次更新的 micro-batch 数", test_every_update_has_as_many_micro_batches),
}  # fmt: skip


@pytest.mark.parametrize(("name", "column"), [("data.md", 0), ("data_zh.md", 1)])
def test_each_row_of_the_table_has_a_test(name: str, column: int) -> None:
    lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if "minimind | minimind-ascend |" in line) + 2
    subjects = [line.removeprefix("| ").partition(" | ")[0] for line in lines[start:] if line.startswith("|")]
    assert subjects == [english if column == 0 else row[0] for english, row in ROWS.items()]
