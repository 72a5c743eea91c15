"""Verdicts on a graph's nodes and effects, from what `verify` has measured; and those measurements as a file.

Feature s set to 0 and to twice its value is predicted to change node t by p and was measured to change it by m. Over
both runs

    slope of (s, t) = Σ p m / Σ p²         it *holds* where this is from 1/2 to 2, and m has the sign of p in every run
    slope of s      = the same over all t  s *holds* where this is from 1/2 to 2 and the correlation at least 1/2

so that what holds has the sign that the graph says and its size within a factor of two. The same rule on the random
control says how many would hold by chance.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from activations.manifest import write_atomically
from scope.attribution.verification import Agreement, Verification
from scope.errors import IntegrityError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FACTOR", "LEAST_CORRELATION", "Verdicts", "load_verification", "save_verification", "verdicts"]

FACTOR = 2.0
"""What a size may be off by."""
LEAST_CORRELATION = 0.5
COLUMNS = ("source", "target", "factor", "predicted", "measured", "measured_random", "measured_frozen")


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Which features and which effects of a graph hold in the model."""

    nodes: "pd.DataFrame"
    """source (node), slope, correlation, sign_agreement, n, holds, holds_random (bool): a row for each feature that was
    tested and predicted to change anything."""
    pairs: "pd.DataFrame"
    """source, target (nodes), slope, holds, holds_random: a row for each effect that is predicted."""


def verdicts(found: Verification) -> Verdicts:
    """Whether each tested feature, and each of its effects, holds."""
    import pandas as pd

    moved = found.pairs[found.pairs["predicted"] != 0]
    nodes = []
    for source, own in moved.groupby("source"):
        expected = own["predicted"].to_numpy()
        agreement = Agreement.of(expected, own["measured"].to_numpy())
        by_chance = Agreement.of(expected, own["measured_random"].to_numpy())
        nodes.append(
            {"source": source, **agreement._asdict(), "holds": _holds(agreement), "holds_random": _holds(by_chance)}
        )
    predicted, real, random = (
        moved[name].to_numpy(dtype="float64") for name in ("predicted", "measured", "measured_random")
    )
    sums = pd.DataFrame(
        {
            "source": moved["source"].to_numpy(),
            "target": moved["target"].to_numpy(),
            "squares": predicted**2,
            "products": predicted * real,
            "random": predicted * random,
            "misses": predicted * real <= 0,
            "misses_random": predicted * random <= 0,
        }
    )
    pairs = sums.groupby(["source", "target"], as_index=False).sum()
    squares = pairs["squares"].to_numpy(dtype="float64")
    slope, control = (pairs[name].to_numpy(dtype="float64") / squares for name in ("products", "random"))
    pairs = pd.DataFrame(
        {
            "source": pairs["source"].to_numpy(),
            "target": pairs["target"].to_numpy(),
            "slope": slope,
            "holds": _in_range(slope) & (pairs["misses"].to_numpy() == 0),
            "holds_random": _in_range(control) & (pairs["misses_random"].to_numpy() == 0),
        }
    )
    columns = ["source", *Agreement._fields, "holds", "holds_random"]
    return Verdicts(pd.DataFrame(nodes, columns=columns), pairs)


def _in_range(slope: np.ndarray) -> np.ndarray:
    return (slope >= 1 / FACTOR) & (slope <= FACTOR)


def _holds(agreement: Agreement) -> bool:
    return 1 / FACTOR <= agreement.slope <= FACTOR and agreement.correlation >= LEAST_CORRELATION


def save_verification(found: Verification, path: str | Path) -> None:
    """Write what was measured as parquet; a file that was there is replaced as a whole."""
    import pandas as pd

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = pd.DataFrame(
        {
            name: found.pairs[name].to_numpy(dtype="int32" if name in ("source", "target") else "float32")
            for name in COLUMNS
        }
    )
    buffer = io.BytesIO()
    small.to_parquet(buffer, index=False)
    write_atomically(path, buffer.getvalue())


def load_verification(path: str | Path) -> Verification | None:
    """What was measured, or None where there is no such file.

    Raises:
        IntegrityError: the file cannot be read.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        return None
    try:
        pairs = pd.read_parquet(path)
        predicted = pairs["predicted"].to_numpy()
        model, random, held = (
            Agreement.of(predicted, pairs[name].to_numpy())
            for name in ("measured", "measured_random", "measured_frozen")
        )
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"{path} is no readable verification ({error}). Delete it and verify again.") from error
    return Verification(model, random, held, pairs)
