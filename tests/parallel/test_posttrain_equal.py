"""Ten steps of each stage of post-training equal plain torch around the transformers model, in every layout.

The oracle (`twin.py`) runs each sample by itself, without padding or packing, and has the losses from
their formulas: MiniMind's trainers, the DPO paper, and its variants'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine import Corpus, Server, layout, worst_difference
from torch import Tensor
from twin import Hyper, initial_weights, load_twin, train

from minimind_mcore.models.presets import PRESETS

STEPS, MICRO_BATCH, BATCH, SEED, SEQUENCE = 10, 2, 4, 1234, 72
MODEL = "minimind3_tiny"
HYPER = Hyper(
    lambda step: 1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step + 1) / STEPS))), 0.01, (0.9, 0.999), lambda p: True
)
FLAGS = {
    "train_iters": STEPS, "micro_batch_size": MICRO_BATCH, "global_batch_size": BATCH, "seq_length": SEQUENCE,
    "lr_at_iteration_end": True, "decay_all": True, "weight_decay": 0.01, "seed": SEED, "init_method_std": 0.05,
}  # fmt: skip
Sample = dict[str, Tensor]
DYNAMIC = {"no_pad_to_seq_lengths": True}
PACKED = {"reset_attention_mask": True, "neat_pack": True}

# name: processes, flags of the layout
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, layout()),
    "TP2": (2, layout(tp=2)),
    "TP2 SP": (2, layout(tp=2, sequence_parallel=True)),
    "PP2": (2, layout(pp=2)),
    "DP2": (2, layout(use_distributed_optimizer=True)),
}


@pytest.fixture(scope="session")
def start(server: Server, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the weights that every run here starts from."""
    folder = tmp_path_factory.mktemp("start")
    still = {"train_iters": 1, "lr": 0.0, "min_lr": 0.0, "seq_length": 32, "ckpt_format": "torch"}
    still = FLAGS | still | {"save": folder / "checkpoints"}
    server.run(corpus.flags(PRESETS[MODEL], **still), folder / "run")
    return folder / "checkpoints"


def read_column(prefix: Path, name: str) -> list[Tensor]:
    """The samples of one pair of files, read by the definition of the format."""
    raw = Path(f"{prefix}_packed_{name}_document.idx").read_bytes()
    lengths = np.frombuffer(raw, np.int32, int.from_bytes(raw[18:26], "little"), offset=34)
    numbers = torch.from_numpy(np.fromfile(f"{prefix}_packed_{name}_document.bin", np.int32)).long()
    return list(numbers.split(lengths.tolist()))


def samples_in_order(prefix: Path, *names: str) -> list[Sample]:
    """What a run reads: epochs, each shuffled anew by one generator."""
    columns = {name: read_column(prefix, name) for name in names}
    count, generator, order = len(columns[names[0]]), np.random.RandomState(SEED), []
    while len(order) < STEPS * BATCH:
        epoch = np.arange(count)
        generator.shuffle(epoch)
        order += epoch.tolist()
    return [{n: column[i][:SEQUENCE] for n, column in columns.items()} | {"number": torch.tensor(i)} for i in order]


