"""Capture: drive a `HookedModel` over text and fill a store.

1. Check everything that was given; nothing is written before all of it is found good.
2. Take the lock and open or make the store (`activations.writer`); note that a text is appended
   (`activations.append`).
3. Find what has to run: captures that were left unfinished, and one for hooks that are new.
4. Run those that lack the same rows in one pass over these (`activations.passes`), here or by several workers
   (`activations.engines`).

Whatever stops a run, committed row groups stay, and the same call goes on where it stopped.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from activations.append import Appended, check_append, start_append
from activations.chats import CONTENT_KINDS, ROLES
from activations.engines import Engine, open_crew
from activations.engines.crew import Crew
from activations.errors import InvalidInputError, MismatchError
from activations.hook_patterns import every_layer
from activations.layout import appended_from
from activations.media import MODALITIES
from activations.passes import PassSettings, Progress, passes_to_run, windowing_of
from activations.plan import plan_groups
from activations.selection import RowSelection, choosing_for
from activations.source import HookedModel, MediaModel
from activations.spec import DTYPE_BYTES, CaptureSpec, StorageDtype, require_sizes, rows_per_group_for
from activations.storage import Storage, storage_at
from activations.store import ActivationStore
from activations.text import TextSource
from activations.writer import StoreWriter, existing_manifest

__all__ = ["CaptureReport", "capture", "check_numbers", "resolved_hooks", "row_choice", "run_capture", "spec_of"]

TRIED_CHARACTERS = 10_000
"""How much of a document is tokenised to see whether there is anything to capture."""


class CaptureReport(NamedTuple):
    """What a capture did."""

    store: ActivationStore
    rows: int
    """Rows of the store."""
    new_rows: int
    """Rows that this run computed; those of several passes each time."""
    seconds: float
    """How long it took, making the model apart."""
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
    context_size: int | None = None,
    dtype: StorageDtype | None = None,
    batch_size: int | None = None,
    rows_per_group: int | None = None,
    selection: RowSelection | None = None,
    chat_template: str | None = None,
    append: bool = False,
    progress: Progress | None = None,
    engine: Engine = "local",
    workers: int | None = None,
    gpus_per_worker: int | None = None,
) -> CaptureReport:
    """Store what the hooks of a model see on a text, or go on with that, or add to it.

    Args:
        model: the model, or a (picklable) function that makes it, called once everything else is checked; engines with
            several processes need the function.
        text: where documents come from. None if the store in `out` has all of its text already and only hooks are
            added, whose rows then line up with those that are there.
        hooks: names of the hooks, captured in one pass; a * stands for every layer ("blocks.*.hook_resid_post"). With
            `append` all hooks of the store, or none for these.
        out: folder of the store, or its address `s3://BUCKET/NAME`: new, empty, or a store with the same settings,
            which is resumed.
        max_tokens: rows of this text, BOS included; None for all of it. The last window is cut there.
        context_size: tokens in a window, BOS included; None for what the store has, or 256.
        dtype: how activations are stored; None for what the store has, or bfloat16.
        batch_size: tokens that the model runs at once, padding included; None for what suits the model's device.
        rows_per_group: R, a power of two; None for the largest whose shards stay below 128 MiB, and below 512 MiB
            together, or what the store has.
        selection: which tokens become rows (the model sees all of them); None for all, or what the store in `out` has
            where hooks or text are added to it.
        chat_template: how chats are written, a Jinja template as Hugging Face tokenizers have; None for the
            tokenizer's own, or what the store has.
        append: add the text after the rows of the complete store in `out`. Without it another text is refused. The
            same call resumes an append that was interrupted, and does nothing when it is done.
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
    request = _Request(
        text=text,
        hooks=hooks,
        storage=storage,
        max_tokens=max_tokens,
        context_size=context_size,
        dtype=dtype,
        batch_size=batch_size,
        rows_per_group=rows_per_group,
        selection=selection,
        chat_template=chat_template,
        append=append,
        progress=progress,
    )
    with open_crew(engine, model, workers, gpus_per_worker) as crew:
        if not crew.leads:
            figures = crew.follow()
            return CaptureReport(store=ActivationStore.open(storage), **figures)
        report = _captured(crew, request)
        crew.share({name: value for name, value in report._asdict().items() if name != "store"})
        return report


