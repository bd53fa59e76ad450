"""The figures of the chapters: each is computed from models, and one of its numbers follows from others."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import ROOT
from helpers.pages import content
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from minimind_mcore.cli import quickstart
from minimind_mcore.errors import UserError
from minimind_mcore.figures import devices, layers, learning, main, tokens
from minimind_mcore.figures import study as figures_study
from minimind_mcore.figures.layouts import timeline
from minimind_mcore.figures.study import DENSE, MIXTURES, Study
from minimind_mcore.forecast import speed
from minimind_mcore.inference.loading import empty_model, fill_model
from minimind_mcore.models import yarn
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.models.recipes import RECIPES
from minimind_mcore.pipeline import sample
from minimind_mcore.platform.fused import attention as fused_attention
from minimind_mcore.preprocess import dialogues, train_tokenizer

FOLDER = ROOT / "docs/figures"


def small(preset: str, vocabulary: int, seed: int) -> Any:
    """A model of a preset with random weights."""
    config = PRESETS[preset].replace(vocab_size=vocabulary)
    generator = torch.Generator().manual_seed(seed)
    model = empty_model(config)
    state = {
        name: torch.ones(weight.shape) if "norm" in name else torch.randn(weight.shape, generator=generator) * 0.1
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    model = fill_model(model, state, config)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Random models of the figures' shapes, and a small tokenizer."""
    folder = tmp_path_factory.mktemp("figures") / "tokenizer"
    texts = [f"{a}+{b}={a + b} the list of A{a} is 小明{b}。 return What {a}" for a in range(40) for b in range(40)]
    train_tokenizer.save(train_tokenizer.train(iter(texts), 300, split_digits=True), str(folder))
    dense = {name: small("minimind3_tiny", 300, seed) for seed, name in enumerate(DENSE)}
    mixtures = {name: small("minimind3_moe_tiny", 300, seed) for seed, name in enumerate(MIXTURES)}
    return Study(folder, dense | mixtures)


def shape(value: Any) -> Any:
    """Keys and types of a JSON value; of a list its first element's. Numbers are alike."""
    if isinstance(value, dict):
        return {key: shape(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float) else type(value).__name__


def committed(name: str) -> Any:
    """A figure as it is in docs/figures."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


# What is read from trained weights, from their tokenizer or from files. Everything else follows from the code alone.
TRAINED = {
    "tokenizer": {"merges", "examples"},
    "embeddings": {"tokens", "ids", "vectors", "points", "explained", "shape"},
    "attention": {"pieces", "weights"},
    "rope": {"query", "key"},
    "norm": {"token", "input", "weight", "output", "gate", "up", "product"},
    "moe": {"pieces", "models"},
    "mask": {"pieces", "ids", "learned", "losses"},
    "checkpoint": {"files"},
    "lora": {"changes"},
    "dpo": {"steps"},
    "grpo": {"prompt", "answer", "responses", "rewards", "advantages", "updates"},
    "sampling": {"prompts"},
    "cache": {"difference"},
}


def nine_digits(value: Any) -> Any:
    """A JSON value whose floats have nine digits: the last ones depend on the processor."""
    if isinstance(value, dict):
        return {key: nine_digits(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [nine_digits(entry) for entry in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


@pytest.mark.parametrize("name", main.FIGURES)
def test_a_committed_figure_is_what_the_code_makes(name: str, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained values have the same shape, all others are equal. Else: minimind-mcore docs figures NAME."""
    # A random model has no right answers, so the group is given: one right answer in four.
    monkeypatch.setattr(learning, "sample", lambda study, question, generator: group(study, question))
    made, found = json.loads(main.make(name, study)), committed(name)
    if name == "checkpoint":
        made["files"] = [["manifest.json", 303]]  # random models have no files
    trained = TRAINED.get(name, set())
    assert found.keys() == made.keys() >= trained
    for key in found.keys() - trained - {"digests"}:
        assert nine_digits(found[key]) == nine_digits(made[key]), f"minimind-mcore docs figures {name}"
    assert {key: shape(found[key]) for key in trained} == {key: shape(made[key]) for key in trained}
    assert found["digests"].keys() == set(main.FIGURES[name][1] or ())
    assert all(len(bytes.fromhex(digest)) == 32 for digest in found["digests"].values())


def group(study: Study, question: str) -> list[list[int]]:
    """Answers to a sum of which every fourth is right."""
    first, second = question.removesuffix("=?").split("+")
    right = int(first) + int(second)
    end = [study.texts.eos_token_id]
    return [study.ids(str(right + (0 if number % 4 == 0 else 1))) + end for number in range(8)]


def test_every_figure_is_on_a_page() -> None:
    files = {file.stem for file in FOLDER.glob("*.json")}
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("learn_*.md"))
    assert files == main.FIGURES.keys()
    assert set(re.findall(r"```\{widget\} (\w+)", pages)) == files


