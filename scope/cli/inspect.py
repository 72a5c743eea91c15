"""`scope info` and `scope verify`: what an artefact is, and whether its bytes are what was written."""

from pathlib import Path
from typing import Annotated, Any

import typer

from scope.cli._command import Outcome, command, progress_bar
from scope.cli._model import EmbeddingPlace, EmbeddingsOption, load_model
from scope.cli.sae import DownloadOption
from scope.errors import InvalidInputError, UnknownNameError

__all__ = ["register"]


def _open(what: str) -> Any:
    """The store or index at a path, or the store at an address."""
    from activations.manifest import read_manifest
    from activations.storage import is_address

    format = read_manifest(what)["format"]
    if format == "activation-store":
        from activations.store import ActivationStore

        return ActivationStore.open(what)
    if format == "feature-index" and not is_address(what):
        from scope.features.index import FeatureIndex

        return FeatureIndex.open(Path(what))
    if format == "feature-excerpt" and not is_address(what):
        from scope.features.excerpt import FeatureExcerpt

        return FeatureExcerpt.open(Path(what))
    raise InvalidInputError(
        f"{what} is of format {format!r}; expected an activation-store, or a feature-index or its excerpt in a local "
        "folder: these keep digests of all that they hold."
    )


def _describe(what: str, allow_download: bool, device: str | None, embeddings: EmbeddingPlace) -> dict[str, Any]:
    """JSON-able facts about a store, an SAE, an index folder or a model."""
    from activations.manifest import read_manifest
    from activations.storage import is_address
    from scope.saes import formats
    from scope.saes.formats.addresses import is_address as is_on_the_hub

    if is_on_the_hub(what):
        return _describe_sae(what, allow_download)
    if is_address(what):
        return {"kind": read_manifest(what)["format"], **_open(what).info()}
    path = Path(what)
    if (path / "manifest.json").is_file() and (kind := read_manifest(path)["format"]) != "sae":
        if kind == "model-diff":
            from scope.diffing import DiffReport

            return {"kind": kind, **DiffReport.open(path).figures}
        return {"kind": kind, **_open(what).info()}
    if any((path / name).is_file() for name in ("manifest.json", "cfg.json")) or formats.recognised(path):
        return _describe_sae(what, allow_download)
    try:
        model = load_model(what, device=device, embeddings=embeddings)
    except UnknownNameError as error:
        if not path.exists() and formats.is_release(what):
            return _describe_sae(what, allow_download)
        raise UnknownNameError("store, SAE, index or model", what, error.near) from error
    return {"kind": "model", **model.info()}


def _describe_sae(name: str, allow_download: bool) -> dict[str, Any]:
    from scope.saes.formats import load, locate, recognised
    from scope.training.evaluate import read_quality

    sae = load(name, allow_download=allow_download)
    path = locate(name).path
    config = sae.config_as_stored().to_dict()
    known = {name: value for name, value in config.items() if value is not None and name != "metadata"}
    metadata = {name: value for name, value in sae.cfg.metadata.to_dict().items() if value is not None}
    quality = read_quality(path)
    what = {"kind": "sae", "id": sae.fingerprint[:12], "stored_as": recognised(path)}
    return {**what, **known, "metadata": metadata, "quality": quality}


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
            lines.append(f"{indent}{key:<{max(2, len(key) + 1, 24 - len(indent))}}{shown}")
    return lines


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""

    @command(app, "info")
    def info(
        what: Annotated[
            str,
            typer.Argument(
                help="A store (a folder or s3://BUCKET/NAME), an SAE (a folder, hf://OWNER/REPOSITORY/FOLDER, or "
                "SAELens's RELEASE/ID), the folder of an index or of its excerpt, or a model."
            ),
        ],
        allow_download: DownloadOption = False,
        device: Annotated[
            str | None,
            typer.Option(help="Of a model: where it lies, such as cpu or cuda; by default the best there is."),
        ] = None,
        embeddings: EmbeddingsOption = "device",
    ) -> Outcome:
        """What a store, an SAE, an index or a model is: sizes, hooks, provenance, quality; of a model how many
        parameters a token uses, and where they lie."""
        facts = _describe(what, allow_download, device, embeddings)
        return Outcome(facts, "\n".join(_lines(facts)))

    @command(app, "verify")
    def verify(
        artefact: Annotated[
            str, typer.Argument(help="A store (a folder or s3://BUCKET/NAME), an index, or its excerpt.")
        ],
    ) -> Outcome:
        """Read every byte of a store, index or excerpt and compare it with what was recorded when it was written."""
        opened = _open(artefact)
        with progress_bar("Verifying") as progress:
            faults = opened.verify(progress)
        if not faults:
            return Outcome({"artefact": str(artefact), "faults": []}, f"{artefact} is as it was written.")
        text = "\n".join([f"{artefact} has {len(faults)} fault(s):", *(f"  {fault}" for fault in faults)])
        return Outcome({"artefact": str(artefact), "faults": [fault._asdict() for fault in faults]}, text, exit_code=1)
