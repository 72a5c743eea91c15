"""`FeatureIndex`: reads what `scope.features.build` wrote. Needs neither the store, the model nor torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from scope.features.examples import Examples
    from scope.features.feature import Feature

__all__ = ["FeatureIndex", "IndexFault", "QueryResult"]


class QueryResult(NamedTuple):
    """A slice of the feature table."""

    rows: "pd.DataFrame"
    """The rows from `start` to `stop` of what was asked for, in its order."""
    total: int
    """Rows that match, in all."""


class IndexFault(NamedTuple):
    """Something in an index that is not what its ledger says."""

    object: str
    """Path inside the index."""
    problem: str


class FeatureIndex:
    """Every firing of one SAE over one text. Safe to read from several threads at once.

    A firing's value is feature activation x ||W_dec row||, in the model's own units, rounded to bfloat16. BOS and
    other special tokens are rows of the index but have no firings.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "FeatureIndex":
        """Open an index.

        Raises:
            UnknownNameError: there is no index at `path`.
            InvalidInputError: it is something else, newer than this release, or not built to the end.
            IntegrityError: a file is missing or is not what the ledger says.
        """
        raise NotImplementedError

    # --- what it is -------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """First 12 digits of the fingerprint."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The folder's name without `.index`."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        raise NotImplementedError

    @property
    def hook_name(self) -> str:
        raise NotImplementedError

    @property
    def d_sae(self) -> int:
        raise NotImplementedError

    @property
    def n_rows(self) -> int:
        """Rows (tokens) of the index, BOS and special tokens included."""
        raise NotImplementedError

    @property
    def n_indexed_rows(self) -> int:
        """Rows on which features can fire: neither BOS nor special. The denominator of every density."""
        raise NotImplementedError

    @property
    def n_firings(self) -> int:
        raise NotImplementedError

    @property
    def sae_info(self) -> dict[str, Any]:
        """Of the SAE: fingerprint, architecture, d_in, d_sae, hook_name, k, path as it was built from."""
        raise NotImplementedError

    @property
    def model_info(self) -> dict[str, Any]:
        """Of the model: name as it is shown, revision, weight_hash, tokenizer_hash, context_size."""
        raise NotImplementedError

    @property
    def metrics(self) -> dict[str, float]:
        """What the caller of `build_index` passed in: fvu, l0, delta_ce and the like."""
        raise NotImplementedError

    @property
    def table(self) -> "pd.DataFrame":
        """One row per feature, indexed by the feature's id. Shared: copy before changing it. Columns:

        feature, n_firings, density (firings per indexed row), density_low, density_high (Wilson, 95%), max_value,
        mean_value, std_value, q50, q90, q99 (over firings), mean_position, top_token, top_token_share (of the
        feature's summed strength), token_entropy (bits, over firings), top_tokens, top_token_means,
        top_token_counts (lists, by summed strength), top_logits, top_logit_effects, bottom_logits,
        bottom_logit_effects (lists; logit per unit of firing strength), neighbours, neighbour_cosines (lists, by
        decoder cosine), encoder_decoder_cosine, top_language, language_entropy, top_source, source_entropy (bits,
        over rates), dead, over_dense.
        """
        raise NotImplementedError

    @property
    def documents(self) -> "pd.DataFrame":
        """document, title, source, language, license, n_tokens, held_out."""
        raise NotImplementedError

    @property
    def sequences(self) -> "pd.DataFrame":
        """sequence, document, start_row, n_rows, document_offset."""
        raise NotImplementedError

    @property
    def languages(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def sources(self) -> tuple[str, ...]:
        raise NotImplementedError

    def info(self) -> dict[str, Any]:
        """What `scope info` prints; JSON-able."""
        raise NotImplementedError

    # --- one feature ------------------------------------------------------------------------------------------

    def feature(self, feature: int) -> "Feature":
        raise NotImplementedError

    def firings(self, feature: int, start: int = 0, stop: int | None = None) -> "pd.DataFrame":
        """Columns row, value: the feature's firings from rank `start` to `stop`, the strongest first."""
        raise NotImplementedError

    def histogram(self, feature: int) -> "tuple[np.ndarray, np.ndarray]":
        """`(edges (n_bins + 1,), counts (n_bins,))`: all firings in linear bins from 0 to the feature's maximum."""
        raise NotImplementedError

    def top_examples(
        self,
        feature: int,
        n: int = 20,
        window: tuple[int, int] = (24, 12),
        *,
        distinct: bool = True,
        per_sequence: int = 2,
    ) -> "Examples":
        """The strongest firings with their context.

        Args:
            n: how many, at most.
            window: tokens before and after the firing's own.
            distinct: leave out a firing whose last tokens up to its own equal those of a stronger one.
            per_sequence: at most so many from one window of the text.
        """
        raise NotImplementedError

    def quantile_examples(
        self, feature: int, low: float, high: float, n: int = 10, seed: int = 0, window: tuple[int, int] = (24, 12)
    ) -> "Examples":
        """`n` firings drawn at random between two quantiles of the feature's strength (0 weakest, 1 strongest)."""
        raise NotImplementedError

    def random_examples(
        self, feature: int, n: int = 10, seed: int = 0, window: tuple[int, int] = (24, 12)
    ) -> "Examples":
        raise NotImplementedError

    def examples_in(
        self,
        feature: int,
        n: int = 10,
        *,
        language: str | None = None,
        source: str | None = None,
        window: tuple[int, int] = (24, 12),
        distinct: bool = True,
        per_sequence: int = 2,
    ) -> "Examples":
        """The strongest firings within one language, one source, or both."""
        raise NotImplementedError

    def neighbours(self, feature: int, n: int = 20) -> "pd.DataFrame":
        """Columns feature, cosine, top_token, density: nearest decoder rows, the nearest first (20 are stored)."""
        raise NotImplementedError

    def cofiring(self, feature: int, n: int = 20) -> "pd.DataFrame":
        """Columns feature, n_both, jaccard, pmi (bits), p_other_given_this, p_this_given_other, top_token, density:
        features that fire on the same rows, by Jaccard (64 are stored)."""
        raise NotImplementedError

    def top_tokens(self, feature: int, n: int = 20) -> "pd.DataFrame":
        """Columns token, token_id, mean_value, count, share (of the feature's summed strength), rate (of the
        token's own rows): by summed strength."""
        raise NotImplementedError

    def top_logits(self, feature: int, n: int = 20) -> "pd.DataFrame":
        """Columns token, effect: logit per unit of firing strength, the largest first."""
        raise NotImplementedError

    def bottom_logits(self, feature: int, n: int = 20) -> "pd.DataFrame":
        """Columns token, effect: the most negative first."""
        raise NotImplementedError

    def by_language(self, feature: int) -> "pd.DataFrame":
        """Columns language, n_firings, share (of the feature's firings), n_rows, rate (firings per indexed row of
        that language), rate_low, rate_high (Wilson, 95%), mean_value: every language, by rate."""
        raise NotImplementedError

    def by_source(self, feature: int) -> "pd.DataFrame":
        """As `by_language`, with `source` as its first column."""
        raise NotImplementedError

    # --- one place of the text --------------------------------------------------------------------------------

    def features_at(self, row: int) -> "pd.DataFrame":
        """Columns feature, value, rank: what fires on one row, the strongest first."""
        raise NotImplementedError

    def features_in(self, start: int, stop: int) -> "pd.DataFrame":
        """Columns row, feature, value: what fires on rows `start` to `stop`."""
        raise NotImplementedError

    def values_on(self, feature: int, start: int, stop: int) -> "np.ndarray":
        """float32 `(stop - start,)`: one feature's strength on each of the rows, 0 where it does not fire."""
        raise NotImplementedError

    def tokens(self, start: int, stop: int) -> "pd.DataFrame":
        """Columns row, token (display string), token_id, sequence, position, flags."""
        raise NotImplementedError

    def document_rows(self, document: int) -> "np.ndarray":
        """Row ids of a document's tokens, int64, without BOS."""
        raise NotImplementedError

    def document_tokens(self, document: int) -> "pd.DataFrame":
        """As `tokens`, for the rows of one document."""
        raise NotImplementedError

    def document_text(self, document: int) -> str:
        raise NotImplementedError

    # --- over features ----------------------------------------------------------------------------------------

    def query(
        self,
        sort: Sequence[tuple[str, bool]] = (),
        filters: Mapping[str, Any] | None = None,
        text: str | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> QueryResult:
        """A slice of the feature table, sorted and filtered.

        Args:
            sort: (column, ascending) pairs, the most important first; ties stay in feature order.
            filters: per column an AG Grid filter model (`{"filterType": "number", "type": "greaterThan",
                "filter": 3}`, with `operator` and `conditions`, text, boolean and set filters too), or shorter: a
                value, a list of values, or a `(low, high)` tuple with None for an open end.
            text: keep features with this in a top token, a top or bottom logit token or the label, or whose id it
                is; case is ignored.
        Raises:
            UnknownNameError: a column that does not exist.
            InvalidInputError: a filter that cannot be read.
        """
        raise NotImplementedError

    def to_pandas(self) -> "pd.DataFrame":
        """A copy of `table`."""
        raise NotImplementedError

    def activations(self, features: Sequence[int], limit_per_feature: int | None = None) -> "pd.DataFrame":
        """Columns feature, row, value, token, position, document, title, source, language: firings of some
        features, the strongest first within each."""
        raise NotImplementedError

    def verify(self, progress: Callable[[int, int | None], None] | None = None) -> list[IndexFault]:
        """Read every byte and compare with the ledger; `progress` counts bytes."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        raise NotImplementedError


FilterType = Literal["number", "text", "set", "boolean"]
