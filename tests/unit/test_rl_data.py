"""Tasks for reinforcement learning: what is written of each format, the sample, the reader, verl's files."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from minimind_mcore.errors import UserError
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.preprocess import train_tokenizer
from minimind_mcore.preprocess.convert import convert
from minimind_mcore.preprocess.math_problems import FORGETS, careless, carries, problems, unseen_problems
from minimind_mcore.preprocess.options import ChatOptions, Options
from minimind_mcore.rl.config.load import compose, resolve
from minimind_mcore.rl.rewards.verifiers import VERIFIERS
from minimind_mcore.rl.runtime.data import PromptDataset
from minimind_mcore.rl.verl.export import export

R1 = "R1AlpacaStyleInstructionHandler"
COLUMNS = {"prompt": "question", "query": "", "response": "answer"}
QUESTION = "What is 1+1?"
ASKED, EMPTY = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ""}
ORZ = [{"from": "human", "value": QUESTION}, {"from": "assistant", "ground_truth": {"value": "2"}}]
SHAREGPT = {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "2"}]}
FORMATS: list[tuple[str, Any]] = [
    (R1, {"question": QUESTION, "answer": "2"}),
    (R1, {"question": QUESTION, "answer": ["2"]}),
    ("R1SharegptStyleInstructionHandler", SHAREGPT),
    ("Math17kAlpacaStyleInstructionHandler", {"prompt": [ASKED], "reward_model": {"ground_truth": "2"}}),
    ("OrzMathHandler", ORZ),
    ("MiniMindMathHandler", {"conversations": [ASKED, EMPTY], "gt": ["2"]}),
]


def written(folder: Path, tokenizer: str, records: list[Any], handler: str = R1, **options: Any) -> str:
    """The prefix of converted records."""
    source = folder / "raw.json"
    source.write_text(json.dumps(records))
    given = {"map_keys": COLUMNS if handler == R1 else None, "prompt_type": "chatml_de"}
    chat = ChatOptions(**{**given, **options.pop("chat", {})})
    convert(Options(str(source), tokenizer, str(folder / "rl"), handler=handler, chat=chat, **options))
    return str(folder / "rl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that the kit trained."""
    folder = str(tmp_path_factory.mktemp("tokenizer") / "tk")
    train_tokenizer.save(train_tokenizer.train(iter(["assistant user system 你好 " * 9]), 310), folder)
    return folder


@pytest.fixture(scope="module")
def decode(tokenizer: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer).decode


@pytest.mark.parametrize(("handler", "record"), FORMATS, ids=[f"{case[0]}-{i}" for i, case in enumerate(FORMATS)])
def test_every_format_becomes_a_prompt_and_its_answer(
    handler: str, record: Any, tmp_path: Path, tokenizer: str, decode: Any
) -> None:
    [prompt] = itertools.islice(PromptDataset(written(tmp_path, tokenizer, [record], handler)).batches(1), 1)
    assert decode(prompt[0].ids) == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert decode(prompt[0].columns["labels"]) == "2"
    assert prompt[0].record["messages"][-1] == {"role": "user", "content": QUESTION}


def test_templates_open_the_answer_or_the_thought(tmp_path: Path, tokenizer: str, decode: Any) -> None:
    ends = {}
    for name, options in (
        ("minimind_r1", {"prompt_type": "minimind_r1"}),
        ("empty thought", {"prompt_type": "qwen3"}),
        ("thought", {"prompt_type": "qwen3", "enable_thinking": True}),
        ("own", {"prompt_type": None}),
    ):
        (tmp_path / name).mkdir()
        prefix = written(tmp_path / name, tokenizer, [{"question": "a", "answer": "b"}], chat=options)
        ends[name] = decode(PromptDataset(prefix)[0].ids).rpartition("<|im_start|>assistant\n")[2]
    assert ends == {
        "minimind_r1": "",
        "empty thought": "<think>\n\n</think>\n\n",
        "thought": "",
        "own": "<think>\n\n</think>\n\n",
    }


