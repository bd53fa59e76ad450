"""The chat page against a real vLLM server, from an environment of its own: `bash requirements/vllm.sh` makes it.

VLLM_PYTHON=.venv-vllm/bin/python python -m pytest tests/browser/test_real_vllm.py -m slow
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx  # pyright: ignore[reportMissingImports]
import pytest
from helpers.engine import ROOT
from helpers.serving import embedded, shrunk, vocabulary, wait_until_ready, write_served

from minimind_mcore.hosts import free_port

if TYPE_CHECKING:
    from playwright.sync_api import Page

    NewPage = Callable[..., Page]

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON is not set: the interpreter of requirements/vllm.sh"),
]
SLOW = 120_000  # ms; the first answers of vLLM on a CPU take long
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The addresses of the page's own server and of vLLM, both with the same small model."""
    published = Path(os.environ.get("MINIMIND_TOKENIZER_DIR", "/nowhere")) / "v3"
    if not published.is_dir():
        pytest.skip("MINIMIND_TOKENIZER_DIR is not set")
    folder = tmp_path_factory.mktemp("vllm")
    model = write_served(folder / "model", shrunk("minimind3", vocabulary(published)), published)
    with embedded(model) as (page, _), (folder / "log").open("w") as log:
        port = free_port()
        flags = ["serve", "--load", str(model), "--engine", "vllm", "--port", str(port), "--cors-origin", page]
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        settings = {"API_KEY": "secret", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DEVICE": "cpu"}
        command = [PYTHON, "-m", "minimind_mcore.cli", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=kept | settings, stdout=log, stderr=log)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", 600)
            yield page, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def chat(servers: tuple[str, str], new_page: NewPage, errors: list[str]) -> Page:
    """The page, which talks to vLLM; greedy, with short answers."""
    page = new_page(f"{servers[0]}/?api={servers[1]}")
    page.get_by_role("button", name="Connect").click()
    # vLLM refuses a wrong key without CORS headers: the page cannot tell it from a server that does not run.
    expect(page.get_by_role("alert")).to_contain_text("If it asks for an API key, enter the key.")
    errors.clear()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    for label, value in {"Temperature": "0", "Max tokens": "24"}.items():
        page.get_by_label(label).fill(value)
    return page


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator(".answer").last.get_by_role("button", name="Regenerate")).to_be_enabled(timeout=SLOW)


def letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)  # without marks of Markdown


def test_answers_are_streamed_and_have_their_tokens(chat: Page, servers: tuple[str, str]) -> None:
    chat.get_by_label("Token view").check()
    ask(chat, "hello")
    question = {"model": "minimind", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    more = {"max_tokens": 24, "logprobs": True, "top_logprobs": 5, "return_token_ids": True}
    reply = httpx.post(f"{servers[1]}/v1/chat/completions", json=question | more, headers=KEY, timeout=60).json()
    [choice], prompt = reply["choices"], reply["prompt_token_ids"]
    answer = chat.locator(".answer")
    assert letters(answer.locator(".markdown").inner_text()) == letters(choice["message"]["content"])
    expect(answer.locator(".statistics")).to_have_text(re.compile(rf"^{len(prompt)} \+ 24 tokens .* first after"))
    tokens, of_prompt = answer.locator("details.fold").all()
    tokens.locator("summary").click()
    expect(tokens.locator("button.token")).to_have_count(24)
    tokens.locator("button.token").nth(3).hover()
    expect(tokens.locator(".token-facts dd").nth(1)).to_have_text(str(choice["token_ids"][3]))
    expect(tokens.locator(".alternatives li")).to_have_count(5)
    of_prompt.locator("summary").click()
    expect(of_prompt.locator("button.token")).to_have_count(len(prompt))


def test_stop_tools_and_errors(chat: Page, errors: list[str]) -> None:
    chat.get_by_label("Max tokens").fill("20000")  # vLLM writes hundreds of tokens per second
    chat.get_by_label("Message", exact=True).fill("count")
    chat.get_by_role("button", name="Send", exact=True).click()
    expect(chat.locator(".answer .markdown")).not_to_be_empty(timeout=SLOW)
    chat.keyboard.press("Escape")
    expect(chat.get_by_text("Stopped.")).to_be_visible()
    chat.get_by_label("Max tokens").fill("24")
    sent: list[Any] = []
    chat.on("request", lambda request: sent.append(request.post_data_json) if "chat/comp" in request.url else None)
    chat.get_by_role("checkbox", name="calculate_math").check()
    ask(chat, "256*37?")  # random weights call nothing; vLLM must accept the definitions
    assert [tool["function"]["name"] for tool in sent[-1]["tools"]] == ["calculate_math"]
    expect(chat.get_by_role("alert")).to_have_count(0)
    chat.get_by_label("Max tokens").fill("1000000")
    ask(chat, "too long")
    expect(chat.get_by_role("alert")).to_contain_text("max_tokens")
    errors[:] = [text for text in errors if "400" not in text]


def test_two_servers_side_by_side(chat: Page, servers: tuple[str, str]) -> None:
    chat.get_by_role("button", name="Side by side").click()  # B is the page's own server
    chat.get_by_label("Message", exact=True).fill("the same question")
    chat.get_by_role("button", name="Send", exact=True).click()
    answers = chat.locator(".answer")
    expect(answers).to_have_count(2)
    expect(answers.get_by_role("button", name="Regenerate")).to_have_count(2, timeout=SLOW)
    ours, theirs = (letters(answer.locator(".markdown").inner_text()) for answer in answers.all())
    assert ours == theirs and ours


def test_a_text_is_continued(chat: Page, servers: tuple[str, str]) -> None:
    chat.get_by_role("combobox", name="Prompt", exact=True).select_option("Plain text")
    chat.get_by_label("Token view").check()
    ask(chat, "hello wor")
    fields = {"model": "minimind", "prompt": "hello wor", "temperature": 0, "max_tokens": 24}
    reply = httpx.post(f"{servers[1]}/v1/completions", json=fields, headers=KEY, timeout=60).json()
    found = chat.locator(".answer .plain").evaluate("element => element.textContent")
    assert found == reply["choices"][0]["text"]
    fold = chat.locator(".answer details.fold").first
    fold.locator("summary").click()
    expect(fold.locator("button.token")).to_have_count(24)
