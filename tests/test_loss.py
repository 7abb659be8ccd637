"""loss.py: the naive softmax, the perplexity by hand, and what is scored."""

from __future__ import annotations

import numpy as np
import pytest

from loopgguf.errors import InputError
from loopgguf.loss import score_tokens, scored_targets, summarize_pass


def test_score_tokens_is_the_naive_softmax():
    """Catches slabs that are cut wrongly, and overflow with large logits."""
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((150, 11)) * 5 + 700).astype(np.float32)
    targets = rng.integers(0, 11, 150).astype(np.int32)
    p = np.exp(logits.astype(np.float64) - 700)
    naive = -np.log(p[np.arange(150), targets] / p.sum(axis=1))
    np.testing.assert_allclose(score_tokens(logits, targets), naive, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(score_tokens(logits, targets, precision=np.float32), naive, atol=5e-6)


def test_summarize_pass_by_hand():
    """Catches a standard error of the logarithm printed as one of the perplexity (imatrix.cpp: nll2 * ppl)."""
    result = summarize_pass(np.log([2.0, 8.0]))
    assert result.n_tokens == 2
    assert result.perplexity == pytest.approx(4)
    assert result.standard_error == pytest.approx(4 * np.log(2))
    with pytest.raises(InputError, match="got NaN or infinity"):
        summarize_pass(np.array([1.0, np.nan]))


def test_no_document_foretells_the_next():
    """Catches a first token that is scored, and a chunk without documents that loses one."""
    chunks = np.zeros((2, 8), np.int32)
    documents = np.array([[0, 0, 1, 1, 1, 1, 2, 2], [0] * 8], np.int32)
    assert scored_targets(chunks, documents).tolist() == [[True, False, True], [True] * 3]
    assert scored_targets(chunks, None).tolist() == [[True] * 3] * 2
