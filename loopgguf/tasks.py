"""Tasks with right answers, from a JSONL file: how many of them a model gets right, and how many its reference does.

Two kinds, one a file. Multiple choice, `{"context": …, "choices": […], "answer": index}`: the model chooses the choice
with the largest ln p per character after the context, which is lm-evaluation-harness's `acc_norm`. Last word,
`{"text": …}`: right when every token of the last word is the likeliest one, as LAMBADA is scored. Texts are taken as
they stand: no template, no special tokens, no few-shot examples, no blank between context and choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from loopgguf.container import read_shards
from loopgguf.documents import parse_json, read_whole
from loopgguf.errors import InputError, QualityError
from loopgguf.evaluation import Measure, log_softmax, mean_measure, proportion_percent
from loopgguf.llama import Context, Model
from loopgguf.progress import Progress

Flags = NDArray[np.bool_]

MAX_TASK_BYTES = 256 << 20


class Kind(StrEnum):
    """What the rows of a task ask for."""

    MULTIPLE_CHOICE = "multiple choice"
    LAST_WORD = "last word"


_KEYS: Mapping[Kind, frozenset[str]] = {Kind.MULTIPLE_CHOICE: frozenset({"context", "choices", "answer"}), Kind.LAST_WORD: frozenset({"text"})}
_EXPECTED = "an object with context, choices and answer, or with text"


@dataclass(frozen=True)
class Item:
    """One question; of a last word, that word is the only choice, with the blank before it."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """The questions of one file."""

    name: str
    kind: Kind
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Accuracy:
    """Right answers in percent with their standard error, and the difference from the reference's, paired over questions."""

    accuracy_percent: Measure
    difference_percent: Measure


@dataclass(frozen=True)
class TaskResult:
    """How the reference and each candidate, in the order they were given, did in a task."""

    name: str
    kind: Kind
    n_items: int
    reference_percent: Measure
    accuracies: tuple[Accuracy, ...]


# --- reading ----------------------------------------------------------------------------------------------------------


def _refuse(where: str, got: object, expected: str) -> NoReturn:
    raise InputError(f"{where}: got {got!r:.120}, expected {expected}. Correct the file")


def _is_text(value: object) -> bool:
    """Tell whether a value is text that can be tokenized (JSON can spell lone surrogates)."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value


def _multiple_choice(row: dict[str, object], where: str) -> Item:
    context, choices, answer = row["context"], row["choices"], row["answer"]
    if not isinstance(context, str) or not _is_text(context):
        _refuse(f"context in {where}", context, "a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(choice and _is_text(choice) for choice in choices):
        _refuse(f"choices in {where}", choices, "two or more texts that are not empty")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        _refuse(f"answer in {where}", answer, f"the index of a choice, 0 to {len(choices) - 1}")
    return Item(context, tuple(choices), answer)


def _last_word(row: dict[str, object], where: str) -> Item:
    text = row["text"]
    match = re.fullmatch(r"(.*\S)(\s+\S+)", text.strip(), re.DOTALL) if isinstance(text, str) and _is_text(text) else None
    if match is None:
        _refuse(f"text in {where}", text, "a text of two or more words")
    return Item(match[1], (match[2],), 0)


def _parse_row(line: str, where: str) -> tuple[Kind, Item]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: got {error!s:.120}, expected {_EXPECTED}. Correct the file") from error
    if not isinstance(row, dict):
        _refuse(where, row, _EXPECTED)
    kind = next((kind for kind, keys in _KEYS.items() if keys <= row.keys()), None)
    if kind is None:
        _refuse(f"keys of {where}", ", ".join(map(str, row)), _EXPECTED)
    return kind, (_multiple_choice if kind is Kind.MULTIPLE_CHOICE else _last_word)(row, where)


def load_task(path: Path) -> Task:
    """Return the task in a JSONL file; empty lines are passed over, keys that are not asked for are ignored.

    Raises InputError naming the line for what is no question, for kinds that are mixed, and for a file without any.
    """
    try:
        lines = read_whole(path, MAX_TASK_BYTES).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"text of {path}: got a byte that is not UTF-8 at {error.start}, expected JSON lines in UTF-8. Convert the file") from error
    rows = [(number, *_parse_row(line, f"line {number} of {path}")) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"task {path}: got no questions, expected a line of JSON for each. Check the file")
    for number, kind, _ in rows:
        if kind is not rows[0][1]:
            _refuse(f"line {number} of {path}", kind.value, f"{rows[0][1].value} as in the first line")
    return Task(path.name, rows[0][1], tuple(item for _, _, item in rows))


# --- answering --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Continuation:
    """Tokens of a context and a choice; those from `start` are the choice's."""

    tokens: list[int]
    start: int


