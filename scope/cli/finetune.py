"""`scope finetune`: train a finished SAE a little more, on the model's predictions, and say what that gained."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command, progress_bar
from scope.cli._model import EmbeddingsOption
from scope.cli.sae import SAE_HELP, DownloadOption, HookOption, HookOutOption, require_hook
from scope.training.settings import FinetuneConfig

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "finetune", config=FinetuneConfig)
    def finetune(
        store: Annotated[Path, typer.Argument(help="The activation store that the SAE was trained on.")],
        sae: Annotated[str, typer.Argument(help=SAE_HELP)],
        out: Annotated[Path, typer.Option(help="The folder for the fine-tuned SAE.")],
        config: FinetuneConfig,
        device: Annotated[str, typer.Option(help='Where to train: "cpu", "cuda" or "cuda:1".')] = "cpu",
        evaluate_tokens: Annotated[int, typer.Option(help="Held-out tokens for the cross-entropy; 0 for none.")] = 4096,
        model: Annotated[
            str | None, typer.Option(help="The store's model, where it is not found under its own name.")
        ] = None,
        embeddings: EmbeddingsOption = "device",
        hook: HookOption = None,
        hook_out: HookOutOption = None,
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Fine-tune an SAE so that the model, with it spliced in, predicts as it did (KL, end to end)."""
        from activations.store import ActivationStore
        from scope.cli._steps import load_model_of, measure_sae
        from scope.saes.formats import load
        from scope.training import finetune_kl

        opened = ActivationStore.open(store)
        trained = load(sae, allow_download=allow_download, hook=hook, hook_out=hook_out)
        require_hook(trained)
        language_model = load_model_of(opened, model, device, embeddings)
        with progress_bar("Fine-tuning (tokens)") as progress:
            report = finetune_kl(trained, language_model, opened, config, out, progress=progress)
        data, text = report.to_dict(), report.summary()
        if evaluate_tokens and bool(opened.documents()["held_out"].any()):
            quality = measure_sae(report.sae, out, opened, language_model, evaluate_tokens)
            data, text = {**data, **quality.to_dict()}, f"{text}\n{quality.summary()}"
        return Outcome({"sae": str(out), "id": report.sae.fingerprint[:12], **data}, text)
