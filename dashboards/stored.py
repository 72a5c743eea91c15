"""A stored window of the text, with its images and sounds, as the prompt page shows it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.media import BOX, SPAN, PlacedMedium
from dashboards.conversations import Said
from scope.errors import InvalidInputError, OutOfRangeError
from scope.features.media import MediumValues

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["StoredWindow", "stored_window"]


@dataclass(frozen=True, eq=False)
class StoredWindow:
    """A window as the model saw it."""

    title: str
    """Of its document."""
    token_ids: list[int]
    """BOS included, where windows have one."""
    placed: list[PlacedMedium]
    media: list[MediumValues]
    """The same, with their places; `rows` are positions in the window, and strengths are 0."""
    said: tuple[Said, ...]
    """Of a chat: what each token is."""


def stored_window(index: "FeatureIndex", sequence: int) -> StoredWindow:
    """A window of an index's text.

    Raises:
        OutOfRangeError: there is none of this number.
        InvalidInputError: the index holds only some of its tokens, or the text has no images or sounds.
    """
    table = index.sequences
    found = table[table["sequence"] == sequence]
    if not len(found):
        raise OutOfRangeError(f"There is no window {sequence} in this index.")
    first = found.iloc[0]
    start = int(first["start_row"])
    tokens = index.tokens(start, start + int(first["n_rows"]))
    all_media = index.media
    own = all_media[all_media["sequence"] == sequence].sort_values("position")
    whole = tokens["position"].to_numpy() == np.arange(len(tokens))
    cut = (own["position"] + own["n_tokens"] > len(tokens)).any()
    if not whole.all() or cut:
        raise InvalidInputError(
            "The index holds only some tokens of this window, so that the model cannot be run on it as it was."
        )
    placed, media = [], []
    for row in own.to_dict("records"):
        one = {str(name): value for name, value in row.items()}
        content = index.medium_file(one["digest"])
        placed.append(PlacedMedium(one["kind"], one["name"], one["position"], one["n_tokens"], content))
        positions = np.arange(one["position"], one["position"] + one["n_tokens"])
        media.append(_shown(one, positions, tokens))
    documents = index.documents
    title = str(documents.loc[documents["document"] == first["document"], "title"].iloc[0] or "")
    said: tuple[Said, ...] = ()
    if index.roles:
        names = zip(tokens["role"], tokens["kind"], tokens["message"], strict=True)
        said = tuple(Said(str(role), str(kind), int(message)) for role, kind, message in names)
    return StoredWindow(title or f"document {first['document']}", tokens["token_id"].tolist(), placed, media, said)


def _shown(one: dict[str, Any], positions: np.ndarray, tokens: Any) -> MediumValues:
    names = list(BOX if one["kind"] == "image" else SPAN)

    def known(name: str, form: Any) -> Any:
        return None if np.isnan(one[name]) else form(one[name])

    return MediumValues(
        kind=one["kind"],
        name=one["name"],
        digest=one["digest"],
        document=one["document"],
        medium=one["medium"],
        width=known("width", int),
        height=known("height", int),
        seconds=known("seconds", float),
        rows=positions,
        values=np.zeros(len(positions), np.float32),
        places=tokens[names].to_numpy(np.float32)[positions],
    )
