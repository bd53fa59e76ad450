"""The chat page in a real browser, on a small model and on scripted answers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx  # pyright: ignore[reportMissingImports]
import pytest
from helpers.chat_stand_in import StandIn, call, stand_in
from helpers.serving import embedded, shrunk, vocabulary, write_served

if TYPE_CHECKING:
    from playwright.sync_api import Page

    NewPage = Callable[..., Page]

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
LATE = "\n\nThe end."


@pytest.fixture(scope="module")
def model(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    folder = tmp_path_factory.mktemp("served") / "model"
    return write_served(folder, shrunk("minimind3", vocabulary(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def real(model: Path) -> Iterator[str]:
    """The address of the embedded server with the small model."""
    with embedded(model) as (address, _):
        yield address


@pytest.fixture
def scripted() -> Iterator[StandIn]:
    """Another server, whose answers the test writes."""
    with stand_in() as server:
        yield server


def agree(page: Page) -> Page:
    """Agree to the other servers of a link."""
    for _ in range(page.url.count("http%3A") + page.url.count("=http:")):
        page.get_by_role("button", name="Connect").first.click()
    return page


@pytest.fixture
def chat(real: str, scripted: StandIn, new_page: NewPage) -> Page:
    """The page of the embedded server, talking to the scripted one."""
    return agree(new_page(f"{real}/?api={scripted.address}"))


def ask(page: Page, text: str) -> None:
    """Write a message and send it."""
    box = page.get_by_label("Message", exact=True)
    box.fill(text)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()  # the page has found the server
    box.press("Enter")


def answers(page: Page) -> Any:
    """The messages of the model."""
    return page.locator(".answer")


def sent(server: StandIn, number: int = -1) -> list[tuple[str, str]]:
    """Role and content of the messages of a request."""
    return [(message["role"], message["content"]) for message in server.bodies[number]["messages"]]


def test_an_answer_is_streamed_with_its_thoughts_and_figures(chat: Page, scripted: StandIn) -> None:
    seen = [threading.Event(), threading.Event()]

    def answer(body: dict[str, Any]) -> Iterator[Any]:
        yield from ({"reasoning_content": "Hmm, "}, {"reasoning_content": "**a sum**"})
        seen[0].wait(60)
        yield {"content": "It is **42**."}
        seen[1].wait(60)
        yield {"content": LATE}

    scripted.answer = answer
    ask(chat, "6 times 7?")
    fold = chat.locator("details.thinking")
    expect(fold).to_have_attribute("open", "")
    expect(fold.locator("strong")).to_have_text("a sum")
    seen[0].set()
    expect(chat.get_by_text("It is 42.")).to_be_visible()  # before the answer is complete
    expect(chat.get_by_role("button", name="Stop (Esc)")).to_be_visible()
    expect(fold).not_to_have_attribute("open", "")
    seen[1].set()
    expect(chat.get_by_text("The end.")).to_be_visible()
    expect(answers(chat).locator(".markdown strong").last).to_have_text("42")
    expect(chat.locator(".statistics")).to_have_text(
        re.compile(r"^12 \+ 4 tokens · \d+(\.\d)? tokens/s · first after \d")
    )
    expect(answers(chat).locator(".author")).to_have_text("scripted")
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answers(chat).get_by_role("button", name="Copy").click()
    expect(answers(chat).get_by_role("button", name="Copied")).to_be_visible()
    assert chat.evaluate("navigator.clipboard.readText()") == "It is **42**." + LATE
    assert scripted.bodies[0]["stream"] is True and scripted.bodies[0]["model"] == "scripted"
    ask(chat, "And 7 times 6?")
    expect(answers(chat)).to_have_count(2)
    expect(chat.get_by_text("The end.")).to_have_count(2)
    assert sent(scripted) == [("user", "6 times 7?"), ("assistant", "It is **42**." + LATE), ("user", "And 7 times 6?")]
    assert scripted.bodies[1]["messages"][1]["reasoning_content"] == "Hmm, **a sum**"


def endless(body: dict[str, Any]) -> Iterator[Any]:
    """An answer that goes on for a minute."""
    for number in range(600):
        yield {"content": f"{number} "}
        yield 0.1


def test_stop_ends_the_request_and_keeps_what_was_written(chat: Page, scripted: StandIn) -> None:
    scripted.answer = endless
    ask(chat, "count")
    expect(answers(chat)).to_contain_text("0 1 2")
    chat.keyboard.press("Escape")
    expect(chat.get_by_text("Stopped.")).to_be_visible()
    assert scripted.left.wait(10), "the server was not told"
    expect(chat.get_by_role("button", name="Send")).to_be_visible()
    scripted.answer = lambda body: [{"content": "again"}]
    ask(chat, "go on")
    expect(answers(chat).last).to_contain_text("again")
    assert sent(scripted)[1][1].startswith("0 1 2")
    scripted.answer = endless
    ask(chat, "count")
    chat.get_by_role("button", name="Stop (Esc)").click()
    expect(chat.get_by_text("Stopped.")).to_have_count(2)


def test_regenerate_and_edit_replace_what_followed(chat: Page, scripted: StandIn) -> None:
    scripted.answer = lambda body: [{"content": f"answer {len(scripted.bodies)}"}]
    ask(chat, "first")
    expect(answers(chat)).to_contain_text("answer 1")
    ask(chat, "second")
    expect(answers(chat).last).to_contain_text("answer 2")
    answers(chat).last.get_by_role("button", name="Regenerate").click()
    expect(answers(chat).last).to_contain_text("answer 3")
    expect(answers(chat)).to_have_count(2)
    assert sent(scripted, 2) == sent(scripted, 1)
    chat.get_by_role("button", name="Edit").first.click()
    box = chat.get_by_label("Edit the message")
    expect(box).to_be_focused()
    box.fill("other")
    box.press("Enter")
    expect(answers(chat)).to_have_count(1)
    expect(answers(chat)).to_contain_text("answer 4")
    assert sent(scripted) == [("user", "other")]
    chat.get_by_role("button", name="New chat").click()
    expect(answers(chat)).to_have_count(0)


def test_parameters_are_sent(chat: Page, scripted: StandIn) -> None:
    ask(chat, "plain")
    expect(answers(chat)).to_contain_text("hello")
    assert scripted.bodies[0].keys() == {"model", "messages", "stream", "stream_options"}
    fields = {"System prompt": "Be brief.", "Temperature": "0.5", "Top p": "0.9", "Max tokens": "64", "Seed": "7"}
    for label, value in fields.items():
        chat.get_by_label(label).fill(value)
    chat.get_by_label("Thinking").select_option("on")
    ask(chat, "more")
    expect(answers(chat).last).to_contain_text("hello")
    body = scripted.bodies[1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 7,
    }  # fmt: skip
    assert body["chat_template_kwargs"] == {"open_thinking": True, "enable_thinking": True}
    chat.reload()
    expect(chat.get_by_label("Temperature")).to_have_value("0.5")


def test_tools_run_on_the_server_of_the_page(chat: Page, scripted: StandIn) -> None:
    def answer(body: dict[str, Any]) -> list[Any]:
        if body["messages"][-1]["role"] == "tool":
            return [{"content": "The product is 9472."}]
        return [call("calculate_math", '{"expression": "256*37"}'), call("get_current_time", '{"timezone": 5}', 1)]

    scripted.answer = answer
    for name in ("calculate_math", "get_current_time"):
        chat.get_by_role("checkbox", name=name).check()
    ask(chat, "256 times 37?")
    expect(answers(chat)).to_have_count(2)
    expect(answers(chat).last).to_contain_text("The product is 9472.")
    card = chat.get_by_role("region", name="calculate_math")
    expect(card).to_contain_text('"expression": "256*37"')
    expect(card).to_contain_text('"result": "9472"')
    expect(card).to_contain_text("done")
    expect(chat.get_by_role("region", name="get_current_time")).to_contain_text("failed")
    assert {tool["function"]["name"] for tool in scripted.bodies[0]["tools"]} == {"calculate_math", "get_current_time"}
    _, question, result, wrong = scripted.bodies[1]["messages"]
    assert question["tool_calls"][0]["function"] == {"name": "calculate_math", "arguments": '{"expression": "256*37"}'}
    assert result == {"role": "tool", "tool_call_id": "call_0", "content": '{"result": "9472"}'}
    assert "error" in wrong["content"]


def test_a_tool_that_is_off_does_not_run(chat: Page, scripted: StandIn) -> None:
    def answer(body: dict[str, Any]) -> list[Any]:
        if body["messages"][-1]["role"] == "tool":
            return [{"content": "Well."}]
        return [call("get_current_time", "{}"), call("calculate_math", '{"expression": "256*37"}', 1)]

    ran: list[Any] = []
    chat.on("request", lambda request: ran.append(request.post_data_json) if "/tools/call" in request.url else None)
    scripted.answer = answer
    ask(chat, "plain")
    expect(chat.get_by_text("Well.")).to_have_count(1)
    assert ran == [] and "tools" not in scripted.bodies[0]
    assert {message["content"] for message in scripted.bodies[1]["messages"][2:]} == {'{"error": "this tool is off"}'}
    for name in ("get_current_time", "calculate_math"):
        card = chat.get_by_role("region", name=name)
        expect(card).to_contain_text("failed")
        expect(card).to_contain_text("this tool is off")
    chat.get_by_role("checkbox", name="calculate_math").check()
    ask(chat, "one is on")
    expect(chat.get_by_text("Well.")).to_have_count(2)
    assert [request["name"] for request in ran] == ["calculate_math"]
    off, on = scripted.bodies[3]["messages"][-2:]
    assert (off["content"], on["content"]) == ('{"error": "this tool is off"}', '{"result": "9472"}')


def test_the_user_answers_the_calls_of_other_tools(chat: Page, scripted: StandIn) -> None:
    def answer(body: dict[str, Any]) -> list[Any]:
        result = body["messages"][-1]
        return [{"content": f"It is {result['content']}."}] if result["role"] == "tool" else [call("lookup", "{}")]

    scripted.answer = answer
    chat.get_by_text("Your own tools (JSON)").first.click()
    box = chat.get_by_role("textbox", name="Your own tools (JSON)")
    box.fill('{"type": "function"')
    expect(chat.get_by_text("Expected a JSON list of function definitions.")).to_be_visible()
    box.fill('[{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}]')
    ask(chat, "look it up")
    card = chat.get_by_role("region", name="lookup")
    card.get_by_label("Result").fill("blue")
    card.get_by_role("button", name="Give the result").click()
    expect(answers(chat).last).to_contain_text("It is blue.")
    assert scripted.bodies[0]["tools"][0]["function"]["name"] == "lookup"
    ask(chat, "once more")
    expect(chat.get_by_text("needs your result")).to_be_visible()
    chat.keyboard.press("Escape")
    expect(chat.get_by_role("button", name="Send")).to_be_visible()


def test_two_models_side_by_side(real: str, scripted: StandIn, new_page: NewPage) -> None:
    with stand_in("other") as other:
        scripted.answer = lambda body: [{"content": "before"}]
        other.answer = lambda body: [0.3, {"content": "after"}]
        page = agree(new_page(f"{real}/?api={scripted.address}/v1&compare={other.address}"))
        ask(page, "the same question")
        columns = page.locator(".column")
        for column, title, answer in zip(columns.all(), ("scripted", "other"), ("before", "after"), strict=True):
            expect(column.locator(".column-title")).to_contain_text(title)
            expect(column.locator(".question")).to_contain_text("the same question")
            expect(column.locator(".answer .markdown")).to_have_text(answer)
        assert sent(scripted) == sent(other) == [("user", "the same question")]
        page.get_by_role("button", name="Side by side").click()
        expect(columns).to_have_count(1)
        assert "compare" not in page.url and scripted.address in page.url.replace("%3A", ":").replace("%2F", "/")


def test_the_token_view_shows_ids_and_alternatives(real: str, new_page: NewPage) -> None:
    page = new_page(real)
    page.get_by_label("Token view").check()
    for label, value in {"Temperature": "0", "Max tokens": "12"}.items():
        page.get_by_label(label).fill(value)
    ask(page, "hello")
    folds = answers(page).locator("details.fold")
    expect(folds).to_have_count(2)
    question = {"model": "minimind", "messages": [{"role": "user", "content": "hello"}]}
    fields = {"temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 5, "return_token_ids": True}
    reply = httpx.post(f"{real}/v1/chat/completions", json=question | fields, timeout=60).json()
    [choice], prompt = reply["choices"], reply["prompt_token_ids"]
    folds.first.locator("summary").click()
    tokens = folds.first.locator("button.token")
    expect(tokens).to_have_count(len(choice["token_ids"]))
    tokens.nth(3).hover()
    facts, expected = folds.first.locator(".token-facts dd"), choice["logprobs"]["content"][3]
    expect(facts.nth(1)).to_have_text(str(choice["token_ids"][3]))
    expect(folds.first.locator(".alternatives li")).to_have_count(len(expected["top_logprobs"]))
    shares = [
        float(text.removesuffix(" %"))
        for text in folds.first.locator(".alternatives li > :last-child").all_inner_texts()
    ]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.01
    tokens.nth(3).focus()
    page.keyboard.press("ArrowRight")
    expect(facts.nth(1)).to_have_text(str(choice["token_ids"][4]))
    folds.last.locator("summary").click()
    expect(folds.last.locator("button.token")).to_have_count(len(prompt))
    folds.last.locator("button.token").first.hover()
    expect(folds.last.locator(".token-facts dd").nth(1)).to_have_text(str(prompt[0]))


def test_a_model_without_chats_continues_texts(model: Path, new_page: NewPage) -> None:
    with embedded(model, raw=True) as (address, _):
        page = new_page(address)
        expect(page.get_by_text("Write the beginning of a text. The model continues it.")).to_be_visible()
        expect(page.get_by_role("combobox", name="Prompt", exact=True)).to_have_accessible_description(
            re.compile("have no effect")
        )
        page.get_by_label("Token view").check()
        for label, value in {"Temperature": "0", "Max tokens": "12", "System prompt": "Be brief."}.items():
            page.get_by_label(label).fill(value)
        text = ""
        for number, beginning in enumerate(("hello wor", " and so on")):
            ask(page, beginning)
            expect(answers(page)).to_have_count(number + 1)
            expect(answers(page).last.get_by_role("button", name="Regenerate")).to_be_visible()
            text += beginning
            fields = {"prompt": text, "temperature": 0, "max_tokens": 12, "logprobs": 5, "return_token_ids": True}
            [choice] = httpx.post(f"{address}/v1/completions", json=fields, timeout=60).json()["choices"]
            assert answers(page).last.locator(".plain").evaluate("element => element.textContent") == choice["text"]
            text += choice["text"]
        tokens, prompt = answers(page).last.locator("details.fold").all()
        tokens.locator("summary").click()
        expect(tokens.locator("button.token")).to_have_count(12)
        tokens.locator("button.token").nth(3).hover()
        expect(tokens.locator(".token-facts dd").nth(1)).to_have_text(str(choice["token_ids"][3]))
        expect(tokens.locator(".alternatives li").first).to_be_visible()
        ids = httpx.post(f"{address}/tokenize", json={"prompt": fields["prompt"]}).json()["tokens"]
        prompt.locator("summary").click()
        expect(prompt.locator("button.token")).to_have_count(len(ids))


def test_the_format_of_another_server_is_chosen(chat: Page, scripted: StandIn) -> None:
    scripted.answer = lambda body: [{"content": "42."}]
    chat.get_by_role("combobox", name="Prompt", exact=True).select_option("Plain text")
    ask(chat, "6*7=")
    expect(answers(chat).locator(".plain")).to_have_text("42.")
    assert scripted.bodies[0]["prompt"] == "6*7=" and scripted.bodies[0]["max_tokens"] == 128
    chat.get_by_role("combobox", name="Prompt", exact=True).select_option("Chat")
    scripted.answer = lambda body: [{"content": "hello"}]
    ask(chat, "again")
    expect(answers(chat).last).to_contain_text("hello")
    assert sent(scripted)[-1] == ("user", "again")


def test_a_conversation_survives_a_reload(chat: Page, scripted: StandIn) -> None:
    scripted.answer = lambda body: [{"reasoning_content": "Hmm"}, {"content": f"answer {len(scripted.bodies)}"}]
    ask(chat, "first")
    expect(answers(chat)).to_contain_text("answer 1")
    chat.reload()
    expect(answers(chat).locator(".markdown").last).to_have_text("answer 1")
    expect(answers(chat).locator(".author")).to_have_text("scripted")
    ask(chat, "second")
    expect(answers(chat).last).to_contain_text("answer 2")
    assert sent(scripted) == [("user", "first"), ("assistant", "answer 1"), ("user", "second")]
    scripted.answer = endless
    ask(chat, "third")
    expect(answers(chat).last).to_contain_text("0 1 2")
    chat.reload()  # in the middle of an answer
    expect(chat.get_by_text("Stopped.")).to_be_visible()
    expect(answers(chat).last).to_contain_text("0 1 2")
    other = chat.context.new_page()
    other.goto(chat.url)
    expect(answers(other)).to_have_count(3)  # a new tab shows the last conversation
    other.get_by_role("button", name="New chat").click()
    chat.reload()
    expect(answers(chat)).to_have_count(3)  # each tab has its own
    chat.get_by_role("button", name="New chat").click()
    for storage in ("localStorage", "sessionStorage"):
        assert "answer" not in chat.evaluate(f"JSON.stringify({storage})")
    chat.evaluate("localStorage['minimind.chat.conversations'] = '[[{}]]'")
    damaged = chat.context.new_page()
    damaged.goto(chat.url)
    expect(damaged.get_by_text("Ask the model something.")).to_be_visible()


def test_lists_and_tables_are_as_written(chat: Page, scripted: StandIn) -> None:
    text = "3. three\n4. four\n\n|a|b|c|\n|-|:-:|-:|\n|1|2|3|"
    scripted.answer = lambda body: [{"content": text}]
    ask(chat, "write")
    expect(chat.get_by_role("cell", name="3")).to_be_visible()
    assert chat.locator(".answer ol").evaluate("list => list.start") == 3
    for tag in ("th", "td"):
        cells = chat.locator(f".answer {tag}").all()
        found = [cell.evaluate("cell => getComputedStyle(cell).textAlign").removeprefix("-webkit-") for cell in cells]
        assert [side.replace("start", "left") for side in found] == ["left", "center", "right"]


HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>
<svg onload="window.hacked=1"><style>body{display:none}</style><iframe src="javascript:window.hacked=1"></iframe>
<form action="http://127.0.0.1:9/"><input name=key><button>go</button></form>
<p id=app onclick="window.hacked=1" style="color:red">p</p>

[one](javascript:window.hacked=1) [two](JaVaScript&colon;window.hacked=1) [three](data:text/html,x)
![i](http://127.0.0.1:9/x.png)

a <a href="javascript:window.hacked=1">four</a> <b onclick="window.hacked=1">five</b>
[good](https://example.com/ "<img src=x>")

```<img src=x onerror="window.hacked=1">
<img src=x onerror="window.hacked=1">
```"""


