"""Inputs that a quantizer must survive, through the command line: one clear line, the documented exit code, nothing written."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Place, Run, refused
from test_container import HOSTILE
from test_runnable import METADATA
from tiny_llama import write_tiny_llama

from loopgguf.accumulators import Columns
from loopgguf.container import Value, ValueType, array, read_gguf, string, uint32, write_gguf
from loopgguf.formats import GgmlType
from loopgguf.safetensor import INDEX_NAME
from loopgguf.statistics import Statistics, save_imatrix

PLAIN = ("--quant-type", "Q4_0", "--no-imatrix", "-o", "x.gguf")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
Case = Callable[[Place], list[object]]


@pytest.fixture
def place(run: Run, broken_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Place(broken_model, write_tiny_llama(scratch / "tiny.gguf"), scratch, run, monkeypatch)


# --- GGUF ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raw", "words"), HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("command", [("quantize", *PLAIN), ("inspect",)], ids=["quantize", "inspect"])
def test_a_malformed_gguf(run: Run, tmp_path: Path, command: tuple[str, ...], raw: bytes, words: list[str]) -> None:
    """A check that only the reader's own tests see, because a command reads the file in another way first."""
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    name, *options = command
    said = words if name != "inspect" or raw.startswith(b"GGUF") else ["hostile.gguf"]  # of which `inspect` does not know that it was to be a GGUF
    refused(run(name, path, *options), 3, *said)


# what other modules than `runnable` refuse
MISSING: dict[str, tuple[Mapping[str, Value | None], list[str]]] = {
    "no architecture": ({"general.architecture": None}, ["general.architecture"]),
    "architecture is a number": ({"general.architecture": uint32(7)}, ["general.architecture", "got 7"]),
    "unknown architecture": ({"general.architecture": string("starship")}, ["starship"]),
    "no block_count": ({"llama.block_count": None}, ["block_count"]),
    "block_count is a text": ({"llama.block_count": string("1")}, ["block_count", "got '1'"]),
    "head_count is a text": ({"llama.attention.head_count": string("2")}, ["head_count"]),
    "no vocabulary": ({"tokenizer.ggml.model": None}, ["tokenizer.ggml.model"]),
}


@pytest.mark.parametrize(("changes", "words"), [*METADATA.values(), *MISSING.values()], ids=[*METADATA, *MISSING])
def test_metadata_that_llama_cpp_trips_over(run: Run, tmp_path: Path, changes: Mapping[str, Value | None], words: list[str]) -> None:
    """A process that llama.cpp aborts, without a line of ours, or a read behind the end of an array."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", changes=changes)
    refused(run("quantize", path, *PLAIN), 3, *words)


@pytest.mark.parametrize(
    "changes", [{"llama.attention.head_count": uint32(0)}, {"tokenizer.ggml.model": string("starship")}], ids=["head_count 0", "vocabulary"]
)
def test_metadata_that_llama_cpp_refuses_itself(run: Run, tmp_path: Path, changes: Mapping[str, Value | None]) -> None:
    """A file published although nothing can load it."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", changes=changes)
    refused(run("quantize", path, *PLAIN), 1, "llama.cpp cannot load")
    refused(run("imatrix", path), 3, "llama.cpp cannot load")


# --- splits -------------------------------------------------------------------------------------------------------------


