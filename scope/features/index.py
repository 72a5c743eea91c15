"""`FeatureIndex`: reads what `scope.features.build` wrote. Needs neither the store, the model nor torch."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scope.errors import OutOfRangeError
from scope.features import description, lookup, media, occurrences, parallel, profile, text_rows
from scope.features.conditions import Condition
from scope.features.contrast import Contrast, contrast, count_condition
from scope.features.described import Described
from scope.features.examples import Examples, choose, ranked_firings, sample_band, show
from scope.features.feature import Feature
from scope.features.grid import FeatureGrid, QueryResult
from scope.features.labels import FeatureLabels
from scope.features.media import MediumValues
from scope.features.reader import IndexFault, IndexReader
from scope.features.within import rows_within

__all__ = ["FeatureIndex", "IndexFault", "QueryResult"]


KEPT_COUNTS = 32
"""Conditions whose counts are kept for the next question, one number per feature each."""
KEPT_COMPARISONS = 2


class FeatureIndex(Described):
    """Every firing of one SAE over one text. Safe to read from several threads at once.

    A firing's value is feature activation x ||W_dec row||, in the model's own units, rounded to bfloat16. BOS and
    other special tokens are rows of the index but have no firings.
    """

    SUFFIX = ".index"

    def __init__(self, path: Path, labels: FeatureLabels | None = None) -> None:
        self.path = path
        self._reader = IndexReader(path)
        self.manifest: dict[str, Any] = self._reader.manifest
        self.labels = labels or FeatureLabels(self.sae_info["fingerprint"], d_sae=self.d_sae)
        """What people call its features. In memory where the index was opened without a workspace."""
        self._count = lru_cache(KEPT_COUNTS)(partial(count_condition, self._reader))
        self._titles = lru_cache(KEPT_COMPARISONS)(partial(parallel.count_titles, self._reader))

    @classmethod
    def open(cls, path: str | Path, labels: FeatureLabels | None = None) -> "FeatureIndex":
        """Open an index.

        Args:
            path: the index's folder.
            labels: of its SAE. `Workspace.index` passes the workspace's own; without, they are kept in memory only.
        Raises:
            UnknownNameError: there is no index at `path`.
            InvalidInputError: it is something else, newer than this release, or not built to the end.
            IntegrityError: a file is missing or is not what the ledger says.
        """
        return cls(Path(path), labels)

    # --- what it is -------------------------------------------------------------------------------------------

    @property
    def d_sae(self) -> int:
        return self._reader.d_sae

    @property
    def n_rows(self) -> int:
        """Rows (tokens) of the index, BOS and special tokens included."""
        return self._reader.n_rows

    @property
    def metrics(self) -> dict[str, Any]:
        """What the caller of `build_index` passed in: fvu, l0, delta_ce and the like."""
        return dict(self.manifest["metrics"])

    @property
    def table(self) -> pd.DataFrame:
        """One row per feature, indexed by the feature's id. Shared between callers: copy before changing it.

        feature, n_firings
        density, density_low, density_high: firings per indexed row, with its 95% interval (Wilson).
        min_value, max_value (0 where it never fires), mean_value, std_value, q50, q90, q99: strengths of firings.
        mean_position: place in the window, BOS being 0.
        top_token, top_token_share: the token with the most summed strength, and its share of all.
        position_bits, token_bits: how far the places and tokens that it fires on depart from those of all rows.
        special_share: share of its summed strength that lies on BOS and special tokens, which are left out elsewhere.
        token_entropy: bits, of firings over tokens.
        mean_top_tokens, mean_top_values: lists, by mean strength, of tokens that it fires on five times or more.
        top_tokens, top_token_means, top_token_counts: lists, by summed strength.
        top_logits, top_logit_effects, bottom_logits, bottom_logit_effects: lists; logit per unit of strength.
        neighbours, neighbour_cosines: lists, the nearest decoder rows.
        encoder_decoder_cosine
        top_language, top_source: where its rate is highest, by the lower end of the rate's interval.
        language_entropy, source_entropy: bits, of rates (not counts) over groups.
        language_neutral (bool), language_specific (the language, or ""): see `scope.features.languages`.
        top_role, role_entropy, top_kind, kind_entropy: of chats, the same over roles and kinds of content.
        text_rate, image_rate, audio_rate: firings per indexed row of each modality, where the text has media.
        dead (no firing), over_dense (density above 0.1)
        """
        return self._table

    @property
    def n_bytes(self) -> int:
        """Size on disk, without the manifest."""
        return self._reader.n_bytes

    @property
    def array_dtypes(self) -> dict[str, str]:
        """dtype of each flat array on disk."""
        return {name: str(described["dtype"]) for name, described in self.manifest["arrays"].items()}

    @cached_property
    def documents(self) -> pd.DataFrame:
        """document, title, source, language, license, n_tokens, held_out."""
        return self._reader.table("documents")

    @cached_property
    def sequences(self) -> pd.DataFrame:
        """sequence, document, start_row, n_rows, document_offset."""
        return self._reader.table("sequences")

    @property
    def vocabulary(self) -> pd.DataFrame:
        """token_id, text, special, n_rows (indexed rows that hold it): the tokens of this text, and those that logit
        effects name. Shared between callers."""
        return self._reader.vocabulary.table

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.manifest["languages"])

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.manifest["sources"])

    @property
    def roles(self) -> tuple[str, ...]:
        """Whose turns there are, where the text is chats; none of plain text."""
        return tuple(name for name, _ in self.manifest.get("roles", ()))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of content that there are, likewise: `activations.chats.CONTENT_KINDS`."""
        return tuple(name for name, _ in self.manifest.get("kinds", ()))

    @property
    def states(self) -> tuple[str, ...]:
        """The states of tokens that there are, where the text was denoised: `activations.denoising.STATES`."""
        return tuple(name for name, _ in self.manifest.get("states", ()))

    @property
    def chat_template(self) -> str | None:
        """What the chats are written with; None of plain text."""
        return self.manifest.get("chat_template")

    def info(self) -> dict[str, Any]:
        """What `scope info` prints; JSON-able."""
        return description.info(self)

    # --- one feature ------------------------------------------------------------------------------------------

    def feature(self, feature: int) -> Feature:
        return Feature(self, self._reader.check_feature(feature))

    def firings(self, feature: int, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Columns row, value: the feature's firings from rank `start` to `stop`, the strongest first."""
        feature = self._reader.check_feature(feature)
        n = self._reader.n_firings_of(feature)
        if start < 0 or (stop is not None and stop < start):
            raise OutOfRangeError(f"There are no ranks {start} to {stop}: feature {feature} has {n:,} firings.")
        rows, values = self._reader.firing_arrays(feature, min(start, n), n if stop is None else min(stop, n))
        return pd.DataFrame({"row": rows, "value": values})

    def histogram(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """`(edges (n_bins + 1,), counts (n_bins,))`: all firings in linear bins from 0 to the feature's maximum."""
        feature = self._reader.check_feature(feature)
        counts = self._reader.array("statistics/histogram").slice(feature, feature + 1)[0].astype(np.int64)
        row = self.table.iloc[feature]
        edges = np.linspace(min(float(row["min_value"]), 0.0), max(float(row["max_value"]), 0.0), len(counts) + 1)
        return edges, counts

    def top_examples(
        self,
        feature: int,
        n: int = 20,
        window: tuple[int, int] = (24, 12),
        *,
        distinct: bool = True,
        per_sequence: int = 2,
    ) -> Examples:
        """The strongest firings with their context.

        Args:
            n: how many, at most.
            window: tokens before and after the firing's own.
            distinct: leave out a firing whose last tokens up to its own equal those of a stronger one.
            per_sequence: at most so many from one window of the text.
        """
        return self._strongest(feature, n, window, None, distinct, per_sequence)

    def quantile_examples(
        self, feature: int, low: float, high: float, n: int = 10, seed: int = 0, window: tuple[int, int] = (24, 12)
    ) -> Examples:
        """`n` firings drawn at random between two quantiles of the feature's strength (0 weakest, 1 strongest)."""
        feature = self._reader.check_feature(feature)
        return show(self._reader, feature, sample_band(self._reader, feature, low, high, n, seed), window)

    def random_examples(self, feature: int, n: int = 10, seed: int = 0, window: tuple[int, int] = (24, 12)) -> Examples:
        return self.quantile_examples(feature, 0.0, 1.0, n, seed, window)

    def examples_in(
        self,
        feature: int,
        n: int = 10,
        *,
        language: str | None = None,
        source: str | None = None,
        document: int | None = None,
        role: str | None = None,
        kind: str | None = None,
        window: tuple[int, int] = (24, 12),
        distinct: bool = True,
        per_sequence: int = 2,
    ) -> Examples:
        """The strongest firings within one language, one source, one document, of chats also on tokens of one role's
        turns and of one kind of content, or within all of those given.

        Raises:
            UnknownNameError, OutOfRangeError: this index does not have it.
            InvalidInputError: a role or a kind is given, and the text is no chats.
        """
        kept = rows_within(self._reader, document, language=language, source=source, role=role, kind=kind)
        return self._strongest(feature, n, window, kept, distinct, per_sequence)

    def neighbours(self, feature: int, n: int = 20) -> pd.DataFrame:
        """Columns feature, cosine, top_token, density: nearest decoder rows, the nearest first (20 are stored)."""
        return profile.neighbours(self._reader, self.table, self._reader.check_feature(feature), n)

    def cofiring(self, feature: int, n: int = 20) -> pd.DataFrame:
        """Columns feature, n_both, jaccard, pmi (bits), p_other_given_this, p_this_given_other, top_token, density:
        features that fire on the same rows, by Jaccard (64 are stored)."""
        return profile.cofiring(self._reader, self.table, self._reader.check_feature(feature), n, self.n_indexed_rows)

    def top_tokens(self, feature: int, n: int = 20) -> pd.DataFrame:
        """Columns token, token_id, mean_value, count, share (of the feature's summed strength), rate (of the
        token's own rows): by summed strength."""
        return profile.top_tokens(self._reader, self.table, self._reader.check_feature(feature), n)

    def top_logits(self, feature: int, n: int = 20) -> pd.DataFrame:
        """Columns token, effect: logit per unit of firing strength, the largest first."""
        return self._logits("top", feature, n)

    def bottom_logits(self, feature: int, n: int = 20) -> pd.DataFrame:
        """Columns token, effect: the most negative first."""
        return self._logits("bottom", feature, n)

    def by_language(self, feature: int) -> pd.DataFrame:
        """Columns language, n_firings, share (of the feature's firings), n_rows, rate (firings per indexed row of
        that language), rate_low, rate_high (Wilson, 95%), mean_value: every language, by rate."""
        return profile.by_group(self._reader, "language", self._reader.check_feature(feature))

    def by_source(self, feature: int) -> pd.DataFrame:
        """As `by_language`, with `source` as its first column."""
        return profile.by_group(self._reader, "source", self._reader.check_feature(feature))

    def by_role(self, feature: int) -> pd.DataFrame:
        """As `by_language`, with `role` as its first column: whose turn it fires in.

        Raises:
            InvalidInputError: the text is no chats, or was captured before roles were kept in indexes.
        """
        return self._by_spoken("role", feature)

    def by_kind(self, feature: int) -> pd.DataFrame:
        """As `by_role`, with `kind` as its first column: on text, calls, answers of tools, markup."""
        return self._by_spoken("kind", feature)

    def by_state(self, feature: int) -> pd.DataFrame:
        """As `by_language`, with `state` as its first column: on noise or masks, on tokens that are committed.

        Raises:
            InvalidInputError: the text was not denoised.
        """
        return self._by_spoken("state", feature)

    def by_modality(self, feature: int) -> pd.DataFrame:
        """As `by_language`, with `modality` as its first column: text, image, audio.

        Raises:
            InvalidInputError: the text has no images or sounds.
        """
        return self._by_spoken("modality", feature)

    # --- images and sounds ------------------------------------------------------------------------------------

    @property
    def modalities(self) -> tuple[str, ...]:
        """What rows are where the text has media: text, image, audio; none of a text without."""
        return tuple(name for name, _ in self.manifest.get("modalities", ()))

    @property
    def media(self) -> pd.DataFrame:
        """document, medium (its number there), kind, name, digest, width, height (pixels), seconds, and where its soft
        tokens stand: sequence, position, n_tokens. Raises InvalidInputError where there are none."""
        return self._reader.media

    def medium_file(self, digest: str) -> bytes:
        """The file of an image or a sound, verified; raises OutOfRangeError, IntegrityError."""
        return media.medium_file(self._reader, digest)

    def medium_values(self, feature: int, document: int, medium: int) -> MediumValues:
        """One feature's strength over the patches of an image, or the spans of a sound.

        Raises:
            InvalidInputError: the text has no media.
            OutOfRangeError: there is no such feature, document or medium.
        """
        return media.medium_values(self._reader, self._reader.check_feature(feature), document, medium)

    # --- one place of the text --------------------------------------------------------------------------------

    def features_at(self, row: int) -> pd.DataFrame:
        """Columns feature, value, rank: what fires on one row, the strongest first."""
        self._reader.check_row(row)
        _, features, values = self._reader.fired_on(row, row + 1)
        return pd.DataFrame({"feature": features.astype(np.int64), "value": values, "rank": np.arange(len(features))})

    def features_in(self, start: int, stop: int) -> pd.DataFrame:
        """Columns row, feature, value: what fires on rows `start` to `stop`."""
        self._reader.check_rows(start, stop)
        rows, features, values = self._reader.fired_on(start, stop)
        return pd.DataFrame({"row": rows, "feature": features.astype(np.int64), "value": values})

    def values_on(self, feature: int, start: int, stop: int) -> np.ndarray:
        """float32 `(stop - start,)`: one feature's strength on each of the rows, 0 where it does not fire."""
        self._reader.check_rows(start, stop)
        return self._reader.values_on(self._reader.check_feature(feature), start, stop)

    def tokens(self, start: int, stop: int) -> pd.DataFrame:
        """Columns row, token (display string), token_id, sequence, position, flags; of chats also role, kind (names)
        and message (-1 for none); of denoising also state (name), step, block, final, final_id and commit_step."""
        self._reader.check_rows(start, stop)
        return text_rows.tokens(self._reader, np.arange(start, stop))

    def window_start(self, row: int) -> int:
        """Row id of the first token, BOS included, of the window that a row belongs to."""
        self._reader.check_row(row)
        reader = self._reader
        sequence = int(reader.row_column("sequence").slice(row, row + 1)[0])
        return int(reader.windows.start_row[int(reader.windows.place[sequence])])

    def document_rows(self, document: int) -> np.ndarray:
        """Row ids of a document's tokens, int64, without BOS."""
        return self._reader.document_rows(document)

    def document_tokens(self, document: int) -> pd.DataFrame:
        """As `tokens`, for the rows of one document."""
        return text_rows.tokens(self._reader, self.document_rows(document))

    def document_values(self, feature: int, document: int) -> pd.DataFrame:
        """As `document_tokens`, with a column value: the feature's strength on each token, 0 where it does not fire."""
        rows = self.document_rows(document)
        return text_rows.tokens(self._reader, rows).assign(
            value=self._reader.values_at(self._reader.check_feature(feature), rows)
        )

    def document_text(self, document: int) -> str:
        rows = self.document_rows(document)
        return self._reader.vocabulary.text(self._reader.row_column("token_id").take(rows))

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
        Returns:
            Rows with the columns of `table` and label, label_source, notes, starred, lists.
        Raises:
            UnknownNameError: a column that does not exist.
            InvalidInputError: a filter that cannot be read.
        """
        return self._grid.query(sort, filters, text, start, stop)

    def features_on_token(self, token: int | str, n: int = 50) -> pd.DataFrame:
        """What fires on a token, wherever it stands in the text.

        Args:
            token: its id, or its text, in which spaces count (" cat" is the word inside a sentence).
        Returns:
            feature, n_firings, rate (of that token's indexed rows), rate_low, rate_high, mean_value, lift (rate over
            the feature's density), z (how far the rate is above the rate elsewhere), top_token, density; by z.
            Of a token with more than 250,000 rows a sample is counted; `attrs` holds n_rows, looked_at, sampled. Means
            are over 8,192 rows at most.
        Raises:
            UnknownNameError: no token of the vocabulary reads so; those that differ in case or spaces are suggested.
            OutOfRangeError: there is no such id in this text.
        """
        return occurrences.on_token(self._reader, self.table, token, n)

    def features_on_document(self, document: int, n: int = 50) -> pd.DataFrame:
        """What fires on a document: feature, n_firings, rate (of the document's indexed rows), rate_low, rate_high,
        max_value, mean_value, lift (rate over density), z, top_token, density; by z, so that what is special about the
        document comes first."""
        return occurrences.on_document(self._reader, self.table, document, n)

    def contrast(self, a: Condition | str, b: Condition | str | None = None, n: int = 50) -> Contrast:
        """Features that fire on A and not on B.

        Args:
            a, b: conditions such as "language:de" or "source:python-docs & regex:^\\d"; see
                `scope.features.conditions`. b None: everything that is not A.
            n: how many features, at most.
        Returns:
            Rates with intervals and their ratio; how they are computed is said in `scope.features.contrast`.
        Raises:
            InvalidInputError: a condition cannot be read, or no row meets it.
            UnknownNameError, OutOfRangeError: it names what this index does not have.
        """
        of_b = None if b is None else Condition.parse(b)
        return contrast(self._reader, self.table, Condition.parse(a), of_b, n, self._count)

    def search_tokens(self, text: str, n: int = 50, *, exact: bool = False) -> pd.DataFrame:
        """Features that fire on tokens with this text in them, case ignored; `exact`: on the token that reads so.

        Columns feature, share (of the feature's summed strength that lies on these tokens, among its 64 strongest
        tokens), n_firings (on them), mean_value, tokens (the strongest of them), top_token, density: by the lower end
        of the share's interval, so that one lucky firing does not come first.
        """
        return lookup.by_tokens(self._reader, self.table, text, n, exact)

    def search_labels(self, text: str, n: int = 50) -> pd.DataFrame:
        """Columns feature, label, label_source, starred, top_token, density: features whose label holds every word
        of the text, case ignored; a label that is the text comes first, then one that begins with it."""
        return lookup.by_label(self._grid, text, n)

    # --- languages --------------------------------------------------------------------------------------------

    def parallel_titles(self, languages: Sequence[str]) -> pd.DataFrame:
        """The texts that all of some languages have: columns source, title, language, document, n_rows (indexed,
        line breaks aside), n_kept (of those, in paragraphs that were translated)."""
        return parallel.parallel_pages(self._reader, languages).drop(columns="rows")

    def compare_languages(self, a: str, b: str, n: int = 50) -> pd.DataFrame:
        """Features whose rates differ most between two languages, on what is translated of the titles that both have.

        Columns feature, rate_a, rate_a_low, rate_a_high, rate_b, rate_b_low, rate_b_high, log_ratio (log2),
        log_ratio_low, log_ratio_high, z, top_token, density: by the size of z, above 0 where a's rate is the higher.
        Intervals (95%) resample titles. `attrs` holds n_titles, n_rows_a, n_rows_b. `scope.features.parallel` says how.

        Raises:
            UnknownNameError: there is no such language.
            InvalidInputError: they have fewer than two translated titles in common.
        """
        return parallel.compare_titles(self._titles(a, b), self.table, n)

    def language_neutral(self, n: int = 50) -> pd.DataFrame:
        """Features whose rates are alike in all languages (`scope.features.languages`): columns feature,
        language_entropy (bits), top_token, density; by entropy, then by how often they fire."""
        return lookup.language_neutral(self.table, n)

    def language_specific(self, language: str, n: int = 50) -> pd.DataFrame:
        """Features of one language (`scope.features.languages`): columns as of `contrast("language:…")`, by z."""
        return lookup.language_specific(
            self.table, self.contrast(Condition.parse(f"language:{language}"), n=self.d_sae), n
        )

    # --- everything -------------------------------------------------------------------------------------------

    def umap(self) -> pd.DataFrame | None:
        """Columns feature, umap_x, umap_y: the decoder rows in the plane; None where none was made
        (`scope index umap INDEX` makes it)."""
        return self._reader.table("umap") if self._reader.has_table("umap") else None

    def to_pandas(self) -> pd.DataFrame:
        """A copy of `table`."""
        return self.table.copy()

    def activations(
        self, features: Sequence[int], limit_per_feature: int | None = None, start: int = 0
    ) -> pd.DataFrame:
        """Columns feature, row, value, token, position, document, title, source, language: firings of some
        features, the strongest first within each, from rank `start`."""
        if start < 0 or (limit_per_feature is not None and limit_per_feature < 0):
            raise OutOfRangeError(
                f"start is {start} and limit_per_feature {limit_per_feature}; expected 0 or more, or no limit."
            )
        ids = [self._reader.check_feature(one) for one in features]
        return text_rows.firings(self._reader, ids, limit_per_feature, start)

    def forget(self) -> None:
        """Drop the answers that are kept for the next question. Nothing but memory and time depends on it."""
        self._count.cache_clear()
        self._titles.cache_clear()

    def release(self) -> None:
        """Unmap the files. The next question maps them again, and checks again what it touches."""
        self._reader.release()

    def verify(self, progress: Callable[[int, int | None], None] | None = None) -> list[IndexFault]:
        """Read every byte and compare with the ledger; `progress` counts bytes."""
        return self._reader.verify(progress)

    def _repr_html_(self) -> str:
        from scope.features.html import index_html

        return index_html(self)

    # --- shared by the methods above --------------------------------------------------------------------------

    @cached_property
    def _table(self) -> pd.DataFrame:
        return self._reader.table("features")

    @cached_property
    def _grid(self) -> FeatureGrid:
        return FeatureGrid(self.table, self.labels, self.umap)

    def _strongest(
        self,
        feature: int,
        n: int,
        window: tuple[int, int],
        kept: Callable[[np.ndarray], np.ndarray] | None,
        distinct: bool,
        per_sequence: int,
    ) -> Examples:
        feature = self._reader.check_feature(feature)
        firings = choose(self._reader, ranked_firings(self._reader, feature, kept), n, distinct, per_sequence)
        return show(self._reader, feature, firings, window)

    def _by_spoken(self, group: str, feature: int) -> pd.DataFrame:
        feature = self._reader.check_feature(feature)
        self._reader.require_spoken(group)
        return profile.by_group(self._reader, group, feature)

    def _logits(self, side: str, feature: int, n: int) -> pd.DataFrame:
        row = self.table.iloc[self._reader.check_feature(feature)]
        return pd.DataFrame({"token": list(row[f"{side}_logits"]), "effect": row[f"{side}_logit_effects"]}).head(n)
