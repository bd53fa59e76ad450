"""The changes to megatron-core: setup makes them, an import does not, and a test notices what newer versions change.

`patched_sources.json` has the SHA-256 of the definitions that the changes rely on, for each version that was read.
After reading a new version record it: python tests/contract/test_patches.py FOLDER_WITH_MEGATRON
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine import ROOT

from minimind_mcore.platform.patches import PATCHES, Patch

RECORD = Path(__file__).with_name("patched_sources.json")
SOURCES = sorted({source for patch in PATCHES for source in patch.sources})


def installed() -> Path:
    """The folder that has the installed megatron."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[2]


def version_of(folder: Path) -> str:
    """The version of the megatron-core in a folder."""
    names: dict[str, object] = {}
    exec((folder / "megatron/core/package_info.py").read_text(encoding="utf-8"), names)
    return str(names["__version__"]).split("+")[0]


def text_of(folder: Path, module: str) -> str:
    """The source of a module; "" if the version has none."""
    file = folder / f"{module.replace('.', '/')}.py"
    file = file if file.is_file() else folder / module.replace(".", "/") / "__init__.py"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def digest(folder: Path, source: str) -> str | None:
    """The SHA-256 of a definition, "module:name", or of a module, "module:*"; None if the version has none."""
    module, name = source.split(":")
    text = text_of(folder, module)
    if name == "*":
        return hashlib.sha256(text.encode()).hexdigest()[:16] if text else None
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return hashlib.sha256((ast.get_source_segment(text, node) or "").encode()).hexdigest()[:16]
    return None


def digests(folder: Path) -> dict[str, str | None]:
    """Of all definitions that the changes rely on."""
    return {source: digest(folder, source) for source in SOURCES}


def folders() -> list[Path]:
    """Of the versions of megatron-core that are here."""
    other = os.environ.get("MCORE_012_DIR")
    return [installed(), *([Path(other)] if other else [])]


def test_what_the_patches_rely_on_is_what_was_read() -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    newest = max(recorded, key=lambda version: [int(part) for part in version.split(".") if part.isdigit()])
    for folder in folders():
        version = version_of(folder)
        expected, found = recorded.get(version, recorded[newest]), digests(folder)
        changed = [source for source in SOURCES if found[source] != expected.get(source)]
        targets = [patch.target for patch in PATCHES if set(patch.sources) & set(changed)]
        assert not changed, f"megatron-core {version} changed {changed}: read the patches of {targets} again"


def test_a_change_of_a_source_is_noticed(tmp_path: Path) -> None:
    source = "megatron.core.utils:local_multi_tensor_scale"
    file = tmp_path / "megatron/core/utils.py"
    file.parent.mkdir(parents=True)
    text = (installed() / "megatron/core/utils.py").read_text(encoding="utf-8")
    file.write_text(text.replace("dst.copy_(src * scale)", "dst.copy_(scale * src)"), encoding="utf-8")
    assert digest(tmp_path, source) not in (None, digest(installed(), source))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_every_row_names_a_reason_and_a_test_that_exists(patch: Patch) -> None:
    file, _, name = patch.test.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
    assert patch.reason and patch.versions and patch.until and patch.sources


@pytest.mark.parametrize("folder", folders(), ids=version_of)
def test_every_target_is_in_megatron_core(folder: Path) -> None:
    targets = [patch.target.split(":") for patch in PATCHES if patch.versions.startswith("all")]
    assert not [
        f"{module}:{name}" for module, name in targets if not re.search(rf"\b{name}\b", text_of(folder, module))
    ]


