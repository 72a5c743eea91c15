"""`RowSelection`: which tokens of a text become rows of a store. The model sees whole windows all the same.

A token becomes a row if all conditions that are given hold for it:

- `skip_bos`, `skip_special`: it is not the window's BOS, no other special token.
- `every`: its number among the text tokens of its window, or of its document, is a multiple of n. Numbers begin at 0,
  and BOS has none.
- `pattern`: the regular expression is found in the token's own text, in which " the" begins with its space.
- `roles`: it belongs to a turn of one of these roles. A turn is what the message says and the special token right after
  it, such as an end of turn; what else the chat template writes belongs to nobody ("none").
- `kinds`: it is of one of these kinds of content, such as a tool call (`activations.chats.CONTENT_KINDS`).

BOS belongs to no text: it stays only where none of the last four is given.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from activations.chats import CONTENT_KINDS, ROLES, Chat, ChatTokens
from activations.documents import Document
from activations.errors import InvalidInputError, UnknownNameError
from activations.media import MediaTokens
from activations.source import HookedModel, MediaModel, RowFlag

__all__ = ["Choosing", "RowSelection", "WindowTokens", "choosing_for"]


class WindowTokens(NamedTuple):
    """The tokens of a document's windows, one after the other."""

    token_id: np.ndarray
    position: np.ndarray
    """Place in the window, BOS included."""
    document_position: np.ndarray
    """Number in the document, BOS not counted; that of the token after it for a BOS."""
    flags: np.ndarray
    role: np.ndarray | None
    """Codes as in `activations.chats.ROLES`, where the document is a chat."""
    kind: np.ndarray | None
    """Codes as in `activations.chats.CONTENT_KINDS`, likewise."""


@dataclass(frozen=True)
class RowSelection:
    """Which tokens become rows. It is part of what identifies a store, unless it keeps all."""

    skip_bos: bool = False
    """Leave out the BOS token that starts a window."""
    skip_special: bool = False
    """Leave out all other special tokens of the tokenizer."""
    every: int = 1
    """Keep every n-th token of the text, the first one first."""
    every_in: Literal["window", "document"] = "window"
    """Where `every` begins to count: at each window, or at each document."""
    pattern: str | None = None
    """A regular expression that is searched in each token's own text."""
    roles: tuple[str, ...] = ()
    """Of chats: keep only the turns of these roles."""
    kinds: tuple[str, ...] = ()
    """Of chats: keep only tokens of these kinds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(sorted(set(self.roles))))
        object.__setattr__(self, "kinds", tuple(sorted(set(self.kinds))))
        if self.every < 1:
            raise InvalidInputError(f"every is {self.every}; expected 1 (all tokens) or more.")
        if self.every_in not in ("window", "document"):
            raise UnknownNameError("way to count tokens", self.every_in, ("window", "document"))
        for role in self.roles:
            if role not in ROLES:
                raise UnknownNameError("role", role, ROLES)
        for kind in self.kinds:
            if kind not in CONTENT_KINDS:
                raise UnknownNameError("kind of content", kind, CONTENT_KINDS)
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise InvalidInputError(f"The pattern {self.pattern!r} is no regular expression: {error}.") from error

    @property
    def keeps_all(self) -> bool:
        """Whether every token becomes a row."""
        return self == RowSelection(every_in=self.every_in)

    @property
    def settings(self) -> dict[str, Any] | None:
        """What the manifest keeps (JSON-able), None where all tokens are kept."""
        if self.keeps_all:
            return None
        settings = {**asdict(self), "roles": list(self.roles), "kinds": list(self.kinds)}
        return settings if self.kinds else {name: value for name, value in settings.items() if name != "kinds"}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any] | None) -> "RowSelection":
        """The selection that a manifest keeps."""
        return cls(**settings) if settings else cls()

    def chosen(self, tokens: WindowTokens, matches: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
        """Which of the tokens become rows (bool). `matches` says for token ids whether the pattern is found."""
        is_bos = (tokens.flags & RowFlag.BOS) > 0
        chosen = np.ones(len(tokens.token_id), bool)
        if self.skip_bos or self.every > 1 or self.pattern is not None or self.roles or self.kinds:
            chosen &= ~is_bos
        if self.skip_special:
            chosen &= (tokens.flags & RowFlag.SPECIAL) == 0
        if self.every > 1:
            in_window = tokens.position - bool(is_bos.any())
            number = in_window if self.every_in == "window" else tokens.document_position
            chosen &= number % self.every == 0
        if matches is not None:
            chosen &= matches(tokens.token_id)
        if self.roles:
            assert tokens.role is not None
            chosen &= np.isin(tokens.role, [ROLES.index(role) for role in self.roles])
        if self.kinds:
            assert tokens.kind is not None
            chosen &= np.isin(tokens.kind, [CONTENT_KINDS.index(kind) for kind in self.kinds])
        return chosen


class Choosing(NamedTuple):
    """A selection, and what a model must tell for it."""

    selection: RowSelection
    matches: Callable[[np.ndarray], np.ndarray] | None
    """Whether the pattern is found in each token's text (bool by token)."""
    encode_chats: Callable[[Sequence[Chat]], list[ChatTokens]] | None
    """Tokens of chats and what they are, where the text is chats."""
    encode_media: Callable[[Sequence[Document]], list[MediaTokens]] | None = None
    """Tokens of documents with media, where the text has any."""


def choosing_for(
    model: HookedModel, selection: RowSelection, chat_template: str | None, media: bool = False
) -> Choosing | None:
    """What the plan needs to choose rows with a model; None where every token of plain text is a row.

    Args:
        model: whose tokenizer it is.
        selection: which tokens become rows.
        chat_template: what chats are written with; None for plain text.
        media: whether documents may have images and sounds.
    """
    if selection.keeps_all and chat_template is None and not media:
        return None
    encode_chats, encode_media = None, None
    if media:

        def encode_media(documents: Sequence[Document]) -> list[MediaTokens]:
            return cast("MediaModel", model).encode_media(documents, chat_template)

    elif chat_template is not None:
        template = chat_template

        def encode_chats(chats: Sequence[Chat]) -> list[ChatTokens]:
            return model.encode_chats(chats, template)

    matches = None if selection.pattern is None else _Matcher(selection.pattern, model.token_texts)
    return Choosing(selection, matches, encode_chats, encode_media)


class _Matcher:
    """Whether a regular expression is found in tokens' texts; each token of the vocabulary is looked at once."""

    def __init__(self, pattern: str, token_texts: Callable[[Sequence[int]], list[str]]) -> None:
        self._pattern, self._token_texts = re.compile(pattern), token_texts
        self._known: dict[int, bool] = {}

    def __call__(self, token_ids: np.ndarray) -> np.ndarray:
        present, place = np.unique(token_ids, return_inverse=True)
        unknown = [token for token in present.tolist() if token not in self._known]
        for token, text in zip(unknown, self._token_texts(unknown) if unknown else (), strict=True):
            self._known[token] = self._pattern.search(text) is not None
        return np.array([self._known[token] for token in present.tolist()], bool)[place]
