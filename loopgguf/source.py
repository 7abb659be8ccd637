"""A checkpoint folder or a GGUF → a stream of Tensor(name, shape, type, rows), with the metadata its GGUF has.

Opening reads headers and small files only. Rows are read with `os.pread` when asked for, never mapped, so no page of a
weight stays in memory and any number of threads may read. A GGUF (whole or split) is passed on untouched. A checkpoint
gets names, order, row permutation and metadata of llama.cpp's converter (conversion/*.py) from the tables of
`architectures`; its 2-D weights keep the type they are stored in, 1-D ones become F32. Decides nothing about types and
does not look at the weights' values.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loopgguf.architectures import (
    SKIPPED_SUFFIXES,
    ExpectedWeight,
    Family,
    Hyperparameters,
    expected_weights,
    find_family,
    find_limitations,
    hyperparameter_metadata,
    read_hyperparameters,
    refuse_quantized_tensors,
    rope_factors,
    rope_source_rows,
    tensor_order,
)
from loopgguf.container import GgufFile, Shape, TensorInfo, Value, is_gguf, read_shards, string, uint32
from loopgguf.documents import load_json
from loopgguf.errors import InputError, UsageError
from loopgguf.formats import GgmlType, row_bytes
from loopgguf.modelcard import read_model_card
from loopgguf.runnable import check_runnable
from loopgguf.safetensor import StoredTensor, Weights, read_weights
from loopgguf.vocabulary import read_vocabulary

ReadRows = Callable[[int, int], NDArray[np.uint8]]

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h
_STORED_TYPES = {"F32": GgmlType.F32, "F16": GgmlType.F16, "BF16": GgmlType.BF16}

# small files whose content, not only the weights', decides the result
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "README.md",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)


@dataclass(frozen=True)
class Tensor:
    """A weight under its GGUF name: row-major shape (last dimension is the row), stored type, and where its rows are.

    `read_rows(start, stop)` returns rows of the tensor seen as (n_rows, n_in), packed in `type`, as
    (stop - start, row bytes) uint8, C-contiguous, maybe read-only; thread-safe. It is the GGUF's row order (q/k already
    permuted). It raises InputError when the file has changed or can no longer be read.
    """

    name: str
    shape: Shape
    type: GgmlType
    read_rows: ReadRows = field(repr=False, compare=False)
    shard: int = 0

    @property
    def n_in(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def n_matrices(self) -> int:
        """How many matrices are stacked in it: the experts of a 3-D tensor, else 1."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True)
class Source:
    """A model on disk: `metadata` as its GGUF has (or will have) it, tensors by layer then name, its origin.

    files: those that hold the weights. side_files: the small ones that a checkpoint has beside them. fingerprint: of
    the names, sizes, times and headers of the former, of the contents of the latter, and of the chosen pre-tokenizer; not
    of the weights. notes: one line per thing that is left out or that llama.cpp will do otherwise.
    """

    path: Path
    is_checkpoint: bool
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    files: tuple[Path, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    side_files: tuple[Path, ...] = ()
    take_fingerprint: Callable[[], str] = field(repr=False, compare=False, kw_only=True)  # of the files as they are now

    @property
    def n_weights(self) -> int:
        """The weights of all tensors."""
        return sum(tensor.n_rows * tensor.n_in for tensor in self.tensors)


def open_source(path: Path, *, pre_tokenizer: str | None = None) -> Source:
    """Return the model at `path`: a GGUF, the first shard of a split one, or a Hugging Face checkpoint folder.

    pre_tokenizer: the `tokenizer.ggml.pre` of a checkpoint instead of the one found; a GGUF has its own. Raises
    InputError naming file and key or tensor for anything missing, malformed, unknown or of an unexpected shape or dtype,
    UsageError when `pre_tokenizer` is given for a GGUF.
    """
    try:
        if path.is_dir():
            return _open_checkpoint(path, pre_tokenizer)
        if not path.is_file():
            raise InputError(f"no model at {path}: got no such file, expected a checkpoint folder or a GGUF. Check the path")
        return _open_gguf(path, pre_tokenizer)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}. Check the path and its permissions") from error


