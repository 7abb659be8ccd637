"""The finished file, opened again: structure and sizes, finite values, sampled rows against the source, and it speaks.

Everything is read back from the disk with pread in bounded slabs, once from front to back, which gives the file's SHA-256
too, so what is checked is what was written. Loading and
generating happen in a child process (`python -m loopgguf.verify`), because llama.cpp aborts the process on some
damage and a file decides how much memory it asks for; the child uses the C API only, so no chat template is compiled.
Measures no quality (see `evaluation.py`) and changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loopgguf import ggml
from loopgguf.container import GgufFile, Layout, TensorInfo, read_gguf, read_shards
from loopgguf.errors import InputError, LoopggufError, QualityError
from loopgguf.formats import FORMATS, INTEGER_TYPES, GgmlType, row_bytes
from loopgguf.llama import Context, Model
from loopgguf.manifest import manifest_path, read_manifest
from loopgguf.pipeline import SAMPLED_ROWS, SampledError, TensorLog, relative_error
from loopgguf.progress import Progress
from loopgguf.source import Source, Tensor

CHILD_MEMORY_BYTES = 2 << 30  # vocabulary, KV cache of a few hundred tokens and compute buffers fit; the weights are mapped
_SLAB_BYTES = 1 << 20
_ERROR_TOLERANCE = 1e-6  # relative; both sides compute the same numbers from the same bytes


@dataclass(frozen=True)
class Verification:
    """What was checked: tensors and payload bytes read back, tensors whose sampled rows match the source's; and the file's SHA-256."""

    n_tensors: int
    n_bytes: int
    n_sampled: int
    sha256: str


# --- the bytes --------------------------------------------------------------------------------------------------------


def _check_structure(path: Path, layout: Layout) -> None:
    """The file reads as a strict reader reads it, and is the layout: size, header, every tensor's place."""
    try:
        file = read_gguf(path)
    except InputError as error:
        raise QualityError(f"the written file does not read back: {error}") from error
    if file.size_bytes != layout.total_bytes:
        raise QualityError(f"size of {path}: got {file.size_bytes} bytes, expected {layout.total_bytes} as planned. Quantize again")
    for got, expected in zip(file.tensors, layout.tensors, strict=False):
        if got != expected:
            raise QualityError(f"tensor {expected.name} in {path}: got {got}, expected {expected} as planned. Quantize again")
    with path.open("rb") as stream:
        if len(file.tensors) != len(layout.tensors) or stream.read(len(layout.header)) != layout.header:
            raise QualityError(f"header of {path}: got other metadata or {len(file.tensors)} tensors, expected the planned header. Quantize again")


def _read(fd: int, info: TensorInfo, start: int, n_bytes: int) -> ggml.ByteArray:
    """Return n_bytes of the tensor's payload from byte `start` of it."""
    data = os.pread(fd, n_bytes, info.offset + start)
    if len(data) != n_bytes:
        raise QualityError(f"tensor {info.name}: got {len(data)} bytes at byte {info.offset + start}, expected {n_bytes}; the file shrank. Quantize again")
    return np.frombuffer(data, np.uint8)


def _check_values(info: TensorInfo, data: ggml.ByteArray) -> None:
    """Every weight or block scale in whole blocks of a tensor is finite (`ggml_validate_row_data`)."""
    if info.type not in INTEGER_TYPES and not ggml.rows_are_valid(info.type, data):
        raise QualityError(f"tensor {info.name}: got a NaN, an infinity or an invalid {info.type.name} block, expected finite values. Quantize again")


