"""calibration.py: texts are cut as llama-imatrix and llama-perplexity cut them, other documents packed and chosen by a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopgguf.calibration import Share, cut_chunks, default_text, describe_shortage, load_chunks
from loopgguf.chat import ChatTemplate
from loopgguf.errors import InputError, UsageError

BOS = 1


class Bytes:
    """A vocabulary of which every byte is a token, BOS in front; `<s>` spells BOS where special tokens are read."""

    bos = BOS

    def __init__(self, adds_bos: bool = True, eos: int = -1) -> None:
        self.adds_bos, self.eos = adds_bos, eos

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        raw = text.encode().replace(b"<s>", bytes([BOS])) if parse_special else text.encode()
        return [self.bos] * (add_special and self.adds_bos) + list(raw)


@pytest.fixture
def write(tmp_path: Path):
    def write_text(content: str | bytes, name: str = "text.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_text


def test_default_texts_exist_and_are_large():
    """Catches a wheel or clone without the texts that `imatrix`, a quality gate and `evaluate` fall back to."""
    assert default_text("calibration").stat().st_size >= 100_000
    assert default_text("selection").stat().st_size >= 15_000
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


# --- texts alone stay as they are ---------------------------------------------------------------------------------------


def test_text_chunks_and_fingerprint_are_what_they_always_were(write):
    """Catches imatrices made before that are no longer found, and chunks that llama-imatrix does not have."""
    text = "".join(chr(97 + i % 26) for i in range(333))
    chunks = load_chunks(Bytes(), [write(text + "\n")], 16, 5, seed=7)
    tokens = [BOS, *text.encode()]
    naive = np.array([[BOS, *tokens[16 * i + 1 : 16 * i + 16]] for i in range(5)], np.int32)
    assert np.array_equal(chunks.tokens, naive)
    assert chunks.fingerprint == hashlib.sha256(b"(5, 16)" + naive.tobytes()).hexdigest()
    assert chunks.documents is None
    assert chunks.shares == (Share("text.txt", 1, 80, 1),)


# --- packed documents -------------------------------------------------------------------------------------------------


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def naive_pack(documents: Sequence[Sequence[int]], n_ctx: int, bos: int | None) -> list[list[tuple[int, int]]]:
    """Return chunks of (token, document number in the chunk), made one token at a time."""
    chunks: list[list[tuple[int, int]]] = [[]]
    for document in documents:
        number = chunks[-1][-1][1] + 1 if chunks[-1] else 0
        for place, token in enumerate(document):
            if len(chunks[-1]) == n_ctx:
                chunks.append([])
                number = 0
                if bos is not None and place:
                    chunks[-1].append((bos, 0))
            if not chunks[-1]:
                number = 0
            chunks[-1].append((token, number))
        if len(chunks[-1]) == n_ctx:
            chunks.append([])
    return [chunk for chunk in chunks if len(chunk) == n_ctx]


@given(st.lists(st.integers(1, 60), min_size=2, max_size=12), st.booleans(), st.sampled_from([-1, 3]))
def test_packed_documents_equal_a_naive_loop(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], adds_bos: bool, eos: int):
    """Catches a document that goes on without BOS, a wrong number at a chunk's edge, and tokens lost or doubled."""
    path = tmp_path_factory.mktemp("pack") / "a.jsonl"
    path.write_text(lines(*({"text": chr(65 + i) * size} for i, size in enumerate(sizes))), encoding="utf-8")
    try:
        chunks = load_chunks(Bytes(adds_bos, eos), [path], 16, None)
    except InputError as error:
        assert "too short" in str(error)
        return
    seen = []  # the order that the seed gives
    for token in chunks.tokens.ravel().tolist():
        if token >= 65 and token not in seen:
            seen.append(token)
    seen += [65 + i for i in range(len(sizes)) if 65 + i not in seen]
    documents = [[*([BOS] if adds_bos else []), *[token] * sizes[token - 65], *([eos] if eos >= 0 else [])] for token in seen]
    naive = naive_pack(documents, 16, BOS if adds_bos else None)
    assert chunks.n_chunks <= len(naive)
    numbers = np.zeros_like(chunks.tokens) if chunks.documents is None else chunks.documents
    for row, row_numbers, expected in zip(chunks.tokens.tolist(), numbers.tolist(), naive, strict=False):
        assert list(zip(row, row_numbers, strict=True)) == expected


def test_documents_have_their_bos_their_eos_and_their_numbers(write):
    """Catches documents that run into each other: the whole layout of two small ones, by hand."""
    path = write(lines({"text": "aaaa"}, {"text": "aaaa"}, {"text": "aaaa"}, {"text": "aaaa"}, {"text": "aaaa"}, {"text": "aaaa"}), "a.jsonl")
    chunks = load_chunks(Bytes(eos=2), [path], 16, 2)
    a = ord("a")
    assert chunks.tokens.tolist() == [[1, a, a, a, a, 2, 1, a, a, a, a, 2, 1, a, a, a], [1, a, 2, 1, a, a, a, a, 2, 1, a, a, a, a, 2, 1]]
    assert chunks.documents is not None
    assert chunks.documents.tolist() == [[0] * 6 + [1] * 6 + [2] * 4, [0] * 3 + [1] * 6 + [2] * 6 + [3]]
    assert chunks.shares == (Share("a.jsonl", 6, 32, 6),)


def test_documents_are_part_of_the_fingerprint(write):
    """Catches an imatrix of packed documents that is taken for one of the same tokens as a running text."""
    packed = load_chunks(Bytes(adds_bos=False), [write(lines(*["x" * 8] * 4), "a.jsonl")], 16, 2)
    text = load_chunks(Bytes(adds_bos=False), [write("x" * 32)], 16, 2)
    assert packed.tokens.tolist() == text.tokens.tolist()
    assert packed.fingerprint != text.fingerprint


