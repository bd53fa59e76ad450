"""Pages of the reference that are written from the code: commands, the keys of `minimind:`, the Python API.

PYTHONPATH=tests python -m helpers.reference    # write them again after a change of the code
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import fields

from helpers.engine import ROOT
from minimind_mcore.cli import COMMANDS, PROGRAMS
from minimind_mcore.rl.config.schema import MiniMindConfig

PAGES = ("commands", "rl_keys", "api")
# Whose documentation lists the settings of a command: `--help` prints it.
SETTINGS = {
    "train": "cli.train",
    "data": "cli.data:main",
    "convert": "cli.model:convert",
    "generate": "cli.model:generate",
    "chat": "cli.model:chat",
    "evaluate": "cli.model:evaluate",
    "rl": "cli.rl",
}
# What a program of one's own may import: module, names.
API = {
    "models.presets": ("find_model",),
    "checkpoint.opening": ("open_source",),
    "converters.convert": ("convert",),
    "preprocess.tokenize": ("tokenizer_info", "load_encoder"),
    "preprocess.indexed": ("read_index", "Column", "IndexedWriter"),
    "preprocess.check": ("check_dataset",),
    "inference.loading": ("load",),
    "inference.generation": ("Generator",),
    "tools.parser": ("parse",),
    "tools.registry": ("open_tools",),
    "rl.rewards.rewards": ("Rewards",),
    "rl.algorithms.actor": ("actor_loss",),
    "rl.registry": ("register", "lookup"),
    "forecast.machines": ("machine",),
    "forecast.layouts": ("propose",),
}
ENGLISH = {
    "commands": "Commands and settings",
    "commands head": "Each command is `minimind-mcore COMMAND`. `--help` prints this text.",
    "programs": "Programs",
    "programs head": "These programs have the names and flags of MindSpeed-LLM and MindSpeed-RL. "
    "[flags.md](flags.md) lists the flags.",
    "command": "command",
    "purpose": "what it does",
    "train": "pretrain, sft, lora, dpo, distill, reason, tune",
    "rl_keys": "Keys of minimind:",
    "rl_keys head": "The section `minimind:` of a configuration of reinforcement learning. "
    "[rl_config.md](rl_config.md) describes the other sections, which are those of MindSpeed-RL.",
    "key": "key",
    "type": "type",
    "default": "default",
    "meaning": "meaning",
    "api": "Python API",
    "api head": "Functions and classes that a program of your own can import. Their docstrings describe arguments, "
    "shapes and errors. [extending.md](extending.md) describes the functions that you can add.",
    "call": "call",
}
CHINESE = {
    "commands": "命令与设置",
    "commands head": "每条命令都是 `minimind-mcore COMMAND`。设置的说明就是 `--help` 打印的内容，因此是英文。",
    "programs": "程序",
    "programs head": "这些程序的名称和参数与 MindSpeed-LLM、MindSpeed-RL 相同。参数见 [flags_zh.md](flags_zh.md)。",
    "command": "命令",
    "purpose": "做什么",
    "train": "pretrain、sft、lora、dpo、distill、reason、tune",
    "rl_keys": "minimind: 的键",
    "rl_keys head": "强化学习配置中 `minimind:` 一节的键，说明取自代码，因此是英文。其余各节与 MindSpeed-RL 相同，见 "
    "[rl_config_zh.md](rl_config_zh.md)。",
    "key": "键",
    "type": "类型",
    "default": "默认值",
    "meaning": "含义",
    "api": "Python 接口",
    "api head": "自己的程序可以导入的函数和类，说明取自代码，因此是英文。参数、形状和错误见各自的 docstring。"
    "怎样添加自己的函数见 [extending_zh.md](extending_zh.md)。",
    "call": "调用",
}
PURPOSES = {
    "run": "从数据到部署的所有阶段，已完成的阶段会跳过",
    "download": "下载 MiniMind 的数据、权重、分词器，以及一个奖励模型",
    "pretrain": "从头训练模型，或继续训练",
    "sft": "在对话上微调全部权重",
    "lora": "在对话上微调适配器",
    "dpo": "用偏好对齐模型",
    "distill": "用教师模型的 logits 微调模型",
    "reason": "在推理数据上微调模型（MiniMind2）",
    "tune": "sft、reason 或 distill，由设置 STAGE 决定",
    "data": "转换文本、对话或偏好对，或生成示例数据",
    "convert": "在 MiniMind、Hugging Face 和 Megatron 之间转换权重",
    "generate": "续写提示",
    "chat": "与模型对话",
    "evaluate": "给模型评分：C-Eval、CMMLU、MMLU、困惑度等",
    "serve": "用任何形式的模型回答 OpenAI 的 HTTP 请求",
    "rl": "强化学习：训练，检查或导出配置",
    "quickstart-tools": "教 quickstart 的模型调用工具",
    "plan": "一个模型在任意设备上的内存、时间和布局",
    "doctor": "装了什么、哪里不对、用哪条命令修复",
    "presets": "列出模型，或打印一个模型的参数",
    "recipes": "列出训练配方，或打印一个配方的参数",
    "corpus": "写出示例数据",
    "tool-data": "把 hermes、glaive 和 xlam 转换为 MiniMind 的格式",
    "tokenizer": "训练分词器",
    "docs": "训练小模型，计算文档中的图",
    "report": "重新绘制一次训练的曲线",
    "manager": "在浏览器中启动、查看和停止训练",
    "pretrain_gpt.py": "预训练",
    "posttrain_gpt.py": "微调、对齐或蒸馏",
    "preprocess_data.py": "转换原始数据",
    "convert_ckpt_v2.py": "转换权重",
    "convert_ckpt.py": "转换权重，使用旧教程的参数",
    "inference.py": "生成与对话",
    "evaluation.py": "评测",
    "train_grpo.py": "没有 critic 的强化学习",
    "train_ppo.py": "有 critic 的强化学习",
}


def file_name(page: str, chinese: bool) -> str:
    """Return the name of a page's file."""
    return f"{page}{'_zh' if chinese else ''}.md"


