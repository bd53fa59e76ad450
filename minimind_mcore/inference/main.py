"""inference.py: greedy decoding, sampling, beam search and chat, with MindSpeed-LLM's flags.

python inference.py --load outputs/minimind3/checkpoints --prompt "1 + 1 =" --raw
python inference.py --load minimind-3 --task do_sample --hf-chat-template --prompt-file prompts.jsonl --output out.jsonl
python inference.py --load out/full_sft_768.pth --tokenizer-name-or-path tokenizer --task chat
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minimind_mcore.checkpoint.source import Source
from minimind_mcore.errors import UserError
from minimind_mcore.inference import chat, flags
from minimind_mcore.inference.generation import Generator
from minimind_mcore.inference.loading import load_tokenizer, opened, start
from minimind_mcore.inference.prompts import Prompt, PromptEncoder, read_prompts
from minimind_mcore.inference.sampling import SamplingParams
from minimind_mcore.inference.vllm_engine import VLLMGenerator, require_vllm, start_vllm
from minimind_mcore.preprocess.templates import Settings, SlotTemplate, template_entry
from minimind_mcore.preprocess.tokenize import TokenizerInfo
from minimind_mcore.storage import atomic_file
from minimind_mcore.tools.registry import open_tools

logger = logging.getLogger(__name__)

PROGRAM = "inference.py"
TASKS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat")
BEAMS = 2  # as in MindSpeed-LLM
USED = frozenset(
    "task max_new_tokens temperature top_k top_p history_turns hf_chat_template add_eos_token enable_thinking "
    "prompt_type prompt_type_path".split()
)


def main(argv: Sequence[str] | None = None) -> None:
    """The program inference.py."""
    args = flags.parse(sys.argv[1:] if argv is None else argv, PROGRAM, USED)
    tasks = _tasks(args)
    raw = _is_raw(args, tasks)
    toolbox = open_tools(args.tools) if args.tools else None
    tools = list(toolbox.definitions) if toolbox else None
    if args.engine == "vllm":
        require_vllm(tasks)
    prompts = (
        [] if args.dry_run or tasks == ["chat"] else read_prompts(args.prompt, args.prompt_file, args.system, tools)
    )
    source, info = opened(args)
    tokenizer = load_tokenizer(info)
    template = _template(args, tokenizer)
    encoder = PromptEncoder(tokenizer, raw, args.enable_thinking, template)
    stop = stop_ids(tokenizer, [*args.add_eos_token, *(template.stop_words if template else [])])
    if args.dry_run:
        print("a dry run: everything is valid, nothing was generated", flush=True)
        return
    with (
        toolbox or contextlib.nullcontext(),
        atomic_file(args.output) if args.output else contextlib.nullcontext() as output,
        _engine(args.engine, source, info) as engine,
    ):
        for task in tasks:
            beams = {"num_beams": BEAMS} if task.startswith("beam_search") else {}
            generator = engine(sampling(args, task), args.max_new_tokens, stop, **beams)
            if task == "chat":
                # A pretrained model has seen only single texts, so it gets no earlier turns.
                chat.run(generator, encoder, chat.Session(0 if raw else args.history_turns, args.system, toolbox))
            else:
                generate(generator, encoder, prompts, args.prompt_batch_size, task, output)


@contextlib.contextmanager
def _engine(name: str, source: Source, info: TokenizerInfo) -> Iterator[Callable[..., Any]]:
    """Yield the constructor of generators that share one model."""
    if name == "vllm":
        with start_vllm(source, Path(info.path)) as engine:
            yield functools.partial(VLLMGenerator, engine)
    else:
        yield functools.partial(Generator, start(source, info))


def _tasks(args: argparse.Namespace) -> list[str]:
    """Return the requested tasks.

    Raises:
        UserError: a task is unknown.
    """
    tasks: list[str] = args.task or ["greedy"]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"--task {' '.join(unknown)}: expected {', '.join(TASKS)}")
    return tasks


def _is_raw(args: argparse.Namespace, tasks: Sequence[str]) -> bool:
    """Return whether prompts are used without a template.

    Raises:
        UserError: several prompt formats are requested.
    """
    ways = {"--raw": args.raw, "--hf-chat-template": args.hf_chat_template, "--prompt-type": args.prompt_type}
    chosen = [flag for flag, is_given in ways.items() if is_given]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: each says how prompts are written; give one")
    return args.raw or not (chosen or "chat" in tasks)


def _template(args: argparse.Namespace, tokenizer: Any) -> SlotTemplate | None:
    """Return the template of `--prompt-type`, as preprocess_data.py uses it.

    Raises:
        UserError: the template is unknown.
    """
    if args.prompt_type is None:
        return None
    entry = template_entry(args.prompt_type.strip(), args.prompt_type_path)
    settings = Settings(tokenizer.bos_token or "", tokenizer.eos_token, thinking=args.enable_thinking)
    return SlotTemplate(entry, settings)


def sampling(args: argparse.Namespace, task: str) -> SamplingParams:
    """Return the sampling parameters of a task."""
    samples = task in ("do_sample", "beam_search_with_sampling", "chat")
    return SamplingParams(
        temperature=args.temperature if samples else 0.0,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def stop_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Return the ids that end a completion: eos, and those of `--add-eos-token`.

    Raises:
        UserError: a word is not a single token.
    """
    found = [tokenizer.eos_token_id]
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(f"--add-eos-token {word}: the tokenizer makes {len(ids)} tokens of it, expected one")
        found += ids
    return found


def generate(
    generator: Generator | VLLMGenerator,
    encoder: PromptEncoder,
    prompts: Sequence[Prompt],
    batch_size: int,
    task: str,
    output: Any,
) -> None:
    """Complete all prompts. Texts go to stdout and to `output`, the speed to stderr."""
    began, new_tokens = time.perf_counter(), 0
    encoded = [encoder(prompt) for prompt in prompts]
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        completions = generator.complete(encoded[first : first + batch_size])
        for prompt, completion in zip(batch, completions, strict=True):
            text = encoder.tokenizer.decode(completion.ids, skip_special_tokens=True)
            print(f"[{task}] {prompt.text}\n{text}\n", flush=True)
            new_tokens += len(completion.ids) + completion.finished
            if output is not None:
                row = {"task": task, "messages": prompt.messages, "completion": text}
                row |= {"tokens": len(completion.ids), "finished": completion.finished}
                output.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    seconds = time.perf_counter() - began
    logger.info(
        f"{task}: {len(prompts)} prompts, {new_tokens} tokens in {seconds:.2f} s, {new_tokens / seconds:,.1f} tokens/s"
    )
