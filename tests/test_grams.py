"""grams.py: matrices come back as they were, one at a time, from whole shards of one run only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopgguf.curvature import Curvature, FirstToken, Gram, GramSet, GramSums
from loopgguf.errors import InputError, OutputError
from loopgguf.grams import (
    GramHeader,
    GramWriter,
    check_disk,
    find_grams,
    gram_path,
    load_grams,
    pack_triangle,
    packed_size,
    refuse_existing_grams,
    stored_bytes,
    unpack_triangle,
)
from loopgguf.safetensor import read_safetensors

HEADER = GramHeader((1, 7), 3, 11, "f" * 64)
Q, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"


def symmetric(n: int, seed: int = 0) -> np.ndarray:
    X = np.random.default_rng(seed).standard_normal((2 * n, n)).astype(np.float32)
    return X.T @ X


@given(st.integers(1, 9), st.sampled_from([0, 511, 512, 1030]))
def test_a_triangle_holds_a_symmetric_matrix(n: int, more: int):
    """Catches a wrong diagonal, a lower half that stays empty, and blocks that are mirrored to the wrong place."""
    n = n if more == 0 else more
    matrix = np.arange(n * n, dtype=np.float32).reshape(n, n)
    matrix = np.triu(matrix) + np.triu(matrix, 1).T
    assert (unpack_triangle(pack_triangle(matrix)) == matrix).all()


def test_a_triangle_by_hand():
    """Catches a layout other than the documented one: rows of the upper triangle."""
    assert pack_triangle(np.array([[1, 2, 3], [2, 4, 5], [3, 5, 6]], np.float32)).tolist() == [1, 2, 3, 4, 5, 6]


def grams(seed: int, *, experts: bool = False) -> GramSet:
    first = FirstToken(np.arange(5, dtype=np.float32), 2.5)
    inputs = {("blk.0.attn_norm", None): Gram(symmetric(5, seed), 100), ("blk.0.ffn_down", None): Gram(symmetric(7, seed), 100)}
    if experts:
        inputs |= {("blk.0.ffn_down_exps", i): Gram(symmetric(3, i), 10 + i) for i in (0, 12)}
    curvature = {Q: Curvature(np.arange(4.0), 100)}
    return GramSet(inputs, {"blk.0.attn_norm": first}, {Q: Gram(symmetric(5, seed + 1), 100)}, {Q: first}, {DOWN: Gram(symmetric(4, seed), 100)}, curvature)


def write(tmp_path: Path, header: GramHeader = HEADER) -> Path:
    imatrix = tmp_path / "m.imatrix.gguf"
    writer = GramWriter(tmp_path / "shards", header)
    writer(0, grams(1, experts=True), grams(2))
    writer(None, GramSet(outputs={"token_embd.weight": Gram(symmetric(5), 9)}), GramSet())
    writer(1, GramSet(), GramSet())
    assert writer.publish(imatrix) == [gram_path(imatrix, 1, 2), gram_path(imatrix, 2, 2)]
    shutil.rmtree(tmp_path / "shards")  # as a finished job does
    return imatrix


def same(a: GramSet, b: GramSet) -> None:
    for what in ("inputs", "weighted", "outputs"):
        mine, other = getattr(a, what), getattr(b, what)
        assert set(mine) == set(other)
        assert all((mine[key].total == other[key].total).all() and mine[key].n_tokens == other[key].n_tokens for key in mine)
    for what in ("first", "first_weighted"):
        assert {k: (v.total.tolist(), v.weight) for k, v in getattr(a, what).items()} == {k: (v.total.tolist(), v.weight) for k, v in getattr(b, what).items()}
    assert {k: v.mean.tolist() for k, v in a.curvature.items()} == {k: v.mean.tolist() for k, v in b.curvature.items()}


def test_everything_comes_back(tmp_path: Path):
    """Catches lost counts, experts under another's number, and held-out matrices taken for the others."""
    statistics = load_grams(write(tmp_path))
    assert (statistics.holdout_chunks, statistics.seed, statistics.label_seed, statistics.fingerprint) == ((1, 7), 3, 11, "f" * 64)
    expected = grams(1, experts=True)
    same(statistics.train, GramSet(**{**vars(expected), "outputs": {**expected.outputs, "token_embd.weight": Gram(symmetric(5), 9)}}))
    same(statistics.holdout, grams(2))
    assert list(tmp_path.glob("shards/*")) == []


def test_matrices_are_read_when_asked_for(tmp_path: Path):
    """Catches a loader that needs the memory of all layers."""
    statistics = load_grams(write(tmp_path))
    first = statistics.train.inputs["blk.0.attn_norm", None]
    assert statistics.train.inputs["blk.0.attn_norm", None] is not first


