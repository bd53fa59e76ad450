"""Train a byte-level BPE tokenizer with MiniMind's special tokens.

    python -m minimind_mcore.preprocess.train_tokenizer --input data/sample.jsonl --output data/tokenizer

The result is a directory that `AutoTokenizer.from_pretrained` loads with transformers 4 and 5. Ids 0 to 35 are the
special tokens of MiniMind's third generation (jingyaogong/minimind, trainer/train_tokenizer.py). Pre-tokenizer and
decoder are MiniMind's too, and the chat template renders the same text. Training is deterministic: the same input gives
the same files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from minimind_mcore.errors import UserError, run
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.inputs.ranges import flag_type
from minimind_mcore.paths import PACKAGE, package_json
from minimind_mcore.preprocess.handlers import HANDLERS
from minimind_mcore.preprocess.readers import Reject, read_records
from minimind_mcore.storage import atomic_directory

logger = logging.getLogger("minimind_mcore.preprocess.train_tokenizer")

_CONTENT = package_json("preprocess/tokenizer_config.json")
CONFIG: dict[str, Any] = _CONTENT["config"]
# Special tokens are left out of decoded text. Markers are kept: a model writes them and a program reads them.
SPECIAL = (CONFIG["pad_token"], *CONFIG["additional_special_tokens"])
MARKERS = tuple(_CONTENT["markers"])
BYTES = 256


def chat_template() -> str:
    """Return the Jinja source of the chat template."""
    return (PACKAGE / "preprocess/chat_template.jinja").read_text(encoding="utf-8")


def texts(spec: str, key: str) -> Iterator[str]:
    """Yield the usable texts of raw files (see `readers`), in order.

    Raises:
        UserError: a file is missing or damaged.
    """
    text = HANDLERS["GeneralPretrainHandler"]
    for _, record in read_records(spec, [key]):
        fields = record if isinstance(record, Reject) else text(record, [key])
        if not isinstance(fields, Reject):
            yield fields[key]


def train(corpus: Iterator[str], vocab_size: int, split_digits: bool = False) -> Tokenizer:
    """Train on texts.

    Args:
        corpus: the texts.
        vocab_size: total number of ids, including special tokens and the 256 bytes.
        split_digits: make each digit a token, as in Llama and Qwen. MiniMind's tokenizers merge some digits.

    Raises:
        UserError: the corpus or the vocabulary is too small.
    """
    least = len(SPECIAL) + len(MARKERS) + BYTES
    if vocab_size < least:
        raise UserError(f"--vocab-size {vocab_size}: special tokens and bytes alone need {least}")
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if split_digits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL + MARKERS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise UserError(
            f"the input yields only {found} of the {vocab_size} tokens wanted: give more text or a smaller --vocab-size"
        )
    return _with_markers_as_text(tokenizer)


def _with_markers_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """Mark `MARKERS` as not special, because the trainer marks all added tokens as special."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(content))


def config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return CONFIG | {
        "added_tokens_decoder": {str(number): dict(sorted(token.__getstate__().items())) for number, token in added},
        # Stored in the config, which every version of transformers reads; chat_template.jinja exists since 4.43.
        "chat_template": chat_template(),
    }


def save(tokenizer: Tokenizer, directory: str) -> None:
    """Write the tokenizer directory atomically.

    Raises:
        UserError: the disk is full, or `directory` contains something else.
    """
    path = Path(directory)
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / "tokenizer.json").is_file())):
        raise UserError(f"--output {directory}: exists and is no tokenizer directory; choose another place")
    with atomic_directory(path) as tmp:
        tokenizer.save(str(tmp / "tokenizer.json"))
        text = json.dumps(config(tokenizer), ensure_ascii=False, indent=2) + "\n"
        (tmp / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = documented_parser("minimind-mcore tokenizer", __doc__)
    parser.add_argument("--input", required=True, help="files, directories, globs, separated by commas")
    parser.add_argument("--output", required=True, help="the directory to write")
    parser.add_argument("--vocab-size", type=flag_type("vocab_size"), default=6400)
    parser.add_argument("--json-key", default="text", help="the field that holds the text")
    parser.add_argument("--split-digits", action="store_true", help="each digit is a token; sums are easier to learn")
    args = parser.parse_args(argv)
    tokenizer = train(texts(args.input, args.json_key), args.vocab_size, args.split_digits)
    save(tokenizer, args.output)
    logger.info(f"{args.output}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    run(main)
