"""Look up functions by a registered name, or by the import path of a user's function.

@register("clip", POLICY_LOSSES)
def clip(logp, old_logp, advantages, mask, *, clip_low, clip_high): ...

lookup("clip", POLICY_LOSSES, "minimind.policy_loss")
lookup("my_module:my_loss", POLICY_LOSSES, "minimind.policy_loss")
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from minimind_mcore.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])


def register(name: str, table: dict[str, Function]) -> Callable[[Function], Function]:
    """Return a decorator that puts a function into a table."""

    def decorate(function: Function) -> Function:
        table[name] = function
        return function

    return decorate


def lookup(name: str, table: Mapping[str, Function], key: str) -> Function:
    """Return the function that is registered under a name, or the one at the path `package.module:function`.

    Args:
        name: the name or the path.
        table: the registered functions.
            key: the YAML key that gives the name, for messages.

    Raises:
        UserError: no function is registered under the name, or the path cannot be imported.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        raise UserError(f"{key}: found {name!r}, expected one of {', '.join(table)}, or package.module:function")
    return imported(name, key)  # type: ignore[no-any-return]


def imported(path: str, key: str) -> Any:
    """Import the function of a path `package.module:function`.

    Raises:
        UserError: the path cannot be imported.
    """
    module, _, function = path.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{key}: cannot import {path!r}: {error}. Expected package.module:function, "
            "importable from the run's directory or PYTHONPATH"
        ) from error