def vocabulary() -> list[str]:
    """The tokens of the tokenizer's figure, by id."""
    figure = committed("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*figure["added"], *alphabet, *(pair.replace(" ", "") for pair in figure["merges"])]


def test_the_ids_of_the_tokenizer() -> None:
    """The tokenizers library, built from the merges of the figure, gives the ids of the figure."""
    figure = committed("tokenizer")
    merges = [tuple(pair.split(" ")) for pair in figure["merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary())}, merges))  # type: ignore[arg-type]
    backend.add_tokens([AddedToken(token, normalized=False) for token in figure["added"]])
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)  # type: ignore[assignment]
    for example in figure["examples"]:
        assert backend.encode(example["text"]).ids == example["ids"]


def test_every_token_is_named_by_the_bytes_of_its_id() -> None:
    """In all figures that show ids, by the vocabulary of the tokenizer's figure."""
    # The library's own byte for each character of the vocabulary, from texts that have every byte of UTF-8.
    texts = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 64)]))
    ((characters, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(texts)
    value = dict(zip(characters, texts.encode(), strict=True))
    embeddings, mask = committed("embeddings"), committed("mask")
    shown = [*zip(embeddings["tokens"], embeddings["ids"], strict=True), *zip(mask["pieces"], mask["ids"], strict=True)]
    for prompt in committed("sampling")["prompts"]:
        shown += zip(prompt["tokens"], prompt["ids"], strict=True)
        assert len(set(prompt["tokens"])) == len(prompt["tokens"]) == 40
    listed, added = vocabulary(), len(committed("tokenizer")["added"])
    for text, number in shown:
        parts = re.fullmatch("(?:‹..›)+", text)
        found = bytes.fromhex(re.sub("[‹›]", "", text)) if parts else text.encode()
        token = listed[number]
        assert found == (token.encode() if number < added else bytes(value[character] for character in token)), number


def test_tokens_that_are_no_whole_character(study: Study) -> None:
    assert study.pieces(study.ids("A😀")) == ["A", "‹f0›", "‹9f›", "‹98›", "‹80›"]


def test_only_tokens_of_the_vocabulary_have_embeddings(study: Study) -> None:
    figure = tokens.embeddings(study)
    assert [study.ids(text) for text in figure["tokens"]] == [[number] for number in figure["ids"]]
    assert len(set(figure["ids"])) == len(figure["ids"])


def test_the_plane_of_the_embeddings() -> None:
    figure = committed("embeddings")
    vectors = torch.tensor(figure["vectors"], dtype=torch.float64)
    variances = (vectors - vectors.mean(0)).T.cov().diagonal().sum(), torch.tensor(figure["points"]).square().sum()
    assert variances[1] / (vectors - vectors.mean(0)).square().sum() == pytest.approx(figure["explained"], abs=2e-3)
    assert figure["shape"] == [6400, 128] and len(vectors) == len(figure["tokens"])
    # Letters that name no table entry have rows of one direction, as the chapter says.
    rows = torch.nn.functional.normalize(vectors[[figure["tokens"].index(letter) for letter in "AEOUY"]], dim=1)
    assert not {*"AEIOUY"} & {*dialogues.LETTERS} and (rows @ rows.T).min() > 0.98


def test_attention_of_the_first_layer(study: Study) -> None:
    """The weights of a head from the projections, in plain torch."""
    model = study.models["full_sft"]
    ids = study.ids(study.chat("27+38=?") + "65")
    layer, config = model.model.layers[0], model.config
    x = layer.input_layernorm(model.get_input_embeddings()(torch.tensor([ids])))[0]
    size, position = config.head_dim, torch.arange(len(ids))[:, None]
    angle = position * 1e6 ** (-torch.arange(0, size, 2) / size)

    def turned(vectors: torch.Tensor) -> torch.Tensor:
        a, b = vectors.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    q = turned(layer.self_attn.q_norm(layer.self_attn.q_proj(x).view(len(ids), -1, size)[:, 3]))
    k = turned(layer.self_attn.k_norm(layer.self_attn.k_proj(x).view(len(ids), -1, size)[:, 1]))
    weights = (q[-1] @ k.T / math.sqrt(size)).softmax(-1)
    found = layers.attention(study)["weights"][0][3][-1]
    assert found == pytest.approx((weights * 1000).tolist(), abs=0.6)


def test_attention_sums_to_one() -> None:
    for layer in committed("attention")["weights"]:
        for head in layer:
            assert all(sum(row) == pytest.approx(1000, abs=len(row) / 2 + 1) for row in head)


def test_rotations() -> None:
    figure = committed("rope")
    for name, model in figure["models"].items():
        size = PRESETS[name].head_dim
        assert model["frequencies"][1] == pytest.approx(figure["theta"] ** (-2 / size))
        assert model["yarn"] == pytest.approx(yarn.factors(size, figure["theta"]), abs=1e-6)


def test_norm_and_swiglu() -> None:
    figure = committed("norm")
    x = figure["input"]
    rms = math.sqrt(sum(value * value for value in x) / len(x) + figure["eps"])
    assert figure["output"] == pytest.approx(
        [w * value / rms for w, value in zip(figure["weight"], x, strict=True)], abs=2e-3
    )
    gate, up = figure["gate"][0], figure["up"][0]
    assert figure["product"][0] == pytest.approx(gate / (1 + math.exp(-gate)) * up, abs=5e-3)


def test_routing_and_the_gradient_of_the_router(study: Study) -> None:
    for figure in (committed("moe"), layers.moe(study)):
        for model in figure["models"]:
            assert all(sum(row) == pytest.approx(1000, abs=2) for layer in model["shares"] for row in layer)
            assert model["gradient"]["normalized"] < 1e-5 * model["gradient"]["straight_through"]


def test_the_labels_of_a_conversation() -> None:
    figure = committed("mask")

    def heard(which: str) -> str:
        return "".join(p for p, on in zip(figure["pieces"], figure["learned"][which], strict=True) if on)

    answer = "<think>\n\n</think>\n\n{}<|im_end|>\n"
    assert (heard("all"), heard("last")) == (answer.format(65) + answer.format(46), answer.format(46))
    losses: dict[int, list[float]] = {0: [], 1: []}
    for loss, learned in zip(figure["losses"], figure["learned"]["all"], strict=True):
        losses[learned].append(loss)
    # What the model was taught it predicts almost surely, the rest hardly better than by chance.
    assert statistics.mean(losses[1]) < 0.2 and statistics.mean(losses[0]) > 0.5 * math.log(6400)


def test_the_cosine_schedule() -> None:
    figure = committed("schedule")
    least, most, first, last = figure["min_lr"], figure["lr"], figure["warmup"], figure["iterations"]
    share = (500 - first) / (last - first)
    expected = least + (most - least) * 0.5 * (1 + math.cos(math.pi * share))
    assert figure["rates"]["cosine"][50] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "virtual"), [(2, 4, 1), (4, 8, 1), (4, 8, 2), (2, 4, 2), (4, 16, 4)]
)
def test_the_bubble_of_a_timeline(stages: int, micro_batches: int, virtual: int) -> None:
    line = timeline(stages, micro_batches, virtual)
    assert line["bubble"] == pytest.approx(speed.bubble(stages, micro_batches, virtual), abs=1e-4)
    for rank in line["ranks"]:
        assert len({tuple(one[:3]) for one in rank}) == 2 * micro_batches * virtual == len(rank)
        assert all(a[3] + 1 + a[0] <= b[3] for a, b in itertools.pairwise(rank))


