"""The manager's page in a real browser. A quick program stands for the trainings, and for the server of the chat."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.manager import TOKEN, Client, manager, stub_path

if TYPE_CHECKING:
    from playwright.sync_api import Dialog, Page, Route

    NewPage = Callable[..., Page]

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
SHOTS = os.environ.get("SCREENSHOTS", "")  # a directory for pictures of the pages, to look at
ENGLISH = {
    "new": "New job", "review": "Review and start", "start": "Start", "stop": "Stop", "resume": "Resume",
    "chat": "Chat", "open": "Open chat", "stopped": "Stopped", "running": "Running", "search": "Search the log",
    "iterations": "Iterations TRAIN_ITERS", "rate": "Learning rate LR", "name": "Name", "before": "Before it starts",
    "finished": "Finished", "compare": re.compile("^Compare \\(2"), "loss": "Loss", "curves": "Curves",
}  # fmt: skip
CHINESE = {
    "new": "新建任务", "review": "检查并启动", "start": "启动", "stop": "停止", "resume": "继续", "chat": "对话",
    "open": "打开对话", "stopped": "已停止", "running": "运行中", "search": "搜索日志",
    "iterations": "迭代数 TRAIN_ITERS", "rate": "学习率 LR", "name": "名称", "before": "启动前检查",
    "finished": "已完成", "compare": re.compile("^对比 \\(2"), "loss": "损失", "curves": "曲线",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[Client]:
    """A manager whose jobs and data are in `place`."""
    (place / "dataset").mkdir()
    with manager(place / "jobs", DATA_DIR=str(place / "dataset"), PYTHONPATH=stub_path(place)) as (client, _):
        yield client


def shot(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def start(page: Page, words: dict[str, str], name: str, iterations: int) -> None:
    """Fill in the form, look at the dry run, and start."""
    page.get_by_role("link", name=words["new"]).click()
    page.get_by_label(words["name"]).fill(name)
    page.get_by_label(words["iterations"]).fill(str(iterations))
    page.get_by_role("button", name=words["review"]).click()
    dialog = page.get_by_role("dialog", name=words["before"])
    expect(dialog.get_by_text("about 0.10 GiB per rank", exact=True)).to_be_visible()
    expect(dialog.get_by_text(f"TRAIN_ITERS={iterations}")).to_be_visible()
    shot(page, f"review-{name}")
    dialog.get_by_role("button", name=words["start"], exact=True).click()
    expect(page.get_by_role("heading", name=name)).to_be_visible()


@pytest.mark.parametrize(("words", "locale"), [(ENGLISH, "en-US"), (CHINESE, "zh-CN")], ids=["en", "zh"])
def test_start_watch_stop_resume_chat(
    words: dict[str, str], locale: str, client: Client, new_page: NewPage, accessible: Callable[[Page], None]
) -> None:
    page = new_page(f"{client.base_url}/#token={TOKEN}", locale=locale)
    expect(page).to_have_url(re.compile("#/$"))  # the token has left the address
    accessible(page)
    start(page, words, f"first {locale}", 3000)
    main = page.get_by_role("main")
    expect(main.get_by_text(words["running"])).to_be_visible()
    expect(main.get_by_text("iteration 12 <b>你好</b>", exact=True)).to_be_visible()  # text, not HTML
    expect(main.locator(".chart canvas")).to_be_visible()
    expect(main.get_by_role("img", name=re.compile("lm_loss"))).to_be_visible()
    expect(main.get_by_role("progressbar")).to_be_visible()
    main.get_by_role("searchbox", name=words["search"]).fill("iteration 3 ")
    expect(main.locator("mark").first).to_have_text("iteration 3 ")
    main.get_by_role("searchbox", name=words["search"]).fill("")
    accessible(page)
    main.get_by_role("button", name=words["stop"], exact=True).click()
    expect(main.get_by_text(words["stopped"])).to_be_visible()
    expect(main.get_by_text("saved", exact=True)).to_be_visible()
    shot(page, f"stopped-{locale}")
    main.get_by_role("button", name=words["resume"]).click()
    expect(main.get_by_text(words["running"])).to_be_visible()
    expect(main.get_by_text(re.compile("== attempt 2"))).to_be_attached()
    main.get_by_role("button", name=words["stop"], exact=True).click()
    expect(main.get_by_text(words["stopped"])).to_be_visible()
    [job] = [job for job in client.get("/api/jobs").json()["jobs"] if job["name"] == f"first {locale}"]
    iterations = [row["iteration"] for row in client.get(f"/api/jobs/{job['id']}/metrics").json()["rows"]]
    assert iterations == list(range(1, len(iterations) + 1))
    main.get_by_role("button", name=words["chat"], exact=True).click()
    link = main.get_by_role("link", name=words["open"])
    expect(link).to_be_visible()
    with page.context.expect_page() as opened:
        link.click()
    expect(opened.value.get_by_role("heading")).to_have_text("the chat page")
    expect(opened.value).to_have_url(re.compile("/#key=[\\w-]{32}$"))
    main.get_by_role("button", name=words["stop"], exact=True).click()
    expect(main.get_by_text(words["stopped"])).to_be_visible()


def test_two_clicks_on_stop_save_and_end_now_asks(client: Client, place: Path, new_page: NewPage) -> None:
    name = client.start(name="stubborn", settings={"TRAIN_ITERS": 3000, "SEED": 1})  # does not answer SIGINT
    page = new_page(f"{client.base_url}/#token={TOKEN}")
    page.get_by_role("link", name="stubborn pretrain").click()
    main = page.get_by_role("main")
    asked: list[str] = []

    def decline(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.dismiss()

    expect(main.get_by_text("iteration 3 <b>你好</b>", exact=True)).to_be_visible()
    page.on("dialog", decline)
    main.get_by_role("button", name="Stop", exact=True).dblclick()
    expect(main.get_by_text("Saving")).to_be_visible()
    main.get_by_role("button", name="End now").click()
    assert "without saving" in asked[-1] and client.job(name)["state"] == "stopping"
    client.post(f"/api/jobs/{name}/kill")
    client.until(name, "stopped")


def test_the_job_that_starts_is_the_one_that_was_reviewed(client: Client, new_page: NewPage) -> None:
    page = new_page(f"{client.base_url}/#token={TOKEN}")
    page.get_by_role("link", name="New job").click()
    page.get_by_label("Name").fill("reviewed")
    page.get_by_label("Iterations TRAIN_ITERS").fill("5")
    held: list[Route] = []
    page.route("**/api/plan", lambda route: held.append(route))
    page.get_by_role("button", name="Review and start").click()
    expect(page.get_by_label("Iterations TRAIN_ITERS")).to_be_disabled()  # while the dry run is under way
    held[0].continue_()
    page.unroute("**/api/plan")
    dialog = page.get_by_role("dialog", name="Before it starts")
    expect(dialog.get_by_text("TRAIN_ITERS=5")).to_be_visible()
    # The fields behind the dialog can still be changed by a script, such as a password manager's.
    field = page.locator("label", has_text="TRAIN_ITERS").locator("input")
    field.evaluate("field => { field.value = '7'; field.dispatchEvent(new Event('input', { bubbles: true })) }")
    dialog.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_role("heading", name="reviewed")).to_be_visible()
    [job] = [job for job in client.get("/api/jobs").json()["jobs"] if job["name"] == "reviewed"]
    assert job["request"]["settings"] == {"TRAIN_ITERS": "5"}
    client.until(job["id"], "finished")


def test_a_wrong_value_is_named_and_nothing_starts(client: Client, new_page: NewPage, errors: list[str]) -> None:
    page = new_page(f"{client.base_url}/#token={TOKEN}")
    before = client.get("/api/jobs").json()
    page.get_by_role("link", name="New job").click()
    for value, message in (("many", "LR: found 'many', expected a number"), ("0.5", "LR=0.5 is too much")):
        page.get_by_label("Learning rate LR").fill(value)
        with page.expect_response("**/api/plan"):
            page.get_by_role("button", name="Review and start").click()
        expect(page.get_by_role("alert")).to_contain_text(message)
    assert client.get("/api/jobs").json() == before
    # The browser itself logs every reply with an error status.
    errors[:] = [text for text in errors if "Failed to load resource" not in text]


def test_two_jobs_are_compared_and_the_second_waits(
    client: Client, new_page: NewPage, accessible: Callable[[Page], None]
) -> None:
    first = client.start(name="slow", settings={"TRAIN_ITERS": 200, "LR": 1e-3})
    second = client.start(name="fast", settings={"TRAIN_ITERS": 30, "LR": 2e-3})
    page = new_page(f"{client.base_url}/#token={TOKEN}")
    page.get_by_role("link", name="fast pretrain").click()
    expect(page.get_by_text(f"Waits for {first}")).to_be_visible()
    client.until(second, "finished")
    expect(page.get_by_role("main").get_by_text("Finished")).to_be_visible()
    client.until(first, "finished")
    for name in ("slow", "fast"):
        page.get_by_label(f"Compare {name}").check()
    page.get_by_role("link", name="Compare (2)").click()
    expect(page.get_by_role("row", name="LR 0.001 0.002")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("slow.*fast"))).to_be_visible()
    accessible(page)
    shot(page, "compare")


def test_a_job_is_deleted_after_a_question(client: Client, place: Path, new_page: NewPage) -> None:
    name = client.start(name="old", settings={"TRAIN_ITERS": 2})
    client.until(name, "finished")
    page = new_page(f"{client.base_url}/#token={TOKEN}")
    page.get_by_label("Compare old").check()
    page.get_by_role("link", name="old pretrain").click()
    main, asked = page.get_by_role("main"), list[str]()

    def answer(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.accept() if len(asked) > 1 else dialog.dismiss()

    page.on("dialog", answer)
    main.get_by_role("button", name="Delete").click()
    expect(main.get_by_role("button", name="Delete")).to_be_enabled()
    assert str(place / "jobs" / name) in asked[0] and "MiB" in asked[0] and client.job(name)["state"] == "finished"
    main.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="Devices")).to_be_visible()
    expect(page.get_by_role("link", name="old pretrain")).to_have_count(0)
    assert not (place / "jobs" / name).exists()


def test_an_evaluation_asks_for_its_task(client: Client, new_page: NewPage) -> None:
    page = new_page(f"{client.base_url}/#token={TOKEN}")
    page.get_by_role("link", name="New job").click()
    page.get_by_role("combobox", name="Stage", exact=True).select_option("eval")
    expect(page.get_by_label("Task TASK").locator("option", has_text="toolcall")).to_be_attached()
    expect(page.get_by_label("Data").locator("option").first).to_have_text("none")


def test_a_hidden_page_holds_no_connection(client: Client, new_page: NewPage, errors: list[str]) -> None:
    name = client.start(name="hidden", settings={"TRAIN_ITERS": 3000})
    page = new_page(f"{client.base_url}/#token={TOKEN}")
    page.get_by_role("link", name="hidden pretrain").click()
    expect(page.get_by_text("iteration 3 <b>你好</b>", exact=True)).to_be_visible()
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/events?tail=1000")):
        page.evaluate(hide, True)
    with page.expect_request("**/events?tail=1000") as again:
        page.evaluate(hide, False)
    assert again.value.headers["last-event-id"]
    client.post(f"/api/jobs/{name}/stop")
    expect(page.get_by_role("main").get_by_text("Stopped")).to_be_visible()
    log = page.get_by_role("region", name="Log").locator("div").all_inner_texts()
    rows = [line for line in log if line.startswith("iteration ")]
    assert rows == [f"iteration {n} <b>你好</b>" for n in range(1, len(rows) + 1)]
    errors[:] = [text for text in errors if "ERR_ABORTED" not in text]


def test_rewards_and_samples_are_text(client: Client, place: Path, new_page: NewPage) -> None:
    name = client.start(name="rewards", settings={"TRAIN_ITERS": 5})
    client.until(name, "finished")
    folder = place / "jobs" / name / "pretrain"
    rows = [{"iteration": n, "grpo/score/mean": n / 5} for n in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {
        "iteration": 5,
        "prompt": "1+1=",
        "response": "<img src=x onerror=alert(1)>",
        "label": "2",
        "reward": "1.00",
    }
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = new_page(f"{client.base_url}/#token={TOKEN}")
    page.get_by_role("link", name="rewards pretrain").click()
    expect(page.get_by_role("cell", name="<img src=x onerror=alert(1)>")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("grpo.score.mean 1"))).to_be_visible()
    assert page.locator("img[src=x]").count() == 0
    shot(page, "samples")


def test_narrow_dark_and_by_keyboard(client: Client, new_page: NewPage, accessible: Callable[[Page], None]) -> None:
    name = client.start(
        name="a job with a name that is much too long for a narrow screen", settings={"TRAIN_ITERS": 30}
    )
    client.until(name, "finished")
    page = new_page(f"{client.base_url}/#token={TOKEN}", viewport={"width": 375, "height": 800}, color_scheme="dark")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.get_by_role("link", name="New job").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="New job")).to_be_focused()
    shot(page, "narrow-form")
    accessible(page)
    page.get_by_role("link", name="a job with").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main").get_by_text("Finished")).to_be_visible()
    expect(page.locator(".chart canvas")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    accessible(page)
    shot(page, "narrow-job")


def test_the_page_asks_for_the_token(client: Client, new_page: NewPage, errors: list[str]) -> None:
    page = new_page(str(client.base_url))
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("alert")).to_contain_text("refused the token")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("heading", name="Devices")).to_be_visible()
    expect(page.get_by_text(re.compile("cores"))).to_be_visible()
    shot(page, "devices")
    # The browser itself logs every reply with an error status.
    errors[:] = [text for text in errors if "Failed to load resource" not in text]


def test_options_are_described_in_both_languages(client: Client, new_page: NewPage) -> None:
    for locale, new, name, text in (
        ("en-US", "New job", "Learning rate LR", "highest learning rate; 0 to 1000"),
        ("zh-CN", "新建任务", "学习率 LR", "最高学习率；0 到 1000"),
    ):
        page = new_page(f"{client.base_url}/#token={TOKEN}", locale=locale)
        page.get_by_role("link", name=new).click()
        field = page.get_by_label(name)
        expect(field).to_have_accessible_description(text)
        expect(page.get_by_text(text)).to_be_visible()
