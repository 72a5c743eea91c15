"""`scope train`: train a sparse autoencoder on a store or on a model as it runs, and say how good it is."""

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
        hook: Annotated[str, typer.Option(help="The hook to train on.")],
        out: Annotated[Path, typer.Option(help="The folder for the SAE.")],
        config: TrainConfig,
        store: Annotated[
            str | None,
            typer.Argument(
                help="The activation store: a folder or s3://BUCKET/NAME. Without one the model runs while it is "
                "trained: --model, --data."
            ),
        ] = None,
        evaluate_tokens: Annotated[
            int, typer.Option(help="Held-out tokens for the cross-entropy; 0 leaves it out and needs no model.")
        ] = 4096,
        model: Annotated[
            str | None,
            typer.Option(
                help="The store's model, where it is not found under its own name; without a store, the model."
            ),
        ] = None,
        data: Annotated[
            list[Path] | None,
            typer.Option(help="Without a store, the text: a parquet, jsonl or plain text file. May be repeated."),
        ] = None,
        context_size: Annotated[
            int, typer.Option(help="Without a store: tokens in the longest window, BOS included.")
        ] = 256,
        model_device: Annotated[
            str | None, typer.Option(help="Without a store: where the model runs; by default the best there is.")
        ] = None,
    ) -> Outcome:
        """Train a sparse autoencoder on one hook of a store, or of a model and a text without storing anything, and
        measure it on the held-out documents."""
        from scope.cli._steps import finished_sae, has_held_out, measure_sae, open_source, optional_model_of, train_sae

        opened = open_source(
            store, hook, model, data or [], context_size=context_size, model_device=model_device, device=config.device
        )
        held_out = has_held_out(opened)
        if not held_out:
            say("No document of this text is held out (one title in ten is): the quality will not be measured.")
        sae = finished_sae(out, opened, hook, config)
        if sae is None:
            report = train_sae(opened, hook, config, out)
            sae, figures, text = report.sae, report.to_dict(), report.summary()
        else:
            figures, text = {"hook": hook, "d_sae": sae.d_sae}, f"{out} holds the result of this very run already."
        figures = {"sae": str(out), "id": sae.fingerprint[:12], **figures}
        if held_out:
            language_model = optional_model_of(opened, model, config.device) if evaluate_tokens else None
            quality = measure_sae(sae, out, opened, language_model, evaluate_tokens)
            figures, text = {**figures, **quality.to_dict()}, f"{text}\n{quality.summary()}"
        return Outcome(figures, text)