def test_hostile_output_is_inert(real: str, chat: Page, scripted: StandIn) -> None:
    asked: list[str] = []
    chat.on("request", lambda request: asked.append(request.url))
    scripted.answer = lambda body: [{"reasoning_content": HOSTILE}, {"content": HOSTILE}, call(HOSTILE[:40], HOSTILE)]
    chat.get_by_label("System prompt").fill("<b>x</b>")
    ask(chat, HOSTILE)
    expect(chat.get_by_text("needs your result")).to_be_visible()
    chat.locator("details.thinking summary").click()
    for link in chat.locator(".answer .markdown").get_by_text(re.compile("^(one|two|three|four|five)$")).all():
        link.click()
    expect(chat.locator(".answer > .markdown")).to_contain_text('<img src=x onerror="window.hacked=1">')
    inside = chat.locator(".message")
    for tag in (
        "img",
        "script",
        "svg",
        "style",
        "iframe",
        ".markdown form",
        "input",
        "[onerror]",
        "[onclick]",
        "[style]",
    ):
        expect(inside.locator(tag)).to_have_count(0)
    assert chat.evaluate("window.hacked") is None
    hrefs = [link.get_attribute("href") for link in inside.locator("a[href]").all()]
    assert set(hrefs) == {"https://example.com/"}
    assert inside.locator("a[href]").first.get_attribute("rel") == "noopener noreferrer nofollow"
    expect(chat.locator(".bubble")).to_contain_text("<script>window.hacked=1</script>")
    assert {url[: url.index("/", 8)] for url in asked} <= {real, scripted.address}


