"""Tools of MCP servers, through the official SDK (the extra `mcp`).

    {"mcpServers": {"files": {"command": "python", "args": ["server.py"]}, "remote": {"url": "http://localhost:8000/mcp"}}}

Other MCP clients read the same JSON object. A server runs as long as the toolbox is open, so it may keep state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from minimind_mcore.errors import UserError
from minimind_mcore.paths import install_command
from minimind_mcore.tools.process import Limits, Result, failed
from minimind_mcore.tools.tool import Tool

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal  # pyright: ignore[reportMissingImports]
    from mcp import Client  # pyright: ignore[reportMissingImports]

START_SECONDS = 30.0  # maximum time of each answer of a server that starts or lists its tools


def open_servers(servers: object, where: str, stack: ExitStack) -> list[Tool]:
    """Start servers, or connect to them, and return their tools.

    Args:
        servers: the object under `mcpServers`.
        where: names the file in messages.
        stack: ends the connections and the servers.

    Raises:
        UserError: the SDK is not installed, or a server does not start.
    """
    try:
        from anyio.from_thread import start_blocking_portal  # pyright: ignore[reportMissingImports]
        from mcp import Client, StdioServerParameters  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{where}: mcpServers needs the MCP SDK: {install_command('mcp')}") from error
    if not isinstance(servers, dict):
        raise UserError(f"{where}: mcpServers is {json.dumps(servers)[:80]}; expected an object of servers by name")
    portal, tools = stack.enter_context(start_blocking_portal()), []
    for name, entry in servers.items():
        place = f"{where}: MCP server {name!r}"
        if not isinstance(entry, dict) or not isinstance(entry.get("url", entry.get("command")), str):
            raise UserError(
                f'{place} is {json.dumps(entry)[:80]}; expected {{"command": ..., "args": [...]}} or {{"url": ...}}'
            )
        try:
            server = entry["url"] if "url" in entry else StdioServerParameters(
                command=entry["command"], args=entry.get("args", []), env=entry.get("env")
            )  # fmt: skip
            client = Client(server, read_timeout_seconds=START_SECONDS)
            stack.enter_context(portal.wrap_async_context_manager(client))
            listed = _tools(portal, client)
        except Exception as error:  # the SDK raises exception groups, which may hold any exception
            raise UserError(f"{place} does not answer: {error!r}; start it by hand to see why") from error
        for tool in listed:
            function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
            definition = {"type": "function", "function": function}
            tools.append(Tool(definition, remote=partial(_call, portal, client, tool.name)))
    return tools


def _tools(portal: BlockingPortal, client: Client) -> list[Any]:
    """Return the tools of a server, which may come in pages."""
    page = portal.call(client.list_tools)
    found = list(page.tools)
    while page.next_cursor:
        page = portal.call(partial(client.list_tools, cursor=page.next_cursor))
        found += page.tools
    return found


def _call(portal: BlockingPortal, client: Client, name: str, arguments: Mapping[str, object], limits: Limits) -> Result:
    try:
        found = portal.call(partial(client.call_tool, name, dict(arguments), limits.seconds))
    except Exception as error:  # a timeout, a stopped server or an invalid reply: the model reads the error
        return failed(f"the MCP server failed: {error}")
    texts = [block.text for block in found.content if block.type == "text"]
    text = "\n".join(texts) if texts or not found.structured_content else json.dumps(found.structured_content)
    if found.is_error:
        return failed(text)
    return Result(text if len(text) <= limits.output else text[: limits.output])
