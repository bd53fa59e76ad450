"""The order in which a run reads its samples, and a warning if a checkpoint was saved with another order.

The data position of a run is the number of consumed samples. With another order, other samples come before that
position: a resumed run reads some samples twice and never reads others. Megatron-LM resumes without a warning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.splits import MEGATRON_DEFAULT, parse_split
from minimind_mcore.preprocess.blends import number
from minimind_mcore.preprocess.check import idx_digest
from minimind_mcore.preprocess.meta import read_meta
from minimind_mcore.training.config import SampleOrder, ScheduleSection

if TYPE_CHECKING:
    from minimind_mcore.training.data_cache import BlendedDataset, GPTDataset

Flags = Mapping[str, object]  # flags of a command line or a checkpoint, by Megatron's names


def data_digest(prefix: str | Path) -> str:
    """Return a digest of a dataset: of the lengths of its documents and, if recorded, of its tokens."""
    meta = read_meta(prefix)
    return idx_digest(prefix) + (meta.written.bin_sha256 if meta else "")


def order_digest(dataset: GPTDataset | BlendedDataset) -> str:
    """Return a digest of megatron-core's order of the documents and samples of a training set, blends included.

    Within one epoch the order does not depend on the length of the run. Over several epochs it does, because Megatron
    shuffles all epochs together.
    """
    digest = hashlib.sha256()
    for part in getattr(dataset, "datasets", [dataset]):
        for array in (part.document_index, part.shuffle_index):
            digest.update(memoryview(array).cast("B"))
    return digest.hexdigest()


def record(schedule: ScheduleSection, digests: Sequence[str], order: str = "") -> SampleOrder:
    """Return what a checkpoint records about the run's samples besides the flags."""
    return {"data": list(digests), "order": order, "samples": schedule.train_iters * schedule.global_batch_size}


def differences(flags: Flags, saved: Flags, ours: SampleOrder | None = None) -> list[str]:
    """Return the reasons why this run has another sample order than a checkpoint's run, with both values.

    Args:
        flags: flags of this run.
        saved: flags of the checkpoint. A checkpoint of MindSpeed-LLM has only these.
        ours: sample order of this run, if already determined.
    """
    theirs = cast("SampleOrder | None", saved.get("sample_order"))
    found = list(_other_flags(flags, saved))
    if ours and theirs:
        paths = [" ".join(_data_words(one)) for one in (saved, flags)]
        if ours["data"] != theirs["data"]:
            digests = [hashlib.sha256("".join(one["data"]).encode()).hexdigest()[:12] for one in (theirs, ours)]
            found.append(
                f"--data-path is {paths[0]} (digest {digests[0]}) there and {paths[1]} (digest {digests[1]}) here"
            )
        elif not found and ours["order"] != theirs["order"]:
            found.append(
                f"--train-iters x --global-batch-size is {theirs['samples']} samples there and {ours['samples']} here, "
                "which are several epochs of the data, and Megatron shuffles all epochs together"
            )
    elif _data_words(saved) and _data_words(flags) != _data_words(saved):
        found.append(f"--data-path is {' '.join(_data_words(saved))} there and {' '.join(_data_words(flags))} here")
    return found


def warning(where: str | Path, differing: Sequence[str]) -> str:
    """Return the warning that a resumed run prints once."""
    return (
        f"{where}: this run reads its samples in another order than the run that saved the checkpoint: "
        f"{'; '.join(differing)}. Some samples are read twice, and others are never read. To keep the order "
        "of the checkpoint, use its values"
    )


def values_differ(there: Flags, here: Flags) -> Iterator[str]:
    """Yield the values that both mappings have and that differ."""
    for name, value in there.items():
        if name in here and here[name] != value:
            yield f"{name} is {value} there and {here[name]} here"


def _other_flags(own: Flags, saved: Flags) -> Iterator[str]:
    """Yield differences in flags that determine the sample order."""
    names = {"seed": "--seed", "split": "--split"}
    if own.get("stage") is None:
        names["seq_length"] = "--seq-length"
    else:  # conversations are not split into samples of equal length
        names["no_shuffle"] = "--no-shuffle"
    if own.get("train_data_path"):  # then --split has no part for validation
        del names["split"]

    def values(one: Flags) -> Flags:
        found = {flag: one[name] for name, flag in names.items() if name in one}
        if "--split" in found:
            found["--split"] = _shares(found["--split"])
        weights = [word for word in _data_words(one) if number(word) is not None]
        return found | {"the list of weights in --data-path": " ".join(weights) or "empty"}

    yield from values_differ(values(saved), values(own))


def _data_words(flags: Flags) -> list[str]:
    """Return the words of `--data-path`, or of `--train-data-path`."""
    return [str(word) for word in cast("list[object]", flags.get("train_data_path") or flags.get("data_path") or [])]


def _shares(split: object) -> str:
    """Normalize `--split` so that its shares sum to 1."""
    try:
        return ",".join(f"{share:.4g}" for share in parse_split(str(split or MEGATRON_DEFAULT)))
    except UserError:  # from a checkpoint of another program
        return str(split)