def _slabs(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Yield start and size, in bytes of the payload, of slabs of whole blocks."""
    block_bytes = FORMATS[info.type].block_bytes
    step = _SLAB_BYTES // block_bytes * block_bytes
    for start in range(0, info.n_bytes, step):
        yield start, min(step, info.n_bytes - start)


def _scan(path: Path, size_bytes: int, tensors: Sequence[TensorInfo], *, n_threads: int, progress: Progress | None) -> str:
    """Read a file once from front to back, check all values, and return its SHA-256 as hex."""
    digest, at = hashlib.sha256(), 0
    running: deque[Future[None]] = deque()
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def skip_to(offset: int) -> None:
        digest.update(os.pread(fd, offset - at, at))

    try:
        with ThreadPoolExecutor(n_threads) as pool:
            for n_done, info in enumerate(sorted(tensors, key=lambda info: info.offset), 1):
                skip_to(info.offset)
                for start, n_bytes in _slabs(info):
                    data = _read(fd, info, start, n_bytes)
                    running.append(pool.submit(_check_values, info, data))
                    digest.update(data.data)
                    if len(running) > 2 * n_threads:
                        running.popleft().result()
                at = info.offset + info.n_bytes
                if progress is not None:
                    progress("verify", n_done, len(tensors))
            skip_to(size_bytes)
            while running:
                running.popleft().result()
    finally:
        os.close(fd)
    return digest.hexdigest()


def _read_rows(fd: int, info: TensorInfo, start: int, stop: int) -> ggml.ByteArray:
    n_bytes = row_bytes(info.type, info.shape[-1])
    return _read(fd, info, start * n_bytes, (stop - start) * n_bytes).reshape(stop - start, n_bytes)


def decode_row(path: Path, info: TensorInfo, row: int) -> ggml.FloatArray:
    """Return one row (n_in,) of a tensor in a written file, decoded."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        (decoded,) = ggml.decode_rows(info.type, _read_rows(fd, info, row, row + 1))
    finally:
        os.close(fd)
    return np.asarray(decoded)


def _check_encoded(fd: int, info: TensorInfo, tensor: Tensor, sampled: SampledError) -> None:
    """The sampled rows decode to the error that was logged when they were encoded."""
    source = ggml.decode_rows(tensor.type, tensor.read_rows(sampled.start, sampled.stop))
    error = relative_error(source, ggml.decode_rows(info.type, _read_rows(fd, info, sampled.start, sampled.stop)))
    if not abs(error - sampled.relative_error) <= _ERROR_TOLERANCE * sampled.relative_error:
        raise QualityError(
            f"tensor {info.name}: rows {sampled.start} to {sampled.stop - 1} read back with relative error {error:.6g}, "
            f"expected {sampled.relative_error:.6g} as encoded. Check the disk and quantize again"
        )


def _check_copied(fd: int, info: TensorInfo, tensor: Tensor) -> None:
    """The middle rows of a tensor that was not encoded are the source's bytes."""
    start = tensor.n_rows // 2
    stop = min(start + SAMPLED_ROWS, tensor.n_rows)
    if not np.array_equal(_read_rows(fd, info, start, stop), tensor.read_rows(start, stop)):
        raise QualityError(
            f"tensor {info.name}: rows {start} to {stop - 1} read back differ from the source's, expected a copy. Check the disk, quantize again"
        )


def _check_rows(fd: int, info: TensorInfo, tensor: Tensor, log: TensorLog) -> bool:
    """Compare rows of one tensor with the source's; return whether there were any to compare."""
    if log.sampled is not None:
        _check_encoded(fd, info, tensor, log.sampled)
    elif info.type is tensor.type:
        _check_copied(fd, info, tensor)
    return log.sampled is not None or info.type is tensor.type


def verify_file(
    path: Path,
    layout: Layout,
    tensors: Iterable[Tensor],
    logs: Mapping[str, TensorLog],
    *,
    n_threads: int,
    progress: Progress | None = None,
) -> Verification:
    """Return what was checked of the written GGUF at `path`: a whole file or one shard, published or still a part.

    layout: what the file was planned to be. tensors: those of the source, at least the file's. logs: what the pipeline
    says of each, by name; a tensor without a sampled error that has the source's type must be a copy of it. Raises
    QualityError naming the tensor when size or structure is not what was planned, a value is not finite, or rows do
    not read back as they were written.
    """
    _check_structure(path, layout)
    digest = _scan(path, layout.total_bytes, layout.tensors, n_threads=n_threads, progress=progress)
    sources = {tensor.name: tensor for tensor in tensors}
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    pool = ThreadPoolExecutor(n_threads)
    try:
        n_sampled = sum(pool.map(lambda info: _check_rows(fd, info, sources[info.name], logs[info.name]), layout.tensors))
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(fd)
    return Verification(len(layout.tensors), sum(info.n_bytes for info in layout.tensors), n_sampled, digest)


# --- a file of any origin -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recheck:
    """What was found of a finished file: its shards, tensors and payload bytes, how many shards have a manifest (which they
    match), the relative error ‖w − ŵ‖² / ‖w‖² of each tensor against the model it was made from (empty where none was given),
    and what it said."""

    paths: tuple[Path, ...]
    n_tensors: int
    n_bytes: int
    n_manifests: int
    relative_errors: Mapping[str, tuple[GgmlType, float]]
    sample_text: str


def _compare(fd: int, info: TensorInfo, tensor: Tensor) -> float:
    """Return the relative error of a whole tensor, slab by slab."""
    if info.shape != tensor.shape:
        raise QualityError(f"shape of {info.name}: got {info.shape}, expected {tensor.shape} as in the model. The file was made from another one")
    step = max(1, _SLAB_BYTES // (4 * tensor.n_in))
    energy = loss = 0.0
    for start in range(0, tensor.n_rows, step):
        stop = min(start + step, tensor.n_rows)
        rows = ggml.decode_rows(tensor.type, tensor.read_rows(start, stop))
        error = ggml.decode_rows(info.type, _read_rows(fd, info, start, stop)) - rows
        energy += float(np.square(rows, dtype=np.float64).sum())
        loss += float(np.square(error, dtype=np.float64).sum())
    if loss > energy:
        raise QualityError(
            f"tensor {info.name}: error is {loss / energy if energy else np.inf:.3g} × the weights, worse than zeros. It is of another model or damaged"
        )
    return loss / energy if energy else 0.0


def recheck(path: Path, source: Source | None = None, *, prompt: str, n_threads: int, progress: Progress | None = None) -> Recheck:
    """Return what a finished GGUF (the first shard of a split one) is found to be: its structure, every value, its SHA-256
    where there is a manifest, and that it runs.

    source: the model it was made from, against which every weight is then compared. Raises InputError for a file or manifest
    that does not read, QualityError naming the tensor for values that are not finite, tensors that the model has not, or an
    error above that of zeros; for another SHA-256; and when llama.cpp cannot run it.
    """
    files = read_shards(path)
    infos = [(file, info) for file in files for info in file.tensors]
    sources = {} if source is None else {tensor.name: tensor for tensor in source.tensors}
    if source is not None and (odd := {info.name for _, info in infos} ^ sources.keys()):
        raise QualityError(f"tensors of {path}: {min(odd)} is in only one of it and {source.path}, expected the same {len(sources)} in both")

    n_manifests = sum(_check_file(file, n_threads=n_threads, progress=progress) for file in files)
    errors = {} if source is None else _compare_all([item for item in infos if item[1].type not in INTEGER_TYPES], sources, n_threads, progress)
    text = speak(path, prompt, n_threads=n_threads)
    return Recheck(tuple(file.path for file in files), len(infos), sum(info.n_bytes for _, info in infos), n_manifests, errors, text)


def _check_file(file: GgufFile, *, n_threads: int, progress: Progress | None) -> bool:
    """Check all values of a file, and its SHA-256 where there is a manifest; return whether there is."""
    expected = read_manifest(file.path)
    got = _scan(file.path, file.size_bytes, file.tensors, n_threads=n_threads, progress=progress)
    if expected not in (None, got):
        raise QualityError(
            f"SHA-256 of {file.path}: got {got}, expected {expected} as in {manifest_path(file.path).name}. "
            "It changed since it was made: make or download it again, or remove the manifest"
        )
    return expected is not None


def _compare_all(
    items: Sequence[tuple[GgufFile, TensorInfo]], sources: Mapping[str, Tensor], n_threads: int, progress: Progress | None
) -> dict[str, tuple[GgmlType, float]]:
    """Return type and relative error of every tensor, by name."""

    def compare(item: tuple[GgufFile, TensorInfo]) -> float:
        file, info = item
        fd = os.open(file.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            return _compare(fd, info, sources[info.name])
        finally:
            os.close(fd)

    errors: dict[str, tuple[GgmlType, float]] = {}
    with ThreadPoolExecutor(n_threads) as pool:
        for (_, info), error in zip(items, pool.map(compare, items), strict=True):
            errors[info.name] = (info.type, error)
            if progress is not None:
                progress("compare", len(errors), len(items))
    return errors


# --- it speaks --------------------------------------------------------------------------------------------------------


# What the child's environment adds: it finds the modules this process finds, and not those of the current folder; one
# BLAS thread, for each reserves memory; OpenMP threads that sleep rather than spin on a busy machine (4 times faster
# there); of an abort, the assertion rather than a backtrace.
_CHILD_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}


def speak(
    path: Path,
    prompt: str,
    n_tokens: int = 24,
    memory_limit_bytes: int | None = CHILD_MEMORY_BYTES,
    *,
    n_threads: int = 2,
    time_limit_seconds: float = 1800,
) -> str:
    """Return what the GGUF at `path` (the first shard of a split one) says after `prompt`: up to `n_tokens` tokens, the
    likeliest one each time.

    It is loaded and run by llama.cpp in a child process. memory_limit_bytes bounds the child's private memory
    (RLIMIT_DATA, where the system has it; None: unbounded); the mapped weights do not count. Raises QualityError with
    the child's last line when the file does not load, crashes, exceeds a limit or gives logits that are not finite.
    """
    command = [sys.executable, "-m", "loopgguf.verify", str(path.absolute()), str(n_tokens), str(n_threads), str(memory_limit_bytes or 0)]
    environment = os.environ | _CHILD_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    failed = f"the written file {path.name} does not run in llama.cpp"
    try:
        child = subprocess.run(command, input=prompt.encode(), capture_output=True, timeout=time_limit_seconds, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise QualityError(f"{failed}: got no answer in {time_limit_seconds:g} s, expected a few tokens. Is the machine busy or short of memory?") from error
    if child.returncode != 0:
        lines = child.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        how = f"killed by signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        limit = f" with {memory_limit_bytes >> 20} MiB of memory" if memory_limit_bytes else ""
        raise QualityError(f"{failed}{limit} ({how}): {lines[-1].strip()}")
    return str(json.loads(child.stdout)["text"])


def generate(path: Path, prompt: str, n_tokens: int, n_threads: int) -> str:
    """Return the greedy continuation of `prompt`, in this process; raise QualityError for logits that are not finite."""
    with Model(path) as model:
        tokens = model.tokenize(prompt) or [max(model.bos, 0)]
        spoken: list[int] = []
        with Context(model, len(tokens) + n_tokens, n_threads=n_threads) as context:
            logits = context.decode(tokens, first_logits=len(tokens) - 1)[-1]
            while len(spoken) < n_tokens:
                if not np.isfinite(logits).all():
                    raise QualityError(f"logits after {len(tokens) + len(spoken)} tokens: got NaN or infinity, expected finite numbers")
                spoken.append(int(logits.argmax()))
                if spoken[-1] == model.eos:
                    break
                logits = context.decode(spoken[-1:], start=len(tokens) + len(spoken) - 1)[-1]
        return b"".join(model.token_text(token) for token in spoken).decode("utf-8", "replace")


def _limit_memory(n_bytes: int) -> None:
    """Bound this process's private memory where the system can."""
    if n_bytes and sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def main() -> int:
    """Run as the child of `speak`: prompt on stdin, JSON on stdout, one line on stderr when it fails."""
    parser = argparse.ArgumentParser(prog="python -m loopgguf.verify", description="Load a GGUF and continue the prompt given on stdin.")
    parser.add_argument("path", type=Path)
    for name in ("n_tokens", "n_threads", "memory_limit_bytes"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    try:
        _limit_memory(arguments.memory_limit_bytes)
        text = generate(arguments.path, sys.stdin.buffer.read().decode(), arguments.n_tokens, arguments.n_threads)
    except (LoopggufError, MemoryError, OSError, ValueError) as error:
        sys.stderr.write(f"{str(error) or type(error).__name__}\n")
        return 1
    sys.stdout.write(json.dumps({"text": text}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
