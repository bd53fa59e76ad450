"""The reference model's log-probabilities of every pair, computed once and cached next to `--save`.

    reference-<digest>.npy      [pairs of the data, 2] float32; NaN where no run has needed the value yet
                      .json     the SHA-256 of the array; if it is missing or differs, the cache is not used

The digest covers everything that changes a value: the data, the reference's weights, the model's flags, `--seq-length`
and the precision. The policy's own model computes the values before training, with the reference's weights loaded. So
every layout works, and no second model takes memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from minimind_mcore.checkpoint import assumptions
from minimind_mcore.checkpoint.choose import choose
from minimind_mcore.checkpoint.files import directory_of, is_converted, iterations_in
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.errors import UserError
from minimind_mcore.models.weights import EMBEDDING, OUTPUT
from minimind_mcore.platform import device, ranks
from minimind_mcore.posttrain import data
from minimind_mcore.posttrain.base import PostTraining, run_model
from minimind_mcore.preprocess.indexed import bin_path
from minimind_mcore.storage import MANIFEST, atomic_file, check_manifest, record_files, sha256, writing
from minimind_mcore.training import checkpoint_fit, checkpoint_weights, checkpointing, step
from minimind_mcore.training import data as training_data
from minimind_mcore.training.checkpoint_weights import open_weights, read_tensor
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.job import MicroBatch
from minimind_mcore.training.model import core_config

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule

logger = logging.getLogger(__name__)


class FrozenModel:
    """A frozen model: a teacher, or a live reference model. Used on the last pipeline stage, which has the loss.

    Each rank of that stage has all layers. The tensor-parallel size is the size of the run.

    Args:
        config: configuration of the run.
        path: weights in the format of Hugging Face, MiniMind or Megatron.

    Raises:
        UserError: the path has no readable model, or a model with another vocabulary.
    """

    def __init__(self, config: TrainConfig, path: str) -> None:
        from megatron.core import parallel_state

        source = open_weights(config, Path(path))
        for line in assumptions.described(path, source.assumptions):
            logger.info(line)
        if source.config.vocab_size != config.model.padded_vocab_size:
            raise UserError(
                f"{path}: its vocabulary has {source.config.vocab_size} rows, but --padded-vocab-size is "
                f"{config.model.padded_vocab_size}"
            )
        self.model: MegatronModule | None = None
        if parallel_state.get_pipeline_model_parallel_rank() == config.layout.pp - 1:
            self.model = _build(config, source)

    @torch.no_grad()
    def __call__(self, batch: MicroBatch, labels: Tensor | None = None) -> Tensor:
        assert self.model is not None  # only the last stage has a loss
        return run_model(self.model, batch, labels)


def _build(config: TrainConfig, source: Source) -> GPTModel:
    from minimind_mcore.models.core_config import build_gpt_model
    from minimind_mcore.models.loading import load_into

    # The model has one pipeline stage, even if the run has several. Its embeddings are untied, because megatron-core
    # sums the gradients of tied embeddings over the stages of the run.
    alone = dataclasses.replace(config.layout, pp=1, vpp=None)
    untied = source.config.replace(tie_embeddings=False)
    model = build_gpt_model(untied, core_config(config, alone, untied)).to(device.current().torch_device)
    tied = {OUTPUT: EMBEDDING} if source.config.tie_embeddings else {}
    load_into([model], lambda name: read_tensor(source, tied.get(name, name)))
    return model.to(config.precision.params_dtype).requires_grad_(False).eval()


LogProbs = NDArray[np.float32]


def attach(job: PostTraining, engine: step.Engine, datasets: list[training_data.MapDataset | None]) -> None:
    """Give every dataset the reference's log-probabilities of its pairs. Collective.

    Args:
        job: job whose loss function logs the log-probabilities [2, pairs] of a micro-batch.
        engine: engine of the policy.
        datasets: the datasets. None is skipped.

    Raises:
        UserError: the reference's weights are unknown or missing.
    """
    config, used = job.config, [dataset for dataset in datasets if isinstance(dataset, data.PostTrainingDataset)]
    source = reference_path(config)
    count = len(data.open_column(data.data_prefix(config.data), job.columns[0]))
    needed = np.unique(np.concatenate([dataset.order for dataset in used]))
    cache = ranks.from_main(lambda: _cache_path(job, source))
    known: LogProbs = ranks.from_main(lambda: _read(cache, count))
    missing = needed[np.isnan(known[needed, 0])]
    if len(missing):
        logger.info(f"reference: log-probabilities of {len(missing)} pairs, from {source or 'the current weights'}")
        # LoRA adapters are still zero here, so the policy's model equals its base.
        with _weights_of(config, None if config.model.lora_target_modules else source, engine.model):
            known[missing] = _measure(job, engine, missing)[missing]
        if ranks.is_main() and cache:
            with writing(cache, "give another directory with --save (CKPT_SAVE_DIR)"):
                with atomic_file(cache) as f:
                    np.save(f, known)
                record_files(cache.with_suffix(".json"), [cache])
    for dataset in used:
        dataset.extra["reference"] = known


def reference_path(config: TrainConfig) -> str | None:
    """Return the path of the reference's weights: `--ref-model`, or else the policy's initial weights.

    None means that the policy starts from random weights, which are then the reference's.
    """
    given = config.checkpoint
    if given.ref_model or given.pretrained_checkpoint:
        return given.ref_model or given.pretrained_checkpoint
    if given.load and (given.finetune or checkpoint_weights.is_model(Path(given.load))):
        return given.load
    if not given.load or not iterations_in(Path(given.load)):
        return None
    begun = choose(Path(given.load), given.ckpt_step)
    if begun is not None and is_converted(begun):
        return given.load
    raise UserError(
        f"--load {given.load} resumes a run: give --ref-model (or --pretrained-checkpoint), the initial "
        "weights of that run, as the reference; or give --finetune to start a new run from these weights"
    )


def _cache_path(job: PostTraining, source: str | None) -> Path | None:
    """Return the path of the cache, or None without `--save`."""
    config = job.config
    if not config.checkpoint.save:
        return None
    prefix = data.data_prefix(config.data)
    facts = {
        "data": [*job.data_digests(), *(sha256(bin_path(data.file_prefix(prefix, name))) for name in job.columns)],
        "weights": _weights_digest(Path(source))
        if source
        else [config.data.seed, config.model.minimind_init, config.model.init_method_std],
        "model": [config.flags[name] for name in checkpoint_fit.MODEL_ARGS],
        "seq_length": config.data.seq_length,
        "precision": [config.precision.bf16, config.precision.fp16],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return config.checkpoint.directory.parent / f"reference-{digest[:16]}.npy"


def _weights_digest(path: Path) -> list[str]:
    """Return the digests of a file, of all files of a directory, or of the directory's newest checkpoint."""
    iterations = iterations_in(path)
    folder = directory_of(path, iterations[0]) if iterations else path
    if (folder / MANIFEST).is_file():  # the manifest has the digests of the other files
        return [sha256(folder / MANIFEST)]
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    return [sha256(file) for file in files]


