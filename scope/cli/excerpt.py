"""`scope excerpt`: the little of an index that ships with its SAE."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command, progress_bar
from scope.features.excerpt_settings import ExcerptSettings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "excerpt", config=ExcerptSettings)
    def excerpt(
        index: Annotated[str, typer.Argument(help="An index (a folder, or an id or name in the workspace).")],
        config: ExcerptSettings,
        out: Annotated[Path, typer.Option(help="The folder to make (NAME.excerpt).")],
        text: Annotated[
            bool, typer.Option("--text", help="Keep the text's tokens beside it, so that it can be read without them.")
        ] = False,
        workspace: Annotated[Path | None, typer.Option(help="Where the index lies.")] = None,
    ) -> Outcome:
        """Keep of an index each feature's figures and some examples: small enough to ship with the SAE."""
        from scope.features.excerpt_writing import make_excerpt
        from scope.workspace import open_index

        opened = open_index(index, workspace)
        with progress_bar("Excerpting (features)") as progress:
            made = make_excerpt(opened, out, config, text=text, progress=progress)
        per_feature = made.n_bytes / made.d_sae
        said = f"{out} holds {made.d_sae:,} features over {made.n_rows:,} tokens in {made.n_bytes:,} bytes "
        said += f"({per_feature:.0f} a feature){', and the text' if made.has_text else ''}."
        return Outcome({"excerpt": str(out), "bytes_per_feature": per_feature, **made.info()}, said)
