"""How far a piece of work is: what every long function tells its caller, and what a pass over text says of itself.

A callback takes (phase, done, total); it shows, and must not decide anything. Prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]


class Meter:
    """Tells a callback of a pass over `n_tokens` tokens in `n_steps` steps; the phase carries the tokens per second.

    Where a pass goes layer by layer, a step is its share of the tokens, so that the speed is that of the whole pass.
    """

    def __init__(self, progress: Progress | None, phase: str, n_tokens: int, n_steps: int) -> None:
        self.progress, self.phase, self.n_tokens, self.n_steps = progress, phase, n_tokens, n_steps
        self.n_done = self.n_skipped = 0
        self._start = time.perf_counter()

    def reach(self, n_done: int) -> None:
        """Say that `n_done` steps are done by now: those not counted yet an earlier run did, and they are no part of the speed."""
        self.n_skipped += n_done - self.n_done
        self.n_done = n_done

    def step(self, n: int = 1, perplexity: float | None = None) -> None:
        """Tell of `n` more steps, and of the perplexity of the text so far where it is known."""
        self.n_done += n
        if self.progress is None:
            return
        seconds = max(time.perf_counter() - self._start, 1e-9)
        speed = self.n_tokens * (self.n_done - self.n_skipped) / self.n_steps / seconds
        known = "" if perplexity is None else f", perplexity {perplexity:.4g}"
        self.progress(f"{self.phase}: {speed:,.0f} tok/s{known}", self.n_done, self.n_steps)