def _split(place: Place, *shards: tuple[Mapping[str, Value], list[str]], stem: str = "tiny", count: int = 2) -> Path:
    """Write shards of the tiny model: changes of split.*, and the names of the tensors of each; return the first."""
    whole = read_gguf(place.gguf)
    infos = {info.name: info for info in whole.tensors}
    raw = place.gguf.read_bytes()
    for number, (changes, names) in enumerate(shards):
        split = {
            "split.no": Value(ValueType.UINT16, number),
            "split.count": Value(ValueType.UINT16, count),
            "split.tensors.count": Value(ValueType.INT32, len(infos)),
        }
        metadata = {**(whole.metadata if number == 0 else {}), **split, **changes}
        tensors = [(name, GgmlType.F32, np.frombuffer(raw, "<f4", infos[name].n_bytes // 4, infos[name].offset).reshape(infos[name].shape)) for name in names]
        write_gguf(place.scratch / f"{stem}-{number + 1:05d}-of-{count:05d}.gguf", metadata, tensors)
    return place.scratch / f"{stem}-00001-of-{count:05d}.gguf"


def _names(place: Place) -> list[str]:
    return [info.name for info in read_gguf(place.gguf).tensors]


def _unsplit_name(place: Place) -> Path:
    return _split(place, ({}, _names(place)[:5]), ({}, _names(place)[5:])).rename(place.scratch / "first.gguf")


def _second_shard(place: Place) -> Path:
    return _split(place, ({}, _names(place)[:5]), ({}, _names(place)[5:])).with_name("tiny-00002-of-00002.gguf")


def _shard_of_another_model(place: Place) -> Path:
    return _split(place, ({}, _names(place)[:5]), ({"split.count": Value(ValueType.UINT16, 3)}, _names(place)[5:]))


SPLITS: dict[str, tuple[Callable[[Place], Path], list[str]]] = {
    "missing shard": (lambda place: _split(place, ({}, _names(place))), ["missing shard", "tiny-00002-of-00002.gguf"]),
    "the second shard": (_second_shard, ["not the first shard", "tiny-00001-of-00002.gguf"]),
    "name without numbers": (_unsplit_name, ["first.gguf", "not named like one"]),
    "shards of two models": (_shard_of_another_model, ["tiny-00002-of-00002.gguf", "split.count"]),
    "a tensor in two shards": (lambda place: _split(place, ({}, _names(place)), ({}, _names(place)[:1])), ["do not belong together"]),
    "a tensor in no shard": (lambda place: _split(place, ({}, _names(place)[:5]), ({}, _names(place)[6:])), ["do not belong together"]),
    "count is a text": (lambda place: _split(place, ({"split.count": string("2")}, _names(place))), ["split.count", "got '2'"]),
    "count is 0": (lambda place: _split(place, ({"split.count": uint32(2**32 - 1)}, _names(place))), ["split.count", "4294967295"]),
}


@pytest.mark.parametrize(("make", "words"), SPLITS.values(), ids=SPLITS.keys())
def test_splits_that_do_not_fit(place: Place, make: Callable[[Place], Path], words: list[str]) -> None:
    """Half a model, or two halves of different ones, quantized as if it were one."""
    refused(place.run("quantize", make(place), *PLAIN), 3, *words)


def test_a_first_shard_of_metadata_alone_is_read(place: Place) -> None:
    """The converter's `--no-tensor-first-split` taken for a vocabulary."""
    done = place.run("quantize", _split(place, ({}, []), ({}, _names(place))), *PLAIN)
    assert done.code == 0, done.err
    assert len(read_gguf(Path("x.gguf")).tensors) == len(_names(place))


# --- imatrix ------------------------------------------------------------------------------------------------------------

Q = "blk.0.attn_q.weight"


def _save(place: Place, name: str, squares: Any, counts: Any) -> Path:
    path = place.scratch / "a.imatrix.gguf"
    save_imatrix(Statistics({name: Columns(np.array(squares, np.float32), np.array(counts))}, ("a.txt",), 1, 512), path)
    return path


def _write_imatrix(place: Place, squares: np.ndarray, counts: np.ndarray, *, without: str = "") -> Path:
    path = place.scratch / "a.imatrix.gguf"
    metadata = {"imatrix.datasets": array(ValueType.STRING, ["a"]), "imatrix.chunk_count": uint32(1), "imatrix.chunk_size": uint32(512)}
    tensors = [(f"{Q}.in_sum2", GgmlType.F32, squares.astype(np.float32)), (f"{Q}.counts", GgmlType.F32, counts.astype(np.float32))]
    write_gguf(path, {key: value for key, value in metadata.items() if key != without}, tensors)
    return path


def _dat(place: Place, raw: bytes) -> Path:
    return place.write("a.imatrix.dat", raw)


def _entry(name: bytes, n_calls: int, values: list[float]) -> bytes:
    return struct.pack("<i", len(name)) + name + struct.pack("<ii", n_calls, len(values)) + struct.pack(f"<{len(values)}f", *values)


ONES = np.ones((1, 32))
IMATRICES: dict[str, tuple[Callable[[Place], Path], list[str]]] = {
    "NaN": (lambda place: _write_imatrix(place, np.full((1, 32), np.nan), np.ones((1, 1))), [Q, "got nan"]),
    "infinite": (lambda place: _write_imatrix(place, np.full((1, 32), np.inf), np.ones((1, 1))), [Q, "got inf"]),
    "negative": (lambda place: _write_imatrix(place, -ONES, np.ones((1, 1))), [Q, "got -1"]),
    "counts 0": (lambda place: _write_imatrix(place, ONES, np.zeros((1, 1))), [Q, "0 tokens"]),
    "counts NaN": (lambda place: _write_imatrix(place, ONES, np.full((1, 1), np.nan)), [Q, "counts", "nan"]),
    "counts negative": (lambda place: _write_imatrix(place, ONES, -np.ones((1, 1))), [Q, "counts", "-1"]),
    "counts beyond any text": (lambda place: _write_imatrix(place, ONES, np.full((1, 1), 1e30)), [Q, "counts", "e+30"]),
    "another width": (lambda place: _save(place, Q, np.ones((1, 64)), [512]), [Q, "got 64 columns", "expected 32"]),
    "another number of experts": (lambda place: _save(place, Q, np.ones((2, 32)), [5, 5]), [Q, "got 2 experts", "expected 1"]),
    "no name of the model": (lambda place: _save(place, "blk.9.attn_q.weight", np.ones((1, 32)), [5]), ["another model", "blk.9.attn_q.weight"]),
    **{
        f"without {key}": (lambda place, key=key: _write_imatrix(place, ONES, np.ones((1, 1)), without=key), [key, "got nothing"])
        for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    },
    "a model": (lambda place: place.gguf, ["imatrix.datasets", "no imatrix"]),
    "dat: empty": (lambda place: _dat(place, b""), ["number of entries"]),
    "dat: truncated": (lambda place: _dat(place, struct.pack("<i", 1) + _entry(Q.encode(), 1, [1.0] * 32)[:-1]), ["values of", Q]),
    "dat: negative length": (lambda place: _dat(place, struct.pack("<ii", 1, -5) + bytes(40)), ["length of name", "-5"]),
    "dat: entries without end": (lambda place: _dat(place, struct.pack("<i", 2**31 - 1) + bytes(40)), ["number of entries", "2147483647"]),
    "dat: NaN": (lambda place: _dat(place, struct.pack("<i", 1) + _entry(Q.encode(), 1, [float("nan")] * 32)), [Q, "nan"]),
    "LFS pointer": (lambda place: _dat(place, LFS_POINTER), ["git-lfs pointer"]),
    "a folder": (lambda place: place.model, ["broken", "expected a file"]),
    "a device": (lambda place: Path("/dev/zero"), ["/dev/zero", "expected a file"]),
    "missing": (lambda place: place.scratch / "no.dat", ["no.dat"]),
}


@pytest.mark.parametrize(("make", "words"), IMATRICES.values(), ids=IMATRICES.keys())
def test_an_imatrix_that_does_not_fit(place: Place, make: Callable[[Place], Path], words: list[str]) -> None:
    """A quantization that silently goes without the imatrix, poisons scales, or takes all memory."""
    refused(place.run("quantize", place.gguf, "--quant-type", "Q4_0", "--imatrix", make(place), "-o", "x.gguf"), 3, *words)


# --- checkpoint folders -------------------------------------------------------------------------------------------------


def _config(**changes: object) -> Case:
    return lambda place: ["convert", place.edit_config(**changes)]


def _file(name: str, content: bytes | str, command: str = "convert") -> Case:
    def case(place: Place) -> list[object]:
        (place.model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [command, place.model]

    return case


def _rename_tensor(old: str, new: str) -> Case:
    """Give a tensor another name of the same length in the header."""

    def case(place: Place) -> list[object]:
        path = place.model / "model.safetensors"
        raw = path.read_bytes()
        padded = (new + " " * (len(old) - len(new))).encode() if len(new) < len(old) else new.encode()
        assert len(padded) == len(old)
        path.write_bytes(raw.replace(old.encode(), padded, 1))
        return ["convert", place.model]

    return case


def _index(weight_map: object) -> Case:
    return _file(INDEX_NAME, json.dumps({"weight_map": weight_map}))


def _device_in_place_of(name: str) -> Case:
    def case(place: Place) -> list[object]:
        (place.model / name).unlink(missing_ok=True)
        (place.model / name).symlink_to("/dev/zero")
        return ["convert", place.model]

    return case


def _edit_tokenizer(**changes: object) -> Case:
    def case(place: Place) -> list[object]:
        path = place.model / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
        return ["convert", place.model]

    return case


QUANTIZED: dict[str, tuple[dict[str, object], str]] = {
    "FP8 in blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantized with fp8 (weight_block_size [128, 128])"),
    "MXFP4": ({"quant_method": "mxfp4"}, "quantized with mxfp4"),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "quantized with gptq (bits 4)"),
    "AWQ": ({"quant_method": "awq", "w_bit": 4}, "quantized with awq (w_bit 4)"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}, "quantized with bitsandbytes (bnb_4bit_quant_type nf4)"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "quantized with compressed-tensors"),
    "ModelOpt": ({"quant_algo": "NVFP4"}, "quantized with NVFP4"),
    "a scheme without a name": ({}, "quantized with an unnamed scheme"),
    "a scheme in two lines": ({"quant_method": "a\nb"}, "quantized with a\\nb"),
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
FOLDERS: dict[str, tuple[Case, list[str]]] = {
    "config is no JSON": (_file("config.json", "{"), ["config.json"]),
    "config is a list": (_file("config.json", "[]"), ["config.json", "a list"]),
    "config is a device": (_device_in_place_of("config.json"), ["config.json"]),
    "config nested deeply": (_file("config.json", "[" * 100_000), ["config.json"]),
    "no architectures": (_config(architectures=None), ["architectures is missing"]),
    "architectures is a text": (_config(architectures="LlamaForCausalLM"), ["architectures", "a list of class names"]),
    "multimodal": (_config(text_config={"model_type": "llama"}), ["text_config", "multimodal"]),
    "unknown architecture": (_config(architectures=["StarshipForCausalLM"]), ["StarshipForCausalLM"]),
    "hidden_size 0": (_config(hidden_size=0), ["hidden_size", "got 0"]),
    "hidden_size is a text": (_config(hidden_size="256"), ["hidden_size", "'256'"]),
    "four billion layers": (_config(num_hidden_layers=2**32 - 1), ["missing tensor", "model.layers.6."]),
    "infinite epsilon": (_config(rms_norm_eps=float("inf")), ["rms_norm_eps", "inf"]),
    **{name: (_config(quantization_config=section), [words]) for name, (section, words) in QUANTIZED.items()},
    "quantized, and config.json does not say so": (_rename_tensor(Q_PROJ, Q_PROJ.replace("weight", "SCB")), ["missing tensor", Q_PROJ]),
    "safetensors: empty": (_file("model.safetensors", b""), ["model.safetensors", "truncated"]),
    "safetensors: 3 bytes": (_file("model.safetensors", b"abc"), ["model.safetensors", "truncated"]),
    "safetensors: header of 2^63 bytes": (_file("model.safetensors", (2**63).to_bytes(8, "little") + b"{}"), ["length of the header"]),
    "safetensors: header of 200 MB": (_file("model.safetensors", (200_000_000).to_bytes(8, "little") + b"{}"), ["length of the header"]),
    "safetensors: LFS pointer": (_file("model.safetensors", LFS_POINTER), ["model.safetensors", "git-lfs pointer"]),
    "safetensors: negative offset": (
        _file("model.safetensors", (70).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'.ljust(70)),
        ["data_offsets of tensor 'a'"],
    ),
    "index: ../": (_index({"a": "../a.safetensors"}), ["../a.safetensors", "same folder"]),
    "index: absolute": (_index({"a": "/etc/a.safetensors"}), ["/etc/a.safetensors", "same folder"]),
    "index: missing shard": (_index({"a": "a.safetensors"}), ["a.safetensors is missing"]),
    "index: a name of 5000 characters": (_index({"a": "a" * 5000 + ".safetensors"}), [INDEX_NAME]),
    "index: a name that no file can have": (_index({"a": "\ud800.safetensors"}), ["\\ud800.safetensors"]),
    "index: a device": (_device_in_place_of(INDEX_NAME), [INDEX_NAME]),
    "tokenizer: not UTF-8": (_file("tokenizer.json", b'{"model": "\xff"}'), ["tokenizer.json", "UTF-8"]),
    "tokenizer: LFS pointer": (_file("tokenizer.json", LFS_POINTER), ["tokenizer.json", "git-lfs pointer"]),
    "tokenizer: model is an LFS pointer": (_file("tokenizer.model", LFS_POINTER), ["tokenizer.model", "git-lfs pointer"]),
    "tokenizer: added token beyond the embedding": (_edit_tokenizer(added_tokens=[{"id": 4096, "content": "<x>", "special": True}]), ["added_tokens", "4096"]),
    "tokenizer: of another kind": (_edit_tokenizer(model={"type": "Unigram"}), ["tokenizer.json", "Unigram"]),
}


@pytest.mark.parametrize(("case", "words"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_that_is_no_model(place: Place, case: Case, words: list[str]) -> None:
    """A traceback, a vague line, or a file that is made all the same."""
    refused(place.run(*case(place), "-o", "x.gguf"), 3, *words)


def test_a_link_into_the_hub_s_cache_is_no_link_out(place: Place) -> None:
    """Every file of a model that the Hub's own tools downloaded refused."""
    blobs = place.scratch / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    path = place.model / "model.safetensors"
    path.rename(blobs / "0123")
    path.symlink_to(blobs / "0123")
    assert place.run("convert", place.model, "-o", "x.gguf").code == 0
    (blobs / "0123").rename(place.scratch / "0123")
    path.unlink()
    path.symlink_to(place.scratch / "0123")
    Path("x.gguf").unlink()
    refused(place.run("convert", place.model, "-o", "x.gguf"), 3, "model.safetensors is a link to", "0123")


# --- values -------------------------------------------------------------------------------------------------------------


def _fill(place: Place, name: str, values: np.ndarray) -> None:
    """Give a weight of the GGUF other values; a row, or one for each row."""
    info = place.tensor(name)
    place.patch(info.offset, np.broadcast_to(values, info.shape).astype("<f4").tobytes())


COLUMN = np.arange(32)
STRANGE: dict[str, np.ndarray] = {
    "blk.0.attn_q.weight": np.zeros(32),
    "blk.0.attn_k.weight": np.full(32, -0.0),
    "blk.0.attn_v.weight": np.full(32, 0.25),
    "blk.0.attn_output.weight": np.full(32, 1e-42),
    "blk.0.ffn_gate.weight": np.full(32, 1.4e-45),
    "blk.0.ffn_up.weight": np.where(COLUMN == 3, 65505.0, 0.01),
    "output.weight": np.arange(264)[:, None] % 2 * np.ones(32),
}


@pytest.mark.parametrize("quant_type", ["Q4_0", "IQ4_NL", "Q8_0"])
def test_values_that_are_strange_but_finite(place: Place, quant_type: str) -> None:
    """NaN scales of zeros, constants or denormals; a model refused for an outlier that its type can hold."""
    for name, values in STRANGE.items():
        _fill(place, name, values)
    done = place.run("quantize", place.gguf, "--quant-type", quant_type, "--no-imatrix", "-o", "x.gguf")
    assert done.code == 0, done.err
    assert place.run("verify", "x.gguf", "--against", place.gguf).code == 0


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (float("nan"), 3, ["holds NaN or infinity"]),
        (float("inf"), 3, ["holds NaN or infinity"]),
        (float("-inf"), 3, ["holds NaN or infinity"]),
        (1e30, 1, ["non-finite scale", "--tensor-type"]),
    ],
)
def test_values_that_no_block_can_hold(place: Place, value: float, code: int, words: list[str]) -> None:
    """A file that loads and says `GGGGGG`."""
    _fill(place, "blk.0.ffn_up.weight", np.where(COLUMN == 3, value, 0.01))
    refused(place.run("quantize", place.gguf, *PLAIN), code, "blk.0.ffn_up.weight", *words)


# --- calibration --------------------------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[str, bytes, list[str]]] = {
    "empty": ("a.txt", b"", ["a.txt", "empty"]),
    "white space": ("a.txt", b" \r\n\t\n", ["a.txt", "empty"]),
    "shorter than a chunk": ("a.txt", b"Hello", ["a.txt"]),
    "not UTF-8": ("a.txt", "caf\xe9".encode("latin-1"), ["a.txt", "0xe9", "offset 3"]),
    "UTF-16": ("a.txt", "hello".encode("utf-16"), ["a.txt", "UTF-8"]),
    "binary": ("a.txt", b"PK\3\4\0\0\0", ["a.txt", "zero byte"]),
    "LFS pointer": ("a.txt", LFS_POINTER, ["a.txt", "git-lfs pointer"]),
    "jsonl: bad row": ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl, line 2"]),
    "jsonl: a number": ("a.jsonl", b"7\n", ["a.jsonl, line 1", "a number"]),
    "jsonl: no column": ("a.jsonl", b'{"body": "a"}\n', ["a.jsonl, line 1", "body"]),
    "jsonl: a role that is missing": ("a.jsonl", b'{"messages": [{"content": "a"}]}\n', ["a.jsonl, line 1", "role"]),
    "json: empty list": ("a.json", b"[]", ["a.json", "no rows"]),
    "json: cut off": ("a.json", b'[{"text": "a"}', ["a.json"]),
    "parquet: none": ("a.parquet", b"PAR1", ["a.parquet"]),
    "gzip: damaged": ("a.jsonl.gz", b"\x1f\x8b\x08\0", ["a.jsonl.gz", "unpack"]),
}


@pytest.mark.parametrize(("name", "content", "words"), TEXTS.values(), ids=TEXTS.keys())
def test_text_that_cannot_calibrate(place: Place, name: str, content: bytes, words: list[str]) -> None:
    """An imatrix of nothing, of mojibake, or of the rows before the damaged one."""
    refused(place.run("imatrix", place.gguf, "-f", place.write(name, content), "-c", 32), 3, *words)


# --- profiles and plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_plan_or_a_profile_that_is_something_else(place: Place, command: str) -> None:
    """A traceback, or a device read without end."""
    for content, word in (
        (b"\xff", "UTF-8"),
        (b"[" * 20_000, "cannot parse"),
        (b"default: !!python/object/apply:os.system [true]", "cannot parse"),
        (b"x" * 70_000, "65536"),
    ):
        refused(place.run(command, place.gguf, "--profile", place.write("p.yaml", content), "--no-imatrix"), 2, "p.yaml", word)
    for path in (place.write("plan.json", b"{"), place.write("plan.json", LFS_POINTER), Path("/dev/zero"), place.scratch):
        refused(place.run("quantize", place.gguf, "--plan", path, "-o", "x.gguf"), 3, path)


# --- code that comes with a model ---------------------------------------------------------------------------------------


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.marker,)


def _plant(place: Place, marker: Path) -> None:
    """Put Python, a pickle and a template into the model that create `marker` when they run."""
    place.edit_config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, _name_or_path=str(place.model))
    config = place.model / "tokenizer_config.json"
    changes = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    for module in ("evil", "jinja2", "yaml", "sitecustomize", "setup", "conftest"):
        (place.model / f"{module}.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n", encoding="utf-8")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (place.model / name).write_bytes(pickle.dumps(_Bomb(marker)))
    (place.model / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}", encoding="utf-8")


