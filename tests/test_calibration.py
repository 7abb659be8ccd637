"""calibration.py: text is read strictly and cut as llama-imatrix and llama-perplexity cut it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopgguf.calibration import cut_chunks, default_text, describe_shortage, load_chunks, read_document, read_text
from loopgguf.errors import InputError, UsageError

BOS = 1


class Bytes:
    """A vocabulary of which every byte is a token, BOS in front."""

    bos = BOS

    def __init__(self, adds_bos: bool = True) -> None:
        self.adds_bos = adds_bos

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        return [self.bos] * (add_special and self.adds_bos) + list(text.encode())


@pytest.fixture
def write(tmp_path: Path):
    def write_text(content: str | bytes, name: str = "text.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_text


def test_default_texts_exist_and_are_large():
    """Catches a wheel or clone without the texts that `imatrix` and `evaluate` fall back to."""
    assert default_text("calibration").stat().st_size >= 100_000
    assert default_text("heldout").stat().st_size >= 40_000


def test_cut_replaces_the_first_token_of_each_chunk_and_drops_the_tail():
    """Catches BOS inserted instead of replacing, which shifts every later token (imatrix.cpp)."""
    cut = cut_chunks(range(10, 21), 4, adds_bos=True, bos=BOS)
    assert cut.dtype == np.int32
    assert cut.tolist() == [[BOS, 11, 12, 13], [BOS, 15, 16, 17]]


def test_cut_leaves_tokens_alone_where_no_bos_is_added():
    """Catches a BOS that the model never sees in use (Qwen)."""
    assert cut_chunks(range(8), 4, adds_bos=False, bos=BOS).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(st.lists(st.integers(2, 99), max_size=200), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 5)))
def test_cut_equals_a_naive_loop(tokens: list[int], n_ctx: int, n_chunks: int | None):
    """Catches off-by-one counts at exact multiples and at the limit."""
    naive = []
    while (len(naive) + 1) * n_ctx <= len(tokens) and (n_chunks is None or len(naive) < n_chunks):
        start = len(naive) * n_ctx
        naive.append([BOS, *tokens[start + 1 : start + n_ctx]])
    assert cut_chunks(tokens, n_ctx, adds_bos=True, bos=BOS, n_chunks=n_chunks).tolist() == naive


def test_one_closing_newline_is_dropped_as_llama_cpp_does(write):
    """Catches a last token that llama-imatrix does not have (common/arg.cpp, --file)."""
    assert read_document(write("a\n\n")).text == "a\n"


def test_line_ends_and_byte_order_mark_are_normalised_and_said(write):
    """Catches Windows files that calibrate the model on `\\r`, and silent changes."""
    document = read_document(write(b"\xef\xbb\xbfone\r\ntwo\r\n"))
    assert document.text == "one\ntwo"
    assert [note.split(": ")[0] for note in document.notes] == ["text.txt"] * 2
    assert "byte order mark" in document.notes[0] and "2 CRLF" in document.notes[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b" \n\t\n", "empty"), (b"\xef\xbb\xbf", "empty"), (b"fine \xff\xfe", "offset 5, expected UTF-8"), (b"a\0b\x9c", "0x9c")],
)
def test_unusable_text_is_refused_by_name(write, content: bytes, said: str):
    """Catches an imatrix of nothing, and mojibake as calibration."""
    with pytest.raises(InputError, match=said) as caught:
        read_document(write(content, "bad.txt"))
    assert "bad.txt" in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path):
    """Catches a traceback where a path is wrong."""
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="cannot read calibration text"):
            read_text([path])
    with pytest.raises(UsageError, match="no calibration text"):
        read_text([])


def test_chunks_of_one_file(write):
    """Catches a wrong number of chunks, path instead of base name, and a wrong account of what is missing."""
    chunks = load_chunks(Bytes(), [write("x" * 63)], 16, 10)
    assert (chunks.n_chunks, chunks.n_ctx, chunks.names) == (4, 16, ("text.txt",))
    assert (chunks.tokens[:, 0] == BOS).all() and (chunks.tokens[:, 1:] == ord("x")).all()
    assert describe_shortage(chunks) == "4 of 10 samples available"
    assert describe_shortage(load_chunks(Bytes(), [write("x" * 63)], 16, None)) == ""


def test_files_are_cut_on_their_own(write):
    """Catches a chunk that runs from one document into the next."""
    chunks = load_chunks(Bytes(), [write("a" * 40, "a.txt"), write("b" * 40, "b.txt")], 16, 512)
    assert chunks.names == ("a.txt", "b.txt")
    assert [set(row[1:]) for row in chunks.tokens.tolist()] == [{ord("a")}] * 2 + [{ord("b")}] * 2


def test_file_beyond_the_asked_number_is_said(write):
    """Catches a text that silently plays no part, and its name as a data set of the imatrix."""
    chunks = load_chunks(Bytes(), [write("a" * 40, "a.txt"), write("b" * 40, "b.txt")], 16, 2)
    assert chunks.names == ("a.txt",)
    assert any(note.startswith("b.txt: not used") for note in chunks.notes)


@pytest.mark.parametrize(("sizes", "got", "needed"), [((30,), 31, 32), ((40, 14), 15, 16)])
def test_short_text_is_refused_with_both_numbers(write, sizes: tuple[int, ...], got: int, needed: int):
    """Catches statistics of nearly nothing; llama-imatrix refuses fewer than two chunks as well."""
    paths = [write("x" * size, f"{i}.txt") for i, size in enumerate(sizes)]
    with pytest.raises(InputError, match=f"{paths[-1].name} is too short: got {got} tokens, expected at least {needed}"):
        load_chunks(Bytes(), paths, 16, 4)


def test_senseless_numbers_are_refused(write):
    """Catches a context so short that llama-imatrix would collect nothing, and zero samples."""
    path = write("x" * 99)
    with pytest.raises(UsageError, match="context size: got 8"):
        load_chunks(Bytes(), [path], 8)
    with pytest.raises(UsageError, match="samples: got 0"):
        load_chunks(Bytes(), [path], 16, 0)


def test_fingerprint_follows_the_tokens_and_their_cut(write):
    """Catches a cached imatrix that is taken for another text or another context."""
    prints = {load_chunks(Bytes(), [write(text)], n_ctx).fingerprint for text in ("a" * 64, "b" * 64) for n_ctx in (16, 32)}
    assert len(prints) == 4
    assert load_chunks(Bytes(), [write("a" * 64, "renamed.txt")], 16).fingerprint in prints


def test_llama_cpp_is_a_vocabulary(demo_gguf: Path):
    """Catches a drift between this module's idea of a tokenizer and `llama.Model`."""
    from loopgguf.llama import Model

    with Model(demo_gguf, vocab_only=True) as model:
        chunks = load_chunks(model, [default_text("calibration")], 512, 512)
        tokens = model.tokenize(default_text("calibration").read_text(encoding="utf-8").removesuffix("\n"))
        assert chunks.n_chunks == len(tokens) // 512
        assert chunks.tokens[3, 1:].tolist() == tokens[3 * 512 + 1 : 4 * 512]
        assert (chunks.tokens[:, 0] == (model.bos if model.adds_bos else tokens[::512][: chunks.n_chunks])).all()
