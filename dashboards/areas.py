"""A part of a scatter plot, as it stands in an address: a box or a lasso, in the units of its axes.

    box:x0,x1,y0,y1
    lasso:x,y;x,y;x,y

On a logarithmic axis the sides of a lasso are straight on the logarithmic scale, as they were drawn.
"""

from dataclasses import dataclass

import numpy as np

from scope.errors import InvalidInputError

__all__ = ["MAX_CORNERS", "Area"]

MAX_CORNERS = 80


@dataclass(frozen=True)
class Area:
    """Corners of a polygon."""

    corners: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, text: str) -> "Area":
        """The area of an address.

        Raises:
            InvalidInputError: it is none.
        """
        kind, _, rest = text.partition(":")
        corners: tuple[tuple[float, float], ...]
        try:
            if kind == "box":
                x0, x1, y0, y1 = (float(part) for part in rest.split(","))
                corners = ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
            elif kind == "lasso":
                pairs = [part.split(",") for part in rest.split(";")]
                corners = tuple((float(x), float(y)) for x, y in pairs)
            else:
                raise ValueError
        except ValueError:
            raise InvalidInputError(
                f"The area {text[:60]!r} of the plot cannot be read; expected box:x0,x1,y0,y1 or lasso:x,y;x,y;…"
            ) from None
        if not 3 <= len(corners) <= MAX_CORNERS or not np.isfinite(corners).all():
            raise InvalidInputError(f"An area of the plot has 3 to {MAX_CORNERS} finite corners; got {len(corners)}.")
        return cls(corners)

    def contains(self, x: np.ndarray, y: np.ndarray, log_x: bool, log_y: bool) -> np.ndarray:
        """Which points lie inside, by the even-odd rule, bool `(n,)`; x and y are on the scale of their axes (log10
        where that is logarithmic), and points that are not finite lie outside."""
        corners = np.array(self.corners)
        for column, log in enumerate((log_x, log_y)):
            if log:
                corners[:, column] = np.log10(np.maximum(corners[:, column], np.finfo(float).tiny))
        inside = np.zeros(len(x), bool)
        after = np.roll(corners, -1, axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            for (x0, y0), (x1, y1) in zip(corners, after, strict=True):
                crosses = (y0 > y) != (y1 > y)
                inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return inside & np.isfinite(x) & np.isfinite(y)
