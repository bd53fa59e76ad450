"""The command line of `preprocess_data.py`, with MindSpeed-LLM's flags.

    python preprocess_data.py --input data/sample.jsonl --output-prefix data/sample \\
        --tokenizer-name-or-path data/tokenizer --prepend-bos --append-eod --workers 2
    python preprocess_data.py --check data/sample_text_document
    prefix=$(python preprocess_data.py --input "$DATA_PATH" --cache-dir data/cache \\
        --tokenizer-name-or-path data/tokenizer --prepend-bos --append-eod)

    python preprocess_data.py --input sft.jsonl --output-prefix data/sft --seq-length 768 \\
        --tokenizer-name-or-path data/tokenizer --handler-name MiniMindInstructionHandler --workers 2
    python preprocess_data.py --config configs/datasets/minimind_sft.yaml --seq-length 512

Standard output has only the words of --data-path, one per line: the prefixes of the finished datasets, or the common
prefix of the datasets of conversations. Everything else goes to standard error. A request with a finished result is
recognized and costs nothing. An --input that is the prefix of indexed datasets is checked and printed unchanged. An
--input such as "0.3 one.jsonl 0.7 two" is a blend: its raw files are converted, and every dataset is printed after its
weight.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import Parser, add_kit_flags, build_parser, fields_from, support, unused
from minimind_mcore.preprocess.blends import Blend, blend_of_text, sizes
from minimind_mcore.preprocess.check import check_dataset, check_together, quick_check
from minimind_mcore.preprocess.convert import convert, preview
from minimind_mcore.preprocess.handlers import ChatHandler
from minimind_mcore.preprocess.indexed import datasets_at, read_index
from minimind_mcore.preprocess.meta import read_meta
from minimind_mcore.preprocess.options import ChatOptions, Options, from_dataset_info, with_config
from minimind_mcore.preprocess.tokenize import tokenizer_info

logger = logging.getLogger(__name__)

PROGRAM = "preprocess_data.py"
IMPLEMENTED, NO_EFFECT = support(PROGRAM, "implemented"), support(PROGRAM, "no effect")


def _parser() -> Parser:
    parser = build_parser(PROGRAM, prog=PROGRAM)
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # MindSpeed-LLM's directory caches whole datasets in ~/tmp. Ours keeps unfinished parts, by default next to the
    # output.
    parser.set_defaults(cache_dir=None)
    parser.set_choices("prompt_type", None)
    parser.set_choices("tokenizer_type", None)  # `_convert` says which
    add_kit_flags(parser, PROGRAM)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UserError: a flag is unknown or not implemented, or has an invalid value.
    """
    args, given = _parser().parse(with_config(argv))
    if refused := unused(given, IMPLEMENTED | NO_EFFECT, PROGRAM):
        raise UserError(f"{', '.join(refused)}: known to MindSpeed-LLM, not implemented here")
    if ignored := unused(given, IMPLEMENTED, PROGRAM):
        logger.info(f"no effect here: {', '.join(ignored)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Convert or check. Print the words of --data-path, one per line.

    Raises:
        UserError: an error that the user can fix.
    """
    for word in prepare(sys.argv[1:] if argv is None else argv):
        print(word, flush=True)


def prepare(argv: Sequence[str]) -> list[str]:
    """Convert or check. Return the words of --data-path.

    Raises:
        UserError: an error that the user can fix.
    """
    # An exception, unlike the default handler, stops the workers and removes temporary files.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args = parse(argv)
    try:
        if args.check is None:
            return _convert(args)
        check(args.check, args.tokenizer_name_or_path)
        return []
    except OSError as error:  # no permission, no such directory: the system names the file
        raise UserError(str(error)) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _convert(args: argparse.Namespace) -> list[str]:
    for flag, value in (("--input", args.input), ("--tokenizer-name-or-path", args.tokenizer_name_or_path)):
        if not value:
            raise UserError(f"{flag} is missing; `{PROGRAM} --help` shows an example")
    if args.tokenizer_type not in ("PretrainedFromHF", "HuggingFaceTokenizer"):  # MindSpeed-RL's name for the same
        raise UserError(f"--tokenizer-type {args.tokenizer_type}: not supported here; expected PretrainedFromHF")
    if args.dataset_impl != "mmap":
        raise UserError(f"--dataset-impl {args.dataset_impl}: megatron-core reads mmap only")
    if args.output_prefix is None and (prefixes := datasets_at(args.input)):
        info = tokenizer_info(args.tokenizer_name_or_path)
        for prefix in prefixes:
            quick_check(prefix, info.fingerprint, info.vocab_size)
        return [args.input]
    options = _options(args)
    if blend := blend_of_text(args.input, "--input"):
        return _convert_blend(blend, options, args.dry_run)
    return preview(options) if args.dry_run else convert(options)


def _convert_blend(blend: Blend, options: Options, dry_run: bool) -> list[str]:
    """Convert the raw datasets of a blend, and check the others.

    Args:
        blend: converted datasets or raw files.
        options: options of the conversion. Input and output prefix are replaced for each dataset.
        dry_run: convert nothing.

    Returns:
        The words of --data-path with weights. Empty if a dry run leaves datasets unconverted.

    Raises:
        UserError: a dataset does not exist, cannot be converted, or has another tokenizer.
    """
    if isinstance(options.find_handler(), ChatHandler):
        raise UserError(
            f"--input {options.input}: a blend is for pretraining data; of conversations give one set, whose files may "
            "be separated by commas"
        )
    if options.output_prefix is not None:
        raise UserError("--output-prefix names one dataset, and the input is a blend of several; use --cache-dir")
    info = tokenizer_info(options.tokenizer)
    prefixes, pending = [], False
    for path in blend.prefixes:
        place = Path(path).expanduser().absolute()
        found = [str(place)] if datasets_at(place) else []
        for prefix in found:
            quick_check(prefix, info.fingerprint, info.vocab_size)
        if not found:
            raw = replace(options, input=path)
            found = preview(raw) if dry_run else convert(raw)
            pending |= not found
        if blend.weights is not None and len(found) > 1:
            raise UserError(f"--input: {path} becomes {len(found)} datasets (--json-keys), and has one weight")
        prefixes += found
    if pending:
        return []
    return Blend(prefixes, blend.weights or [str(size) for size in sizes(prefixes)]).words


def _options(args: argparse.Namespace) -> Options:
    if args.neat_pack and not args.pack:
        raise UserError("--neat-pack needs --pack")
    chat = ChatOptions(
        **fields_from(ChatOptions, vars(args))
        | {
            "pack": "neat-pack" if args.neat_pack else "pack" if args.pack else "",
            "additional_keys": tuple(args.dataset_additional_keys),
            "reward_tokens": tuple(args.reward_tokens),
        }
    )
    options = Options(
        **fields_from(Options, vars(args)),
        tokenizer=args.tokenizer_name_or_path,
        handler=args.handler_name or "GeneralPretrainHandler",
        keys=tuple(args.json_keys),
        backend=args.tokenizer_backend,
        overwrite=args.overwrite_cache,
        chat=chat,
    )
    if args.handler_name == "LlamaFactoryInstructionHandler":
        return from_dataset_info(options, args.dataset_dir)
    return options


def check(prefix: str, tokenizer: str | None) -> None:
    """Verify a dataset, or all datasets of conversations, and print a summary.

    Raises:
        UserError: at least one problem was found. The message lists all of them.
    """
    info = tokenizer_info(tokenizer) if tokenizer else None
    prefixes = datasets_at(prefix) or [prefix]
    problems = [problem for found in prefixes for problem in check_dataset(found, info)]
    problems += [] if problems else check_together(prefixes)
    if problems:
        raise UserError(f"{prefix}: {len(problems)} problems\n  " + "\n  ".join(problems))
    for number, found in enumerate(prefixes):
        if number:
            print()
        _describe(found, tokenizer is not None)


def _describe(prefix: str, vocabulary_known: bool) -> None:
    index, meta = read_index(prefix), read_meta(prefix)
    longest = f"{index.lengths.mean():.1f} mean, {index.lengths.max():,} longest" if index.sequences else "-"
    rows = {
        "dataset": prefix,
        "documents": f"{len(index.documents) - 1:,}",
        "tokens": f"{int(index.lengths.sum(dtype='int64')):,}",
        "dtype": index.dtype.name,
        "tokens per document": longest,
        "tokenizer": f"{meta.tokenizer.path} ({meta.tokenizer.fingerprint[:12]})" if meta else "not recorded",
        "left out": f"{meta.rejects:,} rejected, {meta.empty:,} empty, {meta.too_long:,} too long"
        if meta
        else "not recorded",
        "verified": "sizes, pointers, "
        + ("token range, digests" if meta else "token range" if vocabulary_known else "no tokens"),
    }
    if meta and meta.chat:
        rows["samples"] = f"{meta.samples:,} ({meta.chat['pack'] or 'not packed'}), {meta.truncated:,} cut"
    for name, value in rows.items():
        print(f"{name:20} {value}")
