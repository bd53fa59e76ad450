"""Tokenizers: find them, identify them, and encode batches of texts.

    encoder = load_encoder("tokenizer/", backend="auto")
    tokens, lengths = encoder.encode(["first document", "second"])   # flat uint32 [sum], int64 [2]
    before, after = tokenizer_info("tokenizer/").frame()             # bos and eos, as lists of ids

An encoder adds nothing to a text, even if tokenizer.json has a post-processor that does. `frame` returns the ids at the
begin and end of a document, so that conversion, generation and perplexity all write one bos.

Two backends give the same tokens: `tokenizers` (Hugging Face's Rust library, always installed) and
`gigatoken` (optional, several times as fast). `auto` uses gigatoken if it is installed and
agrees with `tokenizers` on test texts. Workers encode single-threaded; `--workers` sets the parallelism.

`tokenizer_fingerprint` identifies everything that determines the ids. MiniMind's generations share a vocab
size and almost no ids, so training one on data of another silently produces garbage. The fingerprint is
therefore stored in datasets and checkpoints, and compared wherever both are used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.ranges import problem
from minimind_mcore.preprocess.tokenizer_files import read_json, special_tokens, tokenizer_json

# gigatoken caches every word it has seen. A new instance at intervals (15 ms each) bounds its memory.
RENEWAL_CHARS = 8 << 20

# Texts on which tokenizer implementations tend to differ: empty, special tokens inside text, mixed
# scripts, runs of white space, combining marks, astral characters, contractions, digits.
PROBE = (
    "",
    " ",
    "\n\n \t\r\n  x",
    "Hello, world! It's 3.14; we'll see I'M",
    "你好，世界！鸡兔同笼共１０头28脚。",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think> <|endoftext|><|im_end",
    "e\u0301\u200b\ufeff\u00a0\u3000 \U0001f469\u200d\U0001f680 \u0915\u094d\u0937 \x00\x7f",
    "def f(x):\n    return x**2  # 12345678901234567890",
)


def _inserted(post_processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the post-processor if it can insert tokens. transformers 5 saves an empty one, which cannot."""
    if post_processor is None or post_processor.get("type") == "ByteLevel":
        return None
    empty = post_processor.get("type") == "TemplateProcessing" and not post_processor.get("special_tokens")
    return None if empty else post_processor


