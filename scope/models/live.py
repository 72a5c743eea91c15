"""`LiveActivations`: a model and a text as an `ActivationSource`. Nothing is written to a disk.

1. The text is planned as for a store (`activations.plan`): the same windows, rows, row ids and flags.
2. A thread runs the model on one row group after the other, with the same batches as a capture, so that row n is bit
   for bit the row n of a store that is captured with the same settings. Rows are gathered on the model's device.
3. Rows are looked through for NaN and Inf before anybody gets them, as a capture does.
4. What the consumer gets lies on `device`: where that is the model's, no row leaves the GPU; another GPU gets its rows
   by a copy on a side stream while the model goes on.

The model is one row group ahead of the consumer: with the one that is consumed and the one that is computed, three
groups are in memory, 3 x 128 MiB for each hook at most; `rows_per_group` makes them smaller. On a GPU it is four: the
next group is launched before the results of one are looked at, so that the GPU does not wait.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from activations.capture import check_numbers, resolved_hooks, row_choice, spec_of
from activations.layout import identity_fingerprint
from activations.memory import MemoryActivations
from activations.passes import windowing_of
from activations.plan import TOKEN_COLUMNS, PlannedGroup
from activations.selection import choosing_for
from activations.source import ActivationBatch
from activations.spec import DTYPE_BYTES, CaptureSpec, StorageDtype, require_sizes
from activations.store import TokenRows
from activations.text import Document, TextSource, is_held_out
from scope.errors import InvalidInputError, OutOfRangeError, UnknownNameError
from scope.models.row_groups import PlannedWindows, RowGroup, RowGroups, on_host, planned
from scope.models.rows import HostCopy

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["LiveActivations"]

HELD_OUT_ROWS = 2**13


class LiveActivations:
    """What the hooks of a model see on a text, computed when it is asked for; satisfies `ActivationSource`.

    Each `batches` runs the model again.

    Args:
        model: the model.
        text: where documents come from.
        hooks: names of the hooks that may be asked for; all of them are computed in one pass. A * stands for every
            layer.
        context_size: tokens in a window, BOS included.
        dtype: of the activations.
        max_tokens: rows in all, BOS included; None for all of the text.
        batch_size: tokens that the model runs at once, padding included; None for what a capture takes by default.
        rows_per_group: rows that are computed together, a power of two; None for what a store would have.
        device: where the activations shall lie, such as the trainer's; None leaves them on the model's device.
        chat_template: what writes chats, a Jinja template; None for the tokenizer's own.

    Raises:
        InvalidInputError: a setting makes no sense, the text is empty, or nothing says how to write its chats.
        UnknownNameError: there is no such file, column or hook.
    """

    def __init__(
        self,
        model: "LanguageModel",
        text: TextSource,
        hooks: Sequence[str],
        *,
        context_size: int = 256,
        dtype: StorageDtype = "bfloat16",
        max_tokens: int | None = None,
        batch_size: int | None = None,
        rows_per_group: int | None = None,
        device: str | torch.device | None = None,
        chat_template: str | None = None,
    ) -> None:
        check_numbers(max_tokens, batch_size)
        require_sizes(context_size, dtype, rows_per_group)
        if text.has_media:
            raise InvalidInputError(
                "Images and sounds cannot be streamed; capture them into a store, which keeps them and their places."
            )
        text.check()
        text.require_text()
        self._rows = row_choice(model, text, None, None, chat_template, adopt=False)
        self.model, self.text, self.max_tokens = model, text, max_tokens
        self._shapes, self._aliases = resolved_hooks(model, hooks)
        self._rows_per_group = rows_per_group
        self.spec = spec_of(model, self._shapes, context_size, dtype, rows_per_group)
        self.batch_size = model.default_batch_size if batch_size is None else batch_size
        self.device = _device(device, model.device)

    @property
    def chats(self) -> Mapping[str, Any] | None:
        """Of chats: the template that writes them, and the names of the codes in their columns; as a store has it."""
        chats: Mapping[str, Any] | None = self._rows.identity["chats"]
        return chats

    @property
    def hooks(self) -> tuple[str, ...]:
        """Canonical names."""
        return tuple(sorted(self._shapes))

    @property
    def dtype(self) -> StorageDtype:
        return self.spec.dtype

    @property
    def n_rows(self) -> int | None:
        """Not known before the text has been read."""
        return None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the store that a capture with these settings makes: its rows are the same."""
        return self.store_fingerprint(self.hooks)

    def store_fingerprint(self, hooks: Sequence[str]) -> str:
        """The fingerprint of such a store of only some of the hooks."""
        names = sorted(map(self.resolve_hook, hooks))
        shapes = {hook: self._shapes[hook] for hook in names}
        spec = spec_of(self.model, shapes, self.spec.context_size, self.dtype, self._rows_per_group)
        settings = {"text": self.text.described, "max_tokens": self.max_tokens, "hooks_at_creation": names}
        return identity_fingerprint({"spec": asdict(spec), **settings, **self._rows.identity})

    @property
    def text_names(self) -> list[str]:
        """What the text is, for people."""
        return list(self.text.names)

    def resolve_hook(self, name: str) -> str:
        """The canonical name of one of the source's hooks; raises with near misses."""
        name = self._aliases.get(name, name)
        if name not in self._shapes:
            raise UnknownNameError("hook", name, self.hooks, hint="(in this source)")
        return name

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[self.resolve_hook(name)]

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        """All rows from row `start` in order, `batch_size` at a time; see `ActivationSource`.

        Rows before `start` are tokenised again, but not computed.

        Raises:
            NonFiniteError: a NaN or an Inf; hook, row and document are named.
        """
        if batch_size < 1:
            raise InvalidInputError(f"batch_size is {batch_size}; expected at least 1.")
        names = {hook: self.resolve_hook(hook) for hook in hooks}
        pieces: list[ActivationBatch] = []
        n_rows = 0
        for group in self._groups(start):
            whole = _as_batch(group, names, start)
            first = 0
            while first < len(whole.rows):
                piece = _part(whole, slice(first, first + batch_size - n_rows))
                pieces.append(piece)
                first, n_rows = first + len(piece.rows), n_rows + len(piece.rows)
                if n_rows == batch_size:
                    yield _joined(pieces)
                    pieces, n_rows = [], 0
        if pieces:
            yield _joined(pieces)

    def plans(self) -> Iterator[PlannedGroup]:
        """The row groups of the text with their token columns, windows and documents; the model does not run."""
        return (item.plan for item in self._planned())

    def has_held_out(self) -> bool:
        """Whether any document of the text is held out (about one title in ten is)."""
        return any(is_held_out(document) and document.text.strip() for document in self.text.documents())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all hooks, in the storage dtype."""
        return sum(map(math.prod, self._shapes.values())) * DTYPE_BYTES[self.dtype]

    def held_out(self, max_rows: int = HELD_OUT_ROWS) -> MemoryActivations:
        """The first rows of the held-out documents, BOS included, in memory. The model runs on nothing else.

        Raises:
            InvalidInputError: no document is held out.
        """
        source = self._held_out_alone(max_rows)
        return _in_memory(
            source.spec, source.hooks, [(g.plan, {**on_host(g.values), **g.figures}) for g in source._groups()]
        )

    def held_out_tokens(self, max_rows: int = HELD_OUT_ROWS) -> MemoryActivations:
        """The same rows' tokens, windows and documents, and no hook. The model does not run.

        Raises:
            InvalidInputError: no document is held out.
        """
        source = self._held_out_alone(max_rows)
        return _in_memory(source.spec, (), [(plan, {}) for plan in source.plans()])

    def _held_out_alone(self, max_rows: int) -> "LiveActivations":
        if not self.has_held_out():
            raise InvalidInputError(
                f"No document of {', '.join(self.text.names)} is held out (one title in ten is); give more text."
            )
        given = {field.name: getattr(self.text, field.name) for field in fields(self.text)}
        return LiveActivations(
            self.model,
            _HeldOutText(**given),
            self.hooks,
            context_size=self.spec.context_size,
            dtype=self.dtype,
            max_tokens=max_rows,
            batch_size=self.batch_size,
            rows_per_group=self.spec.rows_per_group,
            device="cpu",
            chat_template=self._rows.chat_template,
        )

    def document_at(self, row: int) -> dict[str, Any]:
        """The document that a row belongs to: its number, title and further columns. The text is tokenised up to it.

        Raises:
            OutOfRangeError: there is no such row.
        """
        last: dict[str, Any] = {}
        for plan, _ in self._planned() if row >= 0 else ():
            starts = zip(plan.sequences["start_row"], plan.sequences["document"], strict=True)
            begun = [document for start, document in starts if start <= row]
            if begun:  # else the row is of the window that began in an earlier group
                last = _records(plan.documents).get(begun[-1], last)
            if row < plan.row_stop:
                return last
        raise OutOfRangeError(f"There is no row {row:,} in this text.")

    def __repr__(self) -> str:
        return f"LiveActivations({self.model.name!r}, {', '.join(self.text.names)}, hooks {', '.join(self.hooks)})"

    def _planned(self) -> Iterator[PlannedWindows]:
        windowing = windowing_of(self.spec, self.model, self.text, self.max_tokens)
        choosing = choosing_for(self.model, self._rows.selection, self._rows.chat_template)
        return planned(self.text, self.model.encode_documents, windowing, choosing)

    def _groups(self, start: int = 0) -> Iterator[RowGroup]:
        """Row groups from the one with row `start` on."""
        shapes = {hook: self._shapes[hook] for hook in self.hooks}
        groups = RowGroups(self.model, shapes, self.dtype, self.batch_size, self.device, self.document_at)
        return groups.stream(item for item in self._planned() if item.plan.row_stop > start)


class _HeldOutText(TextSource):
    """A text whose documents are empty but for those that are held out; empty ones have no rows."""

    def documents(self, start: int = 0) -> Iterator[Document]:
        for document in super().documents(start):
            yield document if is_held_out(document) else replace(document, text="")


def _in_memory(
    spec: CaptureSpec, hooks: Sequence[str], groups: Sequence[tuple[PlannedGroup, Mapping[str, np.ndarray]]]
) -> MemoryActivations:
    import pandas as pd

    plans = [plan for plan, _ in groups]

    def table(name: str) -> pd.DataFrame:
        parts = [getattr(plan, name) for plan in plans]  # some may be empty: no document need begin in a row group
        return pd.DataFrame({column: [value for part in parts for value in part[column]] for column in parts[0]})

    def joined(name: str) -> np.ndarray:
        return np.concatenate([values[name] for _, values in groups])

    columns = {name: np.concatenate([plan.columns[name] for plan in plans]) for name in TOKEN_COLUMNS}
    return MemoryActivations(
        spec=spec,
        values={hook: joined(hook) for hook in hooks},
        norms={hook: joined(f"norm/{hook}") for hook in hooks},
        tokens=TokenRows(**columns),
        sequence_table=table("sequences"),
        document_table=table("documents"),
    )


def _device(wanted: str | torch.device | None, of_model: torch.device) -> torch.device:
    """The device that is meant, with its index: "cuda" alone is the model's, where that is on a GPU."""
    device = of_model if wanted is None else torch.device(wanted)
    is_models = device.type == of_model.type and device.index is None
    return of_model if is_models else device