def test_languages_and_themes(real: str, new_page: NewPage) -> None:
    page = new_page(real, color_scheme="dark")
    expect(page.locator("h1")).to_have_text("MiniMind Chat")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(21, 23, 22)"
    expect(page.get_by_text("Evaluates an expression")).to_be_visible()
    assert set(re.findall(r"[\u4e00-\u9fff]+", page.locator("body").inner_text())) == {"中文"}
    page.get_by_role("button", name="中文").click()
    expect(page.locator("h1")).to_have_text("MiniMind 对话")
    page.get_by_label("主题").select_option("light")
    assert page.evaluate(background) == "rgb(251, 251, 249)"
    page.reload()
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page).to_have_title("MiniMind 对话")
    assert page.evaluate(background) == "rgb(251, 251, 249)"
    # No English word is left, apart from names.
    words = page.locator("body").inner_text()
    shown = set(re.findall(r"[A-Za-z_]{3,}", re.sub(r"[a-z]+(_[a-z]+)+", "", words))) - {
        "MiniMind",
        "English",
        "API",
        "search",
    }
    assert shown <= {"minimind", "Top", "token", "Token", "JSON"}, shown
    chinese = new_page(real, locale="zh-CN")
    expect(chinese.get_by_label("系统提示词")).to_be_visible()


