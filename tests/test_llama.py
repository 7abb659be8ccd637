"""libllama through its C API on tiny models: tokens, logits, the callback, and files it must refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_llama import N_VOCAB, tiny_tokens, write_tiny_llama

from loopgguf.container import read_gguf, string, write_gguf
from loopgguf.errors import InputError
from loopgguf.llama import Context, Model

TEXTS = ["", "a", "Hello, world!\n\n  two  spaces\t", "naïve façade — 漢字 🙂\r\n", "nul \0 inside", "1234567890" * 30]
TOKENS = [1, *range(3, 40)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def _logits(path: Path, tokens: list[int], **context: int) -> NDArray[np.float32]:
    with Model(path) as model, Context(model, 64, n_threads=context.get("n_threads", 1)) as run:
        return run.decode(tokens).copy()


def _nats_per_token(path: Path, text: str | None, tokens: list[int] | None = None) -> float:
    with Model(path) as model, Context(model, 256, n_threads=2) as run:
        ids = np.array(tokens if text is None else model.tokenize(text))
        logits = run.decode(ids).astype(np.float64)[:-1]
    shifted = logits - logits.max(1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(shifted)), ids[1:]]).mean())


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_spell_the_text(demo_gguf: Path, text: str) -> None:
    """Catches a length in characters where bytes are meant, and text cut at NUL."""
    with Model(demo_gguf, vocab_only=True) as model:
        tokens = model.tokenize(text, add_special=False)
        assert b"".join(map(model.token_text, tokens)) == text.encode()
        assert all(0 <= token < model.n_vocab for token in tokens)


def test_special_tokens_are_asked_for(tiny: Path) -> None:
    """Catches a BOS that is always or never there, and control tokens parsed out of plain text."""
    with Model(tiny, vocab_only=True) as model:
        assert (model.n_vocab, model.bos, model.eos, model.adds_bos) == (N_VOCAB, 1, 2, True)
        assert model.tokenize("a", add_special=True) == [1, *model.tokenize("a", add_special=False)]
        assert model.eos not in model.tokenize("</s>", parse_special=False)
        assert model.tokenize("</s>", add_special=False, parse_special=True) == [model.eos]
        assert model.token_text(model.eos) == b""


def test_long_pieces_are_whole(tmp_path: Path) -> None:
    """Catches a fixed buffer: a piece of 300 bytes came back empty."""
    path = write_tiny_llama(tmp_path / "long.gguf", tokens=[*tiny_tokens()[:-1], "x" * 300])
    with Model(path, vocab_only=True) as model:
        assert model.token_text(N_VOCAB - 1) == b"x" * 300


def test_every_position_has_logits(tiny: Path) -> None:
    """Catches logits of the last token only, and a model that looks ahead."""
    whole = _logits(tiny, TOKENS)
    assert whole.shape == (len(TOKENS), N_VOCAB) and whole.dtype == np.float32 and np.isfinite(whole).all()
    assert np.allclose(_logits(tiny, TOKENS[:20]), whole[:20], atol=1e-4)
    assert np.abs(_logits(tiny, [1, 9, *TOKENS[2:]])[2:] - whole[2:]).max() > 1e-3  # but it looks back


def test_runs_are_repeatable(tiny: Path) -> None:
    """Catches settings that depend on the run: two evaluations of one file must agree to the bit."""
    assert np.array_equal(_logits(tiny, TOKENS), _logits(tiny, TOKENS))
    assert np.array_equal(_logits(tiny, TOKENS), _logits(tiny, TOKENS, n_threads=2))


def test_start_forgets_or_continues(tiny: Path) -> None:
    """Catches a cache that leaks from one chunk into the next, or that a continuation does not see."""
    with Model(tiny) as model, Context(model, 64, n_threads=1) as run:
        whole = run.decode(TOKENS).copy()
        assert np.array_equal(run.decode(TOKENS), whole)
        first = run.decode(TOKENS[:20]).copy()
        second = run.decode(TOKENS[20:], start=20)
        assert np.allclose(np.concatenate([first, second]), whole, atol=1e-4)


def test_first_logits_leaves_out_the_ones_before(tiny: Path) -> None:
    """Catches rows shifted by the ones that were not asked for."""
    whole = _logits(tiny, TOKENS)
    with Model(tiny) as model, Context(model, 64, n_threads=1) as run:
        part = run.decode(TOKENS, first_logits=30)
        assert part.shape == (len(TOKENS) - 30, N_VOCAB)
        assert np.allclose(part, whole[30:], atol=1e-4)


def test_text_is_likelier_than_noise(demo_gguf: Path) -> None:
    """Catches wrong weights, permutations or positions: a trained model then predicts no better than chance."""
    text = "It was a dark night, and the old man sat by the fire and said nothing for a long time."
    with Model(demo_gguf, vocab_only=True) as model:
        noise = np.random.default_rng(0).integers(256, model.n_vocab, 60).tolist()
        chance = np.log(model.n_vocab)
    assert _nats_per_token(demo_gguf, text) < 0.7 * chance
    assert _nats_per_token(demo_gguf, None, noise) > chance


def test_the_callback_sees_the_graph_and_changes_nothing(tiny: Path) -> None:
    """Catches a callback that is collected while llama.cpp holds it, and one that alters the result."""
    asked, seen = [], []

    def callback(tensor: int, ask: bool) -> bool:
        (asked if ask else seen).append(tensor)
        return True

    with Model(tiny) as model, Context(model, 64, n_threads=1, callback=callback) as run:
        watched = run.decode(TOKENS).copy()
    assert len(seen) == len(asked) > 10 and all(seen)
    assert np.array_equal(watched, _logits(tiny, TOKENS))


@pytest.mark.parametrize("token", [-1, N_VOCAB, 2**31 - 1])
def test_tokens_out_of_range_are_refused(tiny: Path, token: int) -> None:
    """Catches a read beyond the embedding."""
    with Model(tiny) as model, Context(model, 64, n_threads=1) as run:
        with pytest.raises(InputError, match="could not run 2 tokens"):
            run.decode([1, token])
        assert np.isfinite(run.decode([1, 2])).all()  # and the context is still good


@pytest.mark.parametrize("n", [0, 65])
def test_our_own_mistakes_stop_at_an_assertion(tiny: Path, n: int) -> None:
    """Catches writing behind the batch."""
    with Model(tiny) as model, Context(model, 64, n_threads=1) as run, pytest.raises(AssertionError):
        run.decode([3] * n)


@pytest.mark.parametrize("case", ["text", "empty", "truncated", "unknown architecture", "no tensors", "missing"])
def test_files_that_do_not_load(tmp_path: Path, tiny: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    """Catches a null pointer passed on, llama.cpp's log on the terminal, and a message that does not name the file."""
    path = tmp_path / "garbage.gguf"
    if case == "text":
        path.write_text("this is no model\n" * 100, encoding="utf-8")
    elif case == "empty":
        path.touch()
    elif case == "truncated":
        path.write_bytes(tiny.read_bytes()[:-5000])
    elif case == "unknown architecture":
        write_gguf(path, {"general.architecture": string("perceptron")}, [])
    elif case == "no tensors":
        write_gguf(path, {"general.architecture": string("llama")}, [])
    with pytest.raises(InputError) as caught:
        Model(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_closing_twice_is_harmless(tiny: Path) -> None:
    """Catches a double free when an error unwinds nested blocks."""
    model = Model(tiny)
    with model:
        run = Context(model, 64, n_threads=1)
        with run:
            pass
        run.__exit__(None, None, None)
    model.__exit__(None, None, None)


def test_sequences_of_a_batch_do_not_see_each_other(tiny: Path) -> None:
    """Catches attention across the edge of a sequence, and positions that go on behind it."""
    begins = [0, 9, 10, 31]
    with Model(tiny) as model, Context(model, 64, n_threads=1, n_sequences=4) as run:
        packed = run.decode(TOKENS, sequences=begins).copy()
        assert np.array_equal(run.decode(TOKENS, sequences=begins), packed)
    alone = [_logits(tiny, TOKENS[a:b]) for a, b in zip(begins, [*begins[1:], len(TOKENS)], strict=True)]
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-4)
    assert np.abs(packed - _logits(tiny, TOKENS)).max() > 0.1


@pytest.mark.parametrize(("architecture", "is_recurrent"), [("llama", False), ("mamba", True), ("lfm2", True)])
def test_recurrent_models_are_known_from_their_vocabulary(architecture: str, is_recurrent: bool, tmp_path: Path, tiny: Path) -> None:
    """Catches a state space model whose documents are thought to be kept apart."""
    metadata = {key.replace("llama.", f"{architecture}.", 1): value for key, value in read_gguf(tiny).metadata.items() if not key.startswith("tokenizer")}
    metadata |= {key: value for key, value in read_gguf(tiny).metadata.items() if key.startswith("tokenizer")}
    path = tmp_path / "vocabulary.gguf"
    write_gguf(path, metadata | {"general.architecture": string(architecture)}, [])
    with Model(path, vocab_only=True) as model:
        assert model.is_recurrent is is_recurrent