def refuse_changed(source: Source) -> None:
    """Raise InputError when the model's files are no longer those that were opened: what was read of them does not belong together."""
    try:
        now = source.take_fingerprint()
    except OSError as error:
        raise InputError(f"cannot read {error.filename or source.path} any more: {error.strerror}. Nothing was written; run again") from error
    if now != source.fingerprint:
        raise InputError(f"{source.path} changed while it was read: got other sizes, times or headers than at the start. Run again when it is complete")


# --- reading rows --------------------------------------------------------------------------------------------------------


def _pread(path: Path, offset: int, n_bytes: int) -> NDArray[np.uint8]:
    """Return exactly these bytes of a file, read without mapping it; the interpreter is free for other threads meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            parts = [os.pread(descriptor, n_bytes, offset)]
            while (missing := n_bytes - sum(map(len, parts))) and parts[-1]:  # one call reads at most 2 GiB
                parts.append(os.pread(descriptor, missing, offset + n_bytes - missing))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Check the disk and run again") from error
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    if len(data) != n_bytes:
        raise InputError(f"{path} shrank while it was read: got {len(data)} bytes at byte {offset}, expected {n_bytes}. Run again when it is complete")
    return np.frombuffer(data, np.uint8)


def _read_plain(path: Path, offset: int, n_row_bytes: int, start: int, stop: int) -> NDArray[np.uint8]:
    assert 0 <= start <= stop, (start, stop)
    return _pread(path, offset + start * n_row_bytes, (stop - start) * n_row_bytes).reshape(-1, n_row_bytes)


def _read_permuted(path: Path, offset: int, n_row_bytes: int, head_dim: int, start: int, stop: int) -> NDArray[np.uint8]:
    """Read rows in the order of llama.cpp's rope: the heads that cover them, then a gather."""
    first = start // head_dim * head_dim
    last = -(-stop // head_dim) * head_dim
    heads = _read_plain(path, offset, n_row_bytes, first, last)
    return heads[rope_source_rows(start, stop, head_dim) - first]


def _read_vector(stored: StoredTensor, head_dim: int, start: int, stop: int) -> NDArray[np.uint8]:
    """Read a 1-D tensor, which is one row, as F32; head_dim > 0: its elements are permuted as rows are."""
    raw = _pread(stored.path, stored.offset, stored.n_bytes)
    values = _WIDEN[stored.dtype](raw)
    if head_dim:
        values = values[rope_source_rows(0, len(values), head_dim)]
    return np.ascontiguousarray(values).view(np.uint8).reshape(1, -1)[start:stop]


_WIDEN: Mapping[str, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
    "F32": lambda raw: raw.view(np.float32),
    "F16": lambda raw: raw.view(np.float16).astype(np.float32),
    "BF16": lambda raw: (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32),
}


def _constant(name: str, values: NDArray[np.float32]) -> Tensor:
    """Return a 1-D F32 tensor that no file holds."""
    packed = values.view(np.uint8).reshape(1, -1)
    return Tensor(name, values.shape, GgmlType.F32, lambda start, stop: packed[start:stop])


# --- fingerprints --------------------------------------------------------------------------------------------------------


def _fingerprint(shards: Iterable[tuple[Path, int]], side_files: Iterable[Path], *words: str) -> str:
    """Return a sha256 in hex; each part is preceded by its length, so that no two lists of parts are alike.

    shards: files of weights, with the bytes of their headers.
    """
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)

    for word in words:
        add(word.encode())
    for path, header_bytes in shards:
        status = path.stat()
        add(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
        add(_pread(path, 0, header_bytes).tobytes())
    for path in side_files:
        add(os.fsencode(path.name))
        with path.open("rb") as stream:
            add(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


# --- GGUF ----------------------------------------------------------------------------------------------------------------


def _open_gguf(path: Path, pre_tokenizer: str | None) -> Source:
    if path.suffix == ".safetensors" and not is_gguf(path):
        raise InputError(f"{path} is one file of a checkpoint: expected its folder, which also has config.json. Give {path.parent}")
    if pre_tokenizer is not None:
        raise UsageError(f"--pre-tokenizer {pre_tokenizer} cannot apply: {path} is a GGUF, whose tokenizer is copied as it is. Leave the option out")
    files = read_shards(path)
    metadata = {key: value for key, value in files[0].metadata.items() if not key.startswith("split.")}
    tensors = [_gguf_tensor(file, info, shard) for shard, file in enumerate(files) for info in file.tensors]
    _refuse_no_model(path, metadata, tensors)
    check_runnable(files[0])
    headers = [(file.path, min(file.data_offset, file.size_bytes)) for file in files]
    take_fingerprint = partial(_fingerprint, headers, (), "gguf")
    return Source(
        path=path,
        is_checkpoint=False,
        metadata=metadata,
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor_order(tensor.name))),
        files=tuple(file.path for file in files),
        fingerprint=take_fingerprint(),
        take_fingerprint=take_fingerprint,
    )


