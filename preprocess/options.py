"""The options of a conversion, from flags or files, and the fingerprint of a request.

Option files are YAML (--config) and LLaMA-Factory's dataset_info.json (--dataset-dir). A key of the YAML is
a flag of preprocess_data.py without the leading dashes:

    input: dataset/sft_t2t_mini.jsonl
    handler_name: MiniMindInstructionHandler
    tokenizer_name_or_path: tokenizer
    map_keys: {messages: chats}
    pack: true
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.inputs.documents import read_object, read_yaml
from minimind_mcore.inputs.ranges import problem
from minimind_mcore.preprocess.handlers import CHAT_HANDLERS, ChatHandler, Handler, find_handler
from minimind_mcore.preprocess.messages import PROMPTS
from minimind_mcore.preprocess.meta import prompts_path
from minimind_mcore.preprocess.readers import InputFile
from minimind_mcore.preprocess.templates import template_entry
from minimind_mcore.preprocess.tokenize import TokenizerInfo
from minimind_mcore.preprocess.tokenizer_files import special_tokens, template_source

# Part of every request fingerprint. Raise the number when the same request would give other files than before.
FORMAT = 2


@dataclass(frozen=True)
class ChatOptions:
    """The options for converting conversations to samples.

    Attributes:
        map_keys: --map-keys: {column of the format: field of the records}.
        prompt_type: a template in MindSpeed-LLM's format. None: the tokenizer's own chat template.
        prompt_type_path: JSON file with the template. None: `templates.json` of this kit.
        enable_thinking: for templates with this option; for tasks: whether the model should think.
        seed: seed of MiniMind's random changes (`stages.random_numbers`).
        system_ratio: share of conversations that get a system prompt. None: MiniMind's 0.2 for its own
            formats, 0 for others, for pairs and for tasks with an answer.
        empty_think_ratio: share of texts that keep their empty thoughts. None: MiniMind's 0.2 for its own
            formats (0.05 with MiniMind2's tokenizer, where <think> is not a token), 1 for others and for tasks.
        thinking_ratio: share of tasks that let the model think. None: 1 or 0 by `enable_thinking`, else the handler's.
        pack: "", "pack" or "neat-pack": pack samples to sequences of `seq_length`.
        additional_keys: for tasks: the datasets besides ids and mask: `labels` and fields of the record. Empty:
            the handler's own.
        placeholder_token: for step rewards: the token after each step.
        reward_tokens: for step rewards: the allowed reward tokens. Empty: any.
    """

    map_keys: dict[str, Any] | None = None
    prompt_type: str | None = None
    prompt_type_path: str | None = None
    enable_thinking: bool | None = None
    seed: int = 1234
    system_ratio: float | None = None
    empty_think_ratio: float | None = None
    thinking_ratio: float | None = None
    pack: str = ""
    additional_keys: tuple[str, ...] = ()
    placeholder_token: str = "ки"
    reward_tokens: tuple[str, ...] = ()

    def resolved(self, handler: ChatHandler, info: TokenizerInfo) -> ChatOptions:
        """Return a copy with the default ratios of the handler and of the tokenizer's generation."""
        own = handler.minimind and not handler.pairwise
        own = own and not (handler.prompts and self.prompt_type)  # such a template has its own system prompt
        thinking = handler.thinking_ratio if self.enable_thinking is None else float(self.enable_thinking)
        kept = (0.2 if info.thinks else 0.05) if handler.minimind and not handler.prompts else 1.0
        return dataclasses.replace(
            self,
            system_ratio=(0.2 if own and "gt" not in handler.columns else 0.0)
            if self.system_ratio is None
            else self.system_ratio,
            empty_think_ratio=kept if self.empty_think_ratio is None else self.empty_think_ratio,
            thinking_ratio=thinking if self.thinking_ratio is None else self.thinking_ratio,
        )


@dataclass(frozen=True)
class Options:
    """One conversion.

    Attributes:
        input: files, directories or globs, separated by commas.
        tokenizer: directory with tokenizer.json.
        output_prefix: prefix of the files to write. None: a name in `cache_dir` that is derived from the request.
        cache_dir: directory of unfinished parts (default: the directory of the output).
        handler: name from `handlers.HANDLERS` or `handlers.CHAT_HANDLERS`.
        keys: for pretraining: fields of the records. Each field becomes one dataset.
        append_eod: end each document with the tokenizer's eos.
        prepend_bos: begin each document with the tokenizer's bos. Together with `append_eod` this is MiniMind's
            pretraining format.
        dtype: "int32" as MindSpeed-LLM expects, or "uint16", half the size (pretraining only).
        seq_length: for pretraining: documents with this number of tokens or more are left out. For conversations: the
            maximum number of tokens of a sample, see `stages`. None: no limit.
        backend: "auto", "gigatoken" or "tokenizers".
        workers: number of processes.
        n_subs: minimum number of shards of the input.
        max_reject_rate: share of unusable records above which nothing is written.
        overwrite: ignore a finished result and finished parts, and convert again.
        chat: options for conversations. Pretraining handlers refuse them.
    """

    input: str
    tokenizer: str
    output_prefix: str | None = None
    cache_dir: str | None = None
    handler: str = "GeneralPretrainHandler"
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    dtype: str = "int32"
    seq_length: int | None = None
    backend: str = "auto"
    workers: int = 1
    n_subs: int = 1
    max_reject_rate: float = 0.001
    overwrite: bool = False
    chat: ChatOptions = ChatOptions()

    def find_handler(self) -> Handler | ChatHandler:
        """Return the handler, with the columns of --map-keys.

        Raises:
            UserError: the handler is unknown, or lacks a column.
        """
        handler = find_handler(self.handler)
        if not isinstance(handler, ChatHandler):
            return handler
        mapped = handler.mapped(self.handler, self.chat.map_keys)
        return mapped.with_keys(self.handler, self.chat.additional_keys)


def dataset_prefixes(options: Options, prefix: Path) -> dict[str, str]:
    """Return the prefix of each dataset, by key. For conversations the names are MindSpeed-LLM's, packed or not."""
    handler = options.find_handler()
    if isinstance(handler, ChatHandler):
        return {output: f"{prefix}_packed_{output}_document" for output in handler.outputs}
    return {key: f"{prefix}_{key}_document" for key in options.keys}


def data_paths(options: Options, prefix: Path) -> list[str]:
    """Return the values of --data-path: for conversations the common prefix of all their datasets."""
    if isinstance(options.find_handler(), ChatHandler):
        return [str(prefix)]
    return list(dataset_prefixes(options, prefix).values())


def beside_file(options: Options, prefix: Path) -> Path | None:
    """Return the file of the tasks' records, one line of JSON each. None for other data."""
    handler = options.find_handler()
    return prompts_path(prefix) if isinstance(handler, ChatHandler) and handler.prompts else None


def validate(options: Options, info: TokenizerInfo) -> None:
    """Refuse options that contradict each other or the tokenizer.

    Raises:
        UserError: names the contradiction.
    """
    handler = options.find_handler()
    if isinstance(handler, ChatHandler):
        _validate_chat(options, handler, info)
    else:
        if len(set(options.keys)) < len(options.keys):
            raise UserError(f"--json-keys {' '.join(options.keys)}: a key is given twice")
        if options.chat != ChatOptions(seed=options.chat.seed):
            raise UserError(
                f"--handler-name {options.handler}: packing, templates and --map-keys are for conversations"
            )
    if options.append_eod and info.eos_id is None:
        raise UserError(
            f"tokenizer {info.path}: its tokenizer_config.json names no eos_token that is in the vocabulary; "
            "--append-eod needs one"
        )
    # --prepend-bos has no effect with a tokenizer that has no bos, such as Qwen's. A bos outside the vocabulary is an
    # error.
    if options.prepend_bos and info.bos_id is None and (name := special_tokens(info.path).get("bos_token")):
        raise UserError(
            f"tokenizer {info.path}: its bos_token {name!r} is not in the vocabulary of tokenizer.json; --prepend-bos "
            "needs one that is, or null for a tokenizer without bos"
        )
    if options.dtype == "uint16" and info.vocab_size > 1 << 16:
        raise UserError(f"--dtype uint16: the tokenizer has {info.vocab_size} ids, uint16 holds 65536; use int32")
    for name in ("workers", "n_subs", "max_reject_rate", "seq_length"):
        _require_range(name, getattr(options, name))


def _validate_chat(options: Options, handler: ChatHandler, info: TokenizerInfo) -> None:
    chat = options.chat
    if options.prepend_bos or options.dtype != "int32":
        raise UserError(f"--handler-name {options.handler}: --prepend-bos and --dtype are for pretraining data")
    if info.eos_id is None:
        raise UserError(f"tokenizer {info.path}: conversations need its eos_token in tokenizer_config.json")
    if handler.fixed_prompt:
        if chat.prompt_type is not None or chat.enable_thinking is not None:
            raise UserError(
                f"--prompt-type, --enable-thinking: {options.handler} has a fixed prompt; leave these flags out"
            )
    elif chat.prompt_type is None:
        template_source(info.path)
        if options.append_eod:
            raise UserError("--append-eod: the tokenizer's own chat template ends the conversation itself")
    else:
        template_entry(chat.prompt_type, chat.prompt_type_path)
    if chat.prompt_type is None and chat.enable_thinking is not None and not handler.prompts:
        raise UserError(
            "--enable-thinking: the tokenizer's own chat template decides whether the model thinks; use a template "
            "with this option, such as --prompt-type qwen3"
        )
    if chat.pack and (options.seq_length is None or options.seq_length < 2):
        raise UserError("--pack needs --seq-length, the length of the sequences to fill")
    if chat.pack and (handler.pairwise or handler.prompts):
        raise UserError(f"--pack: for instruction data only; {options.handler} makes no such data")
    if chat.pack and info.pad_id is None:
        raise UserError(f"tokenizer {info.path}: --pack needs its pad_token in tokenizer_config.json")
    for name in ("system_ratio", "empty_think_ratio", "thinking_ratio"):
        _require_range(name, getattr(chat, name))


def _require_range(name: str, value: float | None) -> None:
    if value is not None and (wrong := problem(name, value)):
        raise UserError(f"--{name.replace('_', '-')}: {wrong}")


def request_fingerprint(options: Options, info: TokenizerInfo, sources: Sequence[InputFile]) -> str:
    """Return the SHA-256 of everything that determines the content of the result."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "sources": [[source.path, source.size, source.mtime_ns] for source in sources],
        "tokenizer": [info.fingerprint, info.bos_id, info.eos_id],
        "options": [getattr(options, name) for name in ("handler", "append_eod", "prepend_bos", "dtype", "seq_length")],
        "keys": options.keys,
    }
    if any(info.added) and not isinstance(options.find_handler(), ChatHandler):
        content["tokenizer"] = [*content["tokenizer"], info.added]  # if non-empty: keeps older datasets valid
    if isinstance(handler := options.find_handler(), ChatHandler):
        content["keys"] = handler.columns
        chat = dataclasses.asdict(options.chat.resolved(handler, info))
        if not handler.step_rewards:  # older datasets stay valid
            del chat["placeholder_token"], chat["reward_tokens"]
        content["chat"] = [chat, template_digest(options), info.pad_id]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def template_digest(options: Options) -> str:
    """Return the identity of a conversion's template: 16 hex digits of its source's SHA-256."""
    chat = options.chat
    handler = options.find_handler()
    if isinstance(handler, ChatHandler) and handler.fixed_prompt:
        source = PROMPTS["instruction"]
    elif chat.prompt_type is None:
        source = template_source(options.tokenizer)
    else:
        source = json.dumps(template_entry(chat.prompt_type, chat.prompt_type_path), sort_keys=True)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def output_prefix(options: Options, sources: Sequence[InputFile], request: str) -> Path:
    """Return the requested prefix, or a name derived from the content.

    Raises:
        UserError: neither a prefix nor a directory was given.
    """
    if options.output_prefix is not None:
        return Path(options.output_prefix).expanduser()
    if options.cache_dir is None:
        raise UserError("--output-prefix is missing (with --cache-dir instead, a name is chosen there)")
    first = Path(sources[0].path)
    name = first.name.split(".")[0] if len(sources) == 1 else first.parent.name
    return Path(options.cache_dir).expanduser() / f"{name}-{request[:12]}"


def with_config(argv: Sequence[str]) -> list[str]:
    """Return a command line with the flags of its --config file first, so that later flags override them.

    Raises:
        UserError: the file does not exist, or is not a mapping of flags.
    """
    words = list(argv)
    for place, word in enumerate(words):
        if word == "--config" and place + 1 < len(words):
            return [*read_config(words[place + 1]), *words[:place], *words[place + 2 :]]
        if word.startswith("--config="):
            return [*read_config(word.partition("=")[2]), *words[:place], *words[place + 1 :]]
    return words


def read_config(path: str) -> list[str]:
    """Return the flags in a YAML file, as words of a command line.

    Raises:
        UserError: the file does not exist, or is not a mapping of flags.
    """
    content = read_yaml(Path(path).expanduser(), f"--config {path}")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path}: expected a mapping of flags, such as `input: data.jsonl`")
    words = []
    for key, value in content.items():
        flag = f"--{key.removeprefix('--').replace('_', '-')}"
        if value is True and flag != "--enable-thinking":
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and (value is not False or flag == "--enable-thinking"):
            words.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def from_dataset_info(options: Options, directory: str | None) -> Options:
    """Apply LlamaFactoryInstructionHandler: --input names entries of `dataset_info.json` in --dataset-dir.

    Raises:
        UserError: a file or entry does not exist, or the entries need different handlers or columns.
    """
    if directory is None:
        raise UserError(
            "LlamaFactoryInstructionHandler: --dataset-dir is missing; give the directory of dataset_info.json"
        )
    folder = Path(directory).expanduser()
    path = folder / "dataset_info.json"
    known = read_object(path, "give the directory of LLaMA-Factory's dataset_info.json with --dataset-dir")
    entries: dict[str, Any] = {name.strip(): known.get(name.strip()) for name in options.input.split(",")}
    missing = [name for name, entry in entries.items() if not isinstance(entry, dict) or "file_name" not in entry]
    if missing:
        raise UserError(f"--input {missing[0]}: {path} describes no file under that name; it has {', '.join(known)}")
    kinds = [_kind(name, entry) for name, entry in entries.items()]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(f"--input {options.input}: their formats or columns differ in {path}; convert them one by one")
    handler, columns = kinds[0]
    chat = dataclasses.replace(options.chat, map_keys={**columns, **(options.chat.map_keys or {})})
    files = ",".join(str(folder / entry["file_name"]) for entry in entries.values())
    return dataclasses.replace(options, input=files, handler=handler, chat=chat)


def _kind(name: str, entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the handler of an entry, and its --map-keys."""
    formatting = entry.get("formatting", "alpaca")
    style = {"alpaca": "AlpacaStyle", "sharegpt": "SharegptStyle", "openai": "OpenAI"}.get(formatting)
    handler = f"{style}{'Pairwise' if entry.get('ranking') else 'Instruction'}Handler"
    if handler not in CHAT_HANDLERS:
        raise UserError(f"{name}: formatting {formatting!r} is not known here; expected alpaca, sharegpt or openai")
    columns = dict(entry.get("columns") or {})
    if entry.get("tags"):
        columns["tags"] = entry["tags"]
    return handler, columns
