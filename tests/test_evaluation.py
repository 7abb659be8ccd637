"""Oracles for `evaluation`: the definitions written as naive loops, hand-computed values, and real runs of a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_llama import N_VOCAB, tiny_tokens, write_tiny_llama

from loopgguf import evaluation
from loopgguf.errors import InputError, QualityError, UsageError
from loopgguf.evaluation import Scores, compare_paired, measure_qualities, measure_quality, score_positions, summarize
from loopgguf.llama import Context, Model

N_CTX = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "reference": write_tiny_llama(folder / "reference.gguf"),
        "near": write_tiny_llama(folder / "near.gguf", noise=0.01),
        "far": write_tiny_llama(folder / "far.gguf", noise=0.05),
    }


@pytest.fixture(scope="module")
def tokens() -> NDArray[np.int32]:
    chunks = np.random.default_rng(2).integers(3, N_VOCAB, (12, N_CTX)).astype(np.int32)
    chunks[:, 0] = 1
    return chunks


def naive_scores(reference: list[list[float]], candidate: list[list[float]], targets: list[int]) -> list[tuple[float, float, float, bool]]:
    """(nll, reference nll, KL(reference ‖ candidate), same top) by the textbook, one number at a time."""
    result = []
    for base, ours, target in zip(reference, candidate, targets, strict=True):
        p = [math.exp(x) / math.fsum(math.exp(y) for y in base) for x in base]
        q = [math.exp(x) / math.fsum(math.exp(y) for y in ours) for x in ours]
        kld = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        result.append((-math.log(q[target]), -math.log(p[target]), kld, p.index(max(p)) == q.index(max(q))))
    return result


def flat(scores: Scores) -> list[tuple[float, float, float, bool]]:
    return list(zip(scores.nll, scores.reference_nll, scores.kld, scores.same_top, strict=True))


def random_scores(n_chunks: int, n_positions: int, seed: int = 0) -> Scores:
    generator = np.random.default_rng(seed)
    n = n_chunks * n_positions
    nll = generator.gamma(2.0, 1.5, n)
    return Scores(nll, np.abs(nll + 0.1 * generator.normal(size=n)), generator.gamma(0.5, 0.02, n), generator.random(n) < 0.9)


# --- definitions ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0.1, 8))
def test_scores_equal_the_textbook(n_vocab: int, n_positions: int, seed: int, spread: float) -> None:
    """Catches a swapped KL direction, a sum over the wrong axis, an off-by-one target."""
    generator = np.random.default_rng(seed)
    reference, candidate = (generator.normal(size=(n_positions, n_vocab)) * spread for _ in range(2))
    reference, candidate = reference.astype(np.float32), candidate.astype(np.float32)
    targets = generator.integers(0, n_vocab, n_positions).astype(np.int32)
    np.testing.assert_allclose(
        np.array(flat(score_positions(reference, candidate, targets))),
        np.array(naive_scores(reference.tolist(), candidate.tolist(), targets.tolist())),
        rtol=1e-9,
        atol=1e-12,
    )


def test_hand_computed_three_tokens() -> None:
    """Catches a wrong base of the logarithm, KL(candidate ‖ reference), and Δp with the wrong sign.

    Reference probabilities 1/2, 1/4, 1/4 against the candidate's 1/4, 1/2, 1/4:
    KL(reference ‖ candidate) = 1/2 ln 2 + 1/4 ln 1/2 + 0 = 1/4 ln 2; the true token 0 loses 25 % points.
    """
    reference, candidate = np.log(np.array([[2.0, 1, 1]], np.float32)), np.log(np.array([[1.0, 2, 1]], np.float32))
    scores = score_positions(reference, candidate, np.array([0], np.int32))
    np.testing.assert_allclose(scores.kld, [math.log(2) / 4], rtol=1e-6)
    np.testing.assert_allclose([scores.nll[0], scores.reference_nll[0]], [math.log(4), math.log(2)], rtol=1e-6)
    assert not scores.same_top[0]
    quality = summarize(scores, 1, 4, "")
    assert quality.mean_dp_percent.value == pytest.approx(-25, rel=1e-6)
    assert quality.perplexity.value == pytest.approx(4, rel=1e-6)
    assert quality.perplexity_ratio.value == pytest.approx(2, rel=1e-6)


def test_kl_direction_is_reference_first() -> None:
    """Catches the reversed KL on an asymmetric pair: 0.9/0.1 against 0.5/0.5."""
    p, q = (0.9, 0.1), (0.5, 0.5)
    scores = score_positions(np.log(np.array([p], np.float32)), np.log(np.array([q], np.float32)), np.array([0], np.int32))
    assert scores.kld[0] == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-6)


def test_huge_logits_do_not_overflow() -> None:
    """Catches an exp without the maximum taken off first."""
    logits = np.array([[1e4, 0, -1e4]], np.float32)
    scores = score_positions(logits, logits, np.array([0], np.int32))
    assert (scores.kld[0], scores.nll[0]) == (0, 0)


def test_slabs_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a slab that drops, repeats or misaligns positions."""
    generator = np.random.default_rng(0)
    reference, candidate = generator.normal(size=(2, 11, 7)).astype(np.float32)
    targets = generator.integers(0, 7, 11).astype(np.int32)
    whole = score_positions(reference, candidate, targets)
    for slab_logits in (1, 14, 21, 1000):
        monkeypatch.setattr(evaluation, "_SLAB_LOGITS", slab_logits)
        with evaluation.ThreadPoolExecutor(2) as pool:
            assert flat(evaluation._score_chunk(pool, reference, candidate, targets)) == flat(whole)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_standard_errors_are_upstreams() -> None:
    """Catches a deviation from llama-perplexity's sums: its formulas, written as it accumulates them."""
    scores = random_scores(10, 30)
    quality, n = summarize(scores, 10, 62, ""), 300

    def mean_and_uncertainty(values: NDArray[np.float64]) -> tuple[float, float]:
        f = values.sum() / n
        return f, math.sqrt((np.square(values).sum() / n - f * f) / (n - 1))

    (mean, error), (base_mean, base_error) = mean_and_uncertainty(scores.nll), mean_and_uncertainty(scores.reference_nll)
    covariance = ((scores.nll * scores.reference_nll).sum() / n - mean * base_mean) / (n - 1)
    ratio, ratio_error = math.exp(mean - base_mean), math.sqrt(error**2 + base_error**2 - 2 * covariance)
    dp = np.exp(-scores.nll) - np.exp(-scores.reference_nll)
    mse, mse_error = mean_and_uncertainty(dp**2)
    same = scores.same_top.mean()
    expected = {
        "Mean PPL(Q)": (math.exp(mean), math.exp(mean) * error),
        "Mean PPL(base)": (math.exp(base_mean), math.exp(base_mean) * base_error),
        "Mean ln(PPL(Q)/PPL(base))": (mean - base_mean, ratio_error),
        "Mean PPL(Q)/PPL(base)": (ratio, ratio * ratio_error),
        "Mean KLD": mean_and_uncertainty(scores.kld),
        "Mean Δp": tuple(100 * x for x in mean_and_uncertainty(dp)),
        "RMS Δp": (100 * math.sqrt(mse), 100 * 0.5 / math.sqrt(mse) * mse_error),
        "Same top p": (100 * same, 100 * math.sqrt(same * (1 - same) / (n - 1))),
    }
    numbers = evaluation.labelled(quality)
    for label, (value, standard_error) in expected.items():
        measure = numbers[label]
        assert measure is not None
        assert (measure.value, measure.standard_error) == pytest.approx((value, standard_error), rel=1e-6), label
    correlation = covariance / (error * base_error)
    assert quality.perplexity_correlation_percent.value == pytest.approx(100 * correlation, rel=1e-9)


