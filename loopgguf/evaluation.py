"""A GGUF against its reference, token by token, both run by llama.cpp: perplexity, KLD, same top p, each with its error.

Definitions, names and standard errors are those of llama-perplexity (tools/perplexity/perplexity.cpp), with two
differences that make the numbers more exact: the reference's logits are used as they are rather than rounded to 16
bits in a file, so the KLD is the sum over the whole vocabulary; and what upstream prints without an error (quantiles,
the correlation) gets one here from a bootstrap over chunks. The KLD is KL(reference ‖ candidate), in nats.

Takes chunks of token ids, so it reads no text; logits are scored in slabs of positions and never stored or written.
It judges nothing: what is good enough is decided by whoever asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loopgguf.container import read_shards
from loopgguf.errors import InputError, QualityError, UsageError
from loopgguf.llama import Context, Model
from loopgguf.loss import first_scored
from loopgguf.progress import Progress
from loopgguf.splits import tokens_sha256

Floats = NDArray[np.float64]
Logits = NDArray[np.float32]

MIN_SCORED_FOR_TAIL = 20_000  # below it, 99.9 % rests on fewer than 20 tokens
TAIL_PERCENT = 99.9
QUANTILES_PERCENT = (TAIL_PERCENT, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0)
N_BOOTSTRAP = 200  # resamples; the error of a standard error is then 5 %
N_BOOTSTRAP_INTERVAL = 2000  # the ends of an interval need more
INTERVAL_PERCENT = 95.0
_SLAB_LOGITS = 1 << 19  # 4 MiB as float64; a slab in flight holds a few such arrays
_MIN_CTX = 4  # the shortest chunk with a scored position


@dataclass(frozen=True)
class Measure:
    """A number and its standard error in the same unit; None where there is no sound estimate of it."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Scores:
    """What each scored position says, arrays of one shape: −ln p of the true next token under both models (nats),
    KL(reference ‖ candidate) (nats), and whether both put the same token first."""

    nll: Floats
    reference_nll: Floats
    kld: Floats
    same_top: NDArray[np.bool_]


@dataclass(frozen=True)
class Quality:
    """How close a candidate is to its reference on one text.

    `omitted` maps the label of a number left out (None) to the reason. The token arrays, (n_chunks, scored positions
    per chunk) float32, are what `compare_paired` needs; `tokens_sha256` is the fingerprint of the chunks.
    """

    n_chunks: int
    n_ctx: int
    n_scored: int
    perplexity: Measure
    reference_perplexity: Measure
    perplexity_correlation_percent: Measure
    ln_perplexity_ratio: Measure
    perplexity_ratio: Measure
    mean_kld_nats: Measure
    max_kld_nats: Measure
    kld_quantiles_nats: Mapping[float, Measure | None]  # by percent; 50 is the median
    mean_dp_percent: Measure
    rms_dp_percent: Measure
    same_top_percent: Measure
    omitted: Mapping[str, str]
    tokens_sha256: str
    token_kld_nats: NDArray[np.float32] = field(repr=False, compare=False)
    token_nll_nats: NDArray[np.float32] = field(repr=False, compare=False)
    reference_token_nll_nats: NDArray[np.float32] = field(repr=False, compare=False)


@dataclass(frozen=True)
class PairedComparison:
    """Candidate a against candidate b on the same tokens; negative differences and ratios below 1 favour a."""

    mean_kld_difference_nats: Measure
    mean_kld_ratio: Measure | None  # None when b is identical to the reference
    mean_kld_ratio_interval: tuple[float, float] | None  # 95 %, from a bootstrap over chunks; None for a single chunk too
    ln_perplexity_difference: Measure


# --- scoring one position ---------------------------------------------------------------------------------------------


