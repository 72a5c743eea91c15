"""`scope train`: train a sparse autoencoder on a store, and say how good it is."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command, say
from scope.training.config import TrainConfig

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "train", config=TrainConfig, required=("d_sae", "k"))
    def train(
        store: Annotated[str, typer.Argument(help="The activation store: a folder or s3://BUCKET/NAME.")],
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
        from scope.cli._steps import finished_sae, measure_sae, optional_model_of, train_sae

        opened = ActivationStore.open(store)
        held_out = bool(opened.documents()["held_out"].any())
        if not held_out:
            say("No document of this store is held out (one title in ten is): the quality will not be measured.")
        sae = finished_sae(out, opened, hook, config)
        if sae is None:
            report = train_sae(opened, hook, config, out)
            sae, figures, text = report.sae, report.to_dict(), report.summary()
        else:
            figures, text = {"hook": hook, "d_sae": sae.d_sae}, f"{out} holds the result of this very run already."
        data = {"sae": str(out), "id": sae.fingerprint[:12], **figures}
        if held_out:
            language_model = optional_model_of(opened, model, config.device) if evaluate_tokens else None
            quality = measure_sae(sae, out, opened, language_model, evaluate_tokens)
            data, text = {**data, **quality.to_dict()}, f"{text}\n{quality.summary()}"
        return Outcome(data, text)
