"""`scope train`: train a sparse autoencoder on a store, and say how good it is."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command, progress_bar, say
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
            int, typer.Option(help="Held-out tokens for the cross-entropy (0: leave it out).")
        ] = 4096,
    ) -> Outcome:
        """Train a sparse autoencoder on one hook of a store; measure it on the held-out documents."""
        from scope.cli._steps import evaluate_sae, train_sae

        report = train_sae(store, hook, config, out, progress_bar)
        say("Measuring on held-out documents")
        quality = evaluate_sae(store, out, evaluate_tokens, progress_bar)
        data = {"sae": str(out), "id": report.sae.fingerprint[:12], **report.to_dict(), **quality}
        return Outcome(data, f"{report.summary()}\n{quality_line(quality)}")


def quality_line(quality: dict[str, float]) -> str:
    """How good an SAE is, in one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in quality.items() if isinstance(value, float))
