"""The first phase of a build, from activations to committed segments, for one SAE or several in one pass.

1. Take a block of rows from the source: `batch_size` of them, always from a multiple of `batch_size` on and filled up
   with zeros at the end of the text. So a row is encoded among the same rows in the same shape whatever was done
   before, and a build that was interrupted, or an index that grew, has the bits of one that was made at once.
2. Each SAE encodes it and turns feature activations into firing strengths, `value x ||W_dec row||`, in bfloat16.
3. A thread, beside the next block: refuse what is not finite, sort each row's firings by strength, set apart what lies
   on BOS and special tokens, gather the rest until a segment is full, and commit it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from activations.source import ActivationBatch
from scope.errors import NonFiniteError
from scope.features.firings import RowFirings, sort_rows
from scope.features.layout import ROW_COLUMNS
from scope.features.segments import LeftOut, SegmentLog
from scope.kernels.tensors import as_tensor

__all__ = ["Encoder", "NonFiniteRowError", "encode_rows", "encode_segments", "firing_strengths"]

MAX_SEGMENT_ROWS = 2**24
BLOCKS_AHEAD = 2
"""Blocks of each SAE that may wait for the thread that sorts and commits."""


class _Strengths(NamedTuple):
    """A block as an SAE encoded it, on the host."""

    ids: np.ndarray
    """`(n, k)`."""
    values: np.ndarray
    """bfloat16 bits, uint16 `(n, k)`."""
    finite: np.ndarray
    """bool `(n,)`."""


class _Part(NamedTuple):
    """The rows of a block, sorted."""

    firings: RowFirings
    columns: dict[str, np.ndarray]
    n_indexed: int
    left_out: LeftOut


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


def encode_rows(sae: Any, x: Float[Tensor, "n d_in"], norms: Float[Tensor, " d_sae"]) -> RowFirings:
    """The firings of activations, in index order.

    Raises:
        NonFiniteRowError: an activation or a feature is NaN or infinite.
    """
    return _sorted(_encoded(sae, x, norms), sae.d_sae)


@torch.inference_mode()
def _encoded(sae: Any, x: Tensor, norms: Tensor) -> _Strengths:
    # A sum is finite where all terms are (or enormous); three times as fast as asking each entry.
    finite = torch.isfinite(x.sum(dim=1, dtype=torch.float32))
    ids, strengths = firing_strengths(sae, x.to(norms.device), norms)
    finite &= torch.isfinite(strengths).all(dim=1).to(finite.device)
    return _Strengths(ids.cpu().numpy(), strengths.view(torch.uint16).cpu().numpy(), finite.cpu().numpy())


def _sorted(block: _Strengths, d_sae: int) -> RowFirings:
    if not block.finite.all():
        raise NonFiniteRowError(int(np.flatnonzero(~block.finite)[0]))
    return sort_rows(block.ids, block.values, d_sae)


class Encoder:
    """One SAE's part in a pass over a text: encodes blocks and commits their firings.

    Args:
        hook: the source's name of the SAE's hook.
        sae: the dictionary.
        log: where segments go.
        exclude: `RowFlag` bits of rows on which no firing is kept.
    """

    def __init__(self, hook: str, sae: Any, log: SegmentLog, exclude: int) -> None:
        self.hook, self.log = hook, log
        self.n_rows = log.n_rows
        """Rows that are encoded, committed or not."""
        self._sae, self._norms, self._exclude = sae, sae.decoder_norms, exclude
        self._pending: list[_Part] = []
        self._failed = False

    def encode(self, batch: ActivationBatch, dtype: Any, batch_size: int) -> _Strengths:
        """What fires on the rows of a block that are not encoded yet."""
        x = as_tensor(batch.activations[self.hook], dtype, self._norms.device).flatten(1)
        n, known = len(x), self.n_rows - int(batch.rows[0])
        if n < batch_size:
            x = functional.pad(x, (0, 0, 0, batch_size - n))
        block = _encoded(self._sae, x, self._norms)
        self.n_rows += n - known
        return _Strengths(*(part[known:n] for part in block))

    def take(
        self,
        block: _Strengths,
        columns: dict[str, np.ndarray],
        segment_firings: int,
        where: Callable[[int], str],
    ) -> None:
        """Sort a block and commit a segment if it is full. Blocks that follow one which failed are dropped."""
        if self._failed:
            return
        try:
            self._pending.append(self._part(block, columns))
            held = sum(len(part.firings.features) for part in self._pending)
            rows = sum(len(part.firings.counts) for part in self._pending)
            if held >= segment_firings or rows >= MAX_SEGMENT_ROWS:
                self.flush()
        except NonFiniteRowError as error:
            self._failed = True
            raise NonFiniteError(where(error.row)) from error
        except BaseException:
            self._failed = True
            raise

    def flush(self) -> None:
        """Commit what is sorted, unless an earlier block failed."""
        parts, self._pending = self._pending, []
        if self._failed or not parts:
            return
        self.log.commit(
            RowFirings(*map(np.concatenate, zip(*(part.firings for part in parts), strict=True))),
            {name: np.concatenate([part.columns[name] for part in parts]) for name in self.log.columns},
            sum(part.n_indexed for part in parts),
            LeftOut(*map(np.concatenate, zip(*(part.left_out for part in parts), strict=True))),
        )

    def _part(self, block: _Strengths, columns: dict[str, np.ndarray]) -> _Part:
        firings = _sorted(block, self._sae.d_sae)
        excluded = columns["flags"] & self._exclude != 0
        apart = np.repeat(excluded, firings.counts)
        left_out = LeftOut(firings.features[apart], firings.values[apart])
        counts = np.where(excluded, 0, firings.counts)
        kept = RowFirings(counts, firings.features[~apart], firings.values[~apart])
        return _Part(kept, columns, int((~excluded).sum()), left_out)


def encode_segments(
    source: Any,
    encoders: Sequence[Encoder],
    n_rows: int,
    *,
    batch_size: int,
    segment_firings: int,
    progress: Callable[[], None],
) -> None:
    """Index the rows from each SAE's last committed one to `n_rows`, in one pass over the source.

    Args:
        source: gives the activations and the rows' columns.
        encoders: the SAEs' parts.
        n_rows: rows of the index.
        batch_size: rows to encode at once.
        segment_firings: firings of the segments that are held at once, all SAEs together.
        progress: called after each block.
    """
    waiting: deque[Future[None]] = deque()
    each = max(1, segment_firings // max(1, len(encoders)))
    with ThreadPoolExecutor(1, "segment") as thread:
        try:
            for batch in _blocks(source, encoders, batch_size, n_rows):
                start, stop = int(batch.rows[0]), int(batch.rows[-1]) + 1
                rows = source.rows(start, stop)
                for encoder in encoders:
                    if encoder.n_rows >= stop:
                        continue
                    first = encoder.n_rows
                    columns = {name: np.asarray(getattr(rows, name))[first - start :] for name in ROW_COLUMNS}
                    for name in encoder.log.columns.keys() - columns.keys():
                        columns[name] = np.asarray(source.column(name, first, stop))
                    block = encoder.encode(batch, source.dtype, batch_size)
                    where = _Where(source, encoder.hook, first)
                    waiting.append(thread.submit(encoder.take, block, columns, each, where))
                while len(waiting) > BLOCKS_AHEAD * len(encoders) or (waiting and waiting[0].done()):
                    waiting.popleft().result()
                progress()
            while waiting:
                waiting.popleft().result()
        finally:
            # Also when interrupted: what is encoded is kept.
            for future in waiting:
                future.exception()
            for encoder in encoders:
                encoder.flush()


def _blocks(source: Any, encoders: Sequence[Encoder], batch_size: int, stop: int) -> Iterator[ActivationBatch]:
    """Blocks from the first that some SAE lacks rows of to row `stop`, which cuts the last one."""
    first = min((encoder.n_rows for encoder in encoders), default=stop)
    if first >= stop:
        return
    start = first // batch_size * batch_size
    hooks = sorted({encoder.hook for encoder in encoders})
    for batch in source.batches(hooks, batch_size, start):
        assert int(batch.rows[0]) == start, "a source yields its rows in order"
        assert len(batch.rows) == batch_size or start + len(batch.rows) >= stop, "only the last block is shorter"
        if start + len(batch.rows) > stop:
            kept = slice(0, stop - start)
            activations = {hook: batch.activations[hook][kept] for hook in hooks}
            batch = ActivationBatch(batch.rows[kept], activations, batch.flags[kept], {})
        yield batch
        start += len(batch.rows)
        if start == stop:
            return


class _Where:
    """Says where a row of a block is, for an error's message."""

    def __init__(self, source: Any, hook: str, start: int) -> None:
        self._source, self._hook, self._start = source, hook, start

    def __call__(self, place: int) -> str:
        source, row = self._source, self._start + place
        sequence = int(source.rows(row, row + 1).sequence[0])
        sequences, documents = source.sequences(), source.documents()
        document = int(sequences.loc[sequences["sequence"] == sequence, "document"].iloc[0])
        title = str(documents.loc[documents["document"] == document, "title"].iloc[0])
        return (
            f"A NaN or an infinity at {self._hook}, row {row:,}, in document {document} ({title!r}): either the "
            "activation is not finite (capture it again; float16 overflows where bfloat16 does not) or the SAE made "
            "it so."
        )
