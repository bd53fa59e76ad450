"""Continuous batching: requests join and leave a running batch.

One thread owns the model. Each of its rounds admits waiting sequences, runs a piece of the prompts of those that are
new, and then one step of all that are running. A sequence that has ended leaves at once.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_mcore.inference.detokenizer import Detokenizer
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inference.sampling import Logprob, Sampler, SamplingParams, choose, logprobs
from minimind_mcore.serve.metrics import ServerMetrics
from minimind_mcore.serve.slots import Slots
from minimind_mcore.tools.parser import partial_tag

logger = logging.getLogger(__name__)
CHUNK = 512  # tokens of prompts that a round runs: what the running sequences wait for


class QueueFull(Exception):
    """So many sequences wait that no further one is taken."""


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer.

    Attributes:
        text: that is certain now.
        ids: the token; none at the end.
        logprob: of the token, where the request asks for it.
        finish: "stop", "length", "abort" or "error" at the end, else None.
        stop_reason: the stop string, or the id besides eos, that ended the answer.
    """

    text: str
    ids: tuple[int, ...] = ()
    logprob: Logprob | None = None
    finish: str | None = None
    stop_reason: str | int | None = None


@dataclass(kw_only=True)
class Stops:
    """What ends an answer.

    Attributes:
        eos: ids that end it.
        ids: further ids of the request.
        texts: strings of the request.
        max_tokens: at most.
        keep_text: the stop string is part of the answer.
        skip_special_tokens: leave the texts of special tokens out.
    """

    eos: frozenset[int]
    ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()
    max_tokens: int
    keep_text: bool = False
    skip_special_tokens: bool = True


