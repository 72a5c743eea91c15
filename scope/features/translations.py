"""How alike a model treats the translations of one text: over the layers, and feature by feature.

A corpus has other texts in each language, so everything here is over titles that both languages have, of which
untranslated paragraphs are dropped (`scope.features.parallel`), and compares rates and means, never counts.

*Layers* (`layer_similarity`), from a store of the same rows as the index, with the hooks of several layers:

1. A page is the mean of a hook's rows over what is kept of it, sinks (more than ten times the median norm) left out.
2. The mean over all pages of both languages is subtracted: what every page has says nothing of any.
3. `similarity` is the mean cosine between a page and its translation; `baseline` that of all pairs of a page and the
   translation of another title. `nearest` is the share of pages whose nearest page of the other language is their own
   translation, beside `chance`, 1 / titles. Intervals are the middle 95% over resampled titles.

*Features* (`shared_features`), from the index: a feature is *shared* where the titles on which it fires in the one
language are those on which it fires in the other, more than chance. With n titles, n_a and n_b of which it fires on,
the number on which it fires in both is, were they unrelated, hypergeometric with mean n_a n_b / n: the random-pair
baseline. `z` is its distance from that mean in standard deviations, and `p` the probability of as many or more by
chance. Features are many and titles few, so that it is p that decides, and over all features together: of those called
shared about one in twenty is so by chance (`scope.features.discoveries`). One title in common is never enough, and a
feature that fires on all titles has no z and is not called shared. A feature is *specific* to a language where the
interval of its rate's ratio (`compare_titles`) lies beyond a factor of `SPECIFIC`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from activations.source import bf16_to_float32
from scope.errors import InvalidInputError, MismatchError
from scope.features.counting import count_features
from scope.features.discoveries import discoveries, overlap_by_chance
from scope.features.languages import SPECIFIC
from scope.features.parallel import parallel_pages

if TYPE_CHECKING:
    from activations.store import ActivationStore
    from scope.features.index import FeatureIndex

__all__ = ["layer_similarity", "shared_features", "title_similarity"]

MIN_ROWS = 16
"""Rows that a page must keep to be compared."""
NORM_RATIO = 10.0
RESAMPLES = 1000


class _Pages(NamedTuple):
    """The pages of both languages, title by title."""

    titles: list[tuple[str, str]]
    rows: tuple[list[np.ndarray], list[np.ndarray]]
    """Row ids that are kept, by title, of each language."""


def _pages(index: "FeatureIndex", a: str, b: str) -> _Pages:
    if a == b:
        raise InvalidInputError(f"Both languages are {a}; give two different ones.")
    pages = parallel_pages(index._reader, [a, b])
    titles: list[tuple[str, str]] = []
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for (source, title), own in pages.groupby(["source", "title"], sort=False):
        kept = [
            np.sort(np.concatenate([np.empty(0, np.int64), *own.loc[own["language"] == language, "rows"]]))
            for language in (a, b)
        ]
        if min(map(len, kept)) >= MIN_ROWS:
            titles.append((str(source), str(title)))
            for side, found in zip(rows, kept, strict=True):
                side.append(found)
    if len(titles) < 3:
        raise InvalidInputError(
            f"{a} and {b} share {len(titles)} titles of which {MIN_ROWS} translated tokens or more are left in both; "
            "comparing pages with random pairs needs at least three."
        )
    return _Pages(titles, rows)


def layer_similarity(
    index: "FeatureIndex",
    store: "ActivationStore",
    languages: Sequence[str],
    hooks: Sequence[str] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> pd.DataFrame:
    """How alike translations are at each hook, against random pairs.

    Args:
        index: says which pages are translations, and what of them was translated.
        store: activations of the same rows.
        languages: two or more; each pair is compared.
        hooks: of the store, in the order of the layers; None for all of them.
        progress: called with (hooks done, hooks in all).

    Returns:
        Columns hook, layer (place in `hooks`), a, b, similarity, baseline, difference, each with _low and _high,
        nearest, chance, n_titles.
    Raises:
        MismatchError: the store has other rows than the index.
        UnknownNameError: there is no such language or hook.
        InvalidInputError: a pair shares too few titles.
    """
    rows = index.sequences[["start_row", "n_rows"]].to_numpy()
    own = store.sequences()[["start_row", "n_rows"]].to_numpy()
    if store.n_rows != index.n_rows or not np.array_equal(rows, own):
        raise MismatchError(
            f"The store {store.path} has other rows than the index {index.name}. Give the store that it was made from, "
            "or one of the same text with the same windows."
        )
    named = [store.resolve_hook(hook) for hook in (_in_order(store.hooks) if hooks is None else hooks)]
    pairs = [(a, b) for place, a in enumerate(languages) for b in languages[place + 1 :]]
    pages = {pair: _pages(index, *pair) for pair in pairs}
    found = []
    for layer, hook in enumerate(named):
        limit = NORM_RATIO * float(np.median(store.norms(hook, 0, store.n_rows)))
        known: dict[tuple[int, int], np.ndarray] = {}
        for (a, b), those in pages.items():
            first, second = (
                np.stack([_mean_row(store, hook, kept, limit, known) for kept in side]) for side in those.rows
            )
            found.append({"hook": hook, "layer": layer, "a": a, "b": b, **title_similarity(first, second)})
        if progress:
            progress(layer + 1, len(named))
    return pd.DataFrame(found)


def _in_order(hooks: Sequence[str]) -> list[str]:
    """By the number of the layer, where the names have one."""
    numbers = {hook: [int(part) for part in hook.split(".") if part.isdigit()] for hook in hooks}
    return sorted(hooks, key=lambda hook: (numbers[hook][:1] or [-1], hook))


def _mean_row(
    store: "ActivationStore", hook: str, rows: np.ndarray, limit: float, known: dict[tuple[int, int], np.ndarray]
) -> np.ndarray:
    """The mean of some rows of ordinary norm, float64; a page's is kept for the next pair."""
    key = (int(rows[0]), len(rows))
    if key not in known:
        values = store.read_rows(hook, rows).reshape(len(rows), -1)
        x = (bf16_to_float32(values) if store.dtype == "bfloat16" else values).astype(np.float64)
        ordinary = np.linalg.norm(x, axis=1) <= limit
        known[key] = (x[ordinary] if ordinary.any() else x).mean(axis=0)
    return known[key]