def _refuse_no_model(path: Path, metadata: Mapping[str, Value], tensors: list[Tensor]) -> None:
    kind = metadata.get("general.type", string("model")).data
    if kind != "model":
        raise InputError(f"general.type in {path}: got {kind!r:.40}, expected a model. Give the model's own GGUF")
    architecture = metadata.get("general.architecture")
    if architecture is None or not isinstance(architecture.data, str):
        raise InputError(f"general.architecture in {path}: got {architecture and architecture.data!r:.40}, expected a name. Download or convert the file again")
    if not tensors:
        raise InputError(f"{path} holds no tensors: got a vocabulary or an empty first shard, expected a model. Give the model's own GGUF")


def _gguf_tensor(file: GgufFile, info: TensorInfo, shard: int) -> Tensor:
    read = partial(_read_plain, file.path, info.offset, row_bytes(info.type, info.shape[-1]))
    return Tensor(info.name, info.shape, info.type, read, shard)


# --- checkpoint folder ---------------------------------------------------------------------------------------------------


def _open_checkpoint(folder: Path, pre_tokenizer: str | None) -> Source:
    _refuse_links_out(folder)
    config = _load_config(folder)
    family = find_family(config)
    hyperparameters = read_hyperparameters(family, config)
    weights = read_weights(folder)
    tensors = sorted(_checkpoint_tensors(family, hyperparameters, config, weights), key=lambda tensor: tensor_order(tensor.name))
    vocabulary = read_vocabulary(folder, config, hyperparameters.n_vocab, pre_tokenizer)
    n_parameters = sum(tensor.n_rows * tensor.n_in for tensor in tensors)
    side_files = _side_files(folder)
    headers = [(path, 8 + len(header)) for path, header in zip(weights.files, weights.headers, strict=True)]
    take_fingerprint = partial(_fingerprint, headers, side_files, "checkpoint", pre_tokenizer or "")
    card, card_notes = read_model_card(folder.resolve(), config.get("_name_or_path"), n_parameters)
    return Source(
        path=folder,
        is_checkpoint=True,
        metadata={"general.architecture": string(family.arch), "general.type": string("model")}
        | card
        | hyperparameter_metadata(family, hyperparameters)
        | {"general.quantization_version": uint32(QUANTIZATION_VERSION)}
        | dict(vocabulary.metadata),
        tensors=tuple(tensors),
        files=weights.files,
        fingerprint=take_fingerprint(),
        take_fingerprint=take_fingerprint,
        side_files=tuple(side_files),
        notes=(*find_limitations(config, hyperparameters), *vocabulary.notes, *card_notes),
    )


