"""Chat: several turns, printed while they are generated, with thoughts and tool calls marked.

The input is a terminal or a pipe. Commands are `/new` (start a new conversation), `/quit`, and the names that these
commands have in MindSpeed-LLM, such as `clear` and `q`. On a terminal thoughts are dim; elsewhere they are between
[thinking] and [/thinking]. A tool with a function runs, and its result is printed. The call of a tool without a
function is printed, and a line that starts with `/tool ` supplies the result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from minimind_mcore.inference.detokenizer import detokenize
from minimind_mcore.inference.generation import Generator
from minimind_mcore.inference.prompts import Message, Prompt, PromptEncoder, text_input
from minimind_mcore.inference.safe_text import is_text
from minimind_mcore.tools.parser import Call, StreamParser, Text
from minimind_mcore.tools.process import failed
from minimind_mcore.tools.registry import Toolbox

logger = logging.getLogger(__name__)

QUIT = ("/quit", "/exit", "q", "quit", "exit")
NEW = ("/new", "/clear", "clear", "new")
TOOL = "/tool "
ROUNDS = 16  # maximum number of replies to one line whose tool calls run; the next reply must be the final one
HELP = "/new begins a new conversation, /quit ends; a line /tool RESULT answers a tool call"
DIM, PLAIN = "\033[2m", "\033[0m"


@dataclass
class Session:
    """The conversation so far.

    Attributes:
        turns: number of earlier questions, with their answers, that the model gets.
        system: a system prompt.
        tools: tools that the model may call. Those with a function run.
        messages: messages of the conversation without the system prompt.
        pending: results of the last reply's calls, in the order of the calls. None: the user must
            still give that result. Empty if no result is missing.
    """

    turns: int
    system: str | None = None
    tools: Toolbox | None = None
    messages: list[Message] = field(default_factory=list)
    pending: list[str | None] = field(default_factory=list)

    def prompt(self) -> Prompt:
        """Return the prompt: the last question and the turns before it."""
        questions = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        first = questions[-(self.turns + 1) :][0] if questions else 0
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return Prompt([*opening, *self.messages[first:]], list(self.tools.definitions) if self.tools else None)

    def add(self, line: str) -> bool:
        """Add a question, or the result of a call. Return whether the model can continue."""
        if line.startswith(TOOL) and None in self.pending:
            self.pending[self.pending.index(None)] = line.removeprefix(TOOL)
            return self.deliver()
        if None in self.pending:  # the user asks something else
            self.pending = [failed("the user gave no result").text if r is None else r for r in self.pending]
            self.deliver()
        role = "tool" if line.startswith(TOOL) else "user"
        self.messages.append({"role": role, "content": line.removeprefix(TOOL)})
        return True

    def deliver(self) -> bool:
        """Add the pending results to the messages if no result is missing. Return whether the model can continue.

        A chat template does not say which call a result belongs to, so the results must be in the order of the calls.
        """
        if None in self.pending:
            return False
        self.messages += [{"role": "tool", "content": result} for result in self.pending]
        self.pending = []
        return True


def run(generator: Generator, encoder: PromptEncoder, session: Session, lines: TextIO | None = None) -> None:
    """Answer lines until the input ends, or `/quit`.

    Args:
        generator: generates the answers.
        encoder: encodes the prompts.
        session: holds the conversation.
        lines: the input. None: stdin.

    Raises:
        UserError: the conversation is longer than the model's maximum position.
    """
    lines = lines or text_input()
    if lines.isatty():
        print(HELP, file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends a conversation as /quit does
        for line in _read(lines):
            text = line.strip()
            if text in QUIT:
                return
            if text in NEW:
                session.messages.clear()
                session.pending.clear()
                print("a new conversation", flush=True)
            elif not is_text(text):
                logger.warning(f"the line is not in {lines.encoding or 'UTF-8'} and was ignored; write it again")
            elif text and session.add(text):
                _reply(generator, encoder, session)


def _read(lines: TextIO) -> Iterator[str]:
    """Yield the input lines. A terminal gets a prompt. Lines of a pipe are printed, so that the output is complete."""
    while True:
        if lines.isatty():
            print("\nyou> ", end="", flush=True)
        line = lines.readline()
        if not line:
            return
        if not lines.isatty():
            print(f"you> {line.rstrip().encode(errors='backslashreplace').decode()}", flush=True)
        yield line


def _reply(generator: Generator, encoder: PromptEncoder, session: Session) -> None:
    """Let the model reply, and run its calls, until it calls nothing or the user must give a result."""
    for number in range(ROUNDS + 1):
        reply = answer(generator, encoder, session.prompt())
        session.messages.append(reply.message())
        if session.tools is None or not reply.calls:
            return
        if number == ROUNDS:
            logger.warning(f"{ROUNDS} replies have called tools; the calls of this reply do not run. Ask again")
        elif _run(session.tools, session, reply):
            continue
        return


def _run(tools: Toolbox, session: Session, reply: StreamParser) -> bool:
    """Run the calls of a reply. Return whether the model can continue."""
    results = tools.run_all([(call.name, call.arguments) for call in reply.calls])
    for result in results:
        if result is not None:
            if result.printed:
                print(f"[tool output] {result.printed.rstrip()}", flush=True)
            print(f"[tool result] {result.text}", flush=True)
    session.pending = [None if result is None else result.text for result in results]
    return session.deliver()


def answer(generator: Generator, encoder: PromptEncoder, prompt: Prompt) -> StreamParser:
    """Generate an answer, print the text while it is generated, and return the parsed answer."""
    began, count = time.perf_counter(), 0

    def counted() -> Iterator[int]:
        nonlocal count
        for token in generator.stream(encoder(prompt)):
            count += 1
            yield token

    reply = StreamParser(thinking=encoder.text(prompt).rstrip().endswith("<think>"))
    shown = ""  # kind of the last part on the screen
    for text in detokenize(counted(), encoder.tokenizer):
        shown = _show(reply.add(text), shown)
    _show([*reply.end(), Text("answer", "\n")], shown)
    for call in reply.calls:
        print(f"[tool call] {call.name}({json.dumps(call.arguments, ensure_ascii=False)})", flush=True)
    logger.info(f"{count / (time.perf_counter() - began):.1f} tokens/s")
    return reply


def _show(parts: Sequence[Text | Call], before: str) -> str:
    """Print texts, with marks where thinking begins or ends. Return the kind of the last text.

    Args:
        parts: the texts. Calls are not printed.
        before: kind of the last text that was printed before.
    """
    opening, closing = (DIM, PLAIN) if sys.stdout.isatty() else ("[thinking] ", " [/thinking]")
    for part in parts:
        if isinstance(part, Text):
            if part.kind == "thinking" and before != "thinking":
                print(opening, end="")
            if part.kind == "answer" and before == "thinking":
                print(closing)
            print(part.text, end="", flush=True)
            before = part.kind
    return before
