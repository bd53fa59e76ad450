"""Continuous batching: requests join and leave a running batch.

One thread owns the model. Each round admits waiting sequences, runs a chunk of new prompts, and then runs one step of
all running sequences. A sequence that has ended leaves at once.
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
CHUNK = 512  # maximum prompt tokens per round; more would delay the next tokens of the running sequences


class QueueFull(Exception):
    """The queue cannot take more sequences."""


@dataclass(frozen=True)
class Piece:
    """The part of an answer that one token adds.

    Attributes:
        text: text that later tokens cannot change.
        ids: the token; empty at the end.
        logprob: log-probability of the token, if requested.
        finish: "stop", "length", "abort" or "error" at the end, else None.
        stop_reason: the stop string, or the id other than eos, that ended the answer.
    """

    text: str
    ids: tuple[int, ...] = ()
    logprob: Logprob | None = None
    finish: str | None = None
    stop_reason: str | int | None = None


@dataclass(kw_only=True)
class Stops:
    """The conditions that end an answer.

    Attributes:
        eos: end tokens.
        ids: further stop ids of the request.
        texts: stop strings of the request.
        max_tokens: maximum number of tokens.
        keep_text: the answer includes the stop string.
        skip_special_tokens: leave out the texts of special tokens.
    """

    eos: frozenset[int]
    ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()
    max_tokens: int
    keep_text: bool = False
    skip_special_tokens: bool = True


class Sequence:
    """One answer to a prompt during generation.

    Args:
        prompt: ids of the prompt.
        sampling: sampling parameters.
        stops: conditions that end the answer.
        emit: called in the scheduler's thread with new pieces.
        stream: emit pieces as they are generated, instead of all at the end.
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
        self._pieces: list[Piece] = []
        self._detokenizer: Detokenizer | None = None
        self._held = ""  # text that may be the start of a stop string

    def add(self, token: int, logprob: Logprob | None, loaded: Loaded) -> None:
        """Append a sampled token."""
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
        """Return the text before the first stop string, and that string."""
        whole = self._held + text
        place, stop = min(((whole.find(stop), stop) for stop in self.stops.texts if stop in whole), default=(-1, ""))
        if place < 0:
            return None
        return whole[: place + (len(stop) if self.stops.keep_text else 0)], stop

    def _end(self, text: str, token: int, logprob: Logprob | None, finish: str, reason: str | int | None) -> None:
        self.finished = True
        self._give(Piece(self._held + text, (token,), logprob, finish, reason))

    def fail(self, finish: str) -> None:
        """End the sequence without a complete answer.

        Args:
            finish: the reason, "abort" or "error".
        """
        self.finished = True
        self._give(Piece("", finish=finish))

    def _give(self, piece: Piece) -> None:
        self._pieces.append(piece)
        if self.stream or self.finished:
            pieces, self._pieces = self._pieces, []
            self.emit(pieces)


@dataclass
class Counts:
    """Numbers of running and of waiting sequences."""

    running: int = 0
    waiting: int = 0


