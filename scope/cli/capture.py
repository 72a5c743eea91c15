"""`scope capture`: run a model over text and keep what its hooks see."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from activations.engines import Engine, detected_engine, is_follower
from activations.spec import StorageDtype
from scope.cli._command import Outcome, command, progress_bar, read_template, say
from scope.cli._model import EmbeddingsOption, load_model
from scope.errors import InvalidInputError, ScopeError

if TYPE_CHECKING:
    from activations.capture import CaptureReport
    from scope.models import LanguageModel

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "capture")
    def capture(
        model: Annotated[
            str | None,
            typer.Option(
                help="gemma-3-270m, a Hugging Face id, a local folder, or a GGUF file. With --into by default the "
                "store's own."
            ),
        ] = None,
        data: Annotated[
            list[Path] | None, typer.Option(help="Text: a parquet, jsonl or plain text file. May be repeated.")
        ] = None,
        hook: Annotated[
            list[str] | None,
            typer.Option(
                help="A hook name, such as blocks.8.hook_resid_post. May be repeated; a * stands for every layer: "
                "'blocks.*.hook_resid_post'. With --append by default all hooks of the store."
            ),
        ] = None,
        out: Annotated[
            str | None,
            typer.Option(help="The store to make, or to go on with: NAME.zarr or s3://BUCKET/NAME.zarr."),
        ] = None,
        into: Annotated[
            str | None,
            typer.Option(
                help="In place of --out, a complete store: further hooks of its tokens (no --data), or, with --append "
                "and --data, more text."
            ),
        ] = None,
        append: Annotated[
            bool, typer.Option("--append", help="Add --data after the rows that the store has, for all of its hooks.")
        ] = False,
        max_tokens: Annotated[
            int | None,
            typer.Option(
                help="Stop after this many rows of --data, BOS included: tokens, or those of them that are chosen."
            ),
        ] = None,
        context_size: Annotated[
            int | None,
            typer.Option(help="Tokens in the longest window, BOS included; 256, or what the store has."),
        ] = None,
        dtype: Annotated[
            StorageDtype | None, typer.Option(help="How activations are stored; bfloat16, or what the store has.")
        ] = None,
        batch_size: Annotated[
            int | None, typer.Option(help="Tokens that the model runs at once; by default what suits the device.")
        ] = None,
        rows_per_group: Annotated[
            int | None, typer.Option(help="Rows in a unit of work and commit: a power of two up to 65,536.")
        ] = None,
        text_column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
        shuffle_seed: Annotated[
            int | None, typer.Option(help="Take the documents in a random order with this seed.")
        ] = None,
        max_document_tokens: Annotated[
            int | None, typer.Option(help="At most this many tokens of each document.")
        ] = None,
        messages_column: Annotated[
            str | None,
            typer.Option(
                help="Text is chats: the column with the messages, with roles, contents and tool_calls; tools are in a "
                "column tools."
            ),
        ] = None,
        media_column: Annotated[
            str | None,
            typer.Option(
                help="The column that lists the images and sounds of each text, by paths relative to the file; <image> "
                "and <audio> in the text say where they stand."
            ),
        ] = None,
        message_media: Annotated[
            bool,
            typer.Option(
                "--message-media", help="Of chats: messages may hold images and sounds, as parts of their content."
            ),
        ] = False,
        chat_template: Annotated[
            Path | None, typer.Option(help="A Jinja file that writes chats, in place of the tokenizer's own template.")
        ] = None,
        skip_bos: Annotated[bool, typer.Option("--skip-bos", help="Make no row of the BOS of windows.")] = False,
        skip_special: Annotated[
            bool, typer.Option("--skip-special", help="Make no row of other special tokens.")
        ] = False,
        every: Annotated[int, typer.Option(help="Make a row of every n-th token of the text alone.")] = 1,
        every_in: Annotated[str, typer.Option(help="Where --every counts from: window or document.")] = "window",
        token_pattern: Annotated[
            str | None,
            typer.Option(help="Make rows of the tokens alone in whose text (' the') this regular expression is found."),
        ] = None,
        roles: Annotated[
            list[str] | None,
            typer.Option(help="Of chats: make rows of the turns of this role alone (assistant). May be repeated."),
        ] = None,
        kinds: Annotated[
            list[str] | None,
            typer.Option(
                help="Of chats: make rows of this kind of content alone (text, tool_call, tool_response, markup). May "
                "be repeated."
            ),
        ] = None,
        revision: Annotated[str | None, typer.Option(help="Revision of a model from the hub.")] = None,
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        embeddings: EmbeddingsOption = "device",
        compute_dtype: Annotated[
            str | None,
            typer.Option(help="dtype in which the model runs: auto, bfloat16 or float32; auto, or the store's."),
        ] = None,
        compile: Annotated[
            bool, typer.Option("--compile", help="Compile the layers: faster on a GPU; last digits differ.")
        ] = False,
        allow_download: Annotated[
            bool, typer.Option("--allow-download", help="Fetch the model from the hub if it is not here.")
        ] = False,
        storage: Annotated[
            str | None, typer.Option(help="Where --out lies: a folder, or s3://BUCKET/PREFIX (settings from AWS_…).")
        ] = None,
        engine: Annotated[
            Engine | None,
            typer.Option(
                help="Where the model runs: local (this process), ray (actors of a cluster, or of this machine) or "
                "torchrun; by default torchrun where it started this process, else local."
            ),
        ] = None,
        workers: Annotated[
            int | None, typer.Option(help="Ray actors; by default one a GPU, or two where there is none.")
        ] = None,
    ) -> Outcome:
        """Run a model over text and keep what its hooks see, one row a token, in a store that can be resumed."""
        from activations.capture import capture as run_capture
        from activations.selection import RowSelection
        from activations.storage import below
        from activations.text import TextSource

        target = _target(out, into, append, data, hook, model)
        of_text = {
            "--max-tokens": max_tokens,
            "--shuffle-seed": shuffle_seed,
            "--max-document-tokens": max_document_tokens,
        }
        if not data and any(value is not None for value in of_text.values()):
            given = ", ".join(flag for flag, value in of_text.items() if value is not None)
            raise InvalidInputError(f"{given} belongs to --data; without it all tokens that the store has are taken.")
        if storage is not None:
            target = below(storage, target)
        kept = _kept(target, is_new=into is None)
        name = model or str(kept["load_name"])
        selection = RowSelection(
            skip_bos=skip_bos,
            skip_special=skip_special,
            every=every,
            every_in=every_in,  # type: ignore[arg-type]  # RowSelection names the ways that there are
            pattern=token_pattern,
            roles=tuple(roles or ()),
            kinds=tuple(kinds or ()),
        )
        template = None if chat_template is None else read_template(chat_template)
        text = None
        if data:
            text = TextSource(
                data,
                text_column=text_column,
                shuffle_seed=shuffle_seed,
                max_document_tokens=max_document_tokens,
                messages_column=messages_column,
                media_column=media_column,
                message_media=message_media,
            )

        engine = engine or detected_engine()
        follows = is_follower(engine)
        if engine == "ray":
            say("Starting Ray's workers")

        def load() -> "LanguageModel":
            if not follows:
                say(f"Loading {name}")
            return load_model(
                name,
                revision=revision if model or revision else kept["revision"],
                device=device,
                dtype=compute_dtype or kept["compute_dtype"],
                compile=compile or kept["compile"],
                allow_download=allow_download,
                embeddings=embeddings,
            )

        if follows:
            _follow(lambda: run_capture(load, text, hook or [], target, engine=engine))
        with progress_bar("Capturing (rows)") as progress:
            report = run_capture(
                load,
                text,
                hook or [],
                target,
                append=append,
                selection=None if selection.keeps_all and (into or append) else selection,
                chat_template=template,
                max_tokens=max_tokens,
                context_size=context_size,
                dtype=dtype,
                batch_size=batch_size,
                rows_per_group=rows_per_group,
                progress=progress,
                engine=engine,
                workers=workers,
                gpus_per_worker=0 if engine == "ray" and device == "cpu" else None,
            )
        return Outcome(_facts(report), _summary(report))


def _follow(work: Callable[[], object]) -> NoReturn:
    """Work for the process that leads, which says what there is to be said, errors too."""
    with contextlib.suppress(ScopeError):
        work()
    raise typer.Exit


def _target(
    out: str | None,
    into: str | None,
    append: bool,
    data: list[Path] | None,
    hook: list[str] | None,
    model: str | None,
) -> str:
    """The store that is meant, once what was given makes sense together."""
    target = out or into
    if target is None or (out and into):
        raise InvalidInputError("Give either --out (a store to make or to go on with) or --into (one to add to).")
    if append and not data:
        raise InvalidInputError("--append adds text: give it with --data.")
    if into and data and not append:
        raise InvalidInputError(
            f"--into takes further hooks of the tokens that {into} has, without --data. To add text, give --append."
        )
    if not hook and not append:
        raise InvalidInputError("Give at least one --hook.")
    if out and not append:
        for flag, value in (("--model", model), ("--data", data)):
            if not value:
                raise InvalidInputError(f"Give {flag}, or a store that has its own with --into.")
    return target


def _kept(target: str, is_new: bool) -> dict[str, Any]:
    """How the model of a store was loaded; what one that may be new begins with."""
    from activations.store import ActivationStore
    from activations.writer import existing_manifest

    if is_new and existing_manifest(target) is None:
        return {"load_name": None, "revision": None, "compute_dtype": "auto", "compile": False}
    store = ActivationStore.open(target)
    name = store.manifest.get("load_name") or store.spec.model
    dtype, _, compiled = store.spec.compute_dtype.partition(", ")
    return {
        "load_name": name,
        "revision": store.spec.revision,
        "compute_dtype": dtype,
        "compile": compiled == "compiled",
    }


def _facts(report: "CaptureReport") -> dict[str, Any]:
    figures = report._asdict()
    store = figures.pop("store")
    return {"store": str(store.path), "id": store.id, "hooks": list(store.hooks), **figures}


def _summary(report: "CaptureReport") -> str:
    speed = report.new_rows / report.seconds if report.seconds else 0.0
    lines = [
        f"{report.store.path} holds {report.rows:,} rows of {report.documents:,} documents; "
        f"{report.new_rows:,} rows were computed, in {report.seconds:,.0f} s ({speed:,.0f} rows/s; loading apart)."
    ]
    if report.windowed_documents:
        size = report.store.spec.context_size
        lines.append(
            f"{report.windowed_documents:,} documents are longer than the context of {size} tokens and were cut into "
            "windows of that size, each with its own BOS."
        )
    if report.empty_documents:
        lines.append(f"{report.empty_documents:,} documents have no text and were left out.")
    return "\n".join(lines)
