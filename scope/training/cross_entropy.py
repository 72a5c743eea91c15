"""What splicing an SAE into its model costs, in cross-entropy on held-out windows.

With CE the mean loss of predicting the next token,

    delta_ce          CE_sae - CE            CE_sae: x_hat in place of x
    ce_recovered      (CE_mean - CE_sae) / (CE_mean - CE)    CE_mean: the mean activation in place of x

A transcoder's output takes the place of what it writes; a cross-layer transcoder's outputs those of all its layers,
each from what its layers read in the model so changed (`scope.interventions.splice_edits`). For a crosscoder there is
no such figure: it reconstructs hooks that follow from one another.

BOS and other special tokens, on which no SAE is trained, pass through untouched; the share of rows that the SAE covers
is reported.

`SplicedLosses` runs the model once as it is and once with the mean, and then once for each dictionary that is measured.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError
from scope.saes.base import SAE
from scope.training.tally import Interval, bootstrap

if TYPE_CHECKING:
    from scope.interventions import Edit

__all__ = ["CrossEntropyMetrics", "LossModel", "SplicedLosses", "delta_ce", "output_hooks", "sparing_special"]


class CrossEntropyMetrics(NamedTuple):
    """See the module's docstring for the definitions. All losses in nats per token."""

    ce: float
    """Of the model as it is."""
    ce_sae: float
    """With the SAE's reconstruction spliced in."""
    ce_mean: float
    """With the mean activation in its place."""
    delta_ce: float
    delta_ce_interval: Interval | None
    """95% interval of `delta_ce`; None without documents."""
    ce_recovered: float
    ce_recovered_interval: Interval | None
    covered_share: float
    """Share of the rows that were replaced; the others, BOS and other special tokens, passed through."""
    n_tokens: int
    """Tokens predicted."""

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-able."""
        return self._asdict()


@runtime_checkable
class LossModel(Protocol):
    """What `delta_ce` asks of a model; `scope.models.LanguageModel` is one."""

    @property
    def special_token_ids(self) -> Collection[int]:
        """Those of BOS and other special tokens."""
        ...

    def cross_entropy(
        self, windows: Sequence[np.ndarray], edits: Mapping[str, Any] | None = None
    ) -> Sequence[np.ndarray]:
        """Per window the loss of predicting each token but the first, in nats."""
        ...


class SplicedLosses:
    """Losses on some windows, of the model as it is and with the mean in place; `of` measures one dictionary more.

    Args:
        model: the model that the dictionaries read.
        windows: token ids of held-out windows, BOS included.
        means: by hook, the mean activation at each hook that the dictionaries write.
        documents: the document of each window, for the intervals.
        seed: of the bootstrap.
        progress: called with (passes done, passes in all).
        n_passes: passes in all, for `progress`.

    Raises:
        InvalidInputError: there are no windows.
    """

    def __init__(
        self,
        model: LossModel,
        windows: Sequence[Int[np.ndarray, " _"]],
        means: Mapping[str, Float[Tensor, " d_in"]],
        *,
        documents: Sequence[int] | None = None,
        seed: int = 0,
        progress: Callable[[int, int | None], None] | None = None,
        n_passes: int = 3,
    ) -> None:
        from scope.interventions import set_

        if not windows:
            raise InvalidInputError("There are no windows to measure on.")
        self.model, self.windows, self.documents, self.seed = model, windows, documents, seed
        self._progress, self._done, self._n_passes = progress or (lambda done, total: None), 0, n_passes
        self._plain = self._sums({})
        ablated = {hook: set_(hook, mean.reshape(-1), keep_bos=True) for hook, mean in means.items()}
        self._mean = self._sums(sparing_special(ablated, model.special_token_ids))
        special = np.isin(np.concatenate(list(windows)), sorted(model.special_token_ids))
        self._covered = 1 - float(special.mean())

    @property
    def n_tokens(self) -> int:
        """Tokens predicted."""
        return sum(len(window) - 1 for window in self.windows)

    def of(self, sae: SAE) -> CrossEntropyMetrics:
        """What splicing this dictionary in costs.

        Raises:
            InvalidInputError: it names no hook, or is a crosscoder.
        """
        from scope.interventions import splice_edits

        return self._metrics(self._sums(sparing_special(splice_edits(sae), self.model.special_token_ids)))

    def of_mean(self) -> CrossEntropyMetrics:
        """What the mean in its place costs, from the pass that was made for all: nothing is recovered."""
        return self._metrics(self._mean)

    def _metrics(self, spliced: np.ndarray) -> CrossEntropyMetrics:
        predicted = np.array([len(window) - 1 for window in self.windows], dtype=np.float64)
        sums = np.stack([self._plain, spliced, self._mean, predicted], axis=1)
        ce, ce_sae, ce_mean = (float(value) for value in sums[:, :3].sum(axis=0) / predicted.sum())
        by_document = _sums_by(sums, self.documents) if self.documents is not None else None
        return CrossEntropyMetrics(
            ce=ce,
            ce_sae=ce_sae,
            ce_mean=ce_mean,
            delta_ce=ce_sae - ce,
            delta_ce_interval=bootstrap(_delta, by_document, self.seed) if by_document is not None else None,
            ce_recovered=(ce_mean - ce_sae) / (ce_mean - ce),
            ce_recovered_interval=bootstrap(_recovered, by_document, self.seed) if by_document is not None else None,
            covered_share=self._covered,
            n_tokens=self.n_tokens,
        )

    def _sums(self, edits: Mapping[str, Any]) -> np.ndarray:
        """Each window's summed loss."""
        sums = [losses.sum(dtype=np.float64) for losses in self.model.cross_entropy(self.windows, edits or None)]
        self._done += 1
        self._progress(self._done, self._n_passes)
        return np.array(sums, dtype=np.float64)


