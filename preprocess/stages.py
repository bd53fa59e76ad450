"""Convert a record in two steps: to texts, and then to sequences of ids.

| stage | a record becomes | too long for --seq-length L |
|---|---|---|
| `Documents` (pretraining) | for each of --json-keys the document's ids | L or more: left out, counted |
| `Conversations` | input_ids, attention_mask, labels; pairs and tasks see `handlers` | see below |

Conversations in the tokenizer's own template are cut to L tokens, as in MiniMind. A template of --prompt-type shortens
question and answer, as in MindSpeed-LLM, and samples that still have L tokens or more are dropped. With packing,
samples of L tokens or more are dropped; with --neat-pack they are cut to L - 1 tokens (one position is kept free, as in
MindSpeed-LLM). Cut and dropped samples are counted. A sample without any label after the cut is dropped too. A task is
never cut. In MiniMind's formats a task is dropped if one of its texts has more than L tokens, in MindSpeed's if one has
L tokens or more.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minimind_mcore.preprocess.dialogues import TEXTS
from minimind_mcore.preprocess.handlers import ChatHandler, Handler
from minimind_mcore.preprocess.indexed import IGNORED
from minimind_mcore.preprocess.messages import Conversation, Unusable
from minimind_mcore.preprocess.options import Options
from minimind_mcore.preprocess.readers import Reject, rejected
from minimind_mcore.preprocess.templates import (
    ChatTemplate,
    Ids,
    Prompter,
    Settings,
    SlotTemplate,
    StepRewards,
    TokenizerTemplate,
    Turns,
    checked,
    template_entry,
)
from minimind_mcore.preprocess.tokenize import Encoder, TokenizerInfo, token_text

# MiniMind changes a conversation at random each time it reads the record (dataset/lm_dataset.py): 20 % get a system
# prompt, and 80 % of the texts with empty thoughts lose them, so that the model learns to answer with and without.
# Here the changes are chosen once, when the data is converted. They depend only on the seed and on the conversation's
# content, not on the order, the shards or the workers: equal conversations get the same changes.
EMPTY_THINK = "<think>\n\n</think>\n\n"
SYSTEM_PROMPTS: Sequence[str] = TEXTS["system prompts"]


@dataclass(frozen=True)
class RandomNumbers:
    """Independent random numbers of one conversation, uniform in [0, 1)."""

    system: float
    prompt: float
    empty_think: float
    thinking: float


def random_numbers(seed: int, conversation: Conversation) -> RandomNumbers:
    """Return the random numbers of a conversation for a seed."""
    content = json.dumps([seed, list(conversation.messages), conversation.tools], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=32).digest()
    return RandomNumbers(*((number >> 11) * 2.0**-53 for number in struct.unpack("<4Q", digest)))


def add_system_prompt(conversation: Conversation, numbers: RandomNumbers, ratio: float) -> Conversation:
    """With probability `ratio` prepend one of MiniMind's system prompts, unless there is a system prompt or tools."""
    if conversation.tools or conversation.messages[0]["role"] == "system" or numbers.system >= ratio:
        return conversation
    message = {"role": "system", "content": SYSTEM_PROMPTS[int(numbers.prompt * len(SYSTEM_PROMPTS))]}
    return replace(conversation, messages=[message, *conversation.messages])


def drop_empty_thoughts(text: str, numbers: RandomNumbers, ratio: float) -> str:
    """Remove all empty thought blocks of a text, or keep all with probability `ratio`."""
    return text if numbers.empty_think < ratio else text.replace(EMPTY_THINK, "")


Sequences = tuple[NDArray[Any], NDArray[np.int64]]


@dataclass(frozen=True)
class Prepared:
    """A record's texts, and in `detail` what the stage's `encode` needs besides their ids."""

    texts: list[str]
    detail: Any = None


