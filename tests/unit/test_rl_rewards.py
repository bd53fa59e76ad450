"""Rewards: sums, failures that never pay, deadlines that hold, functions of one's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.engine import ROOT
from pebble import ProcessPool

from minimind_mcore.errors import UserError
from minimind_mcore.rl.rewards import equality, shaping
from minimind_mcore.rl.rewards.length import overlong
from minimind_mcore.rl.rewards.rewards import Overlong, Rewards
from minimind_mcore.rl.rewards.verifiers import VERIFIERS

MINE = """
import os, time

def length(response, label, **context):
    return len(response) + context.get("tool_calls", 0)

def temper(response, label, **context):
    if response == "raise": raise ValueError("no")
    if response == "hang":
        while True: time.sleep(60)
    if response == "die": os._exit(9)
    if response == "text": return "many"
    if response == "nan": return float("nan")
    return float(response)

def strict(response, label, **context):
    raise RuntimeError("always")
strict.wrong = -2.0

def graded(response, label, level, **context): return float(level)
def few(response): return 0.0
def found(response, label, prompt, length, record): return record["gt"].count(response) / len(record["gt"])
def any_context(response, label, **context): return float(len(context["record"]))
def older(response, label, prompt="", length=0): return float(length)
number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards"


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`hurry(response)`: this one alone has the deadline; the others may take their time on a busy machine."""
    schedule = ProcessPool.schedule

    def only(response: str) -> None:
        def patient(self: ProcessPool, function: Any, args: tuple[Any, ...], timeout: float) -> Any:
            given = timeout if response in args else 300.0
            return schedule(self, function, args=(given, *args[1:]), timeout=given)

        monkeypatch.setattr(ProcessPool, "schedule", patient)

    return only


@pytest.fixture
def rewards() -> Iterator[Rewards]:
    with Rewards(["acc", "format"], [1.0, 0.5], parallel=1) as rewards:
        yield rewards


def test_total_is_the_weighed_sum(rewards: Rewards) -> None:
    responses = [r"<think>a</think><answer>\boxed{\sqrt{8}}</answer>", r"\boxed{3}", "none"]
    scores = rewards.score(responses, [r"2\sqrt{2}", "4", "5"])
    assert scores.by_verifier["acc"].tolist() == [1.0, -0.5, -1.0]
    assert scores.by_verifier["format"].tolist() == [1.0, 0.0, 0.0]
    assert scores.total.tolist() == [1.5, -0.5, -1.0]
    assert scores.metrics() == {
        "acc_rewards/mean": pytest.approx(-0.5 / 3), "format_rewards/mean": pytest.approx(1 / 3),
    }  # fmt: skip
    assert not scores.failures


def test_categories_gate_the_rules(rewards: Rewards) -> None:
    scores = rewards.score(["none", "none"], ["1", "1"], categories=[1, 0])
    assert scores.total.tolist() == [-1.0, 0.0]


def test_numbers_and_text_need_no_process(rewards: Rewards) -> None:
    rewards.score([r"\boxed{12}", r"\boxed{13}", r"\boxed{yes}"], ["12", "12", "yes"])
    assert rewards.workers._pool is None


def test_own_functions_are_given_the_context(mine: str) -> None:
    with Rewards([f"{mine}:length"], [2.0]) as rewards:
        scores = rewards.score(["ab", "abc"], ["", ""], tool_calls=[10, 20])
    assert scores.total.tolist() == [24.0, 46.0]
    with pytest.raises(UserError, match=r"a required argument: 'level'.*context has prompt, length, record, turns$"):
        Rewards([f"{mine}:graded"], [1.0])
    with Rewards([f"{mine}:graded"], [1.0], columns=["level"]) as rewards:
        assert rewards.score(["a", "b"], ["", ""], columns={"level": ["2", "3"]}).total.tolist() == [2.0, 3.0]


def test_own_functions_see_the_record_and_older_signatures_go_on_working(mine: str) -> None:
    records = [{"gt": ["4"], "tools": [{"name": "add"}], "messages": []}, {"gt": ["5", "6"]}]
    names = [f"{mine}:found", f"{mine}:any_context", f"{mine}:older"]
    with Rewards(names, [1.0, 1.0, 1.0]) as rewards:
        lengths = torch.tensor([7, 8])
        scores = rewards.score(["4", "6"], ["", ""], lengths=lengths, prompts=["p", "q"], records=records)
        assert scores.by_verifier[names[0]].tolist() == [1.0, 0.5]
        assert scores.by_verifier[names[1]].tolist() == [3.0, 1.0]
        assert scores.by_verifier[names[2]].tolist() == [7.0, 8.0] and not scores.failures
    with Rewards(names[1:2], [1.0], columns=["record"]) as rewards:  # a column of that name comes first
        assert rewards.score(["4"], [""], columns={"record": ["five!"]}, records=[{}]).total.tolist() == [5.0]


def test_a_failure_never_beats_a_wrong_answer(mine: str, hurry: Callable[[str], None]) -> None:
    """What raises, hangs, dies or gives no number costs the least that was given; the others are scored."""
    responses = ["1", "raise", "-3", "hang", "die", "text", "nan", "2"]
    hurry("hang")
    with Rewards([f"{mine}:temper"], [1.0], timeout=2, parallel=2, max_failures=0.9) as rewards:
        scores = rewards.score(responses, [""] * len(responses))
        again = rewards.score(["5"], [""])  # the processes were replaced
    assert scores.total.tolist() == [1.0, -3.0, -3.0, -3.0, -3.0, -3.0, -3.0, 2.0]
    assert again.total.tolist() == [5.0]
    assert scores.failures == {f"{mine}:temper": 5}
    reasons = " ".join(str(sample) for sample in scores.samples)
    assert "ValueError: no" in reasons
    line = 1 + MINE[: MINE.index('raise ValueError("no")')].count("\n")
    assert f"my_rewards.py:{line}, in temper)" in reasons  # the user's file and line
    assert "took longer than 2 s" in reasons


def test_too_many_failures_end_the_run(mine: str) -> None:
    with Rewards([f"{mine}:strict"], [1.0]) as rewards, pytest.raises(UserError) as error:
        rewards.score(["a", "b"], ["1", "1"])
    assert "could not score 2 of the last 2 responses" in str(error.value)
    assert "RuntimeError: always" in str(error.value)
    responses = ["raise"] * 8 + ["1"] * 23
    with Rewards([f"{mine}:temper"], [1.0]) as rewards:
        assert rewards.score(responses, [""] * 31).failures.total() == 8  # too few responses to judge by
        assert rewards.score(["1"], [""]).total.tolist() == [1.0]
        with pytest.raises(UserError, match="9 of the last 33"):
            rewards.score(["raise"], [""])
    with Rewards([f"{mine}:strict"], [1.0], max_failures=1.0) as rewards:
        assert rewards.score(["a"], ["1"]).total.tolist() == [-2.0]  # its own `wrong`


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_ac", "Did you mean base_acc?"),
        ("nothing_like_it", "Expected one of acc, format"),
        ("my_rewards:lenght", "cannot import 'my_rewards:lenght'"),
        ("absent_module:f", "cannot import 'absent_module:f'"),
        ("my_rewards:few", r"Expected a function \(response: str, label: str, \*\*context\) -> float"),
        ("my_rewards:number", r"Expected a function \(response"),
    ],
)
def test_what_cannot_be_called_is_named(mine: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rewards([name], [1.0])


def test_a_weight_for_each() -> None:
    with pytest.raises(UserError, match="found 1 weights, expected 2"):
        Rewards(["acc", "format"], [1.0])


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {}')",
        "open(chr(47)+chr(116))",
        "exec(x)",
        "(lambda: 0)()",
        "x.__class__",
        "[c for c in x.mro()]",
        "x if exit() else y",
        "f'{x}'",
    ],
)
def test_a_response_is_not_run_as_python(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("reached the parser that evaluates")

    monkeypatch.setattr(equality, "parse_expr", refuse)
    assert not equality._harmless(text)
    assert equality.equal(text.replace("{}", str(tmp_path / "made")), "12") is False
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verifier", ["acc", "math_17k_acc", "math_verify_reward"])
@pytest.mark.parametrize(
    "call", ["doctest()", "init_session()", "test()", "source(sqrt)", "preview(x)", "sympify(x)", "lambdify(x,x)(1)"]
)
def test_a_response_calls_nothing_but_mathematics(verifier: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`\\boxed{doctest()}` started processes: sympy's parser resolves every public name of sympy."""

    def refuse(*_: object, **__: object) -> None:
        raise BaseException("a function that is not mathematics was called")  # not suppressed by the verifiers

    import sympy

    for name in ("doctest", "init_session", "test", "source", "preview", "sympify", "lambdify"):
        if hasattr(sympy, name):
            monkeypatch.setattr(sympy, name, refuse)
    assert VERIFIERS[verifier].score(rf"\boxed{{{call}}}", "12") <= 0


