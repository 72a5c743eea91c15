"""`scope export`: a store or an index as files that other tools read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activations.spec import StorageDtype
from scope.cli._command import Outcome, command, progress_bar, say
from scope.cli._model import EmbeddingPlace, EmbeddingsOption, load_model

if TYPE_CHECKING:
    from scope.features.all_logits import AllLogits
    from scope.features.index import FeatureIndex
    from scope.saes.base import SAE

__all__ = ["register"]

STORE_FORMATS = ("safetensors", "npy", "hf-dataset")
GRID_FORMATS = ("csv", "parquet")
FEATURE_FORMATS = ("neuronpedia", "saedashboard")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "export")
    def export(
        what: Annotated[
            str,
            typer.Argument(help="A store (a folder or s3://BUCKET/NAME) or an index (a folder, or an id or name)."),
        ],
        format: Annotated[
            str,
            typer.Option(
                help="Of a store: safetensors, npy, hf-dataset (parquet). Of an index: neuronpedia (the folder that it "
                "imports), saedashboard (batch-N.json), csv or parquet (a grid)."
            ),
        ],
        out: Annotated[Path, typer.Option(help="The folder to write, new or empty; the file, for csv and parquet.")],
        hook: Annotated[
            list[str] | None, typer.Option(help="A store's hook, with * for every layer; by default all. Repeatable.")
        ] = None,
        dtype: Annotated[
            StorageDtype | None,
            typer.Option(
                help="Of the activations; by default the store's, and float32 for bfloat16 in npy and hf-dataset. "
                "npy as bfloat16 holds its bits in uint16."
            ),
        ] = None,
        file_mb: Annotated[int, typer.Option(help="Size of a store's file in MB, about.")] = 256,
        features: Annotated[
            str | None, typer.Option(help="An index's features: ids and ranges, as in 3,10-20. By default all.")
        ] = None,
        grid: Annotated[str, typer.Option(help="csv, parquet: features (a row each, with labels) or firings.")] = (
            "features"
        ),
        text: Annotated[str | None, typer.Option(help="Only features that a search for this finds.")] = None,
        limit: Annotated[int | None, typer.Option(help="Firings of a feature, at most, the strongest first.")] = None,
        model_id: Annotated[str, typer.Option(help="The model's id at Neuronpedia; by default from its name.")] = "",
        source_set: Annotated[str, typer.Option(help="The SAE set's id there, without the layer.")] = "",
        creator_name: Annotated[str, typer.Option(help="Who made the SAE, in Neuronpedia's words for it.")] = "",
        logit_histograms: Annotated[
            bool,
            typer.Option(
                help="neuronpedia, saedashboard: histograms of the effects on all logits, which load the model and the "
                "SAE; left empty, and said, where these are not at hand."
            ),
        ] = True,
        sae: Annotated[
            str | None, typer.Option(help="The index's SAE, for these histograms; by default the workspace's.")
        ] = None,
        workspace: Annotated[Path | None, typer.Option(help="Where the index and its labels lie.")] = None,
        embeddings: EmbeddingsOption = "device",
    ) -> Outcome:
        """Write a store's activations, or an index's features, firings and labels, for other tools."""
        from scope.errors import UnknownNameError

        if format in STORE_FORMATS:
            return _export_store(what, format, out, hook, dtype, file_mb)
        if format not in GRID_FORMATS + FEATURE_FORMATS:
            raise UnknownNameError("format", format, STORE_FORMATS + FEATURE_FORMATS + GRID_FORMATS)
        from scope.workspace import open_index

        index = open_index(what, workspace)
        chosen = _chosen(index, features, text)
        if format in GRID_FORMATS:
            return _export_grid(index, format, out, grid, chosen, limit)
        from scope.features.neuronpedia_export import NeuronpediaNames, export_neuronpedia

        names = NeuronpediaNames(model_id=model_id, source_set=source_set, creator_name=creator_name)
        logits = _all_logits(index, sae, workspace, embeddings) if logit_histograms else None
        with progress_bar("Exporting (features)") as progress:
            report = export_neuronpedia(index, out, chosen, names, layout=format, logits=logits, progress=progress)
        text_ = f"{report.folder} holds {report.features:,} features and {report.activations:,} examples"
        text_ += f" in {report.files:,} file(s), {report.bytes / 1e6:,.1f} MB."
        histograms = logits is not None
        return Outcome({**report._asdict(), "folder": str(report.folder), "logit_histograms": histograms}, text_)


def _all_logits(
    index: "FeatureIndex", sae: str | None, workspace: Path | None, embeddings: EmbeddingPlace
) -> "AllLogits | None":
    """What computes the effects on all logits; None, which is said, where the SAE or the model is not at hand.

    Raises:
        MismatchError: the SAE that was given is not the index's.
    """
    from scope.errors import MismatchError, ScopeError
    from scope.features.all_logits import AllLogits
    from scope.saes.formats import load

    given = None if sae is None else load(sae, hook=index.hook_name)
    if given is not None and given.fingerprint != index.sae_info["fingerprint"]:
        raise MismatchError(
            f"{sae} has the id {given.fingerprint[:12]}, and {index.path} is an index of "
            f"{index.sae_info['fingerprint'][:12]}. Give that one."
        )
    try:
        own = _sae_of(index, workspace) if given is None else given
        info = index.model_info
        model = load_model(info.get("load_name") or info["name"], revision=info.get("revision"), embeddings=embeddings)
        return AllLogits(own, model)
    except (ScopeError, OSError) as problem:
        say(f"The histograms of logit effects stay empty: {problem} (--sae names the SAE.)")
        return None


def _sae_of(index: "FeatureIndex", workspace: Path | None) -> "SAE":
    """The SAE of an index: the workspace's, or the published one that it was made with."""
    from scope.workspace import Workspace

    here = workspace or (index.path.parent.parent if index.path.parent.name == "indexes" else Path("workspace"))
    known = [str(entry.manifest.get("fingerprint")) for entry in Workspace(here).saes() if entry.problem is None]
    own, source = str(index.sae_info["fingerprint"]), (index.sae_info.get("metadata") or {}).get("source")
    return Workspace(here).sae(str(source) if source and own not in known else own[:12])