class Sequence:
    """One answer to a prompt, while it is written.

    Args:
        prompt: ids.
        sampling: how tokens are chosen.
        stops: what ends it.
        emit: called by the scheduler's thread with new pieces.
        stream: pieces are emitted as they come; else all at the end.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        stops: Stops,
        emit: Callable[[list[Piece]], None],
        stream: bool = True,
    ) -> None:
        self.prompt, self.stops, self.emit, self.stream = prompt, stops, emit, stream
        self.sampler = Sampler(sampling, self.prompt)
        self.ids: list[int] = []
        self.cancelled = False
        self.finished = False
        self.submitted = time.monotonic()
        self.first: float | None = None  # time of the first token
        self.used = 0  # number of the last round that this one's slot was in use
        self._pieces: list[Piece] = []
        self._detokenizer: Detokenizer | None = None
        self._held = ""  # text that may begin a stop string

    def add(self, token: int, logprob: Logprob | None, loaded: Loaded) -> None:
        """Take a token that was chosen."""
        stops, grammar = self.stops, self.sampler.settings.grammar
        self._detokenizer = self._detokenizer or Detokenizer(loaded.tokenizer, stops.skip_special_tokens)
        self.ids.append(token)
        if grammar is not None:
            grammar.accept(token)
        enough = len(self.ids) >= self.sampler.settings.min_tokens
        if enough and (token in stops.eos or token in stops.ids):
            reason = None if token in stops.eos else token
            self._end(self._detokenizer.end(), token, logprob, "stop", reason)
            return
        text = self._detokenizer.add(token)
        if len(self.ids) >= stops.max_tokens:
            text += self._detokenizer.end()
        found = self._stop_string(text) if enough else None
        if found is not None:
            before, stop = found
            self._held = ""
            self._end(before, token, logprob, "stop", stop)
        elif len(self.ids) >= stops.max_tokens:
            self._end(text, token, logprob, "length", None)
        else:
            text = self._held + text
            keep = partial_tag(text, stops.texts) if stops.texts else 0
            self._held = text[len(text) - keep :]
            self._give(Piece(text[: len(text) - keep], (token,), logprob))

    def _stop_string(self, text: str) -> tuple[str, str] | None:
        """The text before the first stop string, and that string."""
        whole = self._held + text
        place, stop = min(((whole.find(stop), stop) for stop in self.stops.texts if stop in whole), default=(-1, ""))
        if place < 0:
            return None
        return whole[: place + (len(stop) if self.stops.keep_text else 0)], stop

    def _end(self, text: str, token: int, logprob: Logprob | None, finish: str, reason: str | int | None) -> None:
        self.finished = True
        self._give(Piece(self._held + text, (token,), logprob, finish, reason))

    def fail(self, finish: str) -> None:
        """End without an answer: "abort" or "error"."""
        self.finished = True
        self._give(Piece("", finish=finish))

    def _give(self, piece: Piece) -> None:
        self._pieces.append(piece)
        if self.stream or self.finished:
            pieces, self._pieces = self._pieces, []
            self.emit(pieces)


@dataclass
class Counts:
    """Sequences by state, for metrics and for the end of the server."""

    running: int = 0
    waiting: int = 0


class Scheduler:
    """Runs sequences on one model.

    Args:
        loaded: the model.
        max_batch_size: sequences that run at a time.
        max_queue: sequences that may wait.
        budget: positions of keys and values that memory is used for.
        metrics: counters.
        flush: called after each round, when sequences have emitted pieces.
    """

    def __init__(
        self,
        loaded: Loaded,
        max_batch_size: int,
        max_queue: int,
        budget: int,
        metrics: ServerMetrics,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        self._flush = flush
        self.loaded, self.max_batch_size, self.max_queue, self.metrics = loaded, max_batch_size, max_queue, metrics
        self.slots = Slots(loaded.decoder, budget)
        self.running: list[Sequence] = []  # in slots 0, 1, ...; those whose prompt is not done come last
        self.ready = 0  # how many of them have their whole prompt in the slot
        self.waiting: collections.deque[Sequence] = collections.deque()
        self._round = itertools.count(1)
        self._ages: list[int] = []  # of each slot: the round that used it last
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin to run sequences."""
        self._thread.start()

    def close(self) -> None:
        """End; what is unfinished is aborted."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether sequences are run."""
        return self._thread.is_alive() and not self._stopping

    def counts(self) -> Counts:
        """How many sequences run and wait."""
        return Counts(len(self.running), len(self.waiting))

    def submit(self, sequences: SequenceOf[Sequence]) -> None:
        """Queue sequences.

        Raises:
            QueueFull: the queue cannot take all of them.
        """
        with self._changed:
            # A free place in the batch is none in the queue.
            free = self.max_batch_size - len(self.running)
            if len(self.waiting) + len(sequences) > self.max_queue + max(free, 0) or self._stopping:
                raise QueueFull(f"{len(self.waiting)} requests wait already")
            self.waiting.extend(sequences)
            self._changed.notify()

    def cancel(self, sequences: SequenceOf[Sequence]) -> None:
        """Stop sequences whose client has left."""
        with self._changed:
            for sequence in sequences:
                sequence.cancelled = True
            self._changed.notify()

    @torch.inference_mode()
    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self.running or self.waiting or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    for sequence in [*self.running, *self.waiting]:
                        sequence.fail("abort")
                    self.running.clear()
                    self.waiting.clear()
                    self._flush()
                    return
            try:
                self._step()
            except Exception as problem:  # a lack of memory, say: the requests at hand fail, the server goes on
                report(logger, f"a step failed; {len(self.running)} answers end with an error", problem)
                for sequence in self.running:
                    if not sequence.finished:
                        sequence.fail("error")
                self.running, self.ready = [], 0
                self.slots = Slots(self.loaded.decoder, self.slots.budget)
            self._flush()

    def _step(self) -> None:
        """One round."""
        now = next(self._round)
        self._leave()
        self._admit(now)
        if self.ready < len(self.running):
            self._prefill()
            self._leave()
        if self.ready:
            self._make_room()
            rows = self.running[: self.ready]
            self._advance(0, rows, [[sequence.ids[-1]] for sequence in rows])
        self.metrics.batch(len(self.running), len(self.waiting))

    def _leave(self) -> None:
        """Take out what has ended or whose client has left, from the last slot to the first."""
        for number in reversed(range(len(self.running))):
            sequence = self.running[number]
            if sequence.cancelled and not sequence.finished:
                sequence.fail("abort")
            if sequence.finished:
                self._remove(number)
        with self._changed:
            left = [sequence for sequence in self.waiting if sequence.cancelled]
            for sequence in left:
                self.waiting.remove(sequence)
                sequence.fail("abort")

    def _remove(self, number: int) -> None:
        """Take a sequence out; its slot goes behind those in use."""
        if number < self.ready:
            self.ready -= 1
            self._swap(number, self.ready)
            number = self.ready
        self._swap(number, len(self.running) - 1)
        self.running.pop()
        self.slots.used = len(self.running)

    def _swap(self, first: int, second: int) -> None:
        """Exchange two running sequences."""
        self.slots.swap(first, second)
        self.running[first], self.running[second] = self.running[second], self.running[first]

    def _admit(self, now: int) -> None:
        """Give waiting sequences a slot while there are memory and places."""
        while self.waiting and len(self.running) < self.max_batch_size:
            with self._changed:
                if not self.waiting:
                    return
                sequence = self.waiting[0]
                ids = [*sequence.prompt, *sequence.ids]  # with ids, if it had to give its slot back
                longest = max([len(ids) + 1, *(len(s.prompt) + len(s.ids) + 1 for s in self.running)])
                number, room = len(self.running), max(longest, self.slots.room)
                if not self.slots.fits(number + 1, room):
                    if self.running and not self.slots.fits(number + 1, longest):
                        return
                    self.slots.shrink(number, longest)
                    room = longest
                self.waiting.popleft()
            self.running.append(sequence)
            self.slots.used = number + 1
            self._place(ids, number, room, now)

    def _place(self, ids: list[int], number: int, room: int, now: int) -> None:
        """Find a slot for a prompt, if possible one that has its beginning, and make it slot `number`."""
        slots = self.slots
        self._ages += [0] * (len(slots.tokens) - len(self._ages))
        shared = [_common(tokens, ids) for tokens in slots.tokens]
        idle = range(number, len(slots.tokens))
        chosen = max(idle, key=lambda slot: shared[slot], default=None)
        best = max(range(number), key=lambda slot: shared[slot], default=None)
        if chosen is None or not shared[chosen]:
            if len(slots.tokens) < self.max_batch_size and slots.fits(len(slots.tokens) + 1, room):
                slots.reserve(len(slots.tokens) + 1, room)
                chosen = len(slots.tokens) - 1
            elif chosen is not None:
                chosen = min(idle, key=lambda slot: self._ages[slot])
        if chosen is None or chosen >= len(slots.tokens):
            slots.reserve(number + 1, room)
            chosen = number
        self._ages += [0] * (len(slots.tokens) - len(self._ages))
        slots.swap(chosen, number)
        self._ages[chosen], self._ages[number] = self._ages[number], now
        kept = _common(slots.tokens[number], ids)
        if best is not None and shared[best] > kept:
            kept = shared[best]
            slots.copy(best, number, kept)
        del slots.tokens[number][min(kept, len(ids) - 1) :]
        self.metrics.prompt(len(ids), min(kept, len(ids) - 1))

    def _prefill(self) -> None:
        """Run a piece of the prompts that are not done."""
        rows = self.running[self.ready :]
        left = [
            [*sequence.prompt, *sequence.ids][len(self.slots.tokens[number]) :]
            for number, sequence in enumerate(rows, self.ready)
        ]
        width = max(CHUNK // len(rows), min(min(map(len, left)), CHUNK))
        rows = rows[: max(1, CHUNK // width)]
        pieces = [ids[:width] for ids in left[: len(rows)]]
        done = [len(ids) <= width for ids in left[: len(rows)]]
        self._advance(self.ready, rows, pieces, done)
        # Those that are done join the ones that are ready.
        for number, is_done in enumerate(done, self.ready):
            if is_done:
                self._swap(number, self.ready)
                self.ready += 1

    def _make_room(self) -> None:
        """Where a step would need more memory than there is, the newest sequences wait again."""
        while self.ready > 1:
            needed = max(len(tokens) for tokens in self.slots.tokens[: self.ready]) + 1
            if needed <= self.slots.room or self.slots.fits(len(self.running), needed):
                return
            sequence = self.running[-1]
            self._remove(len(self.running) - 1)
            with self._changed:
                self.waiting.appendleft(sequence)

    def _advance(self, first: int, rows: list[Sequence], new: list[list[int]], done: list[bool] | None = None) -> None:
        """Run new tokens of consecutive slots, and choose the next token of each that is done with its prompt."""
        logits = self.slots.run(first, new)[:, : self.loaded.info.vocab_size]
        if done is not None:
            kept = [row for row, is_done in enumerate(done) if is_done]
            if not kept:
                return
            logits, rows = logits[kept], [rows[row] for row in kept]
        original = logits.clone() if any(self._changes(row) for row in rows) else logits
        for row, sequence in enumerate(rows):
            if sequence.sampler.settings.changes_logits:
                with _alone(sequence):
                    sequence.sampler.adjust(logits[row], sequence.ids)
        tokens = choose(logits, [sequence.sampler for sequence in rows])
        now = time.monotonic()
        for row, (sequence, token) in enumerate(zip(rows, tokens, strict=True)):
            if not sequence.finished:
                with _alone(sequence):
                    self._take(sequence, token, original[row], now)
        self.metrics.tokens(len(tokens))

    @staticmethod
    def _changes(sequence: Sequence) -> bool:
        how = sequence.sampler.settings
        return how.logprobs is not None and how.changes_logits

    def _take(self, sequence: Sequence, token: int, logits: Tensor, now: float) -> None:
        """Give a sequence its next token."""
        top = sequence.sampler.settings.logprobs
        if sequence.first is None:
            sequence.first = now
            self.metrics.first_token(now - sequence.submitted)
        sequence.add(token, None if top is None else logprobs(logits, token, top), self.loaded)
        if sequence.finished:
            self.metrics.finished(len(sequence.ids), now - sequence.submitted, now - sequence.first)


@contextlib.contextmanager
def _alone(sequence: Sequence) -> Iterator[None]:
    """An exception in what concerns one sequence ends that sequence alone."""
    try:
        yield
    except Exception as problem:
        report(logger, "an answer ends with an error", problem)
        if not sequence.finished:
            sequence.fail("error")


def report(log: logging.Logger, what: str, problem: BaseException) -> None:
    """Log an exception without its message, which may have the text of a request, and without paths."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}" if trace else "?"
    log.error("%s: %s in %s", what, type(problem).__name__, where)
    log.debug("%s", what, exc_info=problem)


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning of two lists."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # comparing slices is a hundred times faster than a loop over ids
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