def test_keys_of_the_keyboard(chat: Page, scripted: StandIn) -> None:
    box = chat.get_by_label("Message", exact=True)
    expect(box).to_be_focused()
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    # The Enter that ends the input of a Chinese word does not send.
    box.evaluate("e => e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))")
    expect(box).to_have_value("one\ntwo")
    box.press("Enter")
    expect(answers(chat)).to_contain_text("hello")
    assert sent(scripted) == [("user", "one\ntwo")]
    expect(box).to_have_value("")
    chat.keyboard.press("Shift+Tab")
    assert chat.evaluate("document.activeElement.tagName") == "BUTTON"
    assert chat.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_escape_stops_an_answer_only_by_itself(chat: Page, scripted: StandIn) -> None:
    composing = "e => e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', isComposing: true, bubbles: true}))"
    ask(chat, "first")
    expect(answers(chat)).to_contain_text("hello")
    editor, stop = chat.get_by_label("Edit the message"), chat.get_by_role("button", name="Stop (Esc)")
    chat.get_by_role("button", name="Edit").click()
    expect(editor).to_be_focused()  # before it is, it could take the next message
    scripted.answer = endless
    ask(chat, "second")
    expect(answers(chat).last).to_contain_text("0 1 2")
    for box in (chat.get_by_label("Message", exact=True), editor):
        box.evaluate(composing)
    expect(editor).to_be_visible()
    editor.press("Escape")
    expect(editor).to_have_count(0)
    expect(answers(chat).last).to_contain_text("10 11 12")
    expect(stop).to_be_visible()
    chat.keyboard.press("Escape")
    expect(chat.get_by_text("Stopped.")).to_be_visible()


