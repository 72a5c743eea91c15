"""Text diffusion: what a model that fills in a canvas step by step must offer, and what is kept of it.

A prompt is a document: its text, `prefix`, stands before the gap. Two further columns make it one to be filled in the
middle: `suffix`, text behind the gap, and `gap`, how many tokens lie between.

Rows are (document, block, step, position): a *block* is a canvas that is denoised as a whole, a *step* one pass of the
model over it, from 0. A store's windows are (document, block, step), so that `position` counts from the canvas's start.
Besides the usual columns, where `token_id` is the token as it stood when the model read it, rows have

    step, block     as above
    state           what the token was, one of `STATES`
    final_id        the token that stands there in the end
    commit_step     the step at whose end it was committed for good; -1 where it never was (it was given, or filled in
                    when the steps ended)

A sampler commits a token when it takes what the model proposes, instead of noise or the mask. It may take it back, or,
as DiffusionGemma's does, take what is then proposed in its place at every further step; its final text is what the
model holds likeliest at the last one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np

from activations.documents import Document
from activations.errors import InvalidInputError
from activations.source import HookedModel
from activations.spec import StorageDtype

__all__ = [
    "DENOISING_COLUMNS",
    "STATES",
    "Canvas",
    "DenoisedBlock",
    "DenoisingModel",
    "DenoisingSettings",
    "canvas_of",
    "commit_steps",
    "states_of",
]

STATES: Final = ("prompt", "masked", "committing", "committed")
"""What a token of a canvas is when the model reads it, by its code in the `state` column (uint8): given; noise or the
mask; the same, and committed at the end of this very step; committed at the end of the step before."""
PROMPT, MASKED, COMMITTING, COMMITTED = range(4)
DENOISING_COLUMNS: Final = {
    "step": "int32",
    "block": "int32",
    "state": "uint8",
    "final_id": "int32",
    "commit_step": "int32",
}
"""The columns that rows have besides."""


@dataclass(frozen=True)
class DenoisingSettings:
    """How texts are generated. What is None is as the model's generation configuration says."""

    seed: int = 0
    """Document n is generated with the seed `seed + n`, n its place in the text source."""
    max_new_tokens: int | None = None
    """Tokens to generate; where canvases have a fixed length, rounded up to whole ones."""
    max_steps: int | None = None
    """Steps for a canvas, at most."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InvalidInputError(f"seed is {self.seed}; expected 0 or more.")
        for name in ("max_new_tokens", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is {value}; expected at least 1, or None for the model's own.")

    @property
    def described(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class Canvas(NamedTuple):
    """What is to be filled in."""

    prefix: np.ndarray
    """int32: tokens before the gap, BOS included."""
    suffix: np.ndarray
    """int32: tokens behind it; empty where the text is to be continued."""
    gap: int
    """Tokens between them; 0 where there is no suffix."""


class DenoisedBlock(NamedTuple):
    """One canvas from its first step to its last."""

    block: int
    offset: int
    """Tokens of the text before it, prompt included."""
    tokens: np.ndarray
    """int32 `(n_steps, length)`: what the model read at each step."""
    accepted: np.ndarray
    """bool `(n_steps, length)`: whether the sampler took the token that the model proposed, at the end of the step."""
    given: np.ndarray
    """bool `(length,)`: whether the token is the prompt's."""
    final: np.ndarray
    """int32 `(length,)`."""
    values: Mapping[str, np.ndarray]
    """Per hook `(n_steps * length, *feature_shape)` in the storage dtype (bfloat16 as its uint16 bits), step by step;
    per `norm/<hook>` float32 `(n_steps * length,)`."""


@runtime_checkable
class DenoisingModel(HookedModel, Protocol):
    """A `HookedModel` that fills in canvases in a generation loop of its own."""

    def denoising_configuration(self, settings: DenoisingSettings) -> Mapping[str, Any]:
        """All that the loop goes by, JSON-able: sampler, schedule, stopping.

        Raises:
            InvalidInputError: the model does not denoise, or has no loop for it.
        """
        ...

    def require_canvas(self, canvas: Canvas, settings: DenoisingSettings) -> None:
        """Raise `InvalidInputError` if the model cannot fill this in."""
        ...

    def denoise(
        self, canvas: Canvas, settings: DenoisingSettings, seed: int, hooks: Sequence[str], dtype: StorageDtype
    ) -> Sequence[DenoisedBlock]:
        """Generate, and keep what the hooks see at every step. The same seed gives the same bytes."""
        ...


def canvas_of(document: Document, model: HookedModel) -> Canvas:
    """The canvas of a document: its text, and its columns `suffix` and `gap` where it has them.

    Raises:
        InvalidInputError: there is one of these without the other, or `gap` is no number of tokens.
    """
    suffix_text, gap_text = document.extra.get("suffix", ""), document.extra.get("gap")
    name = document.title or document.text[:40]
    if bool(suffix_text) != (gap_text is not None):
        raise InvalidInputError(
            f"The prompt {name!r} has a {'suffix' if suffix_text else 'gap'} alone; to fill in the middle give both, "
            "suffix (text, up to 1,000 characters) and gap (tokens between)."
        )
    if gap_text is not None and not (gap_text.isdecimal() and int(gap_text) > 0):
        raise InvalidInputError(
            f"The prompt {name!r} has the gap {gap_text!r}; expected a number of tokens, 1 or more."
        )
    bos = model.identity.bos_token_id
    prefix, suffix = model.encode_documents([document.text, suffix_text])
    if bos is not None and not (len(prefix) and prefix[0] == bos):
        prefix = np.insert(prefix, 0, bos)
    return Canvas(prefix.astype(np.int32), suffix.astype(np.int32), int(gap_text or 0))


def states_of(accepted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Codes in `STATES`, uint8 `(n_steps, length)`, of `DenoisedBlock.accepted` and `DenoisedBlock.given`."""
    before = np.concatenate([np.zeros_like(accepted[:1]), accepted[:-1]])
    states = np.where(before, COMMITTED, np.where(accepted, COMMITTING, MASKED))
    return np.where(given, PROMPT, states).astype(np.uint8)


def commit_steps(accepted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """int32 `(length,)`: the first step from which on the token was accepted to the end; -1 where there is none, or
    the token was given."""
    kept = np.logical_and.accumulate(accepted[::-1], axis=0).sum(axis=0)
    return np.where((kept > 0) & ~given, len(accepted) - kept, -1).astype(np.int32)