@dataclass
class Encoded:
    """The sequences of a batch of records.

    Attributes:
        sequences: by key: consecutive ids, and the number of ids of each sequence; 0 for an empty one.
        too_long: number of records left out for their length.
        truncated: number of records cut.
        unusable: (index in the batch, reason) of records that turned out to be unusable only during encoding.
        beside: for each task a line of JSON for the records file.
    """

    sequences: dict[str, Sequences]
    too_long: int = 0
    truncated: int = 0
    unusable: list[tuple[int, str]] = field(default_factory=list)
    beside: list[bytes] = field(default_factory=list)


class Stage(Protocol):
    """Converts records to sequences.

    Attributes:
        keys: keys of the datasets.
        columns: columns to read from a parquet file. None for all.
        unused: for each key that is not read, the number of records or messages in which it has a value. Counts
            accumulate until the caller clears them.
    """

    keys: tuple[str, ...]
    columns: Sequence[str] | None
    unused: Counter[str]

    def prepare(self, record: Any) -> Prepared | Reject:
        """Return the texts of a record."""
        ...

    def encode(self, batch: Sequence[Prepared]) -> Encoded:
        """Return the sequences of prepared records."""
        ...


def make_stage(options: Options, info: TokenizerInfo, encoder: Encoder) -> Stage:
    """Return the stage of the handler."""
    handler = options.find_handler()
    if isinstance(handler, ChatHandler):
        return Conversations(options, info, encoder, handler)
    return Documents(options, info, encoder, handler)


class Documents:
    """Pretraining: one document per key."""

    def __init__(self, options: Options, info: TokenizerInfo, encoder: Encoder, handler: Handler) -> None:
        self.keys = options.keys
        self.columns: Sequence[str] | None = handler.columns(options.keys)
        self.unused = Counter[str]()
        self._handler = handler
        self._encoder = encoder
        self._frame = info.frame(options.prepend_bos, options.append_eod)
        self._limit = options.seq_length

    def prepare(self, record: Any) -> Prepared | Reject:
        """Return one text per key."""
        texts = self._handler(record, self.keys)
        if isinstance(texts, Reject):
            return texts
        self.unused.update(self._handler.unused(record, self.keys))
        return Prepared(list(texts.values()))

    def encode(self, batch: Sequence[Prepared]) -> Encoded:
        framed = []
        for number in range(len(self.keys)):
            tokens, lengths = self._encoder.encode([prepared.texts[number] for prepared in batch])
            framed.append(frame(tokens, lengths, *self._frame))
        keep = np.ones(len(batch), bool)
        if self._limit is not None:
            keep = np.all([lengths < self._limit for _, lengths in framed], axis=0)
        kept = [(tokens[np.repeat(keep, lengths)], lengths[keep]) for tokens, lengths in framed]
        return Encoded(dict(zip(self.keys, kept, strict=True)), too_long=int((~keep).sum()))