def test_errors_are_shown_and_the_chat_goes_on(chat: Page, scripted: StandIn, errors: list[str]) -> None:
    def refuse(body: dict[str, Any]) -> list[Any]:
        raise ValueError("the context has 64 tokens")

    scripted.answer = refuse
    ask(chat, "too long")
    expect(chat.get_by_role("alert")).to_have_text("the context has 64 tokens")
    scripted.answer = lambda body: [{"content": "half", "finish": "length"}]
    answers(chat).get_by_role("button", name="Regenerate").click()
    expect(chat.get_by_text("The answer reached the maximum number of tokens.")).to_be_visible()
    chat.get_by_label("Address").fill("127.0.0.1:9")
    chat.get_by_label("Address").press("Tab")
    expect(chat.get_by_role("status").filter(has_text="does not answer")).to_contain_text("http://127.0.0.1:9 does")
    expect(chat.get_by_label("Address")).to_have_value("http://127.0.0.1:9")
    assert all("Failed to load resource" in error for error in errors)
    errors.clear()


def test_the_key_goes_to_its_own_server_only(
    real: str, scripted: StandIn, new_page: NewPage, errors: list[str]
) -> None:
    scripted.key = "secret"
    with stand_in("other") as other:
        page = agree(new_page(f"{real}/?api={scripted.address}"))
        expect(page.get_by_role("alert")).to_have_text("The server asks for an API key.")
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        ask(page, "hello")
        expect(answers(page)).to_contain_text("hello")
        page.get_by_label("Address").fill(other.address)
        page.get_by_label("Address").press("Tab")
        expect(page.get_by_label("Model")).to_have_text("other")
        ask(page, "hello")
        expect(answers(page).last).to_contain_text("hello")
        assert set(other.keys) == {""}
        assert page.evaluate("JSON.stringify(localStorage)").find("secret") < 0
        assert "secret" in page.evaluate("JSON.stringify(sessionStorage)")
    assert all("401" in error for error in errors)
    errors.clear()


