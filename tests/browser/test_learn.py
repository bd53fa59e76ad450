"""The chapters in a real browser: every figure can be used, in both languages, without an error or another host."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.engine import ROOT
from helpers.site import needs_sphinx
from tokenizers import Tokenizer, models, pre_tokenizers

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    NewPage = Callable[..., Page]

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = needs_sphinx
CHAPTERS = sorted(page.stem for page in (ROOT / "docs").glob("learn_*.md") if not page.stem.endswith("_zh"))


# The figure without its controls, whose own labels show their values.
CONTENT = """figure => {
  const copy = figure.cloneNode(true);
  for (const part of copy.querySelectorAll(".controls")) part.remove();
  return copy.innerHTML;
}"""


def changes(figure: Locator, *acts: Callable[[], object]) -> bool:
    """Whether one of the acts changes the figure."""
    for act in acts:
        before = figure.evaluate(CONTENT)
        act()
        for _ in range(20):
            if figure.evaluate(CONTENT) != before:
                return True
            figure.page.wait_for_timeout(25)
    return False


def use(figure: Locator) -> None:
    """Move every slider with the keyboard, choose the last other entry of every list, press the last button.

    Each must change what the figure shows.
    """
    for slider in figure.locator("input[type=range]").all():
        moves = [functools.partial(slider.press, key) for key in ("End", "ArrowLeft", "Home")]
        assert changes(figure, *moves), slider.get_attribute("id")
    for choice in figure.locator("select").all():
        values: list[str] = choice.evaluate("choice => [...choice.options].map((option) => option.value)")
        others = [value for value in values if value not in (choice.input_value(), "-1")]  # -1: the reader's own text
        if others:
            assert changes(figure, functools.partial(choice.select_option, others[-1])), others
    buttons = figure.locator("button:not([aria-pressed=true])").all()
    if buttons:
        assert changes(figure, functools.partial(buttons[-1].press, "Enter"))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter(chapter: str, language: str, site: str, new_page: NewPage, accessible: Callable[..., None]) -> None:
    dark = {"color_scheme": "dark", "viewport": {"width": 390, "height": 800}} if language == "zh" else {}
    page = new_page("about:blank", **dark)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{site}/{language}/{chapter}.html")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for figure in page.locator(".figure-widget").all():
        use(figure)
        expect(figure).to_be_visible()
        text = figure.inner_text()
        assert "NaN" not in text and "undefined" not in text, text
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for question in page.locator("article details:not(.excerpt) > summary").all():
        question.click()
    assert page.locator("article details:not(.excerpt)[open]").count() >= 2
    assert asked and all(url.startswith((site, "data:")) for url in asked), asked
    accessible(page, "article")


def committed(name: str) -> Any:
    """A figure as it is in docs/figures."""
    return json.loads((ROOT / f"docs/figures/{name}.json").read_text(encoding="utf-8"))


def numbers(result: Locator) -> list[float]:
    """The numbers in the result of a figure."""
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?", result.inner_text())]


def test_the_loss_of_dpo(site: str, new_page: NewPage) -> None:
    page, figure = new_page(f"{site}/en/learn_dpo.html"), committed("dpo")
    page.get_by_role("slider", name="Updates").press("End")
    first, last = figure["steps"][0], figure["steps"][-1]
    margin = (last["chosen"] - first["chosen"]) - (last["rejected"] - first["rejected"])
    expect(page.locator(".result")).to_contain_text(f"m = {margin:.4f}; loss = ")
    expect(page.locator(".result")).to_contain_text(f"= {math.log1p(math.exp(-figure['beta'] * margin)):.5f}.")


def test_the_loss_and_the_clipping_of_grpo(site: str, new_page: NewPage) -> None:
    """The page computes both from the ratios; torch computed the committed values."""
    page, figure = new_page(f"{site}/en/learn_grpo.html"), committed("grpo")
    for _ in range(len(figure["updates"]) - 1):
        page.get_by_role("slider", name="Updates").press("ArrowRight")
    last = figure["updates"][-1]
    mean, deviation = statistics.mean(figure["rewards"]), statistics.stdev(figure["rewards"])
    share = round(100 * last["clipped"])
    expect(page.locator(".result")).to_contain_text(f"{share} % of the tokens are clipped")
    expected = [mean, deviation, last["loss"], share]
    assert numbers(page.locator(".result")) == pytest.approx(expected, abs=1e-3)


def test_the_probabilities_of_sampling(site: str, new_page: NewPage) -> None:
    page, figure = new_page(f"{site}/en/learn_sampling.html"), committed("sampling")
    page.get_by_label("top-k").press("End")
    prompt = figure["prompts"][2]
    logits = list(itertools.accumulate(prompt["drops"], operator.sub, initial=prompt["first"]))[:40]
    powers = [math.exp((logit - logits[0]) / 100) for logit in logits]
    shares = [power / sum(powers) for power in powers]
    entropy = -sum(share * math.log2(share) for share in shares)
    expect(page.locator(".result")).to_contain_text("40 of 6,400 tokens can be drawn.")
    assert numbers(page.locator(".result")) == pytest.approx([40, 6400, entropy], abs=0.006)
    expect(page.locator(".bars .number").first).to_have_text(f"{100 * shares[0]:.1f} %")


def test_the_experts_of_a_rank(site: str, new_page: NewPage) -> None:
    """With four expert ranks each has one expert, and the table names this expert."""
    page = new_page(f"{site}/en/learn_parallel.html")
    page.get_by_label("Model", exact=True).select_option("minimind3_moe")
    page.get_by_label("EP", exact=True).select_option("4")
    rank = page.get_by_role("button", name="EP 2").first
    expect(rank).to_contain_text("experts 2")
    rank.click()
    expect(page.locator("table code", has_text="mlp.experts.local_experts.2.linear_fc1.weight")).to_have_count(1)
    page.get_by_label("EP", exact=True).select_option("2")
    expect(page.get_by_role("button", name="EP 1").first).to_contain_text("experts 2–3")


def test_the_ids_are_those_of_the_tokenizer(site: str, new_page: NewPage) -> None:
    """The examples of the figure have the ids of the tokenizers library."""
    page = new_page(f"{site}/en/learn_tokenizer.html")
    figure = json.loads((ROOT / "docs/figures/tokenizer.json").read_text(encoding="utf-8"))
    for example in figure["examples"]:
        page.get_by_label("Text", exact=True).fill(example["text"])
        ids = " ".join(map(str, example["ids"]))
        expect(page.locator(".ids")).to_have_attribute("data-ids", ids)


def test_another_tokenizer_and_back(site: str, new_page: NewPage, tmp_path: Path) -> None:
    """A tokenizer without merges gives bytes. The text stays."""
    page = new_page(f"{site}/en/learn_tokenizer.html")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    content: dict[str, object] = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {character: i for i, character in enumerate(alphabet)}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    content["pre_tokenizer"] = {"type": "Digits"}
    (tmp_path / "broken.json").write_text(json.dumps(content), encoding="utf-8")
    text = page.get_by_label("Text", exact=True)
    text.fill("user 12")
    ids = page.locator(".ids")
    own = str(ids.get_attribute("data-ids"))
    page.get_by_label("Another tokenizer.json").set_input_files(tmp_path / "tokenizer.json")
    expect(ids).to_have_attribute("data-ids", " ".join(str(alphabet.index(one)) for one in "userĠ12"))
    page.get_by_label("Another tokenizer.json").set_input_files(tmp_path / "broken.json")
    expect(page.get_by_role("alert")).to_contain_text("does not support pre_tokenizer Digits at the end")
    del content["added_tokens"]
    (tmp_path / "other.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "text.json").write_text("no JSON", encoding="utf-8")
    for name, problem in (("other", "has no field added_tokens"), ("text", "is not a JSON file")):
        page.get_by_label("Another tokenizer.json").set_input_files(tmp_path / f"{name}.json")
        expect(page.get_by_role("alert")).to_contain_text(f"{name}.json {problem}")
    page.get_by_role("button", name="Back to the page's own tokenizer").click()
    expect(ids).to_have_attribute("data-ids", own)
    expect(text).to_have_value("user 12")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_long_piece(site: str, new_page: NewPage) -> None:
    """5,000 equal signs are one piece. The steps of its merges would be 12 million symbols."""
    page = new_page(f"{site}/en/learn_tokenizer.html")
    figure = json.loads((ROOT / "docs/figures/tokenizer.json").read_text(encoding="utf-8"))
    listed = [*figure["added"], *sorted(pre_tokenizers.ByteLevel.alphabet())]
    listed += [pair.replace(" ", "") for pair in figure["merges"]]
    merges = [tuple(pair.split(" ")) for pair in figure["merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(listed)}, merges))  # type: ignore[arg-type]
    page.set_default_timeout(10_000)
    page.get_by_label("Text", exact=True).fill("=" * 5000)
    ids = " ".join(map(str, backend.encode("=" * 5000).ids))
    expect(page.locator(".ids")).to_have_attribute("data-ids", ids, timeout=10_000)
    expect(page.locator(".detail").first).to_contain_text("more than 100 bytes")
    page.get_by_label("Text", exact=True).fill("tokenization")
    assert page.locator(".detail ol li").count() > 2