class _Request(NamedTuple):
    """What `capture` was asked for."""

    text: TextSource | None
    hooks: Sequence[str]
    storage: Storage
    max_tokens: int | None
    context_size: int | None
    dtype: StorageDtype | None
    batch_size: int | None
    rows_per_group: int | None
    selection: RowSelection | None
    chat_template: str | None
    append: bool
    progress: Progress | None


def _captured(crew: Crew, request: _Request) -> CaptureReport:
    text, storage, append, max_tokens = request.text, request.storage, request.append, request.max_tokens
    check_numbers(max_tokens, request.batch_size)
    require_sizes(request.context_size, request.dtype, request.rows_per_group)
    manifest = existing_manifest(storage)
    entry = _appended(text, max_tokens, manifest, storage, append)
    _check_text(text, manifest, storage, entry)
    stored = {} if manifest is None else manifest["spec"]
    context_size = _given(request.context_size, stored.get("context_size", 256))
    dtype = _given(request.dtype, stored.get("dtype", "bfloat16"))
    rows_per_group = _given(request.rows_per_group, stored.get("rows_per_group"))
    made = crew.model
    started = time.monotonic()
    batch_size = _given(request.batch_size, made.default_batch_size)
    rows = row_choice(made, text, manifest, request.selection, request.chat_template, adopt=text is None or append)
    hooks = request.hooks if entry is None else _all_hooks(made, request.hooks, ActivationStore.open(storage))
    shapes, aliases = resolved_hooks(made, hooks)
    spec = spec_of(made, shapes, context_size, dtype, rows_per_group)
    if text is not None and (manifest is None or entry is not None):
        if text.has_media:
            _require_media_fit(text, made, spec)
        else:
            _require_tokens(text, made)
        _require_rows(text, made, spec, rows)
    load_name = made.identity.load_name
    identity = {**_identity(None if append else text, max_tokens, manifest), **rows.identity, "denoising": None}
    if entry is not None and max_tokens is not None:
        max_tokens += entry["from_row"]
    writer = StoreWriter(storage, spec, identity, list(shapes), load_name)

    def run_pass(captures: tuple[str, ...]) -> None:
        crew.run_pass(PassSettings(text, writer, captures, max_tokens, batch_size, request.progress))

    return run_capture(writer, shapes, aliases, run_pass, started, entry, batch_size=batch_size)


def run_capture(
    writer: StoreWriter,
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
    run_pass: Callable[[tuple[str, ...]], None],
    started: float,
    appended: Appended | None = None,
    **noted: Any,
) -> CaptureReport:
    """Run the passes that a store lacks, with its lock held.

    Args:
        writer: of the store, not entered.
        shapes: per wanted hook a row's shape.
        aliases: other names of these hooks.
        run_pass: runs one, by the ledger's ids of the captures that it fills.
        started: when all of it began, by `time.monotonic`.
        appended: what begins an append.
        noted: what else the journal says of the start.
    """
    with writer:
        if appended is not None:
            start_append(writer, appended)
        passes = passes_to_run(writer, shapes, aliases)
        before = {capture: writer.ledger.committed_rows(capture) for captures in passes for capture in captures}
        resumed = writer.plan_state.n_rows > 0
        if passes:
            writer.journal.write("start", hooks=list(shapes), **noted, rows=before)
        for captures in passes:
            run_pass(captures)
        writer.clear_superseded()
        state = writer.plan_state
        new_rows = sum(writer.ledger.committed_rows(first) - before[first] for first, *_ in passes)
        seconds = time.monotonic() - started
        if passes:
            writer.journal.write("end", new_rows=new_rows, seconds=round(seconds, 3))
    return CaptureReport(
        store=ActivationStore.open(writer.storage),
        rows=state.n_rows,
        new_rows=new_rows,
        seconds=seconds,
        resumed=resumed,
        documents=state.n_documents,
        windowed_documents=state.windowed_documents,
        empty_documents=state.empty_documents,
    )


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def check_numbers(max_tokens: int | None, batch_size: int | None) -> None:
    """Raise `InvalidInputError` if one of these is out of range; None is always good."""
    if max_tokens is not None and max_tokens < 1:
        raise InvalidInputError(f"max_tokens is {max_tokens}; expected at least 1, or None for all of the text.")
    if batch_size is not None and batch_size < 1:
        raise InvalidInputError(f"batch_size is {batch_size}; expected at least 1 token.")


