"""evaluation.py: benchmarks from local files, exact match, perplexity and bits per byte, with MindSpeed-LLM's flags.

    python evaluation.py --load minimind-3 --task ceval cmmlu --task-data-path data/ceval data/cmmlu --num-fewshot 5
    python evaluation.py --load outputs/minimind3/checkpoints --task perplexity --task-data-path held_out.jsonl

Benchmarks are scored by log-probabilities (see `benchmarks.py`), so no answer is parsed. A damaged file or a question
that cannot be scored ends the program with an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minimind_mcore.errors import UserError
from minimind_mcore.inference import flags
from minimind_mcore.inference.benchmarks import BENCHMARKS, Subject, load_benchmark
from minimind_mcore.inference.exact_match import ask, read_questions
from minimind_mcore.inference.likelihood import Accuracy, Scorer
from minimind_mcore.inference.loading import Loaded, opened, start
from minimind_mcore.inference.prompts import read_prompts
from minimind_mcore.inference.quality import Quality, measure
from minimind_mcore.inference.results import EvaluationResults
from minimind_mcore.inference.toolcall import TOOLCALL, Api, Local, evaluate, read_cases
from minimind_mcore.preprocess.check import quick_check
from minimind_mcore.preprocess.indexed import Column, idx_path
from minimind_mcore.preprocess.readers import sound_records
from minimind_mcore.tools.cases import Case

KEY = "text"
Document = tuple[list[int], int]


def documents(path: str, loaded: Loaded) -> Iterator[Document]:
    """Yield the ids of each document, including bos and eos, and the number of bytes of its text.

    Args:
        path: files as for preprocess_data.py (.jsonl with `text`, .txt, .parquet), or the prefix of a dataset.
        loaded: model and tokenizer.

    Raises:
        UserError: the path does not exist, a record has no text, or the ids belong to another tokenizer.
    """
    yield from _of_dataset(path, loaded) if idx_path(path).is_file() else _of_files(path, loaded)


def _of_files(path: str, loaded: Loaded) -> Iterator[Document]:
    tokenizer: Any = loaded.tokenizer
    before, after = loaded.info.frame()
    for where, record in sound_records(path, [KEY]):
        text = record.get(KEY) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{where}: expected an object with a {KEY!r} that is a text")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield [*before, *ids, *after], len(text.encode())


def _of_dataset(prefix: str, loaded: Loaded) -> Iterator[Document]:
    quick_check(prefix, loaded.info.fingerprint)
    column = Column(prefix)
    for number in range(len(column)):
        ids = column[number].tolist()
        if max(ids) >= loaded.config.vocab_size or min(ids) < 0:
            raise UserError(f"{prefix}: an id of {max(ids)}, but the model has {loaded.config.vocab_size}")
        yield ids, len(loaded.tokenizer.decode(ids, skip_special_tokens=True).encode())


def run_harness(loaded: Loaded, tasks: Sequence[str], shots: int, batch: int, limit: int | None) -> dict[str, Any]:
    """Return the results of lm-evaluation-harness by task.

    Raises:
        UserError: lm-evaluation-harness is not installed.
    """
    require_harness()
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch)
    found = lm_eval.simple_evaluate(model=model, tasks=list(tasks), num_fewshot=shots, limit=limit)
    results: dict[str, Any] = found["results"]
    return results


def require_harness() -> None:
    """Raise a `UserError` unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--harness: lm-evaluation-harness is not installed (pip install lm-eval); C-Eval, CMMLU, MMLU, OpenBookQA "
            "and perplexity run without it, by --task"
        )


PROGRAM = "evaluation.py"
EXACT_MATCH, PERPLEXITY, QUALITY = "exact_match", "perplexity", "quality"
KNOWN = (*BENCHMARKS, EXACT_MATCH, TOOLCALL, QUALITY, PERPLEXITY)  # tasks
LENGTH = 2048
USED = frozenset("task task_data_path evaluation_batch_size max_eval_samples seq_length max_new_tokens".split())
# Sampling flags have no effect, because answers are greedy.
IGNORED = frozenset("no_chat_template temperature top_k top_p greedy eval_language".split())


