"""minimind-mcore COMMAND ...: everything that the kit does, under one name.

    minimind-mcore --help
    MODEL=minimind3 DATA_PATH=pretrain.jsonl TOKENIZER_PATH=tokenizer minimind-mcore pretrain
    python -m minimind_mcore.cli doctor      # from a checkout that is not installed

Each command is a function `main(argv)` of a module. The module is imported only when its command is given, so that a
command does not wait for the libraries of another.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minimind_mcore import errors, log
from minimind_mcore.errors import UserError

# command: (module:function, what it does)
COMMANDS = {
    "run": ("minimind_mcore.pipeline.main:main", "all stages from data to a served model, each skipped if finished"),
    "download": ("minimind_mcore.pipeline.download:main", "get MiniMind's data, weights, tokenizers, a reward model"),
    "pretrain": ("minimind_mcore.cli.train:pretrain", "train a model from the beginning, or continue"),
    "sft": ("minimind_mcore.cli.train:sft", "fine-tune all weights on conversations"),
    "lora": ("minimind_mcore.cli.train:lora", "fine-tune adapters on conversations"),
    "dpo": ("minimind_mcore.cli.train:dpo", "align a model with preferences"),
    "distill": ("minimind_mcore.cli.train:distill", "fine-tune a model on the logits of a teacher"),
    "reason": ("minimind_mcore.cli.train:reason", "fine-tune a model on reasoning (MiniMind2)"),
    "tune": ("minimind_mcore.cli.train:tune", "sft, reason or distill, by the setting STAGE"),
    "data": ("minimind_mcore.cli.data:main", "convert text, conversations or pairs, or make the sample data"),
    "convert": ("minimind_mcore.cli.model:convert", "convert weights between MiniMind, Hugging Face and Megatron"),
    "generate": ("minimind_mcore.cli.model:generate", "complete prompts"),
    "chat": ("minimind_mcore.cli.model:chat", "talk to a model"),
    "evaluate": ("minimind_mcore.cli.model:evaluate", "score a model: C-Eval, CMMLU, MMLU, perplexity and others"),
    "serve": ("minimind_mcore.cli.model:serve", "answer OpenAI's HTTP requests with a model in any form"),
    "manager": ("minimind_mcore.manager.main:main", "start, watch and stop jobs of every stage in a browser"),
    "rl": ("minimind_mcore.cli.rl:main", "reinforcement learning: train, and check or export a configuration"),
    "quickstart-tools": ("minimind_mcore.cli.quickstart_tools:main", "teach the quickstart's model to call tools"),
    "plan": ("minimind_mcore.forecast.main:main", "memory, time and layouts of a model on any devices"),
    "doctor": ("minimind_mcore.doctor.main:main", "what is installed, what is wrong, and the command that fixes it"),
    "presets": ("minimind_mcore.models.presets:main", "list the models, or print the flags of one"),
    "recipes": ("minimind_mcore.models.recipes:main", "list the training recipes, or print the flags of one"),
    "corpus": ("minimind_mcore.preprocess.corpus:main", "write sample data"),
    "tool-data": ("minimind_mcore.preprocess.tool_data:main", "convert hermes, glaive and xlam to MiniMind's format"),
    "tokenizer": ("minimind_mcore.preprocess.train_tokenizer:main", "train a tokenizer"),
    "report": ("minimind_mcore.training.report:main", "draw the curves of a training again"),
}
# The same, by the names of MindSpeed-LLM's and MindSpeed-RL's programs, with their flags.
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
    """Return what `--help` prints."""
    width = max(map(len, COMMANDS | PROGRAMS))

    def listed(table: dict[str, tuple[str, str]]) -> list[str]:
        return [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in table.items()]

    programs = "with the flags of MindSpeed-LLM and MindSpeed-RL:"
    lines = [*listed(COMMANDS), "", programs, *listed(PROGRAMS)]
    levels = f"{log.SETTING}={'|'.join(log.LEVELS)} leaves out messages below a level (default: info)."
    return "\n".join(["usage: minimind-mcore COMMAND ...", "", *lines, "", "`COMMAND --help` says more.", levels])


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
    function: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), name)
    return function(list(argv[1:])) or 0


def main() -> None:
    """Run the command of the command line. An error is one message, and exit status 1."""
    errors.run(lambda: sys.exit(dispatch(sys.argv[1:])))


def program(file: str) -> None:
    """Run the command that a script is called like."""
    errors.run(lambda: sys.exit(dispatch([Path(file).name, *sys.argv[1:]])))
