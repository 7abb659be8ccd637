"""Three texts, three uses: what calibrates a file, what it is selected on, what is reported of it. None may hold another.

Texts are compared by their content, as token ids, wherever a chunk happens to begin: names and paths mean nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from loopgguf.errors import UsageError

Tokens = NDArray[np.int32]

WINDOW = 24  # tokens in a row that two texts hardly have in common by chance
MAX_SHARED = 0.01  # of a text's windows: a licence line or an import may be in both


def tokens_sha256(tokens: Tokens) -> str:
    """Return the SHA-256 of token ids, chunk after chunk."""
    return hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()


def window_hashes(tokens: Tokens) -> NDArray[np.uint64]:
    """Return a hash of every run of WINDOW tokens inside the chunks (n_chunks, n_ctx); those with a chunk's first, maybe BOS, apart."""
    runs = np.lib.stride_tricks.sliding_window_view(tokens[:, 1:].astype(np.uint64) + np.uint64(1), min(WINDOW, tokens.shape[1] - 1), axis=1)
    powers = np.cumprod(np.full(runs.shape[-1], 0x9E3779B97F4A7C15, np.uint64))  # modulo 2⁶⁴, odd: no token is lost
    return np.unique((runs * powers).sum(axis=-1, dtype=np.uint64))


def shared_part(tokens: Tokens, others: Tokens) -> float:
    """Return which part of the runs of tokens of one text is in the other too."""
    ours = window_hashes(tokens)
    return float(np.isin(ours, window_hashes(others)).mean())


def refuse_shared(tokens: Tokens, what: str, others: Tokens, other_use: str) -> None:
    """Raise UsageError when a text (called `what`) has more than MAX_SHARED of its content in common with one of another use."""
    part = shared_part(tokens, others)
    if part > MAX_SHARED:
        raise UsageError(
            f"{what}: {part:.0%} of it is in {other_use} too, expected a text of its own: a file chosen on what it was made from, or is judged by, "
            "looks better than it is. Give another text"
        )
