"""How good an SAE is, on held-out text.

Sums are accumulated in float64. BOS rows are left out everywhere. Intervals are 95% percentile intervals from
resampling documents, never tokens, with replacement.

`reconstruction_metrics` (one pass over a source):

    fvu               sum ‖x - x_hat‖² / sum ‖x - mean(x)‖²  over rows with ‖x‖ at most ten times the median norm
    fvu_all           the same over all rows: a few sinks carry most of that variance
    l0                features that fire (value > 0) on a row, on average
    dead_share        share of features without a firing on the rows looked at
    over_dense_share  share of features that fire on more than 10% of the rows
    cosine            mean of x·x_hat / ‖x‖‖x_hat‖

A transcoder's x_hat and x are of what it writes. With several outputs (crosscoders, cross-layer transcoders) fvu is
the mean of the outputs' own, each about its own mean, and a row counts as within the norm if it is at every output.

The mean is that of the rows that the sum runs over. dead_share is a statement about as many rows as were looked at:
below a million it says little, and the count is reported beside it.

`delta_ce` (three forward passes over windows of tokens), with CE the mean loss of predicting the next token:

    delta_ce          CE_sae - CE            CE_sae: x_hat in place of x
    ce_recovered      (CE_mean - CE_sae) / (CE_mean - CE)    CE_mean: the mean activation in place of x

A transcoder's output takes the place of what it writes; a cross-layer transcoder's outputs those of all its layers,
each from what its layers read in the model so changed (`scope.interventions.splice_edits`). For a crosscoder there is
no such figure: it reconstructs hooks that follow from one another.

BOS rows pass through untouched; the share of rows that the SAE covers is reported.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.shuffle import Selection, ShuffledBatches
from activations.source import ActivationSource, RowFlag
from scope.errors import InvalidInputError, MismatchError
from scope.kernels.tensors import as_tensor
from scope.saes.base import SAE, Port, Ports
from scope.training.data import EXCLUDED, resolve_hook, side_by_side, width_of
from scope.training.tally import Interval, ReconstructionMetrics, Tally, bootstrap

__all__ = [
    "CrossEntropyMetrics",
    "ReconstructionMetrics",
    "bootstrap",
    "delta_ce",
    "mean_activation",
    "output_hooks",
    "reconstruction_metrics",
]

NORM_RATIO = 10.0
MEMORY_BYTES = 2**26
"""Activations held in memory to draw rows at random."""


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
    """Share of the rows that were replaced; the others, BOS, passed through."""
    n_tokens: int
    """Tokens predicted."""

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-able."""
        return self._asdict()