def delta_ce(
    model: LossModel,
    sae: SAE,
    windows: Sequence[Int[np.ndarray, " _"]],
    mean: Float[Tensor, " d_in"] | Mapping[str, Float[Tensor, " d_in"]],
    *,
    documents: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> CrossEntropyMetrics:
    """What splicing an SAE into the model costs.

    Args:
        model: the model that the SAE reads.
        sae: takes raw activations at its `hook_name`.
        windows: token ids of held-out windows, BOS included.
        mean: the mean activation at the hook that is written, such as `mean_activation` gives; by hook where several.
        documents: the document of each window, for the intervals.
        seed: of the bootstrap.
        progress: called with (passes done, 3).

    Raises:
        InvalidInputError: there are no windows, the SAE names no hook, or it is a crosscoder.
    """
    from scope.interventions import splice_edits

    splice_edits(sae)  # refuses what cannot be spliced, before any pass
    means = mean if isinstance(mean, Mapping) else {output_hooks(sae)[0]: mean}
    on_device = {hook: means[hook].to(sae.device) for hook in output_hooks(sae)}
    losses = SplicedLosses(model, windows, on_device, documents=documents, seed=seed, progress=progress)
    return losses.of(sae)


def sparing_special(edits: "Mapping[str, Edit]", special_token_ids: Collection[int]) -> "dict[str, Edit]":
    """The edits, by hook, of which those that leave BOS as it is do so with all special tokens."""
    ids = torch.tensor(sorted(special_token_ids), dtype=torch.int64)

    def sparing(edit: "Edit") -> "Edit":
        def function(value: Tensor, context: Any) -> Tensor:
            special = torch.isin(context.tokens.long(), ids.to(context.tokens.device)).to(value.device)
            new = edit.function(value, context).to(value.dtype)
            return torch.where(special.view(*special.shape, *[1] * (value.ndim - 2)), value, new)

        return replace(edit, function=function) if edit.keep_bos else edit

    return {hook: sparing(edit) for hook, edit in edits.items()}


def output_hooks(sae: SAE) -> list[str]:
    """The hooks that an SAE reconstructs."""
    return [str(port.hook) for port in sae.cfg.ports.outputs or sae.cfg.ports.inputs]


def _delta(sums: np.ndarray) -> np.ndarray:
    return (sums[:, 1] - sums[:, 0]) / sums[:, 3]


def _recovered(sums: np.ndarray) -> np.ndarray:
    return (sums[:, 2] - sums[:, 1]) / (sums[:, 2] - sums[:, 0])


def _sums_by(sums: np.ndarray, documents: Sequence[int]) -> np.ndarray:
    ids, codes = np.unique(np.asarray(documents), return_inverse=True)
    total = np.zeros((len(ids), sums.shape[1]))
    np.add.at(total, codes, sums)
    return total
