"""minimind-mcore COMMAND ...: the one command for everything in the kit.

    minimind-mcore --help
    MODEL=minimind3 DATA_PATH=pretrain.jsonl TOKENIZER_PATH=tokenizer minimind-mcore pretrain
    python -m minimind_mcore.cli doctor      # from a checkout that is not installed

Each command is a function `main(argv)` in a module. Only the module of the given command is imported, so a command does
not wait for libraries that it does not use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minimind_mcore import errors, log
from minimind_mcore.errors import UserError
from minimind_mcore.imports import importing

# command: (module:function, what it does)
COMMANDS = {
    "run": ("minimind_mcore.pipeline.main:main", "run the stages from data to a served model, except finished ones"),
    "download": ("minimind_mcore.pipeline.download:main", "download data, weights, tokenizers or the reward model"),
    "pretrain": ("minimind_mcore.cli.train:pretrain", "pretrain a model, or resume"),
    "sft": ("minimind_mcore.cli.train:sft", "fine-tune all weights on conversations"),
    "lora": ("minimind_mcore.cli.train:lora", "fine-tune adapters on conversations"),
    "dpo": ("minimind_mcore.cli.train:dpo", "align a model with preferences"),
    "distill": ("minimind_mcore.cli.train:distill", "fine-tune a model on the logits of a teacher"),
    "reason": ("minimind_mcore.cli.train:reason", "fine-tune a model on reasoning (MiniMind2)"),
    "tune": ("minimind_mcore.cli.train:tune", "sft, reason or distill, by the setting STAGE"),
    "data": ("minimind_mcore.cli.data:main", "convert text, conversations or preference pairs, or make sample data"),
    "convert": ("minimind_mcore.cli.model:convert", "convert weights between MiniMind, Hugging Face and Megatron"),
    "generate": ("minimind_mcore.cli.model:generate", "complete prompts"),
    "chat": ("minimind_mcore.cli.model:chat", "talk to a model"),
    "evaluate": ("minimind_mcore.cli.model:evaluate", "score a model: C-Eval, CMMLU, MMLU, perplexity and others"),
    "serve": ("minimind_mcore.cli.model:serve", "serve a model in any format through an OpenAI-compatible HTTP API"),
    "manager": ("minimind_mcore.manager.main:main", "start, watch and stop jobs of every stage in a browser"),
    "rl": ("minimind_mcore.cli.rl:main", "reinforcement learning: train, and check or export a configuration"),
    "quickstart-tools": ("minimind_mcore.cli.quickstart_tools:main", "teach the quickstart's model to call tools"),
    "plan": ("minimind_mcore.forecast.main:main", "estimate memory, time and layouts of a model on any devices"),
    "doctor": ("minimind_mcore.doctor.main:main", "report what is installed, what is wrong, and how to fix it"),
    "presets": ("minimind_mcore.models.presets:main", "list the models, or print the flags of one"),
    "recipes": ("minimind_mcore.models.recipes:main", "list the training recipes, or print the flags of one"),
    "corpus": ("minimind_mcore.preprocess.corpus:main", "write sample data"),
    "tool-data": ("minimind_mcore.preprocess.tool_data:main", "convert hermes, glaive and xlam to MiniMind's format"),
    "tokenizer": ("minimind_mcore.preprocess.train_tokenizer:main", "train a tokenizer"),
    "docs": ("minimind_mcore.figures.main:main", "train small models and compute the figures of the documentation"),
    "report": ("minimind_mcore.training.report:main", "redraw the curves of a training"),
}
# The programs of MindSpeed-LLM and MindSpeed-RL: the same names and flags.
PROGRAMS = {
    "pretrain_gpt.py": ("minimind_mcore.training.pretrain:main", "pretrain"),
    "posttrain_gpt.py": ("minimind_mcore.posttrain.main:main", "fine-tune, align or distill"),
    "preprocess_data.py": ("minimind_mcore.preprocess.main:main", "convert raw data"),
    "convert_ckpt_v2.py": ("minimind_mcore.converters.main:main_v2", "convert weights"),
    "convert_ckpt.py": ("minimind_mcore.converters.main:main_v1", "convert weights, with the flags of older guides"),
    "inference.py": ("minimind_mcore.inference.main:main", "generate and chat"),
    "evaluation.py": ("minimind_mcore.inference.evaluation:main", "evaluate"),
    "train_grpo.py": ("minimind_mcore.rl.main:grpo", "reinforcement learning without a critic"),
    "train_ppo.py": ("minimind_mcore.rl.main:ppo", "reinforcement learning with a critic"),
}


def usage() -> str:
    """Return the text of `--help`."""
    width = max(map(len, COMMANDS | PROGRAMS))

    def listed(table: dict[str, tuple[str, str]]) -> list[str]:
        return [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in table.items()]

    lines = ["usage: minimind-mcore COMMAND ...", "", *listed(COMMANDS), ""]
    lines += ["with the flags of MindSpeed-LLM and MindSpeed-RL:", *listed(PROGRAMS), ""]
    lines.append("`minimind-mcore COMMAND --help` describes a command.")
    lines.append(f"{log.SETTING}={'|'.join(log.LEVELS)} hides messages below a level (default: info).")
    return "\n".join(lines)


def dispatch(argv: Sequence[str]) -> int:
    """Run one command. Return the exit status.

    Raises:
        UserError: the command does not exist, or the command raises it.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 1
    table = COMMANDS | PROGRAMS
    if argv[0] not in table:
        hint = errors.did_you_mean(argv[0], table) or f"; it has {', '.join(COMMANDS)}"
        raise UserError(f"minimind-mcore has no command {argv[0]!r}{hint}")
    module, _, name = table[argv[0]][0].partition(":")
    with importing(module):
        function: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), name)
    return function(list(argv[1:])) or 0


def main() -> None:
    """Run the command of the command line. An error is one message, and exit status 1."""
    errors.run(lambda: sys.exit(dispatch(sys.argv[1:])))


def program(file: str) -> None:
    """Run the command named like a script file, such as pretrain_gpt.py."""
    errors.run(lambda: sys.exit(dispatch([Path(file).name, *sys.argv[1:]])))