def _side_files(folder: Path) -> list[Path]:
    named = [path for name in _SIDE_FILES if (path := folder / name).is_file()]
    return named + sorted((folder / "additional_chat_templates").glob("*.jinja"))


def _refuse_links_out(folder: Path) -> None:
    """Raise InputError for a file that is a link to one elsewhere: whoever made the folder must not choose which of the
    user's files become part of a GGUF. The Hub's cache keeps every file as a link into `models--…/blobs`."""
    root = os.path.realpath(folder)
    for path in (*_side_files(folder), *folder.glob("*.safetensors")):
        target = Path(os.path.realpath(path))
        is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not is_blob and not target.is_relative_to(root):
            raise InputError(f"{path} is a link to {target}, outside of the checkpoint's folder: expected the file itself. Copy it into the folder")


def _load_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    if path.is_file():
        return load_json(path)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise InputError(f"no config.json in {folder}: got a folder with GGUF files, expected a checkpoint. Give the file itself, such as {ggufs[0]}")
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"no config.json in {folder}: got a LoRA adapter, expected a whole model. Merge it into its base model first")
    raise InputError(
        f"no config.json in {folder}: expected a Hugging Face checkpoint folder or a GGUF file. Check the path, or download the rest of the folder"
    )


def _checkpoint_tensors(family: Family, hyperparameters: Hyperparameters, config: Mapping[str, object], weights: Weights) -> Iterator[Tensor]:
    """Yield the GGUF's tensors, each checked against its table row; nothing of the checkpoint may be left over."""
    refuse_quantized_tensors(sorted(weights.tensors), weights.files[0].parent)
    rest = {name: stored for name, stored in weights.tensors.items() if not name.endswith(SKIPPED_SUFFIXES)}
    for expected in expected_weights(family, hyperparameters, config):
        stored = rest.pop(expected.hf, None)
        if stored is not None:
            yield _checkpoint_tensor(stored, expected, hyperparameters.head_dim)
        elif expected.required:
            raise InputError(f"missing tensor {expected.hf!r} in {weights.files[0].parent}: config.json asks for it. Download all shards of the checkpoint")
    if rest:
        stored = min(rest.values(), key=lambda t: t.name)
        raise InputError(
            f"unknown tensor {stored.name!r:.120} in {stored.path} ({len(rest)} such): got {stored.dtype} {list(stored.shape)}, "
            f"expected none by config.json and the table of {family.arch}. Check that config.json belongs to these weights"
        )
    factors = rope_factors(hyperparameters)
    if factors is not None:
        yield _constant("rope_freqs.weight", factors)


def _checkpoint_tensor(stored: StoredTensor, expected: ExpectedWeight, head_dim: int) -> Tensor:
    where = f"tensor {stored.name!r} in {stored.path}"
    if stored.dtype not in _STORED_TYPES:
        raise InputError(f"dtype of {where}: got {stored.dtype}, expected one of {', '.join(_STORED_TYPES)}. Give the checkpoint in BF16, F16 or F32")
    if stored.shape != expected.shape:
        raise InputError(f"shape of {where}: got {list(stored.shape)}, expected {list(expected.shape)} by config.json. Check that they belong together")
    permuted_by = head_dim if expected.permuted else 0
    if len(stored.shape) == 1:
        return Tensor(expected.gguf, stored.shape, GgmlType.F32, partial(_read_vector, stored, permuted_by))
    ggml_type = _STORED_TYPES[stored.dtype]
    n_row_bytes = row_bytes(ggml_type, stored.shape[-1])
    if permuted_by:
        return Tensor(expected.gguf, stored.shape, ggml_type, partial(_read_permuted, stored.path, stored.offset, n_row_bytes, permuted_by))
    return Tensor(expected.gguf, stored.shape, ggml_type, partial(_read_plain, stored.path, stored.offset, n_row_bytes))