# What each target is, and whether it is megatron-core's own; then what it does.
STATE = """
import importlib, sys, torch
def targets():
    from minimind_mcore.platform.patches import PATCHES
    names = [patch.target.split(":") for patch in PATCHES]
    return [getattr(importlib.import_module(module), name, None) for module, name in names]
"""
IMPORTS = (
    STATE
    + """
before = targets()
from minimind_mcore.models import minimind_spec, core_config, loading
from minimind_mcore.training import pretrain, model, optimizer, step
from minimind_mcore.posttrain import main
print([a is b for a, b in zip(before, targets())].count(False))
"""
)
SETUP = """
import importlib, types
from minimind_mcore.platform import device
device.setup()
import torch
from megatron.core import optimizer
from megatron.core.fusions import fused_bias_dropout
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.transformer import transformer_block
from megatron.core.transformer.moe import moe_utils
print(type(fused_bias_dropout.bias_dropout_add_fused_train).__name__)
print(hasattr(moe_utils, "te_general_gemm"))
values = torch.full((1 << 22,), 0.1)
norm = float(clip_grads.l2_norm_impl(0, None, [[values]], False)[0])
print(abs(norm / float(values.double().norm()) - 1) < 1e-6)
quantize = getattr(distrib_optimizer, "quantize_param_shard", None)
print(quantize is None or quantize([], [], [], None) is None)
print(transformer_block.LayerNormImpl.__name__, optimizer.Adam.__name__)
gradient = torch.ones(3)
clip_grads.multi_tensor_scale_impl(0, None, [[gradient], [gradient]], 0.5)
print(gradient.tolist())
"""


def fresh(code: str, folder: Path) -> list[str]:
    """The lines that a new interpreter prints with this megatron-core."""
    environ = os.environ | {"DEVICE": "cpu", "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("folder", folders(), ids=version_of)
def test_what_setup_changes(folder: Path) -> None:
    assert fresh(SETUP, folder if folder != installed() else ROOT) == [
        "function", "True", "True", "True", "Norm FusedAdam", "[0.5, 0.5, 0.5]",
    ]  # fmt: skip


LEFT = (
    STATE
    + """
from minimind_mcore.platform import device
device.setup()
from minimind_mcore.platform.patches import PATCHES
rows = [row for row in zip(PATCHES, targets()) if row[0].versions == "all" and not row[0].on_demand]
print(len(rows) > 5, [row.target for row, target in rows if getattr(target, "__module__", "").startswith("megatron")])
"""
)


@pytest.mark.parametrize("folder", folders(), ids=version_of)
def test_setup_replaces_every_target(folder: Path) -> None:
    assert fresh(LEFT, folder if folder != installed() else ROOT) == ["True []"]


ALONE = """
import types, torch
from minimind_mcore.platform import device
device.setup()
from megatron.core.distributed import param_and_grad_buffer as module
group = types.SimpleNamespace(size=lambda: 1)  # a collective would fail on it
weights = torch.ones(4)
with module._coalescing_manager(group, async_ops=True) as handle:
    print(module.dist_all_gather_func(weights, weights, group=group, async_op=True))
handle.wait()
with module._coalescing_manager(group, async_ops=False):
    print(module.dist_reduce_scatter_func(weights, weights, group=group, op=None, async_op=False), weights.tolist())
"""


@pytest.mark.parametrize("folder", folders(), ids=version_of)
def test_one_data_parallel_rank_communicates_nothing(folder: Path) -> None:
    assert fresh(ALONE, folder if folder != installed() else ROOT) == ["None", "None [1.0, 1.0, 1.0, 1.0]"]


QUEUE = """
import multiprocessing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from minimind_mcore.platform import patches
patches.report_in_this_process()
print(type(filesystem_async._get_write_results_queue()).__name__, multiprocessing.active_children())
"""


@pytest.mark.parametrize("folder", folders(), ids=version_of)
def test_a_save_starts_no_process_for_its_queue(folder: Path) -> None:
    assert fresh(QUEUE, folder if folder != installed() else ROOT) == ["Queue []"]


def test_an_import_changes_nothing() -> None:
    assert fresh(IMPORTS, ROOT) == ["0"]


if __name__ == "__main__":
    given = Path(sys.argv[1])
    known = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    RECORD.write_text(json.dumps(known | {version_of(given): digests(given)}, indent=1) + "\n", encoding="utf-8")
