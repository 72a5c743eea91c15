"""One pass of the model over the rows that a capture lacks, as a pipeline of threads.

1. A *planner* thread tokenises ahead of the model and commits row groups of the plan (`activations.plan`).
2. The calling thread reads each committed group of the plan back, packs its windows into batches
   (`activations.batching`), and sends them through the model. A batch's result may still be on its way to the host
   when the next one starts.
3. A *collector* thread waits for results, looks for NaN and Inf, and scatters rows to their places in shards.
4. *Writer* threads put checksums on full shards and write them; the last shard of a row group commits it
   (`activations.collect`).

Channels between these are short and row groups in flight are few, so memory is bounded by a few batches and a few
shards, whatever the length of the run.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np

from activations.append import planned_tail
from activations.batching import Batch, Window, chosen_windows, group_windows, pack_batches
from activations.collect import Collector, GroupTask
from activations.errors import InterruptedRunError, MismatchError
from activations.layout import PLAN
from activations.pipeline import Channel, Stopped, Worker
from activations.plan import Windowing, plan_groups
from activations.selection import RowSelection, choosing_for
from activations.source import HookedModel, MediaModel, PendingRows
from activations.spec import MAX_GROUP_BYTES, CaptureSpec
from activations.store import ActivationStore
from activations.text import TextSource
from activations.writer import StoreWriter

__all__ = ["CapturePass", "PassSettings", "Progress", "passes_to_run", "windowing_of"]

PLAN_AHEAD = 4
"""Row groups that the planner may be ahead of the model."""
RESULTS_PENDING = 2
"""Results that may wait for the collector, besides the one that it works on."""
WRITERS = 8
"""Shards that are written at once: some are at their checksums while others keep the disk busy."""
GROUPS_IN_FLIGHT = 3
"""Row groups whose shards are in memory: one that fills, and two that are written."""

Progress = Callable[[int, int | None], None]


def windowing_of(spec: CaptureSpec, model: HookedModel, text: TextSource, max_tokens: int | None = None) -> Windowing:
    """How a store's text is cut into rows; `max_tokens` are rows of the store in all."""
    return Windowing(
        context_size=spec.context_size,
        bos_token_id=spec.bos_token_id,
        special_token_ids=model.special_token_ids,
        rows_per_group=spec.rows_per_group,
        max_tokens=max_tokens,
        max_document_tokens=text.max_document_tokens,
    )


class PassSettings(NamedTuple):
    """What a pass does."""

    text: TextSource | None
    """Where the plan goes on; None if it is complete."""
    writer: StoreWriter
    captures: tuple[str, ...]
    """The hooks, by the ledger's ids of the captures that they belong to, all of which lack the same rows."""
    max_tokens: int | None
    """Rows of the store in all, at most."""
    batch_size: int
    progress: Progress | None


