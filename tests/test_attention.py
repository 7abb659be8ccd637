"""attention.py: shares by hand, and a file that is read as it was written or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loopgguf.attention import AttentionMass, LayerAttention, attention_path, load_attention, refuse_existing_attention, save_attention
from loopgguf.errors import InputError, OutputError
from loopgguf.safetensor import write_safetensors

A = np.array([[[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]], [[1, 0, 0], [0.25, 0.75, 0], [0, 0, 1]]], np.float32)


def test_shares_by_hand():
    """Catches a mean over heads, one over keys instead of queries, and the first tokens of later documents forgotten."""
    mass = AttentionMass()
    mass.begin_chunk(0, [0, 2])
    for _ in range(2):
        mass.add_attention(3, A)
    found = mass.layers()
    assert list(found) == [3]
    np.testing.assert_allclose(found[3].positions, np.array([[1.5, 0.5, 1], [1.25, 0.75, 1]]) / 3, rtol=1e-6)
    np.testing.assert_allclose(found[3].first, np.array([2.5, 2.25]) / 3, rtol=1e-6)


def test_layers_come_in_order():
    """Catches layer 10 before layer 2."""
    mass = AttentionMass()
    for layer in (10, 2, 0):
        mass.add_attention(layer, A)
    assert list(mass.layers()) == [0, 2, 10]


def test_state_is_everything():
    """Catches a resumed job that forgets what it saw."""
    whole, first, second = AttentionMass(), AttentionMass(), AttentionMass()
    for mass, layers in ((whole, (0, 1)), (first, (0,))):
        for layer in layers:
            mass.add_attention(layer, A)
    second.restore(first.state())
    second.add_attention(1, A)
    assert all((second.layers()[layer].first == shares.first).all() for layer, shares in whole.layers().items())


def test_round_trip(tmp_path: Path):
    """Catches heads and positions swapped on disk, and a file that nobody finds."""
    imatrix = tmp_path / "m.imatrix.gguf"
    layers = {layer: LayerAttention(np.full((2, 4), layer, np.float32), np.full(2, layer, np.float32)) for layer in (0, 11)}
    assert load_attention(imatrix) == {}
    save_attention(layers, imatrix)
    assert attention_path(imatrix).name == "m.imatrix.attention.safetensors"
    found = load_attention(imatrix)
    assert list(found) == [0, 11]
    assert all((found[layer].positions == shares.positions).all() and (found[layer].first == shares.first).all() for layer, shares in layers.items())
    with pytest.raises(OutputError, match="exists"):
        refuse_existing_attention(imatrix, overwrite=False)
    with pytest.raises(OutputError, match="exists"):
        save_attention(layers, imatrix)
    save_attention(layers, imatrix, overwrite=True)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"blk.0.first": np.ones(2, np.float32)}, "layer 0"),
        ({"blk.0.first": np.ones(2, np.float32), "blk.0.positions": np.ones((3, 4), np.float32)}, "layer 0"),
        ({"blk.0.first": np.ones(2, np.float32), "blk.0.positions": np.full((2, 4), np.nan, np.float32)}, "layer 0"),
        ({"blk.0.first": np.ones(2, np.float64)}, "tensor 'blk.0.first'"),
        ({"blk.0.positions": np.ones(2, np.float32)}, "tensor 'blk.0.positions'"),
        ({"something": np.ones(2, np.float32)}, "tensor 'something'"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str):
    """Catches half a file that is shown as if it were whole."""
    with attention_path(tmp_path / "m.imatrix.gguf").open("wb") as stream:
        write_safetensors(stream.write, arrays)
    with pytest.raises(InputError, match=rf"{said} in .*m\.imatrix\.attention\.safetensors: got .*Make it again with `loopgguf imatrix --attention`"):
        load_attention(tmp_path / "m.imatrix.gguf")
