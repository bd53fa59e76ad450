"""The registry of tools: the definitions that a model sees, and the functions that run its calls.

    toolbox = open_tools("builtin")              # or "calculate_math,get_current_time", or a JSON file
    toolbox.definitions                          # for the chat template
    toolbox.run("calculate_math", {"expression": "256*37"})

A JSON file holds a list of definitions in OpenAI's form. A definition may have the key "python" beside "function":
`"python": "my_tools:weather"` runs the function weather of the module my_tools. Without that key the built-in tool of
the same name runs. If there is none, the user answers the call. The file may also be an object
{"tools": [...], "mcpServers": {"name": {"command": ..., "args": [...]}}}. Its MCP servers run until the toolbox is
closed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.tools.builtin import SEED, TABLES
from minimind_mcore.tools.mcp_servers import open_servers
from minimind_mcore.tools.process import Limits, Result, failed, run
from minimind_mcore.tools.tool import Tool

BUILTIN = "builtin"
PARALLEL = 2  # maximum number of concurrent calls


class Toolbox(AbstractContextManager["Toolbox"]):
    """The tools of a conversation. A context manager, which stops MCP servers at its end.

    Args:
        tools: tools with distinct names.
        limits: limits of each call.
        seed: makes the built-in clock and random numbers repeatable.
        stack: closed at the end of the context.
    """

    def __init__(
        self, tools: Sequence[Tool], limits: Limits | None = None, seed: int | None = None,
        stack: ExitStack | None = None,
    ) -> None:  # fmt: skip
        self.tools = {tool.name: tool for tool in tools}
        self.limits, self.seed = limits or Limits(), seed
        self._stack = stack or ExitStack()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def definitions(self) -> list[Mapping[str, object]]:
        """The definitions in OpenAI's form."""
        return [tool.definition for tool in self.tools.values()]

    def find(self, name: str) -> Tool | None:
        """Return the tool of a name, or of another project's name for it."""
        return self.tools.get(name) or self.tools.get(NAMES.get(name, ""))

    def run(self, name: str, arguments: object) -> Result | None:
        """Run a call. Return None if the user must answer it."""
        tool = self.find(name)
        if tool is None:
            return failed(f"there is no tool {name!r}; the tools are {', '.join(self.tools)}")
        if not isinstance(arguments, Mapping):
            return failed(f"the arguments are {json.dumps(arguments)[:80]}; expected a JSON object")
        if tool.remote is not None:
            return tool.remote(arguments, self.limits)
        if tool.function is None:
            return None
        environ = {} if self.seed is None else {SEED: str(self.seed)}
        return run(tool.function, tool.canonical(arguments), self.limits, environ)

    def run_all(self, calls: Sequence[tuple[str, object]]) -> list[Result | None]:
        """Run independent calls, some of them concurrently. The results are in the order of the calls."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(self.run, *zip(*calls, strict=True))) if calls else []


TOOLS: Mapping[str, Tool] = {
    name: Tool(
        row["definition"], f"minimind_mcore.tools.builtin:{name}", aliases=row["aliases"], payload=row["payload"]
    )
    for name, row in TABLES["tools"].items()
}
# minimind-ascend's names
NAMES: Mapping[str, str] = {
    "get_weather": "get_current_weather",
    "calculate": "calculate_math",
    "get_time": "get_current_time",
}


def open_tools(spec: str, limits: Limits | None = None, seed: int | None = None) -> Toolbox:
    """Return the tools of `--tools`: "builtin", names of built-in tools separated by commas, or a JSON file.

    Raises:
        UserError: an unknown name, or a file without tools.
    """
    if spec == BUILTIN:
        return Toolbox(list(TOOLS.values()), limits, seed)
    if Path(spec).is_file() or spec.endswith(".json"):
        with ExitStack() as stack:
            return Toolbox(_read(spec, stack), limits, seed, stack.pop_all())
    names = [NAMES.get(name, name) for name in spec.split(",")]
    if unknown := [name for name in names if name not in TOOLS]:
        hint = did_you_mean(unknown[0], TOOLS) or f"; expected a JSON file, {BUILTIN}, or some of {', '.join(TOOLS)}"
        raise UserError(f"--tools {spec}: there is no file and no built-in tool {unknown[0]!r}{hint}")
    return Toolbox([TOOLS[name] for name in names], limits, seed)


def _read(path: str, stack: ExitStack) -> list[Tool]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--tools {path}: not a readable JSON file ({error})") from error
    servers: object = {}
    if isinstance(content, dict) and ("tools" in content or "mcpServers" in content):
        content, servers = content.get("tools", []), content.get("mcpServers", {})
    entries = content if isinstance(content, list) else [content]
    tools = [_entry(entry, f"--tools {path}: tool {number}") for number, entry in enumerate(entries, 1)]
    if servers:
        tools += open_servers(servers, f"--tools {path}", stack)
    if not tools:
        raise UserError(f"--tools {path}: an empty list; leave the flag out for none")
    names = [tool.name for tool in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"--tools {path}: {', '.join(sorted(twice))} is defined more than once; expected one tool per name"
        )
    return tools


def _entry(entry: object, where: str) -> Tool:
    """Return the tool of an entry: a definition, or its function alone."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        expected = '{"type": "function", "function": {"name": ...}}'
        raise UserError(f"{where} is {json.dumps(entry)[:80]}; expected {expected}")
    python = entry.get("python")
    if python is not None and (not isinstance(python, str) or not all(python.partition(":"))):
        raise UserError(f'{where} has "python": {json.dumps(python)}; expected "module:function"')
    definition = {key: value for key, value in entry.items() if key != "python"}
    tool = tool_of(definition if "function" in entry else {"type": "function", "function": definition})
    return replace(tool, function=python, aliases={}, payload=()) if python else tool


def tool_of(definition: Mapping[str, object]) -> Tool:
    """Return a definition as a tool, behind which the built-in function of its name runs, if there is one."""
    tool = Tool(definition)
    known = TOOLS.get(NAMES.get(tool.name, tool.name))
    return tool if known is None else replace(known, definition=definition)
