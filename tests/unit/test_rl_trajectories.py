"""The ids of training are the ids that the engine saw: several turns, tools, thoughts and odd unicode."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from minimind_mcore.errors import UserError
from minimind_mcore.rl.algorithms.actor import actor_loss
from minimind_mcore.rl.algorithms.advantages import gae, group_norm
from minimind_mcore.rl.algorithms.table import algorithm
from minimind_mcore.rl.runtime import batch as batches
from minimind_mcore.rl.runtime.data import RLPrompt
from minimind_mcore.rl.runtime.engines.protocol import Response
from minimind_mcore.rl.runtime.jobs import predicting
from minimind_mcore.rl.runtime.metrics import data_metrics
from minimind_mcore.rl.runtime.trajectory import Trajectory
from minimind_mcore.rl.runtime.turns import TurnRenderer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
ODD = [
    "",
    " ",
    "\n\n",
    "é",
    "e\u0301",
    "한국어",
    "👩‍👩‍👧",
    "\u200b",
    "\ufeff",
    "𝒳",
    "‮rtl",
    "\x00",
    "'\"\\n",
    "</think>",
    "答案：42",
]


@pytest.fixture
def tokenizer(published_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(published_tokenizer)


class FakeEngine:
    """Writes ids of chance, most of which are not what a tokenizer would make of their text."""

    def __init__(self, tokenizer: Any, numbers: random.Random) -> None:
        self.size, self.stop, self.numbers = len(tokenizer), tokenizer.eos_token_id, numbers
        self.seen: list[tuple[list[int], Response]] = []

    def __call__(self, context: NDArray[np.int32], ends: bool = True) -> Response:
        ids = [self.numbers.randrange(3, self.size) for _ in range(self.numbers.randrange(1, 12))]
        ids += [self.stop] if ends else []
        logp = np.array([-self.numbers.random() for _ in ids], np.float32)
        response = Response(np.array(ids, np.int32), logp, ends)
        self.seen.append((context.tolist(), response))
        return response


def text(numbers: random.Random) -> str:
    return "".join(numbers.choice([*ODD, "words of it"]) for _ in range(numbers.randrange(4)))


def said(numbers: random.Random) -> list[dict[str, Any]]:
    """What an environment says: the results of some tools, or the user's next question."""
    if numbers.random() < 0.5:
        return [
            {"role": "tool", "content": json.dumps({"result": text(numbers)}, ensure_ascii=False)} for _ in range(2)
        ]
    return [{"role": "user", "content": text(numbers)}]


def prompt_of(tokenizer: Any, content: str, tools: list[Any] | None, thinking: bool) -> RLPrompt:
    asked = [{"role": "user", "content": content}]
    switches = {"open_thinking": thinking, "enable_thinking": thinking}
    whole = tokenizer.apply_chat_template(asked, tools=tools, tokenize=False, add_generation_prompt=True, **switches)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return RLPrompt(0, np.array(ids, np.int32), {}, {"messages": asked})


def exact(trajectories: Sequence[Trajectory], seen: Sequence[Sequence[tuple[list[int], Response]]]) -> None:
    """Compare a batch with what the engine was given and gave."""
    batch = batches.of(trajectories)
    assert batch.rollout_logp is not None
    for row, turns in enumerate(seen):
        context, last = turns[-1]
        length, start = int(batch.lengths[row]), int(batch.prompt_lengths[row])
        assert batch.tokens[row, :length].tolist() == context + last.ids.tolist()
        mask, logp = np.zeros(length), np.zeros(length, np.float32)
        for given, response in turns:
            place = slice(len(given), len(given) + len(response.ids))
            mask[place], logp[place] = 1, response.logp
        assert batch.mask[row, : length - start].tolist() == mask[start:].tolist()
        assert not batch.mask[row, length - start :].any()
        assert batch.rollout_logp[row, : length - start].tolist() == logp[start:].tolist()
        assert int(batch.policy_lengths[row]) == sum(len(response.ids) for _, response in turns)


def test_training_ids_are_those_of_the_engine_in_300_conversations(tokenizer: Any) -> None:
    numbers = random.Random(0)
    trajectories, seen = [], []
    renderers = {thinking: TurnRenderer(tokenizer, thinking) for thinking in (False, True)}
    for number in range(300):
        thinking, tools = bool(number % 2), TOOLS if number % 3 else None
        engine, turns = FakeEngine(tokenizer, numbers), renderers[thinking]
        trajectory = Trajectory(prompt_of(tokenizer, text(numbers), tools, thinking), seed=number)
        for turn in range(numbers.randrange(1, 5)):
            if turn:
                trajectory.append_observation(turns(said(numbers), tools))
            trajectory.append_response(engine(trajectory.context))
        trajectories.append(trajectory)
        seen.append(engine.seen)
    exact(trajectories, seen)


