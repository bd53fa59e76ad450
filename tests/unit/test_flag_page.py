"""docs/flags.md shows the tables that the programs read: inputs/support.json and inputs/ranges.json.

After a change of a table write the pages again: python tests/unit/test_flag_page.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from minimind_mcore.inputs.flags import flag_table
from minimind_mcore.inputs.ranges import RANGES
from minimind_mcore.models.config import ROUTER_WEIGHTS
from minimind_mcore.models.init import SCHEMES
from minimind_mcore.paths import CHECKOUT, PACKAGE

NOTES_ZH = {
    "moe_layer_freq": "-1 表示每层都有专家，与 first_k_dense_replace 取 0 和 -1 相同",
    "sparse_mode": "4 及以上是带状注意力，不是因果注意力",
    "pretrain_gpt.py": "不起作用的参数是：NPU 的算子和节省内存的方法、CUDA 构建的融合，以及自带引擎本来就会做的事。",
    "posttrain_gpt.py": "这些参数在 pretrain_gpt.py 的参数之外。不起作用的参数说明数据怎样转换、LoRA 怎样计算和保存。",
    "preprocess_data.py": "读取总是流式的。快速分词器与慢速分词器得到同样的 id。不填充，也不混合。",
    "convert_ckpt_v2.py": "被拒绝的是其他架构和流水线调度的参数，以及只转换模型一部分的参数。",
    "convert_ckpt.py": "被拒绝的是其他架构的参数。",
    "inference.py, evaluation.py": "训练和布局的参数不起作用。模型的参数会与检查点对照。",
}
SUPPORT = json.loads((PACKAGE / "inputs/support.json").read_text(encoding="utf-8"))
GROUPS = json.loads((PACKAGE / "inputs/ranges.json").read_text(encoding="utf-8"))["groups"]
KIT = {
    name: row
    for name, row in json.loads((PACKAGE / "inputs/kit_flags.json").read_text("utf-8")).items()
    if name != "about"
}
WORDS = {
    "flags.md": {
        "title": "Flags and numbers",
        "head": "Each program of this kit takes the flags of the MindSpeed-LLM program with the same name. This page "
        "says what the program does with a flag. A flag that is not listed is refused with an error. The "
        "flags that only this kit has follow below.",
        "kit": "Flags that only this kit has",
        "meaning": "meaning",
        "implemented": "Implemented",
        "no effect": "Accepted, without effect",
        "compared": "Compared with the model",
        "refused": "Refused",
        "values": "Values",
        "values head": "The native engine has only these values of some flags.",
        "ranges": "Ranges of numbers",
        "ranges head": "A number outside its range is an error that names the flag, the key or the file. Keys of "
        "`config.json` have the ranges of the flags that mean the same. Other numbers must be finite and fit into 64 "
        "bits.",
        "name": "name",
        "range": "expected",
    },
    "flags_zh.md": {
        "title": "参数与数值范围",
        "head": "本套件的每个程序都接受 MindSpeed-LLM 同名程序的参数。本页说明程序怎样处理每个参数。"
        "没有列出的参数会报错。本套件独有的参数列在后面。",
        "kit": "本套件独有的参数",
        "meaning": "含义",
        "implemented": "已实现",
        "no effect": "接受，但不起作用",
        "compared": "与模型对照",
        "refused": "拒绝",
        "values": "取值",
        "values head": "下列参数，原生引擎只支持表中的取值。",
        "ranges": "数值范围",
        "ranges head": "超出范围的数值会报错，并指出是哪个参数、键或文件。`config.json` 的键与含义相同的参数范围一致。"
        "其他数值必须是有限的，并且能放进 64 位。",
        "name": "名称",
        "range": "范围",
    },
}  # fmt: skip


def spelled(word: str, program: str) -> list[str]:
    """The flags that set a dest, as MindSpeed-LLM spells them."""
    records = flag_table(program if program == "preprocess_data.py" else "training")
    return [word] if word.startswith("--") else [flag for flag, record in records.items() if record["dest"] == word]


def page(name: str) -> str:
    """The text of a page."""
    words, notes = WORDS[name], NOTES_ZH if name == "flags_zh.md" else SUPPORT["notes"]
    other, language = ("flags_zh.md", "中文") if name == "flags.md" else ("flags.md", "English")
    lines = [f"# {words['title']}", "", f"[{language}]({other})", "", words["head"], ""]
    for program, kinds in SUPPORT["programs"].items():
        lines += [f"## {program}", "", notes[program], ""]
        for kind, rows in kinds.items():
            flags = sorted(f"`{flag}`" for row in rows for word in row.split() for flag in spelled(word, program))
            lines += [f"**{words[kind]}**: {', '.join(flags)}", ""]
    lines += [f"## {words['kit']}", ""]
    for program, table in KIT.items():
        lines += [f"**{program}**", "", f"| {words['name']} | {words['meaning']} |", "|---|---|"]
        for flag, options in table["flags"].items():
            choices = f" {'|'.join(options['choices'])}" if "choices" in options else ""
            lines.append(f"| `{flag}{choices.replace('|', chr(92) + '|')}` | {options['help']} |")
        lines.append("")
    lines += [
        f"## {words['values']}",
        "",
        words["values head"],
        "",
        f"| {words['name']} | {words['range']} |",
        "|---|---|",
    ]
    for dest, values in SUPPORT["values"].items():
        shown = ", ".join(f"`{' '.join(v) if isinstance(v, list) else v}`" for v in values if v is not None)
        note = f" ({notes[dest]})" if dest in notes else ""
        lines.append(f"| `{spelled(dest, 'pretrain_gpt.py')[0]}` | {shown}{note} |")
    lines += [
        "",
        f"## {words['ranges']}",
        "",
        words["ranges head"],
        "",
        f"| {words['name']} | {words['range']} |",
        "|---|---|",
    ]
    lines += [f"| `{number}` | {RANGES[number]} |" for group in GROUPS.values() for number in group]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", WORDS)
def test_the_page_shows_the_tables(name: str) -> None:
    found = (CHECKOUT / "docs" / name).read_text(encoding="utf-8")
    assert found == page(name), "write the pages again: python tests/unit/test_flag_page.py"


def test_choices_are_the_program_s_own() -> None:
    assert tuple(KIT["pretrain_gpt.py"]["flags"]["--router-weight"]["choices"]) == ROUTER_WEIGHTS
    assert set(KIT["pretrain_gpt.py"]["flags"]["--minimind-init"]["choices"]) < set(SCHEMES)
    assert all(options.get("range", "seed") in RANGES for row in KIT.values() for options in row["flags"].values())


def test_a_row_of_the_table_is_the_rule() -> None:
    assert str(RANGES["adam_beta2"]) == "0 to less than 1"
    assert RANGES["num_layers"].problem(0) == "found 0, expected 1 to 1024"
    assert RANGES["temperature"].problem(-1) == "found -1, expected 0 or more"


if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))
    for file in WORDS:
        Path(CHECKOUT, "docs", file).write_text(page(file), encoding="utf-8")