class CapturePass:
    """One pass of the model over all rows that a capture lacks.

    A subclass that has the model's work done elsewhere says which threads there are, what the calling one does
    meanwhile, and how all of it winds down and is joined.
    """

    def __init__(self, model: HookedModel, settings: PassSettings) -> None:
        writer, self.captures = settings.writer, settings.captures
        self.shapes = writer.shapes_of(self.captures)
        self.model, self.text, self.writer = model, settings.text, writer
        self.hooks = sorted(self.shapes)
        self.max_tokens, self.batch_size, self.progress = settings.max_tokens, settings.batch_size, settings.progress
        self.plan = ActivationStore.open(writer.storage)
        self.plan.use_ledger(writer.ledger)
        self.groups: Channel[int] = Channel(PLAN_AHEAD)
        arrays = writer.layout.hook_arrays(self.shapes)
        self.collector = Collector(writer, self.captures, self.hooks, arrays, RESULTS_PENDING, GROUPS_IN_FLIGHT)
        done = writer.ledger.records[self.captures[0]].values()
        self.rows_before = sum(record.row_stop - record.row_start for record in done)
        self._stopped_by: BaseException | None = None

    def run(self) -> None:
        """Capture what is missing; whatever stops it, threads have ended when this returns."""
        threads = self._threads()
        own: BaseException | None = None
        interrupts = self.writer.interrupts
        with interrupts.stopping(self._wind_down):
            try:
                for thread in threads:
                    thread.start()
                self._drive()
            except BaseException as error:
                own = error
                self._wind_down()
            self._join(threads)
        if interrupts.noted and (own is None or isinstance(own, Stopped)):
            own = KeyboardInterrupt()
        own = self._stopped_by or own
        theirs = next((thread.error for thread in threads if thread.error is not None), None)
        if own is not None or theirs is not None:
            self._raise(own, theirs)
        self._report()

    def stop(self, error: BaseException | None = None) -> None:
        """End early from another thread, but let shards that are full be written; `run` raises the error."""
        self._stopped_by = error
        self._wind_down()

    def _threads(self) -> list[Worker]:
        """The threads, those first whose errors explain the others'."""
        return [
            *(Worker(f"writer {number}", self.collector.write, self._stop) for number in range(WRITERS)),
            Worker("collector", self.collector.collect, self._wind_down),
            Worker("planner", self._plan, self._wind_down),
        ]

    def _drive(self) -> None:
        """What the calling thread does: feed the model."""
        self._feed()
        self.collector.results.close()

    def _join(self, threads: Sequence[Worker]) -> None:
        *writers, collector, planner = threads
        collector.join_fully()
        self.collector.jobs.close()
        for thread in (*writers, planner):
            thread.join_fully()

    def _plan(self) -> None:
        """Body of the planner: make known the groups that are planned, then plan on."""
        writer = self.writer
        state = writer.plan_state
        tail = planned_tail(self.plan, state) if state.n_rows and not state.complete else None
        for group in range(writer.ledger.committed_groups(PLAN) - (tail is not None)):
            self.groups.put(group)
        if not state.complete:
            assert self.text is not None
            windowing = windowing_of(writer.spec, self.model, self.text, self.max_tokens)
            manifest = writer.manifest
            selection = RowSelection.from_settings(manifest.get("selection"))
            template = (manifest.get("chats") or {}).get("template")
            choosing = choosing_for(self.model, selection, template, self.writer.layout.has_media)
            encode = self.model.encode_documents
            for planned in plan_groups(self.text, encode, windowing, state, tail, choosing):
                writer.commit_plan(planned)
                self.groups.put(planned.group)
        self.groups.close()

    def _feed(self) -> None:
        """Send the row groups that are not committed through the model."""
        for group in self.groups:
            record, start = self.writer.ledger.records[PLAN][group], self._start(group)
            if start == record.row_stop:
                continue
            batches = pack_batches(
                self._windows(group), self.batch_size, self.model.pads or self.writer.layout.has_media
            )
            n_rows, n_earlier = record.row_stop - record.row_start, start - record.row_start
            task = GroupTask(group, record.row_start, n_rows, len(batches), n_earlier)
            for batch in batches:
                with self.writer.interrupts.at_once():
                    pending = self._forward(batch)
                self.collector.add(task, batch, pending)
                self._report()

    def _forward(self, batch: Batch) -> PendingRows:
        dtype = self.writer.spec.dtype
        if batch.media is None:
            return self.model.forward_rows(batch.windows, self.hooks, dtype, self.batch_size)
        model = cast("MediaModel", self.model)
        return model.forward_rows(batch.windows, self.hooks, dtype, self.batch_size, batch.media)

    def _start(self, group: int) -> int:
        """The first row of a planned group that is not committed; its end if all are."""
        committed = self.writer.ledger.records[self.captures[0]].get(group)
        return self.writer.ledger.records[PLAN][group].row_start if committed is None else committed.row_stop

    def _windows(self, group: int) -> list[Window]:
        """The windows of a group's rows that are not committed."""
        record, from_row = self.writer.ledger.records[PLAN][group], self._start(group)
        n_earlier = from_row - record.row_start
        if self.writer.layout.has_windows:
            rows = self.plan.rows(from_row, record.row_stop)
            numbers = np.unique(rows.sequence).tolist()
            media = self.plan.window_media(numbers) if self.writer.layout.has_media else None
            return chosen_windows(self.plan.window_tokens(numbers), rows.sequence, rows.position, n_earlier, media)
        first = self.plan.rows(from_row, from_row + 1)
        start = from_row - int(first.position[0])
        rows = self.plan.rows(start, record.row_stop)
        whole = group_windows(rows.token_id, rows.position, from_row - start)
        return [window._replace(first_row=window.first_row + n_earlier) for window in whole]

    def _report(self) -> None:
        if self.progress is not None:
            state = self.writer.plan_state
            total = state.n_rows if state.complete else self.max_tokens
            self.progress(self.rows_before + self._rows_done, total)

    @property
    def _rows_done(self) -> int:
        """Rows of this run."""
        return self.collector.rows_collected

    def _wind_down(self) -> None:
        """End early, but let shards that are full be written."""
        self.groups.stop()
        self.collector.results.stop()

    def _stop(self) -> None:
        """End at once."""
        self._wind_down()
        self.collector.stop()

    def _raise(self, own: BaseException | None, theirs: BaseException | None) -> None:
        rows = min(map(self.writer.ledger.committed_rows, self.captures))
        resume = f"{rows:,} rows are committed in {self.writer.folder}; run the same command again to resume."
        with contextlib.suppress(OSError):  # the disk may be full
            self.writer.journal.write("stopped", rows=rows, error=repr(theirs or own))
        if isinstance(own, KeyboardInterrupt):
            raise InterruptedRunError(f"Interrupted. {resume}") from own
        if isinstance(theirs, OSError):
            raise InterruptedRunError(f"Stopped by a file error: {theirs}. {resume}") from theirs
        error = theirs if isinstance(own, Stopped) or own is None else own
        assert error is not None
        error.add_note(resume)
        raise error


