"""The fields of a FusionOne AI training task, and its run command, for a model, paths, cards and a layout.

    python examples/fusionone/training_task.py --job pretrain --model minimind3 --cards 8 \\
        --data data --models hf --outputs outputs --data-path data/pretrain.jsonl --tokenizer hf/minimind-3

--data, --models and --outputs are directories as they are here, where you develop; in the task they are mounted as
/data, /models and /outputs, and the paths below them are translated. A checkpoint to begin with is opened, and a layout
that it does not have is refused: MindSpeed-LLM would stop, or load something else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind_mcore import arguments
from minimind_mcore.checkpoint.files import saved_args
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.errors import UserError, run
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.preprocess.indexed import datasets_at
from minimind_mcore.training.checkpoint_fit import check_model, conversion

ALGORITHM = "/workspace/algorithm"
MOUNTS = {"data": "/data", "models": "/models", "outputs": "/outputs"}
JOBS = {
    "pretrain": "pretrain_minimind_ptd.sh",
    "sft": "tune_minimind_full_ptd.sh",
    "lora": "tune_minimind_lora_ptd.sh",
    "dpo": "dpo_minimind_ptd.sh",
}
# Settings that have a flag here.
FLAGS = {
    "MODEL": "model",
    "TP": "tp",
    "PP": "pp",
    "EP": "ep",
    "NPUS_PER_NODE": "cards",
    "NNODES": "nodes",
    "DATA_PATH": "data-path",
    "TOKENIZER_PATH": "tokenizer",
    "CKPT_LOAD_DIR": "load",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--job", choices=JOBS, default="pretrain")
    made.add_argument("--model", choices=PRESETS, default="minimind3")
    made.add_argument("--name", help="of the task, and of its directory in /outputs (default MODEL-JOB)")
    made.add_argument("--image", default="minimind-mcore:ascend", help="as the platform's registry has it")
    made.add_argument("--cards", type=int, default=8, help="of each host")
    made.add_argument("--nodes", type=int, default=1, help="hosts")
    for flag in ("--tp", "--pp", "--ep"):
        made.add_argument(flag, type=int, help="default: as in the checkpoint of --load, else 1")
    for flag, path in MOUNTS.items():
        made.add_argument(f"--{flag}", type=Path, required=True, help=f"directory here that the task sees as {path}")
    made.add_argument(
        "--data-path", required=True, help="raw file, or prefix of converted data, below --data or --outputs"
    )
    made.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json, below --models")
    made.add_argument("--load", type=Path, help="checkpoint to begin with, below --models or --outputs")
    made.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a further setting, such as GBS=256"
    )
    made.add_argument("--json", action="store_true", help="print the fields as JSON")
    made.add_argument("flags", nargs="*", help="after --: further Megatron flags for the script")
    return made


def inside(args: argparse.Namespace, path: str | Path, flag: str, mounts: Sequence[str]) -> str:
    """A path of this host as the task sees it.

    Raises:
        UserError: it is not below one of these mounted directories, or a link that leads out of it.
    """
    whole = Path(os.path.abspath(path))
    for name in mounts:
        mounted = Path(os.path.abspath(getattr(args, name)))
        if whole.is_relative_to(mounted):
            if not whole.resolve().is_relative_to(mounted.resolve()):
                raise UserError(f"{flag} {path}: a link to {whole.resolve()}, which the task cannot see; copy it")
            return str(Path(MOUNTS[name]) / whole.relative_to(mounted))
    places = " or ".join(f"--{name} {getattr(args, name)} (in the task {MOUNTS[name]})" for name in mounts)
    raise UserError(f"{flag} {path}: expected a path below {places}")


def check(args: argparse.Namespace) -> None:
    """Refuse numbers and paths of which no task can be made.

    Raises:
        UserError: one of them.
    """
    for flag in ("cards", "nodes", "tp", "pp", "ep"):
        number = getattr(args, flag)
        if number is not None and number < 1:
            raise UserError(f"--{flag} {number}: expected 1 or more")
    for pair in args.set:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise UserError(f"--set {pair}: expected NAME=VALUE")
        if name in FLAGS:
            raise UserError(f"--set {pair}: give --{FLAGS[name]} {value}, which is checked")
    for name in MOUNTS:
        path = getattr(args, name)
        if not path.is_dir() and (name != "outputs" or path.exists()):  # outputs may be made later
            raise UserError(f"--{name} {path}: there is no such directory")
    if not Path(args.data_path).exists() and not datasets_at(args.data_path):
        raise UserError(f"--data-path {args.data_path}: there is no such file, nor a converted dataset of that prefix")
    if not (args.tokenizer / "tokenizer.json").is_file():
        raise UserError(
            f"--tokenizer {args.tokenizer}: there is no tokenizer.json in it; expected a directory with one, such as "
            "that of MiniMind's weights"
        )
    if args.job != "pretrain" and args.load is None:
        raise UserError(f"--job {args.job} needs --load, the checkpoint to begin with")


def layout(args: argparse.Namespace, source: Source | None) -> dict[str, int]:
    """TP, PP and EP: as given, else those of the checkpoint.

    Raises:
        UserError: the checkpoint has another layout, or the model or the cards cannot be split like this.
    """
    given = {"TP": args.tp, "PP": args.pp, "EP": args.ep}
    have = {"TP": 1, "PP": 1, "EP": 1}
    if source is not None:
        if source.layout is None:
            asked = {key: value for key, value in given.items() if value is not None}
            kind = "mcore2mcore" if source.kind.startswith("Megatron") else "hf2mcore"
            raise UserError(
                f"--load {args.load} is {source.kind}; a task starts MindSpeed-LLM, which wants a Megatron checkpoint "
                f"in the torch format. Convert it:\n  {conversion(args.load, kind, settings(asked))}"
            )
        have = {"TP": source.layout.tp, "PP": source.layout.pp, "EP": source.layout.ep}
    wanted = {key: have[key] if value is None else value for key, value in given.items()}
    if source is not None and wanted != have:
        raise UserError(
            f"--load {args.load} has the layout {settings(have)}, and the task would have {settings(wanted)}. "
            f"Leave --tp, --pp and --ep out, or convert it:\n  {conversion(args.load, 'mcore2mcore', settings(wanted))}"
        )
    split(PRESETS[args.model], wanted, args.cards * args.nodes)
    return wanted


def split(model: ModelConfig, sizes: dict[str, int], cards: int) -> None:
    """Refuse sizes by which the model or the cards cannot be divided."""
    experts = model.moe.num_experts if model.moe else 1
    parts = {
        f"{model.num_kv_heads} key-value heads by TP": (model.num_kv_heads, sizes["TP"]),
        f"{model.num_heads} heads by TP": (model.num_heads, sizes["TP"]),
        f"{model.num_layers} layers by PP": (model.num_layers, sizes["PP"]),
        f"{experts} experts by EP": (experts, sizes["EP"]),
        f"{cards} cards by TP x PP x EP": (cards, sizes["TP"] * sizes["PP"] * sizes["EP"]),
    }
    for what, (whole, part) in parts.items():
        if part < 1 or whole % part:
            raise UserError(f"{settings(sizes)}: cannot divide {what}")


def settings(values: dict[str, Any]) -> str:
    """NAME=VALUE words for a shell."""
    return " ".join(f"{key}={shlex.quote(str(value))}" for key, value in values.items())


def same_model(model: ModelConfig, source: Source) -> None:
    """Refuse a Megatron checkpoint of another model; others are refused by their format."""
    if source.kind.startswith("Megatron"):
        args = arguments.parse(model.megatron_flags())
        args.num_layers += len(source.layout.noop_layers) if source.layout else 0  # Megatron counts their places
        check_model(vars(args), vars(saved_args(source.path)), source.path)


def task(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the form.

    Raises:
        UserError: see `check`, `inside` and `layout`; a checkpoint is missing or of another model.
    """
    check(args)
    source = open_source(args.load) if args.load else None
    if source is not None:
        same_model(PRESETS[args.model], source)
    name = args.name or f"{args.model}-{args.job}"
    outputs = f"{MOUNTS['outputs']}/{name}"
    variables: dict[str, Any] = {
        "MODEL": args.model,
        **layout(args, source),
        "NPUS_PER_NODE": args.cards,
        "DATA_PATH": inside(args, args.data_path, "--data-path", ("data", "outputs")),
        "TOKENIZER_PATH": inside(args, args.tokenizer, "--tokenizer", ("models",)),
        "OUTPUT_DIR": outputs,
        "LOG_DIR": f"{outputs}/logs",
        "DATA_DIR": f"{MOUNTS['outputs']}/converted",
        **({"CKPT_LOAD_DIR": inside(args, args.load, "--load", ("models", "outputs"))} if args.load else {}),
        **({"NNODES": args.nodes} if args.nodes > 1 else {}),
        **dict(pair.split("=", 1) for pair in args.set),
    }
    flags = " ".join(map(shlex.quote, args.flags))
    command = f"{settings(variables)} bash {ALGORITHM}/examples/fusionone/train.sh {JOBS[args.job]} {flags}".rstrip()
    return {
        "name": name,
        "image": args.image,
        "algorithm directory": ALGORITHM,
        "nodes": args.nodes,
        "cards per node": args.cards,
        "mounts": {
            target: f"{getattr(args, key).absolute()}{'' if key == 'outputs' else ' (read-only)'}"
            for key, target in MOUNTS.items()
        },
        "logs": variables["LOG_DIR"],
        "checkpoints": f"{outputs}/checkpoints",
        **({"on each node": "NODE_RANK and MASTER_ADDR, from the platform's own variables"} if args.nodes > 1 else {}),
        "run command": command,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the fields."""
    args = parser().parse_args(argv)
    fields = task(args)
    if args.json:
        print(json.dumps(fields, indent=2, ensure_ascii=False))
        return
    width = max(map(len, fields))
    for key, value in fields.items():
        lines = [f"{there}  <- {here}" for there, here in value.items()] if isinstance(value, dict) else [str(value)]
        for number, line in enumerate(lines):
            print(f"{key if number == 0 else '':<{width}}  {line}")


if __name__ == "__main__":
    run(main)