def _appended(
    text: TextSource | None, max_tokens: int | None, manifest: Mapping[str, Any] | None, out: Storage, append: bool
) -> Appended | None:
    """The manifest's entry of a text that is to be appended."""
    if not append:
        return None
    where = out.location
    if text is None:
        raise InvalidInputError(f"There is no text to append to {where}; give some.")
    if manifest is None:
        raise InvalidInputError(f"{where} is no store yet, so there is nothing to append to; capture without append.")
    text.check()
    return check_append(ActivationStore.open(out), text, text.described, max_tokens)


def _check_text(
    text: TextSource | None, manifest: Mapping[str, Any] | None, out: Storage, entry: Appended | None
) -> None:
    store = None if manifest is None else ActivationStore.open(out)
    where = out.location
    if entry is None and store is not None and not store.plan_complete and appended_from(store.manifest) >= 0:
        files = ", ".join(store.manifest["appended"][-1]["text"]["files"])
        raise InvalidInputError(f"{where} has an unfinished append of {files}; finish it first, with append.")
    if text is None:
        if store is None or not store.plan_complete:
            raise InvalidInputError(f"{where} does not have all of its text yet; give the text that it was begun with.")
        return
    text.check()
    if manifest is None or entry is not None:
        text.require_text()


def _all_hooks(model: HookedModel, hooks: Sequence[str], store: ActivationStore) -> list[str]:
    """The hooks of an append: all of the store's, as each of its rows has them all."""
    given = _one_by_one(model, hooks)
    missing = sorted(set(store.hooks) - {model.resolve_hook(name) for name in given})
    if given and missing:
        raise InvalidInputError(
            f"{store.path} holds {', '.join(missing)} as well, which every row must have. Append with all of its "
            "hooks, or drop those first."
        )
    return given or list(store.hooks)


def _require_tokens(text: TextSource, model: HookedModel) -> None:
    written = (document.text[:TRIED_CHARACTERS] for document in text.documents() if document.text.strip())
    if not any(len(model.encode_documents([some])[0]) for some in written):
        raise InvalidInputError(f"There is no text in {', '.join(text.names)}: no document has a token.")


