"""`scope export`: a store as files that other tools read."""

from pathlib import Path
from typing import Annotated

import typer

from activations.spec import StorageDtype
from scope.cli._command import Outcome, command, progress_bar, say

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "export")
    def export(
        store: Annotated[str, typer.Argument(help="The store: a folder or s3://BUCKET/NAME.")],
        format: Annotated[str, typer.Option(help="safetensors, npy, or hf-dataset (parquet).")],
        out: Annotated[Path, typer.Option(help="The folder to write, new or empty.")],
        hook: Annotated[list[str] | None, typer.Option(help="A hook; by default all. May be repeated.")] = None,
        dtype: Annotated[
            StorageDtype | None,
            typer.Option(
                help="Of the activations; by default the store's, and float32 for bfloat16 in npy and hf-dataset. "
                "npy as bfloat16 holds its bits in uint16."
            ),
        ] = None,
        file_mb: Annotated[int, typer.Option(help="Size of a file in MB, about.")] = 256,
    ) -> Outcome:
        """Write a store's activations and tokens, verified, to safetensors, npy or a Hugging Face data set."""
        from activations.export import export_store
        from activations.store import ActivationStore

        opened = ActivationStore.open(store)
        if not opened.is_complete_for(hook or opened.hooks):
            say(f"{store} is not complete; what it has by now is exported.")
        with progress_bar("Exporting (rows)") as progress:
            report = export_store(
                opened,
                out,
                format,  # type: ignore[arg-type]  # export_store names the formats that there are
                hook or (),
                dtype=dtype,
                file_bytes=file_mb * 2**20,
                progress=progress,
            )
        text = f"{out} holds {report.rows:,} rows in {report.files:,} file(s), {report.bytes / 1e6:,.1f} MB."
        return Outcome({**report._asdict(), "folder": str(report.folder)}, text)
