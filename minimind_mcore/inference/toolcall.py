"""Evaluate tool calls: ask, run the calls, and ask again, like MiniMind's eval_toolcall.py, but with scores.

| rate | numerator | denominator |
|---|---|---|
| called | cases with a call | cases that need one |
| right_tool | first call names the expected tool | cases that need a call |
| valid_json | every call of the case is valid | cases with a call |
| complete_arguments | every call has all required arguments | cases with a call |
| exact | tools and arguments of the expected calls are exact | cases that need a call |
| not_called | no call | cases that need none |
| answer_holds_result | the final answer holds every tool result (`held_results`) | cases with a call that ran |

`called`, `right_tool`, `valid_json`, `complete_arguments` and `not_called` are the rates of minimind-ascend's
eval_tool_call.py, except that here a tool without required arguments is complete without any. A call with invalid JSON
counts as a call that is not valid. A case ends with the first reply that calls a tool without a function, as most tools
of public data are. A case whose last reply calls again after `ROUNDS` replies with calls is not exact.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from minimind_mcore.errors import UserError
from minimind_mcore.inference.generation import Generator
from minimind_mcore.inference.held_results import all_held
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inference.prompts import Prompt, PromptEncoder, records
from minimind_mcore.inference.quality import Quality
from minimind_mcore.inference.sampling import SamplingParams
from minimind_mcore.tools.cases import SETS, Case, Expected
from minimind_mcore.tools.parser import TAGS, Call, StreamParser, parse, parse_call
from minimind_mcore.tools.process import Limits, failed
from minimind_mcore.tools.registry import Toolbox, tool_of
from minimind_mcore.tools.tool import Tool

ROUNDS = 3  # maximum number of replies with calls, before the final reply
TOOLCALL = "toolcall"
TIMEOUT = 600.0  # timeout in seconds for a reply of an API
Message = Mapping[str, object]


@dataclass
class Reply:
    """A reply: its parsed text, and the message to append to the conversation."""

    answer: str
    calls: Sequence[Call]
    message: Message
    ids: Sequence[int] | None  # ids of the tokens without the end token; None if a server does not return them
    finished: bool = True


class Backend(Protocol):
    """Generates replies to conversations."""

    def reply(self, conversations: Sequence[tuple[Sequence[Message], Sequence[Message]]]) -> list[Reply]:
        """Reply to pairs of messages and tools."""
        ...


class Local:
    """The model in this process, with greedy decoding."""

    def __init__(self, loaded: Loaded, max_new_tokens: int) -> None:
        self._generator = Generator(loaded, SamplingParams(temperature=0), max_new_tokens)
        self._encoder = PromptEncoder(loaded.tokenizer, raw=False)
        self._tokenizer = loaded.tokenizer

    def reply(self, conversations: Sequence[tuple[Sequence[Message], Sequence[Message]]]) -> list[Reply]:
        """Reply to pairs of messages and tools in one batch."""
        prompts = [Prompt([dict(m) for m in messages], list(tools)) for messages, tools in conversations]
        replies = []
        completions = self._generator.complete([self._encoder(prompt) for prompt in prompts])
        for prompt, completion in zip(prompts, completions, strict=True):
            text = self._tokenizer.decode(completion.ids, skip_special_tokens=True)
            found: StreamParser = parse(text, self._encoder.text(prompt).rstrip().endswith("<think>"))
            replies.append(Reply(found.answer, found.calls, found.message(), completion.ids, completion.finished))
        return replies


@dataclass(frozen=True)
class Api:
    """A server with OpenAI's API: this kit's, or vLLM."""

    base_url: str
    key: str
    model: str
    max_tokens: int
    seed: int

    def reply(self, conversations: Sequence[tuple[Sequence[Message], Sequence[Message]]]) -> list[Reply]:
        """Reply to pairs of messages and tools concurrently."""
        with ThreadPoolExecutor(len(conversations)) as pool:
            return list(pool.map(self._one, conversations))

    def _one(self, conversation: tuple[Sequence[Message], Sequence[Message]]) -> Reply:
        messages, tools = conversation
        body = {"model": self.model, "messages": messages, "tools": tools, "temperature": 0, "seed": self.seed}
        url, headers = f"{self.base_url.rstrip('/')}/chat/completions", {"Content-Type": "application/json"}
        headers["Authorization"] = f"Bearer {self.key}"
        body["max_tokens"] = self.max_tokens
        try:
            try:  # this kit's server and vLLM return the ids; a server that checks field names refuses the field
                choice = _posted(url, headers, body | {"return_token_ids": True})
            except urllib.error.HTTPError as error:
                if error.code not in (400, 422):
                    raise
                choice = _posted(url, headers, body)
            found = choice["message"]
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: status {error.code}: {error.read().decode(errors='replace')[:500]}") from error
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"{url} does not answer as OpenAI's API does: {error!r}; check --api-base-url") from error
        functions = [call["function"] for call in found.get("tool_calls") or []]
        calls = [parse_call(json.dumps({"name": f["name"], "arguments": f["arguments"]})) for f in functions]
        content = found.get("content") or ""
        for function, call in zip(functions, calls, strict=True):
            if call is None:  # arguments that are not JSON count as an invalid call
                content += TAGS["call"][0] + str(function)
        kept = {key: value for key, value in found.items() if key in ("role", "content", "tool_calls") and value}
        done, ids = choice["finish_reason"] != "length", choice.get("token_ids")
        if ids is not None and done:
            ids = ids[:-1]  # the end token, which the local backend does not count
        return Reply(content, [c for c in calls if c], {"content": "", **kept}, ids, done)


def _posted(url: str, headers: Mapping[str, str], body: Mapping[str, object]) -> dict[str, Any]:
    """Send a request. Return the first choice of the response."""
    request = urllib.request.Request(url, json.dumps(body).encode(), dict(headers))
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        choice: dict[str, Any] = json.load(response)["choices"][0]
    return choice


@dataclass
class Outcome:
    """The result of one case.

    Attributes:
        calls: all calls, in order.
        invalid: at least one call was not valid JSON.
        results: results of the calls.
        answer: the last reply.
        rounds: number of replies with calls.
        calls_at_end: the last reply also calls tools, which do not run, because all rounds are used.
        no_function: the model called a tool without a function. The case ended there without a result.
    """

    case: Case
    calls: list[Call] = field(default_factory=list)
    invalid: bool = False
    results: list[str] = field(default_factory=list)
    answer: str = ""
    rounds: int = 0
    calls_at_end: bool = False
    no_function: bool = False

    @property
    def case_tools(self) -> dict[str, Tool]:
        """The tools that the case offers, by name."""
        return {tool.name: tool for tool in map(tool_of, self.case.tools)}

    @property
    def rates(self) -> dict[str, bool]:
        """Return for each applicable rate whether the case counts as a success."""
        expected, called = self.case.calls, bool(self.calls) or self.invalid
        tools = self.case_tools
        found: dict[str, bool] = {}
        if expected:
            first = self.calls[0].name if self.calls else None
            exact = len(self.calls) == len(expected) and not (self.invalid or self.calls_at_end)
            pairs = zip(self.calls, expected, strict=False)
            found = {"called": called, "right_tool": first == expected[0].name}
            found["exact"] = exact and all(_is_exact(tools, call, wanted) for call, wanted in pairs)
        else:
            found["not_called"] = not called
        if called:
            found["valid_json"] = not self.invalid
            found["complete_arguments"] = not self.invalid and all(_is_complete(tools, call) for call in self.calls)
            if not self.no_function:
                found["answer_holds_result"] = all_held(self.answer, tools, self.calls, self.results)
        return found

    def row(self) -> dict[str, object]:
        """Return a line of answers.jsonl."""
        calls = [{"name": call.name, "arguments": call.arguments} for call in self.calls]
        expected = [{"name": call.name, "arguments": call.arguments} for call in self.case.calls]
        found = {"task": self.case.task, "question": self.case.question, "expected": expected, "calls": calls}
        return {**found, "results": self.results, "answer": self.answer, "rounds": self.rounds, **self.rates}


def _filled(tool: Tool, arguments: Mapping[str, object]) -> dict[str, object]:
    """Return arguments under their canonical names, with defaults, and without white space in an expression."""
    defaults = {name: p["default"] for name, p in tool.properties.items() if "default" in p}
    given = {**tool.canonical(defaults), **tool.canonical(arguments)}
    texts = {name: value.strip() for name, value in given.items() if isinstance(value, str)}
    return given | {name: text.replace(" ", "") if name == "expression" else text for name, text in texts.items()}


def _is_exact(tools: Mapping[str, Tool], call: Call, expected: Expected) -> bool:
    if call.name != expected.name or not isinstance(call.arguments, Mapping):
        return False
    tool = tools[call.name]
    return expected.arguments is None or _filled(tool, call.arguments) == _filled(tool, expected.arguments)


def _is_complete(tools: Mapping[str, Tool], call: Call) -> bool:
    tool = tools.get(call.name)
    if tool is None or not isinstance(call.arguments, Mapping):
        return False
    return tool.canonical(dict.fromkeys(tool.required)).keys() <= tool.canonical(call.arguments).keys()


def read_cases(spec: str, seed: int) -> list[Case]:
    """Return the cases of `--task-data-path`: a name of `SETS`, or a file of records with `calls`.

    A record has a conversation with its tools, as for SFT, and {"calls": [{"name": ..., "arguments": {...}}, ...]}.

    Raises:
        UserError: the path is neither a set nor a file, or a record has no tools or calls, or they are not valid.
    """
    if spec in SETS:
        return SETS[spec](seed)
    if not Path(spec).exists():
        raise UserError(f"--task-data-path {spec}: there is no such file; expected one, or {', '.join(SETS)}")
    cases = []
    for where, record, prompt in records(spec, used=("calls", "task")):
        tools = [_checked_tool(tool, where) for tool in prompt.tools or ()]
        calls = record.get("calls")
        if not tools or not isinstance(calls, list):
            raise UserError(
                f'{where}: {"no tools" if not tools else _short(calls) + " under calls"}; expected tools, and "calls": '
                'a list of {"name": ..., "arguments": {...}}. Add them'
            )
        expected = [_expected(call, tools, where) for call in calls]
        cases.append(Case(record.get("task", Path(spec).stem), prompt.messages, prompt.tools or [], expected))
    return cases


def _checked_tool(definition: object, where: str) -> str:
    """Return the name in a definition."""
    function = definition.get("function") if isinstance(definition, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f'{where}: the tool {_short(definition)} is not a definition; expected {{"type": "function", "function": '
            '{"name": ..., "parameters": {...}}}. Correct it'
        )
    return str(function["name"])


def _expected(call: object, tools: Sequence[str], where: str) -> Expected:
    """Return an expected call of a case that offers these tools."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(
            f'{where}: the expected call {_short(call)} has no name; expected {{"name": ..., "arguments": {{...}}}}. '
            "Correct it"
        )
    if call["name"] not in tools:
        raise UserError(
            f"{where}: an expected call names the tool {call['name']!r}, which the case does not offer; expected one "
            f"of {', '.join(tools)}. Correct the name, or add the tool"
        )
    arguments = call.get("arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise UserError(
            f"{where}: the arguments of the expected call of {call['name']!r} are {_short(arguments)}; expected a JSON "
            "object, or none if any arguments are right. Write the object itself, not JSON text"
        )
    return Expected(call["name"], arguments)


