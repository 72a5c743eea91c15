"""Two models with one tokenizer, and their activations on one text, row by row aligned.

1. Both models are loaded and their tokenizers compared by content (`tokenizer_hash`), before anything runs on a text:
   with other token ids the rows of the two would not be the same tokens.
2. Each is captured into a store of its own, in the same windows (`activations.capture`): in row groups, so that memory
   does not grow with the text, and resumed where it stopped. `AlignedStores` checks that the rows are the same tokens.
3. `paired_rows` reads both together, without BOS and other special tokens, with the group of documents of each row.
   What depends on documents is resampled by group: documents beyond 64 are joined, every 64th with the first.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from activations.capture import capture
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import TextSource
from scope.diffing.settings import ComparisonConfig
from scope.errors import InvalidInputError, MismatchError
from scope.kernels.tensors import as_tensor
from scope.models import LanguageModel
from scope.training.aligned import AlignedStores

__all__ = ["BASE", "MAX_GROUPS", "TUNED", "ModelPair", "PairedRows", "PairedStores", "capture_pair"]

BASE, TUNED = "base", "tuned"
"""What the two models' hooks are named by."""
MAX_GROUPS = 64
BATCH_ROWS = 1024
NORM_RATIO = 10.0
"""Rows whose norm is above so many times the median are sinks, which say nothing of the others."""
Progress = Callable[[str, int, int | None], None]
LEFT_OUT = RowFlag.BOS | RowFlag.SPECIAL


class ModelPair(NamedTuple):
    """A model and what was made of it; or any two with one tokenizer."""

    base: LanguageModel
    tuned: LanguageModel

    @classmethod
    def of(cls, base: LanguageModel, tuned: LanguageModel) -> "ModelPair":
        """The pair, if the two can be compared.

        Raises:
            MismatchError: their tokenizers differ.
        """
        if base.identity.tokenizer_hash != tuned.identity.tokenizer_hash:
            raise MismatchError(
                f"{base.name} and {tuned.name} have different tokenizers ({base.identity.tokenizer_hash[:12]} and "
                f"{tuned.identity.tokenizer_hash[:12]}), so that their rows are not the same tokens. Give two models "
                "with one tokenizer, such as a model and a fine-tuned copy of it."
            )
        return cls(base, tuned)

    def require_equal_stacks(self) -> tuple[str, ...]:
        """Names of the residual stream after each layer, of which both have as many, of one width.

        Raises:
            MismatchError: they have not.
        """
        sizes = [(model.n_layers, model.d_model) for model in self]
        if sizes[0] != sizes[1]:
            raise MismatchError(
                f"{self.base.name} has {sizes[0][0]} layers of width {sizes[0][1]}, {self.tuned.name} {sizes[1][0]} of "
                f"{sizes[1][1]}; only equal stacks are compared layer by layer. Set layer_tokens to 0 (--layer-tokens) "
                "to leave that out."
            )
        return tuple(f"blocks.{layer}.hook_resid_post" for layer in range(self.base.n_layers))

    def require_hook(self, hook: str) -> str:
        """The canonical name of a hook that both models have.

        Raises:
            UnknownNameError: one of them has no such hook; near misses are suggested.
            MismatchError: its rows have another width in the one than in the other.
        """
        name = self.base.resolve_hook(hook)
        self.tuned.resolve_hook(hook)
        widths = [int(np.prod(model.hook_shape(name))) for model in self]
        if widths[0] != widths[1]:
            raise MismatchError(
                f"{name} has {widths[0]:,} values in {self.base.name} and {widths[1]:,} in {self.tuned.name}; a "
                "comparison by feature needs the same width in both."
            )
        return name


class PairedRows(NamedTuple):
    """Some rows of both models."""

    rows: np.ndarray
    """Row ids, int64 `(n,)`."""
    base: Float[Tensor, "n width"]
    tuned: Float[Tensor, "n width"]
    groups: np.ndarray
    """Group of documents of each row, int64 `(n,)`."""
    sources: np.ndarray
    """Number of each row's source among `PairedStores.sources`, int64 `(n,)`."""
    within: Bool[Tensor, " n"]
    """Rows whose norm is at most ten times the median, in both models."""