def _read(cache: Path | None, count: int) -> LogProbs:
    if cache is not None and cache.is_file():
        problems = check_manifest(cache.parent, name=cache.with_suffix(".json").name)
        if not problems:
            known: LogProbs = np.load(cache)
            if known.shape == (count, 2):
                return known
        logger.warning("\n  ".join(["the cached log-probabilities are not used:", *problems]))
    return np.full((count, 2), np.nan, dtype=np.float32)


@contextlib.contextmanager
def _weights_of(config: TrainConfig, source: str | None, model: list[MegatronModule]) -> Iterator[None]:
    """Within the context the model has the reference's weights. The optimizer is not affected."""
    if source is None:
        yield
        return
    own = [{k: v.clone() for k, v in chunk.state_dict().items() if v is not None} for chunk in model]
    try:
        checkpointing.load_weights(config, Path(source), model, "reference")
        yield
    finally:
        for chunk, state in zip(model, own, strict=True):
            chunk.load_state_dict(state, strict=False)  # the missing entries are not tensors


def _measure(job: PostTraining, engine: step.Engine, documents: NDArray[np.int64]) -> LogProbs:
    """Return [pairs of the data, 2], filled in for `documents`, on every rank. Collective."""
    from megatron.core import parallel_state

    config, prefix = job.config, data.data_prefix(job.config.data)
    total = len(data.open_column(prefix, job.columns[0]))
    rounds = -(-len(documents) // config.schedule.global_batch_size)
    order = np.resize(documents, rounds * config.schedule.global_batch_size)  # the last round repeats the first pairs
    samples = data.PostTrainingDataset(prefix, job.columns, order, config.data.seq_length)
    batches = [training_data.micro_batches(config, job, samples, 0, workers=0) for _ in engine.model]
    found = torch.zeros(total, 2, dtype=torch.float32, device=device.current().torch_device)
    for result in engine.measure(job, batches, config.schedule.num_microbatches, rounds):
        step.check_losses(result, 0)
        for indices, log_probs in zip(result.indices, result.losses, strict=True):
            found[indices] = log_probs.t()
    # Each data-parallel rank of the last stage has measured some pairs, and has 0 for the others. Log-probabilities are
    # not above 0, so the minimum selects the measured value. A pair that was read twice has the same values.
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=parallel_state.get_data_parallel_group())
    dist.broadcast(found, src=dist.get_world_size() - 1)
    return found.cpu().numpy()