def test_the_server_of_a_link_gets_nothing_before_the_user_agrees(
    real: str, scripted: StandIn, new_page: NewPage
) -> None:
    page = new_page(f"{real}/?api={scripted.address}")
    expect(page.locator(".welcome")).to_contain_text("another server")
    expect(page.locator(".welcome")).to_contain_text(scripted.address)
    page.get_by_label("Message", exact=True).fill("hello")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.get_by_role("button", name="Use this page's server").click()
    expect(page.get_by_label("Model")).to_have_text("minimind")
    assert "api=" not in page.url and scripted.keys == []
    page.goto(f"{real}/?api={scripted.address}")  # has not agreed
    agree(page)
    expect(page.get_by_label("Model")).to_have_text("scripted")
    page.reload()
    expect(page.get_by_label("Model")).to_have_text("scripted")  # asked once
    expect(page.locator(".column-title")).to_contain_text(scripted.address)
    with stand_in("typed") as other:
        page.get_by_label("Address").fill(other.address)
        page.get_by_label("Address").press("Tab")
        expect(page.get_by_label("Model")).to_have_text("typed")  # the user wrote the address


def test_the_key_of_a_link_is_kept_and_leaves_the_address(model: Path, new_page: NewPage) -> None:
    with embedded(model, api_key="s3+cr&t/") as (address, _):
        page = new_page(f"{address}/#key=s3%2Bcr%26t%2F")
        expect(page.get_by_label("Model")).to_have_text("minimind")
        expect(page.get_by_label("API key")).to_have_value("s3+cr&t/")
        assert page.url == f"{address}/"
        page.reload()
        expect(page.get_by_label("Model")).to_have_text("minimind")
        assert page.evaluate("JSON.stringify(localStorage)").find("s3") < 0
        page.evaluate("location.hash = 'key=s3%2Bcr%26t%2F'")
        expect(page).to_have_url(f"{address}/")


