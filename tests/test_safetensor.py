"""The strict safetensors reader: what a good file gives, and that no malformed one gives anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_checkpoint import pack_safetensors, write_checkpoint

from loopgguf.errors import InputError
from loopgguf.safetensor import INDEX_NAME, read_array, read_safetensors, read_weights, write_safetensors

TWO = {"a": ("F32", np.arange(6, dtype="<f4").reshape(2, 3)), "b": ("BF16", np.arange(4, dtype="<u2"))}


def entry(dtype: object = "F32", shape: object = (2, 3), span: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    """Our idea of the format must be the safetensors library's, alignment padding included."""
    arrays = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "y": np.arange(5, dtype=np.float16), "z": np.float32(7).reshape(1)}
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, tensors = read_safetensors(tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        t = tensors[name]
        assert (t.shape, raw[t.offset : t.offset + t.n_bytes]) == (array.shape, array.tobytes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": 7}, "tensor 'a'.*object with dtype"),
        ({"a": {"dtype": "F32"}}, "tensor 'a'.*object with dtype"),
        ({"a": entry(dtype="Q4")}, "dtype of tensor 'a'.*'Q4'"),
        ({"a": entry(dtype=["F32"])}, "dtype of tensor 'a'"),
        ({"a": entry(shape=[2, 4])}, "data_offsets of tensor 'a'.*got 24 bytes, expected 32"),
        ({"a": entry(shape=[-2, -3])}, "shape of tensor 'a'"),
        ({"a": entry(shape=[True, 6])}, "shape of tensor 'a'"),
        ({"a": entry(shape=[2**62, 2**62])}, "data_offsets of tensor 'a'"),
        ({"a": entry(shape=[1] * 100_000)}, "shape of tensor 'a'"),
        ({"a": entry(span=[24, 0])}, "data_offsets of tensor 'a'"),
        ({"a": entry(span=[0, 24.0])}, "data_offsets of tensor 'a'"),
        ({"a": entry(span=[0, 24, 32])}, "data_offsets of tensor 'a'"),
        ({"a": entry(span=[8, 32])}, "tensor 'a'.*begin 8.*expected 0"),
        ({"b": entry("BF16", [4], [16, 24])}, "tensor 'b'.*begin 16.*expected 24.*no overlap"),
        ({"b": entry("BF16", [4], [32, 40])}, "tensor 'b'.*begin 32.*expected 24"),
        ({"b": ...}, "size of the file.*expected"),
        ({"c": entry("F32", [100], [32, 432])}, "size of the file.*truncated"),
    ],
)
def test_malformed_headers(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    """Spans that overlap, wrap or leave the file would read another tensor's bytes, or none, without a word."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack_safetensors(TWO, changes))
    with pytest.raises(InputError, match=message) as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "length of the header.*truncated"),
        (b"\x04\x00\x00", "length of the header.*truncated"),
        ((2**63).to_bytes(8, "little") + b"{}", "length of the header"),
        ((3).to_bytes(8, "little") + b"{}", "length of the header"),
        ((2).to_bytes(8, "little") + b"[]", "malformed JSON.*a list"),
        ((2).to_bytes(8, "little") + b"{\xff", "malformed JSON"),
        ((100_000).to_bytes(8, "little") + b'{"a":' * 20_000, "malformed JSON"),
        ((25).to_bytes(8, "little") + b'{"a":1,"b":{"x":1,"x":2}}', "malformed JSON.*'x' twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00model", "length of the header"),
    ],
)
def test_not_safetensors(tmp_path: Path, raw: bytes, message: str) -> None:
    """A truncated download, a pickle with the wrong name or a git-lfs pointer is named, not guessed at."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        read_safetensors(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400))
def test_truncation_anywhere(tmp_path: Path, cut: int) -> None:
    """Any cut file must be refused; one accepted would be read past its end hours later."""
    whole = pack_safetensors(TWO)
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(InputError):
        read_safetensors(path)


# --- folders -------------------------------------------------------------------------------------------------------------


def test_shards_by_index(tmp_path: Path) -> None:
    """The shards of the index are read, in order, and nothing beside them."""
    write_checkpoint(tmp_path, weights=TWO, n_shards=2)
    (tmp_path / "model-extra.safetensors").write_bytes(pack_safetensors(TWO))
    weights = read_weights(tmp_path)
    assert [path.name for path in weights.files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert weights.tensors["b"].path == weights.files[1]


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..\\m.safetensors", "C:m.safetensors", "model.bin", 7, None]
)
def test_index_stays_in_the_folder(tmp_path: Path, name: object) -> None:
    """An index from the internet must not choose which of the user's files are read."""
    write_checkpoint(tmp_path, weights=TWO)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"shard of 'b' in .*index\.json: got .*same folder"):
        read_weights(tmp_path)