def test_a_response_that_follows_minimind_r1_earns_the_format_rewards() -> None:
    response = "<think>1+1 is 2</think><answer>\\boxed{2}</answer>"
    assert {name: VERIFIERS[name].score(response, "2") for name in ("format", "strict_format", "base_acc")} == {
        **{"format": 1.0, "strict_format": 1.0, "base_acc": 1.0}
    }


BAD: list[tuple[Any, str]] = [
    ({"question": "a", "answer": ""}, "its answer is empty"),
    ({"question": "a", "answer": ["1", "2"]}, "has 2 answers"),
    ({"question": "a"}, "field 'answer' is missing"),
    ({"question": "a", "answer": "b", "level": 3}, "field 'level' is not a string"),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=[case[1] for case in BAD])
def test_records_without_an_answer_are_rejected_with_the_reason(
    record: Any, reason: str, tmp_path: Path, tokenizer: str
) -> None:
    chat = {"additional_keys": ("labels", "level")} if "level" in record else {}
    good = {"question": "a", "answer": "b", "level": "easy"}
    prefix = written(tmp_path, tokenizer, [good, record, good], max_reject_rate=0.5, chat=chat)
    assert reason in json.loads(Path(f"{prefix}.rejects.jsonl").read_text())["reason"]
    assert len(PromptDataset(prefix)) == 2


def test_history_stays_and_what_is_too_long_is_left_out_whole(tmp_path: Path, tokenizer: str, decode: Any) -> None:
    records = [
        {"question": "c", "answer": "d", "history": [["a", "b"]]},
        {"question": "long " * 60, "answer": "d"},
        {"question": "c", "answer": "long " * 60},
    ]
    prefix = written(tmp_path, tokenizer, records, chat={"map_keys": {**COLUMNS, "history": "history"}}, seq_length=50)
    [prompt] = [PromptDataset(prefix)[0]]
    assert "a<|im_end|>" in decode(prompt.ids) and "b<|im_end|>" in decode(prompt.ids)
    assert len(PromptDataset(prefix)) == 1


# The reader


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> str:
    records = [{"question": "x " * (number % 5), "answer": str(number), "level": "easy"} for number in range(20)]
    return written(tmp_path_factory.mktemp("rl"), tokenizer, records, chat={"additional_keys": ("labels", "level")})


def taken(dataset: PromptDataset, size: int, count: int, start: int = 0) -> list[int]:
    return [prompt.index for batch in itertools.islice(dataset.batches(size, start), count) for prompt in batch]


def test_an_epoch_has_every_prompt_once_and_a_resumed_run_goes_on(prefix: str) -> None:
    whole = taken(PromptDataset(prefix, seed=1), 3, 20)
    assert sorted(whole[:20]) == sorted(whole[20:40]) == list(range(20)) and whole[:20] != whole[20:40]
    for start in (3, 19, 20, 41):
        assert taken(PromptDataset(prefix, seed=1), 3, 5, start) == whole[start : start + 15]
    assert taken(PromptDataset(prefix, seed=2), 3, 5) != whole[:15]
    assert taken(PromptDataset(prefix, shuffle=False), 4, 2) == list(range(8))


def test_long_prompts_are_left_out_and_counted(prefix: str) -> None:
    lengths = np.array([len(prompt.ids) for prompt in (PromptDataset(prefix, shuffle=False)[i] for i in range(20))])
    limit = int(np.median(lengths))
    kept = PromptDataset(prefix, max_prompt_length=limit)
    assert (len(kept), kept.too_long) == ((lengths <= limit).sum(), (lengths > limit).sum())
    with pytest.raises(UserError, match="no prompt is left of 20: 20 are longer than max_prompt_length 1"):
        PromptDataset(prefix, max_prompt_length=1)


