"""The two narrow protocols of capture: what a model must offer, and what training and indexing consume.

Arrays on this side are numpy; bfloat16, which numpy lacks, travels as its bits in uint16. A live model may hand
over torch tensors instead: consumers convert with `scope.kernels.tensors.as_tensor`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from activations.chats import Chat, ChatTokens
from activations.documents import Document
from activations.media import MediaTokens, PlacedMedium
from activations.spec import StorageDtype

__all__ = [
    "ActivationBatch",
    "ActivationSource",
    "HookedModel",
    "MediaModel",
    "ModelIdentity",
    "PendingRows",
    "RowFlag",
    "bf16_to_float32",
    "float32_to_bf16",
]


class RowFlag(IntFlag):
    """Bits of the `flags` column (uint8)."""

    BOS = 1
    """The BOS token that starts a window."""
    SPECIAL = 2
    """Any other special token of the tokenizer."""
    IMAGE = 4
    """A soft token of an image."""
    AUDIO = 8
    """A soft token of a sound."""
    HELD_OUT = 16
    """A row of a held-out document: for metrics, never for training."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a store remembers of the model that filled it."""

    model: str
    revision: str | None
    weight_hash: str
    tokenizer_hash: str
    bos_token_id: int | None
    compute_dtype: str
    load_name: str | None = None
    """What the model was loaded as, so that it can be found again; no part of what identifies a store."""


class PendingRows(Protocol):
    """Activations on their way to the host."""

    def wait(self) -> Mapping[str, np.ndarray]:
        """Block until the copy is done. Per hook `(n_rows, *feature_shape)` in the storage dtype (bfloat16 as its
        uint16 bits), rows in the order of the windows, without padding; and per hook `norm/<hook>`, float32
        `(n_rows,)`: the L2 norm of the row over all feature dimensions, before rounding to the storage dtype."""
        ...


@runtime_checkable
class HookedModel(Protocol):
    """What `activations.capture` drives. `scope.models.LanguageModel` is one; tests use a fake without torch."""

    @property
    def identity(self) -> ModelIdentity: ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens, BOS included."""
        ...

    @property
    def max_context_size(self) -> int:
        """The longest window that the model takes, in tokens."""
        ...

    @property
    def default_batch_size(self) -> int:
        """Tokens at once, padding included, that the model runs fastest on its device."""
        ...

    @property
    def pads(self) -> bool:
        """Whether windows that run together are padded to the longest of them."""
        ...

    def known_hooks(self) -> Sequence[str]:
        """Names of all hooks, aliases among them."""
        ...

    def resolve_hook(self, name: str) -> str:
        """The canonical name of a hook; raises `UnknownNameError` with near misses."""
        ...

    def hook_shape(self, name: str) -> tuple[int, ...]:
        """Feature shape of one row at the hook: `(640,)` for a residual, `(n_heads, d_head)` for z."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32) of each text, without BOS or other added special tokens."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own way to write chats; None where it has none."""
        ...

    def encode_chats(self, chats: Sequence[Chat], template: str) -> list[ChatTokens]:
        """Token ids, roles and kinds of each chat as the template writes it, without the BOS that windows begin with.
        Raises `InvalidInputError` where the template fails, or does not let roles be told."""
        ...

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """What each token reads by itself; " the" with its space."""
        ...

    def forward_rows(
        self, windows: Sequence[np.ndarray], hooks: Sequence[str], dtype: StorageDtype, batch_size: int
    ) -> PendingRows:
        """Run the model over token windows (BOS included, lengths may differ) and keep what the hooks see.

        Args:
            windows: token ids of each window, int32 `(length,)`.
            hooks: canonical hook names.
            dtype: the storage dtype of the result.
            batch_size: tokens to run at once, at most (padding included); a single longer window runs alone.
        The result may depend on how windows are batched (rounding), never on what ran before.
        """
        ...


class MediaModel(HookedModel, Protocol):
    """A model that sees or hears, as capture drives it."""

    def processor_hash(self) -> str:
        """Digest (hex) of how media are prepared for the model. Raises `InvalidInputError` where it takes none."""
        ...

    def max_medium_tokens(self, kind: str, seconds: float) -> int:
        """The most tokens, markup included, that an image takes, or a sound of so many seconds. Raises
        `InvalidInputError` where the model takes no such medium, or none so long."""
        ...

    def encode_media(self, documents: Sequence[Document], template: str | None) -> list[MediaTokens]:
        """Token ids of documents with their media as the model's processor places them, without the BOS that windows
        begin with; chats are written with `template`. Raises `InvalidInputError` naming the document."""
        ...

    def forward_rows(
        self,
        windows: Sequence[np.ndarray],
        hooks: Sequence[str],
        dtype: StorageDtype,
        batch_size: int,
        media: Sequence[Sequence[PlacedMedium]] | None = None,
    ) -> PendingRows:
        """As of `HookedModel`, with the media of each window."""
        ...


class ActivationBatch(NamedTuple):
    """Some rows of a source."""

    rows: np.ndarray
    """Row ids, int64 `(n,)`: where in the store (or stream) each row stands."""
    activations: Mapping[str, Any]
    """Per hook `(n, *feature_shape)`, numpy in the storage dtype (bfloat16 as uint16 bits) or a torch tensor."""
    flags: np.ndarray
    """`RowFlag` bits, uint8 `(n,)`."""
    norms: Mapping[str, np.ndarray]
    """Per hook the row's L2 norm, float32 `(n,)`."""


@runtime_checkable
class ActivationSource(Protocol):
    """An iterator of activations with their row ids. Training and indexing never know which kind they got."""

    @property
    def hooks(self) -> tuple[str, ...]: ...

    @property
    def dtype(self) -> StorageDtype: ...

    @property
    def n_rows(self) -> int | None:
        """Rows that one pass yields, where that is known."""
        ...

    def hook_shape(self, name: str) -> tuple[int, ...]: ...

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        """All rows from row `start` in order, `batch_size` at a time (the last may be shorter); every row is
        yielded, BOS and held-out rows too: the consumer selects by `flags` and `norms`."""
        ...


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16, any shape) as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits (uint16), rounded to nearest even, as torch rounds; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
