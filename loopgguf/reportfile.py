"""A comparison as a document that lasts: NAME.json is the truth, NAME.md and NAME.html are rendered from it.

Builds the document from what was measured and from the files' headers, and writes the three files together. Measures
nothing, and draws nothing (see `reportpage.py`). No number per token is kept: of those, the document holds counts and
means. Two runs of one command make the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.architectures import tensor_role
from loopgguf.collapse import CollapseCheck
from loopgguf.comparison import ComparedFile
from loopgguf.container import GgufFile, PartFile, read_shards, refuse_existing
from loopgguf.evaluation import Quality
from loopgguf.fidelity import Fidelity
from loopgguf.formats import FORMATS
from loopgguf.report import collapse_json, compared_json, layers_json, tasks_json, tensor_error_json
from loopgguf.reportpage import render_html, render_markdown
from loopgguf.tasks import TaskResult
from loopgguf.version import __version__

Document = dict[str, Any]

REPORT_FORMAT = "loopgguf report"
SCHEMA_VERSION = 1
SUFFIXES = (".json", ".md", ".html")
BINS_PER_DECADE = 4
HISTOGRAM_DECADES = (-7, 2)  # of nats: below are differences that float32 logits cannot carry, above is nothing that runs
MAX_POSITION_RANGES = 32
_METADATA_KEYS = (
    *("general.architecture", "general.name", "loopgguf.intent", "loopgguf.selection.predicted_kld"),
    *("quantize.imatrix.dataset", "quantize.imatrix.chunks_count"),
)


@dataclass(frozen=True)
class Samples:
    """What the models say after one prompt, the likeliest token each time; None where one could not be made to speak.

    `spoken` is in the order of the report's files.
    """

    prompt: str
    n_tokens: int
    reference: str | None
    spoken: tuple[str | None, ...]


# --- the document -----------------------------------------------------------------------------------------------------


def _edges() -> NDArray[np.float64]:
    low, high = HISTOGRAM_DECADES
    return np.logspace(low, high, (high - low) * BINS_PER_DECADE + 1)


def kld_histogram(kld: NDArray[np.float32]) -> Document:
    """Return how many tokens have a KLD in each bin; the edges (nats) are the same in all reports, so that they can be laid
    over one another."""
    edges = _edges()
    counts, _ = np.histogram(kld, edges)
    below, above = int((kld < edges[0]).sum()), int((kld > edges[-1]).sum())
    return {"edges_nats": [float(f"{edge:.6g}") for edge in edges], "counts": counts.tolist(), "n_below": below, "n_above": above}


def kld_by_position(quality: Quality) -> list[Document]:
    """Return the mean KLD (nats) of ranges of positions in the context, with its standard error over chunks."""
    n_chunks, n_positions = quality.token_kld_nats.shape
    first_scored = quality.n_ctx - 1 - n_positions
    ranges = []
    for positions in np.array_split(np.arange(n_positions), min(n_positions, MAX_POSITION_RANGES)):
        by_chunk = quality.token_kld_nats[:, positions].mean(axis=1, dtype=np.float64)
        error = float(by_chunk.std(ddof=1) / math.sqrt(n_chunks)) if n_chunks > 1 else None
        where = {"first": first_scored + int(positions[0]), "last": first_scored + int(positions[-1])}
        ranges.append({**where, "mean_kld_nats": float(by_chunk.mean()), "standard_error": error})
    return ranges


def _tensors(files: Sequence[GgufFile], fidelity: Fidelity) -> list[Document]:
    rows, errors = [], {tensor.name: tensor_error_json(tensor) for tensor in fidelity.tensors}
    for info in (tensor for file in files for tensor in file.tensors):
        role, bpw = tensor_role(info.name), FORMATS[info.type].bpw
        place = {"name": info.name, "layer": role.layer, "role": role.kind}
        rows.append({**place, "type": info.type.name, "bpw": bpw, "shape": list(info.shape), "n_bytes": info.n_bytes, "error": errors.get(info.name)})
    return rows


def _shard_digests(files: Sequence[GgufFile]) -> list[Document]:
    shards = []
    for file in files:
        with file.path.open("rb") as stream:
            shards.append({"name": file.path.name, "bytes": file.size_bytes, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()})
    return shards


def _file_document(compared: Document, file: ComparedFile, spoken: str | None, fidelity: Fidelity, collapse: CollapseCheck | None) -> Document:
    files = read_shards(file.path)
    metadata = {key: files[0].metadata[key].data for key in _METADATA_KEYS if key in files[0].metadata}
    by_chunk = file.quality.token_kld_nats.mean(axis=1, dtype=np.float64)
    return {
        **{key: compared[key] for key in ("name", "bytes", "bpw", "is_pareto", "to_baseline", "measured")},
        "metadata": {key: value for key, value in metadata.items() if not isinstance(value, list)},
        "kld_histogram": kld_histogram(file.quality.token_kld_nats),
        "kld_by_chunk_nats": by_chunk.tolist(),
        "kld_by_position": kld_by_position(file.quality),
        "sample": spoken,
        "collapse": collapse_json(collapse),
        "shards": _shard_digests(files),
        "tensors": _tensors(files, fidelity),
        "layers": layers_json(fidelity),
    }


def make_document(
    files: Sequence[ComparedFile],
    *,
    reference: Path,
    reference_name: str,
    baseline: str,
    texts: Sequence[str],
    notes: Sequence[str],
    command: str,
    samples: Samples,
    tasks: Sequence[TaskResult],
    fidelities: Sequence[Fidelity],
    collapses: Sequence[CollapseCheck | None],
) -> Document:
    """Return the report of compared files as JSON-able values; the README describes its keys.

    reference: the GGUF that was run; reference_name: what the user calls it. command: as it was typed, empty from Python.
    """
    quality = files[0].quality
    return {
        "format": REPORT_FORMAT,
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "versions": {
            "loopgguf": __version__,
            **{name: version(name) for name in ("llama-cpp-python", "numpy")},
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
        },
        "text": {
            "names": list(texts),
            "n_chunks": quality.n_chunks,
            "n_ctx": quality.n_ctx,
            "n_scored": quality.n_scored,
            "tokens_sha256": quality.tokens_sha256,
        },
        "reference": {"name": reference_name, "shards": _shard_digests(read_shards(reference))},
        "baseline": baseline,
        "notes": list(notes),
        "tasks": tasks_json(tasks),
        "sample": {"prompt": samples.prompt, "n_tokens": samples.n_tokens, "reference": samples.reference},
        "files": [_file_document(*parts) for parts in zip(compared_json(files), files, samples.spoken, fidelities, collapses, strict=True)],
    }


# --- the files --------------------------------------------------------------------------------------------------------


def report_paths(name: Path) -> tuple[Path, Path, Path]:
    """Return NAME.json, NAME.md and NAME.html; a NAME that already ends in one of these is taken without."""
    stem = name.name.removesuffix(name.suffix) if name.suffix in SUFFIXES else name.name
    json_path, markdown_path, html_path = (name.with_name(stem + suffix) for suffix in SUFFIXES)
    return json_path, markdown_path, html_path


def refuse_existing_report(name: Path, *, overwrite: bool) -> None:
    """Raise OutputError when one of the report's files exists and may not be overwritten."""
    for path in report_paths(name):
        refuse_existing(path, overwrite=overwrite)


def write_document(document: Document, name: Path, *, overwrite: bool = False) -> tuple[Path, ...]:
    """Write NAME.json, NAME.md and NAME.html and return their paths; none gets its name before all are on the disk.

    The pages are rendered from what the JSON file says. Raises OutputError when one exists or cannot be written.
    """
    refuse_existing_report(name, overwrite=overwrite)
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    read_back = json.loads(text)
    contents = [page.encode("utf-8", "backslashreplace") for page in (text, render_markdown(read_back), render_html(read_back))]
    paths = report_paths(name)
    with ExitStack() as stack:
        parts = [stack.enter_context(PartFile(path, len(data), overwrite=overwrite)) for path, data in zip(paths, contents, strict=True)]
        for part, data in zip(parts, contents, strict=True):
            part.write_at(0, data)
            part.sync()
        for part in parts:
            part.publish()
    return paths