def _short(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def evaluate(backend: Backend, cases: Sequence[Case], batch: int, seed: int) -> tuple[list[Outcome], Quality]:
    """Run all cases. Return the result of each case, and the quality of the replies."""
    outcomes, quality = [Outcome(case) for case in cases], Quality()
    with tqdm(total=len(cases), desc=TOOLCALL, unit="case", disable=None) as bar:
        for first in range(0, len(outcomes), batch):
            group = outcomes[first : first + batch]
            _play(backend, group, seed, quality)
            bar.update(len(group))
    return outcomes, quality


def _play(backend: Backend, group: Sequence[Outcome], seed: int, quality: Quality) -> None:
    playing = [(outcome, [dict(message) for message in outcome.case.messages]) for outcome in group]
    for _ in range(ROUNDS + 1):
        if not playing:
            return
        replies = backend.reply([(messages, outcome.case.tools) for outcome, messages in playing])
        going = []
        for (outcome, messages), reply in zip(playing, replies, strict=True):
            quality.add(reply.ids, reply.finished)
            outcome.invalid |= TAGS["call"][0] in reply.answer
            outcome.answer = reply.answer
            if not reply.calls:
                continue
            if outcome.rounds == ROUNDS:
                outcome.calls_at_end = True
                continue
            outcome.rounds += 1
            outcome.calls += reply.calls
            # Without a result the model could only guess, or call again, which the expected calls do not contain.
            outcome.no_function = any(_has_no_function(outcome, call) for call in reply.calls)
            if not outcome.no_function:
                going.append((outcome, [*messages, dict(reply.message), *_results(outcome, reply, seed)]))
        playing = going


def _has_no_function(outcome: Outcome, call: Call) -> bool:
    """Return whether a case offers the tool of a call, but no function runs this tool."""
    tool = Toolbox(list(outcome.case_tools.values())).find(call.name)
    return tool is not None and tool.function is None and tool.remote is None


def _results(outcome: Outcome, reply: Reply, seed: int) -> list[dict[str, object]]:
    """Run the calls of a reply. Return the messages with their results."""
    toolbox = Toolbox(list(outcome.case_tools.values()), Limits(seconds=30), seed)
    found = toolbox.run_all([(call.name, call.arguments) for call in reply.calls])
    texts = [(result or failed("no function runs this tool")).text for result in found]
    outcome.results += texts
    written = reply.message.get("tool_calls")
    ids = [call.get("id") for call in written] if isinstance(written, list) else []
    return [
        {"role": "tool", "content": text, **({"tool_call_id": ids[number]} if ids and ids[number] else {})}
        for number, text in enumerate(texts)
    ]


def summary(outcomes: Sequence[Outcome]) -> dict[str, tuple[int, int]]:
    """Return (numerator, denominator) of each rate: over all cases ("exact"), then per task ("generated: exact")."""
    found: dict[str, tuple[int, int]] = {}
    tasks = list(dict.fromkeys(outcome.case.task for outcome in outcomes))
    for task in ["", *(tasks if len(tasks) > 1 else [])]:
        for outcome in outcomes:
            for rate, counts in outcome.rates.items() if task in ("", outcome.case.task) else ():
                name = f"{task}: {rate}" if task else rate
                right, total = found.get(name, (0, 0))
                found[name] = right + counts, total + 1
    return found
