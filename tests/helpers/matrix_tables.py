"""The matrix as the tables of docs/install_ascend.md and docs/install_ascend_zh.md.

    PYTHONPATH=tests python -m helpers.matrix_tables    # write them again, between their marks

A table begins behind `<!-- matrix: NAME -->` and ends at `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from minimind_mcore.doctor.matrix import Stack, data, readable, stacks
from minimind_mcore.paths import CHECKOUT

DOCS = CHECKOUT / "docs"
FILES = ("install_ascend.md", "install_ascend_zh.md")
COLUMNS = ("CANN", "Python", "torch", "torch_npu", "MindSpeed", "megatron-core", "transformers", "numpy")
GUIDE = ("CANN", "Python", "torch", "torch_npu", "MindSpeed", "Megatron-LM", "transformers")
HEADS = {
    "install_ascend.md": ("stack", "proof", "needs", "released together or tried here", "source", "guide"),
    "install_ascend_zh.md": ("组合", "验证程度", "必须", "同期发布或在此试过", "来源", "指南"),
}
KIT_ON_NPU = {
    "the kit's own engine on an NPU": "本套件自己的引擎，在 NPU 上",
    "the kit's own engine on an NPU, MindSpeed core_r0.16.0": "本套件自己的引擎，在 NPU 上，MindSpeed core_r0.16.0",
    "the kit's own engine on an NPU, MindSpeed core_r0.17.0 and core_r0.18.0": (
        "本套件自己的引擎，在 NPU 上，MindSpeed core_r0.17.0 与 core_r0.18.0"
    ),
    "the kit's own engine on an NPU, MindSpeed core_r0.8.0": "本套件自己的引擎，在 NPU 上，MindSpeed core_r0.8.0",
}
PROOF = {"tested in CI": "CI 测试", "rehearsed": "已演练", "rehearsed in part": "部分演练", "untested": "未测试"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def stack_table(file: str, device: str) -> str:
    """The rows of a kind of device."""
    stack, proof, needs, best, _, _ = HEADS[file]
    chosen = [row for row in stacks() if (row.device == "npu") == (device == "npu")]
    chinese = file.endswith("_zh.md")
    rows = []
    for row in chosen:
        name, proven = row.name, row.proof
        if chinese:
            name, proven = KIT_ON_NPU.get(name, name), PROOF[proven]
        rows.append([name, proven, *_versions(row)])
    return table([stack, proof, needs, best], rows)


def _versions(row: Stack) -> tuple[str, str]:
    named = [name for name in COLUMNS if name in row.needs] + [name for name in row.needs if name not in COLUMNS]
    needs = "; ".join(f"{name} {readable(row.needs[name])}" for name in named)
    best = "; ".join(f"{name} {readable(version)}" for name, version in row.best.items())
    return needs, best or "-"


def render(file: str, name: str) -> str:
    """A table by its name: npu, others, torch_npu, guides, sources."""
    head = HEADS[file]
    if name in ("npu", "others"):
        return stack_table(file, name)
    if name == "torch_npu":
        rows = [
            [f"torch_npu=={p['package']}", p["release"], p["torch"], p["CANN"]] for p in data()["torch_npu"]["pairs"]
        ]
        return table(["pip", "TorchNPU", "torch", "CANN"], rows)
    if name == "guides":
        return table(
            [head[5], *GUIDE], [[row["guide"], *(row[key] for key in GUIDE)] for row in data()["guides"]["rows"]]
        )
    if name == "sources":
        names = [KIT_ON_NPU.get(row.name, row.name) if file.endswith("_zh.md") else row.name for row in stacks()]
        return table([head[0], head[4]], [[n, "; ".join(r.sources)] for n, r in zip(names, stacks(), strict=True)])
    raise KeyError(name)


def rendered(file: str) -> str:
    """A document with its tables as the matrix has them."""
    text = (DOCS / file).read_text(encoding="utf-8")
    return re.sub(
        r"(<!-- matrix: (\w+) -->\n).*?(?=<!-- end -->)",
        lambda mark: f"{mark[1]}\n{render(file, mark[2])}\n\n",
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    for name in FILES:
        (DOCS / name).write_text(rendered(name), encoding="utf-8")
