"""The options of a stage's form: settings of the environment, flags of its program, keys of the RL configuration.

An option has a type, a range or choices, and a default. They come from the tables that the commands themselves read:
ranges.json, kit_flags.json, flags.json, the recipes and the schema of the RL configuration. No option takes
free text, so no value can be taken for a flag, a path or a piece of a program.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from minimind_mcore import arguments
from minimind_mcore.errors import UserError, did_you_mean, shown
from minimind_mcore.inputs.flags import Parser, add_kit_flags, kit_flags
from minimind_mcore.inputs.ranges import ANY, Range, find
from minimind_mcore.models.recipes import get_recipe, recipe_for
from minimind_mcore.pipeline.stages import RL, TRAININGS, recipe_of
from minimind_mcore.rl.config.schema import SECTIONS, MiniMindConfig, defaults, value_type

Kind = Literal["int", "float", "choice", "flag"]
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
LONGEST = 40  # characters of a number
TRUTH = ("true", "false")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a form.

    Attributes:
        name: setting (LR), flag (--weight-decay) or key of the RL configuration (actor_config.lr).
        kind: "flag" is given or not; a number or a choice has a value.
        group: "main", "layout", "output" or "more".
        default: what applies if the option is not given; "" if another option or the data decides.
        choices: of a choice.
        help: one line.
        limits: of a number.
    """

    name: str
    kind: Kind
    group: str = "more"
    default: str = ""
    choices: tuple[str, ...] = ()
    help: str = ""
    limits: Range | None = None

    def text(self, value: object) -> str:
        """Return a value as the commands read it; "" for a flag that is not given.

        Raises:
            UserError: the value has another type, is out of range, or is not one of the choices.
        """
        if self.kind == "flag":
            if not isinstance(value, bool):
                raise UserError(f"{self.name}: found {shown(value)}, expected true or false")
            return "1" if value else ""
        word = str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)
        if self.kind == "choice":
            if word not in self.choices:
                raise UserError(f"{self.name}: found {shown(value)}, expected one of {', '.join(self.choices)}")
            return word
        if len(word) > LONGEST or not NUMBER.fullmatch(word) or not word.isascii():
            kind = "a whole number" if self.kind == "int" else "a number"
            raise UserError(f"{self.name}: found {shown(value)}, expected {kind}")
        try:
            number = int(word) if self.kind == "int" else float(word)
        except ValueError as error:
            raise UserError(f"{self.name}: found {shown(value)}, expected a whole number") from error
        if wrong := (self.limits or ANY[type(number)]).problem(number):
            raise UserError(f"{self.name}: {wrong}")
        return repr(number)

    def described(self) -> dict[str, object]:
        """Return the option as JSON."""
        found: dict[str, object] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return found | {"limits": str(self.limits) if self.limits else ""}


# Settings of a training: the name of its range, its group, what it is.
NUMBERS = {
    "EPOCHS": ("epochs", "main", "passes over the data"),
    "TRAIN_ITERS": ("train_iters", "main", "iterations, in place of EPOCHS"),
    "LR": ("lr", "main", "highest learning rate"),
    "MBS": ("micro_batch_size", "main", "samples of a micro-batch"),
    "GBS": ("global_batch_size", "main", "samples of an update, on all devices"),
    "SEQ_LENGTH": ("seq_length", "main", "tokens of a sample"),
    "SEED": ("seed", "main", "random seed"),
    "NPUS_PER_NODE": ("", "layout", "processes; default: one for each chosen device, and up to two on a CPU"),
    "TP": ("tensor_model_parallel_size", "layout", "tensor-parallel ranks"),
    "PP": ("pipeline_model_parallel_size", "layout", "pipeline-parallel ranks"),
    "VPP": ("num_layers_per_virtual_pipeline_stage", "layout", "layers of a virtual pipeline stage"),
    "EP": ("expert_model_parallel_size", "layout", "expert-parallel ranks"),
    "CP": ("context_parallel_size", "layout", "context-parallel ranks"),
    "SAVE_INTERVAL": ("save_interval", "output", "iterations between checkpoints"),
    "LOG_INTERVAL": ("log_interval", "output", "iterations between rows of metrics"),
    "EVAL_INTERVAL": ("eval_interval", "output", "iterations between evaluations"),
    "EVAL_ITERS": ("eval_iters", "output", "batches of an evaluation"),
}
DEFAULTS = {"SEED": "42", "TP": "", "PP": "1", "EP": "1", "CP": "1", "SAVE_INTERVAL": "1000", "LOG_INTERVAL": "10",
            "EVAL_INTERVAL": "100", "EVAL_ITERS": "5"}  # fmt: skip
