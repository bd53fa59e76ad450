"""Megatron's GPT dataset, read in order from any sample on.

A run reads samples 0, 1, 2, ... of a dataset that is shuffled once with `--seed`. The number of consumed samples is
therefore the complete data position of a run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import fields_from
from minimind_mcore.inputs.splits import MEGATRON_DEFAULT, parse_split
from minimind_mcore.platform import device, ranks
from minimind_mcore.preprocess.blends import parse_blend, sizes
from minimind_mcore.preprocess.check import idx_digest, quick_check
from minimind_mcore.preprocess.indexed import read_index
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.training import sample_order
from minimind_mcore.training.config import DataSection, TrainConfig

if TYPE_CHECKING:
    from minimind_mcore.training.job import Job, MicroBatch


class DatasetTokenizer:
    """The interface that megatron-core's datasets need: the end-of-document id, and the tokenizer's name in cache
    keys."""

    def __init__(self, path: str, vocab_size: int) -> None:
        info = tokenizer_info(path)
        if info.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer at {path} has {info.vocab_size} tokens, more than --padded-vocab-size {vocab_size}"
            )
        if info.eos_id is None:
            raise UserError(f"{path}: tokenizer_config.json has no eos_token, which must end each document")
        self.fingerprint = info.fingerprint
        self.vocab_size = vocab_size
        self.eod = info.eos_id
        self.pad = -1
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict(fingerprint=info.fingerprint)


class MapDataset(Protocol):
    """A map-style dataset of megatron-core or of post-training."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class NumberedDataset(Dataset[dict[str, Any]]):
    """Add each sample's dataset index under "index", unless present, so that error messages can cite it."""

    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, **self.dataset[index]}


def micro_batch_indices(total: int, consumed: int, mbs: int, rank: int, dp: int) -> Iterator[list[int]]:
    """Yield the indices of this data-parallel rank's micro-batches, starting after `consumed` samples.

    A global batch is the next `global_batch_size` samples. Micro-batch m of rank r has its samples
    `m * dp * mbs + r * mbs` to `... + mbs - 1`. The last incomplete global batch is dropped.
    """
    for start in range(consumed + rank * mbs, total - (dp - 1 - rank) * mbs - mbs + 1, mbs * dp):
        yield list(range(start, start + mbs))


def open_tokenizer(config: TrainConfig) -> DatasetTokenizer:
    """Open the tokenizer of the run, and record its fingerprint for checkpoints."""
    tokenizer = DatasetTokenizer(tokenizer_path(config.data), config.model.padded_vocab_size)
    config.record.tokenizer_fingerprint = tokenizer.fingerprint
    return tokenizer


def build_datasets(config: TrainConfig) -> list[MapDataset | None]:
    """Build the training, validation and test datasets (None where the split is empty).

    Raises:
        UserError: the data is missing, damaged, or was made with another tokenizer.
    """
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from minimind_mcore.training.data_cache import Builder, GPTDataset  # imports megatron

    tokenizer = open_tokenizer(config)
    check_prefixes(config, tokenizer)
    # megatron-core keys its cached sample order by path, but the data at that path may have changed.
    tokenizer.unique_identifiers["indices"] = [idx_digest(prefix) for prefix in prefixes(config.data)]
    require_same_everywhere(config, tokenizer)
    compile_helpers()
    options = fields_from(GPTDatasetConfig, vars(config.data)) | {
        "random_seed": config.data.seed,
        "sequence_length": config.data.seq_length,
        "path_to_cache": config.data.data_cache_path,
        "tokenizer": tokenizer,
        # Attention is causal without a mask. A mask is needed only to separate documents.
        "create_attention_mask": config.data.reset_attention_mask,
    }
    wanted = samples_needed(config)
    datasets: list[Any] = []
    for number, part in enumerate(read := parts(config)):
        if not part.prefixes:
            datasets.append(None)
            continue
        built: Any = GPTDatasetConfig(**options | {"blend": (part.prefixes, part.weights), "split": part.split})
        built.split_matrix = [share if place == number else None for place, share in enumerate(built.split_matrix)]
        datasets.append(Builder(GPTDataset, wanted, lambda: True, built).build()[number])
    digests = [sample_order.data_digest(prefix) for prefix in read[0].prefixes]
    order = sample_order.order_digest(datasets[0])
    config.record.sample_order = sample_order.record(config.schedule, digests, order)
    return datasets


@dataclass(frozen=True)
class SplitData:
    """The data of training, validation or test.

    Attributes:
        prefixes: datasets that have tokens for this part. Empty if the part is not read.
        weights: weights of the datasets. None for a single dataset.
        split: the split in Megatron's format.
    """

    prefixes: list[str]
    weights: list[float] | None
    split: str


def parts(config: TrainConfig) -> list[SplitData]:
    """Return the data of training, validation and test.

    A dataset without tokens for a part of the split is left out of that part: megatron-core 0.16.1 loops for ever over
    a dataset without tokens.

    Raises:
        UserError: no training data is left, or the words of a blend are invalid.
    """
    per_split = [config.data.train_data_path, config.data.valid_data_path, config.data.test_data_path]
    found = []
    for number in range(3):
        split = ",".join(str(int(place == number)) for place in range(3)) if any(per_split) else config.data.split
        words = per_split[number] if any(per_split) else config.data.data_path
        blend = parse_blend(words or [])
        weights = [float(weight) for weight in blend.weights or sizes(blend.prefixes)]
        kept = [place for place, prefix in enumerate(blend.prefixes) if _tokens(prefix, split, number)]
        if number == 0 and not kept:
            raise UserError(f"--split {split}: no training data is left of {' '.join(blend.prefixes)}")
        chosen = [weights[place] for place in kept] if len(kept) > 1 else None
        found.append(SplitData([blend.prefixes[place] for place in kept], chosen, split or MEGATRON_DEFAULT))
    return found


