"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(params=["v3", "v2"])
def published_tokenizer(request: pytest.FixtureRequest) -> Path:
    """Directory of one of MiniMind's published tokenizers; skips where they are not given."""
    root = os.environ.get("MINIMIND_TOKENIZER_DIR")
    if not root:
        pytest.skip("MINIMIND_TOKENIZER_DIR is not set: MiniMind's published tokenizers are not shipped here")
    return Path(root) / request.param
