"""How good an SAE is, on held-out text.

Sums are accumulated in float64. BOS and other special tokens, on which no SAE is trained, are left out everywhere: of
rows, and of what is replaced for the cross-entropy. Intervals are 95% percentile intervals from
resampling documents, never tokens, with replacement.

`reconstruction_metrics` (one pass over a source; the cross-entropy is in `scope.training.cross_entropy`):

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
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.shuffle import Selection, ShuffledBatches
from activations.source import ActivationSource, RowFlag
from scope.errors import InvalidInputError, MismatchError
from scope.kernels.tensors import as_tensor
from scope.saes.base import SAE, Port, Ports
from scope.training.cross_entropy import CrossEntropyMetrics, delta_ce, output_hooks
from scope.training.data import EXCLUDED, resolve_hook, side_by_side, width_of
from scope.training.tally import ReconstructionMetrics, Tally, bootstrap

__all__ = [
    "CrossEntropyMetrics",
    "ReconstructionMetrics",
    "bootstrap",
    "delta_ce",
    "mean_activation",
    "measure_all",
    "output_hooks",
    "reconstruction_metrics",
]

NORM_RATIO = 10.0
MEMORY_BYTES = 2**26
"""Activations held in memory to draw rows at random."""


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
        held_out_only: False measures on every row but BOS and other special tokens.
        max_rows: look at so many rows, drawn at random; None for all.
        batch_size: rows at once.
        seed: of the draw and of the bootstrap.
        progress: called with (rows looked at, rows in all).

    Raises:
        UnknownNameError: the source has no such hook.
        MismatchError: the hook has another width than the SAE.
        InvalidInputError: no row is left to measure on.
    """
    found = measure_all(
        {"": sae},
        source,
        hook,
        documents=documents,
        held_out_only=held_out_only,
        max_rows=max_rows,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return found[""]


@torch.no_grad()
def measure_all(
    saes: Mapping[str, SAE],
    source: ActivationSource,
    hook: str | None = None,
    *,
    documents: Int[np.ndarray, " n_rows"] | None = None,
    held_out_only: bool = True,
    max_rows: int | None = None,
    batch_size: int = 4096,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, ReconstructionMetrics]:
    """As `reconstruction_metrics`, for several that read and write the same hooks, from the same passes."""
    ports = _ports_in(next(iter(saes.values())), source, hook)
    names = [str(port.hook) for side in ports for port in side]
    held_out = RowFlag.HELD_OUT if held_out_only else RowFlag(0)
    selection = Selection(exclude_flags=RowFlag.BOS | RowFlag.SPECIAL, require_flags=held_out)
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
    documents = documents if documents is not None else _documents_of(source)
    tallies = {name: Tally(sae, limits, documents) for name, sae in saes.items()}
    done = 0
    for rows, values in _float_rows(batches, source):
        for tally in tallies.values():
            x = side_by_side(values, ports.inputs).to(tally.sae.device)
            tally.add(rows, x, side_by_side(values, ports.outputs).to(tally.sae.device) if ports.outputs else x)
        done += len(rows)
        if progress:
            progress(done, n_rows)
    return {name: tally.result(seed) for name, tally in tallies.items()}


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


def _float_rows(batches: ShuffledBatches, source: ActivationSource) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    for rows, values in batches:
        yield rows, {name: as_tensor(part, source.dtype).float().flatten(1) for name, part in values.items()}


def _documents_of(source: ActivationSource) -> np.ndarray | None:
    if not hasattr(source, "sequences"):
        return None
    table = source.sequences().sort_values("start_row")
    return np.repeat(table["document"].to_numpy(), table["n_rows"].to_numpy())
