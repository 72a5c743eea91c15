"""Numbers in words, on top of `scope.figures.text`: exact values, counts, shares, durations."""

import math

from scope.figures.text import one_in, short_number

__all__ = ["count", "density", "duration", "exact", "number", "percent", "plural"]

number = short_number
density = one_in


def exact(value: float) -> str:
    """All digits worth copying (float32)."""
    return f"{value:.7g}".replace("-", "−")


def count(value: int) -> str:
    """An exact whole number: 12,345."""
    return f"{int(value):,}"


def percent(share: float | None) -> str:
    """A share of one as a percentage: 12.3%, 0.05%; "–" for nothing."""
    return "–" if share is None or not math.isfinite(share) else f"{short_number(100 * share)}%"


def plural(n: int, singular: str, plural_form: str | None = None) -> str:
    """ "1 token", "12 tokens"."""
    return f"{count(n)} {singular if n == 1 else plural_form or singular + 's'}"


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