def upstream_percentile(values: NDArray[np.float64], fraction: float) -> float:
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    return (1 - position + low) * ordered[low] + (position - low) * ordered[min(low + 1, len(ordered) - 1)]


def test_quantiles_are_upstreams() -> None:
    """Catches another interpolation rule, and a median that is not the mean of the middle two."""
    scores = random_scores(4, 25)
    quality = summarize(scores, 4, 52, "")
    for percent, measure in quality.kld_quantiles_nats.items():
        if measure is not None:
            assert measure.value == pytest.approx(upstream_percentile(scores.kld, percent / 100), rel=1e-9)
    assert quality.max_kld_nats.value == scores.kld.max()


@pytest.mark.parametrize(("n_scored", "is_there"), [(19_999, False), (20_000, True)])
def test_tail_needs_enough_tokens(n_scored: int, is_there: bool) -> None:
    """Catches a 99.9 % figure from too few tokens, or one left out without a reason."""
    quality = summarize(random_scores(1, n_scored), 1, 2 * n_scored + 2, "")
    assert (quality.kld_quantiles_nats[99.9] is not None) == is_there
    assert dict(quality.omitted) == ({} if is_there else {"99.9% KLD": "needs at least 20000 scored tokens, got 19999"})
    assert set(quality.omitted) == {label for label, measure in evaluation.labelled(quality).items() if measure is None}


