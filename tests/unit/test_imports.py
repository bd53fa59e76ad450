"""The first import of a large package: what is collected meanwhile and afterwards."""

from __future__ import annotations

import gc
import sys
import types
import weakref

import pytest

from minimind_mcore.imports import importing

NAME = "a_large_package"


class Node:
    itself: Node


def cycle() -> weakref.ref[Node]:
    node = Node()
    node.itself = node
    return weakref.ref(node)


def test_the_first_import_is_not_disturbed_and_its_objects_are_not_walked_again() -> None:
    frozen = gc.get_freeze_count()
    try:
        with importing(NAME):
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen + 1000
        after = cycle()
        gc.collect()
        assert after() is None
    finally:
        gc.unfreeze()


def test_a_failed_import_collects_again() -> None:
    try:
        with pytest.raises(ImportError), importing(NAME):
            raise ImportError(NAME)
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("why", ["imported before", "collections are off"])
def test_nothing_is_changed(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    frozen, enabled = gc.get_freeze_count(), why == "imported before"
    if enabled:
        monkeypatch.setitem(sys.modules, NAME, types.ModuleType(NAME))
    else:
        gc.disable()
    try:
        with importing(NAME):
            assert gc.isenabled() == enabled
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == frozen
    finally:
        gc.enable()