def test_shards_take_no_more_than_was_announced(tmp_path: Path):
    """Catches a disk that fills up in the last hour because two sets, or gradients, were not counted."""
    shapes = {Q: (8, 16), "blk.0.attn_k.weight": (4, 16), DOWN: (16, 40), "blk.0.ffn_gate_exps.weight": (3, 24, 16)}
    writer, rng = GramWriter(tmp_path / "shards", HEADER), np.random.default_rng(0)
    parts = []
    for _ in range(2):
        sums = GramSums()
        for name, shape in shapes.items():
            for expert in range(shape[0]) if len(shape) > 2 else [None]:
                sums.add(name, expert, rng.standard_normal((20, shape[-1])).astype(np.float32))
            if len(shape) == 2:
                sums.add_gradient(name, rng.standard_normal((20, shape[1])).astype(np.float32), rng.standard_normal((20, shape[0])).astype(np.float32))
        parts.append(sums.take(0))
    writer(0, *parts)
    used = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    announced = stored_bytes(shapes, has_gradient=True)
    assert used <= announced <= used + 2 * (4096 * len(shapes) + 4 * (3 * packed_size(16) + 2 * 100))


def test_a_disk_that_is_too_small_is_refused_first(tmp_path: Path):
    """Catches a run of hours that ends with a full disk."""
    check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=r"disk space for Gram matrices .* bytes free, expected 1,"):
        check_disk(tmp_path / "not" / "yet", 10**18)


def test_a_layer_that_comes_again_replaces_its_shard(tmp_path: Path):
    """Catches a layer that counts twice after a job was killed between its shard and its state."""
    writer = GramWriter(tmp_path / "shards", HEADER)
    writer(0, grams(5), grams(6))
    writer(0, grams(1), grams(2))
    writer.require([0])
    with pytest.raises(InputError, match="layer-00001"):
        writer.require([0, 1])
    writer.publish(tmp_path / "x.imatrix.gguf")
    same(load_grams(tmp_path / "x.imatrix.gguf").train, grams(1))


def test_existing_shards_are_kept_or_replaced_as_a_whole(tmp_path: Path):
    """Catches shards of two runs side by side."""
    imatrix = write(tmp_path)
    with pytest.raises(OutputError, match="already exists"):
        refuse_existing_grams(imatrix, overwrite=False)
    refuse_existing_grams(imatrix, overwrite=True)
    writer = GramWriter(tmp_path / "shards", HEADER)
    writer(0, grams(3), grams(4))
    with pytest.raises(OutputError, match="already exists"):
        writer.publish(imatrix)
    writer.publish(imatrix, overwrite=True)
    assert find_grams(imatrix) == [gram_path(imatrix, 1, 1)]
    same(load_grams(imatrix).train, grams(3))


def test_what_was_written_is_read_back_without_names(tmp_path: Path):
    """Catches matrices that are taken for all before those of no layer have come, half a shard that is read, and other values or
    another split than `load_grams` gives."""
    writer = GramWriter(tmp_path / "shards", HEADER)
    assert not writer.is_complete
    writer(1, GramSet(outputs={"blk.1.attn_q.weight": Gram(symmetric(3), 9)}), GramSet())
    writer(0, grams(1, experts=True), grams(2))
    writer(0, grams(1, experts=True), grams(2))
    assert not writer.is_complete
    writer(None, GramSet(outputs={"token_embd.weight": Gram(symmetric(5), 9)}), GramSet())
    (tmp_path / "shards" / "layer-00002.part").write_bytes(b"half")
    again = GramWriter(tmp_path / "shards", HEADER)
    assert writer.is_complete and again.is_complete
    for read in (writer.written(), again.written()):
        assert (read.holdout_chunks, read.seed, read.label_seed, read.fingerprint) == ((1, 7), 3, 11, "f" * 64)
        expected = grams(1, experts=True)
        others = {"token_embd.weight": Gram(symmetric(5), 9), "blk.1.attn_q.weight": Gram(symmetric(3), 9)}
        same(read.train, GramSet(**{**vars(expected), "outputs": {**expected.outputs, **others}}))
        same(read.holdout, grams(2))
    writer.publish(tmp_path / "x.imatrix.gguf")
    same(load_grams(tmp_path / "x.imatrix.gguf").train, writer.written().train)


def test_a_damaged_shard_is_not_read_back(tmp_path: Path):
    """Catches a layer without feedback, or a traceback, because a job that goes on finds half of what it wrote."""
    writer = GramWriter(tmp_path / "shards", HEADER)
    writer(0, grams(1), grams(2))
    shard = tmp_path / "shards" / "layer-00000"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(InputError, match="layer-00000"):
        writer.written()


