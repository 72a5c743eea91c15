"""Several stores of the same text as one source, for crosscoders over models ("model diffing", Lindsey et al. 2024, 4).

Rows are aligned by number: the stores must hold the same windows, token for token, which is checked first. Their hooks
are named `NAME:HOOK`, with the name that each store was given here.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from activations.source import ActivationBatch
from activations.spec import StorageDtype
from activations.store import ActivationStore
from scope.errors import InvalidInputError, MismatchError, UnknownNameError

__all__ = ["AlignedStores"]

CHECK_ROWS = 2**18


class AlignedStores:
    """An `ActivationSource` over several stores whose rows are the same tokens.

    Args:
        stores: at least two, by the names that their hooks get.

    Raises:
        InvalidInputError: fewer than two stores, or a name with a colon.
        MismatchError: the stores differ in their tokens, in what is held out, or in the dtype of their activations.
    """

    def __init__(self, stores: Mapping[str, ActivationStore]) -> None:
        if len(stores) < 2 or any(not name or ":" in name for name in stores):
            raise InvalidInputError(
                f"Got stores named {', '.join(map(repr, stores)) or 'none'}; expected two or more, whose names are not "
                "empty and have no colon."
            )
        self.stores = dict(stores)
        self._first = next(iter(self.stores.values()))
        for name, store in list(self.stores.items())[1:]:
            self._require_same_rows(name, store)

    @property
    def hooks(self) -> tuple[str, ...]:
        return tuple(f"{name}:{hook}" for name, store in self.stores.items() for hook in store.hooks)

    @property
    def dtype(self) -> StorageDtype:
        return self._first.dtype

    @property
    def n_rows(self) -> int | None:
        return self._first.n_rows

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the stores' names and fingerprints."""
        named = "\n".join(f"{name} {store.fingerprint}" for name, store in self.stores.items())
        return hashlib.sha256(named.encode()).hexdigest()

    @property
    def spec(self) -> Any:
        """The first store's: text and windows are the same for all."""
        return self._first.spec

    def resolve_hook(self, name: str) -> str:
        """The name `STORE:HOOK` with the hook's canonical name; raises `UnknownNameError` with near misses."""
        which, _, hook = name.partition(":")
        if which not in self.stores:
            raise UnknownNameError("hook", name, self.hooks, hint=f"The source has: {', '.join(self.hooks)}.")
        return f"{which}:{self.stores[which].resolve_hook(hook)}"

    def hook_shape(self, name: str) -> tuple[int, ...]:
        which, _, hook = self.resolve_hook(name).partition(":")
        return self.stores[which].hook_shape(hook)

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        """As `ActivationSource.batches`; flags are the first store's."""
        wanted: dict[str, list[str]] = {}
        for name in hooks:
            which, _, hook = name.partition(":")
            wanted.setdefault(which, []).append(hook)
        streams = [self.stores[which].batches(names, batch_size, start) for which, names in wanted.items()]
        for parts in zip(*streams, strict=True):
            activations: dict[str, Any] = {}
            norms: dict[str, np.ndarray] = {}
            for which, part in zip(wanted, parts, strict=True):
                activations |= {f"{which}:{hook}": values for hook, values in part.activations.items()}
                norms |= {f"{which}:{hook}": values for hook, values in part.norms.items()}
            yield ActivationBatch(parts[0].rows, activations, parts[0].flags, norms)

    def sequences(self) -> Any:
        """The table of windows."""
        return self._first.sequences()

    def documents(self) -> Any:
        """The table of documents."""
        return self._first.documents()

    def document_at(self, row: int) -> Mapping[str, Any]:
        """The document that a row is of."""
        return self._first.document_at(row)

    def _require_same_rows(self, name: str, store: ActivationStore) -> None:
        first = self._first
        for what in ("n_rows", "dtype"):
            mine, other = getattr(first, what), getattr(store, what)
            if mine != other:
                raise MismatchError(
                    f"The store {name!r} has the {what} {other}, the first one {mine}. Capture both from the same "
                    "text, with the same windows and dtype."
                )
        for start in range(0, first.n_rows, CHECK_ROWS):
            stop = min(first.n_rows, start + CHECK_ROWS)
            mine, other = first.rows(start, stop), store.rows(start, stop)
            same = (mine.token_id == other.token_id) & (mine.flags == other.flags) & (mine.position == other.position)
            if not same.all():
                row = start + int(np.flatnonzero(~same)[0])
                raise MismatchError(
                    f"Row {row:,} of the store {name!r} is another token than in the first one. Capture both from the "
                    "same text, with the same tokenizer and windows."
                )
