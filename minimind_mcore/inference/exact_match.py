"""Questions with one right answer: the model answers in the chat template, and exact matches count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minimind_mcore.errors import UserError
from minimind_mcore.inference.generation import Generator
from minimind_mcore.inference.loading import Loaded
from minimind_mcore.inference.prompts import Prompt, PromptEncoder, records
from minimind_mcore.inference.quality import Quality
from minimind_mcore.inference.sampling import SamplingParams

# Questions whose answer is one text: the model answers in the chat template, greedily, and every character counts.
# Files: {"conversations": [{"role": "user", "content": "17+25=?"}, ...], "answer": "17+25=42", "task": "addition"}.
# `messages` may stand for `conversations`; an answer of the assistant at the end is left out; without `task` all
# questions belong to one. `python -m minimind_mcore.preprocess.corpus --kind sft --held-out` makes such files.
LONGEST = 64  # tokens of a completion, or as many as the longest answer needs


@dataclass(frozen=True)
class Question:
    """A question with its only answer; `task` is its kind."""

    task: str
    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Answered:
    """A question and what the model said."""

    question: Question
    completion: str

    @property
    def right(self) -> bool:
        """White space around an answer does not count."""
        return self.completion.strip() == self.question.answer.strip()

    def row(self) -> dict[str, Any]:
        """For a file."""
        shown = {"task": self.question.task, "messages": self.question.prompt.messages}
        return {**shown, "answer": self.question.answer, "completion": self.completion, "right": self.right}


def read_questions(path: str) -> list[Question]:
    """The questions of a jsonl file.

    Raises:
        UserError: no such file, or a record without question or answer.
    """
    questions = []
    for where, record, prompt in records(path, used=("answer", "task")):
        answer, task = record.get("answer"), record.get("task", Path(path).stem)
        if not isinstance(answer, str) or not isinstance(task, str):
            raise UserError(f"{where}: expected an 'answer' that is a text, and a 'task' that is one or absent")
        questions.append(Question(task, prompt, answer))
    if not questions:
        raise UserError(f"{path}: no question there")
    return questions


def ask(loaded: Loaded, questions: Sequence[Question], batch_size: int, quality: Quality) -> list[Answered]:
    """Let the model answer all questions. `quality` counts the replies."""
    answers = loaded.tokenizer([question.answer for question in questions], add_special_tokens=False)["input_ids"]
    longest = max(LONGEST, *(len(ids) + 1 for ids in answers))  # one for the end
    generator = Generator(loaded, SamplingParams(temperature=0), longest)
    encoder = PromptEncoder(loaded.tokenizer, raw=False)
    answered = []
    with tqdm(total=len(questions), desc="exact_match", unit="question", disable=None) as bar:
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            completions = generator.complete([encoder(question.prompt) for question in batch])
            for question, completion in zip(batch, completions, strict=True):
                text = loaded.tokenizer.decode(completion.ids, skip_special_tokens=True)
                answered.append(Answered(question, text))
                quality.add(completion.ids, completion.finished)
            bar.update(len(batch))
    return answered
