"""What the prompt page runs and shows with images and sounds: a stored window of the text, or a prompt with files that
were handed over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.chats import CONTENT_KINDS, ROLES, Part
from activations.documents import Document
from activations.media import BOX, SPAN, Medium, MediumContent, PlacedMedium
from dashboards.conversations import Said, chat_of
from scope.errors import InvalidInputError, OutOfRangeError
from scope.features.media import MediumValues

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["WithMedia", "stored_window", "with_files"]


@dataclass(frozen=True, eq=False)
class WithMedia:
    """A prompt with images or sounds."""

    title: str
    """What it is."""
    prompt: Any
    """What the model is given."""
    media: list[MediumValues]
    """Its images and sounds; `rows` are positions in the prompt, and strengths are 0."""
    said: tuple[Said, ...]
    """Of a chat: what each token is."""
    files: str
    """Where the files are served: what comes before a digest."""

    @property
    def n_tokens(self) -> int:
        return len(self.prompt.tokens)


def stored_window(model: Any, index: "FeatureIndex", sequence: int) -> WithMedia:
    """A window of an index's text, as the model saw it.

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
    if not whole.all() or (own["position"] + own["n_tokens"] > len(tokens)).any():
        raise InvalidInputError(
            "The index holds only some tokens of this window, so that the model cannot be run on it as it was."
        )
    columns = {name: tokens[name].to_numpy() for name in (*BOX, *SPAN)}
    placed, media = [], []
    for row in own.to_dict("records"):
        known = {name: row[name] for name in MediumContent._fields if name != "content"}
        one = MediumContent(**known, content=index.medium_file(row["digest"]))
        placed.append(PlacedMedium(one.kind, one.name, row["position"], row["n_tokens"], one.content))
        positions = np.arange(row["position"], row["position"] + row["n_tokens"])
        media.append(_shown(one, row["document"], row["medium"], positions, columns))
    documents = index.documents
    title = str(documents.loc[documents["document"] == first["document"], "title"].iloc[0] or "")
    prompt = model.media.placed(tokens["token_id"].tolist(), placed)
    said = _said(tokens["role"], tokens["kind"], tokens["message"]) if index.roles else ()
    title = f"A stored window of {title or 'document ' + str(first['document'])}"
    return WithMedia(title, prompt, media, said, f"/media/{index.id}")


def with_files(model: Any, text: str, chat: bool, files: Sequence[MediumContent], template: str | None) -> WithMedia:
    """A prompt with files that were handed over. In a text they stand at its marks (`activations.media`), in a chat at
    the beginning of the first thing that the user says.

    Raises:
        InvalidInputError: the model takes no such files, or the prompt cannot be read.
    """
    media = tuple(Medium(one.kind, one.name, content=one.content) for one in files)
    document = Document(text, title="the prompt", media=media)
    if chat:
        wanted = chat_of(text)
        parts = tuple(Part(one.kind, one.name) for one in files)
        messages = list(wanted.messages)
        place = next((number for number, one in enumerate(messages) if one.role == "user"), 0)
        said_text = (Part("text", messages[place].content),) if messages[place].content else ()
        messages[place] = messages[place]._replace(parts=(*parts, *said_text))
        document = replace(document, messages=tuple(messages), tools=wanted.tools)
    prompt = model.media.prompt(document, template)
    columns = prompt.columns
    shown = []
    for number, one in enumerate(prompt.media):
        positions = np.flatnonzero((columns["medium"] == number) & (columns["modality"] > 0))
        shown.append(_shown(one, 0, number, positions, columns))
    said: tuple[Said, ...] = ()
    if chat:
        roles = [ROLES[code] for code in columns["role"]]
        said = _said(roles, [CONTENT_KINDS[code] for code in columns["kind"]], columns["message"])
    return WithMedia("", prompt, shown, said, "/uploads")


def _said(roles: Any, kinds: Any, messages: Any) -> tuple[Said, ...]:
    names = zip(roles, kinds, messages, strict=True)
    return tuple(Said(str(role), str(kind), int(message)) for role, kind, message in names)


def _shown(
    one: MediumContent, document: int, medium: int, positions: np.ndarray, columns: Mapping[str, np.ndarray]
) -> MediumValues:
    def known(value: Any, form: Any) -> Any:
        return None if value is None or np.isnan(value) else form(value)

    names = BOX if one.kind == "image" else SPAN
    return MediumValues(
        kind=one.kind,
        name=one.name,
        digest=one.digest,
        document=document,
        medium=medium,
        width=known(one.width, int),
        height=known(one.height, int),
        seconds=known(one.seconds, float),
        rows=positions,
        values=np.zeros(len(positions), np.float32),
        places=np.stack([np.asarray(columns[name], np.float32)[positions] for name in names], axis=1),
    )