def _export_store(
    what: str, format: str, out: Path, hook: list[str] | None, dtype: StorageDtype | None, file_mb: int
) -> Outcome:
    from activations.export import export_store
    from activations.hook_patterns import every_layer
    from activations.store import ActivationStore

    opened = ActivationStore.open(what)
    hooks = every_layer(hook or [], opened.hooks)
    if not opened.is_complete_for(hooks or opened.hooks):
        say(f"{what} is not complete; what it has by now is exported.")
    with progress_bar("Exporting (rows)") as progress:
        report = export_store(
            opened,
            out,
            format,  # type: ignore[arg-type]  # one of STORE_FORMATS
            hooks,
            dtype=dtype,
            file_bytes=file_mb * 2**20,
            progress=progress,
        )
    text = f"{out} holds {report.rows:,} rows in {report.files:,} file(s), {report.bytes / 1e6:,.1f} MB."
    return Outcome({**report._asdict(), "folder": str(report.folder)}, text)


def _export_grid(
    index: "FeatureIndex", format: str, out: Path, grid: str, features: list[int] | None, limit: int | None
) -> Outcome:
    from scope.errors import InvalidInputError
    from scope.features.grids import feature_grid, firings_grid, write_grid

    if grid not in ("features", "firings"):
        raise InvalidInputError(f"There is no grid {grid!r}; expected features or firings.")
    if grid == "firings" and features is None:
        raise InvalidInputError("Firings are exported of named features: give --features, as in --features 3,10-20.")
    table: Any = feature_grid(index, features) if grid == "features" else firings_grid(index, features or [], limit)
    size = write_grid(table, out, format)
    return Outcome(
        {"out": str(out), "rows": len(table), "columns": list(table.columns), "bytes": size},
        f"{out} holds {len(table):,} rows, {size / 1e6:,.1f} MB.",
    )


def _chosen(index: "FeatureIndex", features: str | None, text: str | None) -> list[int] | None:
    """The features that were asked for, in order; None for all."""
    from scope.errors import InvalidInputError

    chosen = None
    if features is not None:
        chosen = []
        for part in features.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdigit() or (dash and not last.isdigit()):
                raise InvalidInputError(f"{part.strip()!r} is neither a feature's id nor a range such as 10-20.")
            chosen += [index.feature(f).id for f in range(int(first), int(last or first) + 1)]
    if text is not None:
        found = index.query(text=text).rows["feature"].tolist()
        chosen = found if chosen is None else [f for f in chosen if f in set(found)]
    return chosen
