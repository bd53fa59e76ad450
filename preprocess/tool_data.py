"""Write public tool-calling datasets in MiniMind's format, with a held-out split for TASK=toolcall.

    minimind-mcore tool-data --source hermes --input func-calling.json --output tools.jsonl --held-out cases.jsonl

A line of the output is {"conversations": [...]} as in MiniMind's sft files: the system message carries `tools`, the
assistant's messages carry `tool_calls`, both as JSON text. Records that cannot be used are counted by reason and
written to OUTPUT.rejects.jsonl. A conversation that occurs twice is written once. A held-out record offers tools. It
ends before the assistant's first message, whose calls are in `calls`. The forms of the sources are in `tool_records`.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from minimind_mcore.errors import UserError, run
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.preprocess.handlers import CHAT_HANDLERS, ChatHandler
from minimind_mcore.preprocess.messages import Conversation
from minimind_mcore.preprocess.readers import Reject, read_records
from minimind_mcore.storage import write_json_lines

logger = logging.getLogger("minimind_mcore.preprocess.tool_data")

SOURCES = {
    "hermes": "HermesToolHandler", "glaive": "GlaiveToolHandler", "xlam": "XlamToolHandler",
    "minimind": "MiniMindInstructionHandler",
}  # fmt: skip
Row = dict[str, object]


def rows(inputs: str, handler: ChatHandler) -> Iterator[Conversation | Reject]:
    """Yield the conversation of each record, or the reason of its rejection."""
    for _, record in read_records(inputs):
        found = record if isinstance(record, Reject) else handler(record)
        yield found if isinstance(found, Reject) else found[""]


def minimind_row(conversation: Conversation) -> Row:
    """Return a conversation as a line of MiniMind's sft files."""
    messages = []
    for message in conversation.messages:
        row = {key: value for key, value in message.items() if key != "loss"}
        if conversation.tools and message["role"] == "system":
            row["tools"] = json.dumps(conversation.tools, ensure_ascii=False)
        if "tool_calls" in row:
            row["tool_calls"] = json.dumps(row["tool_calls"], ensure_ascii=False)
        messages.append(row)
    return {"conversations": messages}


def case_row(conversation: Conversation, task: str) -> Row:
    """Return a conversation as a case of TASK=toolcall."""
    answer = next(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
    before = Conversation(conversation.messages[:answer], conversation.tools)
    calls = [call.get("function", call) for call in conversation.messages[answer].get("tool_calls", ())]
    return {"task": task, **minimind_row(before), "calls": calls}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = documented_parser("minimind-mcore tool-data", __doc__)
    parser.add_argument("--source", required=True, choices=SOURCES)
    parser.add_argument("--input", required=True, help="files, directories or globs: .json, .jsonl or .parquet")
    parser.add_argument("--output", required=True, help="the .jsonl file to write")
    parser.add_argument(
        "--held-out", metavar="JSONL", help="write cases for TASK=toolcall, which are not in the output"
    )
    parser.add_argument("--held-out-ratio", type=float, default=0.05, help="share of the records (default 0.05)")
    parser.add_argument("--max-samples", type=int, help="maximum number of records, chosen at random")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    if not 0 < args.held_out_ratio < 1:
        raise UserError(f"--held-out-ratio {args.held_out_ratio}: expected a number between 0 and 1")
    if args.max_samples is not None and args.max_samples < 1:
        raise UserError(f"--max-samples {args.max_samples}: expected a number of records of 1 or more; correct it")
    rejected = f"{args.output.removesuffix('.jsonl')}.rejects.jsonl"
    for name in (args.output, rejected) if args.held_out else ():
        if os.path.realpath(args.held_out) == os.path.realpath(name):
            raise UserError(
                f"--held-out {args.held_out}: this file is also written for --output {args.output}; expected a file of "
                "its own. Give another name"
            )
    unique: dict[str, Conversation] = {}  # without this a duplicate could be both held out and trained on
    rejects: list[Reject] = []
    left_out: Counter[str] = Counter()
    for found in rows(args.input, CHAT_HANDLERS[SOURCES[args.source]]):
        if isinstance(found, Reject):
            rejects.append(found)
            left_out[found.reason] += 1
        elif unique.setdefault(json.dumps(minimind_row(found)), found) is not found:
            left_out["the same as an earlier record"] += 1
    for reason, count in left_out.most_common():
        logger.info(f"left out: {count:,} records: {reason}")
    if rejects:
        said: list[Row] = [{"reason": reject.reason, "record": reject.content} for reject in rejects]
        _write(rejected, said)
    kept = list(unique.values())
    if not kept:
        raise UserError(f"--input {args.input}: no record can be used; is --source {args.source} right?")
    r = random.Random(args.seed)
    if args.max_samples is not None and args.max_samples < len(kept):
        kept = r.sample(kept, args.max_samples)
    if args.held_out:
        offering = [number for number, conversation in enumerate(kept) if conversation.tools]
        if len(offering) < len(kept):
            logger.info(f"{len(kept) - len(offering):,} records offer no tools and are not held out")
        chosen = set(r.sample(offering, min(len(offering), max(1, round(args.held_out_ratio * len(kept))))))
        _write(args.held_out, [case_row(kept[number], args.source) for number in sorted(chosen)])
        kept = [conversation for number, conversation in enumerate(kept) if number not in chosen]
    _write(args.output, [minimind_row(conversation) for conversation in kept])


def _write(path: str, lines: Sequence[Row]) -> None:
    write_json_lines(path, lines)
    logger.info(f"{path}: {len(lines):,} records")


if __name__ == "__main__":
    run(main)
