"""What several commands do: open what they were given, find the model that filled a store, train, measure, index."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scope.cli._command import progress_bar, read_template, say
from scope.cli._model import EmbeddingPlace, load_model
from scope.errors import InvalidInputError, MismatchError, ScopeError

if TYPE_CHECKING:
    from activations.store import ActivationStore
    from scope.features.index import FeatureIndex
    from scope.models import LanguageModel, LiveActivations
    from scope.saes.base import SAE
    from scope.training import SweepRun, TrainConfig, TrainReport
    from scope.training.aligned import AlignedStores
    from scope.training.evaluate import Quality
    from scope.training.transcoder_set import SetQuality

    Source = ActivationStore | LiveActivations

__all__ = [
    "aligned_stores",
    "finished_sae",
    "has_held_out",
    "has_next_tokens",
    "index_sae",
    "load_model_of",
    "measure_sae",
    "measure_saes",
    "measure_set",
    "open_source",
    "optional_model_of",
    "train_runs",
    "train_sae",
]


def open_source(
    store: str | None,
    hooks: Sequence[str],
    model: str | None,
    data: Sequence[Path],
    *,
    context_size: int,
    model_device: str | None,
    device: str,
    max_tokens: int | None = None,
    shuffle_seed: int | None = None,
    text_column: str | None = None,
    messages_column: str | None = None,
    chat_template: Path | None = None,
    embeddings: EmbeddingPlace = "device",
) -> "Source":
    """The store in a folder; or, without one, what hooks of a model see on a text, computed as it is consumed.

    Args:
        store: the store's folder or address.
        hooks: the hooks, where there is no store; a * stands for every layer.
        model: what to load, where there is no store.
        data: the text's files, where there is no store.
        context_size: tokens in a window, BOS included.
        model_device: where the model runs; None for the best there is.
        device: where the activations are wanted.
        max_tokens: without a store: rows in all, BOS included; None for all of the text.
        shuffle_seed: without a store: take the documents in a random order with this seed.
        text_column: without a store: the column that holds the text; None for "text".
        messages_column: without a store: the column that holds chats, in place of texts.
        chat_template: without a store: the file of the template that writes chats; None for the tokenizer's own.
        embeddings: where the model's lookup tables lie.

    Raises:
        InvalidInputError: there are both, or neither.
    """
    of_text: dict[str, Any] = {
        "--max-tokens": max_tokens,
        "--shuffle-seed": shuffle_seed,
        "--text-column": text_column,
        "--messages-column": messages_column,
        "--chat-template": chat_template,
    }
    given = [flag for flag, value in of_text.items() if value is not None]
    if given and not data:
        what = f"{given[0]} belongs" if len(given) == 1 else f"{', '.join(given)} belong"
        raise InvalidInputError(f"{what} to --data; a store's text is what it has captured.")
    if store is not None:
        from activations.store import ActivationStore

        if data:
            raise InvalidInputError("Both a store and --data were given; the store has its text already. Give one.")
        return ActivationStore.open(store)
    if model is None or not data:
        raise InvalidInputError("Give an activation store to train on, or --model and --data to do without one.")
    from activations.text import TextSource

    template = None if chat_template is None else read_template(chat_template)
    text = TextSource(
        data, text_column=text_column or "text", messages_column=messages_column, shuffle_seed=shuffle_seed
    )
    text.check()
    say(f"Loading {model}")
    loaded = load_model(model, device=model_device, embeddings=embeddings)
    return loaded.source(
        text,
        hooks,
        context_size=context_size,
        max_tokens=max_tokens,
        device=device,
        chat_template=template,
    )


def has_held_out(source: "Source") -> bool:
    """Whether there are documents to measure on."""
    from activations.store import ActivationStore

    if isinstance(source, ActivationStore):
        return bool(source.documents()["held_out"].any())
    return source.has_held_out()


def has_next_tokens(source: "Source") -> bool:
    """Whether there is a cross-entropy of next tokens to measure; steps of denoising have none."""
    return not getattr(source, "manifest", {}).get("denoising")


def load_model_of(
    store: "ActivationStore",
    name: str | None = None,
    device: str | None = None,
    embeddings: EmbeddingPlace = "device",
    trust_remote_code: bool = False,
) -> "LanguageModel":
    """The model that filled a store.

    Args:
        store: the store, which remembers what its model was loaded as.
        name: load this one instead, if it is the same model.
        device: where it runs.
        embeddings: where its lookup tables lie.
        trust_remote_code: run Python code that comes with it.

    Raises:
        MismatchError: the model has other weights or another tokenizer than the store's.
    """
    wanted = name or store.manifest.get("load_name") or store.spec.model
    say(f"Loading {wanted}")
    model = load_model(
        wanted,
        revision=store.spec.revision,
        device=device,
        embeddings=embeddings,
        trust_remote_code=trust_remote_code,
    )
    for field in ("weight_hash", "tokenizer_hash"):
        got, expected = getattr(model.identity, field), getattr(store.spec, field)
        if got != expected:
            raise MismatchError(
                f"{wanted} has the {field.replace('_', ' ')} {got}, but {store.path} was captured with {expected} "
                f"({store.spec.model}). Give the model of the store with --model."
            )
    return model


def optional_model_of(
    store: "Source",
    name: str | None,
    device: str | None,
    embeddings: EmbeddingPlace = "device",
    trust_remote_code: bool = False,
) -> "LanguageModel | None":
    """As `load_model_of`, but None, with a word, where the store's own model is not on this machine and nothing was
    said of it; a live source has its model."""
    from activations.store import ActivationStore

    if not isinstance(store, ActivationStore):
        return store.model
    try:
        return load_model_of(store, name, device, embeddings, trust_remote_code)
    except MismatchError:
        raise
    except ScopeError as error:
        if name is not None or embeddings != "device":
            raise
        say(f"Going on without the model: {error}")
        return None


def aligned_stores(first: "ActivationStore", further: Sequence[str]) -> "AlignedStores":
    """Stores of the same text as one source, named a, b, c, …"""
    from string import ascii_lowercase

    from activations.store import ActivationStore
    from scope.training.aligned import AlignedStores

    return AlignedStores(dict(zip(ascii_lowercase, [first, *map(ActivationStore.open, further)], strict=False)))


def train_sae(
    store: "Source",
    hook: str | Sequence[str],
    config: "TrainConfig",
    out: Path,
    hook_out: Sequence[str] = (),
    trackers: Sequence[str] = (),
    snapshots: int = 0,
) -> "TrainReport":
    """Train on one hook of a store, or a dictionary of several, with a progress bar."""
    from scope.training import train

    with progress_bar("Training (rows)") as progress:
        return train(
            store, hook, config, out, hook_out=hook_out, progress=progress, trackers=trackers, snapshots=snapshots
        )


def train_runs(
    store: "Source", runs: "Sequence[SweepRun]", out: Path, trackers: Sequence[str] = (), snapshots: int = 0
) -> "list[TrainReport]":
    """Train a sweep from one pass over a store, with a progress bar."""
    from scope.training import train_sweep

    with progress_bar(f"Training {len(runs)} (rows)") as progress:
        return train_sweep(store, runs, out, progress=progress, trackers=trackers, snapshots=snapshots)


def finished_sae(
    out: Path,
    store: "Source",
    hook: str | Sequence[str],
    config: "TrainConfig",
    hook_out: Sequence[str] = (),
) -> "SAE | None":
    """The SAE in `out` if it is the result of this very run: same store, hooks and settings."""
    from scope.training.workfolder import folder_beside

    if not (out / "manifest.json").is_file() or folder_beside(out).is_dir():  # training itself clears what is left
        return None
    from scope.saes.formats import load
    from scope.training.data import ports_of, provenance_of
    from scope.training.single import is_result_of

    metadata = provenance_of(store, ports_of(store, hook, hook_out)[0], {})
    return load(out) if is_result_of(out, metadata, config) else None


def measure_sae(
    sae: "SAE",
    out: Path | None,
    store: "Source | AlignedStores",
    model: "LanguageModel | None",
    tokens: int,
    baselines: bool = True,
) -> "Quality":
    """Measure an SAE on the store's held-out documents, with a progress bar, and leave the figures beside it.

    Args:
        sae: the SAE.
        out: its folder; None writes nothing.
        store: the activations.
        model: the store's model; None leaves the cross-entropy out.
        tokens: held-out tokens for the cross-entropy; 0 leaves it out.
        baselines: whether PCA, a random dictionary and the mean are measured too.
    """
    (quality,) = measure_saes([(sae, out)], store, model, tokens, baselines)
    return quality


def measure_saes(
    saes: "Sequence[tuple[SAE, Path | None]]",
    store: "Source | AlignedStores",
    model: "LanguageModel | None",
    tokens: int,
    baselines: bool = True,
) -> "list[Quality]":
    """As `measure_sae`, for several, each with its folder: what they have in common is measured once."""
    from scope.training.evaluate import evaluate_several

    found: dict[str, Quality] = {}
    several = {str(number): sae for number, (sae, _) in enumerate(saes)}
    with progress_bar(f"Measuring {len(saes)} (passes)" if len(saes) > 1 else "Measuring (passes)") as progress:
        for name, quality in evaluate_several(
            several, store, model if tokens else None, ce_tokens=tokens, baselines=baselines, progress=progress
        ):
            found[name] = quality
            folder = saes[int(name)][1]
            if folder is not None:
                quality.save(folder)
    return [found[name] for name in several]


def measure_set(
    folders: "Mapping[int, Path]", store: "Source", model: "LanguageModel", tokens: int, card: Path | None
) -> "SetQuality":
    """Measure the transcoders of a set, alone and all at once, with a progress bar.

    Args:
        folders: where each layer's transcoder lies.
        store: the activations.
        model: the store's model.
        tokens: held-out tokens for the replacement model.
        card: the folder that gets the card; None writes nothing.
    """
    from scope.saes.formats import load
    from scope.training.transcoder_set import evaluate_transcoders

    saes = [load(folder).to(model.device) for folder in folders.values()]
    with progress_bar("Measuring the set (steps)") as progress:
        quality = evaluate_transcoders(
            saes, store, model, tokens=tokens, folders=folders if card else None, progress=progress
        )
    if card is not None:
        quality.save(card)
    return quality


def index_sae(
    store: "ActivationStore",
    sae_folder: Path,
    out: Path,
    model: "LanguageModel | None",
    allow_mismatch: bool = False,
    sae: "SAE | None" = None,
) -> "FeatureIndex":
    """Index an SAE's firings on a store, with a progress bar. The figures beside the SAE go into the index.

    Args:
        store: the store.
        sae_folder: where the SAE lies.
        out: the index to make, or to go on with.
        model: the store's model, where it is at hand.
        allow_mismatch: whether the SAE may name another model or tokenizer than the store.
        sae: the SAE, where it was loaded before.
    """
    from scope.features.build import build_index
    from scope.saes.formats import load
    from scope.training.evaluate import read_quality

    sae = sae or load(sae_folder)
    with progress_bar("Indexing (steps)") as progress:
        return build_index(
            store,
            sae,
            out,
            model=model,
            metrics=read_quality(sae_folder),
            allow_mismatch=allow_mismatch,
            progress=progress,
        )
