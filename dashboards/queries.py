"""What the pages show of features, as plain objects: an index and a request go in, dataclasses and rows come out.

The pages ask an index for little themselves; what they show is in this module, so that a page's cost can be read here.
All of it is read from disk or memory maps; nothing here runs a model (see `dashboards.prompts`), nothing knows Dash.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.examples import Example
    from scope.features.index import FeatureIndex

__all__ = [
    "BANDS",
    "SORTABLE",
    "ExampleGroup",
    "ExampleRequest",
    "FeatureFilter",
    "FeatureSummary",
    "TokenDetail",
    "examples",
    "feature_id",
    "feature_name",
    "feature_rows",
    "parse_sort",
    "records",
    "summary",
    "table_row",
    "token_detail",
    "tokens_label",
]

SORTABLE = ("feature", "density", "max_value", "mean_value", "top_token", "top_language", "token_entropy")
"""Columns that the browser's grid sorts by."""
SHOWS: dict[str, dict[str, Any]] = {
    "all": {},
    "alive": {"dead": False},
    "dead": {"dead": True},
    "over-dense": {"over_dense": True},
}
BANDS = ((0.9, 1.0), (0.75, 0.9), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))
"""Quantile bands of a feature's firings, the strongest first."""
PER_BAND = 4
MAX_EXAMPLES = 100
SPARK_BINS = 24


# --- the feature browser --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureFilter:
    """Which features the browser shows."""

    text: str = ""
    show: str = "all"
    """A key of `SHOWS`."""
    language: str = ""
    source: str = ""


def parse_sort(text: str) -> list[tuple[str, bool]]:
    """ "density:desc" as (column, ascending) pairs; what cannot be sorted by is left out."""
    pairs = []
    for part in filter(None, text.split(",")):
        column, _, direction = part.partition(":")
        if column in SORTABLE:
            pairs.append((column, direction != "desc"))
    return pairs


