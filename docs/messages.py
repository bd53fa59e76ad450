"""The list of error messages, read from the code when the site is built: `python docs/messages.py` prints it."""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "minimind_mcore"
# What raises, and which of its arguments is the message. A test looks for other subclasses of UserError.
ERRORS = {"UserError": 0, "RequestError": 0, "require": 1}
# Headings, and the packages and modules whose messages are listed below them.
TITLES = {
    "en": {
        "Settings, flags and configurations": ("arguments", "validation", "inputs", "cli", "models", "rl.config"),
        "Data and tokenizers": ("preprocess",),
        "Checkpoints and weights": ("checkpoint", "converters", "storage"),
        "Training and fine-tuning": ("training", "posttrain"),
        "Reinforcement learning": ("rl",),
        "Generation, evaluation, serving and tools": ("inference", "serve", "tools"),
        "Pipeline, manager and forecasts": ("pipeline", "manager", "forecast"),
        "Devices, hosts, MindSpeed and the doctor": ("platform", "hosts", "mindspeed", "doctor"),
        "Other": (),
    },
}
TITLES["zh"] = dict(
    zip(
        (
            "设置、参数与配置", "数据与分词器", "检查点与权重", "训练与微调", "强化学习", "生成、评测、服务与工具",
            "流水线、管理器与预测", "设备、主机、MindSpeed 与 doctor", "其他",
        ),
        TITLES["en"].values(),
        strict=True,
    )
)  # fmt: skip


def _placeholder(value: ast.expr) -> str:
    """A short name for what an f-string inserts: the last identifier of the expression."""
    names = re.findall(r"[A-Za-z_]\w*(?=\W*$)", ast.unparse(value))
    return f"<{names[-1].strip('_')}>" if names else "<...>"


def _texts(node: ast.expr) -> list[str]:
    """The texts of an argument; what the program fills in is in angle brackets. [""] if it has no text of its own."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = (_placeholder(p.value) if isinstance(p, ast.FormattedValue) else _texts(p)[0] for p in node.values)
        return ["".join(parts)]
    if isinstance(node, ast.BinOp):
        return [left + right for left, right in itertools.product(_texts(node.left), _texts(node.right))]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    return [""]


def _raised(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if len(node.args) > (at := ERRORS.get(name, len(node.args))):
                for text in (" ".join(text.split()) for text in _texts(node.args[at])):
                    # A text passed on is listed where it is written.
                    if re.search(r"[a-z]{3}", re.sub("<.*?>", "", text)):
                        yield text


def messages(titles: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Return the messages below each heading, sorted."""
    headings = {package: title for title, packages in titles.items() for package in packages}
    found: dict[str, set[str]] = defaultdict(set)
    for package in ("", "models", "preprocess", "converters"):  # links, which rglob does not follow
        for file in (SOURCE / package).rglob("*.py"):
            parts = (package, *file.relative_to(SOURCE / package).with_suffix("").parts)
            name = ".".join(filter(None, parts))
            owner = next((p for p in (".".join(name.split(".")[:n]) for n in (2, 1)) if p in headings), "")
            found[headings.get(owner, list(titles)[-1])].update(_raised(file))
    return {title: sorted(found[title]) for title in titles if found[title]}


def render(language: str) -> str:
    """Return the lists as Markdown."""
    parts = []
    for title, texts in messages(TITLES[language]).items():
        lines = "\n".join(f"- `` {text.replace('``', '`')} ``" for text in texts)
        parts.append(f"## {title}\n\n{lines}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(render("en"))