@pytest.mark.parametrize("closed", [True, False])
def test_ids_equal_the_template_s_where_the_policy_writes_as_the_template_does(tokenizer: Any, closed: bool) -> None:
    """transformers renders the whole conversation; minimind-3's prompt ends in the thought that its template writes."""
    turns = TurnRenderer(tokenizer, thinking=False)
    talk: list[dict[str, Any]] = [{"role": "user", "content": "一加一"}]
    trajectory = Trajectory(prompt_of(tokenizer, "一加一", TOOLS, False), seed=0)
    think = "" if "reasoning_content" in tokenizer.chat_template else "<think>\n\n</think>\n\n"  # MiniMind2: plain text
    for answer, messages in (
        ('<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', [{"role": "tool", "content": "2 👩‍👩‍👧"}]),
        ("It is 2.", [{"role": "user", "content": "谢谢"}]),
        ("Gern.", []),
    ):
        ids = tokenizer(answer + "<|im_end|>" * closed, add_special_tokens=False)["input_ids"]
        trajectory.append_response(Response(np.array(ids, np.int32), np.zeros(len(ids), np.float32), closed))
        talk += [{"role": "assistant", "content": think + answer}, *messages]
        if messages:
            trajectory.append_observation(turns(messages, TOOLS, closed))
    whole = tokenizer.apply_chat_template(talk, tools=TOOLS, tokenize=False)
    expected = tokenizer(whole.rstrip("\n").removesuffix("<|im_end|>" * (not closed)), add_special_tokens=False)
    assert trajectory.context.tolist() == expected["input_ids"]


def test_a_long_run_needs_no_prefix_of_what_the_policy_wrote(tokenizer: Any) -> None:
    """40 turns in which the policy writes the template's own marks: a rendering of them has another beginning."""
    numbers = random.Random(1)
    marks = ["</think>", "<think>", "<tool_call>", "\n", "<|im_start|>", "a"]
    known = [tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in marks]
    turns, engine = TurnRenderer(tokenizer, True), FakeEngine(tokenizer, numbers)
    trajectory = Trajectory(prompt_of(tokenizer, "go", None, True), seed=0)
    talk: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
    rewritten = 0
    for turn in range(40):
        if turn:
            trajectory.append_observation(turns([{"role": "user", "content": str(turn)}]))
        ids = [i for _ in range(5) for i in numbers.choice(known)] + [tokenizer.eos_token_id]
        response = Response(np.array(ids, np.int32), np.full(len(ids), -0.5, np.float32), True)
        engine.seen.append((trajectory.context.tolist(), response))
        trajectory.append_response(response)
        content = tokenizer.decode(ids, skip_special_tokens=True)
        talk += [{"role": "assistant", "content": content}, {"role": "user", "content": str(turn + 1)}]
        again = tokenizer.apply_chat_template(talk, tokenize=False)
        begins = tokenizer(again, add_special_tokens=False)["input_ids"][: len(trajectory.context)]
        rewritten += begins != trajectory.context.tolist()
    assert rewritten > 30  # such an assertion would have ended the run
    exact([trajectory], [engine.seen])


def test_no_token_of_the_user_is_supervised_where_positions_in_a_rendering_would_be(tokenizer: Any) -> None:
    """A mask from the lengths of renderings covers tokens of the user as soon as ids and text are not inverse."""
    engine, turns = FakeEngine(tokenizer, random.Random(2)), TurnRenderer(tokenizer, False)
    trajectory = Trajectory(prompt_of(tokenizer, "go", None, False), seed=0)
    written = []
    for turn in range(3):
        if turn:
            trajectory.append_observation(turns([{"role": "user", "content": "secret question"}]))
        written.append(engine(trajectory.context))
        trajectory.append_response(written[-1])
    batch = batches.of([trajectory])
    trained = batch.responses[0][batch.mask[0].bool()].tolist()
    assert trained == [i for response in written for i in response.ids.tolist()]
    # By positions of re-tokenized text:
    lengths = [len(tokenizer(tokenizer.decode(r.ids), add_special_tokens=False)["input_ids"]) for r in written]
    assert lengths != [len(response.ids) for response in written]


class Foreign:
    """A tokenizer with another chat template."""

    eos_token, name_or_path = "</s>", "foreign"

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.backend_tokenizer = tokenizer.backend_tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, chat_template=self.template, **options))


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            "{% for m in messages %}[{{ m.role }}{{ loop.revindex }}]{{ m.content }}</s>{% endfor %}",
            "changes the turns",
        ),
        (PLAIN.replace("</s>", "<eot>"), "does not end with the end token '</s>'"),
        ("{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN, "no tools"),
    ],
)
def test_a_template_that_does_not_only_append_is_refused(tokenizer: Any, template: str, why: str) -> None:
    turns = TurnRenderer(Foreign(tokenizer, template))
    with pytest.raises(UserError, match=f"foreign: .*{why}"):
        turns([{"role": "tool", "content": "2"}])
    plain = TurnRenderer(Foreign(tokenizer, PLAIN))([{"role": "tool", "content": "2"}])
    assert tokenizer.decode(plain) == "[tool]2</s>"


