"""Convert a conversation to ids and labels, with the tokenizer's chat template or MindSpeed-LLM's --prompt-type NAME.

    template = TokenizerTemplate(info, encoder, ...)
    turns = template.render(Conversation([{"role": "user", "content": "hi"}, ...]))     # texts to encode
    ids, labels, cut = template.label([encoder.encode(text)[0] for text in turns[0]])   # labels: -100 for no loss

Labels are not shifted, as in MindSpeed-LLM's files. With the tokenizer's template the loss is on the same tokens as in
MiniMind's SFTDataset: on the ids between "<|im_start|>assistant\\n" and "<|im_end|>\\n", and on the ids of
"<|im_end|>\\n" itself. Both markers are found in the ids of the whole text. Templates with other markers, such as that
of a tokenizer without BOS, use their own. (If an answer starts with line breaks that the tokenizer merges with the
marker, the answer has no loss, neither in MiniMind nor here.)

    template = find_template("qwen3", None, thinking=True, ...)

`templates.json` next to this file has some templates. The first four use names that MindSpeed-LLM's --prompt-type
accepts, so that its own programs can read them too (--prompt-type-path):

| name | with | text |
|---|---|---|
| qwen3 | --enable-thinking true | minimind-3's chat template, with equal ids and labels |
| chatml | | MiniMind2's chat template |
| chatml_de | | minimind-3's chat template without thought blocks |
| empty | | only the messages |
| qwen_r1 | | DeepSeek-R1's instruction (arXiv 2501.12948), as in MindSpeed-RL: 157 tokens in minimind-3's tokenizer |
| minimind_r1 | | the same in 40 tokens: the response must start with <think>, which the prompt does not contain |

A template writes the turns of a conversation in pieces, and each piece is encoded separately. Odd turns (user, tool
result) have no loss, even turns (assistant) have. Long conversations are cut so that question and answer share the
available length (mindspeed_llm/tasks/preprocess/templates.py).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minimind_mcore.errors import UserError
from minimind_mcore.paths import PACKAGE
from minimind_mcore.preprocess.indexed import IGNORED
from minimind_mcore.preprocess.messages import PROMPTS, Conversation, Message, Unusable, check_order
from minimind_mcore.preprocess.tokenize import Encoder, TokenizerInfo
from minimind_mcore.preprocess.tokenizer_files import template_source

Ids = NDArray[np.int32]
# Parts that a chat template may ignore. A template that writes a part has its name in the source.
WRITTEN = ("tools", "tool_calls", "reasoning_content")
# The turns of a conversation, each as pieces of text that are encoded separately.
Turns = list[list[str]]


class ChatTemplate(Protocol):
    """Writes conversations and places the loss.

    Attributes:
        unwritten: entries of `WRITTEN` that the template does not write.
    """

    unwritten: frozenset[str]

    def render(self, conversation: Conversation, thinking: bool | None = None) -> Turns:
        """Return the texts of a conversation.

        Args:
            conversation: the messages.
            thinking: None: the conversation is complete. Otherwise the assistant's next turn is opened, and the value
                tells whether the model may think.

        Raises:
            Unusable: the template cannot write this conversation.
        """
        ...

    def label(self, turns: Sequence[Ids], learned: Sequence[bool] = ()) -> tuple[Ids, Ids, bool]:
        """Return ids, labels, and whether something was cut off.

        Args:
            turns: ids of each turn of `render`.
            learned: for each message of the assistant, whether it has a loss. Empty: all have.

        Raises:
            Unusable: messages without loss cannot be located in the ids.
        """
        ...


class TokenizerTemplate:
    """The chat template of the tokenizer, rendered by transformers.

    Args:
        info: the tokenizer.
        encoder: encoder of the same tokenizer.
        seq_length: maximum length.
        last_only: put the loss on the last answer instead of on all.
        labelled: False if only prompts are needed, and `label` is not called.
    """

    def __init__(
        self,
        info: TokenizerInfo,
        encoder: Encoder,
        seq_length: int | None = None,
        last_only: bool = False,
        labelled: bool = True,
    ) -> None:
        from jinja2 import TemplateError

        from minimind_mcore.preprocess.hf_tokenizer import load_tokenizer

        source = template_source(info.path)
        self.unwritten = frozenset(key for key in WRITTEN if key not in source)
        self._tokenizer: Any = load_tokenizer(info.path)
        self._refusal = TemplateError
        (tokens, (size, _)) = encoder.encode(self._marks(info) if labelled else ("", ""))
        self._opening, self._closing = tokens[:size].tolist(), tokens[size:].tolist()
        self._limit = seq_length
        self._first = -1 if last_only else 0

    def _marks(self, info: TokenizerInfo) -> tuple[str, str]:
        """Return the texts before and after an answer: MiniMind's, or for other tokenizers those of the template.

        Raises:
            UserError: the template does not open an answer with a text of its own.
        """
        names = self._tokenizer
        minimind = (f"{names.bos_token}assistant\n", f"{names.eos_token}\n")
        asked, said = {"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}
        try:
            whole = str(names.apply_chat_template([asked, said], tokenize=False))
            question = str(names.apply_chat_template([asked], tokenize=False))
            prompt = str(names.apply_chat_template([asked], tokenize=False, add_generation_prompt=True))
        except self._refusal as error:
            if info.bos_id is not None:  # the template may refuse only this conversation
                return minimind
            raise UserError(
                f"tokenizer {info.path}: its chat template refuses a question and its answer: {error}"
            ) from error
        if info.bos_id is not None and all(mark in whole for mark in minimind):
            return minimind
        # The common prefix of answer and generation prompt is shorter than both, because both may add thoughts.
        count = len(question) if whole.startswith(question) and prompt.startswith(question) else len(whole)
        pairs = zip(whole[count:].partition("ANSWER")[0], prompt[count:], strict=False)
        opening = "".join(first for first, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        closing = whole.rpartition("ANSWER")[2]
        if not opening or not closing:
            raise UserError(
                f"tokenizer {info.path}: its chat template writes {whole!r}; expected a text that opens the answer, "
                "such as <|im_start|>assistant, and one that closes it. Choose another template with --prompt-type"
            )
        return opening, closing

    def render(self, conversation: Conversation, thinking: bool | None = None) -> Turns:
        """Return one text."""
        options = {} if thinking is None else {"add_generation_prompt": True, "open_thinking": thinking}
        try:
            text = self._tokenizer.apply_chat_template(
                list(conversation.messages), tools=conversation.tools, tokenize=False, **options
            )
        except self._refusal as error:
            raise Unusable(f"the tokenizer's chat template refuses it: {error}") from error
        return [[text]]

    def label(self, turns: Sequence[Ids], learned: Sequence[bool] = ()) -> tuple[Ids, Ids, bool]:
        """Cut at the maximum length. A cut answer keeps its loss, as in MiniMind."""
        [ids] = turns
        labels = np.full(len(ids), IGNORED, np.int32)
        answers = self._answers(ids)
        heard = [True] * len(answers) if all(learned) else list(learned)
        if len(heard) != len(answers):  # a text contains MiniMind's markers, or an answer starts with a line break
            raise Unusable(
                f"{len(heard)} answers, of which some have no loss, but the text has {len(answers)} places that look "
                "like the beginning of an answer; remove the template's markers from the texts"
            )
        for (start, stop), kept in list(zip(answers, heard, strict=True))[self._first :]:
            labels[start:stop] = ids[start:stop] if kept else IGNORED
        limit = self._limit
        return ids[:limit], labels[:limit], limit is not None and len(ids) > limit

    def _answers(self, ids: Ids) -> list[tuple[int, int]]:
        """Return for each opening marker the range from its end to the end of the next closing marker, or to the
        end."""
        openings, closings = _positions(ids, self._opening), _positions(ids, self._closing)
        answers, position = [], 0
        for opening in openings:
            if opening < position:  # inside the previous answer
                continue
            start = opening + len(self._opening)
            nearest = np.searchsorted(closings, start)
            position = closings[nearest] + len(self._closing) if nearest < len(closings) else len(ids)
            answers.append((start, position))
        return answers


def _positions(ids: Ids, pattern: Sequence[int]) -> list[int]:
    """Return the positions of a sequence of ids."""
    count = len(ids) - len(pattern) + 1
    if count <= 0:
        return []
    found = ids[:count] == pattern[0]
    for offset, token in enumerate(pattern[1:], 1):
        found &= ids[offset : count + offset] == token
    return [int(place) for place in np.flatnonzero(found)]


def checked(turns: Turns) -> Turns:
    """Return the turns, if every tokenizer can encode them.

    Raises:
        Unusable: a text has half of a surrogate pair.
    """
    try:
        for pieces in turns:
            for piece in pieces:
                piece.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("a lone surrogate or invalid UTF-8 in a message") from error
    return turns


CLASSES = ("Template", "LFDefaultTemplate", "ReasoningTemplate")
TOOL_FORMATS = ("qwen", "qwen3")


@dataclass(frozen=True)
class Settings:
    """Settings besides the template.

    Attributes:
        bos, eos: the tokenizer's tokens.
        thinking: --enable-thinking.
        seq_length, neat_pack: the flags.
        last_only: for pairs: only the last answer has a loss and keeps its thoughts.
    """

    bos: str
    eos: str
    thinking: bool | None = None
    seq_length: int | None = None
    neat_pack: bool = False
    last_only: bool = False


def read_templates(path: str | None) -> dict[str, dict[str, Any]]:
    """Return the templates of a JSON file, or of this kit, by name.

    Raises:
        UserError: the file does not exist, or is not in MindSpeed-LLM's format.
    """
    file = Path(path).expanduser() if path else PACKAGE / "preprocess/templates.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {entry["name"]: entry for entry in entries}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"--prompt-type-path {path}: not a readable list of templates ({error!r})") from error


def template_entry(name: str, path: str | None) -> dict[str, Any]:
    """Return a template's JSON.

    Raises:
        UserError: the template is unknown, or its class is not supported.
    """
    entries = read_templates(path)
    if name not in entries:
        place = path or "the templates that come with this kit (--prompt-type-path names another file)"
        raise UserError(f"--prompt-type {name}: not in {place}, which has {', '.join(entries)}")
    entry = entries[name]
    if entry.get("efficient_eos"):
        raise UserError(
            f"--prompt-type {name}: efficient_eos is not implemented here; write the eos in format_assistant"
        )
    if entry.get("template_class", "Template") not in CLASSES:
        raise UserError(
            f"--prompt-type {name}: template_class {entry['template_class']} is not implemented here; "
            f"expected {', '.join(CLASSES)}"
        )
    return entry


class SlotTemplate:
    """A template of MindSpeed-LLM's format."""

    unwritten = frozenset[str]()  # conversations with parts that it cannot write are rejected

    def __init__(self, entry: Mapping[str, Any], settings: Settings) -> None:
        self._entry = entry
        self._settings = settings
        self._class = entry.get("template_class") or "Template"
        stop_words = entry.get("stop_words") or []
        self._eos = stop_words[0] if entry.get("replace_eos") and stop_words else settings.eos
        self._thought = tuple(entry.get("thought_words") or ("<think>\n", "\n</think>\n\n"))

    def render(self, conversation: Conversation, thinking: bool | None = None) -> Turns:
        """Return a list of pieces for each turn, questions and answers alternating.

        The formats of questions open the answer. A template with thoughts then adds empty ones unless the model
        should think. Other templates leave the choice to the prompt.
        """
        check_order(conversation.messages)
        messages = self._joined_results(conversation.messages)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        opened = thinking is not None
        if not messages or len(messages) % 2 != opened:
            raise Unusable(f"the last message is not {'a question' if opened else 'the assistant' + chr(39) + 's'}")
        head = self._pieces("format_prefix")
        system = system or self._entry.get("default_system") or ""
        system = "".join(system) if isinstance(system, list) else system
        if system or conversation.tools:
            head += self._pieces("format_system", system + self._tools(conversation.tools))
        turns = []
        for number, message in enumerate(messages):
            pieces = head if number == 0 else []
            if number and number % 2 == 0 and self._class != "LFDefaultTemplate":
                pieces = self._pieces("format_separator")
            turns.append(pieces + self._turn(message, number, last=number == len(messages) - 1))
        if self._class == "ReasoningTemplate":
            self._place_thoughts(messages, turns)
            if thinking is False:
                turns[-1] = [*turns[-1], "".join(self._thought)]
        return turns

    @property
    def stop_words(self) -> list[str]:
        """Return the texts that end an answer, besides the tokenizer's eos."""
        return list(self._entry.get("stop_words") or [])

    def _joined_results(self, messages: Sequence[Message]) -> list[Message]:
        """Join consecutive tool results to one message, as LLaMA-Factory does."""
        joined: list[Message] = []
        for message in messages:
            if joined and joined[-1]["role"] == message["role"] == "tool":
                slots = (self._entry.get("format_observation") or {}).get("slots") or []
                if not any(isinstance(slot, str) and "<tool_response>" in slot for slot in slots):
                    raise Unusable(
                        f"several results of tools follow each other, and --prompt-type {self._entry['name']} has no "
                        "way to write them (format_observation: expected <tool_response>)"
                    )
                content = f"{joined[-1]['content']}\n</tool_response>\n<tool_response>\n{message['content']}"
                joined[-1] = {**message, "content": content}
            else:
                joined.append(message)
        return joined

    def _turn(self, message: Message, number: int, last: bool) -> list[str]:
        """Return the pieces of one message."""
        content = message["content"]
        if message["role"] == "assistant":
            if message.get("reasoning_content") is not None:
                content = message["reasoning_content"].join(self._thought) + content
            hidden = self._settings.thinking is False or (self._settings.last_only and not last)
            if self._class == "ReasoningTemplate" and hidden:
                content = self._without_thoughts(content)
            if message.get("tool_calls"):
                return self._pieces("format_function", self._calls(content, message["tool_calls"]))
            return self._pieces("format_assistant", content)
        observed = message["role"] == "tool" and "format_observation" in self._entry
        return self._pieces("format_observation" if observed else "format_user", content, idx=str(number // 2))

    def _pieces(self, name: str, content: str = "", **values: str) -> list[str]:
        """Fill in a format's slots."""
        slots = (self._entry.get(name) or {}).get("slots")
        if slots is None:  # MindSpeed-LLM's defaults
            if name in ("format_prefix", "format_separator"):
                return []
            ended = name in ("format_assistant", "format_function")
            slots = ["{{content}}", ["eos_token"]] if ended else ["{{content}}"]
        pieces = []
        for slot in slots:
            if isinstance(slot, str):
                for key, value in {"content": content, **values}.items():
                    slot = slot.replace("{{" + key + "}}", value, 1)
            elif isinstance(slot, dict):
                slot = slot["token"]
            else:
                slot = self._settings.bos if "bos_token" in slot else self._eos
            pieces += [slot] if slot else []
        return pieces

    def _require_tool_format(self, name: str) -> None:
        found = (self._entry.get(name) or {}).get("tool_format") or "none"
        found = found if isinstance(found, str) else "".join(found)
        if found not in TOOL_FORMATS:
            raise Unusable(
                f"it has tools, and --prompt-type {self._entry['name']} has no way to write them "
                f"({name}: {found}; expected {' or '.join(TOOL_FORMATS)})"
            )

    def _tools(self, tools: list[Any] | None) -> str:
        if not tools:
            return ""
        self._require_tool_format("format_tools")
        whole = [tool if tool.get("type") == "function" else {"type": "function", "function": tool} for tool in tools]
        return PROMPTS["tools"].format(tools="".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in whole))

    def _calls(self, content: str, calls: Sequence[Mapping[str, Any]]) -> str:
        self._require_tool_format("format_function")
        texts = []
        for call in calls:
            function = call.get("function") or call
            arguments = function["arguments"]
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            name = json.dumps(function["name"], ensure_ascii=False)
            texts.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
        answer = content.rpartition("</think>")[2].strip("\n")
        return content + ("\n" if answer else "") + "\n".join(texts)

    def _without_thoughts(self, content: str) -> str:
        start, end = map(re.escape, self._thought)
        return re.sub(f"{start}(.*?){end}", "", content, flags=re.DOTALL).lstrip("\n")

    def _place_thoughts(self, messages: Sequence[Message], turns: Turns) -> None:
        """Add empty thoughts to answers without thoughts: with loss if thinking is on, else without.

        (For pairs MindSpeed-LLM also inserts the chosen answer's before the rejected one, even if that has its own.)
        """
        empty = "".join(self._thought)
        for number in range(len(messages) - 1 if self._settings.last_only else 1, len(messages), 2):
            text = "".join(turns[number])
            if self._thought[0] not in text and self._thought[1] not in text:
                if self._settings.thinking:
                    turns[number].insert(0, empty)
                else:
                    turns[number - 1].append(empty)

    def label(self, turns: Sequence[Ids], learned: Sequence[bool] = ()) -> tuple[Ids, Ids, bool]:
        """Return ids and labels. A pair is never cut, as in MindSpeed-LLM."""
        size = sum(map(len, turns))
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        if self._settings.seq_length is not None and not self._settings.last_only:
            pairs = self._cut(pairs, self._settings.seq_length)
        ids: list[Ids] = []
        labels: list[Ids] = []
        for number, (source, target) in enumerate(pairs):
            hidden = self._settings.last_only and number < len(pairs) - 1
            hidden = hidden or not (all(learned) or learned[number])
            ids += [source, target]
            labels += [np.full(len(source), IGNORED), np.full(len(target), IGNORED) if hidden else target]
        found = np.concatenate(ids)
        return found, np.concatenate(labels), len(found) < size

    def _cut(self, pairs: list[tuple[Ids, Ids]], limit: int) -> list[tuple[Ids, Ids]]:
        """Shorten questions and answers one after another until `limit` is reached."""
        room = limit if self._class == "Template" else limit - 1
        kept = []
        for source, target in pairs:
            if room <= 0:
                break
            share = _share_at_least_one if self._class == "Template" else _share
            sizes = share(len(source), len(target), room)
            source, target = source[: sizes[0]], target[: sizes[1]]
            room -= len(source) + len(target)
            if self._settings.neat_pack:
                sizes = _share(len(source), len(target), limit - 1)
                source, target = source[: sizes[0]], target[: sizes[1]]
            kept.append((source, target))
        return kept


def _share(source: int, target: int, room: int) -> tuple[int, int]:
    """Return the kept lengths of a question and its answer. The shorter one is kept if it is below half the room."""
    if 2 * target < room:
        most = room
    elif 2 * source < room:
        most = room - source
    else:
        most = int(room * (target / (source + target)))
    kept = min(most, target)
    return min(max(room - kept, 0), source), kept


def _share_at_least_one(source: int, target: int, room: int) -> tuple[int, int]:
    """Return the kept lengths of a question and its answer, in proportion to their lengths."""
    most = max(int(room * (target / (source + target))) if source + target else 0, 1)
    return room - min(most, target), most


class StepRewards:
    """The text of a process reward model, a `ChatTemplate` without a template.

    The label of each placeholder is the reward token of its step. Other tokens have no label.

    Args:
        placeholder: the token after each step.
        rewards: the allowed reward tokens. Empty: any.
    """

    unwritten = frozenset[str]()

    def __init__(self, placeholder: str, rewards: Sequence[str]) -> None:
        self._placeholder, self._rewards = placeholder, rewards

    def render(self, conversation: Conversation, thinking: bool | None = None) -> Turns:
        """Return the text, the placeholder and the rewards, each encoded separately."""
        [message] = conversation.messages
        for reward in message["rewards"]:
            if self._rewards and reward not in self._rewards:
                raise Unusable(f"the reward {reward!r} is not in --reward-tokens {' '.join(self._rewards)}")
        return [[message["content"]], [self._placeholder], *([reward] for reward in message["rewards"])]

    def label(self, turns: Sequence[Ids], learned: Sequence[bool] = ()) -> tuple[Ids, Ids, bool]:
        """Return the ids, with labels only on the placeholders."""
        ids, *tokens = turns
        if any(len(token) != 1 for token in tokens):
            raise Unusable("the placeholder or a reward is not one token of the tokenizer")
        places = np.flatnonzero(ids == tokens[0])
        if len(places) != len(tokens) - 1:
            raise Unusable(f"it has {len(places)} placeholders and {len(tokens) - 1} rewards")
        labels = np.full(len(ids), IGNORED, ids.dtype)
        labels[places] = np.concatenate([ids[:0], *tokens[1:]])
        return ids, labels, False


PROMPTER_USER, PROMPTER_ASSISTANT = "### Instruction:", "### Response:"


class Prompter:
    """The fixed prompt of MindSpeed-LLM's first instruction handlers, a `ChatTemplate` that ignores --prompt-type.

    The loss is on the text after the last "### Response:", the answer. Earlier answers are context. The prompt's
    length is that of its text encoded alone, as MindSpeed-LLM counts it.
    """

    unwritten = frozenset[str]()

    def render(self, conversation: Conversation, thinking: bool | None = None) -> Turns:
        """Return the whole text, and the text before the last answer."""
        text = PROMPTS["instruction"]
        for message in conversation.messages:
            text += f"{PROMPTER_USER if message['role'] == 'user' else PROMPTER_ASSISTANT}\n{message['content']}\n"
        return [[text], [text.rpartition(PROMPTER_ASSISTANT)[0] + PROMPTER_ASSISTANT + "\n"]]

    def label(self, turns: Sequence[Ids], learned: Sequence[bool] = ()) -> tuple[Ids, Ids, bool]:
        """Return the ids, with labels only on the last answer."""
        ids, asked = turns
        labels = ids.copy()
        labels[: len(asked)] = IGNORED
        return ids, labels, False
