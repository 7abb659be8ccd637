"""Speeds of types: the product that is timed is the right one, and it is measured once per machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loopgguf import ggml, speed
from loopgguf.checkpoint import cache_folder
from loopgguf.errortable import DEFAULT_TYPES
from loopgguf.formats import GgmlType
from loopgguf.speed import Product, Speed, known_speeds

T = GgmlType


@pytest.mark.parametrize("ggml_type", [t for t in DEFAULT_TYPES if not t.name.startswith("IQ1")])  # whose encoders take seconds to begin
@pytest.mark.parametrize("n_tokens", [1, 64])
def test_the_product_is_that_of_the_weights(ggml_type: GgmlType, n_tokens: int) -> None:
    """Would catch a time taken of something else: no work at all, other weights, or kernels that repacked weights do not suit."""
    generator = np.random.default_rng(0)
    W, X = (generator.standard_normal((n, 512), np.float32) for n in (64, n_tokens))
    packed = ggml.encode_rows(ggml_type, W, np.ones(512, np.float32))
    with Product(ggml_type, packed, X, n_threads=2) as product:
        product.compute()
        Y = product.result()
    expected = X @ ggml.decode_rows(ggml_type, packed).T
    assert np.abs(Y - expected).max() < 0.02 * np.abs(expected).max()  # llama.cpp rounds activations to 8 bits


@pytest.mark.parametrize("ggml_type", DEFAULT_TYPES)
def test_as_many_rows_as_a_model_has(ggml_type: GgmlType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a number of rows that llama.cpp does not repack, as it does those of models: other kernels are timed then."""
    shapes: list[tuple[int, int]] = []
    monkeypatch.setattr(speed, "_measure", lambda ggml_type, n_rows, n_tokens, n_threads: shapes.append((n_rows, n_tokens)) or 1.0)
    speed.measure_speed(ggml_type, n_threads=1)
    assert [n_tokens for _, n_tokens in shapes] == [1, speed.PROMPT_TOKENS]
    assert all(n_rows > 0 and n_rows % 64 == 0 for n_rows, _ in shapes)


def test_a_speed_is_measured_once_per_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Would catch seconds of measuring in every plan, a cache that forgets what it has, and ggml's lines between ours."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speed, "_GENERATION_BYTES", 1 << 18)
    monkeypatch.setattr(speed, "_PROMPT_ROWS", 64)
    first = known_speeds([T.Q4_0], n_threads=1)
    assert min(first[T.Q4_0].generation, first[T.Q4_0].prompt) > 0
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(speed, "measure_speed", lambda ggml_type, n_threads: Speed(1.0, float(ggml_type)))
    both = known_speeds([T.Q8_0, T.Q4_0, T.Q8_0], n_threads=1)
    assert both == {**first, T.Q8_0: Speed(1.0, float(T.Q8_0))}
    assert known_speeds([T.Q4_0], n_threads=3)[T.Q4_0] == Speed(1.0, float(T.Q4_0))
    for path in (cache_folder() / "speed").iterdir():
        path.write_text("[1]", encoding="utf-8")
    assert known_speeds([T.Q4_0], n_threads=1)[T.Q4_0].generation == 1.0
