"""Ten steps of each stage of post-training equal plain torch around the transformers model, in every layout.

The oracle (`twin.py`) runs each sample by itself, without padding or packing, and has the losses from
their formulas: MiniMind's trainers, the DPO paper, and its variants'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import Corpus, Server, layout, worst_difference
from helpers.posttrain_oracle import (
    BATCH,
    DYNAMIC,
    FLAGS,
    HYPER,
    LAYOUTS,
    MICRO_BATCH,
    MODEL,
    PACKED,
    Sample,
    compare,
    in_steps,
    logits_of,
    parts_of,
    samples_in_order,
    sft_loss,
)  # fmt: skip
from helpers.twin import initial_weights, load_twin, train
from torch import Tensor

from minimind_mcore.models.presets import PRESETS

SFT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fixed length": ("chat", "one", {}),
    "longest of micro-batch": ("chat", "one", DYNAMIC),
    "TP2 longest": ("chat", "TP2", DYNAMIC),
    "TP2 SP longest, odd multiple": ("chat", "TP2 SP", DYNAMIC | {"pad_to_multiple_of": 3}),
    "TP2 SP packed": ("packed", "TP2 SP", PACKED),
    "PP2 fixed, from a checkpoint of PP1": ("chat", "PP2", {"init_method_std": 0.01}),
    "PP2 packed": ("packed", "PP2", PACKED | DYNAMIC),
    "PP2 VPP2 longest": ("chat", "PP2", DYNAMIC | {"num_layers_per_virtual_pipeline_stage": 1}),
    "DP2 longest": ("chat", "DP2", DYNAMIC),
}


@pytest.mark.parametrize("name", SFT)
def test_sft_equals_plain_torch(server: Server, dialogues: Corpus, start: Path, tmp_path: Path, name: str) -> None:
    data, place, flags = SFT[name]
    prefix, (processes, parallel) = dialogues.prefix.with_name(data), LAYOUTS[place]
    flags = flags | {"data_path": prefix, "is_instruction_dataset": True}
    if "checkpoint" in name:
        flags |= {"pretrained_checkpoint": start, "ckpt_format": "torch"}
    argv = dialogues.flags(PRESETS[MODEL], **FLAGS | parallel | flags)
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
    "sigmoid DP2": ("sigmoid", "DP2", {"overlap_grad_reduce": True, "overlap_param_gather": True}),
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


@pytest.mark.parametrize("place", ["TP2", "PP2"])
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


OLD_CORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("TP2 SP", "packed", PACKED),
    "dpo": ("PP2", "pairs", DYNAMIC | {"dpo_beta": BETA, "dpo_label_smoothing": SMOOTHING, "pref_ftx": FTX}),
    "distill": ("TP2", "chat", {"distill_alpha": ALPHA, "distill_temperature": TEMPERATURE}),
}


@pytest.mark.parametrize("stage", OLD_CORE)
def test_stages_equal_plain_torch_on_core_012(
    server_012: Server, dialogues: Corpus, start: Path, teacher: Path, tmp_path: Path, stage: str
) -> None:
    place, data, flags = OLD_CORE[stage]
    processes, parallel = LAYOUTS[place]
    flags = flags | {"stage": stage, "data_path": dialogues.prefix.with_name(data)}
    flags |= {"teacher_model": teacher / "hf"} if stage == "distill" else {}
    argv = dialogues.flags(PRESETS[MODEL], **FLAGS, **parallel | flags)
    found = server_012.run(argv, tmp_path / "run", processes, posttrain=True)
    expected = {
        "sft": lambda: expected_sft(dialogues, start, "packed"),
        "dpo": lambda: expected_dpo(dialogues, start, "sigmoid", SMOOTHING, []),
        "distill": lambda: expected_distillation(dialogues, start, teacher),
    }
    compare(found, expected[stage]())


def test_experts_learn_the_same_on_two_ranks(server: Server, dialogues: Corpus, tmp_path: Path) -> None:
    model, flags = PRESETS["minimind3_moe_tiny"], FLAGS | {"stage": "sft", "micro_batch_size": 1}
    packed = PACKED | {"data_path": dialogues.prefix.with_name("packed"), "moe_aux_loss_coeff": 0.0}
    one = server.run(dialogues.flags(model, **flags, **packed), tmp_path / "one", posttrain=True)
    argv = dialogues.flags(model, **flags, **packed, **layout(ep=2))
    compare(server.run(argv, tmp_path / "two", 2, posttrain=True), (one.column(), one.column("grad_norm")))


def test_the_load_balancing_loss_is_part_of_what_alpha_weighs(
    server: Server, dialogues: Corpus, teacher: Path, tmp_path: Path
) -> None:
    """With alpha 0 it changes nothing, with alpha 1 distillation is SFT."""
    runs = {}
    for name, stage, alpha, coefficient in (
        ("none", "distill", 0.0, 0.0),
        ("ignored", "distill", 0.0, 5.0),
        ("whole", "distill", 1.0, 5.0),
        ("sft", "sft", None, 5.0),
        ("sft without", "sft", None, 0.0),
    ):
        flags = FLAGS | {"train_iters": 3, "stage": stage, "moe_aux_loss_coeff": coefficient}
        if stage == "distill":
            flags |= {"distill_alpha": alpha, "teacher_model": teacher / "hf"}
        argv = dialogues.flags(PRESETS["minimind3_moe_tiny"], **flags)
        runs[name] = server.run(argv, tmp_path / name, posttrain=True).column("grad_norm")
    assert runs["ignored"] == pytest.approx(runs["none"], rel=1e-6)
    assert runs["whole"] == pytest.approx(runs["sft"], rel=1e-5)
    assert runs["sft"] != pytest.approx(runs["sft without"], rel=1e-2)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_bf16_stays_close_to_fp32(server: Server, dialogues: Corpus, start: Path, tmp_path: Path, stage: str) -> None:
    flags: dict[str, Any] = {"stage": "sft"}
    if stage == "dpo":
        flags = {"stage": "dpo", "dpo_beta": BETA, "dpo_label_smoothing": SMOOTHING, "pref_ftx": FTX}
        flags |= {"data_path": dialogues.prefix.with_name("pairs")}
    processes, parallel = LAYOUTS["DP2"]
    argv = dialogues.flags(PRESETS[MODEL], **FLAGS, **parallel | flags, bf16=True)
    found = server.run(argv, tmp_path / "run", processes, posttrain=True)
    if stage == "sft":
        losses, _ = expected_sft(dialogues, start, "chat")
    else:
        losses, _ = expected_dpo(dialogues, start, "sigmoid", SMOOTHING, [])
    print("largest relative difference of losses:", worst_difference(found.column(), losses))
    assert 0 < worst_difference(found.column(), losses) <= 0.02