def test_what_ranks_hold() -> None:
    figure = committed("parallel")
    for name, all_layouts in figure["layouts"].items():
        whole = next(one for one in all_layouts if one["tp"] == one["pp"] == one["ep"] == 1)
        assert whole["parameters"] == [PRESETS[name].num_parameters()]
        assert all(one["tp"] * one["pp"] * one["dp"] == figure["world"] for one in all_layouts)
        assert {one["sent"]["TP"] > 0 for one in all_layouts if one["tp"] == 1} == {False}
        experts = getattr(PRESETS[name].moe, "num_experts", 0)
        for one in all_layouts:
            held = [expert for first, last in one["experts"] for expert in range(first, last + 1)]
            assert held == [*range(experts)] and len(one["experts"]) == (one["ep"] if experts else 0)


def test_a_tensor_on_its_way(study: Study) -> None:
    """minimind3_tiny has 2 key-value heads of 32, each with 2 query heads."""
    qkv = committed("checkpoint")["journeys"][0]
    assert qkv["whole"] == [[0, 0, 64], [1, 0, 32], [2, 0, 32], [0, 64, 64], [1, 32, 32], [2, 32, 32]]
    assert qkv["ranks"] == [qkv["whole"][:3], qkv["whole"][3:]]


def test_the_size_of_adapters_and_of_a_change(study: Study) -> None:
    sizes = committed("lora")["models"]["minimind3_tiny"]
    # h = 128, qkv 256, MLP 448: the sums of inputs and outputs of the four matrices of each of four layers
    assert sizes["adapters"][3] == 4 * 8 * ((128 + 256) + (128 + 128) + (128 + 896) + (448 + 128))
    before, after = (study.models[name].state_dict() for name in ("pretrain", "full_sft"))
    change = learning.lora(study)["changes"][0]
    name = f"model.layers.{change['name']}"
    norm = float((after[name] - before[name]).norm())
    assert math.hypot(*change["values"]) == pytest.approx(norm, rel=1e-3)