def frame(
    tokens: NDArray[np.uint32], lengths: NDArray[np.int64], before: Sequence[int], after: Sequence[int]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Put begin and end tokens around each document that has tokens. Empty documents stay empty.

    Args:
        tokens: [sum(lengths)] ids.
        lengths: [documents].
        before, after: ids to insert.

    Returns:
        The new ids and lengths.
    """
    framed = lengths + (len(before) + len(after)) * (lengths > 0)
    ends = np.cumsum(framed)[lengths > 0]
    starts = ends - framed[lengths > 0]
    out = np.empty(int(framed.sum()), np.uint32)
    body = np.ones(len(out), bool)
    for place, token in enumerate(before):
        out[starts + place], body[starts + place] = token, False
    for place, token in enumerate(reversed(after), 1):
        out[ends - place], body[ends - place] = token, False
    out[body] = tokens
    return out, framed


class Conversations:
    """Conversations: ids and labels, or the ids of a prompt."""

    def __init__(self, options: Options, info: TokenizerInfo, encoder: Encoder, handler: ChatHandler) -> None:
        self.keys = handler.outputs
        self.columns: Sequence[str] | None = handler.fields
        self.unused = Counter[str]()
        self._handler = handler
        self._chat = options.chat.resolved(handler, info)
        self._encoder = encoder
        eod = options.append_eod and not handler.prompts
        self._eos = [info.eos_id] if eod and info.eos_id is not None else []
        self._template = make_template(options, info, encoder, handler)
        self._most = options.seq_length
        if self._most is not None and not (handler.prompts and handler.minimind):
            cut_before = isinstance(self._template, TokenizerTemplate) and not self._chat.pack and not handler.prompts
            self._most = None if cut_before else self._most - 1

    def prepare(self, record: Any) -> Prepared | Reject:
        """Return the texts of every turn of every side, and for a task its additional texts."""
        if self._handler.prompts and isinstance(record, list):  # the record is the list of turns
            record = {self._handler.columns.get("messages", ""): record}
        sides = self._handler(record)
        if isinstance(sides, Reject):
            return sides
        try:
            asked = [self._change(conversation) for conversation in sides.values()]
            rendered = [self._render(*side) for side in asked]
            beside = None
            if self._handler.prompts:
                beside = self._beside(record, *asked[0][:2], rendered[0])
                rendered += [checked([[text]]) for text in self._handler.extras(record)]
        except Unusable as reason:
            return rejected(str(reason), record)
        self.unused.update(self._handler.unused(record, sides))
        self.unused.update(self._unwritten(sides.values()))
        texts = [piece for turns in rendered for pieces in turns for piece in pieces]
        shape = [[len(pieces) for pieces in turns] for turns in rendered]
        learned = [conversation.learned for conversation, _, _ in asked]
        return Prepared(texts, (shape, beside, learned))

    def _unwritten(self, sides: Collection[Conversation]) -> Iterator[str]:
        """Yield the parts of these conversations that the chat template does not write."""
        for key in self._template.unwritten:
            for side in sides:
                holders = [side.tools] if key == "tools" else [message.get(key) for message in side.messages]
                for held in holders:
                    if held:
                        yield f"{key} (the chat template does not write it)"

    def _change(self, conversation: Conversation) -> tuple[Conversation, bool | None, RandomNumbers]:
        """Return the changed conversation, whether the model should think in its answer to a prompt, and the random
        numbers."""
        chat, numbers = self._chat, random_numbers(self._chat.seed, conversation)
        ratio = chat.thinking_ratio if self._handler.prompts else None
        thinking = numbers.thinking < ratio if ratio is not None else None
        return add_system_prompt(conversation, numbers, chat.system_ratio or 0.0), thinking, numbers

    def _render(self, conversation: Conversation, thinking: bool | None, numbers: RandomNumbers) -> Turns:
        turns = self._template.render(conversation, thinking)
        ratio = self._chat.empty_think_ratio
        if ratio is not None:
            turns = [[drop_empty_thoughts(piece, numbers, ratio) for piece in pieces] for pieces in turns]
        return checked(turns)

    def _beside(self, record: Mapping[str, Any], asked: Conversation, thinking: bool | None, turns: Turns) -> bytes:
        """Return a line of JSON for a task: values that the environment or the reward needs and that ids do not
        contain."""
        prompt = "".join(piece for pieces in turns for piece in pieces)
        own = {"prompt": prompt, "messages": asked.messages, "tools": asked.tools, "open_thinking": thinking}
        others = {key: value for key, value in record.items() if key != self._handler.columns.get("messages")}
        return json.dumps({**others, **own}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

    def encode(self, batch: Sequence[Prepared]) -> Encoded:
        found: dict[str, list[Ids]] = {key: [] for key in self.keys}
        encoded = Encoded({})
        for place, (prepared, sides) in enumerate(zip(batch, self._turns_of(batch), strict=True)):
            if self._handler.prompts:
                self._encode_task(prepared, sides, found, encoded)
                continue
            try:
                labelled = zip(sides, prepared.detail[2], strict=True)
                samples = [self._limited(*self._template.label(turns, learned)) for turns, learned in labelled]
            except Unusable as reason:
                encoded.unusable.append((place, str(reason)))
                continue
            cut = any(cut for _, _, cut in samples)
            if not all(len(ids) and (labels != IGNORED).any() for ids, labels, _ in samples):
                encoded.too_long += cut
                encoded.unusable += [] if cut else [(place, "it has no answer of the assistant to learn")]
                continue
            encoded.truncated += cut
            for key, values in zip(self.keys, self._outputs(samples), strict=True):
                found[key].append(values)
        for key, arrays in found.items():
            lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
            encoded.sequences[key] = (np.concatenate([np.empty(0, np.int32), *arrays]), lengths)
        return encoded

    def _encode_task(
        self, prepared: Prepared, sides: Sequence[Sequence[Ids]], found: Mapping[str, list[Ids]], encoded: Encoded
    ) -> None:
        """Encode a prompt, its mask and its texts. The task is dropped as a whole if one of them is too long."""
        prompt, *extras = (np.concatenate(turns).astype(np.int32) for turns in sides)
        if self._most is not None and max(map(len, (prompt, *extras))) > self._most:
            encoded.too_long += 1
            return
        for key, values in zip(self.keys, (prompt, np.ones(len(prompt), np.int32), *extras), strict=True):
            found[key].append(values)
        encoded.beside.append(prepared.detail[1])

    def _limited(self, ids: Ids, labels: Ids, cut: bool) -> tuple[Ids, Ids, bool]:
        """Return a sample after cutting, and whether it was cut. The result is empty if the sample is dropped."""
        ids, labels = (np.append(part, self._eos).astype(np.int32) for part in (ids, labels))
        if self._most is None or len(ids) <= self._most:
            return ids, labels, cut
        kept = self._most if self._chat.pack == "neat-pack" else 0
        return ids[:kept], labels[:kept], True

    def _outputs(self, samples: Sequence[tuple[Ids, Ids, bool]]) -> list[Ids]:
        """Return the outputs that `keys` name."""
        if self._handler.pairwise:
            return [part for ids, labels, _ in samples for part in (ids, labels)]
        [(ids, labels, _)] = samples
        return [ids, np.ones(len(ids), np.int32), labels]

    def _turns_of(self, batch: Sequence[Prepared]) -> Iterator[list[list[Ids]]]:
        """Yield the ids of each record's sides and turns, in the order of the batch. All texts are encoded at once."""
        tokens, lengths = self._encoder.encode([text for prepared in batch for text in prepared.texts])
        ids = tokens.astype(np.int32)
        ends = [0, *np.cumsum(lengths).tolist()]
        piece = 0
        for prepared in batch:
            sides = []
            for counts in prepared.detail[0]:
                turns = []
                for count in counts:
                    turns.append(ids[ends[piece] : ends[piece + count]])
                    piece += count
                sides.append(turns)
            yield sides


def make_template(options: Options, info: TokenizerInfo, encoder: Encoder, handler: ChatHandler) -> ChatTemplate:
    """Return the tokenizer's own chat template, the template of --prompt-type, or the handler's fixed prompt."""
    if handler.step_rewards:
        return StepRewards(options.chat.placeholder_token, options.chat.reward_tokens)
    if handler.fixed_prompt:
        return Prompter()
    chat, last_only = options.chat, handler.pairwise and not handler.minimind
    if chat.prompt_type is None:
        cut = None if chat.pack or handler.prompts else options.seq_length
        return TokenizerTemplate(info, encoder, cut, last_only, labelled=not handler.prompts)
    entry = template_entry(chat.prompt_type, chat.prompt_type_path)
    bos, eos = (token_text(info.path, token) for token in (info.bos_id, info.eos_id))
    settings = Settings(bos, eos, chat.enable_thinking, options.seq_length, chat.pack == "neat-pack", last_only)
    return SlotTemplate(entry, settings)