def tokenizer_fingerprint(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 (hex) of everything that determines token ids.

    Included: vocabulary, merges, further model settings, added tokens with their matching flags,
    normalizer, pre-tokenizer, and a post-processor that inserts tokens. Not included: decoder, padding, truncation,
    chat template, names of special tokens, key order, explicit defaults, and whether merges are
    "a b" or ["a", "b"]. Saving a tokenizer with another library version therefore keeps the fingerprint.

    Args:
        path: tokenizer directory or `tokenizer.json`.

    Raises:
        UserError: the tokenizer is missing or damaged.
    """
    return hashlib.sha256(_canonical(read_json(tokenizer_json(path))).encode("ascii")).hexdigest()


def identity(text: str) -> str:
    """Return the part of a tokenizer.json, given as text, that determines token ids. See `tokenizer_fingerprint`."""
    return _canonical(json.loads(text))


def _canonical(content: dict[str, Any]) -> str:
    model = dict(content.get("model") or {})
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model.pop("merges", None) or []]
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    added = sorted((t["id"], t["content"], [f for f in flags if t.get(f)]) for t in content.get("added_tokens") or [])
    settings = [content.get("normalizer"), content.get("pre_tokenizer"), _inserted(content.get("post_processor"))]
    vocab = model.pop("vocab", None) or {}
    parts = [vocab, merges, {k: v for k, v in model.items() if v}, added, settings]
    return json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer facts that a dataset needs.

    Attributes:
        path: path as given by the user.
        fingerprint: see `tokenizer_fingerprint`.
        vocab_size: the largest id plus one.
        bos_id, eos_id, pad_id: ids of the special tokens that the directory names, or None.
        thinks: whether <think> is one token, as in MiniMind's third generation.
        added: ids that the tokenizer's post-processor puts before and after a text; usually none.
    """

    path: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None = None
    thinks: bool = False
    added: Sequence[Sequence[int]] = ((), ())

    def frame(self, bos: bool = True, eos: bool = True) -> tuple[list[int], list[int]]:
        """Return the ids before and after a document. See `document_frame`."""
        return document_frame(self.added, self.bos_id if bos else None, self.eos_id if eos else None)


def added_ids(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer's post-processor puts before and after a text."""
    text = "a"
    bare, whole = tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.encode(text).ids
    starts = [start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare]
    if not bare or not starts:
        return [], []
    return whole[: starts[0]], whole[starts[0] + len(bare) :]


def document_frame(
    added: Sequence[Sequence[int]], bos_id: int | None, eos_id: int | None
) -> tuple[list[int], list[int]]:
    """Return the ids before and after a document: one bos and one eos, whether or not the tokenizer adds them itself.

    Args:
        added: see `added_ids`.
        bos_id, eos_id: ids to write. None for none, as for a tokenizer without bos.
    """
    before, after = list(added[0]), list(added[1])
    if bos_id is not None and bos_id not in before:
        before.insert(0, bos_id)
    if eos_id is not None and eos_id not in after:
        after.append(eos_id)
    return before, after


def tokenizer_info(path: str | os.PathLike[str]) -> TokenizerInfo:
    """Read a tokenizer's identity, vocab size and special ids.

    Raises:
        UserError: the tokenizer is missing or damaged.
    """
    file = tokenizer_json(path)
    tokenizer = load_backend(file)
    named = special_tokens(file)

    def special(name: str) -> int | None:
        return tokenizer.token_to_id(named[name]) if name in named else None

    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return TokenizerInfo(
        os.fspath(path),
        tokenizer_fingerprint(file),
        vocab_size,
        special("bos_token"),
        special("eos_token"),
        special("pad_token"),
        thinks=tokenizer.token_to_id("<think>") is not None,
        added=added_ids(tokenizer),
    )


def token_text(path: str | os.PathLike[str], token: int | None) -> str:
    """Return the text of a token, or an empty text for None."""
    return "" if token is None else load_backend(tokenizer_json(path)).id_to_token(token) or ""


class Encoder(Protocol):
    """Converts texts to ids."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Encode a batch.

        Args:
            texts: documents without lone surrogates.

        Returns:
                All ids consecutively, and the number of ids of each document. Nothing is added to a text.
        """
        ...


def load_backend(file: Path) -> tokenizers.Tokenizer:
    """Load a tokenizer.json with the tokenizers library, without truncation and padding.

    Raises:
        UserError: the tokenizers library cannot read the file.
    """
    require_ids(file, read_json(file))
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{file}: not a usable tokenizer ({error})") from error
    # Truncation would drop tokens of long documents, and padding would add tokens.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def require_ids(file: Path, content: dict[str, Any]) -> None:
    """Refuse a tokenizer.json with ids out of range, because the tokenizers library allocates up to the largest id.

    Raises:
        UserError: names the token, or the invalid part of the file.
    """
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pairs = list(vocab.items()) if isinstance(vocab, dict) else []
    if added is not None and not (isinstance(added, list) and all(isinstance(token, dict) for token in added)):
        raise UserError(f"{file}: added_tokens: expected a list of objects; the tokenizer is damaged")
    for token in added or []:
        if not isinstance(token.get("content"), str):
            raise UserError(f"{file}: added_tokens: content: found {token.get('content')!r}, expected a text")
        pairs.append((token["content"], token.get("id")))
    for token, number in pairs:
        if wrong := problem("token id", number):
            raise UserError(f"{file}: id of the token {token!r}: {wrong}; the tokenizer is damaged")


class TokenizersEncoder:
    """Hugging Face `tokenizers`."""

    name = "tokenizers"

    def __init__(self, file: Path) -> None:
        self._tokenizer = load_backend(file)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(itertools.chain.from_iterable(ids), np.uint32, int(lengths.sum())), lengths


class GigatokenEncoder:
    """The optional `gigatoken` library. Only its encoder is used: its file readers lose documents at invalid lines."""

    name = "gigatoken"

    def __init__(self, file: Path) -> None:
        import awkward  # type: ignore[import-untyped]
        import gigatoken

        self._awkward: Any = awkward
        self._load: Any = gigatoken.Tokenizer
        self._file = str(file)
        self._tokenizer: Any = self._load(self._file)
        self._chars = 0

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        self._chars += sum(map(len, texts))
        if self._chars > RENEWAL_CHARS:
            self._tokenizer = None  # freed first, so that memory never holds two
            self._tokenizer, self._chars = self._load(self._file), 0
        rows = self._tokenizer.encode_batch(list(texts), parallel=False)
        return np.asarray(self._awkward.flatten(rows)), np.asarray(self._awkward.num(rows))


def _agree(first: Encoder, second: Encoder) -> bool:
    (tokens, lengths), (other_tokens, other_lengths) = first.encode(PROBE), second.encode(PROBE)
    return np.array_equal(tokens, other_tokens) and np.array_equal(lengths, other_lengths)


def load_encoder(path: str | os.PathLike[str], backend: str = "auto") -> Encoder:
    """Load a tokenizer for encoding.

    Args:
        path: tokenizer directory or `tokenizer.json`.
        backend: "tokenizers", "gigatoken" (must be installed and support this tokenizer), or "auto".

    Raises:
            UserError: the tokenizer is not usable, or gigatoken was requested and does not support it.
    """
    file = tokenizer_json(path)
    reference = TokenizersEncoder(file)
    if backend == "tokenizers":
        return reference
    try:
        fast = GigatokenEncoder(file)
        why = None if _agree(fast, reference) else "its tokens differ from those of tokenizers"
    except ImportError:
        why = "it is not installed (pip install gigatoken)"
    except Exception as error:  # an unsupported tokenizer can raise any error of the Rust library
        why = f"it cannot load this tokenizer ({error})"
    if why is None:
        return fast
    if backend == "gigatoken":
        raise UserError(f"--tokenizer-backend gigatoken: {why}; use --tokenizer-backend auto")
    return reference
