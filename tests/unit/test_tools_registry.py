"""Tools run in subprocesses with limits: what they return, and what becomes of those that hang, grow, print or fork."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import sys
from pathlib import Path

import pytest

from minimind_mcore.errors import UserError
from minimind_mcore.tools import worker
from minimind_mcore.tools.arithmetic import evaluate
from minimind_mcore.tools.process import Limits
from minimind_mcore.tools.registry import TOOLS, Toolbox, open_tools

BAD = """
import os, subprocess, sys, time
def hang(): time.sleep(600)
def spin():
    while True: pass
def allocate(): return len(bytearray(10 * 2**30))
def loud(): print("hello from the tool"); return 7
def endless():
    while True: print("x" * 1000)
def huge(): return "x" * 2**21
def fail(reason): raise ValueError(reason)
def leave(): sys.exit("gone")
def die(): os._exit(3)
def fork():
    if os.fork() == 0: time.sleep(600)
    return "parent"
def daemon(file):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    open(file, "w").write(str(child.pid))
    return "started"
def stranger(file):
    # In a session of its own, without an environment, and its parent is gone.
    script = f"env -i setsid sleep 600 & echo $! > {file}"
    subprocess.run(["setsid", "sh", "-c", script], check=True)
    return "started"
def fork_and_return(): return os.fork() and "parent"
def unserializable(): return object()
def no_number(): return {"x": float("nan")}
def family():
    # One after another, and their zombies stay: the processes of the limit are those that run.
    for _ in range(70):
        if os.fork() == 0: os._exit(0)
    children = [subprocess.Popen(["sleep", "0.2"]) for _ in range(30)]
    return sum(child.wait() == 0 for child in children)
def bomb():
    for _ in range(8): os.fork()
    time.sleep(600)
def crowd():
    for _ in range(5): os.fork()
    os.setpgid(0, 0)
    time.sleep(600)
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolbox:
    """Tools from a user's file, with little memory, and more time than they need on a busy machine."""
    (tmp_path / "bad_tools.py").write_text(BAD)
    names = [line.split("(")[0].removeprefix("def ") for line in BAD.splitlines() if line.startswith("def ")]
    entries = [{"type": "function", "function": {"name": name}, "python": f"bad_tools:{name}"} for name in names]
    (tmp_path / "tools.json").write_text(json.dumps(entries))
    monkeypatch.syspath_prepend(str(tmp_path))
    return open_tools(str(tmp_path / "tools.json"), Limits(seconds=120, memory=1 << 28))


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hang", "the tool ran for more than 2 s and was ended"),
        ("spin", "the tool ran for more than 2 s and was ended"),
        ("allocate", "the tool needs more than 256 MiB of memory"),
        ("endless", "the tool printed or returned more than 1,048,576 bytes"),
        ("huge", "the tool printed or returned more than 1,048,576 bytes"),
        ("leave", "SystemExit: gone"),
        ("die", "the tool's process ended with status 3"),
        ("unserializable", "TypeError: Object of type object is not JSON serializable"),
        ("no_number", "the tool returned NaN or an infinite number, which is not JSON"),
        ("crowd", "the tool ran for more than 2 s and was ended"),
    ],
)
def test_a_bad_tool_is_ended_and_reported(bad: Toolbox, name: str, message: str, tmp_path: Path) -> None:
    if "more than 2 s" in message:
        bad.limits = dataclasses.replace(bad.limits, seconds=2)
    result = bad.run(name, {})
    assert result is not None and not result.ok
    assert json.loads(result.text) == {"error": message}
    assert not _left(tmp_path)


def test_a_fork_bomb_is_ended_and_reported(bad: Toolbox, tmp_path: Path) -> None:
    """A tool that becomes 256 processes."""
    result = bad.run("bomb", {})
    assert result is not None and not result.ok
    assert json.loads(result.text) == {"error": "the tool started more than 64 processes and was ended"}
    assert not _left(tmp_path)


def test_processes_that_have_ended_do_not_count(bad: Toolbox) -> None:
    result = bad.run("family", {})
    assert result is not None and result.text == "30"


def test_the_reason_for_the_end_of_a_tool_replaces_its_result(tmp_path: Path) -> None:
    with open(tmp_path / "result", "wb") as file:
        for found in ({"result": "x" * 100}, {"error": "ended"}):
            worker._write({"result": os.dup(file.fileno())}, found)
    assert json.loads((tmp_path / "result").read_text()) == {"error": "ended"}


