"""Write Hugging Face directories, MiniMind's directories and `.pth` files. `checkpoint/hf.py` reads them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minimind_mcore.checkpoint.hf import WEIGHTS
from minimind_mcore.checkpoint.source import Lazy, Source
from minimind_mcore.checkpoint.tensors import Slot, create_safetensors
from minimind_mcore.checkpoint.torch_zip import create_torch
from minimind_mcore.converters.convert import Target
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights, yarn
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.hf_config import hf_model_type, to_native_config
from minimind_mcore.models.rules import Rule, Zeros
from minimind_mcore.preprocess.hf_tokenizer import export_config, require_auto_tokenizer
from minimind_mcore.preprocess.tokenize import tokenizer_fingerprint, tokenizer_info
from minimind_mcore.preprocess.train_tokenizer import SPECIAL, chat_template
from minimind_mcore.storage import FileEntry, file_entry, write_manifest

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# Keys of `to_dict` that do not belong to a causal language model, or that describe this installation.
_NOT_THE_MODEL = (
    *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "output_hidden_states", "output_attentions"),
    *("return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type"),
)


def write_sidecars(root: Path, source: Source, *, native: bool, folder: Path | None, copy_code: bool = False) -> None:
    """Write config.json, generation_config.json and the tokenizer's files.

    Args:
        root: output directory.
        source: source of the conversion.
        native: write MiniMind's own config.
        folder: a directory with a tokenizer; default: the source's, or the one of its training.
        copy_code: with `native`, also copy MiniMind's modelling code.

    Raises:
        UserError: the model was trained with another tokenizer.
    """
    tokenizer = find_tokenizer(source, folder)
    ids: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # of every MiniMind
    if tokenizer is not None:
        ids = copy_tokenizer(tokenizer, root)
    config = native_config(source, folder, root, copy_code) if native else hf_config(source.config)
    # transformers 4 and MindSpeed-LLM read only this name. transformers 5 accepts it too.
    dtype = {"torch_dtype": str(source.dtype).removeprefix("torch.")}
    _write_json(root / "config.json", config | ids | dtype)
    _write_json(root / "generation_config.json", ids)
    if tokenizer is not None:
        require_auto_tokenizer(root)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5, vLLM and MindSpeed-LLM can read."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields: dict[str, Any] = config.hf_config().to_dict()
    for key in _NOT_THE_MODEL:
        fields.pop(key, None)
    fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_model_type(config)]]
    # transformers 5 has `rope_parameters` and other names of the counts. Other programs read only these names.
    # `rope_scaling` must be absent: if it is present, even as null, transformers 5 ignores `rope_parameters`.
    fields |= {"rope_theta": config.rotary_base, "tie_word_embeddings": config.tie_embeddings}
    fields.pop("rope_scaling", None)
    if config.inference_rope_scaling:  # the only form that transformers 4 and 5 and vLLM read alike
        fields.pop("rope_parameters", None)
        fields["rope_scaling"] = yarn.PARAMETERS | yarn.SERVING
    if config.moe:
        fields["num_experts"] = config.moe.num_experts
        fields["router_weight"] = config.moe.router_weight or "normalized"
    return fields


def native_config(source: Source, folder: Path | None, root: Path, copy_code: bool) -> dict[str, Any]:
    """Return MiniMind's own config.json.

    With `copy_code`, copy `model_minimind.py` from `folder` or the source, and name the file in `auto_map`, so that
    transformers runs it under `trust_remote_code`. The flag is needed because the author of the code is unknown.
    """
    fields = to_native_config(source.config)
    if moe := source.config.moe:
        fields["router_weight"] = moe.router_weight or "normalized"
    for place in filter(None, (folder, source.folder)):
        code = place / "model_minimind.py"
        if code.is_file() and not copy_code:
            logger.warning(
                f"{code} was not copied: transformers would run this code under trust_remote_code. Give --copy-code "
                "to copy it, if you trust it"
            )
            break
        if code.is_file():
            logger.warning(f"copied {code}: transformers runs this code under trust_remote_code")
            shutil.copy(code, root / code.name)
            classes = {"AutoConfig": "MiniMindConfig", "AutoModelForCausalLM": "MiniMindForCausalLM"}
            return fields | {"auto_map": {auto: f"model_minimind.{name}" for auto, name in classes.items()}}
    return fields


def find_tokenizer(source: Source, folder: Path | None) -> Path | None:
    """Return the directory of the model's tokenizer, or log that there is none and return None."""
    trained = Path(source.training.tokenizer) if source.training.tokenizer else None
    for place in filter(None, (folder, source.folder, trained)):
        if (place / "tokenizer.json").is_file():
            fingerprint = tokenizer_fingerprint(place)
            if source.training.fingerprint and fingerprint != source.training.fingerprint:
                raise UserError(
                    f"{place}: not the tokenizer that the model was trained with (fingerprint {fingerprint[:12]}, "
                    f"expected {source.training.fingerprint[:12]}); give its directory as --hf-cfg-dir"
                )
            return place
    logger.warning(
        "found no tokenizer (--hf-cfg-dir, or --tokenizer-name-or-path): the output has weights and configs, "
        "but no tokenizer files"
    )
    return None


