"""`scope capture`: run a model over text and keep what its hooks see."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from activations.engines import Engine, detected_engine, is_follower
from activations.spec import StorageDtype
from scope.cli._command import Outcome, command, progress_bar, say
from scope.errors import ScopeError

if TYPE_CHECKING:
    from activations.capture import CaptureReport

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "capture")
    def capture(
        model: Annotated[str, typer.Option(help="gemma-3-270m, a Hugging Face id, a local folder, or a GGUF file.")],
        data: Annotated[list[Path], typer.Option(help="Text: a parquet, jsonl or plain text file. May be repeated.")],
        hook: Annotated[
            list[str], typer.Option(help="A hook name, such as blocks.8.hook_resid_post. May be repeated.")
        ],
        out: Annotated[
            str, typer.Option(help="The store to make, or to go on with: NAME.zarr or s3://BUCKET/NAME.zarr.")
        ],
        max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens, BOS included.")] = None,
        context_size: Annotated[int, typer.Option(help="Tokens in the longest window, BOS included.")] = 256,
        dtype: Annotated[StorageDtype, typer.Option(help="How activations are stored.")] = "bfloat16",
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
        revision: Annotated[str | None, typer.Option(help="Revision of a model from the hub.")] = None,
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        compute_dtype: Annotated[
            str, typer.Option(help="dtype in which the model runs: auto, bfloat16 or float32.")
        ] = "auto",
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
        from activations.storage import below
        from activations.text import TextSource
        from scope.models import LanguageModel

        text = TextSource(
            data, text_column=text_column, shuffle_seed=shuffle_seed, max_document_tokens=max_document_tokens
        )

        engine = engine or detected_engine()
        follows = is_follower(engine)
        if engine == "ray":
            say("Starting Ray's workers")

        def load() -> LanguageModel:
            if not follows:
                say(f"Loading {model}")
            return LanguageModel.load(
                model,
                revision=revision,
                device=device,
                dtype=compute_dtype,
                compile=compile,
                allow_download=allow_download,
            )

        if follows:
            _follow(lambda: run_capture(load, text, hook, out, engine=engine))
        with progress_bar("Capturing (rows)") as progress:
            report = run_capture(
                load,
                text,
                hook,
                out if storage is None else below(storage, out),
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


def _facts(report: "CaptureReport") -> dict[str, Any]:
    figures = report._asdict()
    store = figures.pop("store")
    return {"store": str(store.path), "id": store.id, "hooks": list(store.hooks), **figures}


def _summary(report: "CaptureReport") -> str:
    speed = report.new_rows / report.seconds if report.seconds else 0.0
    lines = [
        f"{report.store.path} holds {report.rows:,} tokens of {report.documents:,} documents; "
        f"{report.new_rows:,} of them are new, in {report.seconds:,.0f} s ({speed:,.0f} tokens/s)."
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
