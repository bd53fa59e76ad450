"""Small models with random weights, their transformers twins, and runs of the inference programs, for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from helpers.engine import Corpus
from helpers.weight_tables import hf_to_mcore
from helpers.weights_on_disk import SMALL, state_dict, write_hf
from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.converters.conversion import Conversion
from minimind_mcore.inference import main
from minimind_mcore.inference.loading import Loaded, load, open_both
from minimind_mcore.models import weights
from minimind_mcore.models.config import ModelConfig


def config_of(name: str, corpus: Corpus) -> ModelConfig:
    """One of `SMALL` with the corpus's vocabulary."""
    return SMALL[name].replace(vocab_size=corpus.vocab_size)


def write_model(folder: Path, name: str, corpus: Corpus, dtype: torch.dtype = torch.float32) -> Path:
    """A directory of transformers with the corpus's tokenizer."""
    config = config_of(name, corpus)
    write_hf(folder, config, state_dict(config, "hf", dtype))
    for file in corpus.tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def write_pth(file: Path, config: ModelConfig) -> None:
    """The same weights in MiniMind's own form."""
    whole = hf_to_mcore(state_dict(config, "hf"), config)
    torch.save(weights.mcore_to_hf(whole, config, "native"), file)


def add_adapters(state: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """Write MiniMind's own LoRA file, which adds B A to the q and o of each layer; return the merged weights."""
    adapters, merged, random = {}, dict(state), torch.Generator().manual_seed(4)
    for name in [n for n in state if n.endswith(("q_proj.weight", "o_proj.weight"))]:
        rows, columns = state[name].shape
        a, b = 0.2 * torch.randn(4, columns, generator=random), 0.2 * torch.randn(rows, 4, generator=random)
        stem = name.removesuffix(".weight")
        adapters |= {f"{stem}.lora.A.weight": a, f"{stem}.lora.B.weight": b}
        merged[name] = state[name] + b @ a
    torch.save(adapters, file)
    return merged


def open_model(path: Path, tokenizer: Path | None = None) -> Loaded:
    """Load a model as the programs do."""
    conversion = Conversion(load_dir=path, save_dir=Path(), save_type="hf", layout=ParallelLayout(), dtype="fp32")
    return load(*open_both(conversion, str(tokenizer) if tokenizer else None))


def twin(path: Path) -> Any:
    """The same model, by transformers alone."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()


def run_inference(path: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    """The rows that inference.py writes for some flags."""
    main.main(["--load", str(path), "--output", str(output), *flags])
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
