"""`scope evaluate`: how good an SAE is on a store's held-out text, beside the baselines that a reader needs."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command
from scope.cli.sae import SAE_HELP, DownloadOption, HookOption, HookOutOption
from scope.errors import InvalidInputError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "evaluate")
    def evaluate(
        store: Annotated[str, typer.Argument(help="The activation store: a folder or s3://BUCKET/NAME.")],
        sae: Annotated[str, typer.Argument(help=SAE_HELP)],
        tokens: Annotated[
            int, typer.Option(help="Held-out tokens for the cross-entropy; 0 leaves it out and needs no model.")
        ] = 16_384,
        baselines: Annotated[
            bool,
            typer.Option(
                "--baselines/--no-baselines",
                help="Whether PCA of the same rank, a random dictionary and the mean are measured beside the SAE.",
            ),
        ] = True,
        save: Annotated[
            bool,
            typer.Option("--save/--no-save", help="Whether the figures go into the SAE's folder, evaluation.json."),
        ] = True,
        model: Annotated[
            str | None, typer.Option(help="The store's model, where it is not found under its own name.")
        ] = None,
        device: Annotated[
            str | None, typer.Option(help="Where the model and the SAE run; by default the best there is.")
        ] = None,
        hook: HookOption = None,
        hook_out: HookOutOption = None,
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Measure an SAE on a store's held-out documents: fvu, L0, cross-entropy recovered, each with its interval."""
        from activations.store import ActivationStore
        from scope.cli._steps import has_held_out, measure_sae, optional_model_of
        from scope.saes.formats import load, locate

        if tokens < 0:
            raise InvalidInputError(f"tokens is {tokens:,}; expected 0 or more.")
        opened = ActivationStore.open(store)
        if not has_held_out(opened):
            raise InvalidInputError("No document of this store is held out (one title in ten is). Capture more text.")
        loaded = load(sae, allow_download=allow_download, hook=hook, hook_out=hook_out)
        folder = Path(sae) if save and Path(sae).is_dir() else None
        language_model = optional_model_of(opened, model, device) if tokens else None
        if language_model is not None:
            loaded = loaded.to(language_model.device)
        elif device is not None:
            loaded = loaded.to(device)
        quality = measure_sae(loaded, folder, opened, language_model, tokens, baselines)
        result = {"sae": str(locate(sae).path), "id": loaded.fingerprint[:12], **quality.to_dict()}
        return Outcome(result, quality.summary())
