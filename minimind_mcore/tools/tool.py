"""A tool: its definition, and the function or server that runs its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from minimind_mcore.tools.process import Limits, Result


@dataclass(frozen=True)
class Tool:
    """A tool that a model may call. If it has neither `function` nor `remote`, the user answers its calls.

    Attributes:
        definition: {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}.
        function: "module:name" of the Python function that runs in a subprocess.
        remote: function that runs in this process instead. It gets the arguments and the limits of the call.
        aliases: maps other names of arguments to the names of the function.
        payload: keys of the result whose values the model's answer should contain. Empty: all keys that do not repeat
            an argument.
    """

    definition: Mapping[str, object]
    function: str | None = None
    remote: Callable[[Mapping[str, object], Limits], Result] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    payload: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The name by which the model calls the tool."""
        function = self.definition["function"]
        assert isinstance(function, Mapping)
        return str(function["name"])

    @property
    def properties(self) -> Mapping[str, Mapping[str, object]]:
        """The schemas of the arguments."""
        found = self._parameters.get("properties")
        return found if isinstance(found, Mapping) else {}

    @property
    def required(self) -> list[str]:
        """The arguments that must be given."""
        found = self._parameters.get("required")
        return found if isinstance(found, list) else []

    @property
    def _parameters(self) -> Mapping[str, object]:
        function = self.definition["function"]
        found = function.get("parameters") if isinstance(function, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    def canonical(self, arguments: Mapping[str, object]) -> dict[str, object]:
        """Return the arguments with aliases replaced by the argument names of the function."""
        return {self.aliases.get(name, name): value for name, value in arguments.items()}