def title_similarity(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, float | int]:
    """Similarity of translations and of random pairs, given a vector for each title in each language.

    Args:
        a, b: `(titles, width)`; rows of the same number are translations of each other.
        seed: of the intervals.
    """
    n = len(a)
    centre = (a.mean(axis=0) + b.mean(axis=0)) / 2
    unit = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-30) for side in (a - centre, b - centre)]
    cosines = unit[0] @ unit[1].T
    own = np.diag(cosines)
    # Of each title: its random pairs, in either language.
    others = (cosines.sum(axis=1) + cosines.sum(axis=0) - 2 * own) / (2 * (n - 1))
    nearest = ((cosines.argmax(axis=1) == np.arange(n)).mean() + (cosines.argmax(axis=0) == np.arange(n)).mean()) / 2
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    figures: dict[str, float | int] = {}
    for name, values in (("similarity", own), ("baseline", others), ("difference", own - others)):
        figures[name] = float(values.mean())
        low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
        figures[f"{name}_low"], figures[f"{name}_high"] = float(low), float(high)
    return {**figures, "nearest": float(nearest), "chance": 1 / n, "n_titles": n}


def shared_features(index: "FeatureIndex", a: str, b: str) -> pd.DataFrame:
    """Which features follow a text into its translation, and which are of one language.

    Columns feature, titles_a, titles_b (on which it fires), both, expected (of random pairs), z, p, log_ratio,
    log_ratio_low, log_ratio_high (log2 of the rate in `a` over that in `b`), kind ("shared", the name of a language,
    or empty), top_token: by kind, then p. `attrs` holds n_titles.

    Raises:
        UnknownNameError: there is no such language.
        InvalidInputError: they share too few titles.
    """
    pages = _pages(index, a, b)
    n = len(pages.titles)
    fires = [np.stack([count_features(index._reader, kept) for kept in side]) > 0 for side in pages.rows]
    both = (fires[0] & fires[1]).sum(axis=0)
    n_a, n_b = (side.sum(axis=0) for side in fires)
    expected = n_a * n_b / n
    variance = expected * (n - n_a) * (n - n_b) / (n * max(n - 1, 1))
    z = np.divide(both - expected, np.sqrt(variance), out=np.full(len(both), np.nan), where=variance > 0)
    p = overlap_by_chance(both, n_a, n_b, n)
    tested = (n_a > 0) & (n_b > 0)
    shared = np.zeros(len(both), bool)
    shared[tested] = discoveries(p[tested])
    shared &= both > 1
    rates = index.compare_languages(a, b, n=index.d_sae).set_index("feature")
    table = pd.DataFrame(
        {
            "feature": np.arange(len(both)), "titles_a": n_a, "titles_b": n_b, "both": both, "expected": expected,
            "z": z, "p": p, "shared": shared,
        }
    )  # fmt: skip
    table = table.join(rates[["log_ratio", "log_ratio_low", "log_ratio_high", "top_token"]], on="feature", how="inner")
    bound = np.log2(SPECIFIC)
    table["kind"] = np.select(
        [table["log_ratio_low"] >= bound, table["log_ratio_high"] <= -bound, table["shared"]],
        [a, b, "shared"],
        "",
    )
    table = table.drop(columns="shared").sort_values(
        ["kind", "p"], ascending=[False, True], kind="stable", ignore_index=True
    )
    table.attrs["n_titles"] = n
    return table