def _tokens(prefix: str, split: str | None, number: int) -> int:
    """Return the tokens of a dataset for training (0), validation (1) or test (2), rounded to documents as in
    Megatron."""
    lengths = read_index(prefix).lengths
    shares = parse_split(split or MEGATRON_DEFAULT)
    start, stop = (round(sum(shares[:count]) * len(lengths)) for count in (number, number + 1))
    return int(lengths[start:stop].sum(dtype="int64"))


def compile_helpers() -> None:
    """Compile megatron-core's C++ index helpers if it runs from source, as on an Ascend host. Collective.

    Wheels of megatron-core include the helpers. MindSpeed-LLM's programs also compile them at the start.

    Raises:
        UserError: the compilation fails.
    """
    name = "megatron.core.datasets.helpers_cpp"

    def compile_here() -> None:
        from megatron.core.datasets import utils

        try:
            utils.compile_helpers()
        except (SystemExit, OSError) as error:
            raise UserError(
                f"{Path(utils.__file__).parent}: found no compiled {name}, and `make` failed there (see above). "
                "Install make, g++ and pybind11 for this Python, and run the same command again"
            ) from error

    missing = importlib.util.find_spec(name) is None and os.environ.get("LOCAL_RANK", "0") == "0"
    ranks.together(compile_here if missing else lambda: None)
    importlib.invalidate_caches()  # another rank may have compiled them


def require_same_everywhere(config: TrainConfig, tokenizer: DatasetTokenizer) -> None:
    """Check that all ranks read the same data, because each rank opens its own copy. Collective."""
    names = ("train_iters", "global_batch_size", "micro_batch_size", "seq_length", "seed", "split")
    mine = {name: config.flags[name] for name in names} | dict(tokenizer.unique_identifiers)
    everywhere = ranks.gather(mine)
    for rank, other in enumerate(everywhere):
        differing = [name for name in mine if other[name] != everywhere[0][name]]
        if differing:
            raise UserError(
                f"rank {rank} and rank 0 differ in {', '.join(differing)}: give every host the same data and flags"
            )


def samples_needed(config: TrainConfig) -> list[int]:
    """Return how many samples a run reads for training, validation and test."""
    evaluations = (config.schedule.train_iters // config.schedule.eval_interval + 1) * config.schedule.eval_iters
    batches = [config.schedule.train_iters, evaluations, config.schedule.eval_iters]
    return [n * config.schedule.global_batch_size for n in batches]


def tokenizer_path(data: DataSection) -> str:
    """Return the directory of the run's tokenizer (`--tokenizer-type` decides which of two flags names it)."""
    path = data.tokenizer_name_or_path or data.tokenizer_model
    if not path:
        raise UserError("--tokenizer-name-or-path is missing: give the directory with tokenizer.json")
    return str(path)


def prefixes(data: DataSection) -> list[str]:
    """Return the dataset prefixes of the command line, without weights."""
    given = (data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path)
    found = [prefix for paths in given if paths for prefix in parse_blend(paths).prefixes]
    if not found:
        raise UserError("--data-path is missing: give the prefix of a .bin/.idx pair (see preprocess_data.py)")
    return found


def check_prefixes(config: TrainConfig, tokenizer: DatasetTokenizer) -> None:
    """Refuse datasets that are missing, truncated, made with another tokenizer, or have ids outside the vocabulary."""
    for prefix in prefixes(config.data):
        quick_check(prefix, tokenizer.fingerprint, tokenizer.vocab_size, config.data.verify_data)


def micro_batches(
    config: TrainConfig, job: Job, dataset: MapDataset, consumed: int, workers: int | None = None
) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches on its device, collated by the job, each with its sample indices.

    Raises:
        UserError: at the end of the data.
    """
    from megatron.core import parallel_state

    indices = micro_batch_indices(
        len(dataset),
        consumed,
        config.schedule.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    pin = device.current().kind != "cpu"
    loader: DataLoader[dict[str, Any]] = DataLoader(
        NumberedDataset(dataset),
        batch_sampler=indices,
        collate_fn=job.collate,
        num_workers=config.data.num_workers if workers is None else workers,
        pin_memory=pin,
        # The loader seeds its workers from this generator. The global one is dropout's, and a resumed run would differ.
        generator=torch.Generator().manual_seed(config.data.seed),
    )
    place = device.current().torch_device
    # These stay on the CPU, because every layer reads them and reading from the device would synchronize.
    kept = () if device.current().is_ascend or config.model.transformer_impl != "local" else ("cu_seqlens",)
    for batch in loader:
        moved = {
            name: value.to(place, non_blocking=pin) if isinstance(value, torch.Tensor) and name not in kept else value
            for name, value in batch.items()
        }
        yield cast("MicroBatch", moved)
    raise UserError(
        f"the data ends after {len(dataset)} samples, of which {consumed} were consumed before this run: "
        "give the --global-batch-size and --train-iters of the original run"
    )
