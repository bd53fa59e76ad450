"""The flags of MindSpeed-LLM's programs, and a parser for each program.

`flags.json` lists every flag with its type and default, so a script written for MindSpeed-LLM is parsed here with the
same meaning. An unknown flag is an error that suggests the nearest one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.inputs.ranges import flag_type
from minimind_mcore.paths import package_json


def _truth(text: str) -> bool | None:
    values = {"true": True, "false": False, "none": None}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {', '.join(values)}")
    return values[text.lower()]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"found {text[:1000]!r}, which is not valid JSON ({error})") from error


# Lifts the restriction of unpickling. Its action imports torch, so `checkpoint/unpickling.py` adds it to parsers.
TRUST_FLAG = "--trust-checkpoints"

TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "json": _json,
    "truth": _truth,
}


def documented_parser(prog: str, documentation: str | None, **more: Any) -> argparse.ArgumentParser:
    """Return a parser whose help keeps the line breaks of a module's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=prog, description=documentation, formatter_class=raw, **more)


def support(program: str, kind: str) -> frozenset[str]:
    """Return the flags of MindSpeed-LLM that a program of this kit treats in one way.

    Args:
        program: a key of "programs" in support.json.
        kind: "implemented", "no effect" (accepted), "compared" (with the model) or "refused".
    """
    return frozenset(" ".join(package_json("inputs/support.json")["programs"][program][kind]).split())


def supported_values() -> Mapping[str, Sequence[object]]:
    """Return the supported values of flags that the native engine supports only in part, by dest."""
    values: Mapping[str, Sequence[object]] = package_json("inputs/support.json")["values"]
    return values


@functools.cache
def flag_table(program: str = "training") -> dict[str, dict[str, Any]]:
    """Return the flags of one of MindSpeed-LLM's programs in their original order: {"--num-layers": record}.

    Args:
        program: "training", "preprocess_data.py", "convert_ckpt_v2.py" or "convert_ckpt.py".
    """
    records = [record for record in package_json("inputs/flags.json")["flags"] if record["program"] == program]
    return {flag: record for record in records for flag in record["flags"]}


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors raised as `UserError`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # argparse parses "-1,1,0" as a flag. As a value it reaches `parse_split`, whose error states the expected form.
        self._negative_number_matcher = re.compile(r"-[\d.][\d.,/]*$")

    def error(self, message: str) -> Any:
        """Raise instead of exiting with status 2."""
        raise UserError(f"{message}; `{self.prog} --help` lists the flags")

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse a command line.

        Returns:
            The values, and the given flags, each once, in order.

        Raises:
            UserError: a flag is unknown (with the nearest known one), or a value is invalid.
        """
        given = given_flags(argv)
        refuse_unknown(given, [flag for action in self._actions for flag in action.option_strings])
        return self.parse_args(list(argv)), given

    def set_choices(self, dest: str, choices: Sequence[str] | None) -> None:
        """Replace the choices of one of MindSpeed-LLM's flags. None: any value."""
        next(action for action in self._actions if action.dest == dest).choices = choices


def build_parser(program: str = "training", prog: str | None = None) -> Parser:
    """Return a parser of every flag of one of MindSpeed-LLM's programs, with its type and default."""
    parser = Parser(prog=prog, allow_abbrev=False, description="Megatron's flags are the interface.")
    groups: dict[str, Any] = {}
    for record in {id(r): r for r in flag_table(program).values()}.values():
        group = groups.get(record["source"]) or parser.add_argument_group(record["source"])
        groups[record["source"]] = group
        options: dict[str, Any] = {"dest": record["dest"]}
        for key in ("nargs", "default", "choices", "action", "const"):
            if key in record:
                options[key] = record[key]
        if "action" not in record and "type" in record:
            parsed = TYPES[record["type"]]
            options["type"] = flag_type(record["dest"], parsed) if parsed in (int, float) else parsed
        group.add_argument(*record["flags"], **options)
    return parser


def add_kit_flags(parser: argparse.ArgumentParser, program: str) -> argparse._ArgumentGroup:
    """Add this kit's own flags that the parser does not have yet, and return their group.

    Args:
        parser: parser of MindSpeed-LLM's flags.
        program: a key of kit_flags.json.
    """
    table = package_json("inputs/kit_flags.json")[program]
    group = parser.add_argument_group(table["group"], "flags of this kit; MindSpeed-LLM does not know them")
    for flag, row in table["flags"].items():
        options: dict[str, Any] = {key: value for key, value in row.items() if key != "range"}
        if "range" in row:
            options["type"] = flag_type(row["range"])
        elif "type" in row:
            options["type"] = TYPES[row["type"]]
        if flag not in parser._option_string_actions:
            group.add_argument(flag, **options)
    return group


@functools.cache
def kit_flags() -> tuple[str, ...]:
    """Return the flags of this kit's training programs that MindSpeed-LLM's programs lack."""
    tables = package_json("inputs/kit_flags.json")
    named = [flag for program in ("pretrain_gpt.py", "posttrain_gpt.py") for flag in tables[program]["flags"]]
    return tuple(flag for flag in dict.fromkeys([*named, TRUST_FLAG]) if flag not in flag_table())


def fields_from(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values whose names are fields of a dataclass."""
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}


def given_flags(argv: Sequence[str]) -> list[str]:
    """Return the flags on a command line, without their values, each once, in order."""
    return list(dict.fromkeys(arg.split("=", 1)[0] for arg in argv if arg.startswith("--")))


def refuse_unknown(flags: Sequence[str], known: Sequence[str]) -> None:
    """Raise a `UserError` that names each unknown flag and the nearest known one."""
    if unknown := [f"unknown flag {flag}{did_you_mean(flag, known)}" for flag in flags if flag not in known]:
        raise UserError("\n  ".join(unknown))


def refuse_unknown_training_flags(argv: Sequence[str]) -> None:
    """Raise a `UserError` for each flag that neither MindSpeed-LLM's training programs nor this kit's have."""
    refuse_unknown(given_flags(argv), [*flag_table(), *kit_flags()])


def unused(given: Sequence[str], used: Collection[str], program: str = "training") -> list[str]:
    """Return the given flags that MindSpeed-LLM's program has and whose dest is not used."""
    table = flag_table(program)
    return [flag for flag in given if flag in table and table[flag]["dest"] not in used]
