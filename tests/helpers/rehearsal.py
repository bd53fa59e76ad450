"""Rehearsals for tests: the kit's scripts running MindSpeed-LLM's own programs on this CPU, and what they printed.

The inputs are made from seeds, so that `tests/contract` can make them again where MindSpeed-LLM is not.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from helpers import weights_on_disk
from helpers.engine import ROOT, TRACKER
from minimind_mcore.models.config import ModelConfig

SCRIPTS = ROOT / "examples/mcore/minimind"
PYTHON = ROOT / ".venv-rehearsal/bin/python"
HOMES = ("MINDSPEED_LLM_HOME", "MINDSPEED_HOME", "MEGATRON_HOME")
TIMEOUT = 900  # seconds for one script; most of it is the import of MindSpeed-LLM
VOCABULARY = 448
# Two layers for PP 2, two key-value heads for TP 2, and weights large enough that a wrong one shows.
MODELS: dict[str, ModelConfig] = {
    name: config.replace(num_layers=2, hidden_size=64, head_dim=8, vocab_size=VOCABULARY)
    for name, config in weights_on_disk.SMALL.items()
}
MODELS["minimind3_deep"] = MODELS["minimind3"].replace(num_layers=4)  # for virtual stages, and stages of unequal length
for _rule in ("softmax", "straight_through"):
    _moe = MODELS["minimind3_moe"].moe
    assert _moe is not None
    MODELS[f"minimind3_moe_{_rule}"] = MODELS["minimind3_moe"].replace(moe=replace(_moe, router_weight=_rule))
# Batches of 4 sequences of 64 tokens in micro-batches of 2, ten updates.
SETTINGS = {"TRAIN_ITERS": "10", "MBS": "2", "GBS": "4", "SEQ_LENGTH": "64", "LR": "2e-3", "SPLIT": "100,0,0",
            "LOG_INTERVAL": "1", "EVAL_ITERS": "0", "PRECISION": "fp32"}  # fmt: skip
ROW = re.compile(r"iteration +(\d+)/.*\| lm loss: ([-+.\dE]+) .*\| grad norm: ([-+.\d]+) \|")


def missing() -> str:
    """Why there can be no rehearsal here; empty where there can."""
    unset = [name for name in HOMES if not os.environ.get(name)]
    if unset:
        return f"{', '.join(unset)} not set: no sources of MindSpeed-LLM to rehearse with"
    return ""


@dataclass(frozen=True)
class Result:
    """What a script did."""

    code: int
    output: str
    seconds: float

    @property
    def losses(self) -> list[float]:
        """`lm loss` of each iteration, as MindSpeed-LLM printed it."""
        return [float(loss) for _, loss, _ in ROW.findall(self.output)]

    @property
    def iterations(self) -> list[int]:
        """Their numbers."""
        return [int(number) for number, _, _ in ROW.findall(self.output)]

    @property
    def grad_norms(self) -> list[float]:
        """`grad norm` of each iteration (three decimals)."""
        return [float(norm) for _, _, norm in ROW.findall(self.output)]

    @property
    def operators(self) -> dict[str, int]:
        """How often each operator of the stand-in was called by rank 0."""
        found = re.findall(r"npu_emulation rank 0: (\{.*\})", self.output)
        return ast.literal_eval(found[-1]) if found else {}


# A fixture: rehearse ten updates of a model; what was printed, and where the checkpoints are.
Pretrain = Callable[..., tuple[Result, Path]]


@dataclass
class Inputs:
    """Tokenizer, texts and weights in one folder, made from seeds."""

    folder: Path
    models: dict[str, Path] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Path:
        """Its directory."""
        return self.folder / "tokenizer"

    @property
    def environment(self) -> dict[str, str]:
        """What every script is told."""
        return {"DATA_DIR": str(self.folder / "data"), "TOKENIZER_PATH": str(self.tokenizer), "WORKERS": "1"}

    def model(self, name: str) -> Path:
        """The Hugging Face directory of a model with random weights."""
        if name not in self.models:
            config = MODELS[name]
            state = weights_on_disk.state_dict(config, "hf", seed=3)
            self.models[name] = weights_on_disk.write_hf(self.folder / name, config, state)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (self.models[name] / file).write_bytes((self.tokenizer / file).read_bytes())
        return self.models[name]


WORDS = (
    "小明 老师 科学家 the cat a student 北京 机器 our robot 月亮 the river "
    "喜欢 学习 看见 likes builds 发现 follows 思考 writes 记住 "
    "数学 a poem 山水 the machine 历史 音乐 small stars 语言模型 water 代码"
).split()


def make_inputs(folder: Path) -> Inputs:
    """Write `text.jsonl`, `chats.jsonl`, `pairs.jsonl` and a tokenizer trained on them."""
    from minimind_mcore.preprocess import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(7)

    def text(longest: int) -> str:
        sentences = (" ".join(numbers.choices(WORDS, k=4)) for _ in range(numbers.randint(1, longest)))
        return "".join(sentence + numbers.choice(["。", ". ", "，", "! "]) for sentence in sentences)

    def turns(count: int) -> Iterator[dict[str, str]]:
        for _ in range(count):
            yield {"role": "user", "content": text(2)}
            yield {"role": "assistant", "content": text(4)}

    texts = [text(30) for _ in range(120)]
    chats = [list(turns(numbers.randint(1, 2))) for _ in range(60)]
    questions = [[{"role": "user", "content": text(2)}] for _ in range(40)]
    answers = [[[*question, {"role": "assistant", "content": text(3)}] for _ in range(2)] for question in questions]
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": one} for one in texts],
        "chats": [{"conversations": chat} for chat in chats],
        "pairs": [{"chosen": chosen, "rejected": rejected} for chosen, rejected in answers],
    }
    for name, lines in rows.items():
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    train_tokenizer.save(train_tokenizer.train(iter(texts), VOCABULARY), str(folder / "tokenizer"))
    return Inputs(folder)


def run_script(name: str, *arguments: str, **settings: str | bool) -> Result:
    """Run one of the kit's scripts under REHEARSE=1.

    Args:
        name: "pretrain" for pretrain_minimind_ptd.sh, or a whole name.
        arguments: flags for it.
        settings: its settings; `check=False` allows an exit status other than 0, `rehearse=False` runs the same
            script on the kit's own engine, and `stdin` is what it reads.
    """
    check, rehearse = settings.pop("check", True), settings.pop("rehearse", True)
    stdin = str(settings.pop("stdin", ""))
    environment = {name: str(value) for name, value in settings.items()}
    script = SCRIPTS / (name if name.endswith(".sh") else f"{name}_minimind_ptd.sh")
    changes = (
        {"REHEARSE": "1", "NPU_EMULATION_TRACE": "1", "NPU_EMULATION_STRICT": "raise"}
        if rehearse
        else {"BACKEND": "native", "DEVICE": "cpu", "PYTHON": sys.executable}
    )
    started = time.monotonic()
    done = subprocess.run(
        ["bash", str(script), *arguments], env={**os.environ, "OMP_NUM_THREADS": "1", **changes, **environment},
        input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT, errors="replace",
    )  # fmt: skip
    result = Result(done.returncode, done.stdout, time.monotonic() - started)
    assert not check or result.code == 0, f"{script.name} ended with {result.code}\n{result.output[-6000:]}"
    return result


def program_flags(result: Result) -> list[str]:
    """The flags of MindSpeed-LLM's program that a script printed before it started it."""
    line = next(line for line in result.output.splitlines() if line.startswith("cd "))
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith("_gpt.py"))
    return words[at + 1 :]


