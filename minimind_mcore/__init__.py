"""MiniMind language models on Megatron-Core: one kit for CPU, CUDA and Ascend.

Run from a checkout that is not installed, `models/`, `preprocess/` and `converters/` lie beside
this package rather than in it; the lines below join them to it, so that
`import minimind_mcore.models` means the same thing everywhere.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "models" / "minimind_spec.py").is_file() and not (Path(__file__).parent / "models").exists():
    __path__.append(str(_checkout))