def log_softmax(logits: Logits) -> Floats:
    """Return ln p of every token, float64, for logits (n_positions, n_vocab) float32."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def score_positions(reference: Logits, candidate: Logits, targets: NDArray[np.int32]) -> Scores:
    """Return the scores of positions whose logits are (n_positions, n_vocab) float32 and next tokens (n_positions,)."""
    at = np.arange(len(targets)), targets
    reference_ln_p, ln_p = log_softmax(reference), log_softmax(candidate)
    reference_nll, nll = -reference_ln_p[at], -ln_p[at]
    same_top = reference.argmax(axis=1) == candidate.argmax(axis=1)
    np.subtract(reference_ln_p, ln_p, out=ln_p)
    kld = np.einsum("pv,pv->p", np.exp(reference_ln_p, out=reference_ln_p), ln_p)
    return Scores(nll, reference_nll, kld, same_top)


def _slabs(n_positions: int, n_vocab: int) -> list[slice]:
    step = max(1, _SLAB_LOGITS // n_vocab)
    return [slice(start, min(start + step, n_positions)) for start in range(0, n_positions, step)]


def _concatenate(parts: list[Scores]) -> Scores:
    return Scores(
        np.concatenate([p.nll for p in parts]),
        np.concatenate([p.reference_nll for p in parts]),
        np.concatenate([p.kld for p in parts]),
        np.concatenate([p.same_top for p in parts]),
    )


def _score_chunk(pool: ThreadPoolExecutor, reference: Logits, candidate: Logits, targets: NDArray[np.int32]) -> Scores:
    slabs = _slabs(*reference.shape)
    return _concatenate(list(pool.map(lambda s: score_positions(reference[s], candidate[s], targets[s]), slabs)))


# --- running the models -----------------------------------------------------------------------------------------------


class _Runner:
    """One GGUF ready to give the logits of a chunk's scored positions; a context manager."""

    def __init__(self, path: Path, n_ctx: int, n_threads: int) -> None:
        self.path, self._stack = path, ExitStack()
        try:
            self.model = self._stack.enter_context(Model(path))
            self._context = self._stack.enter_context(Context(self.model, n_ctx, n_threads=n_threads))
        except BaseException:
            self._stack.close()
            raise

    def logits(self, chunk: NDArray[np.int32], number: int) -> Logits:
        """Return a view (n_scored, n_vocab), valid until the next call; raise QualityError unless all are finite."""
        logits = self._context.decode(chunk, first_logits=first_scored(len(chunk)))[:-1]
        for slab in _slabs(*logits.shape):
            if not np.isfinite(logits[slab]).all():
                raise QualityError(
                    f"logits of {self.path} in chunk {number}: got NaN or infinity, expected finite numbers. Its weights are damaged or out of range"
                )
        return logits

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _vocabulary(path: Path) -> list[object]:
    value = read_shards(path)[0].metadata.get("tokenizer.ggml.tokens")
    return list(value.data) if value is not None and isinstance(value.data, list) else []


def _check_same_vocabulary(candidate: Path, reference: Path) -> None:
    ours, theirs = _vocabulary(candidate), _vocabulary(reference)
    if len(ours) != len(theirs):
        raise InputError(
            f"vocabulary of {candidate}: got {len(ours)} tokens, expected the {len(theirs)} of {reference}. Give the model it was made from as reference"
        )
    for i, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        if got != expected:
            raise InputError(f"token {i} of {candidate}: got {got!r}, expected {expected!r} as in {reference}. Give the model it was made from as reference")


def _check_tokens(tokens: NDArray[np.int32], model: Model, path: Path) -> None:
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < model.n_vocab:
        raise InputError(
            f"token ids for {path}: got {tokens.min()} to {tokens.max()}, expected 0 to {model.n_vocab - 1}. The chunks were cut with another vocabulary"
        )


