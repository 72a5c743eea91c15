"""`MemoryActivations`: rows held in memory with their tokens and documents, for what is measured again and again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from activations.errors import InvalidInputError, UnknownNameError
from activations.source import ActivationBatch
from activations.spec import CaptureSpec, StorageDtype
from activations.store import TokenRows

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MemoryActivations"]


@dataclass(frozen=True)
class MemoryActivations:
    """Satisfies `ActivationSource`, and answers for tokens and documents as an `ActivationStore` does. Rows count
    from 0."""

    spec: CaptureSpec
    values: Mapping[str, np.ndarray]
    """Per hook `(n_rows, *feature_shape)` in the storage dtype (bfloat16 as uint16 bits)."""
    norms: Mapping[str, np.ndarray]
    """Per hook each row's L2 norm, float32."""
    tokens: TokenRows
    """The columns of all rows."""
    sequence_table: "pd.DataFrame"
    document_table: "pd.DataFrame"

    @property
    def hooks(self) -> tuple[str, ...]:
        return tuple(self.values)

    @property
    def dtype(self) -> StorageDtype:
        return self.spec.dtype

    @property
    def n_rows(self) -> int:
        return len(self.tokens.flags)

    def hook_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.values:
            raise UnknownNameError("hook", name, self.hooks)
        return tuple(self.values[name].shape[1:])

    def rows(self, start: int, stop: int) -> TokenRows:
        """Token columns of the rows `[start, stop)`."""
        return TokenRows(*(column[start:stop] for column in self.tokens))

    def sequences(self) -> "pd.DataFrame":
        """The windows: `sequence, document, start_row, n_rows, document_offset`."""
        return self.sequence_table

    def window_tokens(self, sequences: Sequence[int]) -> list[np.ndarray]:
        """All token ids of these windows, int32."""
        table = self.sequence_table.set_index("sequence")
        spans = ((int(table["start_row"][number]), int(table["n_rows"][number])) for number in sequences)
        return [self.tokens.token_id[start : start + n_rows] for start, n_rows in spans]

    def documents(self) -> "pd.DataFrame":
        """The documents: `document, title, source, language, license, extra, n_tokens, held_out`."""
        return self.document_table

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        """All rows from `start` in order (`ActivationSource`)."""
        if batch_size < 1:
            raise InvalidInputError(f"batch_size is {batch_size}; expected at least 1.")
        for first in range(start, self.n_rows, batch_size):
            part = slice(first, min(first + batch_size, self.n_rows))
            yield ActivationBatch(
                rows=np.arange(part.start, part.stop),
                activations={hook: self.values[hook][part] for hook in hooks},
                flags=self.tokens.flags[part],
                norms={hook: self.norms[hook][part] for hook in hooks},
            )