def test_what_a_tool_prints_is_not_its_result(bad: Toolbox) -> None:
    result = bad.run("loud", {})
    assert result is not None and (result.text, result.ok, result.printed) == ("7", True, "hello from the tool\n")


def test_errors_and_wrong_arguments_are_reported(bad: Toolbox) -> None:
    for arguments, message in (
        ({"reason": "no"}, "ValueError: no"),
        ({}, "TypeError: fail() missing 1 required positional argument: 'reason'"),
        ([1], "the arguments are [1]; expected a JSON object"),
    ):
        result = bad.run("fail", arguments)
        assert result is not None and json.loads(result.text) == {"error": message}
    result = bad.run("nothing", {})
    assert result is not None and "there is no tool 'nothing'; the tools are hang, spin" in result.text


def test_children_end_with_the_tool(bad: Toolbox, tmp_path: Path) -> None:
    """Those in its process group, one in a session of its own, and an orphan of that kind without an environment."""
    result = bad.run("fork", {})
    assert result is not None and json.loads(result.text) == "parent"
    result = bad.run("fork_and_return", {})
    assert result is not None and json.loads(result.text) == "parent"
    for name in ("daemon", "stranger"):
        result = bad.run(name, {"file": str(tmp_path / name)})
        assert result is not None and result.text == '"started"'
        assert not alive(int((tmp_path / name).read_text()))
    mine = [p for p in Path("/proc").glob("[0-9]*") if str(os.getpid()) == _parent(p)]
    assert not [p for p in mine if b"tools.worker" in _command(p)] and not _left(tmp_path)


def _parent(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / "stat").read_text().rpartition(")")[2].split()[1]
    return ""


def _left(path: Path) -> list[Path]:
    """Return the processes of tools whose PYTHONPATH has a path."""
    workers = [process for process in Path("/proc").glob("[0-9]*") if b"tools.worker" in _command(process)]
    return [process for process in workers if os.fsencode(path) in _environment(process)]


def _environment(folder: Path) -> bytes:
    with contextlib.suppress(OSError):
        return (folder / "environ").read_bytes()
    return b""


def _command(folder: Path) -> bytes:
    with contextlib.suppress(OSError):
        return (folder / "cmdline").read_bytes()
    return b""


def test_built_in_tools_agree_with_minimind() -> None:
    """Results as in MiniMind's train_agent.py, by its names and by those of its web demo and of minimind-ascend."""
    toolbox = open_tools("builtin", seed=1)
    weather = {"city": "北京", "temperature": "28°C", "humidity": "65%", "condition": "晴"}
    warm = {"city": "Tokyo", "temperature": "54°F", "humidity": "65%", "condition": "晴"}
    new_york = {"datetime": "2025-03-07 01:30:00", "timezone": "America/New_York"}
    kilometers = {"value": 100, "from_unit": "km", "to_unit": "miles"}
    dollars = {"from_currency": "USD", "to_currency": "CNY"}
    calls: list[tuple[str, object, object]] = [
        ("calculate_math", {"expression": "256×37"}, {"result": "9472"}),
        ("calculate", {"expression": "2^10"}, {"result": "1024"}),
        ("get_current_time", {"timezone": "America/New_York"}, new_york),
        ("unit_converter", kilometers, {"result": 62.1371, "from": "100 km", "to": "miles"}),
        ("get_current_weather", {"city": "北京"}, weather),
        ("get_weather", {"location": "Tokyo", "unit": "fahrenheit"}, warm),
        ("get_exchange_rate", dollars, {"from": "USD", "to": "CNY", "rate": 7.21}),
        ("translate_text", {"text": "你好世界", "target_lang": "english"}, {"translated_text": "Hello World"}),
        ("text_length", {"text": "a bc"}, {"characters": 4, "words": 2}),
    ]
    results = toolbox.run_all([(name, arguments) for name, arguments, _ in calls])
    assert [json.loads(result.text) for result in results if result] == [expected for *_, expected in calls]
    drawn = [toolbox.run("random_number", {"min": 1, "max": 1000}) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0] is not None and 1 <= json.loads(drawn[0].text)["result"] <= 1000


