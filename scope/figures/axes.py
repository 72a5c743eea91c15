"""Ticks of logarithmic axes as numbers that one can read: 0.05, 0.1, 0.2, and no powers of ten between bare digits."""

from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["log_axis"]

STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), tuple(np.arange(1.0, 10.0).tolist()))
"""Ticks within a power of ten, from few to many."""
MOST = 6


def log_axis(values: Iterable[float], most: int = MOST) -> dict[str, Any]:
    """Plotly's properties of a logarithmic axis over some values: as many readable ticks as it holds, at most `most`.

    Values that are not positive are left out; where there are none, Plotly chooses.
    """
    given = np.asarray(list(values), float)
    given = given[np.isfinite(given) & (given > 0)]
    if not len(given):
        return {"type": "log"}
    ends = np.log10(given.min()), np.log10(given.max())
    low, high = 10 ** (ends[0] - _margin(ends)), 10 ** (ends[1] + _margin(ends))
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    chosen = np.empty(0)
    for steps in STEPS:
        ticks = np.sort(np.outer(decades, steps).reshape(-1))
        ticks = ticks[(ticks >= low) & (ticks <= high)]
        if len(ticks) > most and len(chosen):
            break
        chosen = ticks
    if len(chosen) > most:
        chosen = chosen[:: int(np.ceil(len(chosen) / most))]
    return {
        "type": "log",
        "range": [float(np.log10(low)), float(np.log10(high))],
        "tickmode": "array",
        "tickvals": chosen.tolist(),
        "ticktext": [f"{tick:,.6g}" for tick in chosen.tolist()],
    }


def _margin(ends: tuple[float, float]) -> float:
    """So that no point lies on the edge, and a single value has ticks around it."""
    return max(0.04 * (ends[1] - ends[0]), 0.02 if ends[1] - ends[0] > 0.3 else 0.2)