def _as_batch(group: RowGroup, names: Mapping[str, str], start: int) -> ActivationBatch:
    """The rows of a group from row `start` on, under the names that were asked for."""
    plan, found, figures = group
    values: Mapping[str, Any] = found.wait() if isinstance(found, HostCopy) else found
    whole = ActivationBatch(
        rows=np.arange(plan.row_start, plan.row_stop),
        activations={hook: values[name] for hook, name in names.items()},
        flags=plan.columns["flags"],
        norms={hook: figures[f"norm/{name}"] for hook, name in names.items()},
    )
    return _part(whole, slice(max(0, start - plan.row_start), None))


def _part(batch: ActivationBatch, part: slice) -> ActivationBatch:
    return ActivationBatch(
        rows=batch.rows[part],
        activations={hook: values[part] for hook, values in batch.activations.items()},
        flags=batch.flags[part],
        norms={hook: values[part] for hook, values in batch.norms.items()},
    )


def _joined(pieces: Sequence[ActivationBatch]) -> ActivationBatch:
    if len(pieces) == 1:
        return pieces[0]

    def join(parts: list[Any]) -> Any:
        return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)

    first = pieces[0]
    return ActivationBatch(
        rows=np.concatenate([piece.rows for piece in pieces]),
        activations={hook: join([piece.activations[hook] for piece in pieces]) for hook in first.activations},
        flags=np.concatenate([piece.flags for piece in pieces]),
        norms={hook: np.concatenate([piece.norms[hook] for piece in pieces]) for hook in first.norms},
    )


def _records(table: Mapping[str, list[Any]]) -> dict[int, dict[str, Any]]:
    """The rows of a documents table by number."""
    return {
        int(number): {name: values[place] for name, values in table.items()}
        for place, number in enumerate(table["document"])
    }