def passes_to_run(
    writer: StoreWriter, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]
) -> list[tuple[str, ...]]:
    """Captures (ledger ids) that have to run: those that were left unfinished, and one for the hooks that are new.

    Args:
        writer: of the store.
        shapes: feature shape of each wanted hook.
        aliases: other names of these hooks.

    Returns:
        What each pass fills.

    Raises:
        MismatchError: a capture was left unfinished that has other hooks too.
    """
    left = dict(shapes)
    unfinished = []
    planned = writer.ledger.committed_rows(PLAN)
    for capture, declaration in writer.ledger.declarations.items():
        declared = set(declaration.get("hooks", {}))
        if not declared & set(shapes):
            continue
        if not writer.plan_state.complete or writer.ledger.committed_rows(capture) < planned:
            if not declared <= set(shapes):
                raise MismatchError(
                    f"{writer.folder} has an unfinished capture of the hooks {', '.join(sorted(declared))}. "
                    "Finish it with all of these hooks first; others may be added afterwards."
                )
            unfinished.append(capture)
        left = {hook: shape for hook, shape in left.items() if hook not in declared}
    if left:
        names = {alias: hook for alias, hook in aliases.items() if hook in left}
        unfinished.append(writer.declare_hooks(left, names))
    return _together(writer, unfinished)


def _together(writer: StoreWriter, captures: Sequence[str]) -> list[tuple[str, ...]]:
    """Captures that one pass can fill: they lack the same rows, and their row groups fit into memory together."""
    alike: dict[frozenset[tuple[int, int]], list[tuple[str, ...]]] = {}
    for capture in captures:
        records = writer.ledger.records[capture].items()
        passes = alike.setdefault(frozenset((group, record.row_stop) for group, record in records), [()])
        joined = (*passes[-1], capture)
        row_bytes = sum(writer.layout.hook(shape).row_bytes for shape in writer.shapes_of(joined).values())
        if not passes[-1] or row_bytes * writer.spec.rows_per_group <= MAX_GROUP_BYTES:
            passes[-1] = joined
        else:
            passes.append((capture,))
    return [captures for passes in alike.values() for captures in passes]
