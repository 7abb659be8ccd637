"""tasks.py against naive loops over llama.cpp's logits, hand-made answers, and files that are no tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import write_tiny_llama

from loopgguf.errors import InputError, QualityError
from loopgguf.llama import Context, Model
from loopgguf.tasks import Kind, compare_answers, load_task, measure_task

CHOICES = [
    {"context": "abcde", "choices": [" bad cab", "e", " dead beef"], "answer": 1},
    {"context": "cab", "choices": ["abcabc", " ", "d"], "answer": 0},
    {"context": "a bed", "choices": ["a", "bb", "ccc", "dddd"], "answer": 3},
    {"context": "", "choices": ["ad", "be"], "answer": 0, "id": 7},
    *({"context": a, "choices": ["b", "dad a", "ee", "cabbed dace"], "answer": 0} for a in ("bad ", "ace", "e b", "dab c", "c", "abba", "ed", "bb")),
]
WORDS = [{"text": f"{a} {b} cab abc"} for a in ("bad", "bead", "ace", "dad") for b in ("a", "be", "dab")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "reference.gguf")


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def naive_ln_p(path: Path, context: str, choice: str) -> list[tuple[float, bool]]:
    """(ln p, is the likeliest) of each token of the choice, one decode a token; tokens of these texts never cross the border."""
    with Model(path) as model, Context(model, 64, n_threads=1) as run:
        tokens, n_context = model.tokenize(context + choice), len(model.tokenize(context))
        result = []
        for i in range(n_context, len(tokens)):
            logits = [float(x) for x in run.decode(tokens[:i])[-1]]
            ln_sum = math.log(math.fsum(math.exp(x) for x in logits))
            result.append((logits[tokens[i]] - ln_sum, logits[tokens[i]] == max(logits)))
    return result


def test_multiple_choice_is_its_definition(reference: Path, tmp_path: Path) -> None:
    """Catches a score that is not per character, one that counts the context, and targets that are off by one."""
    task = load_task(write(tmp_path / "t.jsonl", CHOICES))
    assert (task.kind, len(task.items)) == (Kind.MULTIPLE_CHOICE, 12)
    expected, unnormalised = [], []
    for row in CHOICES:
        sums = [math.fsum(ln_p for ln_p, _ in naive_ln_p(reference, row["context"], choice)) for choice in row["choices"]]
        expected.append(int(np.argmax([s / len(c) for s, c in zip(sums, row["choices"], strict=True)])))
        unnormalised.append(int(np.argmax(sums)))
    assert expected != unnormalised, "the questions would not tell the two apart"
    for answers in (expected, [(answer + 1) % 2 for answer in expected]):
        rows = [{**row, "answer": answer} for row, answer in zip(CHOICES, answers, strict=True)]
        result = measure_task(load_task(write(tmp_path / "u.jsonl", rows)), [reference], reference, n_threads=1)
        assert result.reference_percent.value == 100 * np.mean([a == e for a, e in zip(answers, expected, strict=True)])


def test_last_word_is_its_definition(reference: Path, tmp_path: Path) -> None:
    """Catches a word that counts as right by its first token, or with the blank before it left out."""
    spoken = []
    with Model(reference) as model, Context(model, 64, n_threads=1) as run:
        for row in WORDS:  # the likeliest continuation is right by definition; one with another last token is wrong
            head = row["text"].rsplit(" ", 1)[0]
            tokens = model.tokenize(head + " ")
            likeliest = model.token_text(int(run.decode(tokens)[-1].argmax())).decode("latin-1")
            spoken.append((head, likeliest))
    rows = [{"text": f"{head} {text}"} for head, text in spoken if text.isascii() and text.isalpha()] + WORDS
    expected = []
    for row in rows:
        head, word = row["text"].rsplit(" ", 1)
        expected.append(all(is_likeliest for _, is_likeliest in naive_ln_p(reference, head, " " + word)))
    result = measure_task(load_task(write(tmp_path / "t.jsonl", rows)), [reference], reference, n_threads=1)
    assert result.kind is Kind.LAST_WORD
    assert result.reference_percent.value == 100 * np.mean(expected)


def test_last_word_of_a_model_that_knows_it(demo_gguf: Path, tmp_path: Path) -> None:
    """Catches a task in which nothing is ever right: the model's own greedy words must all be."""
    rows = []
    with Model(demo_gguf) as model, Context(model, 64, n_threads=2) as run:
        for prompt in ("Once upon a time, and the first", "It was the", "He looked at the", "They went to the", "She said that the"):
            tokens = model.tokenize(prompt)
            word = model.token_text(int(run.decode(tokens)[-1].argmax())).decode()
            if word.startswith(" ") and word.strip().isalpha():
                rows.append({"text": prompt + word})
    assert len(rows) >= 2
    right = measure_task(load_task(write(tmp_path / "t.jsonl", rows)), [demo_gguf], demo_gguf, n_threads=2)
    assert right.reference_percent.value == 100
    wrong = measure_task(load_task(write(tmp_path / "t.jsonl", [{"text": row["text"] + "qz"} for row in rows])), [demo_gguf], demo_gguf, n_threads=2)
    assert wrong.reference_percent.value == 0