def processes(tp: int = 1, pp: int = 1, ep: int = 1) -> int:
    """That a layout needs."""
    return max(tp * pp, ep)


def layout(tp: int = 1, pp: int = 1, ep: int = 1) -> dict[str, str]:
    """Settings of a layout, with no more data parallelism than its experts ask for."""
    return {"TP": str(tp), "PP": str(pp), "EP": str(ep), "NPUS_PER_NODE": str(processes(tp, pp, ep))}


def halfway(checkpoints: Path, folder: Path) -> Path:
    """A directory with the checkpoint of iteration 5 alone."""
    folder.mkdir(parents=True)
    (folder / "iter_0000005").symlink_to(checkpoints / "iter_0000005")
    (folder / TRACKER).write_text("5")
    return folder


def drop(flags: Sequence[str], *names: str) -> list[str]:
    """A command line without some of its flags and their values."""
    kept: list[str] = []
    keep = True
    for word in flags:
        if word.startswith("--"):
            keep = word not in names
        if keep:
            kept.append(word)
    return kept


def value(flags: Sequence[str], name: str) -> str:
    """The value of a flag."""
    return flags[flags.index(name) + 1]


def home(name: str) -> Path:
    """One of the folders of sources."""
    return Path(os.environ[name])


def run_program(program: Path, *arguments: str) -> str:
    """Run one of MindSpeed-LLM's programs, or the kit's of that name, in one process under the stand-in."""
    paths = [ROOT, ROOT / "rehearsal/minimind_mcore_rehearsal/python", home("MINDSPEED_HOME")]
    paths.append(ROOT / ".venv-rehearsal/megatron-lm")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONPYCACHEPREFIX": str(ROOT / ".venv-rehearsal/pycache"),
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".venv-rehearsal/torch_extensions"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "NPU_EMULATION_STRICT": "raise",
    }
    done = subprocess.run(
        [str(PYTHON), str(program), *arguments], cwd=program.parent, env=environment, timeout=TIMEOUT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, f"{program} ended with {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout
