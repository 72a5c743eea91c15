"""Languages compared on texts that both have.

A corpus has other texts in each language, so a feature's rate by language says as much of the texts as of the language.
Parallel pages are documents of one source and title in several languages.

1. Take the titles that all of the languages have.
2. Cut a page into paragraphs and drop those that were not translated: at least half of whose tokens lie in stretches
   of `SHINGLE` tokens that stand in another of the languages' pages as well, or, where the page is a translation, in
   any other language's page of that title (it is then left in the original's words); code and commands, which no one
   translates, go with them. A shorter paragraph is dropped when it stands there as a whole.
3. Count each feature's firings on what is left, by title, and compare rates, never counts:
   `log_ratio` = log2(rate_a / rate_b), smoothed as in `scope.features.contrast`.
4. Titles, not tokens, are what might have been others: intervals are the middle 95% over resampled titles (pairs of
   pages; Efron & Tibshirani 1993), and `z` is the logarithm of the ratio over its standard error between titles (the
   delta method for ratios, Cochran 1977, section 6.4), to which 1 / (k_a + ½) + 1 / (k_b + ½) is added so that a
   feature with hardly a firing is not sure of itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scope.errors import InvalidInputError, UnknownNameError
from scope.features.contrast import log_ratio
from scope.features.counting import count_features

if TYPE_CHECKING:
    from scope.features.reader import IndexReader

__all__ = ["TitleCounts", "compare_titles", "count_titles", "parallel_pages"]

ORIGINAL = "en"
"""The language that pages are translated from: its paragraphs stand in pages that were left untranslated, and stay."""
SHINGLE = 8
RESAMPLES = 1_000
MAX_GROUPS = 256
"""Titles beyond so many are joined, every 256th with the first, so that memory does not grow with them."""
MAX_NEWLINES = 2


class _Page(NamedTuple):
    """A document of a title."""

    document: int
    language: str


class _Words(NamedTuple):
    """A page's rows."""

    rows: np.ndarray
    token_ids: np.ndarray
    paragraph: np.ndarray
    """Which paragraph each belongs to, ascending from 0."""


class TitleCounts(NamedTuple):
    """Firings of two languages by title, or by group of titles."""

    firings: np.ndarray
    """int64 `(2, n_groups, d_sae)`."""
    rows: np.ndarray
    """int64 `(2, n_groups)`: rows that were kept."""
    n_titles: int


def parallel_pages(reader: "IndexReader", languages: Sequence[str], original: str = ORIGINAL) -> pd.DataFrame:
    """See `FeatureIndex.parallel_titles`; with a further column `rows`, the row ids that are kept."""
    languages = list(dict.fromkeys(languages))
    known = [name for name, _ in reader.manifest["languages"]]
    for language in languages:
        if language not in known:
            raise UnknownNameError("language", language, known)
    if len(languages) < 2:
        raise InvalidInputError(f"Parallel titles need two languages or more; got {', '.join(languages) or 'none'}.")
    breaks = _Breaks(reader)
    found = []
    for (source, title), pages in _shared_titles(reader, languages).items():
        words = [breaks.read(page.document) for page in pages]
        for place, page in enumerate(pages):
            if page.language not in languages:
                continue
            others = [
                other
                for other, theirs in zip(words, pages, strict=True)
                if theirs.language != page.language and (theirs.language in languages or page.language != original)
            ]
            kept = _translated(words[place], others)
            rows = words[place].rows
            indexed = reader.indexed(reader.row_column("flags").take(rows))
            found.append(
                {
                    "source": source,
                    "title": title,
                    "language": page.language,
                    "document": page.document,
                    "n_rows": int(indexed.sum()),
                    "n_kept": int((indexed & kept).sum()),
                    "rows": rows[indexed & kept],
                }
            )
    columns = ["source", "title", "language", "document", "n_rows", "n_kept", "rows"]
    return pd.DataFrame(found, columns=columns)


def count_titles(reader: "IndexReader", a: str, b: str) -> TitleCounts:
    """Firings by title on what is translated of the pages that both languages have.

    Raises:
        InvalidInputError: a and b are the same, or have fewer than two titles in common.
    """
    if a == b:
        raise InvalidInputError(f"Both languages are {a}; give two different ones.")
    pages = parallel_pages(reader, [a, b])
    titles = pages.groupby(["source", "title"], sort=False)
    usable = [own for _, own in titles if (own.groupby("language")["n_kept"].sum() > 0).sum() == 2]
    if len(usable) < 2:
        raise InvalidInputError(
            f"{a} and {b} have {len(usable)} translated titles in common; comparing them needs at least two. "
            "`parallel_titles` lists what languages share."
        )
    n_groups = min(len(usable), MAX_GROUPS)
    firings = np.zeros((2, n_groups, reader.d_sae), np.int64)
    rows = np.zeros((2, n_groups), np.int64)
    for number, own in enumerate(usable):
        for side, language in enumerate((a, b)):
            kept = np.concatenate(own.loc[own["language"] == language, "rows"].to_list())
            firings[side, number % n_groups] += count_features(reader, kept)
            rows[side, number % n_groups] += len(kept)
    return TitleCounts(firings, rows, len(usable))


def compare_titles(counts: TitleCounts, table: pd.DataFrame, n: int) -> pd.DataFrame:
    """See `FeatureIndex.compare_languages`."""
    k, rows = counts.firings.sum(axis=1), counts.rows.sum(axis=1)
    ratio = log_ratio(k[0], int(rows[0]), k[1], int(rows[1]))
    z = ratio * np.log(2) / np.sqrt(_variance(counts, k, rows))
    of = np.argsort(-np.abs(z), kind="stable")[:n]
    of = of[k[:, of].sum(axis=0) > 0]
    (low_a, high_a), (low_b, high_b), (low, high) = _resampled(counts, of)
    found = pd.DataFrame(
        {
            "feature": of,
            "rate_a": k[0, of] / rows[0],
            "rate_a_low": low_a,
            "rate_a_high": high_a,
            "rate_b": k[1, of] / rows[1],
            "rate_b_low": low_b,
            "rate_b_high": high_b,
            "log_ratio": ratio[of],
            "log_ratio_low": low,
            "log_ratio_high": high,
            "z": z[of],
            "top_token": table["top_token"].to_numpy()[of],
            "density": table["density"].to_numpy()[of],
        }
    )
    found.attrs.update(n_titles=counts.n_titles, n_rows_a=int(rows[0]), n_rows_b=int(rows[1]))
    return found


def _variance(counts: TitleCounts, k: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Variance of ln(rate_a / rate_b) between titles, by feature."""
    n_groups = counts.rows.shape[1]
    total = np.zeros(k.shape[1])
    for group in range(n_groups):
        parts = [
            (counts.firings[side, group] - k[side] * (counts.rows[side, group] / rows[side])) / np.maximum(k[side], 1)
            for side in range(2)
        ]
        total += (parts[0] - parts[1]) ** 2
    variance: np.ndarray = total * n_groups / (n_groups - 1) + (1 / (k + 0.5)).sum(axis=0)
    return variance


def _resampled(counts: TitleCounts, of: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The middle 95% of rate a, rate b and log_ratio over resampled titles, of some features."""
    n_groups = counts.rows.shape[1]
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), RESAMPLES)
    k = [weights @ counts.firings[side][:, of] for side in range(2)]
    rows = [(weights @ counts.rows[side])[:, None] for side in range(2)]
    drawn = [k[0] / rows[0], k[1] / rows[1], log_ratio(k[0], rows[0], k[1], rows[1])]
    return [tuple(np.quantile(values, (0.025, 0.975), axis=0)) for values in drawn]  # type: ignore[misc]


def _shared_titles(reader: "IndexReader", languages: Sequence[str]) -> dict[tuple[str, str], list[_Page]]:
    """The titles that all of the languages have, and all of their pages, those of other languages too."""
    documents = reader.table("documents").sort_values(["source", "title", "document"], kind="stable")
    documents = documents[documents["title"].fillna("") != ""]
    shared = {}
    for key, own in documents.groupby(["source", "title"], sort=True):
        if set(languages) <= set(own["language"]):
            pages = zip(own["document"].astype(int), own["language"].astype(str), strict=True)
            shared[key] = [_Page(*page) for page in pages]
    return shared


class _Breaks:
    """Reads pages and cuts them into paragraphs, at empty lines."""

    def __init__(self, reader: "IndexReader") -> None:
        self._reader = reader
        vocabulary = reader.vocabulary.table
        texts = vocabulary["text"].astype(object).to_numpy()
        self._ids = vocabulary["token_id"].to_numpy(np.int64)
        self._newlines = np.array([text.count("\n") if not text.strip() else 0 for text in texts])
        self._inside = np.array(["\n\n" in text for text in texts]) & (self._newlines == 0)

    def read(self, document: int) -> _Words:
        """A page, without what breaks its paragraphs."""
        rows = self._reader.document_rows(document)
        token_ids = self._reader.row_column("token_id").take(rows).astype(np.int64)
        places = np.searchsorted(self._ids, token_ids)
        newlines = self._newlines[places]
        # Newlines of neighbouring tokens add up: two tokens of one newline each break like one of two.
        run = np.cumsum(newlines == 0)
        in_run = np.bincount(run, weights=newlines)[run]
        breaks = (newlines > 0) & (in_run >= MAX_NEWLINES)
        paragraph = np.cumsum((breaks & ~np.roll(breaks, 1)) | self._inside[places])
        words = newlines == 0
        return _Words(rows[words], token_ids[words], paragraph[words] - int(paragraph[words].min(initial=0)))


def _translated(page: _Words, others: Sequence[_Words]) -> np.ndarray:
    """Which tokens of a page lie in paragraphs that stand in none of the other pages, bool."""
    n = len(page.rows)
    if not n or not others:
        return np.ones(n, bool)
    own, starts = _shingles(page.token_ids), np.arange(max(0, n - SHINGLE + 1))
    known = np.isin(own, np.concatenate([_shingles(other.token_ids) for other in others]))
    edges = np.zeros(n + 1, np.int64)
    np.add.at(edges, starts[known], 1)
    np.add.at(edges, starts[known] + SHINGLE, -1)
    covered = np.cumsum(edges[:-1]) > 0
    length = np.bincount(page.paragraph)
    untranslated = np.bincount(page.paragraph, weights=covered) >= np.maximum(length / 2, 1)
    whole, in_others = _paragraphs(page), [_paragraphs(other) for other in others]
    untranslated |= (length < SHINGLE) & np.isin(whole, np.concatenate(in_others))
    kept: np.ndarray = ~untranslated[page.paragraph]
    return kept


def _shingles(token_ids: np.ndarray) -> np.ndarray:
    """A hash of each stretch of `SHINGLE` tokens, uint64."""
    if len(token_ids) < SHINGLE:
        return np.empty(0, np.uint64)
    factors = np.random.default_rng(0).integers(1, 2**63, SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    stretches = np.lib.stride_tricks.sliding_window_view(token_ids.astype(np.uint64), SHINGLE)
    hashes: np.ndarray = (stretches * factors).sum(axis=1, dtype=np.uint64)
    return hashes


def _paragraphs(page: _Words) -> np.ndarray:
    """A hash of each paragraph as a whole, uint64."""
    if not len(page.rows):
        return np.empty(0, np.uint64)
    starts = np.flatnonzero(np.diff(page.paragraph, prepend=-1))
    hashes = np.zeros(int(page.paragraph[-1]) + 1, np.uint64)
    place = np.arange(len(page.rows)) - starts[np.searchsorted(starts, np.arange(len(page.rows)), side="right") - 1]
    mixed = (page.token_ids.astype(np.uint64) + np.uint64(1)) * (
        np.uint64(0x9E3779B97F4A7C15) * (2 * place + 1).astype(np.uint64)
    )
    mixed ^= mixed >> np.uint64(29)
    np.add.at(hashes, page.paragraph, mixed)
    return hashes