def test_the_parser_has_mathematics_only() -> None:
    """Every callable that a response can reach is a class of sympy's expressions, or one of a short list."""
    import sympy

    functions = {
        name
        for name, value in equality._mathematics().items()
        if callable(value)
        and not isinstance(value, sympy.Basic)
        and not (isinstance(value, type) and issubclass(value, sympy.Basic | sympy.MatrixBase))
    }
    roots = {"sqrt", "cbrt", "root", "real_root", "gcd", "lcm", "N", "diff", "expand", "factor", "simplify"}
    assert functions == roots | {"abs", "min", "max", "round", "pow", "sum"}


@pytest.mark.parametrize(
    ("answer", "label"),
    [("sqrt(8)", "2*sqrt(2)"), ("factorial(5)", "120"), ("sin(pi/6)", "1/2"), ("Matrix([[1,2]])", "Matrix([[1, 2]])")],
)
def test_mathematics_still_counts(answer: str, label: str) -> None:
    assert equality.equal(answer, label)


def test_a_tower_of_powers_costs_its_response_only(hurry: Callable[[str], None]) -> None:
    tower = r"\boxed{9**9**9**9}"
    hurry(tower)
    with Rewards(["acc"], [1.0], timeout=3, max_failures=1.0) as rewards:
        scores = rewards.score([tower, r"\boxed{\sqrt{8}}"], ["12", r"2\sqrt{2}"])
    assert scores.total.tolist() == [-0.5, 1.0]


