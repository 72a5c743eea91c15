"""The statistics that the feature browser can show, sort by and plot: what each is called, on which scale it is drawn,
which definition explains it."""

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["COLUMNS", "CONTRAST_COLUMNS", "DEFAULT_COLUMNS", "UMAP", "Column", "available", "sortable"]

Kind = Literal["number", "share", "density", "count", "text"]


@dataclass(frozen=True)
class Column:
    """One statistic of a feature: a column of `FeatureIndex.table`, or derived from it."""

    name: str
    title: str
    """In the head of the grid and on an axis."""
    kind: Kind = "number"
    unit: str = ""
    log: bool = False
    """Whether it is drawn on a logarithmic axis: values over several powers of ten, none negative."""
    term: str = ""
    """Key of its definition in the glossary."""
    source: str = ""
    """The column of the table that it is taken from, where that has another name."""

    @property
    def axis(self) -> str:
        """What an axis is called."""
        notes = [note for note in (self.unit, "log scale" if self.log else "") if note]
        return f"{self.title} ({', '.join(notes)})" if notes else self.title

    def on(self, index: "FeatureIndex") -> bool:
        """Whether an index knows it."""
        if self.name in UMAP:
            return umap_of(index) is not None
        return (self.source or self.name) in index.table

    def values(self, index: "FeatureIndex") -> np.ndarray:
        """One value per feature `(d_sae,)`: float64, or text as objects. Missing is NaN, or None."""
        if not self.on(index):
            return np.full(index.d_sae, np.nan)
        if self.name in UMAP:
            frame = umap_of(index)
            values = np.full(index.d_sae, np.nan)
            values[frame["feature"].to_numpy(np.int64)] = frame[self.name].to_numpy(float)
            return values
        column = index.table[self.source or self.name]
        if self.source:
            return np.array([cell[0] if len(cell) else np.nan for cell in column], float)
        return column.to_numpy(object) if self.kind == "text" else column.to_numpy(float)

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Values on the scale of an axis; what a logarithmic axis cannot show is NaN."""
        if not self.log:
            return values
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(values > 0, np.log10(values), np.nan)

    def cell(self, row: Mapping[str, Any]) -> Any:
        """The value in one row of the table, JSON-able."""
        value = row[self.source or self.name]
        if self.source:
            value = value[0] if len(value) else None
        if self.kind == "text":
            return str(value or "")
        return float(value) if value is not None and np.isfinite(value) else None


UMAP = ("umap_x", "umap_y")
_ALL = (
    Column("feature", "Feature", "count"),
    Column("density", "Density", "density", "share of tokens", log=True, term="density"),
    Column("n_firings", "Firings", "count", "tokens", log=True, term="firings"),
    Column("max_value", "Max", unit="strength", log=True, term="max"),
    Column("mean_value", "Mean", unit="strength", log=True, term="mean"),
    Column("std_value", "Spread", unit="standard deviation of strength", log=True, term="std_value"),
    Column("q50", "Median", unit="strength", log=True, term="quantiles"),
    Column("q90", "90% quantile", unit="strength", log=True, term="quantiles"),
    Column("q99", "99% quantile", unit="strength", log=True, term="quantiles"),
    Column("top_token", "Top token", "text", term="top_token"),
    Column("top_token_share", "Top token's share", "share", term="token_share"),
    Column("token_entropy", "Token entropy", unit="bits", term="token_entropy"),
    Column("token_bits", "Token dependence", unit="bits", term="token_bits"),
    Column("position_bits", "Position dependence", unit="bits", term="position_bits"),
    Column("mean_position", "Mean position", unit="tokens from the window's start", term="mean_position"),
    Column("special_share", "Special tokens' share", "share", term="special_share"),
    Column("top_language", "Language", "text", term="top_language"),
    Column("language_entropy", "Language entropy", unit="bits", term="language_entropy"),
    Column("language_specific", "Specific to", "text", term="language_specific"),
    Column("top_source", "Source", "text", term="top_source"),
    Column("source_entropy", "Source entropy", unit="bits", term="source_entropy"),
    Column("top_role", "Role", "text", term="top_role"),
    Column("role_entropy", "Role entropy", unit="bits", term="role_entropy"),
    Column("top_kind", "Content", "text", term="top_kind"),
    Column("kind_entropy", "Content entropy", unit="bits", term="kind_entropy"),
    Column("text_rate", "Rate on text", "density", "share of text tokens", log=True, term="modality_rate"),
    Column("image_rate", "Rate on images", "density", "share of image tokens", log=True, term="modality_rate"),
    Column("audio_rate", "Rate on sounds", "density", "share of sound tokens", log=True, term="modality_rate"),
    Column("encoder_decoder_cosine", "Encoder–decoder cosine", term="encoder_decoder_cosine"),
    Column("nearest_cosine", "Nearest decoder", unit="cosine", term="neighbours", source="neighbour_cosines"),
    Column("umap_x", "UMAP 1", term="umap"),
    Column("umap_y", "UMAP 2", term="umap"),
)
COLUMNS: dict[str, Column] = {column.name: column for column in _ALL}
CONTRAST_COLUMNS = ("rate_a", "rate_a_low", "rate_a_high", "rate_b", "rate_b_low", "rate_b_high", "log_ratio", "z")
"""What `FeatureIndex.contrast` says of a feature."""
DEFAULT_COLUMNS = ("density", "max_value", "top_language")
"""Shown where the address does not say which, beside the feature, what it fires on, its histogram and its logits."""


def available(index: "FeatureIndex", *, numbers: bool = False) -> list[Column]:
    """The columns that an index knows; `numbers`: only those that can be an axis."""
    return [column for column in _ALL if column.on(index) and not (numbers and column.kind == "text")]


@cache
def _names() -> frozenset[str]:
    return frozenset({*COLUMNS, *CONTRAST_COLUMNS, "label", "starred"})


def sortable(name: str, known: Mapping[str, Column] | None = None) -> bool:
    """Whether the grid can be sorted by a column."""
    return name in (_names() if known is None else known)


_maps: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def umap_of(index: "FeatureIndex") -> Any:
    """The UMAP of an index's decoder, None where none was made; read once."""
    with _lock:
        if index not in _maps:
            _maps[index] = index.umap() if hasattr(index, "umap") else None
        return _maps[index]
