"""How fast statistics are collected: tokens per second of each engine against what it cannot do without.

    python tools/bench_imatrix.py [--model demo|smollm2|smollm2-wide|PATH]… [--text FILE…] [--samples 32] [--ctx-size 512] [--rounds 5] [--threads N]

llama.cpp: a bare `llama_decode` that computes the logits of all tokens, and the imatrix pass that sums Σx², as `loopgguf
imatrix` runs it (the head only for every fourth chunk, whose perplexity is shown), A B A B …, same chunks, batch and
threads; the figure is the median of the rounds' ratios, the bar 0.95. Torch: the pass
over a checkpoint folder with Σx² alone, with Gram matrices, and with gradients, once each. llama.cpp runs the folder's
conversion to BF16. The machine's load is printed: on a busy machine wall-clock ratios say little; `CPU`, the ratio of
processor times, then tells more, though not what waiting for threads to wake costs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import models
import numpy as np

from loopgguf.accumulators import ColumnSums, split_holdout
from loopgguf.activations import SCORE_EVERY, collect_from_checkpoint, collect_from_gguf, collect_grams_from_checkpoint
from loopgguf.calibration import load_chunks
from loopgguf.errors import LoopggufError
from loopgguf.llama import Context, Model

BAR = 0.95


def load_tokens(gguf: Path, texts: Sequence[Path], n_ctx: int, n_chunks: int) -> np.ndarray:
    with Model(gguf, vocab_only=True) as vocabulary:
        return load_chunks(vocabulary, texts, n_ctx, n_chunks).tokens


def decode_bare(gguf: Path, tokens: np.ndarray, n_threads: int) -> None:
    """Compute the logits of all tokens and look at none."""
    with Model(gguf) as model, Context(model, tokens.shape[1], n_threads=n_threads) as context:
        for chunk in tokens:
            context.decode(chunk)


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Return the wall-clock and the processor seconds of a run."""
    start, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - processor


def bench_llama(gguf: Path, tokens: np.ndarray, n_rounds: int, n_threads: int) -> float:
    """Print the table of rounds; return the median ratio of speeds."""
    print(f"llama.cpp, {gguf.name}, {len(tokens)} × {tokens.shape[1]} tokens, {n_threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'round':>6} {'bare tok/s':>12} {'imatrix tok/s':>14} {'ratio':>7} {'CPU':>7}")
    decode_bare(gguf, tokens[:1], n_threads)  # the file comes into the page cache
    rounds = []
    for number in range(n_rounds):
        bare, bare_cpu = seconds(lambda: decode_bare(gguf, tokens, n_threads))
        collected, collected_cpu = seconds(lambda: collect_from_gguf(gguf, tokens, [ColumnSums()], n_threads=n_threads, score_every=SCORE_EVERY))
        rounds.append((tokens.size / bare, tokens.size / collected, bare / collected, bare_cpu / collected_cpu))
        print(f"{number + 1:>6} {rounds[-1][0]:>12.1f} {rounds[-1][1]:>14.1f} {rounds[-1][2]:>7.3f} {rounds[-1][3]:>7.3f}", flush=True)
    of_bare, of_collected, ratio, of_cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"{'median':>6} {of_bare:>12.1f} {of_collected:>14.1f} {ratio:>7.3f} {of_cpu:>7.3f}   bar {BAR}")
    return ratio


def bench_torch(folder: Path, tokens: np.ndarray, n_threads: int) -> None:
    """Print the speed of the torch engine with what each part adds."""
    holdout = split_holdout(len(tokens), 0)[1].tolist()

    def grams(label_seed: int | None) -> None:
        collect_grams_from_checkpoint(folder, tokens, [ColumnSums()], sink=lambda *_: None, holdout=holdout, label_seed=label_seed, n_threads=n_threads)

    print(f"torch, {folder.name}, {len(tokens)} × {tokens.shape[1]} tokens, {n_threads} threads, load {os.getloadavg()[0]:.1f}")
    collect_from_checkpoint(folder, tokens[:1], [], n_threads=n_threads)  # imports
    parts: dict[str, Callable[[], object]] = {
        "Σx²": lambda: collect_from_checkpoint(folder, tokens, [ColumnSums()], n_threads=n_threads),
        "Σx², H": lambda: grams(None),
        "Σx², H, H_w, H_O, G0": lambda: grams(0),
    }
    for what, run in parts.items():
        taken, _ = seconds(run)
        print(f"{what:>22} {taken:>8.1f} s {tokens.size / taken:>10.1f} tok/s", flush=True)


def bench_model(name: str, options: argparse.Namespace) -> float:
    """Print the tables of one model; return the ratio that the bar is about."""
    forms = models.resolve_forms(name, options)
    tokens = load_tokens(forms.gguf, models.resolve_texts(options), options.ctx_size, options.samples)
    ratio = bench_llama(forms.gguf, tokens, options.rounds, options.threads) if options.rounds else BAR
    if forms.checkpoint is not None and not options.no_torch:
        bench_torch(forms.checkpoint, tokens, options.threads)
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models.add_model_option(parser, "demo", names=(*models.NAMES, f"{models.SYNTHETIC}SIZE"))
    models.add_text_option(parser, default="calibration")
    models.add_scratch_option(parser)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="0: only torch")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-torch", action="store_true")
    options = parser.parse_args()
    try:
        ratios = [bench_model(name, options) for name in models.model_names(options)]
    except LoopggufError as error:
        print(f"bench_imatrix: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if min(ratios) >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