def test_the_loss_of_dpo() -> None:
    figure = committed("dpo")
    first, last = figure["steps"][0], figure["steps"][-1]
    margin = (last["chosen"] - first["chosen"]) - (last["rejected"] - first["rejected"])
    assert last["loss"] == pytest.approx(math.log1p(math.exp(-figure["beta"] * margin)), abs=1e-4)


def test_the_advantages_and_the_loss_of_grpo() -> None:
    figure = committed("grpo")
    rewards = figure["rewards"]
    texts = ["".join(pieces[:-1]) for pieces in figure["responses"]]
    assert rewards == [float(text == figure["answer"]) for text in texts]
    mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
    assert figure["advantages"] == pytest.approx([(r - mean) / spread for r in rewards], abs=1e-3)
    last = figure["updates"][-1]
    losses = [
        max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
        for a, row in zip(figure["advantages"], last["ratios"], strict=True)
        for ratio in row
    ]
    assert last["loss"] == pytest.approx(statistics.mean(losses), abs=1e-3)


def test_the_logits_of_a_prompt(study: Study) -> None:
    prompt = tokens.sampling(study)["prompts"][0]
    logits = study.models["full_sft"](torch.tensor([study.ids(prompt["prompt"])])).logits[0, -1]
    assert prompt["first"] == pytest.approx(float(logits.max()) * 100, abs=0.51)
    assert sum(prompt["drops"]) == pytest.approx(float(logits.max() - logits.min()) * 100, abs=1.01)
    assert all(len(one["drops"]) == 6399 for one in committed("sampling")["prompts"])


def test_the_cache() -> None:
    figure = committed("cache")
    assert figure["models"]["minimind3"]["bytes_per_token"] == 2 * 8 * 4 * 96 * 2
    assert 0 <= figure["difference"] < 1e-3


def test_a_name_that_is_gone_is_an_error() -> None:
    with pytest.raises(UserError, match=r"rms_norms, which does not exist"):
        devices.summary("platform.ascend:rms_norms")
    assert devices.summary("platform.ascend:rms_norm").startswith("CANN's RMSNorm")


