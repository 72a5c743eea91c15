"""Text to token ids, and token ids to what a person reads.

A token is a run of bytes of the text. Mostly these are whole characters; in byte-level vocabularies (GPT-2, Llama 3)
and with byte fallback (Gemma) a character may be spread over several tokens. Such a token shows the whole character
and which share of it the token is: "é" spread over two tokens reads "é ¹⁄₂", "é ²⁄₂".
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from scope.errors import InvalidInputError, OutOfRangeError

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["TokenReader", "TokenText", "prompt_ids"]

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass(frozen=True)
class TokenText:
    """A token as it stands in a text. The `new_text`s of a text's tokens, joined, are the text."""

    id: int
    text: str
    """All characters that the token has a byte of, spaces kept. Bytes that are no text are shown as <0x9C>."""
    new_text: str
    """The characters that begin in this token."""
    part: tuple[int, int] | None
    """(k, n): the token is the k-th of n tokens that share a character. None where all its characters are whole."""
    special: bool
    """A special token, such as <bos>."""

    @property
    def display(self) -> str:
        """The text, followed by the share of a character where the token is one: "é ¹⁄₂"."""
        if self.part is None:
            return self.text
        k, n = self.part
        return f"{self.text} {str(k).translate(SUPERSCRIPT)}⁄{str(n).translate(SUBSCRIPT)}"


class TokenReader:
    """Reads the tokens of one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        special_ids: ids of its special tokens.
    """

    def __init__(self, tokenizer: Any, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids
        self._n_tokens = len(tokenizer)
        self._added = frozenset(tokenizer.added_tokens_decoder)
        steps = str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
        self._byte_level = _byte_level_alphabet() if "ByteLevel" in steps else None

    def token_strings(self, ids: Sequence[int]) -> list[TokenText]:
        """Each token of a text, in the light of its neighbours.

        Raises:
            OutOfRangeError: an id that the vocabulary does not have.
        """
        return texts_of(ids, [self._bytes_of(token) for token in ids], self._special)

    def vocabulary_strings(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself: Gemma's `▁the` is " the", bytes that are no text are shown as <0x9C>."""
        return ["".join(character for *_, character in _characters(self._bytes_of(token))) for token in ids]

    def _bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        token = int(token)
        if not 0 <= token < self._n_tokens:
            raise OutOfRangeError(f"Token id {token} is out of range: the vocabulary has {self._n_tokens:,} tokens.")
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a hole in the vocabulary
            return f"<{token}>".encode()
        if token in self._special or (token in self._added and self._byte_level):
            return piece.encode()
        if self._byte_level:
            return bytes(self._byte_level[character] for character in piece)
        byte = BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def texts_of(ids: Sequence[int], pieces: Sequence[bytes], special_ids: frozenset[int]) -> list[TokenText]:
    """The tokens of a text, given the bytes that each stands for."""
    characters = _characters(b"".join(pieces))
    owners = [owner for owner, piece in enumerate(pieces) for _ in piece]
    texts: list[list[str]] = [[] for _ in pieces]
    new: list[list[str]] = [[] for _ in pieces]
    parts: dict[int, tuple[int, int]] = {}
    for start, stop, character in characters:
        sharers = sorted(set(owners[start:stop]))
        new[sharers[0]].append(character)
        for k, owner in enumerate(sharers, start=1):
            texts[owner].append(character)
            if len(sharers) > 1:
                parts.setdefault(owner, (k, len(sharers)))
    return [
        TokenText(token, "".join(text), "".join(begun), parts.get(i), token in special_ids)
        for i, (token, text, begun) in enumerate(zip(map(int, ids), texts, new, strict=True))
    ]


def _characters(content: bytes) -> list[tuple[int, int, str]]:
    """(start, stop, character) of each character of some bytes; a byte that is no part of one stands alone."""
    characters = []
    at = 0
    while at < len(content):
        width = _utf8_width(content[at])
        try:
            characters.append((at, at + width, content[at : at + width].decode()))
        except UnicodeDecodeError:
            width = 1
            characters.append((at, at + 1, f"<0x{content[at]:02X}>"))
        at += width
    return characters


def _utf8_width(first: int) -> int:
    if first >= 0xF0:
        return 4
    if first >= 0xE0:
        return 3
    return 2 if first >= 0xC0 else 1


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE (as in OpenAI's GPT-2 encoder)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


def prompt_ids(model: "LanguageModel", prompt: str | Sequence[Any] | Int[Tensor, " seq"]) -> Int[Tensor, " seq"]:
    """Token ids of a prompt; see `LanguageModel.prompt_tokens`."""
    if isinstance(prompt, str):
        tokens = model.tokenize(prompt) if prompt else torch.empty(0, dtype=torch.int64)
    elif len(prompt) and isinstance(prompt[0], Mapping):
        tokens = _chat_ids(model, prompt)
    else:
        tokens = torch.as_tensor(prompt)
    if len(tokens) == 0:
        raise InvalidInputError("The prompt is empty.")
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InvalidInputError(
            "A prompt is a text, a list of chat messages, or token ids in one dimension; "
            f"got {tokens.dtype} of shape {tuple(tokens.shape)}."
        )
    if len(tokens) > model.max_context_size:
        raise InvalidInputError(
            f"The prompt has {len(tokens):,} tokens, {model.name} takes {model.max_context_size:,}. Shorten it."
        )
    wrong = tokens[(tokens < 0) | (tokens >= model.d_vocab)]
    if len(wrong):
        raise OutOfRangeError(f"Token id {int(wrong[0])} is out of range: the model has {model.d_vocab:,} tokens.")
    return tokens.to(torch.int64)


def _chat_ids(model: "LanguageModel", messages: Any) -> Tensor:
    if not model.tokenizer.chat_template:
        raise InvalidInputError(f"The tokenizer of {model.name} has no chat template; give the prompt as a text.")
    text = model.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return model.tokenize(text)
