"""`scope index`: note every firing of every feature of an SAE over a store, both ways."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command
from scope.cli.sae import SAE_HELP, DownloadOption, HookOption, require_hook

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "index")
    def index(
        store: Annotated[str, typer.Argument(help="The activation store: a folder or s3://BUCKET/NAME.")],
        sae: Annotated[str, typer.Argument(help=SAE_HELP, metavar="SAE")],
        out: Annotated[Path, typer.Option(help="The index to make, or to go on with (NAME.index).")],
        model: Annotated[
            str | None, typer.Option(help="The store's model, where it is not found under its own name.")
        ] = None,
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        allow_mismatch: Annotated[
            bool, typer.Option("--allow-mismatch", help="Index although the SAE names another model or tokenizer.")
        ] = False,
        hook: HookOption = None,
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Note every firing of every feature over the text of a store, with each feature's statistics."""
        from activations.store import ActivationStore
        from scope.cli._steps import index_sae, optional_model_of
        from scope.saes.formats import load, locate

        opened = ActivationStore.open(store)
        loaded = load(sae, allow_download=allow_download, hook=hook)
        opened.resolve_hook(require_hook(loaded))
        language_model = optional_model_of(opened, model, device)
        built = index_sae(opened, locate(sae).path, out, language_model, allow_mismatch, loaded)
        text = (
            f"Indexed {built.n_firings:,} firings of {built.d_sae:,} features on {built.n_rows:,} rows -> {out}\n"
            f"{int(built.table['dead'].sum()):,} features never fire here. Look at them with: scope serve WORKSPACE"
        )
        return Outcome({"index": str(out), **built.info()}, text)