def test_a_narrow_screen(real: str, scripted: StandIn, new_page: NewPage) -> None:
    scripted.answer = lambda body: [
        {"content": f"`{'x' * 300}`\n\n```\n{'y' * 300}\n```\n\n|a|b|\n|-|-|\n|1|{'z' * 300}|"}
    ]
    page = agree(new_page(f"{real}/?api={scripted.address}", viewport={"width": 390, "height": 760}))
    expect(page.get_by_label("System prompt")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("x" * 500)
    page.keyboard.press("Escape")
    expect(page.get_by_label("System prompt")).to_be_hidden()
    ask(page, "w" * 300)
    expect(answers(page)).to_contain_text("zzz")
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390
    wide = "[...document.querySelectorAll('.message, .message *')].filter(e => e.getBoundingClientRect().right > 390)"
    assert page.evaluate(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []


@pytest.mark.parametrize("look", ["light", "dark"])
def test_axe_finds_nothing_serious(
    look: str, real: str, scripted: StandIn, new_page: NewPage, accessible: Callable[[Page], None]
) -> None:
    markdown = "# Title\n\n- a [link](https://example.com)\n\n> quote\n\n```\ncode\n```\n\n|a|b|\n|-|-|\n|1|2|"
    entry = {"token": "a", "logprob": -1.0, "bytes": [97]}
    choice = {"logprobs": {"content": [entry | {"top_logprobs": [entry]}]}, "token_ids": [5]}
    answer: list[Any] = [{"reasoning_content": "hmm"}, {"content": markdown, "choice": choice}]
    scripted.answer = lambda body: [*map(dict, answer), call("lookup", '{"a": 1}')]
    page = new_page(f"{real}/?api={scripted.address}", color_scheme=look)
    expect(page.get_by_role("button", name="Connect")).to_be_visible()
    accessible(page)
    agree(page)
    ask(page, "everything")
    expect(page.get_by_text("needs your result")).to_be_visible()
    for fold in page.locator(".answer summary").filter(has_not_text="Prompt").all():
        fold.click()
    page.locator("button.token").hover()
    expect(page.locator(".alternatives li")).to_have_count(1)
    accessible(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="中文").click()
    page.get_by_role("button", name="双模型对比").click()
    page.set_viewport_size({"width": 390, "height": 760})
    accessible(page)


def test_ten_browsers_on_one_server(real: str, new_page: NewPage) -> None:
    def letters(text: str) -> str:
        return re.sub(r"[\W_]+", "", text)  # without marks of Markdown

    pages = [new_page(real) for _ in range(10)]
    for page in pages:
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("24")
    questions = [f"question {number} {'abcdefghij'[number] * 9}" for number in range(10)]
    for page, question in zip(pages, questions, strict=True):
        ask(page, question)  # the next one is sent while this one is answered
    replies = set()
    for page, question in zip(pages, questions, strict=True):
        expect(page.locator(".question .bubble")).to_have_text(question)
        expect(answers(page)).to_have_count(1)
        expect(answers(page).get_by_role("button", name="Regenerate")).to_be_enabled()
        fields = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
        reply = httpx.post(f"{real}/v1/chat/completions", json=fields, timeout=60).json()
        text = letters(reply["choices"][0]["message"]["content"])
        assert letters(answers(page).locator(".markdown").inner_text()) == text
        replies.add(text)
    assert len(replies) > 5