@pytest.mark.parametrize("can_link", [True, False])
def test_shards_are_published_again_by_a_job_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool):
    """Catches shards that are gone from the job's folder when only some of them had got their names; and another disk."""
    if not can_link:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    imatrix = tmp_path / "m.imatrix.gguf"
    writer = GramWriter(tmp_path / "shards", HEADER)
    writer(0, grams(1), grams(2))
    writer(None, GramSet(outputs={"token_embd.weight": Gram(symmetric(5), 9)}), GramSet())
    writer.publish(imatrix)
    find_grams(imatrix)[1].unlink()
    writer.publish(imatrix, overwrite=True)
    shutil.rmtree(tmp_path / "shards")
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in find_grams(imatrix)]
    assert len(find_grams(imatrix)) == 2
    same(load_grams(imatrix).holdout, grams(2))


@pytest.mark.parametrize("what", ["none", "missing", "truncated", "other run", "two runs", "no header"])
def test_shards_that_are_not_whole_or_not_of_one_run_are_refused(tmp_path: Path, what: str):
    """Catches error feedback with half a model's matrices, or with another text's."""
    imatrix = write(tmp_path)
    first, second = find_grams(imatrix)
    match what:
        case "none":
            first.unlink(), second.unlink()
            expected = "got no m.imatrix.gram-"
        case "missing":
            second.unlink()
            expected = "gram-00002-of-00002.safetensors is missing"
        case "truncated":
            first.write_bytes(first.read_bytes()[:-4])
            expected = "malformed safetensors: size of the file"
        case "other run":
            writer = GramWriter(tmp_path / "shards", GramHeader((1,), 3, 11, "0" * 64))
            writer(0, GramSet(outputs={"token_embd.weight": Gram(symmetric(5), 9)}), GramSet())
            writer.publish(tmp_path / "other.imatrix.gguf")
            gram_path(tmp_path / "other.imatrix.gguf", 1, 1).replace(second)
            expected = "calibration in .*gram-00002-of-00002"
        case "two runs":
            second.replace(gram_path(imatrix, 2, 3))
            expected = r"parts of \[2, 3\] shards"
        case _:
            first.write_bytes(b"\2\0\0\0\0\0\0\0{}")
            expected = "loopgguf.gram in .*got None"
    with pytest.raises(InputError, match=expected):
        load_grams(imatrix)


def test_an_entry_of_another_type_or_size_is_named(tmp_path: Path):
    """Catches float64 or a half-written triangle read as a matrix."""
    imatrix = write(tmp_path)
    path = find_grams(imatrix)[0]
    stored = read_safetensors(path)[1]["inputs.blk.0.attn_norm"]
    raw = path.read_bytes()
    assert stored.shape == (15,)
    path.write_bytes(raw.replace(b'"inputs.blk.0.attn_norm":{"dtype":"F32","shape":[15]', b'"inputs.blk.0.attn_norm":{"dtype":"I32","shape":[15]'))
    with pytest.raises(InputError, match=r"'inputs.blk.0.attn_norm'.*I32.*expected F32"):
        load_grams(imatrix)
    path.write_bytes(raw.replace(b'"inputs.blk.0.attn_norm/tokens"', b'"inputs.blk.0.attn_norm/tokenz"'))
    with pytest.raises(InputError, match=r"divisor of tensor 'inputs.blk.0.attn_norm'.*got nothing"):
        load_grams(imatrix)


@pytest.mark.parametrize(("total", "n_tokens"), [(np.nan, 9), (np.inf, 9), (3e38, 9), (1.0, -1)])
def test_sums_that_are_not_finite_are_refused(tmp_path: Path, total: float, n_tokens: int):
    """Catches a damaged file that turns every code of a tensor into NaN, found by nobody before the model speaks."""
    writer = GramWriter(tmp_path / "shards", HEADER)
    writer(0, GramSet({("blk.0.attn_norm", None): Gram(np.full((3, 3), total, np.float32), n_tokens)}), GramSet())
    writer.publish(tmp_path / "m.imatrix.gguf")
    loaded = load_grams(tmp_path / "m.imatrix.gguf")
    with pytest.raises(InputError, match=r"tensor 'inputs\.blk\.0\.attn_norm' in .*expected finite sums over a number from 0"):
        loaded.train.inputs["blk.0.attn_norm", None]


def test_a_split_that_no_text_can_hold_is_refused(tmp_path: Path):
    """Catches half a surrogate pair, which JSON can spell, ending in a traceback."""
    path = find_grams(write(tmp_path))[0]
    raw = path.read_bytes()
    at = raw.index(b'"loopgguf.split":"') + len(b'"loopgguf.split":"')
    path.write_bytes(raw[:at] + b"\\ud800" + raw[at + 6 :])
    with pytest.raises(InputError, match=r"loopgguf\.split of "):
        load_grams(tmp_path / "m.imatrix.gguf")