def _check_shape(tokens: NDArray[np.int32]) -> tuple[int, int]:
    assert tokens.ndim == 2 and tokens.dtype == np.int32, (tokens.shape, tokens.dtype)
    n_chunks, n_ctx = tokens.shape
    if n_chunks < 1 or n_ctx < _MIN_CTX:
        raise UsageError(
            f"evaluation text: got {n_chunks} chunks of {n_ctx} tokens, expected at least one of at least {_MIN_CTX}. Give a longer text or a smaller -c"
        )
    return n_chunks, n_ctx


def _chunks(tokens: NDArray[np.int32], phase: str, progress: Progress | None) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.int32]]]:
    """Yield (number, chunk, next tokens of the scored positions) and report each chunk as done when the next is asked for."""
    n_chunks, n_ctx = tokens.shape
    for number, chunk in enumerate(tokens):
        yield number, chunk, chunk[first_scored(n_ctx) + 1 :]
        if progress is not None:
            progress(phase, number + 1, n_chunks)


def measure_qualities(
    candidates: Sequence[Path], reference: Path, tokens: NDArray[np.int32], *, n_threads: int, progress: Progress | None = None
) -> list[Quality]:
    """Return how close each of the GGUFs `candidates` is to the GGUF `reference` on the text in `tokens`, in their order.

    tokens: (n_chunks, n_ctx) int32 token ids, chunks as llama-perplexity cuts them (BOS in place of the first token
    where the vocabulary adds one). Of each chunk, positions n_ctx / 2 … n_ctx − 2 are scored. The models run one after
    the other on each chunk, the reference once for all, with the same cache and attention settings; all stay mapped, and
    llama.cpp holds the scored positions × n_vocab float32 logits of one chunk for each. Raises InputError for files that
    do not load or whose vocabularies differ, UsageError for too little text, QualityError for logits that are not finite.
    """
    n_chunks, n_ctx = _check_shape(tokens)
    for candidate in candidates:
        _check_same_vocabulary(candidate, reference)
    scores: list[list[Scores]] = [[] for _ in candidates]
    with ExitStack() as stack:
        base, *ours = (stack.enter_context(_Runner(path, n_ctx, n_threads)) for path in (reference, *candidates))
        pool = stack.enter_context(ThreadPoolExecutor(n_threads))
        for runner in ours:
            if base.model.n_vocab != runner.model.n_vocab:
                raise InputError(f"vocabulary of {runner.path}: got {runner.model.n_vocab} tokens, expected the {base.model.n_vocab} of {reference}")
        _check_tokens(tokens, base.model, reference)
        for number, chunk, targets in _chunks(tokens, "evaluate", progress):
            reference_logits = base.logits(chunk, number)
            for runner, scored in zip(ours, scores, strict=True):
                scored.append(_score_chunk(pool, reference_logits, runner.logits(chunk, number), targets))
    return [summarize(_concatenate(scored), n_chunks, n_ctx, tokens_sha256(tokens)) for scored in scores]


def measure_quality(candidate: Path, reference: Path, tokens: NDArray[np.int32], *, n_threads: int, progress: Progress | None = None) -> Quality:
    """Return how close one GGUF is to `reference`: `measure_qualities` of it alone."""
    return measure_qualities([candidate], reference, tokens, n_threads=n_threads, progress=progress)[0]


# --- statistics -------------------------------------------------------------------------------------------------------


def mean_measure(values: Floats) -> Measure:
    """Return the mean with σ / √n, tokens taken as independent, as upstream does."""
    n = len(values)
    return Measure(float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None)


def _exponential(measure: Measure) -> Measure:
    value = float(np.exp(measure.value))
    return Measure(value, None if measure.standard_error is None else value * measure.standard_error)


def _bootstrap(by_chunk: Floats, statistic: Callable[[Floats], Floats]) -> list[float | None]:
    """Return the standard error of each number that `statistic` makes of an array whose first axis is chunks.

    Chunks are drawn with replacement (tokens of one chunk are not independent) with a fixed seed, so that the same
    measurement always has the same error; None for a single chunk, which says nothing about its own spread.
    """
    n_chunks = len(by_chunk)
    if n_chunks < 2:
        return [None] * len(statistic(by_chunk))
    generator = np.random.default_rng(0)
    resampled = [statistic(by_chunk[generator.integers(0, n_chunks, n_chunks)]) for _ in range(N_BOOTSTRAP)]
    return [float(error) for error in np.std(resampled, axis=0, ddof=1)]


