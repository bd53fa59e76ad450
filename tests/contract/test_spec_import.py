"""`--spec minimind_mcore.models.minimind_spec layer_spec` is what every Megatron imports, in a fresh process.

Megatron-LM core_v0.12.1 (megatron/core/transformer/spec_utils.py:30-42) does `__import__(module)` and `vars(module)`;
an ImportError there is printed and becomes None, so that the model would be built from nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.engine import ROOT

IMPORT = """
import sys
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
spec = import_module(("minimind_mcore.models.minimind_spec", "layer_spec"))
assert isinstance(spec, ModuleSpec), spec                       # a constant, not a function that makes one
from megatron.core import package_info
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
assert issubclass(spec.module, TransformerLayer)
assert isinstance(spec.submodules, TransformerLayerSubmodules)
print(package_info.__version__)
print(*sorted({name.split(".")[0] for name in sys.modules} & {"transformer_engine", "apex", "torch_npu", "mindspeed"}))
"""
# Nothing of the kit may have imported the spec before it is asked for: MindSpeed patches megatron-core first.
LAZY = """
import sys
import minimind_mcore, minimind_mcore.models, minimind_mcore.mindspeed, minimind_mcore.arguments
import minimind_mcore.models.presets, minimind_mcore.converters, minimind_mcore.preprocess
print(*(name for name in sys.modules if name.startswith("megatron") or name.endswith("minimind_spec")))
"""


def fresh(code: str, *first: str) -> list[str]:
    """The lines that a new interpreter prints, with these directories first on its path."""
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environ["PYTHONPATH"] = os.pathsep.join([*first, str(ROOT)])
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_megatron_imports_the_spec_0_12_1() -> None:
    folder = os.environ.get("MCORE_012_DIR")
    if not folder:
        pytest.skip("MCORE_012_DIR is not set: no megatron-core 0.12.1 to test against")
    assert fresh(IMPORT, folder) == ["0.12.1", ""]


def test_megatron_imports_the_spec() -> None:
    version, foreign = fresh(IMPORT)
    assert version >= "0.12.1" and foreign == ""


def test_the_sources_that_mindspeed_copies_import_the_spec() -> None:
    """Megatron-LM itself, as its folder is copied into MindSpeed-LLM's."""
    home = os.environ.get("MEGATRON_HOME")
    if not home:
        pytest.skip("MEGATRON_HOME is not set: no sources of Megatron-LM core_v0.12.1")
    assert fresh(IMPORT, home) == ["0.12.1", ""]


def test_no_package_imports_the_spec_by_itself() -> None:
    assert fresh(LAZY) == [""]
