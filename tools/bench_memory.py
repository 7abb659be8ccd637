"""How much memory `loopgguf quantize` and `loopgguf imatrix` take above a bare Python interpreter: the same for a model of any size (Linux).

    python tools/bench_memory.py [--model synthetic-1GB|demo|smollm2|smollm2-wide|PATH]… [--quant-type Q4_K_M] [--no-imatrix]
    python tools/bench_memory.py --torch [--model synthetic-4GB|…]… [--samples 16] [--max-memory 64]

Runs the command as a user would, with `--max-buffer-size 64`, from a checkpoint folder and from a BF16 GGUF; by default
on two synthetic models of 1 and 4 GB with a vocabulary of 128,000 tokens. The figure is the peak of the process's resident memory (VmHWM:
file-backed pages of mapped inputs count; its children, the tokenizer proof and the load test, do not), less that of an
interpreter that does nothing. The bars: at most 500 MB from a folder, 200 MB from a GGUF, and the same figure ± 10 %
for every model of the default.

`--torch` measures `imatrix` over a checkpoint folder instead, above what it takes on a model of
2 MB, which is what is imported: the bar is twice the float32 bytes of the largest decoder layer and
`--max-memory`, and with `--gram` that layer's matrices of both sets besides.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import models
from synthetic_model import REPOSITORY, find_or_make

from loopgguf.architectures import tensor_role
from loopgguf.curvature import gram_bytes
from loopgguf.errors import InputError, LoopggufError
from loopgguf.source import open_source

BARS_MB = {"folder": 500, "GGUF": 200}
SAME_WITHIN = 0.10
POLL_SECONDS = 0.003


def read_peak_bytes(pid: int) -> int:
    """Return the highest resident memory a running process has had; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def measure_bare() -> int:
    """Return the peak of an interpreter that does nothing, in bytes."""
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        peak = read_peak_bytes(child.pid)
        child.communicate(b"\n")
    return peak


def measure_peak(command: list[str]) -> tuple[int, float]:
    """Run a command to its end; return the peak of its own process in bytes (polled: the kernel's mark only rises), and seconds."""
    peak, start = 0, time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while child.poll() is None:
            peak = max(peak, read_peak_bytes(child.pid))
            time.sleep(POLL_SECONDS)
        if child.returncode != 0:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}\n{log.read().decode(errors='replace')}")
    return peak, time.perf_counter() - start


