"""How fast error feedback encodes: weights per second by type and effort, the factorizations apart, and the memory they take.

    python tools/bench_compensate.py [--rows 1024] [--columns 4096] [--types Q4_K,Q2_K,IQ2_XXS,IQ3_XXS] [--factor 4096,14336] [--threads N] [--rounds 3] [--cpu]

Weights are Gaussian, H is that of correlated columns. A thread encodes a tensor, so `--threads` of them encode as many side
by side, as in a quantization; the figures are for all together. The last lines say what a 7B model takes with that.
Nothing here says anything about quality: see bench_quality.py.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from loopgguf import ggml
from loopgguf.compensate import FAST, FULL, ROW_DAMPING, Columns, Damping, LossCurvature, compensate, damped, encode_guarded, feedback_factor, row_blocks
from loopgguf.formats import FORMATS, GgmlType
from loopgguf.opening import default_threads

WEIGHTS_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # of the linears of Llama 2 7B
N_PROCESSORS = default_threads()
FACTORS_7B = 32 * (11 * 4096**3 + 11008**3)  # n³ of what is factorized: H of seven linears, H_O of five


def clock() -> float:
    """Return seconds: of the wall, or with `--cpu` of the processors, as if they had been shared out evenly."""
    return time.process_time() / N_PROCESSORS if "--cpu" in sys.argv else time.perf_counter()


def timed(work: Callable[[], object], n_threads: int = 1, n_rounds: int = 1) -> float:
    """Return the seconds until as many threads have done the same work side by side: the least of some rounds."""
    seconds = []
    for _ in range(n_rounds):
        start = clock()
        with ThreadPoolExecutor(n_threads) as pool:
            for future in [pool.submit(work) for _ in range(n_threads)]:
                future.result()
        seconds.append(clock() - start)
    return min(seconds)


def covariance(n: int, seed: int) -> np.ndarray:
    """Return a covariance (n, n) float32 of correlated columns of very different size, as activations have."""
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((n // 2, n), np.float32) * np.exp(generator.standard_normal(n, np.float32))
    return damped(X.T @ X / np.float32(len(X)), Damping(0.1))


def bench_factor(n: int, n_threads: int) -> float:
    """Print and return the seconds that the factorization of an H (n, n) takes."""
    H = covariance(n, 3)
    with threadpool_limits(n_threads, "blas"):
        seconds = timed(lambda: feedback_factor(H))
    print(f"factorization of {n}: {seconds:.1f} s on {n_threads} threads", flush=True)
    return seconds


def bench_memory(ggml_type: GgmlType, n_rows: int, n_columns: int) -> None:
    """Print the peak of what numpy holds while a tensor is encoded, its weights and all its matrices included."""
    tracemalloc.start()
    W = np.random.default_rng(0).standard_normal((n_rows, n_columns), np.float32)
    H, H_O = covariance(n_columns, 1), covariance(n_rows, 2)
    curvature, importance = LossCurvature(H, H.copy(), H_O, H_O.copy()), np.diag(H).astype(np.float32)
    for name, effort in (("fast", FAST), ("full", FULL)):
        tracemalloc.reset_peak()
        encode_guarded(W, ggml_type, importance, curvature, effort)
        _, peak = tracemalloc.get_traced_memory()
        bound = 4 * W.nbytes + 2.5 * 8 * (n_rows**2 + n_columns**2)
        print(f"memory of {ggml_type.name} {name}: {peak / 2**20:.0f} MiB; 4 float32 slabs and 2.5 H of either side (8 bytes a number) are {bound / 2**20:.0f}")
    tracemalloc.stop()


def bench_types(types: list[GgmlType], n_rows: int, n_columns: int, n_threads: int, n_rounds: int) -> dict[str, float]:
    """Print a line a type; return weights per second of all threads, by type and effort (`full` takes long: one round)."""
    W = np.random.default_rng(0).standard_normal((n_rows, n_columns), np.float32)
    H, H_O = covariance(n_columns, 1), damped(covariance(n_rows, 2), ROW_DAMPING)
    importance = np.diag(H).astype(np.float32)
    widths = {FORMATS[t].block for t in types}
    factors = {width: timed(lambda w=width: (Columns(H, w), row_blocks(n_rows, H_O)), n_threads, n_rounds) for width in widths}
    print(f"{n_threads} threads, a tensor {n_rows} × {n_columns} each, M weights/s; factors of both sides, {max(factors.values()):.1f} s, taken off")
    print(f"{'type':<9}{'libggml':>10}{'fast':>10}{'full':>10}")
    speeds: dict[str, float] = {}
    for ggml_type in types:
        works: dict[str, Callable[[], object]] = {
            "libggml": lambda t=ggml_type: ggml.encode_rows(t, W, importance),
            "fast": lambda t=ggml_type: compensate(W, t, H, importance=importance, H_O=H_O, sweeps=FAST.sweeps_for(t)),
            "full": lambda t=ggml_type: compensate(W, t, H, importance=importance, H_O=H_O, sweeps=FULL.sweeps_for(t), is_thorough=True),
        }
        for effort, work in works.items():
            seconds = timed(work, n_threads, 1 if effort == "full" else n_rounds) - (factors[FORMATS[ggml_type].block] if effort != "libggml" else 0)
            speeds[f"{ggml_type.name} {effort}"] = n_threads * W.size / max(seconds, 1e-3)
        print(f"{ggml_type.name:<9}" + "".join(f"{speeds[f'{ggml_type.name} {effort}'] / 1e6:>10.2f}" for effort in works), flush=True)
    return speeds


def compile_loops(types: list[GgmlType]) -> None:
    """Let every type encode a little, so that what comes after measures no compiler."""
    W, H = np.random.default_rng(0).standard_normal((32, 256), np.float32), covariance(256, 1)
    for ggml_type in types:
        ggml.initialize(ggml_type)
        compensate(W, ggml_type, H, importance=np.ones(256, np.float32), H_O=covariance(32, 2), sweeps=1, is_thorough=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--types", default="Q4_0,Q4_K,Q2_K,IQ3_XXS,IQ2_XXS")
    parser.add_argument("--factor", default="4096", help="sizes of H to factorize, with commas; the last says what a 7B model takes")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts, of libggml, fast and the factors")
    parser.add_argument("--cpu", action="store_true", help="count processor time, on a machine that does other work too")
    options = parser.parse_args()
    types, sizes = [GgmlType[name] for name in options.types.split(",")], list(map(int, options.factor.split(",")))
    compile_loops(types)
    seconds = [bench_factor(n, options.threads) for n in sizes]
    with threadpool_limits(1, "blas"):
        bench_memory(types[0], options.rows, options.columns)
        speeds = bench_types(types, options.rows, options.columns, options.threads, options.rounds)
    factors = FACTORS_7B * seconds[-1] / sizes[-1] ** 3
    for name, speed in speeds.items():
        if not name.endswith("libggml"):
            effort = FAST if name.endswith("fast") else FULL
            n_factors = 1 + len(effort.dampings) if len(effort.dampings) > 1 else 1  # of H; that of H_O needs one
            minutes = (WEIGHTS_7B / speed + n_factors * factors) / 60
            print(f"7B as {name}: about {minutes:.0f} min on {options.threads} threads, {n_factors * factors / 60:.0f} of them factorizations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