def test_bootstrap_finds_the_error_of_a_mean() -> None:
    """Catches a bootstrap over tokens (5 times too small here, for the tokens of a chunk are equal) or with a moving seed."""
    by_chunk = np.repeat(np.random.default_rng(0).normal(size=(400, 1)), 25, axis=1)

    def statistic(sample: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([sample.mean()])

    error = evaluation._bootstrap(by_chunk, statistic)
    assert error == [pytest.approx(by_chunk[:, 0].std(ddof=1) / 20, rel=0.2)]
    assert error == evaluation._bootstrap(by_chunk, statistic)
    assert evaluation._bootstrap(by_chunk[:1], statistic) == [None]


# --- two candidates ---------------------------------------------------------------------------------------------------


def test_paired_comparison_sees_a_small_certain_difference() -> None:
    """Catches an unpaired error: a is 1 % better on every token, which only pairing can tell from noise."""
    scores = random_scores(40, 20)
    b = summarize(scores, 40, 42, "text")
    a = summarize(replace(scores, kld=scores.kld * 0.99), 40, 42, "text")
    paired = compare_paired(a, b)
    assert paired.mean_kld_ratio is not None
    assert paired.mean_kld_ratio.value == pytest.approx(0.99, rel=1e-6)
    assert paired.mean_kld_ratio.standard_error == pytest.approx(0, abs=1e-6)
    difference, error = paired.mean_kld_difference_nats.value, paired.mean_kld_difference_nats.standard_error
    assert error is not None
    assert b.mean_kld_nats.standard_error is not None
    assert abs(difference) > 5 * error
    assert abs(difference) < b.mean_kld_nats.standard_error


def test_ratio_error_agrees_with_a_bootstrap() -> None:
    """Catches a wrong linearisation of the ratio of two means."""
    generator = np.random.default_rng(0)
    b = generator.gamma(4.0, 1.0, 500)
    a = 0.8 * b + generator.gamma(2.0, 0.3, 500)
    measure = evaluation._ratio(a, b)
    draws = generator.integers(0, 500, (2000, 500))
    assert measure is not None
    assert measure.standard_error == pytest.approx((a[draws].mean(axis=1) / b[draws].mean(axis=1)).std(), rel=0.1)
    assert evaluation._ratio(a, np.zeros(500)) is None


def test_ratio_interval_covers_as_often_as_it_says() -> None:
    """Catches chunks of a and b drawn apart (an interval several times too wide), tokens drawn for chunks, and 90 % for 95 %."""
    generator = np.random.default_rng(1)
    covered, widths = 0, []
    for _ in range(200):
        b = generator.gamma(4.0, 1.0, 60)
        interval = evaluation._ratio_interval(0.8 * b * np.exp(0.05 * generator.normal(size=60)), b)
        assert interval is not None
        covered += interval[0] <= 0.8 * np.exp(0.05**2 / 2) <= interval[1]
        widths.append(interval[1] - interval[0])
    assert 0.89 <= covered / 200 <= 0.985
    assert np.mean(widths) < 0.8 * 4 * 0.08 / np.sqrt(60)
    assert evaluation._ratio_interval(np.ones(1), np.ones(1)) is None
    assert evaluation._ratio_interval(np.ones(5), np.zeros(5)) is None


def test_paired_comparison_refuses_what_is_not_paired() -> None:
    """Catches a comparison of numbers from different texts or references."""
    a = summarize(random_scores(4, 20), 4, 42, "one text")
    with pytest.raises(UsageError, match="different tokens"):
        compare_paired(a, replace(a, tokens_sha256="another text"))
    with pytest.raises(UsageError, match="different references"):
        compare_paired(a, replace(a, reference_token_nll_nats=a.reference_token_nll_nats + 1))


# --- real runs --------------------------------------------------------------------------------------------------------


def test_a_file_against_itself(models: dict[str, Path], tokens: NDArray[np.int32]) -> None:
    """Catches state that leaks from one run to the other: identical files must be identical to the last bit."""
    quality = measure_quality(models["reference"], models["reference"], tokens, n_threads=2)
    assert (quality.mean_kld_nats.value, quality.max_kld_nats.value, quality.rms_dp_percent.value) == (0, 0, 0)
    assert (quality.same_top_percent.value, quality.perplexity_ratio.value) == (100, 1)
    assert quality.perplexity == quality.reference_perplexity


def test_quality_equals_naive_loops_over_llama_cpp_logits(models: dict[str, Path], tokens: NDArray[np.int32]) -> None:
    """Catches wrong positions: llama-perplexity scores n_ctx / 2 … n_ctx − 2, each against the token behind it."""
    rows: dict[str, list[list[float]]] = {"reference": [], "near": []}
    for name, logits in rows.items():
        with Model(models[name]) as model, Context(model, N_CTX, n_threads=1) as context:
            for chunk in tokens:
                logits += context.decode(chunk)[N_CTX // 2 : N_CTX - 1].tolist()
    targets = [int(chunk[i + 1]) for chunk in tokens for i in range(N_CTX // 2, N_CTX - 1)]
    expected = np.array(naive_scores(rows["reference"], rows["near"], targets))
    quality = measure_quality(models["near"], models["reference"], tokens, n_threads=2)
    assert quality.n_scored == len(targets) == 12 * 7
    np.testing.assert_allclose(quality.token_kld_nats.ravel(), expected[:, 2], rtol=1e-3, atol=1e-7)
    assert quality.mean_kld_nats.value == pytest.approx(expected[:, 2].mean(), rel=1e-5)
    assert quality.perplexity.value == pytest.approx(math.exp(expected[:, 0].mean()), rel=1e-5)
    assert quality.reference_perplexity.value == pytest.approx(math.exp(expected[:, 1].mean()), rel=1e-5)
    assert quality.same_top_percent.value == pytest.approx(100 * expected[:, 3].mean())


def test_worse_file_is_worse_and_progress_is_told(models: dict[str, Path], tokens: NDArray[np.int32]) -> None:
    """Catches candidate and reference in each other's place, and progress that stops before the end."""
    told: list[tuple[str, int, int]] = []
    near = measure_quality(models["near"], models["reference"], tokens, n_threads=1, progress=lambda *step: told.append(step))
    far = measure_quality(models["far"], models["reference"], tokens, n_threads=1)
    assert told == [("evaluate", i + 1, len(tokens)) for i in range(len(tokens))]
    paired = compare_paired(near, far)
    assert paired.mean_kld_ratio is not None
    assert paired.mean_kld_ratio.value < 0.5
    assert near.perplexity != near.reference_perplexity == far.reference_perplexity


def test_several_candidates_share_one_run_of_the_reference(models: dict[str, Path], tokens: NDArray[np.int32], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reference that is run once per candidate, and logits of one candidate scored as another's."""
    runs: dict[str, int] = {}
    original = evaluation._Runner.logits

    def counted(runner: evaluation._Runner, chunk: NDArray[np.int32], number: int) -> NDArray[np.float32]:
        runs[runner.path.stem] = runs.get(runner.path.stem, 0) + 1
        return original(runner, chunk, number)

    monkeypatch.setattr(evaluation._Runner, "logits", counted)
    together = measure_qualities([models["far"], models["near"]], models["reference"], tokens, n_threads=1)
    assert runs == {"reference": 12, "far": 12, "near": 12}
    assert together == [measure_quality(models[name], models["reference"], tokens, n_threads=1) for name in ("far", "near")]


# --- hostile inputs ---------------------------------------------------------------------------------------------------


def test_other_vocabulary_is_refused(models: dict[str, Path], tokens: NDArray[np.int32], tmp_path: Path) -> None:
    """Catches numbers that compare different tokens: a longer vocabulary, or one with two tokens exchanged."""
    longer = write_tiny_llama(tmp_path / "longer.gguf", tokens=[*tiny_tokens(), "f"])
    with pytest.raises(InputError, match=rf"vocabulary of .*longer\.gguf: got {N_VOCAB + 1} tokens, expected the {N_VOCAB}"):
        measure_quality(longer, models["reference"], tokens, n_threads=1)
    exchanged = write_tiny_llama(tmp_path / "exchanged.gguf", tokens=[*tiny_tokens()[:-2], "e", "d"])
    with pytest.raises(InputError, match=rf"token {N_VOCAB - 2} of .*exchanged\.gguf: got 'e', expected 'd'"):
        measure_quality(exchanged, models["reference"], tokens, n_threads=1)


def test_token_outside_the_vocabulary_is_refused(models: dict[str, Path], tokens: NDArray[np.int32]) -> None:
    """Catches an index error, or a wrong number, for chunks cut with another model's tokenizer."""
    with pytest.raises(InputError, match=rf"got 1 to {N_VOCAB}, expected 0 to {N_VOCAB - 1}"):
        measure_quality(models["near"], models["reference"], np.where(tokens == tokens.max(), N_VOCAB, tokens).astype(np.int32), n_threads=1)


def test_logits_that_are_not_finite_are_refused(models: dict[str, Path], tokens: NDArray[np.int32], tmp_path: Path) -> None:
    """Catches a NaN that quietly becomes the mean of everything."""
    broken = write_tiny_llama(tmp_path / "broken.gguf", broken=True)
    with pytest.raises(QualityError, match=r"logits of .*broken\.gguf in chunk 0"):
        measure_quality(broken, models["reference"], tokens, n_threads=1)


@pytest.mark.parametrize("shape", [(0, 16), (5, 3)])
def test_too_little_text_is_refused(models: dict[str, Path], shape: tuple[int, int]) -> None:
    """Catches a mean over nothing."""
    with pytest.raises(UsageError, match=f"got {shape[0]} chunks of {shape[1]} tokens"):
        measure_quality(models["near"], models["reference"], np.zeros(shape, np.int32), n_threads=1)


def test_missing_file_is_named(models: dict[str, Path], tokens: NDArray[np.int32], tmp_path: Path) -> None:
    """Catches a crash in llama.cpp's loader where the strict reader should have spoken first."""
    with pytest.raises(InputError, match=r"absent\.gguf"):
        measure_quality(tmp_path / "absent.gguf", models["reference"], tokens, n_threads=1)