@pytest.mark.parametrize("role", ["tool", "user"])
def test_added_tokens_in_what_an_environment_says_are_text(tokenizer: Any, role: str) -> None:
    """A tool whose output contains <|im_end|> or <tool_call> neither ends its turn nor calls a tool."""
    turns, added = TurnRenderer(tokenizer, thinking=False), tokenizer.backend_tokenizer.get_added_tokens_decoder()
    expected = [token for token in turns([{"role": role, "content": "x"}], TOOLS) if token in added]
    for token in added.values():
        content = f"a{token.content}b {token.content}"
        ids = turns([{"role": role, "content": content}], TOOLS).tolist()
        assert [token for token in ids if token in added] == expected, content
        assert content in tokenizer.decode(ids, skip_special_tokens=False)


def routed(context: int, ids: list[int], expert: int) -> Response:
    """A response to a context of some tokens, all of which went to experts `expert` and `expert` + 1."""
    routes = np.full((context + len(ids) - 1, 3, 2), [expert, expert + 1], np.uint8)
    return Response(np.array(ids, np.int32), np.zeros(len(ids), np.float32), False, routes)


def test_a_token_keeps_the_experts_of_the_weights_that_wrote_it() -> None:
    """Newer weights read the earlier segments again, and choose other experts for their tokens."""
    prompt = RLPrompt(0, np.array([5, 6], np.int32), {}, {})
    trajectory = Trajectory(prompt, seed=0)
    trajectory.append_response(routed(2, [1, 2, 3], expert=4))
    trajectory.append_observation(np.array([40, 41], np.int32))
    trajectory.append_response(routed(7, [7, 8], expert=6))
    assert trajectory.routes is not None and trajectory.routes[:, 0, 0].tolist() == [4] * 4 + [6] * 4
    trajectory.append_observation(np.array([42, 43], np.int32))  # no engine reads these
    other = Trajectory(prompt, seed=1)
    other.append_response(routed(2, [9], expert=2))
    routes = batches.of([trajectory, other]).routes
    assert routes is not None and routes.shape == (2, 11, 3, 2)
    assert routes[0, :, 2].tolist() == [[4, 5]] * 4 + [[6, 7]] * 4 + [[0, 1]] * 3
    assert routes[1, :, 2].tolist() == [[2, 3]] * 2 + [[0, 1]] * 9
    bare = Trajectory(prompt, seed=2)
    bare.append_response(Response(np.array([9], np.int32), np.zeros(1, np.float32), True))
    with pytest.raises(RuntimeError, match="1 of 2 responses have routes"):
        batches.of([bare, other])


def mixed() -> batches.Batch:
    """Two responses: 2 tokens of the policy, 2 of an environment, 1 of the policy; and 1 of the policy."""
    prompt = RLPrompt(0, np.array([5, 6], np.int32), {}, {})
    found = []
    for turns in ([[1, 2], [40, 41], [3]], [[9]]):
        trajectory = Trajectory(prompt, seed=0)
        for place, ids in enumerate(turns):
            array = np.array(ids, np.int32)
            if place % 2:
                trajectory.append_observation(array)
            else:
                trajectory.append_response(Response(array, np.full(len(ids), -0.5, np.float32), True))
        found.append(trajectory)
    return batches.of(found)


def test_tokens_of_an_environment_are_neither_counted_nor_trained() -> None:
    batch = dataclasses.replace(mixed(), rewards=torch.tensor([1.0, 0.0]))
    assert batch.mask.tolist() == [[1, 1, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [7, 3] and batch.policy_lengths.tolist() == [3, 1]
    metrics = data_metrics("grpo", batch)
    assert (metrics["response_length/mean"], metrics["response_length/max"]) == (2.0, 3.0)
    row, place = predicting(batch)
    assert list(zip(row.tolist(), place.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 5), (1, 1)]
    small = batch.select(torch.tensor([1]))
    assert small.mask.tolist() == [[1]]
    assert batches.concat([batch.select(torch.tensor([0])), small]).mask.tolist() == batch.mask.tolist()


def test_loss_kl_and_advantages_are_those_of_the_policy_s_tokens_alone() -> None:
    """Whatever stands at the environment's tokens, the result is that of the tokens without them."""
    batch = mixed()
    rewards, inside = torch.tensor([1.0, 0.0]), batch.mask.bool()
    numbers = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(2, 5, generator=numbers) for name in ("logp", "old_logp", "ref_logp", "values")}
    closed, mask = {}, torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    for name, values in whole.items():
        kept = torch.zeros(2, 3)
        kept[mask.bool()] = values[inside]
        closed[name] = kept
        values[~inside] = torch.nan if name != "values" else 77.0
    chosen = algorithm("grpo")
    for name, (columns, where) in {"open": (whole, batch.mask), "closed": (closed, mask)}.items():
        advantages = group_norm(rewards, where, 2)
        loss, stats = actor_loss(
            chosen, columns["logp"], advantages, where, old_logp=columns["old_logp"], ref_logp=columns["ref_logp"]
        )
        gained, returns = gae(rewards[:, None] * where, columns["values"], where)
        row = [loss, stats["actor/kl_loss"], *gained[where.bool()], *returns[where.bool()], *advantages[where.bool()]]
        closed[name] = torch.stack(row)
    assert torch.allclose(closed["open"], closed["closed"])
