"""Megatron's GPT dataset, in the order of its samples, from any of them on.

A run reads samples 0, 1, 2, ... of a dataset that is shuffled once by `--seed`; the number of
samples consumed so far is therefore the whole data position of a run.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from minimind_mcore import device
from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.check import idx_digest, quick_check
from minimind_mcore.preprocess.tokenize import tokenizer_info
from minimind_mcore.splits import MEGATRON_DEFAULT
from minimind_mcore.training import sample_order

if TYPE_CHECKING:
    from minimind_mcore.training.job import Job


class DatasetTokenizer:
    """What megatron-core's datasets ask of a tokenizer: its end-of-document id, and its name in cache keys."""

    def __init__(self, path: str, vocab_size: int) -> None:
        info = tokenizer_info(path)
        if info.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer at {path} has {info.vocab_size} tokens, more than --padded-vocab-size {vocab_size}"
            )
        if info.eos_id is None:
            raise UserError(f"{path}: tokenizer_config.json names no eos_token, which ends a document")
        self.fingerprint = info.fingerprint
        self.vocab_size = vocab_size
        self.eod = info.eos_id
        self.pad = -1
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict(fingerprint=info.fingerprint)


class NumberedDataset(Dataset[dict[str, Any]]):
    """A dataset whose samples also say their index (if not of themselves), so that a message can name them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, **self.dataset[index]}


class MicroBatchSampler:
    """Indices of this data-parallel rank's micro-batches, starting after `consumed` samples.

    A global batch is the next `global_batch_size` samples; micro-batch m of rank r has its samples
    `m * dp * mbs + r * mbs` to `... + mbs - 1`. It ends with the last whole global batch.
    """

    def __init__(self, total: int, consumed: int, mbs: int, rank: int, dp: int) -> None:
        self.starts = range(consumed + rank * mbs, total - (dp - 1 - rank) * mbs - mbs + 1, mbs * dp)
        self.mbs = mbs

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, start + self.mbs))

    def __len__(self) -> int:
        return len(self.starts)


def build_datasets(args: argparse.Namespace) -> list[Any]:
    """Train, validation and test datasets (None where the split leaves nothing).

    Raises:
        UserError: no data, or data that is damaged or was made with another tokenizer.
    """
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from minimind_mcore.training.data_cache import Builder, GPTDataset  # imports megatron

    tokenizer = DatasetTokenizer(tokenizer_path(args), args.padded_vocab_size)
    args.tokenizer_fingerprint = tokenizer.fingerprint  # checkpoints carry it
    check_prefixes(args, tokenizer)
    # megatron-core keys its cached sample order by path; the same path may hold other data by now.
    tokenizer.unique_identifiers["indices"] = [idx_digest(prefix) for prefix in prefixes(args)]
    require_same_everywhere(args, tokenizer)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        **_blend(args),
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        # The attention is causal by itself; only documents that must not see each other need a mask.
        create_attention_mask=args.reset_attention_mask,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
    )
    sizes = samples_needed(args)
    datasets = list(Builder(GPTDataset, sizes, lambda: True, config).build())
    digests = [sample_order.data_digest(prefix) for prefix in training_prefixes(args)]
    args.sample_order = sample_order.record(args, digests, sample_order.order_digest(datasets[0]))
    return datasets


def require_same_everywhere(args: argparse.Namespace, tokenizer: DatasetTokenizer) -> None:
    """Each rank reads its own data: refuse ranks that would read different batches. Collective."""
    names = ("train_iters", "global_batch_size", "micro_batch_size", "seq_length", "seed", "split")
    mine = {name: getattr(args, name) for name in names} | dict(tokenizer.unique_identifiers)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    for rank, other in enumerate(everywhere):
        differing = [name for name in mine if other[name] != everywhere[0][name]]
        if differing:
            raise UserError(
                f"rank {rank} has another {', '.join(differing)} than rank 0: give every host the same data and flags"
            )


def samples_needed(args: argparse.Namespace) -> list[int]:
    """Samples that a run reads for training, validation and test."""
    evaluations = (args.train_iters // args.eval_interval + 1) * args.eval_iters
    batches = [args.train_iters, evaluations, args.eval_iters]
    return [n * args.global_batch_size for n in batches]


def _blend(args: argparse.Namespace) -> dict[str, Any]:
    """`--data-path [weight] prefix ...` (or one per split) as megatron-core's blend arguments."""
    from megatron.core.datasets.utils import get_blend_from_list

    per_split = [args.train_data_path, args.valid_data_path, args.test_data_path]
    if any(per_split):
        return {"blend_per_split": [get_blend_from_list(paths) for paths in per_split]}
    return {"blend": get_blend_from_list(args.data_path), "split": args.split or MEGATRON_DEFAULT}


def tokenizer_path(args: argparse.Namespace) -> str:
    """The directory of the run's tokenizer (two flags name it, by `--tokenizer-type`)."""
    path = args.tokenizer_name_or_path or args.tokenizer_model
    if not path:
        raise UserError("--tokenizer-name-or-path is missing: the directory that has tokenizer.json")
    return str(path)


def prefixes(args: argparse.Namespace) -> list[str]:
    """Every dataset prefix on the command line, weights left out."""
    from megatron.core.datasets.utils import get_blend_from_list

    found: list[str] = []
    for paths in (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path):
        if paths:
            found += get_blend_from_list(paths)[0]
    if not found:
        raise UserError("--data-path is missing: the prefix of a .bin/.idx pair (see preprocess_data.py)")
    return found


def training_prefixes(args: argparse.Namespace) -> list[str]:
    """The dataset prefixes that training itself reads."""
    from megatron.core.datasets.utils import get_blend_from_list

    return list(get_blend_from_list(args.train_data_path or args.data_path)[0])


def check_prefixes(args: argparse.Namespace, tokenizer: DatasetTokenizer) -> None:
    """Refuse datasets that are missing, truncated, tokenized with another tokenizer, or have ids that it has not."""
    for prefix in prefixes(args):
        quick_check(prefix, tokenizer.fingerprint, tokenizer.vocab_size, args.verify_data)


def micro_batches(
    args: argparse.Namespace, job: Job, dataset: Any, consumed: int, workers: int | None = None
) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches, as the job collates them, on its device; the samples' index [mbs] is not.

    Raises:
        UserError: at the end of the data.
    """
    from megatron.core import parallel_state

    sampler = MicroBatchSampler(
        len(dataset),
        consumed,
        args.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    pin = device.current().kind != "cpu"
    loader: DataLoader[dict[str, Any]] = DataLoader(
        NumberedDataset(dataset),
        batch_sampler=sampler,
        collate_fn=job.collate,
        num_workers=args.num_workers if workers is None else workers,
        pin_memory=pin,
        # A loader draws a seed for its workers: from the generator of dropout, a resumed run would drop other values.
        generator=torch.Generator().manual_seed(args.seed),
    )
    place = device.current().torch_device
    for batch in loader:
        index = batch.pop("index")  # for messages alone: asking the device for it would stop the step
        moved = {k: v.to(place, non_blocking=pin) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        yield moved | {"index": index}
    raise UserError(
        f"the data ends after {len(dataset)} samples, of which {consumed} were consumed before this run: "
        "give the --global-batch-size and --train-iters that the run began with"
    )