def _correlation(nlls: Floats) -> Floats:
    """Return [the correlation in percent] of (n_chunks, 2, n_positions) pairs of nll; 100 where nothing varies."""
    a, b = nlls[:, 0].ravel(), nlls[:, 1].ravel()
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return np.array([100.0 * float(np.dot(a, b)) / scale if scale else 100.0])


def _root_mean_square(values: Floats) -> Measure:
    """Return √(mean x²) with the error of the mean square carried through the root."""
    mean_square = mean_measure(np.square(values))
    root = float(np.sqrt(mean_square.value))
    error = mean_square.standard_error
    return Measure(root, error if not (error and root) else 0.5 / root * error)


def proportion_percent(flags: NDArray[np.bool_]) -> Measure:
    """Return how many of the flags are set, in percent, with the binomial error."""
    n, p = len(flags), float(flags.mean())
    return Measure(100 * p, 100 * float(np.sqrt(p * (1 - p) / (n - 1))) if n > 1 else None)


def quantile_label(percent: float) -> str:
    """Return upstream's name of a KLD quantile, for example `99.9% KLD` or `Median KLD`."""
    return "Median KLD" if percent == 50 else f"{percent:.1f}% KLD"


def _kld_quantiles(kld: Floats) -> tuple[dict[float, Measure | None], dict[str, str]]:
    """Return the quantiles of KLD (n_chunks, n_positions), linearly interpolated as upstream, and what is left out."""
    quantiles: dict[float, Measure | None] = dict.fromkeys(QUANTILES_PERCENT)
    omitted = {}
    if kld.size < MIN_SCORED_FOR_TAIL:
        omitted[quantile_label(TAIL_PERCENT)] = f"needs at least {MIN_SCORED_FOR_TAIL} scored tokens, got {kld.size}"
    kept = [q for q in QUANTILES_PERCENT if quantile_label(q) not in omitted]

    def statistic(sample: Floats) -> Floats:
        return np.percentile(sample, kept)

    for percent, value, error in zip(kept, statistic(kld), _bootstrap(kld, statistic), strict=True):
        quantiles[percent] = Measure(float(value), error)
    return quantiles, omitted


