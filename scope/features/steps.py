"""One progress bar for all steps of a build, whose work is counted in rows to encode.

Encoding a row takes d_in x d_sae multiplications; so the neighbours of all features cost as much as d_sae rows, and
their logit effects as much as d_vocab rows. The other steps cost shares of the rows, as measured on two cores with 32
firings a row and 4,096 features. Several SAEs are encoded together, then finished one after the other.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

__all__ = ["STEPS", "BuildProgress", "Sizes", "Step"]

STEPS = ("check", "merge", "cofiring", "neighbours", "logits", "write")
SHARES = {"check": 0.01, "merge": 0.15, "cofiring": 0.15, "write": 0.05}


class Step(Protocol):
    """Told that `done` of the work `of` a step is done, and all steps before it."""

    def __call__(self, name: str, done: float, of: float = 1.0) -> None: ...


class Sizes(NamedTuple):
    """How much there is to do for one SAE."""

    n_rows: int
    """Rows of its index."""
    n_new: int
    """Rows that its index does not hold yet."""
    d_sae: int
    d_vocab: int
    """Tokens whose logits are computed; 0 where none are."""


class BuildProgress:
    """Tells how much of a build is done.

    Args:
        progress: told (work done, work in all).
        sizes: of each SAE.
    """

    def __init__(self, progress: Callable[[int, int | None], None] | None, sizes: Sequence[Sizes]) -> None:
        self._progress = progress
        self._encode = float(sum(size.n_new for size in sizes))
        self._works = [
            {name: share * size.n_rows for name, share in SHARES.items()}
            | {"neighbours": float(size.d_sae), "logits": float(size.d_vocab)}
            for size in sizes
        ]
        self._total = round(self._encode + sum(sum(work.values()) for work in self._works))

    def encoded(self, rows: int) -> None:
        """So many rows that were lacking are encoded, summed over the SAEs."""
        self._tell(rows)

    def of(self, number: int) -> Step:
        """What the steps of one SAE are told to."""
        work = self._works[number]
        start = self._encode + sum(sum(earlier.values()) for earlier in self._works[:number])

        def step(name: str, done: float, of: float = 1.0) -> None:
            before = sum(work[earlier] for earlier in STEPS[: STEPS.index(name)])
            self._tell(start + before + work[name] * done / max(of, 1))

        return step

    def _tell(self, done: float) -> None:
        if self._progress is not None:
            self._progress(min(self._total, round(done)), self._total)