def test_no_code_of_a_model_runs(place: Place) -> None:
    """A model that takes over the machine of everybody who quantizes it, by any of the ways that other tools leave open."""
    marker = place.scratch / "marker"
    _plant(place, marker)
    pickle.loads((place.model / "optimizer.pt").read_bytes())
    assert marker.exists(), "the bomb itself is a dud"
    marker.unlink()
    place.monkeypatch.chdir(place.model)  # as a user may well do
    made = place.run("imatrix", ".", "-f", place.write("a.txt", "Once upon a time there was a fox. " * 60), "-c", 64, "--samples", 2, "-o", "../a.imatrix.gguf")
    assert made.code == 0, made.err
    assert place.run("quantize", ".", "--quant-type", "Q4_0", "--imatrix", "../a.imatrix.gguf", "-o", "../x.gguf").code == 0
    chat = place.write("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    done = place.run("imatrix", ".", "-f", chat, "-o", "../b.imatrix.gguf")
    assert done.code == 3 and "SecurityError" in done.error
    assert not marker.exists()


def test_an_endless_template_ends(place: Place) -> None:
    """`{{ 'A' * 300000000 }}` compiled in the command's own process, or a loop without a limit."""
    chat = place.write("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    for template, word in (("{{ 'A' * 300000000 }}", "memory"), ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big")):
        path = write_tiny_llama(place.scratch / "chat.gguf", changes={"tokenizer.chat_template": string(template)})
        refused(place.run("imatrix", path, "-f", chat, "-c", 32), 3, "chat template of chat", word)
        path.unlink()


@pytest.mark.parametrize("flag", ["--trust-remote-code", "--trust_remote_code", "--trust-remote-code=true"])
def test_trust_remote_code_is_refused_with_the_reason(place: Place, flag: str) -> None:
    """`No such option`, which sends the user looking for the right spelling."""
    for command in ("imatrix", "quantize", "convert"):
        refused(place.run(command, place.model, flag), 2, "--trust-remote-code", "never runs code that comes with a model")