def summarize(scores: Scores, n_chunks: int, n_ctx: int, tokens_sha256: str) -> Quality:
    """Return the statistics of the scores of n_chunks equal chunks, chunk after chunk.

    The error of the perplexity ratio is paired: that of the mean difference of nll, which is upstream's
    √(σ₁² + σ₂² − 2 cov). Δp is p(candidate) − p(reference) of the true next token.
    """
    n_scored = len(scores.kld)
    by_chunk = (n_chunks, n_scored // n_chunks)
    dp_percent = 100 * (np.exp(-scores.nll) - np.exp(-scores.reference_nll))
    ln_ratio = mean_measure(scores.nll - scores.reference_nll)
    nlls = np.stack([scores.nll.reshape(by_chunk), scores.reference_nll.reshape(by_chunk)], axis=1)
    quantiles, omitted = _kld_quantiles(scores.kld.reshape(by_chunk))
    return Quality(
        n_chunks=n_chunks,
        n_ctx=n_ctx,
        n_scored=n_scored,
        perplexity=_exponential(mean_measure(scores.nll)),
        reference_perplexity=_exponential(mean_measure(scores.reference_nll)),
        perplexity_correlation_percent=Measure(float(_correlation(nlls)[0]), _bootstrap(nlls, _correlation)[0]),
        ln_perplexity_ratio=ln_ratio,
        perplexity_ratio=_exponential(ln_ratio),
        mean_kld_nats=mean_measure(scores.kld),
        max_kld_nats=Measure(float(scores.kld.max()), None),
        kld_quantiles_nats=quantiles,
        mean_dp_percent=mean_measure(dp_percent),
        rms_dp_percent=_root_mean_square(dp_percent),
        same_top_percent=proportion_percent(scores.same_top),
        omitted=omitted,
        tokens_sha256=tokens_sha256,
        token_kld_nats=scores.kld.reshape(by_chunk).astype(np.float32),
        token_nll_nats=scores.nll.reshape(by_chunk).astype(np.float32),
        reference_token_nll_nats=scores.reference_nll.reshape(by_chunk).astype(np.float32),
    )


def labelled(quality: Quality) -> dict[str, Measure | None]:
    """Return every number under llama-perplexity's own name, in its order; percentages and nats as in `Quality`."""
    return {
        "Mean PPL(Q)": quality.perplexity,
        "Mean PPL(base)": quality.reference_perplexity,
        "Cor(ln(PPL(Q)), ln(PPL(base)))": quality.perplexity_correlation_percent,
        "Mean ln(PPL(Q)/PPL(base))": quality.ln_perplexity_ratio,
        "Mean PPL(Q)/PPL(base)": quality.perplexity_ratio,
        "Mean KLD": quality.mean_kld_nats,
        "Maximum KLD": quality.max_kld_nats,
        **{quantile_label(percent): measure for percent, measure in quality.kld_quantiles_nats.items()},
        "Mean Δp": quality.mean_dp_percent,
        "RMS Δp": quality.rms_dp_percent,
        "Same top p": quality.same_top_percent,
    }


# --- two candidates ---------------------------------------------------------------------------------------------------


def _ratio(a: Floats, b: Floats) -> Measure | None:
    """Return mean(a) / mean(b) of paired chunk means, with the error of the linearised ratio (Cochran, ch. 6)."""
    if not b.mean():
        return None
    ratio = float(a.mean() / b.mean())
    return Measure(ratio, mean_measure((a - ratio * b) / b.mean()).standard_error)


def _ratio_interval(a: Floats, b: Floats) -> tuple[float, float] | None:
    """Return the 95 % interval of mean(a) / mean(b): percentiles over resampled pairs of chunks, with a fixed seed."""
    if len(b) < 2:
        return None
    draws = np.random.default_rng(0).integers(0, len(b), (N_BOOTSTRAP_INTERVAL, len(b)))
    below = b[draws].mean(axis=1)
    if not below.all():
        return None
    outside = (100 - INTERVAL_PERCENT) / 2
    low, high = np.percentile(a[draws].mean(axis=1) / below, (outside, 100 - outside))
    return float(low), float(high)


def compare_paired(a: Quality, b: Quality) -> PairedComparison:
    """Return how candidate a differs from candidate b, with standard errors over the paired chunks.

    Both must have been measured on the same tokens against the same reference, else UsageError. Pairing removes what
    the text contributes, so a difference far below the error of either mean can still be certain.
    """
    if a.tokens_sha256 != b.tokens_sha256:
        raise UsageError("paired comparison: got measurements on different tokens, expected the same text, vocabulary, context and chunks. Evaluate again")
    if not np.allclose(a.reference_token_nll_nats, b.reference_token_nll_nats, rtol=0, atol=1e-2):
        raise UsageError("paired comparison: got measurements against different references, expected one. Evaluate both against the same file")
    kld_a, kld_b = (q.token_kld_nats.mean(axis=1, dtype=np.float64) for q in (a, b))
    nll_a, nll_b = (q.token_nll_nats.mean(axis=1, dtype=np.float64) for q in (a, b))
    return PairedComparison(mean_measure(kld_a - kld_b), _ratio(kld_a, kld_b), _ratio_interval(kld_a, kld_b), mean_measure(nll_a - nll_b))
