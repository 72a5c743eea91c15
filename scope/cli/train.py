"""`scope train`: train a sparse autoencoder on a store, and say how good it is."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command
from scope.training.config import TrainConfig

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "train", config=TrainConfig, required=("d_sae", "k"))
    def train(
        store: Annotated[Path, typer.Argument(help="The activation store.")],
        hook: Annotated[str, typer.Option(help="The hook of the store to train on.")],
        out: Annotated[Path, typer.Option(help="The folder for the SAE.")],
        config: TrainConfig,
        evaluate_tokens: Annotated[
            int, typer.Option(help="Held-out tokens for the cross-entropy; 0 leaves it out and needs no model.")
        ] = 4096,
        model: Annotated[
            str | None, typer.Option(help="The store's model, where it is not found under its own name.")
        ] = None,
    ) -> Outcome:
        """Train a sparse autoencoder on one hook of a store, and measure it on the held-out documents."""
        from activations.store import ActivationStore
        from scope.cli._steps import measure_sae, optional_model_of, train_sae

        opened = ActivationStore.open(store)
        report = train_sae(opened, hook, config, out)
        language_model = optional_model_of(opened, model, config.device) if evaluate_tokens else None
        quality = measure_sae(report.sae, out, opened, language_model, evaluate_tokens)
        data = {"sae": str(out), "id": report.sae.fingerprint[:12], **report.to_dict(), **quality.to_dict()}
        return Outcome(data, f"{report.summary()}\n{quality.summary()}")
