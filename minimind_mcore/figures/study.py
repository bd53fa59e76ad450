"""The models that the figures show: trained once from the kit's sample data, then opened with transformers."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from minimind_mcore.checkpoint.tracker import read_tracker
from minimind_mcore.cli import quickstart
from minimind_mcore.cli.settings import CLI, wait_for
from minimind_mcore.converters.conversion import Conversion
from minimind_mcore.errors import UserError
from minimind_mcore.inference import loading
from minimind_mcore.paths import default_outputs
from minimind_mcore.preprocess.tokenize import Encoder, load_encoder

logger = logging.getLogger(__name__)

# Checkpoints of the quickstart: pretrained, fine-tuned, and fine-tuned for only 250 iterations, after which the model
# still answers some sums wrongly.
DENSE = {
    "pretrain": "pretrain/checkpoints",
    "full_sft": "full_sft/checkpoints",
    "early_sft": "full_sft/checkpoints/iter_0000250",
}
# Models with mixtures of experts, and their `router_weight`.
MIXTURES = {"moe": "straight_through", "moe_normalized": "normalized"}
MIXTURE_ITERATIONS = 400
# The byte of each character of the vocabulary: printable bytes stand for themselves, later characters for the others.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_OTHERS = (byte for byte in range(256) if chr(byte) not in ALPHABET)
BYTES = {character: ord(character) if ord(character) < 256 else next(_OTHERS) for character in ALPHABET}


@dataclass(frozen=True)
class Study:
    """A tokenizer and the models of the figures.

    Attributes:
        tokenizer: directory of the tokenizer.
        models: transformers models in fp32 on the CPU, by the names in `DENSE` and `MIXTURES`.
        checkpoint: directory of the fine-tuned model's checkpoints, whose files a figure lists. None: no files.
        digests: cache of `digest`.
    """

    tokenizer: Path
    models: Mapping[str, Any]
    checkpoint: Path | None = None
    digests: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The tokenizer's encoder."""
        return load_encoder(self.tokenizer, "tokenizers")

    @functools.cached_property
    def texts(self) -> Any:
        """transformers' tokenizer, for the chat template and for decoding."""
        from minimind_mcore.preprocess.hf_tokenizer import load_tokenizer

        return load_tokenizer(self.tokenizer)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        found: list[int] = self.encoder.encode([text])[0].tolist()
        return found

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token. Bytes that are not whole characters become their hexadecimal numbers: ‹e4›."""
        return [self._piece(number) for number in ids]

    def _piece(self, number: int) -> str:
        text = str(self.texts.decode([number]))
        if "\ufffd" not in text:
            return text
        values = bytes(BYTES[character] for character in self.texts.convert_ids_to_tokens(number))
        try:
            return values.decode()
        except UnicodeDecodeError:
            return "".join(f"‹{value:02x}›" for value in values)

    def chat(self, question: str) -> str:
        """Return the prompt of a question in the chat template, up to the beginning of the answer."""
        asked = [{"role": "user", "content": question}]
        return str(self.texts.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a model's weights, by name and in fp32."""
        if name not in self.digests:
            whole = hashlib.sha256()
            for key, tensor in sorted(self.models[name].state_dict().items()):
                whole.update(key.encode() + tensor.float().contiguous().numpy().tobytes())
            self.digests[name] = whole.hexdigest()
        return self.digests[name]


def rounded(tensor: Tensor, digits: int = 3) -> Any:
    """Return a tensor as nested lists of short numbers."""
    scaled = (tensor.detach().double() * 10**digits).round() / 10**digits + 0.0  # no negative zero
    return scaled.tolist()


def per_mille(tensor: Tensor) -> Any:
    """Return shares as nested lists of whole per mille, which are short in JSON."""
    return (tensor.detach() * 1000).round().int().tolist()


def train(names: Collection[str], *, tokenizer: bool = True) -> Study:
    """Train the models that neither the quickstart nor an earlier call has trained, and load them.

    Args:
        names: names of the models to load.
        tokenizer: make the tokenizer even if no model is loaded.

    Raises:
        UserError: a training failed.
    """
    root = default_outputs()
    data = root / "data/quickstart"
    if tokenizer or names:
        # The stage download makes data and tokenizer. A sample run adds it before every training.
        stages = ["pretrain"] if "pretrain" in names else ["download"]
        if {"full_sft", "early_sft"} & {*names}:
            stages = ["pretrain", "full_sft"]
        _command("run", "--sample", *stages)
    paths = {name: root / "outputs/quickstart" / path for name, path in DENSE.items()}
    for name, rule in MIXTURES.items():
        output = root / "outputs/docs_figures" / name
        paths[name] = output / "checkpoints"
        own = {
            **quickstart.sizes(1), "MODEL": "minimind3_moe_tiny", "NPUS_PER_NODE": "1", "ROUTER_WEIGHT": rule,
            "DATA_PATH": str(data / "sample.jsonl"), "TOKENIZER_PATH": str(data / "tokenizer"),
            "DATA_DIR": str(data), "OUTPUT_DIR": str(output), "TRAIN_ITERS": str(MIXTURE_ITERATIONS),
            "SAVE_INTERVAL": str(MIXTURE_ITERATIONS), "EVAL_INTERVAL": str(MIXTURE_ITERATIONS),
        }  # fmt: skip
        # A training that was interrupted has a tracker, too. The command resumes it.
        if name in names and read_tracker(paths[name]) != str(MIXTURE_ITERATIONS):
            _command("pretrain", *quickstart.schedule(MIXTURE_ITERATIONS), **own)
    return Study(data / "tokenizer", {name: load(paths[name]) for name in names}, paths["full_sft"])


def _command(*words: str, **settings: str) -> None:
    """Run a command of the kit, with these settings in its environment."""
    if status := wait_for([*CLI, *words], settings):
        raise UserError(f"minimind-mcore {' '.join(words)} ended with exit status {status}; its messages are above")


def load(path: Path) -> Any:
    """Return the transformers model of a checkpoint, in fp32. Its attention returns the weights that it computes."""
    source, _ = loading.open_both(Conversion(load_dir=path, dtype="fp32"), None)
    model = loading.build_model(source)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def watch(model: Any, ids: Sequence[int], *modules: str) -> list[tuple[Tensor, Tensor]]:
    """Run a model on one sequence. Return the input and the output of the named modules, without the batch axis."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0][0], output[0])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        model(torch.tensor([list(ids)]))
    finally:
        for handle in handles:
            handle.remove()
    return [seen[name] for name in modules]
