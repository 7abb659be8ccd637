"""fidelity.py: sums over slabs equal the whole, blocks' outputs are llama.cpp's own, and what is not alike is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_llama import N_EMBD, N_VOCAB, write_tiny_llama

from loopgguf import fidelity, ggml
from loopgguf.errors import InputError, UsageError
from loopgguf.fidelity import compare_outputs, measure_fidelities, measure_layers, measure_tensor, measure_tensors, parse_levels
from loopgguf.formats import GgmlType
from loopgguf.llama import Context, Model
from loopgguf.source import Tensor, open_source

N_CTX = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_llama(folder / f"{name}.gguf", noise=noise) for name, noise in (("reference", 0.0), ("near", 0.01), ("far", 0.05))}


@pytest.fixture(scope="module")
def tokens() -> NDArray[np.int32]:
    return np.random.default_rng(2).integers(3, N_VOCAB, (3, N_CTX)).astype(np.int32)


def make_tensor(W: NDArray[np.float32], ggml_type: GgmlType, name: str = "blk.0.ffn_up.weight") -> Tensor:
    packed = ggml.encode_rows(ggml_type, W.reshape(-1, W.shape[-1]))
    return Tensor(name, W.shape, ggml_type, lambda start, stop: packed[start:stop])


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(37, 64), (3, 5, 64)])
@pytest.mark.parametrize("slab", [1, 64 * 4, 1 << 18])
def test_sums_equal_the_whole_tensor(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], slab: int) -> None:
    """Catches a last slab that is lost, rows of an expert that are skipped, and quantiles of one slab only."""
    monkeypatch.setattr(fidelity, "_SLAB_WEIGHTS", slab)
    W = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    quantized = make_tensor(W, GgmlType.Q4_0)
    decoded = ggml.decode_rows(GgmlType.Q4_0, quantized.read_rows(0, quantized.n_rows)).astype(np.float64).reshape(shape)
    error = np.abs(decoded - W)
    found = measure_tensor(quantized, make_tensor(W, GgmlType.F32))
    assert found.n_weights == W.size
    assert found.bpw == 4.5
    assert found.mae == pytest.approx(error.mean(), rel=1e-6)
    relative = np.square(error).sum() / np.square(W.astype(np.float64)).sum()
    assert found.relative_error == pytest.approx(relative, rel=1e-6)
    assert found.snr_db == pytest.approx(-10 * np.log10(relative), rel=1e-6)
    for percent in (50.0, 90.0, 99.0):
        assert found.abs_error_quantiles[percent] == pytest.approx(np.percentile(error, percent, method="inverted_cdf"), rel=5e-3)
    assert found.abs_error_quantiles[100.0] == pytest.approx(error.max(), rel=1e-6)


def test_an_exact_copy_has_no_error() -> None:
    """Catches a logarithm of 0, and a quantile of 0 that is shown as the middle of its bin."""
    W = np.zeros((2, 64), np.float32)
    found = measure_tensor(make_tensor(W, GgmlType.Q8_0), make_tensor(W, GgmlType.F32))
    assert (found.mae, found.relative_error, found.snr_db, set(found.abs_error_quantiles.values())) == (0.0, 0.0, None, {0.0})


def test_copies_are_left_out(models: dict[str, Path]) -> None:
    """Catches norms, copied as they are, among the errors; and a changed tensor that is taken for a copy by its type."""
    reference, near = open_source(models["reference"]), open_source(models["near"])
    assert measure_tensors(reference, reference, n_threads=2) == ()
    assert {t.name for t in measure_tensors(near, reference, n_threads=2)} == {t.name for t in reference.tensors if "norm" not in t.name}


def test_weights_of_another_model_are_refused(models: dict[str, Path]) -> None:
    """Catches a comparison of unlike tensors that ends in a broadcast or a traceback."""
    W = np.ones((2, 64), np.float32)
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight: got \(2, 64\), expected \(1, 64\)"):
        measure_tensor(make_tensor(W, GgmlType.Q8_0), make_tensor(W[:1], GgmlType.F32))
    with pytest.raises(InputError, match="NaN"):
        measure_tensor(make_tensor(W, GgmlType.Q8_0), make_tensor(np.full((2, 64), np.nan, np.float32), GgmlType.F32))
    source = open_source(models["near"])
    fewer = type(source)(source.path, source.is_checkpoint, source.metadata, source.tensors[1:], source.files, source.fingerprint)
    with pytest.raises(InputError, match="is in only one of it and"):
        measure_tensors(fewer, source, n_threads=1)


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_outputs_equal_the_textbook() -> None:
    """Catches a cosine of the wrong axis, an error relative to the candidate, and a division by zero for zeros."""
    y = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], np.float32)
    ours = np.array([[4.0, 3.0], [0.0, 1.0], [0.0, 0.0]], np.float32)
    cosine, error = compare_outputs(ours, y)
    assert cosine == pytest.approx((24 / 25 + 1 + 1) / 3)
    assert error == pytest.approx((1 + 1 + 1) / (25 + 4))


def test_blocks_are_compared_on_the_scored_positions(models: dict[str, Path], tokens: NDArray[np.int32], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches another node than the block's output, rows of other positions, and outputs read after they were overwritten:
    the last block's output, normed and multiplied by the head, must be the model's logits."""
    shapes: list[tuple[int, ...]] = []
    outputs: list[NDArray[np.float32]] = []

    def watch(candidate: NDArray[np.float32], reference: NDArray[np.float32]) -> tuple[float, float]:
        shapes.append(candidate.shape)
        outputs.append(reference)
        return compare_outputs(candidate, reference)

    monkeypatch.setattr(fidelity, "compare_outputs", watch)
    measure_layers([models["near"]], models["reference"], tokens, n_threads=1)
    assert shapes == [(N_CTX // 2, N_EMBD)] * 3
    head = next(t for t in open_source(models["reference"]).tensors if t.name == "output.weight")
    W = ggml.decode_rows(head.type, head.read_rows(0, head.n_rows))
    with Model(models["reference"]) as model, Context(model, N_CTX, n_threads=1) as context:
        for chunk, y in zip(tokens, outputs, strict=True):
            normed = y / np.sqrt(np.square(y).mean(axis=1, keepdims=True) + 1e-5)
            np.testing.assert_allclose(normed @ W.T, context.decode(chunk, first_logits=N_CTX // 2), rtol=1e-3, atol=1e-3)


def test_the_reference_is_itself_and_noise_grows(models: dict[str, Path], tokens: NDArray[np.int32]) -> None:
    """Catches candidates in another order, and an error against the wrong chunk."""
    same, near, far = measure_layers([models["reference"], models["near"], models["far"]], models["reference"], tokens, n_threads=1)
    assert [layer.layer for layer in same] == [0]
    assert same[0].cosine.value == pytest.approx(1.0, abs=1e-9)
    assert same[0].relative_error.value == 0.0
    assert 0 < near[0].relative_error.value < far[0].relative_error.value
    assert far[0].cosine.value < near[0].cosine.value < 1


def test_levels_are_measured_when_asked(models: dict[str, Path], tokens: NDArray[np.int32]) -> None:
    """Catches a level that is measured, slowly, though nobody asked."""
    (found,) = measure_fidelities([models["near"]], models["reference"], tokens, ("layer",), n_threads=1)
    assert (len(found.tensors), len(found.layers)) == (0, 1)
    assert measure_fidelities([models["near"]], models["reference"], tokens, (), n_threads=1) == [fidelity.Fidelity()]


def test_a_failure_in_the_callback_is_raised(models: dict[str, Path], tokens: NDArray[np.int32], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an exception that ctypes prints and forgets, so that a table lacks a block."""
    monkeypatch.setattr(fidelity, "read_tensor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_layers([models["near"]], models["reference"], tokens, n_threads=1)


@pytest.mark.parametrize("text", ["", "model", "tensor,layers", ","])
def test_unknown_levels_are_refused(text: str) -> None:
    """Catches a typo that measures nothing."""
    with pytest.raises(UsageError, match="--levels"):
        parse_levels(text)


def test_levels_are_parsed() -> None:
    """Catches blanks and doubles that are taken for levels."""
    assert parse_levels("layer, tensor,layer") == ("layer", "tensor")
