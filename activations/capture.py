"""Capture: drive a `HookedModel` over text and fill a store.

1. Check everything that was given; nothing is written before all of it is found good.
2. Take the lock and open or make the store (`activations.writer`).
3. Find what has to run: a capture that was left unfinished, and one for hooks that are new.
4. Run each in one pass over the rows (`activations.passes`), here or by several workers (`activations.engines`).

Whatever stops a run, committed row groups stay, and the same call goes on where it stopped.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from activations.engines import Engine, open_crew
from activations.engines.crew import Crew
from activations.errors import InvalidInputError, MismatchError
from activations.layout import PLAN
from activations.passes import Progress
from activations.source import HookedModel
from activations.spec import DTYPE_BYTES, CaptureSpec, StorageDtype, rows_per_group_for
from activations.storage import Storage, storage_at
from activations.store import ActivationStore
from activations.text import TextSource
from activations.writer import StoreWriter, existing_manifest

__all__ = ["CaptureReport", "capture", "resolved_hooks", "spec_of"]

TRIED_CHARACTERS = 10_000
"""How much of a document is tokenised to see whether there is anything to capture."""


class CaptureReport(NamedTuple):
    """What a capture did."""

    store: ActivationStore
    rows: int
    """Rows of the store."""
    new_rows: int
    """Rows that this run computed."""
    seconds: float
    resumed: bool
    """Whether the store was there before, with at least some of its text tokenised."""
    documents: int
    """Documents that have rows."""
    windowed_documents: int
    """Documents longer than the context, which were cut into several windows."""
    empty_documents: int
    """Documents without text, which were left out."""


def capture(
    model: HookedModel | Callable[[], HookedModel],
    text: TextSource | None,
    hooks: Sequence[str],
    out: str | Path,
    *,
    max_tokens: int | None = None,
    context_size: int = 256,
    dtype: StorageDtype = "bfloat16",
    batch_size: int | None = None,
    rows_per_group: int | None = None,
    progress: Progress | None = None,
    engine: Engine = "local",
    workers: int | None = None,
    gpus_per_worker: int | None = None,
) -> CaptureReport:
    """Store what the hooks of a model see on a text, or go on with that.

    Args:
        model: the model, or a (picklable) function that makes it, called once everything else is checked; engines with
            several processes need the function.
        text: where documents come from. None if the store in `out` has all of its text already and only hooks are
            added, whose rows then line up with those that are there.
        hooks: names of the hooks, captured in one pass.
        out: folder of the store, or its address `s3://BUCKET/NAME`: new, empty, or a store with the same settings,
            which is resumed.
        max_tokens: rows in all, BOS included; None for all of the text. The last window is cut there.
        context_size: tokens in a window, BOS included.
        dtype: how activations are stored.
        batch_size: tokens that the model runs at once, padding included; None for what suits the model's device.
        rows_per_group: R, a power of two; None for the largest whose shards stay below 128 MiB, or what the store has.
        progress: called with (rows done, rows in all or None) after each batch.
        engine: where the model runs: "local" in this process, "ray" in actors, "torchrun" in the processes that
            torchrun started, each of which makes this same call. See `activations.engines`.
        workers: how many actors; None for one a GPU, or two where there is none.
        gpus_per_worker: of an actor; None for 1 where there are GPUs. 0 for a model that runs on the CPU.

    Raises:
        InvalidInputError: something given is wrong; nothing was written. Among them `UnknownNameError` (file, column,
            hook), `OccupiedError` (`out` holds something else) and `MismatchError` (the store there is another's).
        LockedError: another writer is at work on the store.
        NonFiniteError: a NaN or Inf, or a value too large for `dtype`; hook, row and document are named.
        InterruptedRunError: Ctrl-C, or writing failed (disk full), or workers died.
    """
    storage = storage_at(out)
    with open_crew(engine, model, workers, gpus_per_worker) as crew:
        if not crew.leads:
            figures = crew.follow()
            return CaptureReport(store=ActivationStore.open(storage), **figures)
        report = _captured(
            crew, text, hooks, storage, max_tokens, context_size, dtype, batch_size, rows_per_group, progress
        )
        crew.share({name: value for name, value in report._asdict().items() if name != "store"})
        return report


def _captured(
    crew: Crew,
    text: TextSource | None,
    hooks: Sequence[str],
    storage: Storage,
    max_tokens: int | None,
    context_size: int,
    dtype: StorageDtype,
    batch_size: int | None,
    rows_per_group: int | None,
    progress: Progress | None,
) -> CaptureReport:
    started = time.monotonic()
    _check_numbers(max_tokens, batch_size, dtype)
    manifest = existing_manifest(storage)
    _check_text(text, manifest, storage)
    made = crew.model
    batch_size = made.default_batch_size if batch_size is None else batch_size
    shapes, aliases = resolved_hooks(made, hooks)
    if manifest is None and text is not None:
        _require_tokens(text, made)
    if rows_per_group is None and manifest is not None:
        rows_per_group = manifest["spec"]["rows_per_group"]
    spec = spec_of(made, shapes, context_size, dtype, rows_per_group)
    load_name = made.identity.load_name
    with StoreWriter(storage, spec, _identity(text, max_tokens, manifest), list(shapes), load_name) as writer:
        passes = _passes(writer, shapes, aliases)
        before = {capture_id: writer.ledger.committed_rows(capture_id) for capture_id in passes}
        resumed = writer.plan_state.n_rows > 0
        if passes:
            writer.journal.write("start", hooks=list(shapes), batch_size=batch_size, rows=before)
        for capture_id in passes:
            crew.run_pass(text, writer, capture_id, max_tokens, batch_size, progress)
        state = writer.plan_state
        new_rows = sum(writer.ledger.committed_rows(capture_id) - before[capture_id] for capture_id in passes)
        seconds = time.monotonic() - started
        if passes:
            writer.journal.write("end", new_rows=new_rows, seconds=round(seconds, 3))
    return CaptureReport(
        store=ActivationStore.open(storage),
        rows=state.n_rows,
        new_rows=new_rows,
        seconds=seconds,
        resumed=resumed,
        documents=state.n_documents,
        windowed_documents=state.windowed_documents,
        empty_documents=state.empty_documents,
    )


def _check_numbers(max_tokens: int | None, batch_size: int | None, dtype: str) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise InvalidInputError(f"max_tokens is {max_tokens}; expected at least 1, or None for all of the text.")
    if batch_size is not None and batch_size < 1:
        raise InvalidInputError(f"batch_size is {batch_size}; expected at least 1 token.")
    if dtype not in DTYPE_BYTES:
        raise InvalidInputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}.")


def _check_text(text: TextSource | None, manifest: Mapping[str, Any] | None, out: Storage) -> None:
    if text is None:
        if manifest is None or not ActivationStore.open(out).plan_complete:
            raise InvalidInputError(
                f"{out.location} does not have all of its text yet; give the text that it was begun with."
            )
        return
    text.check()
    if manifest is None and not any(document.text.strip() for document in text.documents()):
        raise InvalidInputError(f"There is no text in {', '.join(text.names)}: every document is empty.")


def _require_tokens(text: TextSource, model: HookedModel) -> None:
    written = (document.text[:TRIED_CHARACTERS] for document in text.documents() if document.text.strip())
    if not any(len(model.encode_documents([some])[0]) for some in written):
        raise InvalidInputError(f"There is no text in {', '.join(text.names)}: no document has a token.")


def resolved_hooks(model: HookedModel, hooks: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Feature shapes by canonical hook name, and the other names that were used."""
    if isinstance(hooks, str):
        hooks = [hooks]
    if not hooks:
        raise InvalidInputError("No hook was given; expected at least one hook name.")
    canonical = {name: model.resolve_hook(name) for name in hooks}
    for hook in canonical.values():
        if not hook or "/" in hook or hook.startswith((".", "__")):
            raise InvalidInputError(f"The hook name {hook!r} cannot be a folder's name.")
    aliases = {name: hook for name, hook in canonical.items() if name != hook}
    return {hook: tuple(model.hook_shape(hook)) for hook in canonical.values()}, aliases


def spec_of(
    model: HookedModel,
    shapes: Mapping[str, tuple[int, ...]],
    context_size: int,
    dtype: StorageDtype,
    rows_per_group: int | None,
) -> CaptureSpec:
    """What the rows of a capture have in common; raises `InvalidInputError` where a setting makes no sense."""
    if context_size > model.max_context_size:
        raise InvalidInputError(
            f"context_size is {context_size}; {model.identity.model} takes at most {model.max_context_size} tokens."
        )
    widest = max(int(np.prod(shape)) for shape in shapes.values()) * DTYPE_BYTES[dtype]
    identity = model.identity
    return CaptureSpec(
        model=identity.model,
        revision=identity.revision,
        weight_hash=identity.weight_hash,
        tokenizer_hash=identity.tokenizer_hash,
        context_size=context_size,
        bos_token_id=identity.bos_token_id,
        compute_dtype=identity.compute_dtype,
        dtype=dtype,
        rows_per_group=rows_per_group_for(widest) if rows_per_group is None else rows_per_group,
    )


def _identity(text: TextSource | None, max_tokens: int | None, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What besides the spec must be equal on a resume."""
    if text is None:
        assert manifest is not None
        return {"text": manifest["text"], "max_tokens": manifest["max_tokens"]}
    return {
        "text": {"fingerprint": text.fingerprint, "files": text.names, **text.settings},
        "max_tokens": max_tokens,
    }


def _passes(writer: StoreWriter, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> list[str]:
    """Captures (ledger ids) that have to run: one that was left unfinished, and one for the hooks that are new."""
    left = dict(shapes)
    unfinished = []
    planned = writer.ledger.committed_rows(PLAN)
    for capture_id, declaration in writer.ledger.declarations.items():
        declared = set(declaration.get("hooks", {}))
        if not declared & set(shapes):
            continue
        if not writer.plan_state.complete or writer.ledger.committed_rows(capture_id) < planned:
            if not declared <= set(shapes):
                raise MismatchError(
                    f"{writer.folder} has an unfinished capture of the hooks {', '.join(sorted(declared))}. "
                    "Finish it with all of these hooks first; others may be added afterwards."
                )
            unfinished.append(capture_id)
        left = {hook: shape for hook, shape in left.items() if hook not in declared}
    if left:
        names = {alias: hook for alias, hook in aliases.items() if hook in left}
        unfinished.append(writer.declare_hooks(left, names))
    return unfinished