def test_links_into_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """The Hub's cache keeps every file of a snapshot as a link to ../../blobs; refusing links would refuse all of it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    write_checkpoint(blobs, weights=TWO)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    assert read_weights(snapshot).tensors.keys() == {"a", "b"}
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="missing or not a file"):
        read_weights(snapshot)


def test_missing_shards(tmp_path: Path) -> None:
    """With or without an index, an incomplete download is named before any work."""
    write_checkpoint(tmp_path, weights=TWO, n_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is missing"):
        read_weights(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(InputError, match=r"missing shard .*model-00002-of-00002\.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model.safetensors"}, "tensor 'b' in .* is not named in"),
        ({"a": "model.safetensors", "b": "model.safetensors", "c": "model.safetensors"}, "lacks tensor 'c'"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_index_that_contradicts_its_shards(tmp_path: Path, weight_map: object, message: str) -> None:
    """An index of another version of the model means that the files do not belong together."""
    write_checkpoint(tmp_path, weights=TWO)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    """Which copy wins would depend on the order of file names."""
    write_checkpoint(tmp_path, weights=TWO)
    (tmp_path / "model-copy.safetensors").write_bytes(pack_safetensors(TWO))
    with pytest.raises(InputError, match=r"'a' is in two shards, model-copy\.safetensors and model\.safetensors"):
        read_weights(tmp_path)


def test_pickle_only(tmp_path: Path) -> None:
    """Pickle runs code: it is never opened, and the user learns how to get rid of it."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(InputError, match=r"only as pickle \(pytorch_model\.bin\).*save_pretrained"):
        read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="no weights"):
        read_weights(tmp_path)


# --- writing --------------------------------------------------------------------------------------------------------------


def test_arrays_come_back_from_what_is_written(tmp_path: Path):
    """Catches a lost dtype, an array that is not contiguous written in memory's order, and an order that depends on insertion."""
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.array(7, np.int64),
        "empty": np.zeros((0, 3)),
        "big": np.array([1.5, -2], ">f8"),
        "bool": np.array([True, False]),
        "ü": np.arange(3, dtype=np.uint8),
    }
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, ordered in zip(paths, (arrays, dict(reversed(arrays.items()))), strict=True):
        with path.open("wb") as stream:
            write_safetensors(stream.write, ordered, {"key": "value"})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    header, stored = read_safetensors(paths[0])
    assert json.loads(header)["__metadata__"] == {"key": "value"}
    for name, array in arrays.items():
        got = read_array(stored[name])
        assert got.shape == array.shape and (got == array).all()
        assert got.dtype == array.dtype.newbyteorder("<")


def test_a_type_that_numpy_lacks_is_refused(tmp_path: Path):
    """Catches BF16 read as F16."""
    path = tmp_path / "x"
    path.write_bytes(pack_safetensors({"w": ("BF16", np.zeros(2, np.uint16))}))
    with pytest.raises(InputError, match=r"dtype of tensor 'w'.*got BF16"):
        read_array(read_safetensors(path)[1]["w"])