class PairedStores:
    """Two stores of the same rows, read together.

    Args:
        stores: of the base model and of the other one.

    Raises:
        MismatchError: their rows are not the same tokens.
    """

    def __init__(self, base: ActivationStore, tuned: ActivationStore) -> None:
        self.base, self.tuned = base, tuned
        self.aligned = AlignedStores({BASE: base, TUNED: tuned})

    @cached_property
    def documents_of_sequences(self) -> np.ndarray:
        """Number of each window's document, int64."""
        return self.base.sequences()["document"].to_numpy(np.int64)

    @cached_property
    def sources(self) -> list[str]:
        """Names of the sources of the text, in alphabetical order."""
        return sorted({str(name) for name in self.base.documents()["source"]})

    @cached_property
    def _sources_of_documents(self) -> np.ndarray:
        return np.searchsorted(self.sources, self.base.documents()["source"].astype(str).to_numpy(str))

    @property
    def n_groups(self) -> int:
        """Groups of documents that are resampled."""
        return min(MAX_GROUPS, int(self.documents_of_sequences.max(initial=0)) + 1)

    def paired_rows(self, hook: str, device: torch.device | str = "cpu") -> Iterator[PairedRows]:
        """All rows of a hook but BOS and special ones, float32 and flattened, in order."""
        limits = [self._limit(store, hook) for store in (self.base, self.tuned)]
        names = (f"{BASE}:{hook}", f"{TUNED}:{hook}")
        for batch in self.aligned.batches(list(names), BATCH_ROWS):
            keep = (batch.flags & np.uint8(LEFT_OUT)) == 0
            if not keep.any():
                continue
            rows = batch.rows[keep]
            sequence = self.base.column("sequence", int(batch.rows[0]), int(batch.rows[-1]) + 1)[keep]
            within = np.logical_and(
                *(batch.norms[name][keep] <= limit for name, limit in zip(names, limits, strict=True))
            )
            base, tuned = (
                as_tensor(batch.activations[name], self.base.dtype, device)[torch.from_numpy(keep).to(device)]
                for name in names
            )
            documents = self.documents_of_sequences[sequence]
            yield PairedRows(
                rows,
                base.float().flatten(1),
                tuned.float().flatten(1),
                documents % self.n_groups,
                self._sources_of_documents[documents],
                torch.from_numpy(within).to(device),
            )

    def _limit(self, store: ActivationStore, hook: str) -> float:
        n = store.n_rows
        kept = (store.flags(0, n) & np.uint8(LEFT_OUT)) == 0
        norms = store.norms(hook, 0, n)[kept]
        if not len(norms):
            raise InvalidInputError("The text has no token but special ones; there is nothing to compare on.")
        return NORM_RATIO * float(np.median(norms))


def capture_pair(
    pair: ModelPair,
    text: TextSource,
    hooks: Sequence[str],
    folder: Path,
    config: ComparisonConfig,
    progress: Progress | None = None,
    base_folder: Path | None = None,
) -> PairedStores:
    """Capture both models on a text, one after the other.

    Args:
        pair: the models.
        text: where documents come from.
        hooks: names of the hooks, which both have.
        folder: where the two stores are put, `base.zarr` and `tuned.zarr`; a capture that stopped there goes on.
        config: tokens and windows.
        progress: called with (model's name, rows done, rows in all).
        base_folder: where the base model's store is put, or is found already; None for `folder`.
    """
    report = progress or (lambda which, done, total: None)
    stores = []
    for which, model in ((BASE, pair.base), (TUNED, pair.tuned)):
        found = capture(
            model,
            text,
            list(hooks),
            (base_folder if base_folder and which == BASE else folder) / f"{which}.zarr",
            max_tokens=config.tokens,
            context_size=min(config.context_size, model.max_context_size),
            progress=lambda done, total, which=which: report(which, done, total),  # type: ignore[misc]
        )
        stores.append(found.store)
    return PairedStores(*stores)
