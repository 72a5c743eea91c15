"""One progress bar for all steps of a build, whose work is counted in rows to encode.

Encoding a row takes d_in x d_sae multiplications; so the neighbours of all features cost as much as d_sae rows, and
their logit effects as much as d_vocab rows. The other steps cost shares of the rows, as measured on two cores with 32
firings a row and 4,096 features.
"""

from collections.abc import Callable

__all__ = ["STEPS", "BuildProgress"]

STEPS = ("encode", "check", "merge", "cofiring", "neighbours", "logits", "write")


class BuildProgress:
    """Tells how much of a build is done.

    Args:
        progress: told (work done, work in all).
        n_rows: rows of the index.
        d_sae: number of features.
        d_vocab: tokens whose logits are computed; 0 where none are.
    """

    def __init__(
        self, progress: Callable[[int, int | None], None] | None, n_rows: int, d_sae: int, d_vocab: int
    ) -> None:
        shares = {"encode": 1.0, "check": 0.01, "merge": 0.15, "cofiring": 0.15, "write": 0.05}
        work = {name: share * n_rows for name, share in shares.items()} | {"neighbours": d_sae, "logits": d_vocab}
        self._work = {name: work[name] for name in STEPS}
        self._total = round(sum(work.values()))
        self._progress = progress

    def __call__(self, step: str, done: float, of: float = 1.0) -> None:
        """`done` of the work `of` a step is done, and all steps before it."""
        if self._progress is None:
            return
        before = sum(self._work[name] for name in STEPS[: STEPS.index(step)])
        self._progress(min(self._total, round(before + self._work[step] * done / max(of, 1))), self._total)
