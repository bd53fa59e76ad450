"""Benchmarks in the forms in which they are published, and scores that equal those computed by hand."""

from __future__ import annotations

import csv
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.engine import Corpus
from helpers.inference_models import open_model, run_inference, twin, write_model

from minimind_mcore.errors import UserError
from minimind_mcore.inference import evaluation, exact_match
from minimind_mcore.inference.benchmarks import BENCHMARKS, ChoiceQuestion, Subject, load_benchmark
from minimind_mcore.inference.generation import Completion, Generator
from minimind_mcore.inference.likelihood import Accuracy, Scorer
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inference.prompts import from_text
from minimind_mcore.inference.quality import Quality
from minimind_mcore.inference.results import EvaluationResults
from minimind_mcore.preprocess.indexed import IndexedWriter

# (question, choices, answer); with a comma, quotes and a line break, as real files have
ROWS = [
    ("aab, bc?", ["ab", "cd", 'e "f"', "gh"], 2),
    ("hgfe\nabcd", ["a", "bb", "ccc", "dddd"], 0),
    ("光合作用", ["abc", "bca", "cab", "光"], 3),
]
SHOTS = [("ff", ["a", "b", "c", "d"], 1), ("gg", ["d", "c", "b", "a"], 3)]
Rows = list[tuple[str, list[str], int]]