def largest_layer(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a checkpoint's largest decoder layer."""
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for tensor in open_source(folder).tensors:
        layer = tensor_role(tensor.name).layer
        if layer is not None:
            layers.setdefault(layer, {})[tensor.name] = tensor.shape
    return max(layers.values(), key=lambda shapes: sum(map(math.prod, shapes.values())))


def measure_imatrix(folder: Path, extra: list[str], options: argparse.Namespace) -> tuple[int, float]:
    """Return the peak of `imatrix` over a checkpoint folder in bytes, and seconds."""
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        command = [sys.executable, "-m", "loopgguf.cli", "imatrix", str(folder), "-o", f"{scratch}/imatrix.gguf", *extra]
        return measure_peak([*command, "--samples", str(options.samples), "--max-memory", str(options.max_memory)])


def run_torch(names: list[str], options: argparse.Namespace) -> bool:
    """Print the peaks of the torch engine beside their bars; return whether all are met."""
    bare_bytes, _ = measure_imatrix(find_or_make(options.folder, 2_000_000, 1000).checkpoint, [], options)
    met = True
    print(f"what is imported: {bare_bytes / 1e6:.1f} MB; peak above it, {options.samples} × 512 tokens, --max-memory {options.max_memory}:\n")
    print("| model | options | MB above | bar MB | seconds |\n|---|---|---:|---:|---:|", flush=True)
    for name in names:
        folder = models.resolve_forms(name, options).checkpoint
        if folder is None:
            raise InputError(f"model {name}: got a GGUF, expected a checkpoint folder: torch runs no other")
        for extra in ([], ["--gram"]):
            peak, seconds = measure_imatrix(folder, extra, options)
            layer = largest_layer(folder)
            bar = 2 * 4 * sum(map(math.prod, layer.values())) + (options.max_memory << 20)
            if extra:
                shapes = {tensor.name: tensor.shape for tensor in open_source(folder).tensors if tensor_role(tensor.name).layer == 0}
                bar += 2 * gram_bytes(shapes, has_gradient=False)
            met &= peak - bare_bytes <= bar
            print(f"| {name} | {' '.join(extra)} | {(peak - bare_bytes) / 1e6:.0f} | {bar / 1e6:.0f} | {seconds:.0f} |", flush=True)
    return met


@dataclass(frozen=True)
class Figure:
    """The peak of one run above a bare interpreter."""

    kind: str  # of the input: a key of BARS_MB
    model: str
    above_bare_bytes: int
    seconds: float


def measure_model(name: str, options: argparse.Namespace, bare_bytes: int) -> list[Figure]:
    """Return the figures of one model, from its folder and from its GGUF."""
    model = models.resolve_forms(name, options)
    output = options.folder / f"bench-output-{os.getpid()}.gguf"
    figures = []
    for kind, path in (("folder", model.checkpoint), ("GGUF", model.gguf)):
        if path is None:
            continue
        command = [sys.executable, "-m", "loopgguf.cli", "quantize", str(path), "-o", str(output), "--overwrite", "--quant-type", options.quant_type]
        command += ["--max-buffer-size", "64"]
        command += ["--no-imatrix"] if options.no_imatrix else ["--imatrix", str(model.imatrix)]
        peak, seconds = measure_peak(command)
        output.unlink()
        figures.append(Figure(kind, name, peak - bare_bytes, seconds))
        print(f"  {name} {kind}: {figures[-1].above_bare_bytes / 1e6:.0f} MB, {seconds:.0f} s", file=sys.stderr, flush=True)
    return figures


def print_table(figures: list[Figure], bare_bytes: int) -> bool:
    """Print the peaks beside their bars; return whether all are met."""
    met = True
    print(f"bare interpreter: {bare_bytes / 1e6:.1f} MB; peak of the parent process above it:\n")
    width = max(len(figure.model) for figure in figures)
    print(f"| input  | {'model':<{width}} | MB above bare | bar MB | to the first | bar   | seconds |")
    print(f"|--------|{'-' * (width + 2)}|--------------:|-------:|-------------:|-------|--------:|")
    for figure in sorted(figures, key=lambda f: list(BARS_MB).index(f.kind)):
        first = next(f for f in figures if f.kind == figure.kind)
        change = figure.above_bare_bytes / first.above_bare_bytes - 1
        megabytes, bar = figure.above_bare_bytes / 1e6, BARS_MB[figure.kind]
        met &= megabytes <= bar and abs(change) <= SAME_WITHIN
        print(
            f"| {figure.kind:<6} | {figure.model:<{width}} | {megabytes:>13.1f} | {bar:>6} | {change:>+12.1%} | ±{SAME_WITHIN:.0%} | {figure.seconds:>7.0f} |"
        )
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models.add_model_option(parser, "synthetic-1GB", "synthetic-4GB", names=(f"{models.SYNTHETIC}SIZE", *models.NAMES))
    models.add_scratch_option(parser)
    parser.add_argument("--quant-type", default="Q4_K_M")
    parser.add_argument("--no-imatrix", action="store_true")
    parser.add_argument("--torch", action="store_true", help="measure `imatrix` over a checkpoint folder")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-memory", type=int, default=64, metavar="MIB")
    options = parser.parse_args()
    bare_bytes = measure_bare()
    try:
        if options.torch:
            met = run_torch(models.model_names(options), options)
            print("\nall bars met" if met else "\nNOT all bars met")
            sys.exit(0 if met else 1)
        figures = [figure for name in models.model_names(options) for figure in measure_model(name, options, bare_bytes)]
    except LoopggufError as error:
        print(f"bench_memory: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    met = print_table(figures, bare_bytes)
    print("\nall bars met" if met else "\nNOT all bars met")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