ORPHAN = """
from minimind_mcore.rl.rewards.rewards import Rewards
if __name__ == "__main__":
    rewards = Rewards(["my_rewards:where"], [1.0], timeout=3)
    rewards.score(["x"], [""])
"""
BUSY = """
import os, pathlib
def where(response, label, **context):
    pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
    while True: pass
"""


def test_a_busy_process_ends_even_if_its_parent_was_killed(tmp_path: Path) -> None:
    """SIGKILL of the reward actor leaves nobody to end what hangs."""
    (tmp_path / "my_rewards.py").write_text(BUSY)
    (tmp_path / "main.py").write_text(ORPHAN)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=env)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    with suppress(psutil.NoSuchProcess):
        worker = psutil.Process(int((tmp_path / "pid").read_text()))
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)  # the test's own timeout is the deadline


def test_overlong_penalty() -> None:
    lengths = torch.tensor([10, 80, 90, 100, 120])
    assert overlong(lengths, 100, 20, 2.0).tolist() == [0, 0, -1, -2, -2]
    with Rewards(["format"], [1.0], overlong=Overlong(100, 20, 2.0)) as rewards:
        scores = rewards.score(["", ""], ["", ""], lengths=torch.tensor([90, 10]))
        assert scores.total.tolist() == [-1.0, 0.0]
        with pytest.raises(UserError, match="lengths"):
            rewards.score([""], [""])


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("short", -0.5),
        ("a" * 20, 0.5),
        ("a" * 801, -0.5),
        ("t" * 20 + "</think> the answer", 0.5 + 1 + 0.25),
        ("t" * 19 + "</think> the answer", 0.5 - 0.5 + 0.25),
        ("t" * 301 + "</think> the answer", 0.5 - 0.5 + 0.25),
        ("t" * 20 + "</think> the </think> answer", 0.5 + 1 - 0.25),
        ("one two three " * 5, 0.5 - 0.5),  # 13 triples, 3 different: 10 / 13, capped
        ("a b c d a b c e f g h", 0.5 - 1 / 9),  # 9 triples, 8 different
    ],
)
def test_minimind_shape(response: str, score: float) -> None:
    assert shaping.minimind_shape(response) == pytest.approx(score)
    assert VERIFIERS["minimind_shape"].score(response, "") == pytest.approx(score)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1.5),
        ("<think>\na\n</think>\n\n<answer>\nb\n</answer>", 1.5),
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think><think>a</think>", 0.25),
        ("", 0.0),
    ],
)
def test_minimind_reason(response: str, score: float) -> None:
    assert shaping.minimind_reason(response) == score


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("12:00", "1:00"),  # False for MindSpeed-RL's math_equal with latex2sympy2 1.9.1, as the next three
        ("3:0", "5:0"),
        (r"\frac{1}{0}", "12:00"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
        (r"\frac{x}{0}", r"\frac{2x}{0}"),
        ("10^{400}", "10^{500}"),  # more than a float holds
        ("1e400", "1e500"),
        (r"\infty", r"\frac{1}{0}"),
        (r"-\infty", r"\infty"),
    ],
)
def test_acc_takes_no_two_infinities_for_equal(answer: str, label: str) -> None:
    assert VERIFIERS["acc"].score(f"\\boxed{{{answer}}}", label) == -0.5
    quick = VERIFIERS["acc"].quick
    assert quick is not None and quick(f"\\boxed{{{answer}}}", label) in (None, -0.5)


@pytest.mark.parametrize(
    ("answer", "label"),
    [("12:00", "12:00"), ("infinity", r"\infty"), (r"+\infty", r"\infty"), ("2:4", "1:2"), ("10^{400}", "10^{400}")],
)
def test_acc_still_takes_the_same_for_the_same(answer: str, label: str) -> None:
    assert VERIFIERS["acc"].score(f"\\boxed{{{answer}}}", label) == 1


def test_the_table_of_acc_s_weaknesses_is_true() -> None:
    """docs/rewards.md lists wrong answers that `acc` rewards, and right ones that it does not."""
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    section = text.split("### What `acc` gets wrong")[1].split("\n#")[0]
    rows = [re.findall(r"`([^`]+)`", line)[:3] for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) >= 8
    for answer, label, score in rows:
        assert VERIFIERS["acc"].score(f"\\boxed{{{answer}}}", label) == float(score), (answer, label)