class Scheduler:
    """Runs sequences on one model.

    Args:
        loaded: the model.
        max_batch_size: maximum number of running sequences.
        max_queue: maximum number of waiting sequences.
        budget: maximum number of cached positions.
        metrics: counters of the server.
        flush: called after each round in which sequences emitted pieces.
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
        self.running: list[Sequence] = []  # in slots 0, 1, ...; sequences with an unfinished prompt come last
        self.ready = 0  # number of running sequences whose whole prompt is in the slot
        self.waiting: collections.deque[Sequence] = collections.deque()
        self._round = itertools.count(1)
        self._ages: list[int] = []  # of each slot: the last round that used it
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)

    def start(self) -> None:
        """Start the scheduler's thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop. Unfinished sequences are aborted."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the scheduler runs."""
        return self._thread.is_alive() and not self._stopping

    def counts(self) -> Counts:
        """Return the number of running and waiting sequences."""
        return Counts(len(self.running), len(self.waiting))

    def submit(self, sequences: SequenceOf[Sequence]) -> None:
        """Queue sequences.

        Raises:
            QueueFull: the queue cannot take all of them.
        """
        with self._changed:
            # A free slot of the batch also takes a sequence.
            free = self.max_batch_size - len(self.running)
            if len(self.waiting) + len(sequences) > self.max_queue + max(free, 0) or self._stopping:
                raise QueueFull(f"{len(self.waiting)} requests are already waiting")
            self.waiting.extend(sequences)
            self._changed.notify()

    def cancel(self, sequences: SequenceOf[Sequence]) -> None:
        """Stop sequences whose client has disconnected."""
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
            except Exception as problem:  # such as out of memory: the current requests fail, and the server continues
                report(logger, f"a step failed; {len(self.running)} answers end with an error", problem)
                for sequence in self.running:
                    if not sequence.finished:
                        sequence.fail("error")
                self.running, self.ready = [], 0
                self.slots = Slots(self.loaded.decoder, self.slots.budget)
            self._flush()

    def _step(self) -> None:
        """Run one round."""
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
        """Remove ended and cancelled sequences, from the last slot to the first."""
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
        """Remove a sequence. Its slot moves behind the slots in use."""
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
        """Move waiting sequences into slots while memory and slots are available."""
        while self.waiting and len(self.running) < self.max_batch_size:
            with self._changed:
                if not self.waiting:
                    return
                sequence = self.waiting[0]
                ids = [*sequence.prompt, *sequence.ids]  # includes generated ids if the sequence lost its slot before
                longest = max([len(ids) + 1, *(len(s.prompt) + len(s.ids) + 1 for s in self.running)])
                number, capacity = len(self.running), max(longest, self.slots.capacity)
                if not self.slots.fits(number + 1, capacity):
                    if self.running and not self.slots.fits(number + 1, longest):
                        return
                    self.slots.shrink(number, longest)
                    capacity = longest
                self.waiting.popleft()
            self.running.append(sequence)
            self.slots.used = number + 1
            self._assign_slot(ids, number, capacity, now)

    def _assign_slot(self, ids: list[int], number: int, capacity: int, now: int) -> None:
        """Find a slot for a prompt, preferably one that has its prefix cached, and make it slot `number`."""
        slots = self.slots
        self._ages += [0] * (len(slots.tokens) - len(self._ages))
        shared = [_common(tokens, ids) for tokens in slots.tokens]
        idle = range(number, len(slots.tokens))
        chosen = max(idle, key=lambda slot: shared[slot], default=None)
        best = max(range(number), key=lambda slot: shared[slot], default=None)
        if chosen is None or not shared[chosen]:
            if len(slots.tokens) < self.max_batch_size and slots.fits(len(slots.tokens) + 1, capacity):
                slots.reserve(len(slots.tokens) + 1, capacity)
                chosen = len(slots.tokens) - 1
            elif chosen is not None:
                chosen = min(idle, key=lambda slot: self._ages[slot])
        if chosen is None or chosen >= len(slots.tokens):
            slots.reserve(number + 1, capacity)
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
        """Run a chunk of the unfinished prompts."""
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
        # Sequences with a finished prompt become ready.
        for number, is_done in enumerate(done, self.ready):
            if is_done:
                self._swap(number, self.ready)
                self.ready += 1

    def _make_room(self) -> None:
        """If a step needs more memory than available, move the newest sequences back to the queue."""
        while self.ready > 1:
            needed = max(len(tokens) for tokens in self.slots.tokens[: self.ready]) + 1
            if needed <= self.slots.capacity or self.slots.fits(len(self.running), needed):
                return
            sequence = self.running[-1]
            self._remove(len(self.running) - 1)
            with self._changed:
                self.waiting.appendleft(sequence)

    def _advance(self, first: int, rows: list[Sequence], new: list[list[int]], done: list[bool] | None = None) -> None:
        """Run new tokens of consecutive slots, and sample the next token of each slot whose prompt is done."""
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
        """Append the next token to a sequence."""
        top = sequence.sampler.settings.logprobs
        if sequence.first is None:
            sequence.first = now
            self.metrics.first_token(now - sequence.submitted)
        sequence.add(token, None if top is None else logprobs(logits, token, top), self.loaded)
        if sequence.finished:
            self.metrics.finished(len(sequence.ids), now - sequence.submitted, now - sequence.first)


@contextlib.contextmanager
def _alone(sequence: Sequence) -> Iterator[None]:
    """An exception within the context ends only this sequence."""
    try:
        yield
    except Exception as problem:
        report(logger, "an answer ends with an error", problem)
        if not sequence.finished:
            sequence.fail("error")


def report(log: logging.Logger, what: str, problem: BaseException) -> None:
    """Log an exception without its message, which may contain text of a request, and without paths."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}" if trace else "?"
    log.error("%s: %s in %s", what, type(problem).__name__, where)
    log.debug("%s", what, exc_info=problem)


def _common(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix of two lists."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # comparing slices is a hundred times faster than a loop over ids
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