def _tokenize(model: Model, text: str) -> list[int]:
    tokens = model.tokenize(text)
    return tokens[:-1] if tokens and tokens[-1] == model.eos else tokens  # some vocabularies end every text


def _continuation(model: Model, context: str, choice: str) -> _Continuation:
    """Return both tokenized together, as a text that was read would be; a token across the border counts as the choice's."""
    alone, tokens = _tokenize(model, context), _tokenize(model, context + choice)
    n_same = next((i for i, (a, b) in enumerate(zip(alone, tokens, strict=False)) if a != b), min(len(alone), len(tokens)))
    return _Continuation(tokens, max(1, min(n_same, len(tokens) - 1)))  # the first token has nothing to be foretold from


def _prepare(task: Task, reference: Path) -> list[list[_Continuation]]:
    """Return each question's choices as tokens. Raises InputError for a question that does not fit the model's context."""
    metadata = read_shards(reference)[0].metadata
    key = f"{metadata['general.architecture'].data}.context_length"
    limit = int(str(metadata[key].data)) if key in metadata else None
    with Model(reference, vocab_only=True) as model:
        prepared = [[_continuation(model, item.context, choice) for choice in item.choices] for item in task.items]
    for number, continuations in enumerate(prepared, 1):
        longest, shortest = (pick(len(c.tokens) for c in continuations) for pick in (max, min))
        if shortest < 2:
            raise InputError(f"question {number} of {task.name}: got {shortest} token, expected at least two, one to foretell the other. Leave it out")
        if limit is not None and longest > limit:
            raise InputError(f"question {number} of {task.name}: got {longest} tokens, expected at most the {limit} of the model's context. Leave it out")
    return prepared


def _is_right(context: Context, item: Item, continuations: Sequence[_Continuation], kind: Kind, where: str) -> bool:
    scores = []
    for choice, continuation in zip(item.choices, continuations, strict=True):
        targets = np.array(continuation.tokens[continuation.start :])
        logits = context.decode(continuation.tokens, first_logits=continuation.start - 1)[:-1]
        if not np.isfinite(logits).all():
            raise QualityError(f"logits of {where}: got NaN or infinity, expected finite numbers. Its weights are damaged or out of range")
        if kind is Kind.LAST_WORD:
            return bool((logits.argmax(axis=1) == targets).all())
        scores.append(float(log_softmax(logits)[np.arange(len(targets)), targets].sum()) / len(choice))
    return int(np.argmax(scores)) == item.answer


def answer_task(path: Path, task: Task, prepared: Sequence[Sequence[_Continuation]], n_threads: int, tell: Callable[[], None]) -> Flags:
    """Return which questions the GGUF at `path` gets right; `tell` is called after each."""
    n_ctx = max(len(continuation.tokens) for continuations in prepared for continuation in continuations)
    right = np.zeros(len(task.items), np.bool_)
    with Model(path) as model, Context(model, n_ctx, n_threads=n_threads) as context:
        for i, (item, continuations) in enumerate(zip(task.items, prepared, strict=True)):
            right[i] = _is_right(context, item, continuations, task.kind, f"{path} in question {i + 1} of {task.name}")
            tell()
    return right


def measure_task(task: Task, candidates: Sequence[Path], reference: Path, *, n_threads: int, progress: Progress | None = None) -> TaskResult:
    """Return how GGUFs with the same vocabulary do in a task; the models run one after the other.

    Raises InputError for a question that does not fit, QualityError for logits that are not finite.
    """
    prepared = _prepare(task, reference)
    n_done, n_all = 0, len(task.items) * (1 + len(candidates))

    def tell() -> None:
        nonlocal n_done
        n_done += 1
        if progress is not None:
            progress(task.name, n_done, n_all)

    base, *ours = (answer_task(path, task, prepared, n_threads, tell) for path in (reference, *candidates))
    return TaskResult(task.name, task.kind, len(task.items), proportion_percent(base), tuple(compare_answers(right, base) for right in ours))


def compare_answers(right: Flags, reference: Flags) -> Accuracy:
    """Return the accuracy of a model and its difference from the reference's on the same questions."""
    return Accuracy(proportion_percent(right), mean_measure(100 * (right.astype(np.float64) - reference)))