def in_steps(samples: list[Sample], micro_batch: int = MICRO_BATCH) -> list[list[list[Sample]]]:
    """Micro-batches of each step."""
    micros = [samples[i : i + micro_batch] for i in range(0, STEPS * BATCH, micro_batch)]
    return [micros[i : i + BATCH // micro_batch] for i in range(0, len(micros), BATCH // micro_batch)]


def unpacked(sample: Sample) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of the samples in a packed one."""
    numbers = sample["attention_mask"]
    return [(sample["input_ids"][numbers == n], sample["labels"][numbers == n]) for n in numbers.unique()]


def parts_of(micro: list[Sample]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of every sample of a micro-batch."""
    return [part for sample in micro for part in unpacked(sample)]


def logits_of(twin: Any, tokens: Tensor) -> Tensor:
    """[length, vocabulary] of one sample."""
    logits: Tensor = twin(tokens[None], use_cache=False).logits[0]
    return logits


def sft_loss(twin: Any, micro: list[Sample], weights_of: Callable[[Tensor], Tensor] = torch.ones_like) -> Any:
    """Mean over the labels of a micro-batch."""
    total, count = torch.zeros(()), 0
    for tokens, labels in parts_of(micro):
        losses = F.cross_entropy(logits_of(twin, tokens)[:-1], labels[1:], reduction="none", ignore_index=-100)
        total = total + (losses * weights_of(labels[1:])).sum()
        count += int((labels[1:] != -100).sum())
    return total / count, torch.zeros(())


def compare(found: Any, expected: tuple[list[float], list[float]], tolerance: float = 1e-4) -> None:
    """Losses within the tolerance, gradient norms too."""
    losses, norms = expected
    differences = worst_difference(found.column(), losses), worst_difference(found.column("grad_norm"), norms)
    print("largest relative difference of losses and gradient norms:", *differences)
    assert len(losses) == STEPS and max(differences) <= tolerance


SFT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fixed length": ("chat", "one", {}),
    "longest of micro-batch": ("chat", "one", DYNAMIC),
    "packed": ("packed", "one", PACKED),
    "TP2 longest": ("chat", "TP2", DYNAMIC),
    "TP2 SP longest, odd multiple": ("chat", "TP2 SP", DYNAMIC | {"pad_to_multiple_of": 3}),
    "TP2 SP packed": ("packed", "TP2 SP", PACKED),
    "PP2 fixed": ("chat", "PP2", {}),
    "PP2 packed": ("packed", "PP2", PACKED | DYNAMIC),
    "PP2 VPP2 longest": ("chat", "PP2", DYNAMIC | {"num_layers_per_virtual_pipeline_stage": 1}),
    "DP2 longest": ("chat", "DP2", DYNAMIC),
}


@pytest.mark.parametrize("name", SFT)
def test_sft_equals_plain_torch(server: Server, dialogues: Corpus, start: Path, tmp_path: Path, name: str) -> None:
    data, place, flags = SFT[name]
    prefix, (processes, parallel) = dialogues.prefix.with_name(data), LAYOUTS[place]
    argv = dialogues.flags(PRESETS[MODEL], **FLAGS, **parallel | flags, data_path=prefix, is_instruction_dataset=True)
    found = server.run(argv, tmp_path / "run", processes, posttrain=True)
    compare(found, expected_sft(dialogues, start, data))


def expected_sft(
    dialogues: Corpus,
    start: Path,
    data: str,
    whole: bool = False,
    known: dict[Any, Any] = {},  # noqa: B006
) -> tuple[list[float], list[float]]:
    """Losses and norms of the oracle; `whole`: over all tokens of a step."""
    if (data, whole) not in known:
        config = PRESETS[MODEL].replace(vocab_size=dialogues.vocab_size)
        twin = load_twin(config, initial_weights(start, config))
        samples = samples_in_order(dialogues.prefix.with_name(data), "input_ids", "attention_mask", "labels")
        steps = in_steps(samples, BATCH if whole else MICRO_BATCH)
        known[data, whole] = train(twin, config, steps, lambda micro: sft_loss(twin, micro), HYPER)
        assert known[data, whole][0][-1] < known[data, whole][0][0] - 0.05, "it must learn something"
    return known[data, whole]


def pair_log_probs(twin: Any, micro: list[Sample]) -> tuple[Tensor, Tensor]:
    """[2, pairs]: summed log-probabilities of chosen and rejected, and the number of their labels."""
    sums, counts = [], []
    for side in ("chosen", "rejected"):
        for sample in micro:
            tokens, labels = sample[f"{side}_input_ids"], sample[f"{side}_labels"][1:]
            log_probs = logits_of(twin, tokens)[:-1].log_softmax(-1)
            picked = log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            sums.append(picked[labels != -100].sum())
            counts.append((labels != -100).sum())
    return torch.stack(sums).view(2, -1), torch.stack(counts).view(2, -1)


def dpo_loss(kind: str, log_ratio: Tensor, beta: float, smoothing: float) -> Tensor:
    """Of each pair, from the difference of its two sides."""
    if kind == "ipo":
        return (log_ratio - 0.5 / beta).square()
    if kind == "hinge":
        return (1 - beta * log_ratio).clamp(min=0)
    scaled = beta * (log_ratio - 1.4) if kind == "simpo" else beta * log_ratio
    return (1 - smoothing) * torch.log1p(torch.exp(-scaled)) + smoothing * torch.log1p(torch.exp(scaled))


BETA, SMOOTHING, FTX = 0.3, 0.1, 0.2
DPO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sigmoid": ("sigmoid", "one", {}),
    "sigmoid TP2 SP": ("sigmoid", "TP2 SP", DYNAMIC),
    "sigmoid TP2": ("sigmoid", "TP2", {}),
    "sigmoid PP2": ("sigmoid", "PP2", {}),
    "sigmoid DP2": ("sigmoid", "DP2", {"calculate_per_token_loss": True}),
    "ipo PP2": ("ipo", "PP2", DYNAMIC),
    "simpo TP2": ("simpo", "TP2", {}),
    "hinge": ("hinge", "one", DYNAMIC),
}


