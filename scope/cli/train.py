"""`scope train`: train a sparse autoencoder on a store or on a model as it runs, and say how good it is."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command, follows, say
from scope.cli._model import EmbeddingsOption
from scope.errors import InvalidInputError
from scope.training.config import SWEPT, TrainConfig

if TYPE_CHECKING:
    from scope.training.sweeps import SweepRun

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "train", config=TrainConfig, required=("d_sae", "k"), several=SWEPT)
    def train(
        hook: Annotated[
            list[str],
            typer.Option(
                help="The hook to train on. Several are what a crosscoder or clt reads, in order; for other "
                "architectures they make a sweep. A * stands for every layer: 'blocks.*.ln2.hook_out'."
            ),
        ],
        out: Annotated[Path, typer.Option(help="The folder for the SAE; for a sweep, the folder of their folders.")],
        config: TrainConfig,
        swept: dict[str, tuple[Any, ...]],
        store: Annotated[
            str | None,
            typer.Argument(
                help="The activation store: a folder or s3://BUCKET/NAME. Without one the model runs while it is "
                "trained: --model, --data."
            ),
        ] = None,
        hook_out: Annotated[
            list[str] | None,
            typer.Option(
                help="The hook that a transcoder writes; those that a clt writes, in order. As many as --hook train a "
                "transcoder for each pair; 'blocks.*.hook_mlp_out' writes every layer."
            ),
        ] = None,
        beside: Annotated[
            list[str] | None,
            typer.Option(
                help="A further store of the same text, such as another model's, for a crosscoder. Hooks are then "
                "named a:HOOK in STORE, b:HOOK in the first store beside it, and so on."
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
        max_tokens: Annotated[
            int | None,
            typer.Option(help="Without a store: use this many tokens of --data, BOS included; by default all."),
        ] = None,
        shuffle_seed: Annotated[
            int | None,
            typer.Option(help="Without a store: take the documents in a random order with this seed."),
        ] = None,
        text_column: Annotated[
            str | None, typer.Option(help="Without a store: the column that holds the text; by default text.")
        ] = None,
        messages_column: Annotated[
            str | None,
            typer.Option(help="Without a store: the text is chats, in this column; see scope capture."),
        ] = None,
        chat_template: Annotated[
            Path | None,
            typer.Option(help="Without a store: a Jinja file that writes chats, in place of the tokenizer's own."),
        ] = None,
        model_device: Annotated[
            str | None, typer.Option(help="Without a store: where the model runs; by default the best there is.")
        ] = None,
        embeddings: EmbeddingsOption = "device",
        baselines: Annotated[
            bool,
            typer.Option(
                "--baselines/--no-baselines",
                help="Whether PCA of the same rank, a random dictionary and the mean are measured beside the SAE.",
            ),
        ] = True,
        tracker: Annotated[
            list[str] | None,
            typer.Option(help="Where else the run log's lines go: tensorboard or wandb. May be repeated."),
        ] = None,
        snapshots: Annotated[
            int,
            typer.Option(
                help="Decoders to keep along the way in OUT.snapshots, for scope compare: the last one half-way, each "
                "other at half the steps of the one after it.",
                min=0,
            ),
        ] = 0,
    ) -> Outcome:
        """Train a sparse dictionary on a store, or on a model and a text without storing anything, and measure it on
        the held-out documents.

        Commas in --k, --d-sae, --lr or --arch, and several --hook, train one for each combination, all from one pass
        over the data. So are the transcoders of all MLPs:
        --arch transcoder --hook 'blocks.*.ln2.hook_out' --hook-out 'blocks.*.hook_mlp_out'
        They are measured as a set, all spliced in at once, and OUT gets a card.

        Several GPUs (or CPUs) train one SAE where torchrun starts this command:
        torchrun --nproc-per-node 2 -m scope.cli train STORE --device cuda … They divide each batch, or, with --parallel
        features, the features, for dictionaries that one GPU cannot hold. The result is that of one process, up to the
        order of sums; --batch-size is that of all together. A run that was stopped goes on with any number of
        processes.
        """
        from activations.hook_patterns import every_layer
        from scope.cli._steps import (
            aligned_stores,
            finished_sae,
            has_held_out,
            has_next_tokens,
            measure_saes,
            measure_set,
            open_source,
            optional_model_of,
            train_runs,
            train_sae,
        )
        from scope.training.by_layer import is_set, layer_of
        from scope.training.distributed import local_device, own_gpu
        from scope.training.trackers import require_trackers

        trackers = require_trackers(tracker or [])
        if beside and store is None:
            raise InvalidInputError("--beside names further stores; give the first one too.")
        first: Any = open_source(
            store,
            [*hook, *(hook_out or [])],
            model,
            data or [],
            context_size=context_size,
            model_device=model_device or own_gpu(),
            device=local_device(config.device),
            max_tokens=max_tokens,
            shuffle_seed=shuffle_seed,
            text_column=text_column,
            messages_column=messages_column,
            chat_template=chat_template,
            embeddings=embeddings,
        )
        opened: Any = first if not beside else aligned_stores(first, beside)
        held_out = has_held_out(first)
        if not held_out:
            say("No document of this text is held out (one title in ten is): the quality will not be measured.")
        hook, hook_out = every_layer(hook, opened.hooks), every_layer(hook_out or [], opened.hooks)
        runs = _runs(config, hook, hook_out, swept)
        if len(runs) > 1:
            trained = {
                out / run.name: report
                for run, report in zip(runs, train_runs(opened, runs, out, trackers, snapshots), strict=True)
            }
            done = [(report.sae, folder, report.to_dict(), report.summary()) for folder, report in trained.items()]
        else:
            hooks, written = runs[0].hooks, runs[0].hooks_out
            sae = finished_sae(out, opened, hooks, runs[0].config, written)
            if sae is None:
                report = train_sae(opened, hooks, runs[0].config, out, written, trackers, snapshots)
                done = [(report.sae, out, report.to_dict(), report.summary())]
            else:
                figures = {"hook": ", ".join(hooks), "d_sae": sae.d_sae}
                done = [(sae, out, figures, f"{out} holds the result of this very run already.")]
        if follows():
            raise typer.Exit
        spliced = held_out and evaluate_tokens and not beside and has_next_tokens(first)
        language_model = optional_model_of(first, model, config.device, embeddings) if spliced else None
        if is_set(runs) and language_model is not None:
            folders = {layer_of(str(sae.hook_name)) or 0: folder for sae, folder, _, _ in done}
            found = measure_set(folders, first, language_model, evaluate_tokens, out)
            trained_runs = [
                {"sae": str(folder), "id": sae.fingerprint[:12], **figures} for sae, folder, figures, _ in done
            ]
            return Outcome({"runs": trained_runs, **found.to_dict()}, f"{found.summary()}\n{out} has the card.")
        device = local_device(config.device)
        trained_saes = [(sae.to(device), folder) for sae, folder, _, _ in done]
        qualities = measure_saes(trained_saes, opened, language_model, evaluate_tokens, baselines) if held_out else []
        results, texts = [], []
        for (sae, folder, figures, text), quality in itertools.zip_longest(done, qualities):
            result = {"sae": str(folder), "id": sae.fingerprint[:12], **figures}
            if quality is not None:
                result, text = {**result, **quality.to_dict()}, f"{text}\n{quality.summary()}"
            results.append(result)
            texts.append(text)
        return Outcome(results[0] if len(runs) == 1 else {"runs": results}, "\n\n".join(texts))


def _runs(
    config: TrainConfig, hooks: list[str], hooks_out: list[str], swept: dict[str, tuple[Any, ...]]
) -> "list[SweepRun]":
    """What is to be trained: one SAE for each combination and hook; several hooks are one SAE's where it reads many."""
    from scope.training.by_layer import one_for_each_layer
    from scope.training.sweeps import SweepRun, sweep

    architectures = swept.get("arch", (config.arch,))
    together = [name in ("crosscoder", "clt") for name in architectures]
    if any(together) != all(together):
        raise InvalidInputError(
            f"A sweep over {', '.join(architectures)} reads several hooks together and one by one. Make it two sweeps."
        )
    if not any(together) and not hooks_out:
        return sweep(config, hooks, **swept)
    if not any(together) and (len(hooks) > 1 or len(hooks_out) > 1):
        return one_for_each_layer(config, hooks, hooks_out, **swept)
    runs = sweep(config, [" ".join(hooks)], **swept)
    return [SweepRun(run.name, tuple(hooks), tuple(hooks_out), run.config) for run in runs]
