"""Appending: another text after what a complete store holds.

1. The manifest lists the text and the row that it begins at (`appended`). The store's fingerprint, which is of the
   store as it was created, does not change.
2. A last row group that is full needs nothing. One that is not is *set aside*: its objects are copied to names that
   end in `.before-append`, and its records are replaced by records of these. From here on the objects under their own
   names may change; whoever reads sees the copies.
3. The plan and every capture go on as if they had been interrupted. The row group's first rows come from what was set
   aside, bit for bit, never from the model again; the rows after them are new.
4. The records of the filled row group replace those of step 2, and the copies are removed.

A crash leaves the store between two of these steps, each of which can be done again; the end is the same bytes. Old
rows can be read at any moment, by tools that know only Zarr as well: an array's own shard holds the old rows or more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from activations.arrays import ShardBuffer, read_object, write_object
from activations.errors import InvalidInputError, MismatchError
from activations.layout import ASIDE, PLAN
from activations.plan import PlannedGroup, PlanState
from activations.storage import StoredObject
from activations.store import ActivationStore
from activations.text import TextSource
from activations.writer import StoreWriter

__all__ = ["Appended", "check_append", "fill_earlier", "planned_tail", "start_append"]

Appended = dict[str, Any]
"""An entry of the manifest's `appended`: `text` (as the manifest's own `text`), `max_tokens` and `from_row`."""


def check_append(
    store: ActivationStore, text: TextSource, described: Mapping[str, Any], max_tokens: int | None
) -> Appended:
    """The manifest's entry for a text that may be appended to a store: the last one, if this run goes on with it.

    An append of which no row group is committed yet may be left for another.

    Args:
        store: what it is appended to.
        text: the text.
        described: what the manifest keeps of it.
        max_tokens: rows of this text, at most.

    Raises:
        InvalidInputError: the store holds this text already.
        MismatchError: the store is not complete yet; what is missing is named.
    """
    appended: list[Appended] = list(store.manifest.get("appended", []))
    if appended and appended[-1]["text"] == described:
        last = appended[-1]
        if last["max_tokens"] != max_tokens:
            raise MismatchError(
                f"{', '.join(text.names)} was appended to {store.path} with max_tokens {last['max_tokens']}; got "
                f"{max_tokens}. Use the same settings to go on with that."
            )
        return last
    n_rows, complete = store.ledger.committed_rows(PLAN), store.complete
    if appended and n_rows == appended[-1]["from_row"]:
        appended.pop()
        complete = all(store.rows_of(hook) == n_rows for hook in store.hooks)
    held = [store.manifest["text"], *(entry["text"] for entry in appended)]
    if any(entry["fingerprint"] == text.fingerprint for entry in held):
        raise InvalidInputError(
            f"{store.path} holds the text {', '.join(text.names)} already, with the same settings. Append another "
            "text; the same rows again would only weigh them double."
        )
    if not complete:
        unfinished = ", ".join(held[-1]["files"])
        raise MismatchError(
            f"{store.path} is not complete: {unfinished} is still to be captured for {_lacking(store)}. Finish that "
            f"first{' (with append)' if appended else ''}, then append."
        )
    return {"text": dict(described), "max_tokens": max_tokens, "from_row": n_rows}


def _lacking(store: ActivationStore) -> str:
    return ", ".join(hook for hook in store.hooks if not store.is_complete_for([hook])) or "its hooks"


def start_append(writer: StoreWriter, entry: Appended) -> None:
    """Steps 1 and 2, as far as they are not done yet.

    Raises:
        MismatchError: another writer has added to the store since it was checked.
    """
    appended = writer.manifest.get("appended", [])
    if entry not in appended and writer.ledger.committed_rows(PLAN) != entry["from_row"]:
        raise MismatchError(f"{writer.folder} has got other rows meanwhile, from another writer. Run this again.")
    wanted = [*(known for known in appended if known["from_row"] < entry["from_row"]), entry]
    if wanted != appended:
        writer.set_manifest({**writer.manifest, "appended": wanted})
    for capture in list(writer.ledger.records):
        _set_aside(writer, capture, entry["from_row"])


def _set_aside(writer: StoreWriter, capture: str, row: int) -> None:
    groups = writer.ledger.committed_groups(capture)
    record = writer.ledger.records[capture][groups - 1] if groups else None
    if record is None or record.row_stop != row or row % writer.spec.rows_per_group == 0:
        return
    objects = {}
    for name, known in writer.objects_of(record).items():
        if not name.endswith(ASIDE):
            content = read_object(StoredObject(writer.storage, name), known, f"rows {record.row_start:,} to {row:,}")
            name += ASIDE
            known = write_object(StoredObject(writer.storage, name), content, known.crc32c)
        objects[name] = known
    if objects != record.objects:
        writer.ledger.commit(replace(record, objects=objects))


def planned_tail(store: ActivationStore, state: PlanState) -> PlannedGroup | None:
    """The last row group as it is committed, for the plan to go on from, None if it is full."""
    group, n_rows = divmod(state.n_rows, store.spec.rows_per_group)
    if n_rows == 0:
        return None
    start = state.n_rows - n_rows
    columns = {name: store.column(name, start, state.n_rows) for name in store.token_columns}
    tables = {table: store.table_piece(table, group).to_pydict() for table in store.layout.tables}
    return PlannedGroup(group, start, state.n_rows, columns, state=state, **{"windows": {}, "media": {}, **tables})


def fill_earlier(
    writer: StoreWriter, group: int, n_rows: int, hooks: Sequence[str], buffers: Mapping[str, ShardBuffer]
) -> None:
    """Step 3: put the first rows of a row group, committed before, into the buffers of its new shards."""
    store = ActivationStore.open(writer.storage)
    store.use_ledger(writer.ledger)
    start, rows = group * writer.spec.rows_per_group, np.arange(n_rows)
    for hook in hooks:
        buffers[writer.layout.hook_array(hook)].put(rows, store.read(hook, start, start + n_rows))
        buffers[writer.layout.norm_array(hook)].put(rows, store.norms(hook, start, start + n_rows))
