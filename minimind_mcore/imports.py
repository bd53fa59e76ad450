"""The first import of large packages."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing(module: str) -> Iterator[None]:
    """Within the context, the first import of `module` with all that it needs, Python collects no garbage.

    torch and megatron-core make hundreds of thousands of objects that stay until the end. The collections during their
    import take a sixth of its time, and later collections would walk these objects again (`gc.freeze`).
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
