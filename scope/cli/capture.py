"""`scope capture`: run a model over text and keep what its hooks see."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command, progress_bar, say

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "capture")
    def capture(
        model: Annotated[
            str, typer.Option(help="gemma-3-270m, a Hugging Face id, a local folder, or a GGUF file.")
        ],
        data: Annotated[
            list[Path], typer.Option(help="Text: a parquet, jsonl or plain text file. May be repeated.")
        ],
        hook: Annotated[
            list[str], typer.Option(help="A hook name, such as blocks.8.hook_resid_post. May be repeated.")
        ],
        out: Annotated[Path, typer.Option(help="The store to make, or to go on with (NAME.zarr).")],
        max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens, BOS included.")] = None,
        context_size: Annotated[int, typer.Option(help="Tokens in the longest window, BOS included.")] = 256,
        dtype: Annotated[str, typer.Option(help="Stored as bfloat16, float16 or float32.")] = "bfloat16",
        batch_size: Annotated[int, typer.Option(help="Tokens that the model runs at once.")] = 4096,
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
        allow_download: Annotated[
            bool, typer.Option("--allow-download", help="Fetch the model from the hub if it is not here.")
        ] = False,
    ) -> Outcome:
        """Run a model over text and keep what its hooks see, one row a token, in a store that can be resumed."""
        from activations.capture import capture as run_capture
        from activations.text import TextSource
        from scope.models import LanguageModel

        text = TextSource(
            data, text_column=text_column, shuffle_seed=shuffle_seed, max_document_tokens=max_document_tokens
        )
        text.check()
        say(f"Loading {model}")
        language_model = LanguageModel.load(
            model, revision=revision, device=device, dtype=compute_dtype, allow_download=allow_download
        )
        with progress_bar("Capturing (rows)") as progress:
            report = run_capture(
                language_model,
                text,
                hook,
                out,
                max_tokens=max_tokens,
                context_size=context_size,
                dtype=dtype,
                batch_size=batch_size,
                rows_per_group=rows_per_group,
                progress=progress,
            )
        return Outcome(report.to_dict(), report.summary())