@pytest.mark.parametrize("name", DPO)
def test_dpo_equals_plain_torch(server: Server, dialogues: Corpus, start: Path, tmp_path: Path, name: str) -> None:
    kind, place, flags = DPO[name]
    smoothing = SMOOTHING if kind in ("sigmoid", "simpo") else 0.0
    loss = {"dpo_beta": BETA, "dpo_loss_type": kind, "dpo_label_smoothing": smoothing, "pref_ftx": FTX}
    processes, parallel = LAYOUTS[place]
    prefix = dialogues.prefix.with_name("pairs")
    argv = dialogues.flags(PRESETS[MODEL], **FLAGS, **parallel | flags | loss, data_path=prefix, stage="dpo")
    found = server.run(argv, tmp_path / "run", processes, posttrain=True)
    compare(found, expected_dpo(dialogues, start, kind, smoothing, metrics := []))
    assert found.rows[-1]["rewards/margins"] > found.rows[0]["rewards/margins"], "it must learn something"
    for i, column in enumerate(("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")):
        expected = [sum(micro[i] for micro in step) / len(step) for step in metrics]
        assert found.column(column) == pytest.approx(expected, rel=1e-4, abs=2e-5), column


def expected_dpo(
    dialogues: Corpus,
    start: Path,
    kind: str,
    smoothing: float,
    metrics: list[Any],
    known: dict[Any, Any] = {},  # noqa: B006
) -> tuple[list[float], list[float]]:
    """Losses and norms of the oracle; `metrics` gets, for each step, those of its micro-batches."""
    if kind not in known:
        config = PRESETS[MODEL].replace(vocab_size=dialogues.vocab_size)
        twin, frozen = (load_twin(config, initial_weights(start, config)) for _ in range(2))
        names = [f"{side}_{what}" for side in ("chosen", "rejected") for what in ("input_ids", "labels")]
        rows: list[list[float]] = []

        def loss(micro: list[Sample]) -> tuple[Tensor, Tensor]:
            gained, counts = pair_log_probs(twin, micro)
            likelihood = gained[0] / counts[0]
            if kind != "simpo":
                with torch.no_grad():
                    reference = pair_log_probs(frozen, micro)[0]
                gained = gained - reference
            if kind in ("ipo", "simpo"):
                gained = gained / counts
            losses = dpo_loss(kind, gained[0] - gained[1], BETA, smoothing) - FTX * likelihood
            rewards = BETA * gained.detach()
            right = (rewards[0] > rewards[1]).float()
            rows.append([x.mean().item() for x in (rewards[0], rewards[1], right, rewards[0] - rewards[1])])
            return losses.mean(), torch.zeros(())

        steps = in_steps(samples_in_order(dialogues.prefix.with_name("pairs"), *names))
        curves = train(twin, config, steps, loss, HYPER)
        known[kind] = curves, [rows[i : i + 2] for i in range(0, len(rows), 2)]
    metrics += known[kind][1]
    return known[kind][0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", ["one", "TP2", "PP2"])
def test_reason_equals_plain_torch(server: Server, dialogues: Corpus, start: Path, tmp_path: Path, place: str) -> None:
    import tokenizers

    processes, parallel = LAYOUTS[place]
    argv = dialogues.flags(PRESETS[MODEL], **FLAGS, **parallel, stage="reason")
    found = server.run(argv, tmp_path / "run", processes, posttrain=True)
    vocabulary = tokenizers.Tokenizer.from_file(str(dialogues.tokenizer / "tokenizer.json"))
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    pieces = torch.tensor([i for tag in tags for i in vocabulary.encode(tag, add_special_tokens=False).ids])

    def weights_of(labels: Tensor) -> Tensor:
        return torch.where(torch.isin(labels, pieces), 10.0, 1.0)

    samples = samples_in_order(dialogues.prefix, "input_ids", "attention_mask", "labels")
    assert any((weights_of(sample["labels"]) > 1).any() for sample in samples)
    config = PRESETS[MODEL].replace(vocab_size=dialogues.vocab_size)
    twin = load_twin(config, initial_weights(start, config))
    compare(found, train(twin, config, in_steps(samples), lambda micro: sft_loss(twin, micro, weights_of), HYPER))


TEACHER = PRESETS[MODEL].replace(hidden_size=96, num_layers=2, ffn_hidden_size=256)
ALPHA, TEMPERATURE = 0.4, 1.5


@pytest.fixture(scope="session")
def teacher(server: Server, dialogues: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `hf` and, of the same weights, `checkpoints` of TP2 PP1: a smaller model, of other weights."""
    folder = tmp_path_factory.mktemp("teacher")
    flags = FLAGS | {"train_iters": 1, "ckpt_format": "torch", "save": folder / "checkpoints", "seed": 7}
    flags |= {"init_method_std": 0.3, "is_instruction_dataset": True}
    server.run(dialogues.flags(TEACHER, **flags, **layout(tp=2)), folder / "run", 2, posttrain=True)
    from minimind_mcore.models import weights

    config = TEACHER.replace(vocab_size=dialogues.vocab_size)
    files = sorted((folder / "checkpoints/iter_0000001").glob("mp_rank_*/model_optim_rng.pt"))
    ranks = [torch.load(file, weights_only=False)["model"] for file in files]
    whole = {n: weights.unshard(n, [rank[n] for rank in ranks]) for n, t in ranks[0].items() if isinstance(t, Tensor)}
    twin = load_twin(config, weights.mcore_to_hf(whole, config, "hf_fused"))
    twin.save_pretrained(folder / "hf")
    return folder


DISTILL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "HF": ("hf", "one", {}),
    "checkpoint TP2": ("checkpoints", "TP2", DYNAMIC),
    "HF TP2 SP": ("hf", "TP2 SP", {"calculate_per_token_loss": False}),
    "checkpoint PP2": ("checkpoints", "PP2", {}),
}


@pytest.mark.parametrize("name", DISTILL)
def test_distillation_equals_plain_torch(
    server: Server, dialogues: Corpus, start: Path, teacher: Path, tmp_path: Path, name: str
) -> None:
    form, place, flags = DISTILL[name]
    processes, parallel = LAYOUTS[place]
    mixing = {"distill_alpha": ALPHA, "distill_temperature": TEMPERATURE, "teacher_model": teacher / form}
    argv = dialogues.flags(PRESETS[MODEL], **FLAGS, **parallel | flags | mixing, stage="distill")
    found = server.run(argv, tmp_path / "run", processes, posttrain=True)
    compare(found, expected_distillation(dialogues, start, teacher))
    mixed = [ALPHA * row["ce_loss"] + (1 - ALPHA) * row["kl_loss"] for row in found.rows]
    assert found.column() == pytest.approx(mixed, rel=1e-5) and min(found.column("kl_loss")) > 0.1


def expected_distillation(
    dialogues: Corpus,
    start: Path,
    teacher: Path,
    known: list[Any] = [],  # noqa: B006
) -> tuple[list[float], list[float]]:
    """Losses and norms of the oracle."""
    if not known:
        import transformers

        config = PRESETS[MODEL].replace(vocab_size=dialogues.vocab_size)
        twin = load_twin(config, initial_weights(start, config))
        wise = transformers.AutoModelForCausalLM.from_pretrained(teacher / "hf").eval()

        def loss(micro: list[Sample]) -> tuple[Tensor, Tensor]:
            kl, count = torch.zeros(()), 0
            for tokens, labels in parts_of(micro):
                has_label = labels[1:] != -100
                with torch.no_grad():
                    p = (logits_of(wise, tokens)[:-1][has_label] / TEMPERATURE).softmax(-1)
                q = (logits_of(twin, tokens)[:-1][has_label] / TEMPERATURE).softmax(-1)
                kl, count = kl + (p * (p / q).log()).sum(), count + len(p)
            return ALPHA * sft_loss(twin, micro)[0] + (1 - ALPHA) * TEMPERATURE**2 * kl / count, torch.zeros(())

        samples = samples_in_order(dialogues.prefix, "input_ids", "attention_mask", "labels")
        known.append(train(twin, config, in_steps(samples), loss, HYPER))
    return known[0]  # type: ignore[no-any-return]