def copy_tokenizer(tokenizer: Path, root: Path) -> dict[str, int | None]:
    """Copy a tokenizer's files, with a tokenizer_config.json that has a chat template and makes AutoTokenizer load
    tokenizer.json. Return the special ids by config key, None for a token that the tokenizer lacks.
    """
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, root / name)
    config_file = root / "tokenizer_config.json"
    config = export_config(tokenizer)
    info = tokenizer_info(tokenizer)
    content = json.loads((root / "tokenizer.json").read_text(encoding="utf-8"))
    names = {token["content"] for token in content.get("added_tokens") or []}
    if "chat_template" not in config and set(SPECIAL[:3]) <= names:
        config["chat_template"] = chat_template()
    if not config_file.is_file() or json.loads(config_file.read_text(encoding="utf-8")) != config:
        _write_json(config_file, config)
    return {"bos_token_id": info.bos_id, "eos_token_id": info.eos_id, "pad_token_id": info.pad_id}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


SHARD_BYTES = 2 << 30


class StateTarget(Target):
    """A state dict of transformers or MiniMind, in any number of files.

    Args:
        source: source of the conversion.
        form: one of `weights.FORMS`.
        kind: format, for messages.
    """

    def __init__(self, source: Source, form: str, kind: str) -> None:
        self.form = form
        self._zeros: list[Rule] = []
        self._rules: dict[str, list[Rule]] = {}
        self.slots: dict[str, Slot] = {}
        for rule in weights.rules(source.config, form):
            if not rule.written:
                continue
            if isinstance(rule, Zeros):
                self._zeros.append(rule)
            for name in rule.mcore:
                self._rules.setdefault(name, []).append(rule)
            dtype = source.tensors[rule.mcore[0]].dtype if rule.mcore else source.dtype
            self.slots |= {name: Slot(shape, dtype) for name, shape in zip(rule.hf, rule.shapes, strict=True)}
        super().__init__(source, kind, sum(slot.nbytes for slot in self.slots.values()))

    def write(self, name: str, whole: Tensor) -> None:
        for rule in self._rules[name]:
            for hf_name, tensor in zip(rule.hf, rule.to_hf([whole]), strict=True):
                self._write(hf_name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        next(writer for writer in self.writers if name in writer.entries).write(name, tensor)

    def _write_zeros(self) -> None:
        for rule in self._zeros:
            for name, tensor in zip(rule.hf, rule.to_hf([]), strict=True):
                self._write(name, tensor.to(self.slots[name].dtype))


class HFTarget(StateTarget):
    """A Hugging Face directory: safetensors, config, generation config, tokenizer.

    Args:
        source: source of the conversion.
        native: write MiniMind's own format.
        folder: directory of config and tokenizer; default: the source's.
        copy_code: with `native`, also copy MiniMind's modelling code, which transformers can run.
        shard_bytes: maximum size of a file, unless a single tensor is larger.
    """

    def __init__(
        self,
        source: Source,
        *,
        native: bool,
        folder: Path | None,
        copy_code: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        what = "MiniMind's own form" if native else hf_model_type(source.config)
        super().__init__(source, "native" if native else "hf", f"Hugging Face directory, {what}")
        self.folder, self.copy_code, self.shard_bytes = folder, copy_code, shard_bytes

    def create(self) -> None:
        shards: list[dict[str, Slot]] = [{}]
        for name, slot in self.slots.items():
            if shards[-1] and sum(s.nbytes for s in shards[-1].values()) + slot.nbytes > self.shard_bytes:
                shards.append({})
            shards[-1][name] = slot
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        names = names if len(shards) > 1 else [WEIGHTS[0]]
        self.writers = [create_safetensors(self.root / n, slots) for n, slots in zip(names, shards, strict=True)]
        if len(shards) > 1:
            index = {name: file for file, slots in zip(names, shards, strict=True) for name in slots}
            text = json.dumps({"metadata": {"total_size": self.nbytes}, "weight_map": index}, indent=1)
            (self.root / f"{WEIGHTS[0]}.index.json").write_text(text + "\n", encoding="utf-8")
        self._write_zeros()

    def finish(self) -> None:
        native = self.form == "native"
        write_sidecars(self.root, self.source, native=native, folder=self.folder, copy_code=self.copy_code)

    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        small = {p.name: file_entry(p) for p in sorted(self.root.iterdir()) if p.name not in manifest}
        write_manifest(self.root, {**manifest, **small}, **about)


class PthTarget(StateTarget):
    """A `.pth` of MiniMind's trainer: one state dict with today's names.

    Args:
        source: source of the conversion.
    """

    single_file: str = "weights.pth"  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, source: Source) -> None:
        super().__init__(source, "native", "MiniMind .pth")

    def create(self) -> None:
        self.writers = [create_torch(self.root / self.single_file, {}, {"": self.slots})]

    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        """Write nothing, because a single file has no manifest."""

    def reopen(self) -> Mapping[str, Lazy]:
        """Open the output with the architecture, which a weights file does not store completely."""
        from minimind_mcore.checkpoint.minimind import open_pth

        return open_pth(self.root / self.single_file, self.source.config).tensors