def bound(name: str) -> float:
    """The share of a change that rank 8 can hold, on average over the layers."""
    shares = []
    for change in committed("lora")["changes"]:
        if name in change["name"]:
            squares = [value * value for value in change["values"]]
            shares.append(sum(squares[:8]) / sum(squares))
    return statistics.mean(shares)


def written() -> dict[str, list[str]]:
    """Chapters, and numbers in their text that a figure or the code decides."""
    embeddings, mask, lora, cache = (committed(name) for name in ("embeddings", "mask", "lora", "cache"))
    dpo, grpo, norm, rates = (committed(name) for name in ("dpo", "grpo", "norm", "schedule"))
    straight, normalized = ([max(row) for row in model["shares"][2]] for model in committed("moe")["models"])
    drop = committed("sampling")["prompts"][0]["drops"][0] / 100
    shares = [bound(change["name"]) for change in lora["changes"]]
    values = (min(shares), max(shares), bound("v_proj"), bound("mlp"))
    tiny, large = PRESETS["minimind3_tiny"], PRESETS["minimind3"]
    experts = len(committed("moe")["models"][0]["shares"][0][0])
    table = large.vocab_size * large.hidden_size
    targets: Any = RECIPES["tiny_lora"].flags["--lora-target-modules"]
    attention = large.num_layers * large.num_heads * 4 // 2  # bytes of each squared token of a text, causal
    early = [DENSE["early_sft"].rpartition("_")[2].lstrip("0"), f"{sample.ITERATIONS['full_sft']:,}"]
    tokens_of_a_cache = 2048
    return {
        "attention": [
            str(tiny.num_layers), str(tiny.num_heads), str(tiny.num_kv_heads), str(tiny.head_dim), str(large.head_dim),
            quickstart.sizes(1)["SEQ_LENGTH"], str(fused_attention.SHORT),
        ],
        "cache": [
            str(cache["difference"]), str(large.num_heads), str(large.num_kv_heads), str(large.head_dim),
            f"{cache['models']['minimind3']['bytes_per_token']:,}", f"{tokens_of_a_cache:,}",
            str(cache["models"]["minimind3"]["bytes_per_token"] * tokens_of_a_cache // 2**20),
        ],
        "checkpoint": [],
        "devices": [
            str(fused_attention.SHORT), str(large.num_layers), str(attention * fused_attention.SHORT**2 // 2**20),
            f"{fused_attention.SHORT * 16:,}", str(attention * (fused_attention.SHORT * 16) ** 2 // 2**30),
        ],
        "dpo": [str(len(dpo["steps"]) - 1), dpo["chosen"], dpo["rejected"], f"{math.log(2):.5f}", *early],
        "embeddings": [
            f"{embeddings['shape'][0]:,}", str(embeddings["shape"][1]), str(len(embeddings["tokens"])),
            str(large.hidden_size), f"{table:,}",
        ],
        "grpo": [
            str(len(grpo["responses"])), grpo["answer"], str(grpo["updates"][0]["loss"]).removesuffix(".0"),
            str(len(grpo["updates"]) - 1), str(grpo["lr"]).replace("e-0", "e-"), *early,
        ],
        "layer": [
            str(tiny.ffn_hidden_size), str(tiny.hidden_size), f"{large.ffn_hidden_size:,}", str(large.hidden_size),
            f"{3 * large.hidden_size * large.ffn_hidden_size:,}", f"{norm['eps']:f}",
        ],
        "lora": [
            *(f"{value:.0%}".replace("%", " %") for value in values), f"{128 * (128 + 128):,}", f"{128 * 128:,}",
            f"{tiny.num_adapter_parameters(8, targets):,}",
        ],
        "mask": [f"{max(mask['losses']):.1f}", f"{math.log(6400):.1f}", f"{mask['losses'][1]:.1f}", "6,400"],
        "moe": [
            *(f"{statistics.mean(best) / 10:.0f} %" for best in (normalized, straight)), str(experts),
            f"{100 // experts} %", str(figures_study.MIXTURE_ITERATIONS), *losses_of_the_experiment(),
        ],
        "parallel": [str(committed("parallel")["world"]), f"{large.vocab_size:,}"],
        "rope": [
            f"{large.rope_theta:,.0f}", f"{yarn.FACTOR:.0f}", f"{yarn.TRAINED_LENGTH:,}", f"{yarn.BETA_FAST:.0f}",
            str(large.head_dim), f"{2 * math.pi:.1f}",
        ],
        "sampling": [
            f"{drop:.1f}", f"{round(math.exp(drop), -3):,.0f}", f"{math.exp(drop / 3):.0f}", f"{large.vocab_size:,}"
        ],
        "schedule": [
            str(rates["lr"]), str(rates["min_lr"]), str((rates["lr"] + rates["min_lr"]) / 2), str(rates["decay"])
        ],
        "tokenizer": [
            f"{large.vocab_size:,}", str(large.hidden_size), f"{table / 1e6:.1f}",
            f"{table / large.num_parameters():.0%}".replace("%", " %"),
        ],
    }  # fmt: skip


def losses_of_the_experiment() -> list[str]:
    """Two cells of the first table of docs/models.md: validation losses of normalized and straight_through."""
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \(\S+ to", text, re.M)[:3])
    return [rows["normalized"], rows["straight_through"]]


CHAPTERS = sorted(written())
# Numbers that nothing decides: seconds of commands, examples of formulas and questions, facts of other models. 0 to 3
# are everywhere.
OTHERS = {
    "attention": "20 80",  # 80 %: test_what_the_chapters_say_of_their_figures
    "cache": "10",
    "checkpoint": "20",
    "devices": "20 910 1e-3 1e-6 4",
    "dpo": "30",
    "embeddings": "20 0.98",  # 0.98: test_the_plane_of_the_embeddings
    "grpo": "30 1e-6 4 0.2 3e-4",  # 0.2, 3e-4: values of rl_config
    "layer": "20",
    "lora": "8 40 60 128",
    "mask": "10 100",
    "moe": "100 40",
    "parallel": "20 30 4 5",
    "rope": "",
    "sampling": "10 27 38 65",
    "schedule": "40",
    "tokenizer": "3,000 10 151,936 4",
}


def test_every_chapter_is_checked() -> None:
    pages = {page.stem.removeprefix("learn_") for page in (ROOT / "docs").glob("learn_*.md")}
    assert {name for name in pages if not name.endswith("zh")} == {*CHAPTERS} == OTHERS.keys()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_numbers_of_a_chapter_are_those_of_its_figure(chapter: str) -> None:
    """In both languages. If the figure was made again, change the text."""
    for page in (f"learn_{chapter}.md", f"learn_{chapter}_zh.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for number in written()[chapter]:
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d|[.,]\d)", text), f"{page}: {number}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_number_of_a_chapter_is_unchecked(chapter: str) -> None:
    found = content(ROOT / f"docs/learn_{chapter}.md").numbers
    checked = {number.partition(" ")[0] for number in written()[chapter]}
    others = {*OTHERS[chapter].split()}
    assert found - checked - others <= {"0", "1", "2", "3"} and others <= found


def test_what_the_chapters_say_of_their_figures() -> None:
    """Statements without numbers of their own."""
    figure = committed("moe")
    for model in figure["models"]:
        digits = [row for piece, row in zip(figure["pieces"], model["shares"][2], strict=True) if piece.isdigit()]
        assert len(digits) == 5 and len({row.index(max(row)) for row in digits}) == 1  # one expert for all five
        gradient = model["gradient"]
        assert round(math.log10(gradient["straight_through"] / gradient["normalized"])) == 7
    assert bound("v_proj") > max(bound(name) for name in ("q_proj", "k_proj", "o_proj")) > bound("mlp")
    figure = committed("attention")
    sink = 16  # the line break behind "assistant", seen from the last line breaks of the prompt
    assert figure["pieces"][13:17] == ["ass", "ist", "ant", "\n"] and figure["pieces"][20] == "\n\n"
    assert sum(head[20][sink] > 800 for layer in figure["weights"] for head in layer) == 3
    steps = committed("dpo")["steps"]
    assert max(step["chosen"] for step in steps) > steps[-1]["chosen"]
    grpo = committed("grpo")
    assert "65" in ["".join(pieces[:-1]) for pieces in grpo["responses"]] and grpo["answer"] == "66"


@pytest.mark.parametrize(("iteration", "trained"), [(None, True), ("120", True), ("400", False)])
def test_an_interrupted_mixture_is_trained_to_its_end(
    iteration: str | None, trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(figures_study, "default_outputs", lambda: tmp_path)
    monkeypatch.setattr(figures_study, "_command", lambda *words, **settings: commands.append(words))
    monkeypatch.setattr(figures_study, "load", lambda path: path)
    checkpoints = figures_study.train(["moe"]).models["moe"]
    commands.clear()
    if iteration:
        checkpoints.mkdir(parents=True)
        (checkpoints / "latest_checkpointed_iteration.txt").write_text(iteration)
    figures_study.train(["moe"])
    assert [words[0] for words in commands] == ["run", *(["pretrain"] if trained else [])]


@pytest.mark.parametrize(
    ("names", "commands"),
    [
        (["parallel", "devices", "schedule"], []),
        (["tokenizer"], ["run --sample download"]),
        (["moe"], ["run --sample download", "pretrain", "pretrain"]),
        (["lora"], ["run --sample pretrain full_sft"]),
        (["dpo", "schedule"], ["run --sample pretrain full_sft"]),
        (["sampling"], ["run --sample pretrain full_sft", "pretrain"]),
    ],
)
def test_a_figure_trains_only_what_it_shows(
    names: list[str], commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def command(*words: str, **settings: str) -> None:
        begun.append(" ".join(words).partition(" --lr")[0])

    monkeypatch.setattr(figures_study, "default_outputs", lambda: tmp_path)
    monkeypatch.setattr(figures_study, "_command", command)
    monkeypatch.setattr(figures_study, "load", lambda path: path)
    monkeypatch.setattr(main, "make", lambda name, study: "{}")
    main.main(["figures", *names, "--output", str(tmp_path)])
    assert begun == commands and {file.stem for file in tmp_path.glob("*.json")} == {*names}


def test_figures_without_a_model_need_no_tokenizer(tmp_path: Path) -> None:
    """The command without a training before it writes what is committed."""
    without = [name for name, (_, models) in main.FIGURES.items() if models is None]
    for name in without:
        made = json.loads(main.make(name, Study(tmp_path / "no tokenizer", {})))
        assert nine_digits(made) == nine_digits(committed(name))
    assert without == ["schedule", "parallel", "devices"]


# Tests above that follow from the figures alone, whatever the weights are.
CONSISTENT = (
    test_the_ids_of_the_tokenizer,
    test_every_token_is_named_by_the_bytes_of_its_id,
    test_attention_sums_to_one,
    test_rotations,
    test_norm_and_swiglu,
    test_the_cosine_schedule,
    test_what_ranks_hold,
    test_the_loss_of_dpo,
    test_the_advantages_and_the_loss_of_grpo,
    test_the_cache,
)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_figures_of_trained_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the models as docs/figures was made. The figures of equal weights are equal to the committed ones.

    Another processor trains other weights. Their figures must be consistent.
    """
    # Without the examples/ of the checkout the kit writes below the current directory: no trained model is used again.
    shutil.copytree(ROOT / "minimind_mcore", tmp_path / "minimind_mcore", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "minimind_mcore.cli", "docs", "figures", "--output", "figures"]
    environment = {name: value for name, value in os.environ.items() if name not in ("DATA_DIR", "OUTPUT_DIR")}
    environment |= {"PYTHONPATH": str(tmp_path), "DEVICE": "cpu"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=5000)
    same = True
    for name in main.FIGURES:
        made, found = json.loads((tmp_path / f"figures/{name}.json").read_text(encoding="utf-8")), committed(name)
        if made["digests"] == found["digests"]:
            assert nine_digits(made) == nine_digits(found), f"minimind-mcore docs figures {name}"
        else:
            same = False
            print(f"figure {name}: other weights than those of docs/figures")
            assert made.keys() == found.keys()
    if not same:
        monkeypatch.setattr(sys.modules[__name__], "FOLDER", tmp_path / "figures")
        for test in CONSISTENT:
            test()