def test_every_definition_fits_its_function() -> None:
    import inspect

    from minimind_mcore.tools import builtin

    for tool in TOOLS.values():
        function = tool.definition["function"]
        assert isinstance(function, dict)
        parameters = inspect.signature(getattr(builtin, tool.name)).parameters
        assert list(function["parameters"]["properties"]) == list(parameters)
        required = [name for name, p in parameters.items() if p.default is p.empty]
        assert function["parameters"]["required"] == required
        assert set(tool.aliases.values()) <= set(parameters)


def test_arithmetic_agrees_with_python() -> None:
    r = random.Random(0)
    for _ in range(300):
        text = "".join(f"{r.choice(('', '-', '('))}{r.randint(0, 99)}{r.choice('+-*')}" for _ in range(3)) + "1"
        text += ")" * text.count("(")
        assert evaluate(text) == eval(text)
    assert evaluate("sqrt(144) + max(1, 2.5) − 6÷2") == 11.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "expected numbers"),
        ("(1).__class__", "expected numbers"),
        ("9**9**9", "is too large"),
        ("round(5, -10**9)", "is too large"),
        ("2**-5000", "is too large"),
        ("factorial(100000)", "expected numbers"),
        ("(2**900)*(2**900)", "is too large"),
        ("(-1)**0.5", "not a real number"),
        ("True", "expected numbers"),
        ("'a'*9", "expected numbers"),
        ("1+", "not an arithmetic expression"),
        ("(" * 300 + ")" * 300, "not an arithmetic expression"),
        ("1+" * 600, "expected 1,000 at most"),
    ],
)
def test_arithmetic_is_nothing_else(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(text)


def test_tools_are_found_by_name_and_file(tmp_path: Path) -> None:
    assert list(open_tools("calculate_math,get_time").tools) == ["calculate_math", "get_current_time"]
    with pytest.raises(UserError, match=r"no built-in tool 'calculate_maths'.*did you mean calculate_math"):
        open_tools("calculate_maths")
    file = tmp_path / "tools.json"
    mine = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    file.write_text(json.dumps({"tools": [mine, {"name": "ask_me"}]}))
    toolbox = open_tools(str(file))
    assert toolbox.definitions[0] == {"type": "function", "function": mine}
    result = toolbox.run("get_weather", {"city": "Paris"})
    assert result is not None and json.loads(result.text)["temperature"] == "10°C"
    assert toolbox.run("ask_me", {}) is None  # the user answers
    for content, message in (
        ("[]", "an empty list"),
        ('[{"name": "f"}, {"name": "f"}]', "f is defined more than once"),
        ('[{"name": "f", "python": "f"}]', 'tool 1 has "python": "f"; expected "module:function"'),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            open_tools(str(file))


SERVER = """
from mcp.server import MCPServer
server = MCPServer("test")
count = 0
@server.tool()
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b
@server.tool()
def calls() -> str:
    global count
    count += 1
    return f"{count} calls"
@server.tool()
def fail() -> str:
    raise RuntimeError("broken")
@server.tool()
async def hang() -> str:
    import asyncio
    await asyncio.sleep(600)
    return ""
server.run("stdio")
"""


def test_mcp_servers_are_tools(tmp_path: Path) -> None:
    pytest.importorskip("mcp")
    (tmp_path / "server.py").write_text(SERVER)
    entry = {"command": sys.executable, "args": [str(tmp_path / "server.py")]}
    file = tmp_path / "tools.json"
    file.write_text(json.dumps({"tools": [{"name": "calculate_math"}], "mcpServers": {"test": entry}}))
    with open_tools(str(file), Limits(seconds=5)) as toolbox:
        assert list(toolbox.tools) == ["calculate_math", "add", "calls", "fail", "hang"]
        function = toolbox.definitions[1]["function"]
        assert isinstance(function, dict) and function["description"] == "Add two numbers."
        assert function["parameters"]["required"] == ["a", "b"]
        texts = [result.text for _ in range(2) if (result := toolbox.run("calls", {}))]
        assert texts == ["1 calls", "2 calls"]  # one server for all calls
        result = toolbox.run("add", {"a": 2, "b": 3})
        assert result is not None and (result.text, result.ok) == ("5", True)
        result = toolbox.run("fail", {})
        assert result is not None and not result.ok and "Error executing tool fail" in result.text
        result = toolbox.run("hang", {})
        assert result is not None and not result.ok
    file.write_text(json.dumps({"mcpServers": {"test": {"command": str(tmp_path / "nothing")}}}))
    with pytest.raises(UserError, match="MCP server 'test' does not answer"):
        open_tools(str(file))