def write_csv(file: Path, header: list[str] | None, rows: list[list[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([*([header] if header else []), *rows])


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def ceval_csv(root: Path, split: str, subject: str, rows: Rows) -> None:
    explained = split == "dev"
    header = ["id", "question", "A", "B", "C", "D", "answer", *(["explanation"] if explained else [])]
    table = [[i, q, *c, "ABCD"[a], *(["because"] if explained else [])] for i, (q, c, a) in enumerate(rows)]
    write_csv(root / split / f"{subject}_{split}.csv", header, table)


def ceval_hub(root: Path, split: str, subject: str, rows: Rows) -> None:
    table = [
        {"id": i, "question": q, **dict(zip("ABCD", c, strict=True)), "answer": "ABCD"[a], "explanation": ""}
        for i, (q, c, a) in enumerate(rows)
    ]
    write_parquet(root / subject / f"{split}-00000-of-00001.parquet", table)


def cmmlu_csv(root: Path, split: str, subject: str, rows: Rows) -> None:
    table = [[i, q, *c, "ABCD"[a]] for i, (q, c, a) in enumerate(rows)]
    write_csv(
        root / {"val": "test"}.get(split, split) / f"{subject}.csv",
        ["", "Question", "A", "B", "C", "D", "Answer"],
        table,
    )


def mmlu_csv(root: Path, split: str, subject: str, rows: Rows) -> None:
    split = {"val": "test"}.get(split, split)
    write_csv(root / split / f"{subject}_{split}.csv", None, [[q, *c, "ABCD"[a]] for q, c, a in rows])


def mmlu_hub(root: Path, split: str, subject: str, rows: Rows) -> None:
    split = {"val": "test"}.get(split, split)
    table = [{"question": q, "subject": subject, "choices": c, "answer": a} for q, c, a in rows]
    for folder in (subject, "all"):
        write_parquet(root / folder / f"{split}-00000-of-00001.parquet", table)


def openbook_jsonl(root: Path, split: str, subject: str, rows: Rows) -> None:
    table = [
        {
            "id": str(i),
            "question": {"stem": q, "choices": [{"text": t, "label": n} for t, n in zip(c, "ABCD", strict=True)]},
            "answerKey": "ABCD"[a],
        }
        for i, (q, c, a) in enumerate(rows)
    ]
    write_jsonl(root / "Main" / f"{ {'val': 'test', 'dev': 'train'}[split] }.jsonl", table)


def openbook_hub(root: Path, split: str, subject: str, rows: Rows) -> None:
    table = [
        {"id": str(i), "question_stem": q, "choices": {"text": c, "label": list("ABCD")}, "answerKey": "ABCD"[a]}
        for i, (q, c, a) in enumerate(rows)
    ]
    for folder in ("main", "additional"):
        write_parquet(root / folder / f"{ {'val': 'test', 'dev': 'train'}[split] }-00000-of-00001.parquet", table)


FORMS: dict[str, tuple[str, Callable[[Path, str, str, Rows], None]]] = {
    "ceval csv": ("ceval", ceval_csv),
    "ceval hub": ("ceval", ceval_hub),
    "cmmlu csv": ("cmmlu", cmmlu_csv),
    "mmlu csv": ("mmlu", mmlu_csv),
    "mmlu hub": ("mmlu", mmlu_hub),
    "openbookqa jsonl": ("openbookqa", openbook_jsonl),
    "openbookqa hub": ("openbookqa", openbook_hub),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluate") / "model", "minimind3", corpus)


@pytest.fixture(scope="module")
def loaded(model: Path) -> Loaded:
    return open_model(model)


def by_hand(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Log-probability of a continuation, by transformers, one token after another."""
    ids = tokenizer(context + continuation)["input_ids"]
    first = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(probabilities[place - 1, ids[place]].item() for place in range(first, len(ids)))


@pytest.mark.parametrize("form", FORMS)
def test_published_forms_are_read(form: str, tmp_path: Path) -> None:
    name, write = FORMS[form]
    subjects = ["main"] if name == "openbookqa" else ["art_studies", "law"]
    for subject in subjects:
        write(tmp_path, "val", subject, ROWS)
        write(tmp_path, "dev", subject, SHOTS)
    found = load_benchmark(name, tmp_path, shots=2)
    assert [subject.name.lower() for subject in found] == subjects
    for subject in found:
        assert subject.questions == [ChoiceQuestion(q, tuple(c), a) for q, c, a in ROWS]
        assert subject.shots == [ChoiceQuestion(q, tuple(c), a) for q, c, a in SHOTS]
    split = tmp_path / BENCHMARKS[name].splits[0]
    if split.is_dir():  # as MindSpeed-LLM's flag names it
        assert load_benchmark(name, split, shots=2) == found


def test_prompts_are_those_of_the_harness() -> None:
    subject = Subject(
        "art_studies", [ChoiceQuestion(" q? ", ("1", "2", "3", "4"), 0)], [ChoiceQuestion("s", ("5", "6", "7", "8"), 3)]
    )
    assert BENCHMARKS["mmlu"].prompt(subject, subject.questions[0], 1) == (
        "The following are multiple choice questions (with answers) about art studies.\n\n"
        "s\nA. 5\nB. 6\nC. 7\nD. 8\nAnswer: D\n\n"
        "q?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert BENCHMARKS["ceval"].prompt(subject, subject.questions[0], 0).endswith("\nD. 4\n答案：")
    assert BENCHMARKS["openbookqa"].prompt(subject, subject.questions[0], 1) == "s 8\n\n q? "
    assert BENCHMARKS["openbookqa"].continuations(subject.questions[0]) == [" 1", " 2", " 3", " 4"]


@pytest.mark.parametrize(("name", "shots"), [("mmlu", 0), ("ceval", 2), ("openbookqa", 1)])
def test_accuracies_equal_those_computed_by_hand(name: str, shots: int, model: Path, loaded: Loaded) -> None:
    questions = [ChoiceQuestion(q * n, tuple(c), (a + n) % 4) for n in range(1, 8) for q, c, a in ROWS]
    subject = Subject("law", questions, [ChoiceQuestion(q, tuple(c), a) for q, c, a in SHOTS])
    benchmark, reference = BENCHMARKS[name], twin(model)
    right = by_length = 0
    for question in questions:
        context = benchmark.prompt(subject, question, shots)
        continuations = benchmark.continuations(question)
        scores = [by_hand(reference, loaded.tokenizer, context, text) for text in continuations]
        right += max(range(4), key=scores.__getitem__) == question.answer
        long = [score / (len(text) - 1) for score, text in zip(scores, continuations, strict=True)]
        by_length += max(range(4), key=long.__getitem__) == question.answer
    found = Scorer(loaded, batch=5).accuracy(benchmark, subject, shots)
    assert found == Accuracy(len(questions), right, by_length)
    assert 0 < right < len(questions)


def test_log_probabilities_equal_those_computed_by_hand(model: Path, loaded: Loaded) -> None:
    scorer, reference = Scorer(loaded, batch=2), twin(model)
    pairs = [("abcd", " A"), ("abcd", " B"), ("hgf abc ", "dd e"), ("a", " abcd hgfe")]
    found = dict(scorer.scores([scorer.encode(*pair) for pair in pairs]))
    expected = {
        n: by_hand(reference, loaded.tokenizer, c.rstrip(), " " * (len(c) - len(c.rstrip())) + t)
        for n, (c, t) in enumerate(pairs)
    }
    assert found == pytest.approx(expected, abs=1e-4)


def test_standard_error_is_that_of_a_mean() -> None:
    answers = [1.0] * 3 + [0.0] * 7
    deviation = torch.tensor(answers).std(unbiased=True).item()
    assert Accuracy(10, 3, 0).error == pytest.approx(deviation / math.sqrt(10))
    assert math.isnan(Accuracy(1, 1, 1).error)
    assert Accuracy(10, 3, 0) + Accuracy(5, 1, 2) == Accuracy(15, 4, 2)


@pytest.mark.parametrize("length", ["4", "64"])
def test_perplexity_equals_a_direct_computation(
    length: str, model: Path, loaded: Loaded, corpus: Corpus, tmp_path: Path
) -> None:
    texts = ["abcd hgfe abba", "光合作用 abc", "a", "gfed " * 9]
    rows = [[1, *loaded.tokenizer(text)["input_ids"], 2] for text in texts]
    write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    with IndexedWriter(tmp_path / "data_text_document") as writer:
        for row in rows:
            writer.add(torch.tensor(row).numpy(), torch.tensor([len(row)]).numpy())
    nats, reference = 0.0, twin(model)
    for row in rows:
        for start in range(0, len(row) - 1, int(length)):  # a window knows nothing of what lies before it
            piece = torch.tensor([row[start : start + int(length) + 1]])
            with torch.no_grad():
                logits = reference(piece[:, :-1]).logits[0].double()
            nats += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
    tokens, size = sum(len(row) - 1 for row in rows), sum(len(text.encode()) for text in texts)
    for data in ("text.jsonl", "data_text_document"):
        flags = ["--task", "perplexity", "--task-data-path", str(tmp_path / data), "--seq-length", length]
        evaluation.main(["--load", str(model), *flags, "--output-dir", str(tmp_path / "out")])
        found = json.loads((tmp_path / "out" / "scores.json").read_text())["perplexity"][str(tmp_path / data)]
        assert (found["tokens"], found["bytes"]) == (tokens, size)
        assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_results_are_a_table_a_file_and_a_picture(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for subject, rows in (("law", ROWS), ("art", ROWS[:2])):
        mmlu_csv(tmp_path / "mmlu", "test", subject, rows)
    openbook_jsonl(tmp_path / "obqa", "val", "main", ROWS)
    flags = ["--task", "mmlu", "openbookqa", "--task-data-path", str(tmp_path / "mmlu"), str(tmp_path / "obqa")]
    evaluation.main(["--load", str(model), *flags, "--output-dir", str(tmp_path / "out"), "--max-eval-samples", "2"])
    out, scores = capsys.readouterr().out, json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["accuracy"]["mmlu"]["all"]["questions"] == 4
    assert set(scores["accuracy"]["mmlu"]["subjects"]) == {"law", "art"}
    assert [line.split()[0] for line in out.splitlines()] == ["mmlu", "art", "law", "all", "openbookqa", "Main"]
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_the_harness_gets_the_model(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for lm-evaluation-harness: it is not among what the tests install."""
    seen: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        seen.update(options)
        return {"results": {"piqa": {"acc,none": 0.5}}}

    package: Any
    file: Any
    package, inner, file = (types.ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"))
    package.simple_evaluate, file.HFLM = simple_evaluate, lambda **options: options
    package.__spec__ = types.SimpleNamespace()
    for module in (package, inner, file):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    evaluation.main(["--load", str(model), "--harness", "piqa", "--num-fewshot", "3", "--output-dir", str(tmp_path)])
    assert (seen["tasks"], seen["num_fewshot"]) == (["piqa"], 3)
    assert type(seen["model"]["pretrained"]).__name__ == "Qwen3ForCausalLM"
    assert json.loads((tmp_path / "scores.json").read_text())["harness"] == {"piqa": {"acc,none": 0.5}}


def test_exact_match_counts_what_generation_gives(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions whose answer is what inference.py makes of them are right, others wrong; by task."""
    monkeypatch.setattr(Generator, "_room", lambda self, prompts: 20)  # random weights never end by themselves
    questions = [{"role": "user", "content": text} for text in ("abc", "hello there", "光合", "def", "1+1")]
    prompts = tmp_path / "prompts.jsonl"
    write_jsonl(prompts, [{"messages": [question]} for question in questions])
    said = run_inference(model, tmp_path / "said.jsonl", "--hf-chat-template", "--prompt-file", str(prompts))
    right = [True, False, True, True, False]
    rows = [
        {
            "messages": [question, {"role": "assistant", "content": "the reference is not shown"}],
            "answer": row["completion"] if is_right else row["completion"] + "?",
            "task": "one" if number < 3 else "two",
        }
        for number, (question, row, is_right) in enumerate(zip(questions, said, right, strict=True))
    ]
    file = tmp_path / "questions.jsonl"
    write_jsonl(file, rows)
    capsys.readouterr()
    words = ["--task", "exact_match", "--task-data-path", str(file), "--output-dir", str(tmp_path / "out")]
    evaluation.main(["--load", str(model), *words, "--evaluation-batch-size", "2"])
    printed = capsys.readouterr().out
    assert "66.67%" in printed and "50.00%" in printed and "by length" not in printed
    assert printed.count("one, right") == 2 and printed.count("two, wrong") == 1
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["accuracy"]["exact_match"]
    assert {name: row["accuracy"] for name, row in scores["subjects"].items()} == {"one": 2 / 3, "two": 0.5}
    written = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["right"] for row in written] == right
    assert [row["completion"] for row in written] == [row["completion"] for row in said]
    assert (tmp_path / "out" / "scores.png").stat().st_size > 1000


def test_quality_equals_that_of_transformers_replies(model: Path, loaded: Loaded, tmp_path: Path) -> None:
    """Greedy replies of transformers, each n-gram looked for among those before it; two prompts at a time here."""
    texts, limit = ["abc", "hello there", "光合"], 24
    write_jsonl(tmp_path / "prompts.jsonl", [{"text": text} for text in texts])
    flags = ["--task", "quality", "--task-data-path", str(tmp_path / "prompts.jsonl"), "--raw"]
    flags += ["--max-new-tokens", str(limit), "--evaluation-batch-size", "2", "--output-dir", str(tmp_path / "out")]
    evaluation.main(["--load", str(model), *flags])
    reference, stop = twin(model), loaded.tokenizer.eos_token_id
    rates, ended, tokens = [], 0, 0
    for text in texts:
        ids = torch.tensor([[loaded.tokenizer.bos_token_id, *loaded.tokenizer(text)["input_ids"]]])
        reply = reference.generate(ids, max_new_tokens=limit, do_sample=False, eos_token_id=stop)[
            0, ids.shape[1] :
        ].tolist()
        ended += stop in reply
        reply = [token for token in reply if token != stop]
        grams = [reply[start : start + 4] for start in range(len(reply) - 3)]
        rates.append(sum(gram in grams[:place] for place, gram in enumerate(grams)) / len(grams))
        tokens += len(reply)
    [found] = json.loads((tmp_path / "out" / "scores.json").read_text())["quality"].values()
    assert found == {"replies": 3, "repetition_4gram": pytest.approx(sum(rates) / 3), "ended": ended / 3,
                     "tokens_per_reply": tokens / 3}  # fmt: skip
    assert sum(rates) > 0


def test_answers_of_several_files_are_counted_together() -> None:
    """A task that is in both, as without `task` in files of one name."""
    scores, question = EvaluationResults({}), exact_match.Question("addition", from_text("1+1"), "2")
    for said in (["2", "3", "2"], ["4"]):
        scores.add_answers("exact_match", [exact_match.Answered(question, text) for text in said])
    assert scores.accuracies == {"exact_match": {"addition": Accuracy(4, 2)}}


def test_an_answer_of_many_tokens_can_be_right(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a model that knows all answers, each with the token that ends it, and writes as much as it is allowed to."""
    questions = [exact_match.Question("t", from_text(str(n)), " ".join(["abcd"] * n)) for n in (1, 400)]
    known = [loaded.tokenizer(q.answer)["input_ids"] + [loaded.tokenizer.eos_token_id] for q in questions]
    assert len(known[1]) > exact_match.LONGEST

    def complete(self: Generator, prompts: list[list[int]]) -> list[Completion]:
        cut = [ids[: self.max_new_tokens] for ids in known]
        return [Completion([i for i in ids if i not in self.stop], ids[-1] in self.stop) for ids in cut]

    monkeypatch.setattr(Generator, "complete", complete)
    assert [answered.right for answered in exact_match.ask(loaded, questions, 2, Quality())] == [True, True]


def test_a_missing_harness_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="lm-evaluation-harness is not installed"):
        evaluation.main(["--load", str(model), "--harness", "piqa"])


def broken(tmp_path: Path, content: str, encoding: str = "utf-8") -> Path:
    file = tmp_path / "test" / "law_test.csv"
    file.parent.mkdir(exist_ok=True)
    file.write_text(content, encoding=encoding)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"law_test.csv: no questions in it"),
        ("q,a,b,c,d,A\nq,a,b,c,A\n", r"law_test.csv, line 2: expected 6 columns"),
        ("q,a,b,c,d,A\nq,a,b,c,d,A,x\n", r"law_test.csv, line 2: expected 6 columns"),
        ("q,a,b,c,d,E\n", r"law_test.csv, line 1: not a question of this benchmark .*'E', expected one of A, B, C, D"),
        ("q,a,b,c,d,A\nq,a,b,c,d,\n", r"law_test.csv, line 2: not a question of this benchmark .*'', expected one of"),
        ("q,a,b,c,d,A\n" + "q" * 200_000, r"law_test.csv, line 2: not a readable CSV file \(field larger than"),
        ("q,a,b,c,d,BC\n", r"law_test.csv, line 1: not a question of this benchmark .*'BC', expected one of"),
    ],
)
def test_a_bad_file_is_an_error(content: str, message: str, model: Path, tmp_path: Path) -> None:
    path = broken(tmp_path, content)
    with pytest.raises(UserError, match=message):
        evaluation.main(["--load", str(model), "--task", "mmlu", "--task-data-path", str(path)])


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"law_test.csv: not in UTF-8 .*iconv -f GBK -t UTF-8"):
        load_benchmark("mmlu", broken(tmp_path, "光合作用,a,b,c,d,A\n", encoding="gbk"), 0)


def test_faults_are_named(model: Path, tmp_path: Path) -> None:
    path = str(broken(tmp_path, "q,a,b,c,d,A\n"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    (tmp_path / "nothing.jsonl").write_text("")
    for flags, message in (
        (
            ["--task", "mmul", "--task-data-path", path],
            "--task mmul: expected ceval, cmmlu, mmlu, openbookqa, exact_match, toolcall, quality, perplexity",
        ),
        (
            ["--task", "mmlu", "perplexity", "mmlu", "--task-data-path", path, "text.jsonl", "/elsewhere"],
            "--task: mmlu is given more than once; evaluate each of its folders in a run of its own",
        ),
        (
            ["--task", "exact_match", "exact_match", "--task-data-path", "a.jsonl", "a.jsonl"],
            "--task: exact_match is given more than once with a.jsonl",
        ),
        (
            ["--task", "mmlu", "--task-data-path", path, "--max-eval-samples", "0"],
            "--max-eval-samples: found 0, expected 1",
        ),
        (["--task", "mmlu"], "--task has 1 names, --task-data-path 0 paths"),
        ([], "--task is missing"),
        (["--task", "mmlu", "--task-data-path", "/nowhere"], "/nowhere: no such directory"),
        (["--task", "mmlu", "--task-data-path", str(tmp_path / "empty")], "found no test split of mmlu there"),
        (["--task", "mmlu", "--task-data-path", path, "--num-fewshot", "5"], "mmlu, law: --num-fewshot 5, but dev has"),
        (["--task", "perplexity", "--task-data-path", str(tmp_path / "text.jsonl")], "text.jsonl, record 2: expected"),
        (["--task", "perplexity", "--task-data-path", str(tmp_path / "nothing.jsonl")], "no tokens to predict"),
        (["--task", "perplexity", "--task-data-path", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--task", "exact_match", "--task-data-path", str(tmp_path / "text.jsonl")], "record 1: expected an 'answer'"),
        (["--task", "exact_match", "--task-data-path", str(tmp_path / "nothing.jsonl")], "no question there"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.main(["--load", str(model), *flags])


def test_a_question_in_two_forms_counts_once(tmp_path: Path) -> None:
    mmlu_csv(tmp_path, "val", "law", ROWS)
    mmlu_hub(tmp_path, "val", "law", ROWS)
    with pytest.raises(UserError, match="law exists more than once"):
        load_benchmark("mmlu", tmp_path, 0)
