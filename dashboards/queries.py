"""What the pages show of features, as plain objects: an index and a request go in, dataclasses and rows come out.

The pages ask an index for little themselves; what they show is in this module, so that a page's cost can be read here.
All of it is read from disk or memory maps; nothing here runs a model (see `dashboards.prompts`), nothing knows Dash.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dashboards.conversations import Said, words_of
from dashboards.marks import feature_label
from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.features.denoising import rate_by_step
from scope.features.examples import BANDS
from scope.figures.text import one_in, short_number, visible_token

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.examples import Example
    from scope.features.index import FeatureIndex

__all__ = [
    "BANDS",
    "ExampleGroup",
    "ExampleRequest",
    "FeatureSummary",
    "TokenDetail",
    "band_title",
    "effect_words",
    "examples",
    "feature_id",
    "feature_name",
    "random_feature",
    "records",
    "summary",
    "table_row",
    "token_detail",
    "tokens_label",
]

PER_BAND = 4
MAX_EXAMPLES = 100
LISTED = 12
"""Neighbours, co-firing features and tokens that a page lists."""


def records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    """The rows of a frame, by column name."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def table_row(index: "FeatureIndex", feature: int) -> dict[str, Any]:
    """One feature's row of `FeatureIndex.table`, with its label."""
    row = {str(name): value for name, value in index.table.iloc[feature].items()}
    return {**row, "label": feature_label(index, feature)}


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
    by_spoken: "Mapping[str, pd.DataFrame]"
    """By "role" and by "kind", where the text is chats; by "modality", where it has images or sounds; by "state", where
    it was denoised."""
    by_step: "pd.DataFrame | None"
    """How often it fires at each step, where the text was denoised."""
    previous: int
    next: int
    """Its neighbours in the list that it was reached from, by id where it was not reached from one."""
    random: int
    """Another feature that fires, of that list, drawn anew each time."""
    place: int | None
    """Its place in that list, from 1; None where there is none."""
    n_listed: int
    """Features in that list, or in all."""

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


def random_feature(index: "FeatureIndex", but: int = -1, among: np.ndarray | None = None) -> int:
    """A feature that fires, one of `among` where that is given, drawn anew each time, and another one than `but` where
    there is one."""
    alive = ~index.table["dead"].to_numpy(bool)
    others = np.flatnonzero(alive) if among is None else among[alive[among]]
    others = others[others != but]
    return int(np.random.default_rng().choice(others)) if len(others) else max(but, 0)


def summary(index: "FeatureIndex", feature: int, among: np.ndarray | None = None) -> FeatureSummary:
    """Read everything about a feature but its examples.

    Args:
        index: the index.
        feature: its id.
        among: ids of the features of a list, in its order: those before and after it there come next. Where the
            feature is none of them, neighbours go by id.
    """
    edges, counts = index.histogram(feature)
    found = np.flatnonzero(among == feature) if among is not None else np.empty(0, np.int64)
    if among is None or not len(found):
        ids, at = np.arange(index.d_sae), feature
    else:
        ids, at = among, int(found[0])
    return FeatureSummary(
        id=feature,
        row=table_row(index, feature),
        edges=edges,
        counts=counts,
        top_tokens=index.top_tokens(feature, LISTED),
        top_logits=index.top_logits(feature, 10),
        bottom_logits=index.bottom_logits(feature, 10),
        neighbours=index.neighbours(feature, LISTED),
        cofiring=index.cofiring(feature, LISTED),
        by_language=index.by_language(feature),
        by_source=index.by_source(feature),
        by_spoken=_by_spoken(index, feature),
        by_step=rate_by_step(index, feature) if index.states else None,
        previous=int(ids[(at - 1) % len(ids)]),
        next=int(ids[(at + 1) % len(ids)]),
        random=random_feature(index, feature, ids),
        place=at + 1 if len(found) else None,
        n_listed=len(ids),
    )


def _by_spoken(index: "FeatureIndex", feature: int) -> "dict[str, pd.DataFrame]":
    chats = {"role": index.by_role(feature), "kind": index.by_kind(feature)} if index.roles else {}
    media = {"modality": index.by_modality(feature)} if index.modalities else {}
    return chats | media | ({"state": index.by_state(feature)} if index.states else {})


def effect_words(feature: FeatureSummary) -> str:
    """What the feature does, in one or two sentences, from its numbers alone: how often it fires, on what, in which
    language, and what it makes likelier and less likely."""
    row, parts = feature.row, []
    if feature.fires:
        where = _mostly(feature)
        parts.append(f"Fires on {one_in(row['density'])} tokens{', ' + where if where else ''}.")
    pushed = [_quoted(token) for token in feature.top_logits["token"].head(3)]
    held = [_quoted(token) for token in feature.bottom_logits["token"].head(3)]
    if pushed and held:
        verb = "Makes" if feature.fires else "Would make"
        parts.append(f"{verb} {', '.join(pushed)} likelier next and {', '.join(held)} less likely.")
    return " ".join(parts)


