"""`scope index`: note every firing of every feature of SAEs over a store, or over a model as it runs, both ways."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command, progress_bar, say
from scope.cli._model import EmbeddingPlace, EmbeddingsOption, TrustOption, load_model
from scope.cli.sae import SAE_HELP, DownloadOption, HookOption, require_hook
from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.models import LanguageModel

__all__ = ["index_folders", "register"]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "index")
    def index(
        what: Annotated[
            list[str],
            typer.Argument(
                metavar="[STORE] SAE...",
                help="The activation store (a folder or s3://BUCKET/NAME), which is left out with --data, then the "
                f"SAEs, all of which are indexed in one pass over the text. {SAE_HELP}",
            ),
        ],
        out: Annotated[
            list[Path],
            typer.Option(
                help="The index to make, to go on with, or to extend where its store has grown (NAME.index). Of "
                "several SAEs one each, in order, or one folder in which each gets an index of its own name."
            ),
        ],
        model: Annotated[
            str | None,
            typer.Option(
                help="The store's model, where it is not found under its own name; with --data, the model to run."
            ),
        ] = None,
        data: Annotated[
            list[Path] | None,
            typer.Option(
                help="Do without a store: run the model on this text, a parquet, jsonl or plain text file. May be "
                "repeated."
            ),
        ] = None,
        max_tokens: Annotated[int | None, typer.Option(help="With --data: rows in all, BOS included.")] = None,
        context_size: Annotated[int, typer.Option(help="With --data: tokens in the longest window.")] = 256,
        umap: Annotated[
            bool, typer.Option("--umap", help="Add a map of the decoder rows in two dimensions (extra umap).")
        ] = False,
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        embeddings: EmbeddingsOption = "device",
        allow_mismatch: Annotated[
            bool, typer.Option("--allow-mismatch", help="Index although an SAE names another model or tokenizer.")
        ] = False,
        hook: HookOption = None,
        allow_download: DownloadOption = False,
        trust_remote_code: TrustOption = False,
    ) -> Outcome:
        """Note every firing of every feature over a text, with each feature's statistics."""
        from scope.features.build import build_indexes
        from scope.saes.formats import load, locate
        from scope.training.evaluate import read_quality

        store, names = (None, what) if data else (what[0], what[1:])
        if not names:
            raise InvalidInputError("Give a store and an SAE to index over it; or an SAE with --model and --data.")
        folders = index_folders(names, out)
        if hook is not None and len(names) > 1:
            raise InvalidInputError(f"--hook is of one SAE; got {len(names)} SAEs. Index that one by itself.")
        if umap:
            from scope.features.decoder_map import require_umap

            require_umap()
        saes = [load(name, allow_download=allow_download, hook=hook) for name in names]
        hooks = [require_hook(sae) for sae in saes]
        source, language_model = _source(
            store, hooks, model, data or [], max_tokens, context_size, device, embeddings, trust_remote_code
        )
        for sae in saes:
            sae.to(_device(device, language_model))
        with progress_bar("Indexing (steps)") as progress:
            built = build_indexes(
                source,
                saes,
                folders,
                model=language_model,
                metrics=[read_quality(locate(name).path) for name in names],
                allow_mismatch=allow_mismatch,
                progress=progress,
            )
        if umap:
            built = [_mapped(made, sae) for made, sae in zip(built, saes, strict=True)]
        facts = [{"index": str(made.path), **made.info()} for made in built]
        text = "\n".join(map(_told, built)) + "\nLook at them with: scope serve WORKSPACE"
        return Outcome(facts[0] if len(facts) == 1 else {"indexes": facts}, text)


def index_folders(saes: Sequence[str], out: Sequence[Path]) -> list[Path]:
    """Where the index of each SAE goes: what was given for each, or a folder's children, named as the SAEs are.

    A name is the SAE's last part, `resid_8.index` of `saes/resid_8`, with as many parts before it as tell all apart.

    Raises:
        InvalidInputError: the number of folders fits neither, or an SAE is given twice.
    """
    if len(out) == len(saes):
        return list(out)
    if len(out) != 1:
        raise InvalidInputError(f"Got {len(saes)} SAEs and {len(out)} --out; expected one for each SAE, or one folder.")
    parts = [name.split("://")[-1].replace("@", "-").strip("/").split("/") for name in saes]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["-".join(own[-n:]) for own in parts]
        if len(set(names)) == len(names):
            return [out[0] / f"{name}.index" for name in names]
    raise InvalidInputError(f"An SAE is given twice: {', '.join(saes)}.")


def _source(
    store: str | None,
    hooks: Sequence[str],
    model: str | None,
    data: Sequence[Path],
    max_tokens: int | None,
    context_size: int,
    device: str | None,
    embeddings: EmbeddingPlace,
    trust_remote_code: bool,
) -> tuple[Any, "LanguageModel | None"]:
    """What is indexed, and the model that gives strings and logits."""
    if store is not None:
        from activations.store import ActivationStore
        from scope.cli._steps import optional_model_of

        if max_tokens is not None:
            raise InvalidInputError("--max-tokens is of a text given with --data; a store is indexed as a whole.")
        opened = ActivationStore.open(store)
        for hook in hooks:
            opened.resolve_hook(hook)
        return opened, optional_model_of(opened, model, device, embeddings, trust_remote_code)
    if model is None:
        raise InvalidInputError("--data is a text to run a model on. Give the model with --model.")
    from activations.text import TextSource

    text = TextSource(data)
    text.check()
    say(f"Loading {model}")
    loaded = load_model(model, device=device, embeddings=embeddings, trust_remote_code=trust_remote_code)
    unique = list(dict.fromkeys(hooks))
    return loaded.source(text, unique, context_size=context_size, max_tokens=max_tokens), loaded


def _device(wanted: str | None, model: "LanguageModel | None") -> Any:
    """Where rows are encoded: beside the model, where there is one."""
    import torch

    if model is not None:
        return model.device
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def _mapped(index: "FeatureIndex", sae: Any) -> "FeatureIndex":
    from scope.features.decoder_map import add_umap

    say(f"Mapping the decoder of {index.path}")
    return add_umap(index.path, sae)


def _told(index: "FeatureIndex") -> str:
    return (
        f"Indexed {index.n_firings:,} firings of {index.d_sae:,} features on {index.n_rows:,} rows -> {index.path}\n"
        f"  {int(index.table['dead'].sum()):,} features never fire here."
    )