def feature_rows(
    index: "FeatureIndex", wanted: FeatureFilter, sort: Sequence[tuple[str, bool]], start: int, stop: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows `start` to `stop` of the browser's grid, JSON-able, and how many match in all."""
    filters = dict(SHOWS.get(wanted.show, {}))
    if wanted.language:
        filters["top_language"] = wanted.language
    if wanted.source:
        filters["top_source"] = wanted.source
    result = index.query(sort=list(sort), filters=filters, text=wanted.text.strip() or None, start=start, stop=stop)
    return [_grid_row(index, row) for row in records(result.rows)], int(result.total)


def _grid_row(index: "FeatureIndex", row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "feature": int(row["feature"]),
        "label": str(row.get("label") or ""),
        "tokens": [str(token) for token in row["top_tokens"]][:6],
        "logits": [str(token) for token in row["top_logits"]][:4],
        "density": float(row["density"]),
        "max_value": float(row["max_value"]),
        "mean_value": float(row["mean_value"]),
        "top_language": str(row["top_language"] or ""),
        "dead": bool(row["dead"]),
        "over_dense": bool(row["over_dense"]),
        "spark": spark(index.histogram(int(row["feature"]))[1]) if not row["dead"] else [],
    }


def records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    """The rows of a frame, by column name."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def table_row(index: "FeatureIndex", feature: int) -> dict[str, Any]:
    """One feature's row of `FeatureIndex.table`."""
    return {str(name): value for name, value in index.table.iloc[feature].items()}


def spark(counts: np.ndarray) -> list[float]:
    """Heights from 0 to 1 of a small histogram, on a logarithmic scale (a single firing is still seen)."""
    merged = np.array([part.sum() for part in np.array_split(np.asarray(counts, dtype=np.int64), SPARK_BINS)])
    heights = np.log1p(merged)
    largest = heights.max(initial=0)
    return [round(float(h), 3) for h in heights / largest] if largest > 0 else []


# --- one feature ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureSummary:
    """Everything about one feature but its examples."""

    id: int
    row: Mapping[str, Any]
    """Its row of `FeatureIndex.table`."""
    edges: np.ndarray
    counts: np.ndarray
    top_tokens: "pd.DataFrame"
    top_logits: "pd.DataFrame"
    bottom_logits: "pd.DataFrame"
    neighbours: "pd.DataFrame"
    cofiring: "pd.DataFrame"
    by_language: "pd.DataFrame"
    by_source: "pd.DataFrame"
    previous: int
    next: int
    random: int
    """Another feature that fires, drawn anew each time."""

    @property
    def fires(self) -> bool:
        """Whether there is anything to see."""
        return int(self.row["n_firings"]) > 0


def feature_id(index: "FeatureIndex", text: str) -> int:
    """A feature id as it stands in an address.

    Raises:
        OutOfRangeError: it is not a whole number from 0 to d_sae - 1.
    """
    if not (text.isascii() and text.isdigit() and int(text) < index.d_sae):
        raise OutOfRangeError(
            f"There is no feature {text!r} in this index. Its features are numbered 0 to {index.d_sae - 1:,}."
        )
    return int(text)


def summary(index: "FeatureIndex", feature: int) -> FeatureSummary:
    """Read everything about a feature but its examples."""
    edges, counts = index.histogram(feature)
    alive = index.table.loc[~index.table["dead"], "feature"].to_numpy()
    others = alive[alive != feature]
    return FeatureSummary(
        id=feature,
        row=table_row(index, feature),
        edges=edges,
        counts=counts,
        top_tokens=index.top_tokens(feature, 8),
        top_logits=index.top_logits(feature, 10),
        bottom_logits=index.bottom_logits(feature, 10),
        neighbours=index.neighbours(feature, 8),
        cofiring=index.cofiring(feature, 8),
        by_language=index.by_language(feature),
        by_source=index.by_source(feature),
        previous=(feature - 1) % index.d_sae,
        next=(feature + 1) % index.d_sae,
        random=int(np.random.default_rng().choice(others)) if len(others) else feature,
    )


def tokens_label(row: Mapping[str, Any], n: int = 4) -> str:
    """A name for a feature that has none: its top tokens, "told · asked · said"."""
    tokens = dict.fromkeys(" ".join(str(token).split()) for token in row["top_tokens"])
    return " · ".join([token for token in tokens if token][:n])


def feature_name(row: Mapping[str, Any], n: int = 4) -> str:
    """The feature's label, or its top tokens where it has none."""
    return str(row.get("label") or "") or tokens_label(row, n)


@dataclass(frozen=True)
class ExampleRequest:
    """Which examples of a feature to show."""

    show: str = "top"
    """ "top", "quantiles", "random", or "band" (the firings of one bar of the histogram)."""
    language: str = ""
    source: str = ""
    n: int = 20
    seed: int = 0
    low: float = 0.0
    high: float = 1.0
    """Quantiles that bound a "band"."""


@dataclass(frozen=True)
class ExampleGroup:
    """Examples under one heading."""

    title: str
    examples: "tuple[Example, ...]" = field(default=())


def examples(index: "FeatureIndex", feature: int, wanted: ExampleRequest) -> list[ExampleGroup]:
    """Examples of a feature, grouped under headings; a heading is empty where there is one group only.

    Raises:
        InvalidInputError: the address asks for something that does not exist.
    """
    n = min(max(wanted.n, 1), MAX_EXAMPLES)
    if wanted.language or wanted.source:
        _check_known("language", wanted.language, index.languages)
        _check_known("source", wanted.source, index.sources)
        found = index.examples_in(feature, n, language=wanted.language or None, source=wanted.source or None)
        return [ExampleGroup("", tuple(found))]
    if wanted.show == "top":
        return [ExampleGroup("", tuple(index.top_examples(feature, n)))]
    if wanted.show == "random":
        return [ExampleGroup("", tuple(index.random_examples(feature, n, seed=wanted.seed)))]
    if wanted.show == "band":
        found = index.quantile_examples(feature, wanted.low, wanted.high, n, seed=wanted.seed)
        return [ExampleGroup(f"Quantiles {wanted.low:.3g} to {wanted.high:.3g}", tuple(found))]
    if wanted.show == "quantiles":
        groups = [
            ExampleGroup(
                _band_title(low, high),
                tuple(index.quantile_examples(feature, low, high, PER_BAND, seed=wanted.seed)),
            )
            for low, high in BANDS
        ]
        return [group for group in groups if group.examples]
    raise InvalidInputError(f"Examples can be shown by top, quantiles, random or band, not {wanted.show!r}.")


def band_of_bin(counts: np.ndarray, bin: int) -> tuple[float, float]:
    """The quantiles (0 weakest, 1 strongest) between which the firings of one bar of a histogram lie."""
    total = int(counts.sum())
    if total == 0 or not 0 <= bin < len(counts):
        raise OutOfRangeError(f"The histogram has no bar {bin}.")
    below = int(counts[:bin].sum())
    return below / total, (below + int(counts[bin])) / total


def _band_title(low: float, high: float) -> str:
    if high == 1.0:
        return f"Strongest {round(100 * (1 - low))}% of firings"
    if low == 0.0:
        return f"Weakest {round(100 * high)}% of firings"
    return f"Between quantiles {low:g} and {high:g}"


def _check_known(kind: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name and name not in known:
        raise UnknownNameError(kind, name, known)


@dataclass(frozen=True)
class TokenDetail:
    """What fires on one row of the text, for the token that someone points at."""

    row: int
    n_features: int
    features: list[dict[str, Any]]
    """feature, value, rank (from 1), label: the strongest first."""


def token_detail(index: "FeatureIndex", row: int, n: int = 8, feature: int | None = None) -> TokenDetail:
    """The `n` strongest features on one row, and `feature` too where it fires there, whatever its rank."""
    found = index.features_at(row)
    shown = found.head(n)
    if feature is not None and feature not in set(shown["feature"]):
        shown = _concat(shown, found[found["feature"] == feature])
    rank_of = {int(id): place for place, id in enumerate(found["feature"], start=1)}
    rows = [
        {
            "feature": int(id),
            "value": float(value),
            "rank": rank_of[int(id)],
            "label": feature_name(table_row(index, int(id)), 3),
        }
        for id, value in zip(shown["feature"], shown["value"], strict=True)
    ]
    return TokenDetail(row, len(found), rows)


def _concat(first: "pd.DataFrame", second: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    return pd.concat([first, second])
