"""Opens a model as every command does: its source, the proof of its vocabulary, and text cut under that vocabulary.

Also what all commands share: how to work (`Settings`), what a model is called, and that no output is one of the inputs.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loopgguf.calibration import Chunks, TextUse, default_text, load_chunks
from loopgguf.chat import find_template
from loopgguf.checkpoint import cache_path, content_key, file_sha256, write_cached
from loopgguf.container import write_gguf
from loopgguf.errors import InputError, OutputError, UsageError
from loopgguf.layerwise import DEFAULT_MAX_MEMORY_BYTES
from loopgguf.llama import Model
from loopgguf.progress import Progress
from loopgguf.proof import prove_vocabulary
from loopgguf.source import Source, open_source
from loopgguf.version import __version__

DEFAULT_MAX_BUFFER_BYTES = 256 << 20
DEFAULT_CTX_SIZE = 512


def default_threads() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Settings:
    """How to work, not what to make: nothing here changes a byte of the output, but that a GPU rounds otherwise than a CPU,
    and gradients of the whole model otherwise than those of blocks of layers, which `max_memory_bytes` decides between.

    max_memory_bytes: for hidden states, Gram matrices, and a model whose gradients are taken at once. device: `cpu`, `cuda`
    or `cuda:N`, where torch runs a checkpoint folder. progress: called with (phase, done, total).
    announce: called with a line that the user should read before the work it is about, such as the disk it needs.
    job_folder: where unfinished work is kept, default beside the output; keep_job: also when it is finished; resume: go on
    with what is there, or throw it away. full_hash: what is gone on with must be of these very bytes of the model, not
    only of files of these sizes, times and headers.
    """

    n_threads: int = field(default_factory=default_threads)
    max_buffer_bytes: int = DEFAULT_MAX_BUFFER_BYTES
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES
    overwrite: bool = False
    pre_tokenizer: str | None = None
    device: str = "cpu"
    job_folder: Path | None = None
    resume: bool = True
    keep_job: bool = False
    full_hash: bool = False
    progress: Progress | None = None
    announce: Callable[[str], None] = lambda line: None


def model_name(model: Path) -> str:
    """Return the name a model goes by: its folder's or file's, without shard numbers and `.gguf`."""
    resolved = model.resolve()
    return resolved.name if resolved.is_dir() else resolved.name.removesuffix(".gguf").split("-00001-of-")[0]


def model_fields(source: Source, settings: Settings) -> dict[str, object]:
    """Return what a job's fingerprint says of a model; its bytes too where a full hash is asked for."""
    bytes_ = {"model's bytes": content_key(*map(file_sha256, source.files))} if settings.full_hash else {}
    return {"loopgguf version": __version__, "model": source.fingerprint, **bytes_}


def refuse_same_file(output: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError when `output` is one of the inputs, through links too."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise OutputError(f"output {output} is the input {path}: nothing was written; choose another name with -o")


def open_model(model: Path, settings: Settings) -> tuple[Source, list[str]]:
    """Return a model and what its user should know of it; a checkpoint's vocabulary is proven against llama.cpp, once
    per set of tokenizer files. Raises InputError as `source.open_source` and `proof.prove_vocabulary`, UsageError for a
    device that is not there, or that runs nothing of this model."""
    source = open_source(model, pre_tokenizer=settings.pre_tokenizer)
    kind = source.metadata.get("tokenizer.ggml.model")
    if kind is None or kind.data in ("no_vocab", "none"):
        raise InputError(
            f"{model} has no vocabulary (tokenizer.ggml.model): without one a file can be neither loaded and run nor measured; give the whole model"
        )
    if settings.device != "cpu":
        _refuse_device(source, settings.device)
    notes = list(source.notes)
    if source.is_checkpoint:
        notes += _proof(source, forced=settings.pre_tokenizer is not None)
    return source, notes


def _refuse_device(source: Source, device: str) -> None:
    if not source.is_checkpoint:
        raise UsageError(f"--device {device}: {source.path} is a GGUF, which llama.cpp runs on the CPU. Leave the option out, or give the checkpoint folder")
    from loopgguf.torch_model import refuse_device

    refuse_device(device)


def _proof(source: Source, *, forced: bool) -> list[str]:
    remembered = cache_path("vocabulary", content_key(__version__, source.fingerprint, str(source.metadata.get("tokenizer.ggml.pre"))), ".txt")
    if not remembered.exists():
        write_cached(remembered, "\n".join(prove_vocabulary(source.path, source.metadata, forced=forced)).encode())
    return remembered.read_text(encoding="utf-8").splitlines()


@contextlib.contextmanager
def _vocabulary_file(source: Source) -> Iterator[Path]:
    """Give a GGUF that llama.cpp can load the vocabulary from: the source itself, or a temporary one of a checkpoint."""
    if not source.is_checkpoint:
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="loopgguf-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_gguf(path, source.metadata, [])
        yield path


def cut_text(
    source: Source,
    files: Sequence[str | Path],
    default: TextUse,
    ctx_size: int,
    n_chunks: int | None,
    settings: Settings,
    *,
    parse_special: bool = False,
    seed: int = 0,
) -> Chunks:
    """Return the texts cut into chunks under the model's own vocabulary and chat template, as llama.cpp tokenizes them.

    Documents that share a chunk are told apart, unless the model is recurrent: its state goes on from one to the next, which is noted.
    """
    template = find_template(source.metadata, model_name(source.path))
    inputs = tuple(files) or (default_text(default),)
    with _vocabulary_file(source) as path, Model(path, vocab_only=True) as vocabulary:
        chunks = load_chunks(vocabulary, inputs, ctx_size, n_chunks, parse_special=parse_special, seed=seed, template=template, progress=settings.progress)
        if chunks.documents is None or not vocabulary.is_recurrent:
            return chunks
    note = "documents share a chunk, and the state of a recurrent model goes on across their edges: give one .txt for each to keep them apart"
    return replace(chunks, documents=None, notes=(*chunks.notes, note))