def main(argv: Sequence[str] | None = None) -> None:
    """The program evaluation.py."""
    words = sys.argv[1:] if argv is None else argv
    # The batch size does not change the result.
    args = flags.parse(words, PROGRAM, USED, IGNORED, evaluation_batch_size=16, max_new_tokens=256)
    if args.harness:
        require_harness()
    tasks = _tasks(args)
    # The files are read before the model, so that faults in them are reported at once.
    subjects = {name: _subjects(args, name, path) for name, path in tasks if name in BENCHMARKS}
    questions = {path: read_questions(path)[: args.max_eval_samples] for name, path in tasks if name == EXACT_MATCH}
    cases = {path: read_cases(path, args.seed)[: args.max_eval_samples] for name, path in tasks if name == TOOLCALL}
    prompts = {path: read_prompts([], path)[: args.max_eval_samples] for name, path in tasks if name == QUALITY}
    if args.backend == "api":
        _evaluate_api(args, cases)
        return
    source, info = opened(args)
    if args.dry_run:
        print("a dry run: everything is valid, nothing was evaluated", flush=True)
        return
    loaded = start(source, info)
    batch, limit = args.evaluation_batch_size, args.max_eval_samples
    scorer = Scorer(loaded, batch)
    about = {"model": str(args.load), "kind": loaded.kind, "dtype": loaded.dtype, "num_fewshot": args.num_fewshot}
    scores = EvaluationResults(about | {"tokenizer_fingerprint": loaded.info.fingerprint})
    for name, path in tasks:
        if name in BENCHMARKS:
            scores.accuracies[name] = _run(scorer, name, subjects[name], args.num_fewshot)
        elif name == EXACT_MATCH:
            quality = scores.quality.setdefault(name, Quality())
            scores.add_answers(name, ask(loaded, questions[path], batch, quality))
        elif name == TOOLCALL:
            local = Local(loaded, args.max_new_tokens)
            outcomes, scores.quality[f"{name} {path}"] = evaluate(local, cases[path], batch, args.seed)
            scores.add_outcomes(outcomes)
        elif name == QUALITY:
            scores.quality[path] = measure(loaded, prompts[path], args.max_new_tokens, batch, args.raw)
        else:
            length = args.seq_length or min(LENGTH, loaded.config.max_position_embeddings - 1)
            held_out = tqdm(documents(path, loaded), desc=PERPLEXITY, unit="document", disable=None)
            scores.perplexities[path] = scorer.perplexity(held_out, length)
    if args.harness:
        scores.harness = run_harness(loaded, args.harness, args.num_fewshot, batch, limit)
    print(scores.table(), flush=True)
    if args.output_dir:
        scores.write(Path(args.output_dir))


def _evaluate_api(args: argparse.Namespace, cases: dict[str, list[Case]]) -> None:
    """Evaluate the tool calls of a model behind an API.

    Raises:
        UserError: the task is not toolcall, or --api-model is missing.
    """
    if set(args.task) != {TOOLCALL} or not args.api_model:
        raise UserError(f"--backend api: expected --task {TOOLCALL} and --api-model, the name that the server knows")
    if args.dry_run:
        print("a dry run: everything is valid, nothing was evaluated", flush=True)
        return
    key = args.api_key or os.environ.get("API_KEY") or "none"  # the variable is not visible in process lists
    api = Api(args.api_base_url, key, args.api_model, args.max_new_tokens, args.seed)
    scores = EvaluationResults({"model": args.api_model, "api_base_url": args.api_base_url})
    for path, listed in cases.items():
        outcomes, scores.quality[f"{TOOLCALL} {path}"] = evaluate(api, listed, args.evaluation_batch_size, args.seed)
        scores.add_outcomes(outcomes)
    print(scores.table(), flush=True)
    if args.output_dir:
        scores.write(Path(args.output_dir))


def _tasks(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the tasks, each with its path.

    Raises:
        UserError: no task is given, a task is unknown, or the numbers of tasks and paths differ.
    """
    if not args.task and not args.harness:
        raise UserError(f"--task is missing: expected {', '.join(KNOWN)}; or --harness")
    return paired(args.task or [], args.task_data_path)


def paired(names: Sequence[str], paths: Sequence[str]) -> list[tuple[str, str]]:
    """Return tasks, each with its path.

    Raises:
        UserError: a task is unknown, or the numbers of tasks and paths differ.
    """
    if unknown := [name for name in names if name not in KNOWN]:
        raise UserError(f"--task {' '.join(unknown)}: expected {', '.join(KNOWN)}")
    if len(names) != len(paths):
        raise UserError(f"--task has {len(names)} names, --task-data-path {len(paths)} paths; expected one for each")
    tasks = list(zip(names, paths, strict=True))
    for name, path in tasks:
        if name in BENCHMARKS and names.count(name) > 1:
            raise UserError(f"--task: {name} is given more than once; evaluate each of its folders in a run of its own")
        if tasks.count((name, path)) > 1:
            raise UserError(f"--task: {name} is given more than once with {path}; give it once")
    return tasks


def _subjects(args: argparse.Namespace, name: str, path: str) -> list[Subject]:
    subjects = load_benchmark(name, Path(path), args.num_fewshot)
    limit = args.max_eval_samples
    return [replace(subject, questions=subject.questions[:limit]) for subject in subjects]


def _run(scorer: Scorer, name: str, subjects: Sequence[Subject], shots: int) -> dict[str, Accuracy]:
    """Return the accuracies of a benchmark, by subject."""
    found = {}
    with tqdm(total=sum(len(s.questions) for s in subjects), desc=name, unit="question", disable=None) as bar:
        for subject in subjects:
            found[subject.name] = scorer.accuracy(BENCHMARKS[name], subject, shots)
            bar.update(len(subject.questions))
    return found
