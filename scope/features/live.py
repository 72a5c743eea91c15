"""A live model as a source to index: `LiveActivations` with the tokens and documents that an index keeps.

1. The text is planned once, without the model, to learn how many rows there are and of which documents.
2. The model runs in one pass for all hooks (`LiveActivations.batches`). Beside it the plan is gone through again, and
   gives the token columns of the rows that the model is at; no more than a row group of them is held.

The index is that of the store which a capture of one hook with the same settings makes: row n is row n.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from activations.chats import CHAT_COLUMNS
from activations.plan import TOKEN_COLUMNS
from activations.source import ActivationBatch
from activations.store import TokenRows
from scope.errors import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd

    from activations.plan import PlannedGroup

__all__ = ["PlannedText", "indexable"]


def indexable(source: Any) -> Any:
    """The source itself, or a live one with its tokens and documents."""
    return source if hasattr(source, "rows") else PlannedText(source)


class PlannedText:
    """A live source, with what `build_index` asks of a store.

    Args:
        live: a `scope.models.live.LiveActivations`.
    """

    def __init__(self, live: Any) -> None:
        import pandas as pd

        self._live = live
        self.hooks, self.dtype, self.spec = live.hooks, live.dtype, live.spec
        self.manifest = {"chats": live.chats}
        self.token_columns = TOKEN_COLUMNS if live.chats is None else TOKEN_COLUMNS | CHAT_COLUMNS
        tables: dict[str, dict[str, list[Any]]] = {"sequences": {}, "documents": {}}
        self.n_rows = 0
        for plan in live.plans():
            self.n_rows = plan.row_stop
            for name, table in tables.items():
                for column, values in getattr(plan, name).items():  # no document need begin in a row group
                    table.setdefault(column, []).extend(values)
        if self.n_rows == 0:
            raise InvalidInputError(f"There is no text in {', '.join(live.text_names)} to index.")
        self._tables = {name: pd.DataFrame(table) for name, table in tables.items()}
        self._plans: Iterator[PlannedGroup] = iter(())
        self._held: dict[str, np.ndarray] = {}
        self._start = self._stop = 0
        self._lock = threading.Lock()

    def fingerprint_of(self, hook: str) -> str:
        """The fingerprint of the store that a capture of this hook alone makes."""
        return str(self._live.store_fingerprint([hook]))

    def hook_shape(self, name: str) -> tuple[int, ...]:
        """Feature shape of a row."""
        return tuple(self._live.hook_shape(name))

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        """As `ActivationSource.batches`."""
        batches: Iterator[ActivationBatch] = self._live.batches(hooks, batch_size, start)
        return batches

    def sequences(self) -> "pd.DataFrame":
        """The windows, as `ActivationStore.sequences`; what `max_tokens` cuts off is no row of a window."""
        table = self._tables["sequences"].copy()
        table["n_rows"] = table["n_rows"].clip(upper=self.n_rows - table["start_row"])
        return table

    def documents(self) -> "pd.DataFrame":
        """The documents, as `ActivationStore.documents`."""
        return self._tables["documents"].copy()

    def rows(self, start: int, stop: int) -> TokenRows:
        """Token columns of the rows `[start, stop)`. Cheap where `start` does not go back. Safe across threads."""
        with self._lock:
            held = self._hold(start, stop)
            return TokenRows(**{name: self._held[name][held] for name in TOKEN_COLUMNS})

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """As `rows`, one of the `token_columns`."""
        with self._lock:
            held = self._hold(start, stop)
            return self._held[name][held]

    def _hold(self, start: int, stop: int) -> slice:
        """Have some rows in memory, and say where."""
        if start < self._start or not self._held:
            self._plans, self._held, self._start, self._stop = self._live.plans(), {}, 0, 0
        while self._stop < stop:
            self._take(next(self._plans), start)
        return slice(start - self._start, stop - self._start)

    def _take(self, plan: "PlannedGroup", start: int) -> None:
        """Hold a row group too, and let go of what comes before `start`."""
        if plan.row_stop <= start:
            self._held = {name: np.empty(0, dtype) for name, dtype in self.token_columns.items()}
            self._start = plan.row_stop
        else:
            kept = max(0, min(start, self._stop) - self._start)
            for name in self.token_columns:
                earlier = self._held.get(name, np.empty(0, plan.columns[name].dtype))[kept:]
                self._held[name] = np.concatenate([earlier, plan.columns[name]])
            self._start += kept
        self._stop = plan.row_stop
