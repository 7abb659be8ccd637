"""How fast loopgguf quantizes, beside llama.cpp's own `llama_model_quantize`: same types, threads, imatrix and machine.

    python tools/bench_quantize.py [--model synthetic-1GB|demo|smollm2|smollm2-wide|PATH]… [--types Q8_0,Q4_K_M,IQ2_XS] [--repeats N] [--threads 2]

The default model has random weights and 1 GB of them: on a small one, start-up is what is measured. Three ways make
the same file: (a) loopgguf from a BF16 GGUF, (b) llama_model_quantize from that GGUF, (c) loopgguf from the checkpoint
folder. Each run is a process of its own, started with the inputs in the page cache and no dirty pages; the order turns
round with each repeat (a b c, c b a, …), and medians are compared. The bars: the encode + write of (a) is at most 1.05
× the whole call of (b), that of (c) at most 1.10 ×. Tensor data of the three is compared, so that a ratio is never
between two different jobs. On a machine that does other work at the same time wall-clock ratios mean little; `CPU
ratio`, of the processor time of all threads, then tells more. IQ2_XS takes minutes a run: by default it runs twice.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import models
from synthetic_model import REPOSITORY

from loopgguf.container import read_gguf
from loopgguf.errors import LoopggufError

DEFAULT_REPEATS = {"Q8_0": 7, "Q4_K_M": 5, "IQ2_XS": 2}
LOOPGGUF_GGUF, LLAMA_CPP, LOOPGGUF_FOLDER = "loopgguf from GGUF", "llama_model_quantize", "loopgguf from folder"
BARS = {LOOPGGUF_GGUF: 1.05, LOOPGGUF_FOLDER: 1.10}


@dataclass(frozen=True)
class Run:
    """What one child process does; `started` is the time it was launched at."""

    way: str
    model: str
    output: str
    imatrix: str
    preset: str
    n_threads: int
    started: float = 0.0


Seconds = dict[str, float]


# --- in the child -----------------------------------------------------------------------------------------------------


def run_loopgguf(run: Run) -> Seconds:
    """Quantize as the command line does, and return the seconds of each phase.

    `start-up` is all from the launch of the process to the first slab, publishing included; `read` is a part of
    `encode and write`, measured afterwards by reading every row once more and doing nothing with it.
    """
    from loopgguf import encode, workflow

    processor = [0.0]
    execute = encode.execute

    def clocked(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        logs = execute(*args, **options)
        processor[0] += time.process_time() - start
        return logs

    encode.execute = clocked
    request = workflow.QuantizeRequest(quant_type=run.preset, imatrix=Path(run.imatrix))
    result = workflow.quantize(Path(run.model), Path(run.output), request, workflow.Settings(n_threads=run.n_threads))
    seconds = dict(result.seconds)
    start_up = time.time() - run.started - sum(seconds.values())
    return {"start-up": start_up, "read": _read_all(run), "processor": processor[0], **seconds}


def _read_all(run: Run) -> float:
    """Return the seconds that reading all rows takes on as many threads."""
    from loopgguf.pipeline import SLAB_WEIGHTS
    from loopgguf.source import Tensor, open_source

    tensors = open_source(Path(run.model)).tensors

    def read(tensor: Tensor) -> None:
        step = max(1, SLAB_WEIGHTS // tensor.n_in)
        for start in range(0, tensor.n_rows, step):
            tensor.read_rows(start, min(start + step, tensor.n_rows))

    start = time.perf_counter()
    with ThreadPoolExecutor(run.n_threads) as pool:
        list(pool.map(read, tensors))
    return time.perf_counter() - start


def run_llama_cpp(run: Run) -> Seconds:
    """Quantize with llama.cpp; only the call is timed, its opening of the file included, and its file's fsync apart."""
    import llama_cpp.llama_cpp as binding
    from llama_cpp._logger import set_verbose

    from loopgguf.presets import find_preset
    from loopgguf.statistics import load_imatrix

    set_verbose(False)
    params = binding.llama_model_quantize_default_params()
    params.nthread, params.ftype = run.n_threads, find_preset(run.preset).file_type
    statistics = load_imatrix(Path(run.imatrix))
    importances = {name: statistics.importance(name) for name in statistics.columns}
    entries = (binding.llama_model_imatrix_data * (len(importances) + 1))()  # the last one, all zeros, ends the list
    for entry, (name, values) in zip(entries, importances.items(), strict=False):
        assert values is not None
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(type(entry.data))
    params.imatrix = ctypes.cast(entries, type(params.imatrix))
    start, processor = time.perf_counter(), time.process_time()
    status = binding.llama_model_quantize(run.model.encode(), run.output.encode(), ctypes.byref(params))
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    if status != 0:
        raise SystemExit(f"llama_model_quantize failed on {run.model} as {run.preset}: it returned {status}")
    with Path(run.output).open("rb") as stream:
        os.fsync(stream.fileno())
    fsync = time.perf_counter() - start - seconds
    return {"start-up": time.time() - run.started - seconds - fsync, "encode and write": seconds, "processor": processor, "fsync": fsync}


# --- in the parent ----------------------------------------------------------------------------------------------------