def _mostly(feature: FeatureSummary) -> str:
    """The token and the language that most of the strength or of the firings lie on, where one does."""
    parts, row = [], feature.row
    share = row.get("top_token_share")
    if share is not None and np.isfinite(share) and share >= 0.2:
        parts.append(f"{short_number(100 * float(share))}% of its strength on {_quoted(row['top_token'])}")
    if len(feature.by_language) > 1:
        rates = feature.by_language["rate"].to_numpy(float)
        first, second = feature.by_language.iloc[0], feature.by_language.iloc[1]
        if rates[0] > 0 and first["rate_low"] > 2 * second["rate_high"]:
            parts.append(f"far more often in {first['language']} than in any other language")
    return ", ".join(parts)


def _quoted(token: object) -> str:
    return f"“{visible_token(str(token))}”"


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
    role: str = ""
    content: str = ""
    """Of chats: the role and the kind of content of the tokens that it fires on."""
    document: int | None = None
    """Number of the one document to take them from."""
    n: int = 20
    seed: int = 0
    low: float = 0.0
    high: float = 1.0
    """Quantiles that bound a "band"."""
    context: str = "snippet"
    """ "snippet", or "document": the whole text."""

    @property
    def filtered(self) -> bool:
        """Whether it asks for a part of the text alone."""
        return bool(self.language or self.source or self.role or self.content or self.document is not None)


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
    if wanted.filtered:
        _check_known("language", wanted.language, index.languages)
        _check_known("source", wanted.source, index.sources)
        _check_known("role", wanted.role, index.roles)
        _check_known("kind", wanted.content, index.kinds)
        found = index.examples_in(
            feature,
            n,
            language=wanted.language or None,
            source=wanted.source or None,
            role=wanted.role or None,
            kind=wanted.content or None,
            document=wanted.document,
            per_sequence=2 if wanted.document is None else n,
        )
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
                band_title(low, high),
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


def band_title(low: float, high: float) -> str:
    """Two quantiles in words."""
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
    push: dict[str, Any] | None = None
    """What the one feature does to the token that follows: token, effect (logits before the final norm's scale, value
    times effect per unit), None where that token is not among the stored ones or does not follow."""
    said: str = ""
    """Of chats: what the token is."""


def token_detail(
    index: "FeatureIndex", row: int, n: int = 8, feature: int | None = None, effects: np.ndarray | None = None
) -> TokenDetail:
    """The `n` strongest features on one row, and `feature` too where it fires there, whatever its rank.

    Args:
        index: the index.
        row: of the text.
        n: features to list.
        feature: the one that the page is about.
        effects: `(d_vocab,)`, its effect on every token's logit per unit of strength, where that is known.
    """
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
    own = found.loc[found["feature"] == feature, "value"].tolist()
    push = _push(index, row, feature, float(own[0]), effects) if feature is not None and own else None
    return TokenDetail(row, len(found), rows, push, _said(index, row))


def _said(index: "FeatureIndex", row: int) -> str:
    if not index.roles:
        return ""
    token = index.tokens(row, row + 1).iloc[0]
    return words_of(Said(token["role"], token["kind"], int(token["message"])))


def _push(
    index: "FeatureIndex", row: int, feature: int, value: float, effects: np.ndarray | None
) -> dict[str, Any] | None:
    """How far the feature's firing on a row moves the logit of the token that really comes next."""
    if row + 1 >= index.n_rows:
        return None
    here, after = index.tokens(row, row + 2).to_dict("records")
    if here["sequence"] != after["sequence"]:
        return None
    effect = _effect_on(index, feature, after, effects)
    return {"token": str(after["token"]), "effect": None if effect is None else value * effect}


def _effect_on(
    index: "FeatureIndex", feature: int, token: Mapping[Any, Any], effects: np.ndarray | None
) -> float | None:
    """The feature's effect on one token's logit per unit of strength; None where it is not among those stored."""
    if effects is not None:
        return float(effects[int(token["token_id"])])
    text = str(token["token"])
    for frame in (index.top_logits(feature), index.bottom_logits(feature)):
        stored = frame.loc[frame["token"] == text, "effect"]
        if len(stored):
            return float(stored.iloc[0])
    return None


def _concat(first: "pd.DataFrame", second: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    return pd.concat([first, second])