def test_a_split_divides_the_files(prefix: str) -> None:
    parts = [
        taken(PromptDataset(prefix, split="50,30,20", part=part, shuffle=False), 1, size)
        for part, size in enumerate((10, 6, 4))
    ]
    assert list(itertools.chain(*parts)) == list(range(20))
    assert len(PromptDataset(prefix, split="100,0,0")) == 20


def test_columns_are_those_that_were_asked_for(prefix: str, decode: Any) -> None:
    prompt = PromptDataset(prefix, ("labels", "level"), shuffle=False)[7]
    assert {key: decode(ids) for key, ids in prompt.columns.items()} == {"labels": "7", "level": "easy"}
    assert prompt.record["answer"] == "7"
    with pytest.raises(UserError, match=r"no column categories.*it has attention_mask, input_ids, labels, level"):
        PromptDataset(prefix, ("categories",))
    with pytest.raises(UserError, match="no prompts there"):
        PromptDataset(f"{prefix}x")


# The sample


def test_unseen_sums_are_in_no_sample_in_either_order() -> None:
    seen, unseen = problems(42), unseen_problems(42)
    pairs = [{tuple(sorted(re.findall(r"\d+", row["question"]))) for row in rows} for rows in (seen, unseen)]
    assert not pairs[0] & pairs[1]
    assert {row["task"] for row in seen} == {row["task"] for row in unseen} == {"addition", "story"}
    assert problems(42) == seen


def test_the_careless_teacher_forgets_only_carries_and_not_always() -> None:
    right: dict[bool, list[float]] = {True: [], False: []}
    for record, dialogue in zip(problems(42), careless(42, len(problems(42))), strict=True):
        question, answer = (message["content"] for message in dialogue["conversations"])
        assert question == record["question"]
        a, b = map(int, re.findall(r"\d+", question))
        assert record["answer"] == str(a + b) and answer in (f"\\boxed{{{a + b}}}", f"\\boxed{{{a + b - 10}}}")
        right[carries(a, b)].append(VERIFIERS["math_17k_acc"].score(answer, record["answer"]))
    assert set(right[False]) == {1.0}
    assert abs(np.mean(right[True]) - (1 - FORGETS)) < 0.04


# verl


def test_verl_gets_the_ids_the_answers_and_the_weights(prefix: str, tokenizer: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PRESETS["minimind3_tiny"].hf_config())
    model.save_pretrained(tmp_path / "hf")
    overrides = [
        f"actor_config.load={tmp_path}/hf",
        f"megatron_training.data_path={prefix}",
        f"megatron_training.tokenizer_name_or_path={tokenizer}",
    ]
    config = resolve(compose("grpo_minimind_tiny", overrides, device="none"))
    export(config, "tiny", tmp_path / "verl")
    exported = AutoTokenizer.from_pretrained(tmp_path / "verl" / "model")
    rows = pyarrow.parquet.read_table(tmp_path / "verl" / "train.parquet").to_pylist()
    data = PromptDataset(prefix, shuffle=False)
    for place, row in enumerate(rows):
        text = exported.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        assert exported(text, add_special_tokens=False)["input_ids"] == data[place].ids.tolist()
        assert row["reward_model"]["ground_truth"] == str(place)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "verl" / "model").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    script = (tmp_path / "verl" / "run.sh").read_text()
    assert "actor_rollout_ref.rollout.n=8" in script and "data.train_batch_size=32" in script
    scope: dict[str, Any] = {}
    exec((tmp_path / "verl" / "reward.py").read_text(), scope)
    assert [scope["compute_score"]("x", f"\\boxed{{{n}}}", "2") for n in (2, 3)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [("minimind_ascend_spo", "spo is not in verl's main_ppo"), ("dapo_minimind3", "the penalty cannot be exported")],
)
def test_verl_without_the_algorithm_is_refused(name: str, message: str, tmp_path: Path) -> None:
    config = resolve(compose(name, device="none"))
    with pytest.raises(UserError, match=message):
        export(config, "x", tmp_path / "verl")
    assert not (tmp_path / "verl").exists()
