"""Text to token ids, and token ids to what a person reads.

A token is a run of bytes of the text. Mostly these are whole characters; in byte-level vocabularies (GPT-2, Llama 3)
and with byte fallback (Gemma) a character may be spread over several tokens. Such a token shows the whole character
and which share of it the token is: "é" spread over two tokens reads "é ¹⁄₂", "é ²⁄₂".
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, OutOfRangeError
from scope.models.chats import own_template, written_prompt
from scope.models.token_text import BYTE_TOKEN, TokenText, characters_of, texts_of

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["TokenReader", "TokenText", "prompt_ids", "reader_of", "special_ids"]


class TokenReader:
    """Reads the tokens of one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        special_ids: ids of its special tokens.
        d_vocab: rows of the model's embedding, which may be more than the tokenizer has tokens: tables are padded.
    """

    def __init__(self, tokenizer: Any, special_ids: frozenset[int], d_vocab: int = 0) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids
        self._n_tokens = max(len(tokenizer), d_vocab)
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
        return ["".join(character for *_, character in characters_of(self._bytes_of(token))) for token in ids]

    def _bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        token = int(token)
        if not 0 <= token < self._n_tokens:
            raise OutOfRangeError(f"Token id {token} is out of range: the vocabulary has {self._n_tokens:,} tokens.")
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a hole in the vocabulary, or behind its end
            return f"<{token}>".encode()
        if token in self._special or (token in self._added and self._byte_level):
            return piece.encode()
        if self._byte_level:
            return bytes(self._byte_level[character] for character in piece)
        byte = BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def reader_of(model: str, revision: str | None = None, expected_hash: str | None = None) -> TokenReader:
    """What reads a model's tokens; the model's weights are not loaded.

    Args:
        model: its name, as `LanguageModel.load` takes it.
        revision: of a model from the hub.
        expected_hash: the digest of the tokenizer that the tokens are of, `ModelIdentity.tokenizer_hash`.

    Raises:
        UnknownNameError, InvalidInputError, MissingDependencyError: as `scope.models.loading.find_model`.
        MismatchError: the model has another tokenizer.
    """
    from transformers import AutoTokenizer

    from scope.models.identity import tokenizer_hash
    from scope.models.loading import find_model, quiet_transformers

    folder = find_model(model, revision).folder
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if expected_hash is not None and tokenizer_hash(folder, tokenizer) != expected_hash:
        raise MismatchError(f"{model} has another tokenizer than the one that these tokens are of.")
    return TokenReader(tokenizer, special_ids(tokenizer))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of a tokenizer's special tokens, BOS included."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE (as in OpenAI's GPT-2 encoder)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


def prompt_ids(
    model: "LanguageModel", prompt: str | Sequence[Any] | Int[Tensor, " seq"], chat_template: str | None = None
) -> Int[Tensor, " seq"]:
    """Token ids of a prompt; see `LanguageModel.prompt_tokens`."""
    is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if chat_template is not None and not is_chat:
        raise InvalidInputError("A chat template was given, but the prompt is no list of chat messages.")
    if isinstance(prompt, str):
        tokens = model.tokenize(prompt) if prompt else torch.empty(0, dtype=torch.int64)
    elif is_chat:
        tokens = _chat_ids(model, prompt, chat_template)
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


def _chat_ids(model: "LanguageModel", messages: Any, template: str | None) -> Tensor:
    template = template or own_template(model.tokenizer)
    if not template:
        raise InvalidInputError(
            f"The tokenizer of {model.name} has no chat template; give one (chat_template), or the prompt as a text."
        )
    return model.tokenize(written_prompt(model.tokenizer, messages, template))
