"""One generation of a model that denoises, as the page shows it: a canvas over its steps."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scope.errors import InvalidInputError, OutOfRangeError
from scope.features.denoising import generation_cells

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex

__all__ = ["POSITIONS", "Generation", "generation"]

POSITIONS = 32
"""Positions of a canvas that are shown at once."""
STRONGEST = 8


@dataclass(frozen=True)
class Generation:
    """A canvas of a generation."""

    document: int
    origin: str
    """Title and source."""
    prompt: str
    suffix: str
    """Text behind the gap, "" where the text was continued."""
    seed: str
    previous: int
    next: int
    n_documents: int
    block: int
    n_blocks: int
    length: int
    """Positions of the canvas."""
    first: int
    """The first position that is shown."""
    cells: "pd.DataFrame"
    """As `scope.features.denoising.generation_cells`, of the positions that are shown."""
    feature: int | None
    scale: float
    """The feature's maximum."""
    strongest: list[int]
    """Features of the largest summed strength on this canvas."""


def generation(
    index: "FeatureIndex", document: int | None, block: int = 0, first: int = 0, feature: int | None = None
) -> Generation:
    """Read a canvas.

    Args:
        index: of texts that were denoised.
        document: its number; None for the first.
        block: the canvas of it.
        first: a position that is shown; whole blocks of `POSITIONS` are.
        feature: whose strength colours the cells.

    Raises:
        InvalidInputError: the texts were not denoised.
        OutOfRangeError: there is no such document, canvas, position or feature.
    """
    if not index.states:
        raise InvalidInputError(
            "The texts of this index were read, not denoised, so there are no steps to show. Capture a model that "
            "denoises with scope denoise, and index that store."
        )
    numbers = index.documents["document"].tolist()
    document = int(numbers[0]) if document is None else document
    cells = generation_cells(index, document, feature)
    n_blocks = int(cells["block"].max()) + 1
    own = cells[cells["block"] == block]
    length = int(own["position"].max()) + 1 if len(own) else 0
    if not 0 <= first < length:
        raise OutOfRangeError(
            f"Document {document} has {n_blocks} canvases"
            + (f" and this one {length} positions; there is no position {first}." if length else f", none {block}.")
        )
    first = first // POSITIONS * POSITIONS
    about = index.documents[index.documents["document"] == document].iloc[0]
    extra = json.loads(about["extra"]) if about["extra"] else {}
    place = numbers.index(document)
    rows = own["row"]
    fired = index.features_in(int(rows.min()), int(rows.max()) + 1)
    sums = fired.groupby("feature")["value"].sum().sort_values(ascending=False, kind="stable")
    return Generation(
        document=document,
        origin=" · ".join(str(about[name]) for name in ("title", "source") if about[name]),
        prompt=str(extra.get("prompt", "")),
        suffix=str(extra.get("suffix", "")),
        seed=str(extra.get("seed", "")),
        previous=int(numbers[(place - 1) % len(numbers)]),
        next=int(numbers[(place + 1) % len(numbers)]),
        n_documents=len(numbers),
        block=block,
        n_blocks=n_blocks,
        length=length,
        first=first,
        cells=own[own["position"].between(first, first + POSITIONS - 1)],
        feature=feature,
        scale=0.0 if feature is None else float(np.nan_to_num(index.table["max_value"].iloc[feature])),
        strongest=[int(one) for one in sums.index[:STRONGEST]],
    )