def render(page: str, chinese: bool) -> str:
    """Return the text of a page."""
    words = CHINESE if chinese else ENGLISH
    other = f"[{'English' if chinese else '中文'}]({file_name(page, not chinese)})"
    body = {"commands": _commands, "rl_keys": _rl_keys, "api": _api}[page](words)
    return "\n\n".join([f"# {words[page]}", other, words[f"{page} head"], *body]) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _commands(words: dict[str, str]) -> list[str]:
    def listed(table: dict[str, tuple[str, str]]) -> str:
        chinese = PURPOSES if words is CHINESE else {}
        rows = [[f"`{name}`", chinese.get(name, text)] for name, (_, text) in table.items()]
        return _table([words["command"], words["purpose"]], rows)

    parts = [listed(COMMANDS)]
    for name, place in SETTINGS.items():
        module, _, function = place.partition(":")
        documented = importlib.import_module(f"minimind_mcore.{module}")
        text = inspect.getdoc(getattr(documented, function) if function else documented)
        parts.append(f"## {words.get(name, name)}\n\n```text\n{text}\n```")
    return [*parts, f"## {words['programs']}", words["programs head"], listed(PROGRAMS)]


def _rl_keys(words: dict[str, str]) -> list[str]:
    text = (inspect.getdoc(MiniMindConfig) or "").partition("Attributes:\n")[2]
    meanings = {
        name: " ".join(meaning.split()) for name, meaning in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.M)
    }
    rows = [
        [f"`{field.name}`", f"`{field.type}`", f"`{field.default!r}`", meanings[field.name]]
        for field in fields(MiniMindConfig)
    ]
    return [_table([words["key"], words["type"], words["default"], words["meaning"]], rows)]


def _api(words: dict[str, str]) -> list[str]:
    parts = []
    for module, names in API.items():
        tree = ast.parse((ROOT / f"minimind_mcore/{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        rows = [row for name in names for row in _calls(found[name])]
        parts.append(f"## minimind_mcore.{module}\n\n{_table([words['call'], words['purpose']], rows)}")
    return parts


def _calls(node: ast.FunctionDef | ast.ClassDef, owner: str = "") -> list[list[str]]:
    """The call and the first sentence of a function, or of a class and its public methods."""
    summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    if isinstance(node, ast.FunctionDef):
        arguments = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return [[f"`{owner}{node.name}({arguments}){returned}`", summary]]
    methods = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
    made = (
        ast.unparse(methods["__init__"].args).removeprefix("self").removeprefix(", ") if "__init__" in methods else ""
    )
    public = [method for name, method in methods.items() if not name.startswith("_") and ast.get_docstring(method)]
    return [[f"`{node.name}({made})`", summary], *(row for method in public for row in _calls(method, f"{node.name}."))]


if __name__ == "__main__":
    for page in PAGES:
        for chinese in (False, True):
            (ROOT / "docs" / file_name(page, chinese)).write_text(render(page, chinese), encoding="utf-8")
