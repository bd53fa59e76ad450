"""Questions with a single right answer: the model answers in the chat template, and exact matches count."""

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

# The model answers greedily in the chat template, and the answer must match in every character.
# Files: {"conversations": [{"role": "user", "content": "17+25=?"}, ...], "answer": "17+25=42", "task": "addition"}.
# `messages` can replace `conversations`. An answer of the assistant at the end is ignored. Without `task` all
# questions belong to one task. `python -m minimind_mcore.preprocess.corpus --kind sft --held-out` writes such files.
LONGEST = 64  # minimum of the token limit, which grows with the longest answer


@dataclass(frozen=True)
class Question:
    """A question with its only right answer and its task."""

    task: str
    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Answered:
    """A question and the model's answer."""

    question: Question
    completion: str

    @property
    def right(self) -> bool:
        """Whether the answer is right. White space around it is ignored."""
        return self.completion.strip() == self.question.answer.strip()

    def row(self) -> dict[str, Any]:
        """Return a line for answers.jsonl."""
        shown = {"task": self.question.task, "messages": self.question.prompt.messages}
        return {**shown, "answer": self.question.answer, "completion": self.completion, "right": self.right}


def read_questions(path: str) -> list[Question]:
    """Read the questions of a jsonl file.

    Raises:
        UserError: the file does not exist, or a record has no question or no answer.
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
    """Generate the answers to all questions. `quality` collects the replies."""
    answers = loaded.tokenizer([question.answer for question in questions], add_special_tokens=False)["input_ids"]
    longest = max(LONGEST, *(len(ids) + 1 for ids in answers))  # one more for the end token
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
