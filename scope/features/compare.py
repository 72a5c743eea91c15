"""`match`: which features two dictionaries share, which only one has, and which of one became several of the other.

1. Decoder rows are brought to length 1. Cosines between all rows of one and all of the other are computed block by
   block, at most `MEMORY_BYTES` of them at once, and only each row's best partner is kept, in both directions.
2. A feature of either side whose best cosine is below `threshold` is *unique* to it: of an earlier and a later
   checkpoint, a death and a birth. Two features that are each other's best, at the threshold or above, are *matched*.
3. A feature of one side that is the best partner of two or more features of the other, all at the threshold or above,
   is a *split* (Bricken et al. 2023, "Towards Monosemanticity", on feature splitting); the other way round a *merge*.
4. Where both sides have an index over the same rows of text, matched features also get the Pearson correlation of their
   firing strengths over the indexed rows, zeros included. It is exact: the indexes hold every firing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import IntegrityError, InvalidInputError, MismatchError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.saes.base import SAE

__all__ = ["THRESHOLD", "Match", "decoder_of", "firing_correlations", "match", "same_rows"]

THRESHOLD = 0.7
"""Cosine from which two decoder rows count as the same feature."""
MEMORY_BYTES = 2**27
Progress = Callable[[int, int], None]


class Match(NamedTuple):
    """How the features of `a` and `b` correspond."""

    threshold: float
    """Cosine from which two features count as the same."""
    best_a: pd.DataFrame
    """One row a feature of `a`: feature, partner (its nearest of `b`), cosine."""
    best_b: pd.DataFrame
    """One row a feature of `b`: feature, partner (its nearest of `a`), cosine."""
    correlation: dict[tuple[int, int], float] | None
    """Of the firing strengths of matched features; None where there are no indexes over the same rows."""

    @property
    def matched(self) -> pd.DataFrame:
        """Columns a, b, cosine, correlation (NaN where unknown): features that are each other's best, by cosine."""
        back = self.best_b["partner"].to_numpy()
        partner = self.best_a["partner"].to_numpy()
        mutual = (back[partner] == np.arange(len(partner))) & (self.best_a["cosine"] >= self.threshold)
        pairs = self.best_a[mutual].rename(columns={"feature": "a", "partner": "b"})
        known = self.correlation or {}
        pairs = pairs.assign(
            correlation=[known.get((a, b), np.nan) for a, b in zip(pairs["a"], pairs["b"], strict=True)]
        )
        return pairs.sort_values(["cosine", "a"], ascending=[False, True], ignore_index=True)

    @property
    def unique_a(self) -> pd.DataFrame:
        """Features of `a` that `b` has nothing like, the loneliest first: feature, partner, cosine."""
        return _unique(self.best_a, self.threshold)

    @property
    def unique_b(self) -> pd.DataFrame:
        """Features of `b` that `a` has nothing like: births, where `b` is the later checkpoint."""
        return _unique(self.best_b, self.threshold)

    @property
    def splits(self) -> pd.DataFrame:
        """Columns feature (of `a`), parts (of `b`, nearest first), cosines: one feature that is several in `b`."""
        return _families(self.best_b, self.threshold)

    @property
    def merges(self) -> pd.DataFrame:
        """Columns feature (of `b`), parts (of `a`, nearest first), cosines: several features that are one in `b`."""
        return _families(self.best_a, self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON-able."""
        matched = self.matched
        known = matched["correlation"].dropna()
        return {
            "threshold": self.threshold,
            "n_a": len(self.best_a),
            "n_b": len(self.best_b),
            "matched": len(matched),
            "unique_a": len(self.unique_a),
            "unique_b": len(self.unique_b),
            "splits": len(self.splits),
            "merges": len(self.merges),
            "mean_best_cosine_a": float(self.best_a["cosine"].mean()),
            "mean_best_cosine_b": float(self.best_b["cosine"].mean()),
            "mean_correlation": float(known.mean()) if len(known) else None,
        }


def _unique(best: pd.DataFrame, threshold: float) -> pd.DataFrame:
    return best[best["cosine"] < threshold].sort_values(["cosine", "feature"], ignore_index=True)


def _families(best: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Partners that several features have as their best; those with the most first."""
    close = best[best["cosine"] >= threshold].sort_values("cosine", ascending=False, kind="stable")
    families = close.groupby("partner").agg(parts=("feature", list), cosines=("cosine", list))
    families = families[families["parts"].map(len) > 1]
    order = np.argsort(-families["parts"].map(len).to_numpy(dtype=int), kind="stable")
    return families.iloc[order].rename_axis("feature").reset_index()


def match(
    a: "SAE | Float[Tensor, 'd_sae d_out']",
    b: "SAE | Float[Tensor, 'd_sae d_out']",
    *,
    threshold: float = THRESHOLD,
    indexes: "tuple[FeatureIndex, FeatureIndex] | None" = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Match:
    """Match the features of two dictionaries by their decoders, and by what they fire on.

    Args:
        a: a dictionary, or the rows of its decoder; the earlier one, where there is a time.
        b: another that writes the same activations.
        threshold: cosine from which two features count as the same, above 0 and at most 1.
        indexes: of `a` and of `b`, over the same text; None leaves correlations out.
        progress: called with (rows and pairs done, in all); what it raises stops the work.
        device: where the cosines are computed.

    Raises:
        MismatchError: the decoders write activations of different widths, or the indexes are of other rows or widths.
        InvalidInputError: the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise InvalidInputError(f"threshold is {threshold:g}; expected a cosine above 0 and at most 1.")
    first, second = _rows_of(a), _rows_of(b)
    if first.shape[1] != second.shape[1]:
        raise MismatchError(
            f"The decoder of the one writes {first.shape[1]:,} values and that of the other {second.shape[1]:,}; only "
            "dictionaries of the same activations can be compared."
        )
    if indexes is not None:
        _require_same_rows(indexes, (len(first), len(second)))
    report = progress or (lambda done, total: None)
    total = len(first) * (2 if indexes is not None else 1)
    best_a, best_b = _nearest(_unit(first, device), _unit(second, device), lambda done: report(done, total))
    found = Match(threshold, best_a, best_b, None)
    if indexes is None:
        return found
    pairs = found.matched
    done_before, share = len(first), len(first) / max(len(pairs), 1)
    correlation = firing_correlations(
        indexes, list(zip(pairs["a"], pairs["b"], strict=True)),
        lambda done, _: report(done_before + int(done * share), total),
    )  # fmt: skip
    return found._replace(correlation=correlation)


def _rows_of(dictionary: "SAE | Tensor") -> Tensor:
    rows = dictionary if isinstance(dictionary, Tensor) else dictionary.W_dec
    return rows.detach()


def _unit(rows: Tensor, device: torch.device | str) -> Tensor:
    rows = rows.to(device, torch.float32)
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _nearest(a: Tensor, b: Tensor, report: Callable[[int], None]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each row's best partner on the other side; ties go to the first."""
    best_a = [torch.full((len(a),), -2.0), torch.zeros(len(a), dtype=torch.int64)]
    best_b = [torch.full((len(b),), -2.0), torch.zeros(len(b), dtype=torch.int64)]
    for rows in _blocks(len(a)):
        for others in _blocks(len(b)):
            cosines = a[rows] @ b[others].T
            _keep_better(best_a, rows, cosines.max(dim=1), others.start)
            _keep_better(best_b, others, cosines.max(dim=0), rows.start)
        report(rows.stop)
    return _frame(best_a), _frame(best_b)


def _blocks(n: int) -> Iterator[slice]:
    side = int((MEMORY_BYTES / 4) ** 0.5)
    for start in range(0, n, side):
        yield slice(start, min(start + side, n))


def _keep_better(best: list[Tensor], rows: slice, found: Any, offset: int) -> None:
    values, places = found.values.cpu(), found.indices.cpu() + offset
    better = values > best[0][rows]
    best[0][rows] = torch.where(better, values, best[0][rows])
    best[1][rows] = torch.where(better, places, best[1][rows])


def _frame(best: list[Tensor]) -> pd.DataFrame:
    cosines, partners = (part.numpy() for part in best)
    return pd.DataFrame({"feature": np.arange(len(cosines)), "partner": partners, "cosine": np.clip(cosines, -1, 1)})


def firing_correlations(
    indexes: "tuple[FeatureIndex, FeatureIndex]", pairs: list[tuple[int, int]], progress: Progress | None = None
) -> dict[tuple[int, int], float]:
    """Pearson correlation of the strengths of pairs of features over the rows that both indexes cover.

    With x and y the strengths on each of the n indexed rows, 0 where a feature does not fire:
    r = (Σxy − ΣxΣy / n) / √((Σx² − (Σx)² / n)(Σy² − (Σy)² / n)). NaN where one of them never fires.
    """
    first, second = indexes
    n = first.n_indexed_rows
    found = {}
    for done, (a, b) in enumerate(pairs, start=1):
        found[a, b] = _pearson(first.firings(a), second.firings(b), n)
        if progress and (done % 64 == 0 or done == len(pairs)):
            progress(done, len(pairs))
    return found


def _pearson(a: pd.DataFrame, b: pd.DataFrame, n: int) -> float:
    x, y = a["value"].to_numpy(dtype=np.float64), b["value"].to_numpy(dtype=np.float64)
    _, of_a, of_b = np.intersect1d(a["row"].to_numpy(), b["row"].to_numpy(), assume_unique=True, return_indices=True)
    covariance = float(x[of_a] @ y[of_b]) - x.sum() * y.sum() / n
    variances = (float(x @ x) - x.sum() ** 2 / n) * (float(y @ y) - y.sum() ** 2 / n)
    return covariance / variances**0.5 if variances > 0 else float("nan")


def same_rows(a: "FeatureIndex", b: "FeatureIndex") -> bool:
    """Whether two indexes are of the same rows of the same text."""
    return (
        a.n_rows == b.n_rows
        and a.n_indexed_rows == b.n_indexed_rows
        and a.sequences[["start_row", "n_rows"]].equals(b.sequences[["start_row", "n_rows"]])
        and a.documents[["title", "n_tokens"]].equals(b.documents[["title", "n_tokens"]])
    )


def _require_same_rows(indexes: "tuple[FeatureIndex, FeatureIndex]", widths: tuple[int, int]) -> None:
    for index, width in zip(indexes, widths, strict=True):
        if index.d_sae != width:
            raise MismatchError(f"The index {index.name} has {index.d_sae:,} features; its dictionary has {width:,}.")
    if not same_rows(*indexes):
        raise MismatchError(
            f"The indexes {indexes[0].name} and {indexes[1].name} are not of the same rows of text. Index both SAEs "
            "from one store, or leave the indexes out."
        )


def decoder_of(path: str | Path) -> Tensor:
    """The decoder's rows of an SAE (anything that `scope.saes.formats.load` reads), or of a training's checkpoint.

    Raises:
        UnknownNameError, InvalidInputError, MismatchError, NonFiniteError: as `scope.saes.formats.load`.
        IntegrityError: the file cannot be read.
    """
    from scope.saes.formats import load

    file = Path(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return load(path).W_dec.detach()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            if "W_dec" not in opened.keys():  # noqa: SIM118
                raise InvalidInputError(f"{file} has no W_dec: it is no checkpoint of a training.")
            rows: Tensor = opened.get_tensor("W_dec")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"The checkpoint {file} cannot be read ({error}).") from error
    return rows