@torch.no_grad()
def reconstruction_metrics(
    sae: SAE,
    source: ActivationSource,
    hook: str | None = None,
    *,
    documents: Int[np.ndarray, " n_rows"] | None = None,
    held_out_only: bool = True,
    max_rows: int | None = None,
    batch_size: int = 4096,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> ReconstructionMetrics:
    """How well an SAE reconstructs the held-out rows of a source. The rows are read twice: for their norms, and again.

    Args:
        sae: takes raw activations.
        source: a store, or anything else that satisfies `ActivationSource`.
        hook: the name of the hook that is read; None takes the SAE's. Other hooks are the SAE's own.
        documents: the document of each row of the source, for the interval. None: asked of the source where it can say.
        held_out_only: False measures on every row but BOS.
        max_rows: look at so many rows, drawn at random; None for all.
        batch_size: rows at once.
        seed: of the draw and of the bootstrap.
        progress: called with (rows looked at, rows in all).

    Raises:
        UnknownNameError: the source has no such hook.
        MismatchError: the hook has another width than the SAE.
        InvalidInputError: no row is left to measure on.
    """
    ports = _ports_in(sae, source, hook)
    names = [str(port.hook) for side in ports for port in side]
    held_out = RowFlag.HELD_OUT if held_out_only else RowFlag(0)
    selection = Selection(exclude_flags=RowFlag.BOS, require_flags=held_out)
    batches = ShuffledBatches(
        source, names, batch_size, seed, passes=1, tokens=max_rows, select=selection, memory_bytes=MEMORY_BYTES
    )
    outputs = ports.outputs or ports.inputs
    norms = [[values[str(port.hook)].norm(dim=-1) for port in outputs] for _, values in _float_rows(batches, source)]
    n_rows = sum(len(part[0]) for part in norms)
    if not n_rows:
        raise InvalidInputError(
            f"No row of {', '.join(names)} is left to measure on; held_out_only is {held_out_only}."
        )
    limits = [NORM_RATIO * float(torch.cat(of_one).median()) for of_one in zip(*norms, strict=True)]
    tally = Tally(sae, limits, documents if documents is not None else _documents_of(source))
    for rows, values in _float_rows(batches, source):
        x = side_by_side(values, ports.inputs).to(sae.device)
        tally.add(rows, x, side_by_side(values, ports.outputs).to(sae.device) if ports.outputs else x)
        if progress:
            progress(tally.n_rows, n_rows)
    return tally.result(seed)


def _ports_in(sae: SAE, source: ActivationSource, hook: str | None) -> Ports:
    """The SAE's ports with their names in a source; raises `MismatchError` where a width is another."""
    sides = []
    for side in sae.cfg.ports:
        found: list[Port] = []
        for port in side:
            name = resolve_hook(
                source, hook if hook and len(sae.cfg.ports.inputs) == 1 and not found else port.hook or ""
            )
            width = width_of(source, name)[0]
            if width != port.width:
                raise MismatchError(f"{name} has a width of {width:,}; the SAE expects {port.width:,}.")
            found.append(Port(name, width))
        hook = None  # it names the input
        sides.append(tuple(found))
    return Ports(*sides)


@torch.no_grad()
def mean_activation(
    source: ActivationSource,
    hook: str,
    *,
    max_norm_ratio: float | None = NORM_RATIO,
    max_rows: int | None = None,
    batch_size: int = 8192,
) -> Float[Tensor, " d_in"]:
    """The mean of the rows that an SAE is trained on (no BOS, special, held-out or outlier rows), or of `max_rows` of
    them; float32."""
    name = resolve_hook(source, hook)
    selection = Selection(exclude_flags=EXCLUDED, max_norm_ratio=max_norm_ratio)
    total, n = torch.zeros(width_of(source, name)[0], dtype=torch.float64), 0
    batches = ShuffledBatches(
        source, [name], batch_size, 0, passes=1, tokens=max_rows, select=selection, memory_bytes=MEMORY_BYTES
    )
    for _, values in _float_rows(batches, source):
        x = values[name]
        total += x.sum(dim=0, dtype=torch.float64)
        n += len(x)
    return (total / n).float()


@runtime_checkable
class LossModel(Protocol):
    """What `delta_ce` asks of a model; `scope.models.LanguageModel` is one."""

    @property
    def bos_token_id(self) -> int | None: ...

    def cross_entropy(
        self, windows: Sequence[np.ndarray], edits: Mapping[str, Any] | None = None
    ) -> Sequence[np.ndarray]:
        """Per window the loss of predicting each token but the first, in nats."""
        ...


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
    from scope.interventions import set_, splice_edits

    if not windows:
        raise InvalidInputError("There are no windows to measure on.")
    spliced = splice_edits(sae, keep_bos=True)
    written = output_hooks(sae)
    means = mean if isinstance(mean, Mapping) else {written[0]: mean}
    ablated = {hook: set_(hook, means[hook].to(sae.device).reshape(-1), keep_bos=True) for hook in written}
    edits: list[dict[str, Any] | None] = [None, dict(spliced), dict(ablated)]
    sums = np.zeros((len(windows), 4))
    sums[:, 3] = [len(window) - 1 for window in windows]
    for number, edit in enumerate(edits):
        sums[:, number] = [losses.sum(dtype=np.float64) for losses in model.cross_entropy(windows, edit)]
        if progress:
            progress(number + 1, len(edits))
    ce, ce_sae, ce_mean = (float(value) for value in sums[:, :3].sum(axis=0) / sums[:, 3].sum())
    n_rows = sum(len(window) for window in windows)
    n_bos = sum(int(window[0]) == model.bos_token_id for window in windows)
    by_document = _sums_by(sums, documents) if documents is not None else None
    return CrossEntropyMetrics(
        ce=ce,
        ce_sae=ce_sae,
        ce_mean=ce_mean,
        delta_ce=ce_sae - ce,
        delta_ce_interval=bootstrap(_delta, by_document, seed) if by_document is not None else None,
        ce_recovered=(ce_mean - ce_sae) / (ce_mean - ce),
        ce_recovered_interval=bootstrap(_recovered, by_document, seed) if by_document is not None else None,
        covered_share=1 - n_bos / n_rows,
        n_tokens=int(sums[:, 3].sum()),
    )


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


def _float_rows(batches: ShuffledBatches, source: ActivationSource) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    for rows, values in batches:
        yield rows, {name: as_tensor(part, source.dtype).float().flatten(1) for name, part in values.items()}


def _documents_of(source: ActivationSource) -> np.ndarray | None:
    if not hasattr(source, "sequences"):
        return None
    table = source.sequences().sort_values("start_row")
    return np.repeat(table["document"].to_numpy(), table["n_rows"].to_numpy())
