"""The first phase of a build, from activations to committed segments.

1. Take a batch from the source; leave out BOS and special tokens.
2. Refuse what is not finite, encode the rest, and turn feature activations into firing strengths,
   `value x ||W_dec row||`, rounded to bfloat16.
3. Sort each row's firings by strength and gather them until a segment is full.
4. Commit the segment in a thread beside the next batches.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.source import ActivationBatch
from scope.errors import NonFiniteError
from scope.features.firings import RowFirings, sort_rows
from scope.features.layout import ROW_COLUMNS
from scope.features.segments import Segment, SegmentLog
from scope.kernels.tensors import as_tensor

__all__ = ["NonFiniteRowError", "encode_rows", "encode_segments", "firing_strengths"]

MAX_SEGMENT_ROWS = 2**24


class _Part(NamedTuple):
    """An encoded batch."""

    firings: RowFirings
    columns: dict[str, np.ndarray]
    n_indexed: int


class NonFiniteRowError(NonFiniteError):
    """An activation or a feature is NaN or infinite on one of the rows that were to be encoded."""

    def __init__(self, row: int) -> None:
        super().__init__(f"An activation or a feature on row {row:,} of those to encode is NaN or infinite.")
        self.row = row


def firing_strengths(
    sae: Any, x: Float[Tensor, "n d_in"], norms: Float[Tensor, " d_sae"]
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Feature ids and firing strengths, rounded to bfloat16, of activations; `norms` are the SAE's decoder norms."""
    ids, values = sae.encode_sparse(x)
    return ids, (values.float() * norms[ids.long()]).to(torch.bfloat16)


@torch.inference_mode()
def encode_rows(sae: Any, x: Float[Tensor, "n d_in"], norms: Float[Tensor, " d_sae"]) -> RowFirings:
    """The firings of activations, in index order.

    Raises:
        NonFiniteRowError: an activation or a feature is NaN or infinite.
    """
    # A sum is finite where all terms are (or enormous); three times as fast as asking each entry.
    finite = torch.isfinite(x.sum(dim=1, dtype=torch.float32))
    ids, strengths = firing_strengths(sae, x.to(norms.device), norms)
    finite &= torch.isfinite(strengths).all(dim=1).to(finite.device)
    if not bool(finite.all()):
        raise NonFiniteRowError(int((~finite).nonzero()[0]))
    return sort_rows(ids.cpu().numpy(), strengths.view(torch.uint16).cpu().numpy(), sae.d_sae)


def encode_segments(
    source: Any,
    hook: str,
    sae: Any,
    log: SegmentLog,
    n_rows: int,
    *,
    exclude: int,
    batch_size: int,
    segment_firings: int,
    progress: Callable[[int], None],
) -> None:
    """Index the rows from the last committed one to `n_rows`.

    Args:
        hook: the source's name of the SAE's hook.
        log: where segments go.
        exclude: `RowFlag` bits of rows on which no firing is kept.
        batch_size: rows to encode at once.
        segment_firings: firings of a segment, at least (the last one has what is left).
        progress: told the rows done.
    """
    norms = sae.decoder_norms
    pending: list[_Part] = []
    with ThreadPoolExecutor(1, "segment") as thread:
        committing: Future[Segment] | None = None
        try:
            for batch in _batches(source, hook, batch_size, log.n_rows, n_rows):
                pending.append(_encode_batch(source, hook, sae, norms, batch, exclude))
                if _is_full(pending, segment_firings):
                    if committing is not None:
                        committing.result()
                    full, pending = pending, []
                    committing = thread.submit(_commit, log, full)
                progress(int(batch.rows[-1]) + 1)
        finally:
            # Also when interrupted: what is encoded is kept.
            if committing is not None:
                committing.result()
            if pending:
                _commit(log, pending)


def _is_full(parts: "list[_Part]", segment_firings: int) -> bool:
    held = sum(len(part.firings.features) for part in parts)
    return held >= segment_firings or sum(len(part.firings.counts) for part in parts) >= MAX_SEGMENT_ROWS


def _batches(source: Any, hook: str, batch_size: int, start: int, stop: int) -> Iterator[ActivationBatch]:
    if start >= stop:
        return
    for batch in source.batches([hook], batch_size, start):
        assert int(batch.rows[0]) == start, "a source yields its rows in order"
        if start + len(batch.rows) > stop:
            kept = slice(0, stop - start)
            yield ActivationBatch(batch.rows[kept], {hook: batch.activations[hook][kept]}, batch.flags[kept], {})
            return
        yield batch
        start += len(batch.rows)
        if start == stop:
            return


def _encode_batch(source: Any, hook: str, sae: Any, norms: Tensor, batch: ActivationBatch, exclude: int) -> _Part:
    start, n = int(batch.rows[0]), len(batch.rows)
    indexed = np.flatnonzero(batch.flags & exclude == 0)
    x = as_tensor(batch.activations[hook], source.dtype, norms.device)
    x = (x if len(indexed) == n else x[torch.from_numpy(indexed).to(x.device)]).flatten(1)
    try:
        firings = encode_rows(sae, x, norms) if len(indexed) else _nothing()
    except NonFiniteRowError as error:
        raise NonFiniteError(_where(source, hook, start + int(indexed[error.row]))) from error
    counts = np.zeros(n, np.int64)
    counts[indexed] = firings.counts
    rows = source.rows(start, start + n)
    columns = {name: getattr(rows, name) for name in ROW_COLUMNS}
    return _Part(RowFirings(counts, firings.features, firings.values), columns, len(indexed))


def _nothing() -> RowFirings:
    return RowFirings(np.zeros(0, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.uint16))


def _commit(log: SegmentLog, parts: list[_Part]) -> Segment:
    firings = RowFirings(*map(np.concatenate, zip(*(part.firings for part in parts), strict=True)))
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in ROW_COLUMNS}
    return log.commit(firings, columns, sum(part.n_indexed for part in parts))


def _where(source: Any, hook: str, row: int) -> str:
    sequence = int(source.rows(row, row + 1).sequence[0])
    sequences, documents = source.sequences(), source.documents()
    document = int(sequences.loc[sequences["sequence"] == sequence, "document"].iloc[0])
    title = str(documents.loc[documents["document"] == document, "title"].iloc[0])
    return (
        f"A NaN or an infinity at {hook}, row {row:,}, in document {document} ({title!r}): either the activation is "
        "not finite (capture it again; float16 overflows where bfloat16 does not) or the SAE made it so."
    )