def resolved_hooks(model: HookedModel, hooks: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Feature shapes by canonical hook name, and the other names that were used."""
    hooks = _one_by_one(model, hooks)
    if not hooks:
        raise InvalidInputError("No hook was given; expected at least one hook name.")
    canonical = {name: model.resolve_hook(name) for name in hooks}
    for hook in canonical.values():
        if not hook or "/" in hook or hook.startswith((".", "__")):
            raise InvalidInputError(f"The hook name {hook!r} cannot be a folder's name.")
    aliases = {name: hook for name, hook in canonical.items() if name != hook}
    return {hook: tuple(model.hook_shape(hook)) for hook in canonical.values()}, aliases


def _one_by_one(model: HookedModel, hooks: Sequence[str]) -> list[str]:
    """The hooks that were asked for, with those that a * stands for."""
    given = [hooks] if isinstance(hooks, str) else list(hooks)
    return every_layer(given, model.known_hooks()) if any("*" in name for name in given) else given


class RowChoice(NamedTuple):
    """Which tokens become rows, and how chats are written."""

    selection: RowSelection
    chat_template: str | None
    media: Mapping[str, Any] | None = None
    """What the manifest keeps of how media are prepared, where the text has any."""
    stored: Mapping[str, Any] | None = None
    """What the store keeps of how its chats are written, where no text is added."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        template = self.chat_template
        codes = {"roles": list(ROLES), "kinds": list(CONTENT_KINDS)}
        chats = None if template is None else {"template": template, **codes}
        if self.stored is not None and self.stored["template"] == template:
            chats = dict(self.stored)
        return {"selection": self.selection.settings, "chats": chats, "media": self.media}


def row_choice(
    model: HookedModel,
    text: TextSource | None,
    manifest: Mapping[str, Any] | None,
    selection: RowSelection | None,
    chat_template: str | None,
    adopt: bool,
) -> RowChoice:
    """What was given, completed by what the store has (if `adopt`) and what the tokenizer has.

    Raises:
        MismatchError: one of store and text is chats, the other is not.
        InvalidInputError: something of chats is given and the text is none, or nothing says how to write them.
    """
    stored: Mapping[str, Any] = manifest or {}
    chats = stored.get("chats")
    if selection is None:
        selection = RowSelection.from_settings(stored.get("selection") if adopt else None)
    if text is None:
        template = chats["template"] if chats and chat_template is None else chat_template
        return RowChoice(selection, template, stored.get("media"), chats)
    media = _media(model, text)
    if manifest is not None and (stored.get("media") is None) != (media is None):
        has, lacks = ("the store", "text") if media is None else (", ".join(text.names), "store")
        raise MismatchError(
            f"{has} has images or sounds, and the {lacks} has none. Give another output folder, or a text that names "
            "its media in the same way."
        )
    if not text.is_chats:
        if chats is not None and adopt:
            raise MismatchError(f"The store holds chats, {', '.join(text.names)} none. Give text with messages.")
        if selection.roles or selection.kinds or chat_template is not None:
            given = "a chat template was given" if chat_template is not None else f"roles is {list(selection.roles)}"
            given = f"kinds is {list(selection.kinds)}" if selection.kinds else given
            raise InvalidInputError(f"{given}, but the text is no chats. Name the column of their messages.")
        return RowChoice(selection, None, media)
    if manifest is not None and chats is None:
        raise MismatchError(f"The store holds plain text, {', '.join(text.names)} chats. Give another output folder.")
    template = chat_template or (chats["template"] if chats and adopt else model.chat_template)
    if template is None:
        raise InvalidInputError(
            f"The tokenizer of {model.identity.model} has no chat template; give one, or capture the text as text."
        )
    return RowChoice(selection, template, media)


def _media(model: HookedModel, text: TextSource) -> dict[str, Any] | None:
    """What the manifest keeps of how the media of a text are prepared."""
    if not text.has_media:
        return None
    if not hasattr(type(model), "processor_hash"):
        raise InvalidInputError(f"{model.identity.model} takes text alone, and {', '.join(text.names)} has media.")
    return {"processor": cast("MediaModel", model).processor_hash(), "modalities": list(MODALITIES)}


def _require_media_fit(text: TextSource, model: HookedModel, spec: CaptureSpec) -> None:
    """Refuse media that a window may have no room for, before anything is written."""
    found, sizes = text.media, {}
    if found.images:
        sizes["image"] = cast("MediaModel", model).max_medium_tokens("image", 0.0)
    if found.sounds:
        sizes["audio"] = cast("MediaModel", model).max_medium_tokens("audio", found.longest_seconds)
    has_bos = spec.bos_token_id is not None
    for kind, n_tokens in sizes.items():
        if n_tokens > spec.context_size - has_bos:
            what = "An image" if kind == "image" else f"A sound of {found.longest_seconds:,.1f} s"
            raise InvalidInputError(
                f"{what} takes up to {n_tokens:,} tokens of {spec.model}, and is never cut in two; a window of "
                f"context_size {spec.context_size} has no room for it. Give a context_size of at least "
                f"{n_tokens + has_bos:,}."
            )


def _require_rows(text: TextSource, model: HookedModel, spec: CaptureSpec, rows: RowChoice) -> None:
    """Refuse a text of which no token is chosen."""
    choosing = choosing_for(model, rows.selection, rows.chat_template, rows.media is not None)
    if choosing is None:
        return
    windowing = windowing_of(spec, model, text)
    if next(plan_groups(text, model.encode_documents, replace(windowing, rows_per_group=1), choosing=choosing), None):
        return
    raise InvalidInputError(f"No token of {', '.join(text.names)} is chosen by {rows.selection}. Choose less narrowly.")


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
    row_bytes = [int(np.prod(shape)) * DTYPE_BYTES[dtype] for shape in shapes.values()]
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
        rows_per_group=rows_per_group_for(row_bytes, context_size) if rows_per_group is None else rows_per_group,
    )


def _identity(text: TextSource | None, max_tokens: int | None, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What besides the spec must be equal on a resume."""
    if text is None:
        assert manifest is not None
        return {"text": manifest["text"], "max_tokens": manifest["max_tokens"]}
    return {"text": text.described, "max_tokens": max_tokens}
