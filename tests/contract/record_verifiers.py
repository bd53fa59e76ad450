r"""What MindSpeed-RL's own verifiers score, written to verifiers.json: one case for each branch of each.

    pip install --target=DIR --no-deps latex2sympy2==1.9.1
    PYTHONPATH=DIR:tests:. MINDSPEED_RL_HOME=/path/to/MindSpeed-RL python tests/contract/record_verifiers.py

`acc` and `strict_format` are called below their pool, whose deadline of one second scores 0 on a slow machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import upstream_rl

TABLE = Path(__file__).with_name("verifiers.json")
MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
Case = tuple[str, str, str]  # branch, response, label


def boxed(answer: str) -> str:
    return f"So it is \\boxed{{{answer}}}."


def tagged(answer: str, thought: str = "hm") -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


ACC: list[Case] = [
    ("equal text", boxed("yes"), "Yes"),
    ("no box, right number", "The result: 12", "12"),
    ("no box, the answer is", "The answer is 12.", "12"),
    ("no answer at all", "I do not know", "12"),
    ("empty box", boxed(""), "12"),
    ("ends at the word boxed", "so boxed", "12"),
    ("box without braces", "so \\boxed 12$ is it", "12"),
    ("box that does not close", "so \\boxed{12", "12"),
    ("last of two boxes", boxed("11") + boxed("12"), "12"),
    ("nested braces", boxed(r"\frac{1}{2}"), "0.5"),
    ("minerva's phrase wins over the box", r"final answer is $12$. I hope it is \boxed{5}", "12"),
    ("Chinese phrase, no box", "答案是 12\n\n别的", "12"),
    ("before the end of a turn", boxed("12") + "<|im_end|>" + boxed("13"), "12"),
    ("after the prompt", "\\boxed{1}<|im_start|>assistant" + boxed("12"), "12"),
    ("wrong number", boxed("13"), "12"),
    ("number with commas", boxed("1,000"), "1000"),
    ("number close enough", boxed("1.00005"), "1"),
    ("number not close enough", boxed("1.001"), "1"),
    ("percentage of the label", boxed("50"), "0.5"),
    ("label a percentage", boxed("0.5"), r"50\%"),
    ("trailing zeros", boxed("3.0"), "3"),
    ("leading point", boxed(".5"), "0.5"),
    ("unit", boxed("12 apples"), "12"),
    ("unit in text", boxed(r"12\text{ cm}"), "12"),
    ("degrees", boxed(r"30^\circ"), "30"),
    ("dollars", boxed(r"\$12"), "12"),
    ("number in words", boxed("twenty one"), "21"),
    ("only text", boxed(r"\text{east wind}"), "wind"),
    ("letter of a choice", boxed("(B)"), "B"),
    ("another letter", boxed("(C)"), "B"),
    ("name of the unknown", boxed("x = 12"), "12"),
    ("name in the label", boxed("12"), "x = 12"),
    ("fraction, dfrac", boxed(r"\dfrac{3}{4}"), r"\frac{3}{4}"),
    ("fraction without braces", boxed(r"\frac34"), r"\frac34"),
    ("fraction cut off", boxed(r"3 cm \frac"), "3"),
    ("fraction with a slash is never right", boxed("1/2"), "1/2"),
    ("slash of what is not integers", boxed("x/y"), "x/y"),
    ("slash with a root", boxed("sqrt2/2"), "sqrt2/2"),
    ("sqrt without braces", boxed(r"\sqrt8"), r"2\sqrt{2}"),
    ("symbols", boxed("x^2+2x+1"), "(x+1)^2"),
    ("symbols, different", boxed("x^2+2x+2"), "(x+1)^2"),
    ("Python's notation", boxed("x**2 - 1"), "(x-1)*(x+1)"),
    ("number that sympy finds", boxed(r"2^{10}"), "1024"),
    ("brackets of another kind", boxed("[1,2]"), "[1,2)"),
    ("point, coordinate by coordinate", boxed("(1, 0.5)"), r"(1,\frac{1}{2})"),
    ("point, other order", boxed("(2,1)"), "(1,2)"),
    ("point, one more coordinate", boxed("(1,2,3)"), "(1,2)"),
    ("matrix, entry by entry", boxed(MATRIX.replace("1", "1.0")), MATRIX),
    ("matrix, another entry", boxed(MATRIX.replace("4", "5")), MATRIX),
    ("matrix, fewer rows", boxed(r"\begin{pmatrix}1&2\end{pmatrix}"), MATRIX),
    ("matrix, fewer columns", boxed(r"\begin{pmatrix}1\\3\end{pmatrix}"), MATRIX),
    ("matrix and a list as the label", boxed(r"\begin{pmatrix}1\end{pmatrix}"), "{1,2}"),
    ("bmatrix is pmatrix", boxed(MATRIX.replace("pmatrix", "bmatrix")), MATRIX),
    ("equation", boxed("2x + y = 3"), "y + 2x = 3"),
    ("equation, sides swapped", boxed("3 = 2x + y"), "2x + y = 3"),
    ("equation, another", boxed("2x + y = 4"), "2x + y = 3"),
    ("infinity", boxed("infinity"), r"\infty"),
    ("the empty set", boxed(r"\emptyset"), "{}"),
    ("all numbers", boxed(r"(-\infty,\infty)"), r"\mathbb{R}"),
    ("j is i", boxed("1+2j"), "1+2i"),
    ("mbox", boxed(r"12\mbox{ of them}"), "12"),
    ("what sympy cannot read", boxed("?!#"), "12"),
]
FORMAT: list[Case] = [
    ("both", tagged("1"), ""),
    ("newlines", "<think>\na\nb\n</think>\n\n<answer>\n1\n</answer>", ""),
    ("something before", "x" + tagged("1"), ""),
    ("something after", tagged("1") + "x", ""),
    ("another line after", tagged("1") + "\nx", ""),
    ("something between", "<think>a</think>so<answer>1</answer>", ""),
    ("no answer", "<think>a</think>1", ""),
    ("tags repeated", tagged("1") + tagged("2"), ""),
    ("empty", "", ""),
]
STEP: list[Case] = [
    ("none", "Well.", ""),
    ("one", "Step 1: add", ""),
    ("two", "First, add. Second, take away.", ""),
    ("three", "1. add\n- take\n* give", ""),
    ("more than three", "First, Next, Finally, Step 2: Step 3:", ""),
    ("a number that begins no text", "add\n2. take", ""),
]
STRICT: list[Case] = [
    ("right", tagged(r"\boxed{1}"), ""),
    ("text around the box", "<think>a</think> so <answer>it is \\boxed{1}, yes</answer>", ""),
    ("no box", tagged("1"), ""),
    ("two boxes", tagged(r"\boxed{1}\boxed{2}"), ""),
    ("box over two lines", tagged("\\boxed{1\n}"), ""),
    ("box in the thought", r"<think>\boxed{1}</think><answer>1</answer>", ""),
    ("box in the thought too", r"<think>\boxed{1}</think><answer>\boxed{1}</answer>", ""),
    ("thought ends twice", r"<think>a</think></think><answer>\boxed{1}</answer>", ""),
    ("answer before thought", r"<answer>\boxed{1}</answer><think>a</think>", ""),
    ("something before", " " + tagged(r"\boxed{1}"), ""),
    ("something after", tagged(r"\boxed{1}") + "\n", ""),
    ("thought not begun", r"a</think><answer>\boxed{1}</answer>", ""),
    ("empty", "", ""),
]
GRADED: list[Case] = [
    ("equal", boxed("12"), "12"),
    ("another integer", boxed("13"), "12"),
    ("no box", "12", "12"),
    ("box that does not close", "\\boxed{12", "12"),
    ("last box", boxed("12") + boxed("13"), "12"),
    ("nested braces", boxed(r"\frac{1}{2}"), r"\frac12"),
    ("unit", boxed(r"12\text{ cm}"), "12"),
    ("commas", boxed("1,000"), "1000"),
    ("decimal for an integer", boxed("12.0"), "12"),
    ("fraction not reduced", boxed("2/4"), "1/2"),
    ("slash for frac", boxed("1/2"), r"\frac{1}{2}"),
    ("decimal for a fraction", boxed("0.5"), r"\frac{1}{2}"),
    ("tuple", boxed("(1, 2)"), "(1,2)"),
    ("tuple of another kind", boxed("[1,2]"), "(1,2)"),
    ("tuple too long", boxed("(1,2,3)"), "(1,2)"),
    ("symbols", boxed("2x+2"), "2(x+1)"),
    ("symbols, different", boxed("2x+1"), "2(x+1)"),
    ("root", boxed(r"\sqrt{8}"), r"2\sqrt{2}"),
    ("too many unknowns", boxed("abc+1"), "1+abc"),
    ("power left alone", boxed("2^{10}"), "1024"),
    ("words", boxed(r"\text{Monday}"), "monday"),
    ("mixed number", boxed(r"2\frac{1}{2}"), r"2\frac{1}{2}"),
    ("empty box", boxed(""), "12"),
]
INSIDE: list[Case] = [(branch, tagged(response), label) for branch, response, label in GRADED] + [
    ("box in the thought only", r"<think>\boxed{12}</think><answer>12</answer>", "12"),
    ("no tags", boxed("12"), "12"),
    ("text between the tags", r"<think>a</think>so<answer>\boxed{12}</answer>", "12"),
    ("something after", tagged(r"\boxed{12}") + ".", "12"),
    ("tags again", tagged(r"\boxed{1}") + tagged(r"\boxed{12}"), "12"),
]
DAPO: list[Case] = [
    ("right", "so\nAnswer: 12", "12"),
    ("any case, spaces", "ANSWER  :  12", "12"),
    ("last of two", "Answer: 11\nAnswer: 12", "12"),
    ("only its line", "Answer: 12\n13", "12"),
    ("wrong", "Answer: 13", "12"),
    ("none", "12", "12"),
    ("none, and the label says so", "12", "[INVALID]"),
    ("too early", "Answer: 12\n" + "x" * 300, "12"),
    ("after the equals sign", "Answer: x = 12", "12"),
    ("formula in dollars", "Answer: it is $12$ then", "12"),
    ("commas", "Answer: 1,000", "1000"),
    ("commas in text", "Answer: 1,2", "1,2"),
    ("unit", "Answer: 12 cm", "12"),
    ("text, bold, line", r"Answer: \text{a}\textbf{b}\overline{c}", "abc"),
    ("box", r"Answer: \boxed{12}", "12"),
    ("frac without braces", r"Answer: \frac12", r"\frac{1}{2}"),
    ("sqrt without braces", r"Answer: \sqrt2", r"\sqrt{2}"),
    ("article", "Answer: a circle", "circle"),
    ("not for sympy", "Answer: 0.5", r"\frac{1}{2}"),
]
RETOOL: list[Case] = [
    ("right", boxed("12"), "12"),
    ("wrong", boxed("13"), "12"),
    ("no box", "12", "12"),
    ("to the letter", boxed("12.0"), "12"),
    ("too early", boxed("12") + "x" * 100, "12"),
    ("box that does not close", "\\boxed{12", "12"),
    ("nested braces", boxed(r"\frac{1}{2}"), r"\frac{1}{2}"),
]
TOOL_CALLS = (0, 3, 12)


def record(source: upstream_rl.Source) -> dict[str, list[dict[str, Any]]]:
    """The table: cases of each verifier with the score of MindSpeed-RL's."""
    rules = source.module("models.rule_verifier", needs=("latex2sympy2",))

    def single(function: Any) -> Any:
        return lambda response, label: function([response], [label])[0]

    jobs: dict[str, tuple[list[Case], Any]] = {
        "acc": (ACC, rules.acc_worker),
        "format": (FORMAT, single(rules.format_reward)),
        "step": (STEP, single(rules.reasoning_steps_reward)),
        "strict_format": (STRICT, lambda response, label: rules.strict_format_worker(response)),
        "base_acc": (INSIDE, single(rules.base_model_accuracy_reward)),
        "math_17k_acc": (GRADED, single(rules.math_17k_accuracy_reward)),
        "acc_for_ppo": (GRADED, single(rules.ppo_accuracy_reward)),
        "acc_for_dapo": (DAPO, single(rules.accuracy_reward_for_dapo)),
        "math_verify_reward": (INSIDE, single(rules.math_verify_accuracy_reward)),
    }
    table: dict[str, list[dict[str, Any]]] = {}
    for name, (cases, score) in jobs.items():
        table[name] = [
            {"branch": branch, "response": response, "label": label, "score": float(score(response, label))}
            for branch, response, label in cases
        ]
    table["retool_reward"] = [
        {"branch": branch, "response": response, "label": label, "tool_calls": calls, "score": float(score)}
        for branch, response, label in RETOOL
        for calls in TOOL_CALLS
        for score in rules.retool_reward([response], [label], tool_call_nums=[calls])
    ]
    return table


if __name__ == "__main__":
    written = record(upstream_rl.source())
    TABLE.write_text(json.dumps(written, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{TABLE.name}: " + ", ".join(f"{name} {len(cases)}" for name, cases in written.items()))