CHOICES = {
    "BACKEND": Option(
        name="BACKEND", kind="choice", group="layout", choices=("native", "mindspeed-llm"), default="native",
        help="mindspeed-llm: MindSpeed-LLM trains, on NPUs only; a stop does not save, and there are no curves",
    ),
    "PRECISION": Option(
        name="PRECISION", kind="choice", group="main", choices=("auto", "bf16", "fp16", "fp32"),
        help="of weights and arithmetic; default: bf16, on a CPU fp32; auto: bf16, on a CPU without bf16 products fp32",
    ),
    "PACK": Option(
        name="PACK", kind="flag", group="main", help="several conversations share a sequence and do not see each other"
    ),
    "CKPT_FORMAT": Option(
        name="CKPT_FORMAT", kind="choice", group="output", choices=("torch", "torch_dist"), default="torch",
        help="torch_dist loads into any layout",
    ),
    "ROUTER_WEIGHT": Option(
        name="ROUTER_WEIGHT", kind="choice", choices=("normalized", "softmax", "straight_through"),
        help="how a mixture of experts weighs its experts",
    ),
    "RAW": Option(name="RAW", kind="flag", group="main", help="a base model: prompts without the chat template"),
    "TASK": Option(
        name="TASK", kind="choice", group="main",
        choices=("toolcall", "exact_match", "perplexity", "ceval", "cmmlu", "mmlu", "openbookqa"),
        help="scored besides the replies to fixed prompts; all but toolcall need data",
    ),
    "FORMAT": Option(
        name="FORMAT", kind="choice", group="main", choices=("hf", "minimind"), default="hf",
        help="minimind: MiniMind's own names of weights",
    ),
    "PAD_HEAD_DIM": Option(
        name="PAD_HEAD_DIM", kind="int", group="main", limits=find("kv_channels"),
        help="pad the attention heads with zeros, for vLLM on an NPU",
    ),
}  # fmt: skip
# The options of a stage of reinforcement learning that the form shows first.
RL_MAIN = (
    "megatron_training.train_iters", "megatron_training.global_batch_size", "megatron_training.save_interval",
    "actor_config.lr", "rl_config.n_samples_per_prompt", "generate_config.sampling_config.max_tokens",
    "generate_config.sampling_config.temperature", "minimind.eval_interval", "minimind.sample_interval",
)  # fmt: skip
# Flags that the manager gives itself, or that would run code of a file.
OWN = re.compile(r"dry_run|pending|trust|allow_anonymous|^help$|^stage$")


def options(stage: str, model: str = "minimind3", recipe: str = "") -> dict[str, Option]:
    """Return the options of a stage by name; the defaults are those of the recipe that suits the model.

    Raises:
        UserError: the model or its recipe does not exist.
    """
    found = list(_options(stage))
    if stage in TRAININGS:
        values = recipe_defaults(stage, model, recipe)
        found = [dataclasses.replace(option, default=values.get(option.name, option.default)) for option in found]
    return {option.name: option for option in found}


def recipe_defaults(stage: str, model: str, recipe: str) -> dict[str, str]:
    """Return the settings that a training's recipe has.

    Raises:
        UserError: the model or its recipe does not exist.
    """
    command = TRAININGS[stage][0]
    found = get_recipe(recipe_of(model, recipe, command) or recipe_for(model, command))
    return {
        "EPOCHS": str(found.epochs), "LR": repr(found.lr), "MBS": str(found.micro_batch_size),
        "GBS": str(found.global_batch_size(1)), "SEQ_LENGTH": str(found.seq_length),
    }  # fmt: skip


