"""`scope evaluate`: how good an SAE is on a store's held-out text, beside the baselines that a reader needs."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command
from scope.cli._model import EmbeddingPlace, EmbeddingsOption
from scope.cli.sae import SAE_HELP, DownloadOption, HookOption, HookOutOption
from scope.errors import InvalidInputError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "evaluate")
    def evaluate(
        store: Annotated[str | None, typer.Argument(help="The activation store: a folder or s3://BUCKET/NAME.")] = None,
        sae: Annotated[str | None, typer.Argument(help=SAE_HELP)] = None,
        transcoders: Annotated[
            Path | None,
            typer.Option(
                help="Instead of one SAE a folder with a transcoder for each layer, measured alone and all spliced in "
                "at once; the store is then optional: --model, --data."
            ),
        ] = None,
        data: Annotated[
            list[Path] | None,
            typer.Option(help="With --transcoders and no store, the text: parquet, jsonl or plain. May be repeated."),
        ] = None,
        max_tokens: Annotated[
            int | None, typer.Option(help="With --data: use this many tokens of it; by default all.")
        ] = None,
        context_size: Annotated[int, typer.Option(help="With --data: tokens in the longest window.")] = 256,
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
        embeddings: EmbeddingsOption = "device",
        hook: HookOption = None,
        hook_out: HookOutOption = None,
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Measure an SAE on a store's held-out documents: fvu, L0, cross-entropy recovered, each with its interval.

        With --transcoders: fvu and L0 of each layer, and of the model with all of them in the place of its MLPs the KL
        to the model and how often both hold the same next token for the likeliest.
        """
        if transcoders is not None:
            if sae is not None:
                raise InvalidInputError("Both an SAE and --transcoders were given; give one.")
            return _set(
                transcoders, store, model, data or [], max_tokens, context_size, tokens, save, device, embeddings
            )
        if store is None or sae is None:
            raise InvalidInputError("Give a store and an SAE, or --transcoders FOLDER.")
        from activations.store import ActivationStore
        from scope.cli._steps import has_held_out, has_next_tokens, measure_sae, optional_model_of
        from scope.saes.formats import load, locate

        if tokens < 0:
            raise InvalidInputError(f"tokens is {tokens:,}; expected 0 or more.")
        opened = ActivationStore.open(store)
        if not has_held_out(opened):
            raise InvalidInputError("No document of this store is held out (one title in ten is). Capture more text.")
        loaded = load(sae, allow_download=allow_download, hook=hook, hook_out=hook_out)
        folder = Path(sae) if save and Path(sae).is_dir() else None
        language_model = (
            optional_model_of(opened, model, device, embeddings) if tokens and has_next_tokens(opened) else None
        )
        if language_model is not None:
            loaded = loaded.to(language_model.device)
        elif device is not None:
            loaded = loaded.to(device)
        quality = measure_sae(loaded, folder, opened, language_model, tokens, baselines)
        result = {"sae": str(locate(sae).path), "id": loaded.fingerprint[:12], **quality.to_dict()}
        return Outcome(result, quality.summary())


def _set(
    folder: Path,
    store: str | None,
    model: str | None,
    data: list[Path],
    max_tokens: int | None,
    context_size: int,
    tokens: int,
    save: bool,
    device: str | None,
    embeddings: EmbeddingPlace,
) -> Outcome:
    """Measure the transcoders in a folder."""
    from scope.cli._steps import has_held_out, load_model_of, measure_set, open_source
    from scope.models import LiveActivations
    from scope.saes.formats import load
    from scope.training.by_layer import layer_of

    if tokens < 2:
        raise InvalidInputError(f"tokens is {tokens:,}; expected 2 or more.")
    folders: dict[int, Path] = {}
    hooks: list[str] = []
    for cfg in sorted(folder.glob("*/cfg.json")):
        ports = load(cfg.parent).cfg.ports
        names = [str(port.hook) for side in ports for port in side]
        layer = layer_of(names[0])
        if layer is None or layer in folders:
            what = "another one is of its layer" if layer is not None else "its hooks are of no layer"
            raise InvalidInputError(f"{cfg.parent} is no part of a set of transcoders: {what} ({', '.join(names)}).")
        folders[layer] = cfg.parent
        hooks += names
    if not folders:
        raise InvalidInputError(f"{folder} holds no transcoders; expected folders with a cfg.json each.")
    opened = open_source(
        store,
        hooks,
        model,
        data,
        context_size=context_size,
        model_device=device,
        device=device or "cpu",
        max_tokens=max_tokens,
        embeddings=embeddings,
    )
    if not has_held_out(opened):
        raise InvalidInputError("No document of this text is held out (one title in ten is). Give more text.")
    if isinstance(opened, LiveActivations):
        language_model = opened.model
    else:
        language_model = load_model_of(opened, model, device, embeddings)
    found = measure_set(dict(sorted(folders.items())), opened, language_model, tokens, folder if save else None)
    return Outcome({"transcoders": str(folder), **found.to_dict()}, found.summary())