def test_candidates_are_compared_question_by_question(reference: Path, tmp_path: Path) -> None:
    """Catches candidates in another's place, an unpaired error, and progress that stops before the end."""
    told: list[tuple[str, int, int]] = []
    far = write_tiny_llama(tmp_path / "far.gguf", noise=0.3)
    task = load_task(write(tmp_path / "t.jsonl", CHOICES))
    result = measure_task(task, [reference, far], reference, n_threads=1, progress=lambda *step: told.append(step))
    assert told == [("t.jsonl", i + 1, 36) for i in range(36)]
    same, other = result.accuracies
    assert (same.accuracy_percent, same.difference_percent.value, same.difference_percent.standard_error) == (result.reference_percent, 0, 0)
    assert other == measure_task(task, [far], reference, n_threads=1).accuracies[0]
    paired = compare_answers(np.array([True, True, False, True]), np.array([True, False, False, True]))
    assert (paired.accuracy_percent.value, paired.difference_percent.value) == (75, 25)
    assert paired.difference_percent.standard_error == pytest.approx(25)


# --- hostile inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .*: got Expecting property name"),
        ("[" * 100_000, "line 2 of .*: got "),
        ("[]", r"line 2 of .*: got \[\], expected an object with context, choices and answer, or with text"),
        ('{"question": "?"}', "keys of line 2 of .*: got 'question'"),
        ('{"context": 1, "choices": ["a", "b"], "answer": 0}', "context in line 2 of .*: got 1, expected a text"),
        ('{"context": "", "choices": ["a"], "answer": 0}', "choices in line 2"),
        ('{"context": "", "choices": ["a", ""], "answer": 0}', "choices in line 2"),
        ('{"context": "", "choices": ["a", "b"], "answer": 2}', "answer in line 2 of .*: got 2, expected the index of a choice, 0 to 1"),
        ('{"context": "", "choices": ["a", "b"], "answer": true}', "answer in line 2"),
        ('{"context": "", "choices": ["a", "b"], "answer": "a"}', "answer in line 2"),
        ('{"text": "word"}', "text in line 2 of .*: got 'word', expected a text of two or more words"),
        ('{"text": "two words"}', "line 2 of .*: got 'last word', expected multiple choice as in the first line"),
    ],
)
def test_lines_that_are_no_question(tmp_path: Path, line: str, message: str) -> None:
    """Catches a traceback, and a question that is passed over in silence."""
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(CHOICES[0])}\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_task(path)


def test_files_that_are_no_task(tmp_path: Path) -> None:
    """Catches a mean over nothing, and errors of the system that show as tracebacks."""
    path = tmp_path / "t.jsonl"
    with pytest.raises(InputError, match=r"cannot read .*t\.jsonl: No such file"):
        load_task(path)
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(InputError, match="got no questions"):
        load_task(path)
    path.write_bytes(b'{"text": "a \xff"}')
    with pytest.raises(InputError, match="not UTF-8 at 12"):
        load_task(path)
    path.write_text('{"text": "a \\ud800"}', encoding="utf-8")
    with pytest.raises(InputError, match="text in line 1"):
        load_task(path)


def test_questions_that_do_not_fit(reference: Path, tmp_path: Path) -> None:
    """Catches a context that is cut without a word, and a crash in llama.cpp."""
    task = load_task(write(tmp_path / "t.jsonl", [WORDS[0], {"text": "abc " * 40}]))
    with pytest.raises(InputError, match=r"question 2 of t\.jsonl: got \d+ tokens, expected at most the 64"):
        measure_task(task, [], reference, n_threads=1)


def test_logits_that_are_not_finite(reference: Path, tmp_path: Path) -> None:
    """Catches a NaN that is the first choice's win."""
    broken = write_tiny_llama(tmp_path / "broken.gguf", broken=True)
    with pytest.raises(QualityError, match=r"logits of .*broken\.gguf in question 1 of t\.jsonl"):
        measure_task(load_task(write(tmp_path / "t.jsonl", CHOICES)), [broken], reference, n_threads=1)
