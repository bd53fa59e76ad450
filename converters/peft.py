"""Write LoRA adapters in the format of `peft.PeftModel.from_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minimind_mcore.checkpoint.lora import Adapter, adapters_of, scale_of
from minimind_mcore.checkpoint.source import Lazy, Source
from minimind_mcore.checkpoint.tensors import Slot, create_safetensors, open_safetensors
from minimind_mcore.converters.convert import Target
from minimind_mcore.errors import UserError
from minimind_mcore.models import weights
from minimind_mcore.models.rules import Rule
from minimind_mcore.storage import FileEntry, file_entry, write_manifest

NAME, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter_source(source: Source) -> Source:
    """Return a source whose tensors are the adapters, without the base weights."""
    return source.replace(tensors=source.adapters, files=(), checks=(), as_stored=False)


class PeftTarget(Target):
    """A PEFT adapter directory.

    One weight of megatron-core corresponds to several modules of transformers (QKV to q, k and v). All these
    modules get the same A, and each gets its rows of B. A module whose B is zero in every layer is left out. Adapters
    of MiniMind have such modules, because MiniMind adapts only q and o.

    Args:
        source: source with adapters.
        rank: LoRA rank, if the command line gives one.
        alpha: LoRA alpha, if the command line gives one.
        base: base model, for `base_model_name_or_path`.

    Raises:
        UserError: an adapter belongs to a weight that is not a linear layer in transformers.
    """

    def __init__(self, source: Source, rank: int | None, alpha: float | None, base: Path | None) -> None:
        self.base = base
        self.rank, self.alpha = scale_of(source, rank, alpha)
        self._adapters = adapters_of(source)
        self._rules = {rule.mcore[0]: rule for rule in weights.rules(source.config) if rule.mcore and rule.required}
        odd = [n for n, a in self._adapters.items() if a.rank != self.rank or ".local_experts." in n or "router" in n]
        if odd:
            raise UserError(
                f"{odd[0]}: PEFT cannot hold this adapter (transformers keeps experts in one tensor, and all modules "
                "must have the same rank); merge it instead"
            )
        self._left_out: set[str] = set()
        self._slots = self._lay_out()
        kind = f"PEFT adapter, r={self.rank} alpha={self.alpha:g}"
        super().__init__(source, kind, sum(slot.nbytes for slot in self._slots.values()))

    def _pairs(self, name: str, adapter: Adapter) -> list[tuple[str, Tensor]]:
        """Return pairs (module of transformers, its B) of one adapter."""
        rule: Rule = self._rules[name]
        parts = rule.to_hf([adapter.b.read()])
        return [(hf.removesuffix(".weight"), part) for hf, part in zip(rule.hf, parts, strict=True)]

    def _lay_out(self) -> dict[str, Slot]:
        pairs = [(m, b, a) for n, a in self._adapters.items() for m, b in self._pairs(n, a)]
        used = {_kind(module) for module, b, _ in pairs if torch.count_nonzero(b)}
        self._left_out = {_kind(module) for module, _, _ in pairs} - used if used else set()
        slots: dict[str, Slot] = {}
        for module, b, adapter in pairs:
            if _kind(module) not in self._left_out:
                slots[_key(module, "A")] = Slot(adapter.a.shape, adapter.a.dtype)
                slots[_key(module, "B")] = Slot(tuple(b.shape), adapter.b.dtype)
        return slots

    def create(self) -> None:
        self.writers = [create_safetensors(self.root / NAME, self._slots)]

    def write(self, name: str, whole: Tensor) -> None:
        stem, letter = name.removesuffix(".default.weight").rsplit(".lora_", 1)
        rule = self._rules[f"{stem}.weight"]
        parts = rule.to_hf([whole]) if letter == "B" else [whole] * len(rule.hf)
        for hf, part in zip(rule.hf, parts, strict=True):
            module = hf.removesuffix(".weight")
            if _kind(module) not in self._left_out:
                self.writers[0].write(_key(module, letter), part)

    def finish(self) -> None:
        modules = sorted({_kind(name.split(".lora_")[0]) for name in self._slots})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self.base) if self.base else None,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": 0.0,
            "target_modules": modules,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        (self.root / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def record(self, manifest: Mapping[str, FileEntry], about: Mapping[str, object]) -> None:
        write_manifest(self.root, {**manifest, CONFIG: file_entry(self.root / CONFIG)}, **about)

    def reopen(self) -> Mapping[str, Lazy]:
        file = open_safetensors(self.root / NAME)

        def b_of(hf: str, like: Tensor) -> Tensor:
            key = _key(hf.removesuffix(".weight"), "B")
            return file.read(key) if key in file.entries else torch.zeros_like(like)

        def read(weight: str, letter: str, lazy: Lazy) -> Tensor:
            rule = self._rules[weight]
            if letter == "B":
                meta = rule.to_hf([torch.empty(lazy.shape, dtype=lazy.dtype)])
                return rule.to_mcore([b_of(n, m) for n, m in zip(rule.hf, meta, strict=True)])[0]
            copies = [file.read(k) for n in rule.hf if (k := _key(n.removesuffix(".weight"), "A")) in file.entries]
            if not copies or not all(torch.equal(copies[0], copy) for copy in copies):
                raise UserError(f"{weight}: its modules in transformers have different A matrices in the output")
            return copies[0]

        tensors: dict[str, Lazy] = {}
        for name, lazy in self.source.adapters.items():
            stem, letter = name.removesuffix(".default.weight").rsplit(".lora_", 1)
            weight = f"{stem}.weight"
            tensors[name] = Lazy(lazy.shape, lazy.dtype, lambda w=weight, x=letter, z=lazy: read(w, x, z))  # type: ignore[misc]
        return tensors


def _kind(module: str) -> str:
    """Return `q_proj` for `model.layers.0.self_attn.q_proj`."""
    return module.rsplit(".", 1)[-1]


def _key(module: str, letter: str) -> str:
    return f"base_model.model.{module.removeprefix('base_model.model.')}.lora_{letter}.weight"
