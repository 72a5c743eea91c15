"""Capture of text diffusion: prompts are generated in the model's own loop, every step of which becomes rows.

1. Everything given is checked, as by `activations.capture`; the store is opened or made.
2. Prompt after prompt is generated with a seed of its own (`activations.denoising`), hooks looking on.
3. Its steps become rows. Row groups are planned and committed as those of other captures: the plan first, then the
   hooks' shards, which a collector and writers fill beside the model.
4. A run that goes on generates the prompt anew in which the first uncommitted row lies, and drops what is there. Where
   the plan knows a row already, the tokens must be the same; so further hooks can be captured of the same steps.

What is held is one prompt's generation and the row groups in flight, whatever the number of prompts.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from activations.batching import Batch
from activations.capture import CaptureReport, check_numbers, resolved_hooks, run_capture, spec_of
from activations.collect import GroupTask
from activations.cutting import TOKEN_COLUMNS, Cut
from activations.denoising import (
    DENOISING_COLUMNS,
    STATES,
    DenoisedBlock,
    DenoisingModel,
    DenoisingSettings,
    canvas_of,
    commit_steps,
    states_of,
)
from activations.documents import Document, is_held_out
from activations.errors import InvalidInputError, MismatchError
from activations.layout import PLAN
from activations.passes import CapturePass, PassSettings, Progress
from activations.pipeline import Worker
from activations.plan import CutDocument, PlannedGroup, PlanState, group_documents
from activations.source import RowFlag
from activations.spec import StorageDtype, require_sizes
from activations.storage import storage_at
from activations.text import TextSource
from activations.writer import StoreWriter, existing_manifest

__all__ = ["capture_denoising"]

COMPARED = ("token_id", "final_id", "state")
"""Columns that must be as they were where steps are generated again."""


def capture_denoising(
    model: DenoisingModel | Callable[[], DenoisingModel],
    prompts: TextSource,
    hooks: Sequence[str],
    out: str | Path,
    *,
    settings: DenoisingSettings | None = None,
    max_rows: int | None = None,
    dtype: StorageDtype | None = None,
    rows_per_group: int | None = None,
    progress: Progress | None = None,
) -> CaptureReport:
    """Generate prompts with a model that denoises, and store what hooks see at every step; or go on with that; or add
    hooks to it, with the same settings and prompts.

    Args:
        model: the model, or a function that makes it, called once everything else is checked.
        prompts: texts to go on from. Columns `suffix` and `gap` make one to be filled in the middle
            (`activations.denoising`).
        hooks: names of the denoiser's hooks.
        out: folder of the store, or its address `s3://BUCKET/NAME`.
        settings: seed, length and steps; None for seed 0 and what the model's configuration says.
        max_rows: rows in all, at most.
        dtype: how activations are stored; None for what the store has, or bfloat16.
        rows_per_group: as of `activations.capture.capture`.
        progress: called with (rows done, `max_rows`) after each row group.

    Raises:
        InvalidInputError: something given is wrong; nothing was written. Among them `UnknownNameError`,
            `OccupiedError` and `MismatchError` (the store there has other settings).
        MismatchError: also, later: the model generated other tokens than the store has.
        LockedError, NonFiniteError, InterruptedRunError: as of `activations.capture.capture`.
    """
    settings = settings or DenoisingSettings()
    check_numbers(max_rows, None)
    require_sizes(None, dtype, rows_per_group)
    storage = storage_at(out)
    manifest = existing_manifest(storage)
    if prompts.is_chats or prompts.max_document_tokens is not None:
        raise InvalidInputError("Prompts are texts, read whole; give neither a messages column nor a length.")
    prompts.check()
    prompts.require_text()
    stored = {} if manifest is None else manifest["spec"]
    made: DenoisingModel = model if hasattr(type(model), "denoise") else model()  # type: ignore[assignment, operator]
    started = time.monotonic()
    shapes, aliases = resolved_hooks(made, hooks)
    spec = spec_of(
        made,
        shapes,
        made.max_context_size,
        dtype or stored.get("dtype", "bfloat16"),
        rows_per_group or stored.get("rows_per_group"),
    )
    configuration = dict(made.denoising_configuration(settings))
    for document in prompts.documents():
        if document.text.strip():
            made.require_canvas(canvas_of(document, made), settings)
        elif "gap" in document.extra:
            name = document.title or document.extra.get("suffix", "")[:40]
            raise InvalidInputError(f"The prompt {name!r} has a gap and no text before it; give some, or leave it out.")
    denoising = {**settings.described, "states": list(STATES), "configuration": configuration}
    identity = {"text": prompts.described, "max_tokens": max_rows, "selection": None, "chats": None}
    load_name = made.identity.load_name
    writer = StoreWriter(storage, spec, {**identity, "denoising": denoising}, list(shapes), load_name)

    def run_pass(captures: tuple[str, ...]) -> None:
        _Pass(made, PassSettings(prompts, writer, captures, max_rows, 1, progress), settings).run()

    return run_capture(writer, shapes, aliases, run_pass, started)


class _Ready(NamedTuple):
    """Activations that are on the host already."""

    values: Mapping[str, np.ndarray]

    def wait(self) -> Mapping[str, np.ndarray]:
        return self.values


class _Pass(CapturePass):
    """One pass over all prompts whose rows are not committed: the calling thread generates, plans and hands over."""

    def __init__(self, model: DenoisingModel, settings: PassSettings, denoising: DenoisingSettings) -> None:
        super().__init__(model, settings)
        self.denoiser, self.denoising = model, denoising
        self._generated: list[Mapping[str, np.ndarray]] = []
        """Per hook the rows of the prompts that reach into groups to come."""
        self._first_row = 0
        """Row at which the first of these begins."""

    def _threads(self) -> list[Worker]:
        return super()._threads()[:-1]

    def _join(self, threads: Sequence[Worker]) -> None:
        *writers, collector = threads
        collector.join_fully()
        self.collector.jobs.close()
        for thread in writers:
            thread.join_fully()

    def _feed(self) -> None:
        ledger = self.writer.ledger
        plans, own = ledger.records[PLAN], ledger.records[self.captures[0]]
        group = min(ledger.committed_groups(PLAN), ledger.committed_groups(self.captures[0]))
        state = PlanState(**plans[group - 1].extra) if group else PlanState()
        if state.complete:
            return
        self._first_row = state.n_rows - state.rows_done
        size = self.writer.spec.rows_per_group
        for planned in group_documents(self._documents(state.ordinal), size, self.max_tokens, state):
            if planned.group in plans:
                self._require_same(planned)
            else:
                self.writer.commit_plan(planned)
            if planned.group not in own:
                n_rows = planned.row_stop - planned.row_start
                task = GroupTask(planned.group, planned.row_start, n_rows, n_batches=1)
                batch = Batch([planned.columns["token_id"]], np.arange(n_rows), None)
                self.collector.add(task, batch, _Ready(self._rows(planned.row_start, planned.row_stop)))
            self._forget(planned.row_stop)
            self._report()

    def _documents(self, start: int) -> Iterator[CutDocument]:
        assert self.text is not None
        for ordinal, document in enumerate(self.text.documents(start), start=start):
            seed = self.denoising.seed + ordinal
            noted = {**document.extra, "prompt": document.text, "seed": str(seed)}
            cut = partial(self._cut, document, seed)
            yield CutDocument(replace(document, extra=noted), ordinal, bool(document.text.strip()), cut)

    def _cut(self, document: Document, seed: int, *, max_rows: int | None) -> Cut | None:
        if not document.text.strip():
            return None
        canvas = canvas_of(document, self.denoiser)
        with self.writer.interrupts.at_once():
            blocks = self.denoiser.denoise(canvas, self.denoising, seed, self.hooks, self.writer.spec.dtype)
        names = blocks[0].values
        self._generated.append({name: np.concatenate([block.values[name] for block in blocks]) for name in names})
        return _cut_of(blocks, is_held_out(document), self.denoiser.special_token_ids, max_rows)

    def _rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Per hook what it saw on rows `[start, stop)`."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self._generated[0]}
        row = self._first_row
        for values in self._generated:
            for name, rows in values.items():
                parts[name].append(rows[max(0, start - row) : max(0, stop - row)])
            row += len(next(iter(values.values())))
        return {name: np.concatenate(pieces) for name, pieces in parts.items()}

    def _forget(self, row: int) -> None:
        """Drop the prompts whose rows end at `row` or before."""
        while self._generated:
            n_rows = len(next(iter(self._generated[0].values())))
            if self._first_row + n_rows > row:
                return
            self._first_row += n_rows
            del self._generated[0]

    def _require_same(self, planned: PlannedGroup) -> None:
        for name in COMPARED:
            stored = self.plan.column(name, planned.row_start, planned.row_stop)
            if not np.array_equal(stored, planned.columns[name]):
                row = planned.row_start + int(np.flatnonzero(stored != planned.columns[name])[0])
                raise MismatchError(
                    f"The model generated other tokens than {self.plan.path} has, from row {row:,} on ({name}). "
                    "Steps can be repeated with the same device, dtype and software alone; give another output folder."
                )


def _cut_of(blocks: Sequence[DenoisedBlock], held_out: bool, special: frozenset[int], max_rows: int | None) -> Cut:
    """A generation's rows: its windows are steps of blocks."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in TOKEN_COLUMNS | DENOISING_COLUMNS}
    starts: list[int] = []
    offsets: list[int] = []
    n_rows = 0
    for block in blocks:
        n_steps, length = block.tokens.shape
        states = states_of(block.accepted, block.given)
        flags = np.full(block.tokens.shape, RowFlag.HELD_OUT if held_out else 0, np.uint8)
        settled = (states == STATES.index("prompt")) | (states == STATES.index("committed"))
        flags[np.isin(block.tokens, sorted(special)) & settled] |= np.uint8(RowFlag.SPECIAL)
        step = np.repeat(np.arange(n_steps), length)
        values = {
            "token_id": block.tokens.ravel(),
            "sequence": len(starts) + step,
            "position": np.tile(np.arange(length), n_steps),
            "flags": flags.ravel(),
            "step": step,
            "block": np.full(n_steps * length, block.block),
            "state": states.ravel(),
            "final_id": np.tile(block.final, n_steps),
            "commit_step": np.tile(commit_steps(block.accepted, block.given), n_steps),
        }
        for name, column in values.items():
            columns[name].append(column)
        starts += [n_rows + number * length for number in range(n_steps)]
        offsets += [block.offset] * n_steps
        n_rows += n_steps * length
    kinds = TOKEN_COLUMNS | DENOISING_COLUMNS
    whole = {name: np.concatenate(parts).astype(kinds[name])[:max_rows] for name, parts in columns.items()}
    kept = np.array(starts)[np.array(starts) < len(whole["token_id"])]
    return Cut(whole, kept, np.array(offsets)[: len(kept)], (), is_windowed=False)
