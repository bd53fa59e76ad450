"""A tool: its definition, and what runs when a model calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from minimind_mcore.tools.process import Limits, Result


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        definition: {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}.
        function: "module:name" of the Python function that runs in a subprocess.
        remote: what runs instead: takes the arguments, and the limits of the call.
        aliases: other names of arguments.
        payload: keys of the result that an answer should hold. Empty: all keys that do not echo an argument.
    """

    definition: Mapping[str, object]
    function: str | None = None
    remote: Callable[[Mapping[str, object], Limits], Result] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    payload: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The name that the model calls."""
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
        """Return the arguments under the names of the function, which the definition may call by an alias."""
        return {self.aliases.get(name, name): value for name, value in arguments.items()}
