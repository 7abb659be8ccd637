"""How fast error feedback encodes: weights per second by type and effort, the factorizations apart, and the memory they take.

    python tools/bench_compensate.py [--rows 1024] [--columns 4096] [--types Q4_K,Q2_K,IQ2_XXS,IQ3_XXS] [--factor 4096,14336] [--threads N]

Weights are Gaussian, H is that of correlated columns. One thread encodes a tensor, so the workers of a quantization run
as many tensors side by side; the figures are for one, and the last line says what a 7B model takes on `--threads` of them.
Nothing here says anything about quality: see bench_quality.py.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from loopgguf import ggml
from loopgguf.compensate import FULL, ROW_DAMPING, Damping, compensate, damped, feedback_factor
from loopgguf.formats import GgmlType
from loopgguf.opening import default_threads

WEIGHTS_7B = 6_500_000_000  # of a 7B model's linears


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def covariance(n: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((n // 2, n), np.float32) * np.exp(generator.standard_normal(n, np.float32))
    return damped((X.T @ X / len(X)).astype(np.float64), Damping(0.1))


def bench_types(types: list[GgmlType], n_rows: int, n_columns: int) -> dict[str, float]:
    """Print a line a type; return weights per second with one thread, by type and effort."""
    W = np.random.default_rng(0).standard_normal((n_rows, n_columns), np.float32)
    H, H_O = covariance(n_columns, 1), damped(covariance(n_rows, 2), ROW_DAMPING)
    importance = np.diag(H).astype(np.float32)
    factors = timed(lambda: (feedback_factor(H), feedback_factor(H_O)))
    print(f"one thread, {n_rows} × {n_columns}, M weights/s; factorizations of both sides {factors:.1f} s, taken off")
    print(f"{'type':<9}{'libggml':>10}{'fast':>10}{'full':>10}")
    speeds: dict[str, float] = {}
    for ggml_type in types:
        ggml.initialize(ggml_type)
        compensate(W[:32, :256], ggml_type, H[:256, :256], importance=importance[:256], H_O=H_O[:32, :32], max_sweeps=1)  # compiles the loops
        works: dict[str, Callable[[], object]] = {
            "libggml": lambda t=ggml_type: ggml.encode_rows(t, W, importance),
            "fast": lambda t=ggml_type: compensate(W, t, H, importance=importance, H_O=H_O),
            "full": lambda t=ggml_type: compensate(W, t, H, importance=importance, H_O=H_O, max_sweeps=FULL.max_sweeps),
        }
        for effort, work in works.items():
            seconds = timed(work) - (factors if effort != "libggml" else 0)
            speeds[f"{ggml_type.name} {effort}"] = W.size / max(seconds, 1e-3)
        print(f"{ggml_type.name:<9}" + "".join(f"{speeds[f'{ggml_type.name} {effort}'] / 1e6:>10.2f}" for effort in works), flush=True)
    return speeds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--types", default="Q4_0,Q4_K,Q2_K,IQ3_XXS,IQ2_XXS")
    parser.add_argument("--factor", default="4096", help="sizes of H to factorize, with commas")
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    for n in map(int, options.factor.split(",")):
        H = covariance(n, 3)
        with threadpool_limits(options.threads, "blas"):
            print(f"factorization of {n}: {timed(lambda H=H: feedback_factor(H)):.1f} s on {options.threads} threads", flush=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with threadpool_limits(1, "blas"):
        speeds = bench_types([GgmlType[name] for name in options.types.split(",")], options.rows, options.columns)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bound = 4 * options.rows * options.columns * 4 + 2.5 * 8 * options.columns**2
    print(f"memory above the matrices: {(peak - before) / 1024:.0f} MiB; 4 float32 slabs and 2.5 H are {bound / 2**20:.0f} MiB")
    for name, speed in speeds.items():
        if not name.endswith("libggml"):
            print(f"7B as {name}: about {WEIGHTS_7B / speed / options.threads / 60:.0f} min of encoding on {options.threads} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