@functools.cache
def _options(stage: str) -> tuple[Option, ...]:
    if stage in TRAININGS:
        chosen = [CHOICES[name] for name in ("BACKEND", "PRECISION", "PACK", "CKPT_FORMAT", "ROUTER_WEIGHT")]
        return (*_settings(), *chosen, *_training_flags(stage != "pretrain"))
    if stage in RL:
        return tuple(sorted(_rl_keys(stage), key=lambda option: option.group))
    if stage == "convert":
        return (CHOICES["FORMAT"], CHOICES["PRECISION"], CHOICES["PAD_HEAD_DIM"])
    if stage == "serve":
        parser = Parser()
        add_kit_flags(parser, "minimind-mcore serve")
        free = {"--port": ""}  # the manager takes a free one
        flags = (dataclasses.replace(flag, default=free.get(flag.name, flag.default)) for flag in _flags(parser))
        return (CHOICES["PRECISION"], *flags)
    return (CHOICES["TASK"], CHOICES["PRECISION"], CHOICES["RAW"]) if stage == "eval" else ()


def _settings() -> Iterator[Option]:
    for name, (key, group, text) in NUMBERS.items():
        limits = find(key) or Range(int, 1)
        kind: Kind = "int" if limits.kind is int else "float"
        yield Option(name=name, kind=kind, group=group, default=DEFAULTS.get(name, ""), help=text, limits=limits)


def _training_flags(posttrain: bool) -> Iterator[Option]:
    """Yield the flags that a training program implements and that no setting stands for."""
    known = arguments.IMPLEMENTED | arguments.POSTTRAIN if posttrain else arguments.IMPLEMENTED
    settled = {key for key, _, _ in NUMBERS.values()} | {name.lower() for name in CHOICES} | {"bf16", "fp16"}
    kit = kit_flags()
    for option in _flags(arguments.training_parser(posttrain)):
        dest = option.name.removeprefix("--").replace("-", "_")
        if (dest in known or option.name in kit) and dest not in settled:
            yield option


def _flags(parser: argparse.ArgumentParser) -> Iterator[Option]:
    """Yield the flags of a parser that take a number or a choice, or no value."""
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else ""
        kind = getattr(action.type, "__name__", "")
        if not name or OWN.search(action.dest) or action.nargs not in (None, 0):
            continue
        default = "" if action.default in (None, argparse.SUPPRESS) else str(action.default)
        text = action.help or ""
        if action.nargs == 0:
            yield Option(name=name, kind="flag", help=text)
        elif action.choices:
            yield Option(name=name, kind="choice", choices=tuple(map(str, action.choices)), default=default, help=text)
        elif kind in ("int", "float"):
            limits = find(action.dest)
            yield Option(name=name, kind=typing.cast(Kind, kind), default=default, help=text, limits=limits)


def _rl_keys(stage: str) -> Iterator[Option]:
    """Yield the keys of the RL configuration whose values are numbers, choices, or true and false."""
    sections = ["megatron_training", "actor_config", *(["critic_config"] if stage == "ppo" else []), "rl_config"]
    for section in (*sections, "generate_config"):
        for key, value in defaults(SECTIONS[section]).items():
            if isinstance(value, Mapping):
                for inner, default in value.items():
                    yield from _rl_key(f"{section}.{key}", inner, type(default), default)
            else:
                # A default of the section: the YAML of the stage may have another one.
                yield from _rl_key(section, key, value_type(SECTIONS[section], key), None)
    for key, hint in typing.get_type_hints(MiniMindConfig).items():
        words = typing.get_args(hint)
        default = getattr(MiniMindConfig, key, None)
        if typing.get_origin(hint) is Literal:
            yield Option(name=f"minimind.{key}", kind="choice", choices=words, default=str(default))
        else:
            kind = words[0] if isinstance(hint, types.UnionType) else hint
            yield from _rl_key("minimind", key, kind, default)


def _rl_key(section: str, key: str, kind: type, default: object) -> Iterator[Option]:
    name, text = f"{section}.{key}", "" if default is None else str(default)
    group = "main" if name in RL_MAIN else "more"
    if OWN.search(key):
        return
    if kind is bool:
        yield Option(name=name, kind="choice", choices=TRUTH, group=group, default=text.lower())
    elif kind in (int, float):
        number: Kind = "int" if kind is int else "float"
        limits = find(key, section.rpartition(".")[2])
        yield Option(name=name, kind=number, group=group, default=text, limits=limits)


def checked(known: Mapping[str, Option], given: Mapping[str, object]) -> dict[str, str]:
    """Return the values that a request gives, as text for the commands.

    Raises:
        UserError: an option does not exist, or its value is wrong.
    """
    found = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"settings: this stage has no option {shown(name)}{did_you_mean(name, known)}")
        if value not in ("", None) and (text := known[name].text(value)):
            found[name] = text
    return found
