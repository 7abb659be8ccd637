"""splits.py: the same text is found wherever its chunks begin, and other text is not taken for it."""

from __future__ import annotations

import numpy as np
import pytest

from loopgguf.calibration import default_text
from loopgguf.errors import UsageError
from loopgguf.splits import MAX_SHARED, WINDOW, refuse_shared, shared_part


def cut(tokens: np.ndarray, n_ctx: int) -> np.ndarray:
    chunks = tokens[: len(tokens) // n_ctx * n_ctx].reshape(-1, n_ctx).astype(np.int32)
    chunks[:, 0] = 1  # BOS
    return chunks


@pytest.mark.parametrize("shift", [0, 1, 37])
@pytest.mark.parametrize("n_ctx", [64, 512])
def test_the_same_text_is_found_wherever_it_is_cut(shift: int, n_ctx: int) -> None:
    """Catches a comparison of whole chunks, or one that the BOS in place of a token escapes."""
    tokens = np.random.default_rng(0).integers(0, 1000, 4096)
    assert shared_part(cut(tokens, 128), cut(tokens[shift:], n_ctx)) > 0.5
    assert shared_part(cut(tokens, 128), cut(np.random.default_rng(1).integers(0, 1000, 4096), n_ctx)) == 0


def test_order_counts() -> None:
    """Catches a hash of the words of a run, in any order."""
    run = np.arange(WINDOW + 1)
    assert shared_part(run[None, :].astype(np.int32), run[None, ::-1].astype(np.int32)) == 0


def test_sharing_is_refused_with_its_share() -> None:
    """Catches a selection on the calibration text, and the refusal of texts with a line in common."""
    ours, theirs = (cut(np.random.default_rng(seed).integers(0, 1000, 12_800), 128) for seed in (0, 1))
    mixed = np.concatenate([theirs, ours[:1]])
    assert 0 < shared_part(mixed, ours) <= MAX_SHARED
    refuse_shared(mixed, "selection text a.txt", ours, "the calibration text")
    with pytest.raises(UsageError, match=r"selection text a\.txt: 100% of it is in the calibration text too"):
        refuse_shared(ours, "selection text a.txt", ours, "the calibration text")


def test_the_texts_that_ship_share_nothing() -> None:
    """Catches an edit of a default text that takes a passage from another."""
    texts = {name: cut(np.frombuffer(default_text(name).read_bytes(), np.uint8), 512) for name in ("calibration", "selection", "heldout")}  # type: ignore[arg-type]
    for name, other in (("selection", "calibration"), ("selection", "heldout"), ("heldout", "calibration")):
        assert shared_part(texts[name], texts[other]) <= MAX_SHARED, (name, other)