def _warm(path: Path) -> None:
    """Bring a model's files into the page cache."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def tensor_data_hash(path: Path) -> str:
    """Return a hash over the names, types and bytes of a GGUF's tensors: its metadata may differ."""
    file = read_gguf(path)
    digest = hashlib.blake2b(repr([(t.name, t.type, t.shape) for t in file.tensors]).encode())
    with path.open("rb") as stream:
        stream.seek(file.data_offset)
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def launch(run: Run) -> tuple[Seconds, str]:
    """Run one child on a quiet machine; return its seconds and the hash of what it wrote, which is removed."""
    _warm(Path(run.model))
    os.sync()
    spec = json.dumps(asdict(replace(run, started=time.time())))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.run([sys.executable, __file__, "--run", spec], check=False, env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    if child.returncode != 0:
        raise SystemExit(f"{run.way} failed as {run.preset}: exit code {child.returncode}, see above")
    output = Path(run.output)
    digest = tensor_data_hash(output)
    output.unlink()
    seconds: Seconds = json.loads(child.stdout.splitlines()[-1])
    return seconds, digest


def measure(runs: list[Run], n_repeats: int) -> dict[str, list[Seconds]]:
    """Return the seconds of every repeat by way; raises SystemExit when the files are not the same."""
    found: dict[str, list[Seconds]] = {run.way: [] for run in runs}
    digests = set()
    for i in range(n_repeats):
        for run in runs if i % 2 == 0 else reversed(runs):
            seconds, digest = launch(run)
            found[run.way].append(seconds)
            digests.add(digest)
            print(f"  {run.preset} {i + 1}/{n_repeats} {run.way}: {seconds['encode and write']:.2f} s", file=sys.stderr, flush=True)
    if len(digests) != 1:
        raise SystemExit(f"{runs[0].preset}: the files of {', '.join(found)} differ; their times cannot be compared")
    return found


COLUMNS = ("start-up", "read", "encode and write", "spread", "fsync", "verify", "ratio", "bar", "CPU ratio")
WIDTHS = dict(zip(COLUMNS, (8, 5, 16, 16, 5, 6, 5, 4, 9), strict=True))


def _middle(found: list[Seconds], phase: str) -> float | None:
    return median(seconds[phase] for seconds in found) if phase in found[0] else None


def print_table(model: str, preset: str, found: dict[str, list[Seconds]]) -> bool:
    """Print medians in seconds and the ratios to llama.cpp; return whether the bars are met."""
    reference = {phase: median(seconds[phase] for seconds in found[LLAMA_CPP]) for phase in ("encode and write", "processor")}
    print(f"\n{model}, {preset}: seconds, medians of {len(found[LLAMA_CPP])} runs each\n")
    print(f"| {'':<20} | {' | '.join(name.rjust(WIDTHS[name]) for name in COLUMNS)} |")
    print(f"|{'-' * 22}|{'|'.join('-' * (WIDTHS[name] + 1) + ':' for name in COLUMNS)}|")
    met = True
    for way, runs in found.items():
        times = [seconds["encode and write"] for seconds in runs]
        ratio, bar = median(times) / reference["encode and write"], BARS.get(way)
        met &= bar is None or ratio <= bar
        cells = {name: f"{middle:.2f}" for name in COLUMNS if (middle := _middle(runs, name)) is not None}
        cells |= {"spread": f"{min(times):.2f} to {max(times):.2f}", "ratio": f"{ratio:.3f}", "bar": f"{bar:.2f}" if bar else ""}
        cells["CPU ratio"] = f"{median(seconds['processor'] for seconds in runs) / reference['processor']:.3f}"
        print(f"| {way:<20} | {' | '.join(cells.get(name, '').rjust(WIDTHS[name]) for name in COLUMNS)} |", flush=True)
    return met


def bench_model(name: str, options: argparse.Namespace) -> bool:
    """Print the tables of one model; return whether the bars are met."""
    model, met = models.resolve_forms(name, options), True
    output = str(options.folder / f"bench-output-{os.getpid()}.gguf")
    ways = [(LOOPGGUF_GGUF, model.gguf), (LLAMA_CPP, model.gguf), *([(LOOPGGUF_FOLDER, model.checkpoint)] if model.checkpoint else [])]
    for preset in options.types.split(","):
        runs = [Run(way, str(path), output, str(model.imatrix), preset, options.threads) for way, path in ways]
        met &= print_table(name, preset, measure(runs, options.repeats or DEFAULT_REPEATS.get(preset, 3)))
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models.add_model_option(parser, "synthetic-1GB", names=(f"{models.SYNTHETIC}SIZE", *models.NAMES))
    models.add_scratch_option(parser)
    parser.add_argument("--types", default=",".join(DEFAULT_REPEATS), help="preset names, with commas")
    parser.add_argument("--repeats", type=int, help=f"of each way and type (default {DEFAULT_REPEATS}, others 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run = Run(**json.loads(options.run))
        print(json.dumps(run_llama_cpp(run) if run.way == LLAMA_CPP else run_loopgguf(run)))
        return
    try:
        met = min([bench_model(name, options) for name in models.model_names(options)])  # all of them, also after one that fails
    except LoopggufError as error:
        print(f"bench_quantize: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"\nload of the machine over the last 15 minutes: {os.getloadavg()[2]:.1f} (this benchmark alone: about {options.threads})")
    print("all bars met" if met else "NOT all bars met")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