def test_seed_chooses_and_the_same_seed_chooses_the_same(write):
    """Catches a choice of documents that cannot be repeated, or that is always the first ones."""
    path = write(lines(*({"text": f"{i:015d}"} for i in range(400))), "a.jsonl")
    load = [load_chunks(Bytes(), [path], 16, 20, seed=seed) for seed in (0, 0, 1)]
    assert load[0].fingerprint == load[1].fingerprint != load[2].fingerprint
    numbers = [int(bytes(row.tolist()[1:])) for row in load[0].tokens]
    assert numbers != sorted(numbers) and max(numbers) > 200 and min(numbers) < 200
    assert load[0].shares == (Share("a.jsonl", 20, 320, 400),)


def test_more_is_kept_where_documents_have_few_tokens_a_byte(write):
    """Catches a shortage that is only one of the text kept in memory: a vocabulary of 64 bytes a token."""

    class Coarse(Bytes):
        def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
            return [self.bos] + [7] * (len(text) // 64)

    path = write(lines(*["y" * 640] * 400), "a.jsonl")
    assert load_chunks(Coarse(), [path], 16, 50).n_chunks == 50


def test_sources_share_in_proportion_to_their_bytes(write):
    """Catches a small source that drowns a large one, and a text that is only used from its start."""
    large = write(lines(*({"text": "b" * 99} for _ in range(900))), "large.jsonl")
    small = write(lines(*({"text": "s" * 99} for _ in range(100))), "small.jsonl")
    text = write("".join(chr(0x21 + i // 400) for i in range(22_000)), "text.txt")
    chunks = load_chunks(Bytes(), [large, text, small], 64, 200)
    share = {s.name: s.n_tokens / chunks.tokens.size for s in chunks.shares}
    assert sum(share.values()) == pytest.approx(1)
    whole = 90_000 + 10_000 + 22_000
    assert share["large.jsonl"] == pytest.approx(90_000 / whole, abs=0.03)
    assert share["small.jsonl"] == pytest.approx(10_000 / whole, abs=0.03)
    from_text = [row[1] for row in chunks.tokens.tolist() if row[1] < ord("b")]
    assert from_text == sorted(from_text) and from_text[-1] > 0x21 + 40
    assert chunks.names == ("large.jsonl", "text.txt", "small.jsonl")
    assert [s.n_read for s in chunks.shares] == [900, 1, 100]


def test_all_of_a_mixture_is_used_when_it_is_not_enough(write):
    """Catches a quota that leaves text unused while samples are missing."""
    chunks = load_chunks(Bytes(adds_bos=False), [write("a" * 70), write(lines(*["b" * 20] * 5), "b.jsonl")], 16, 500)
    assert chunks.n_chunks == 4 + 6
    assert describe_shortage(chunks) == "10 of 500 samples available"
    assert chunks.documents is not None and not chunks.documents[:4].any()


def test_too_few_documents_are_refused_with_both_numbers(write):
    """Catches statistics of nearly nothing."""
    with pytest.raises(InputError, match=r"a.jsonl is too short: got 4 tokens, expected at least 32"):
        load_chunks(Bytes(), [write(lines("abc"), "a.jsonl")], 16, 4)


# --- conversations ----------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ bos_token if loop.first }}[{{ m.role }}]{{ m.content }}{% endfor %}"
MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well <s>"}]}


@pytest.mark.parametrize(("adds_bos", "bos_token"), [(True, "<s>"), (True, ""), (False, "<s>"), (False, "")])
def test_conversations_are_rendered_with_one_bos(write, adds_bos: bool, bos_token: str):
    """Catches a doubled BOS, one that is missing, one for a model that has none, and an EOS after a finished turn."""
    template = ChatTemplate("m", CHAT, {"bos_token": bos_token})
    chunks = load_chunks(Bytes(adds_bos, eos=2), [write(lines(*[MESSAGES] * 9), "a.jsonl")], 64, 3, template=template)
    once = [BOS] * bool(adds_bos or bos_token) + [*b"[user]hi[assistant]well ", BOS]
    assert chunks.documents is not None
    assert chunks.tokens[0][chunks.documents[0] == 0].tolist() == chunks.tokens[0][chunks.documents[0] == 1].tolist() == once


def test_conversations_without_a_template_are_refused(write):
    """Catches messages glued together in some format that the model has never seen."""
    with pytest.raises(InputError, match=r"a.jsonl, line \d+ holds messages, and the model has no chat template"):
        load_chunks(Bytes(), [write(lines(*[MESSAGES] * 9), "a.jsonl")], 16, 4)


def test_special_tokens_in_documents_are_read_when_asked_for(write):
    """Catches `--parse-special` that only works for .txt."""
    path = write(lines(*["ab<s>cd"] * 9), "a.jsonl")
    assert [load_chunks(Bytes(False), [path], 16, 2, parse_special=asked).tokens[0].tolist().count(BOS) for asked in (False, True)] == [0, 3]


def test_all_of_a_large_data_set_is_refused(write, monkeypatch: pytest.MonkeyPatch):
    """Catches a download of a thousand files because no number of samples was given."""
    from loopgguf import hub

    monkeypatch.setattr(hub, "open_dataset", lambda reference: hub.Dataset(reference, "f" * 40, ("en/c4-train.0.json.gz", "en/c4-train.1.json.gz")))
    with pytest.raises(UsageError, match="got all of c4, which is 2 files"):
        load_chunks(Bytes(), ["c4"], 16, None)
