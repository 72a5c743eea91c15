"""The transcoders of a command, and the model that they are of."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from scope.cli._model import EmbeddingPlace, load_model
from scope.errors import InvalidInputError

__all__ = ["DictionariesOption", "opened", "transcoder_paths"]

DictionaryPlace = Literal["device", "host"]

DictionariesOption = Annotated[
    DictionaryPlace,
    typer.Option(
        help="Where the transcoders lie: device, that of the model, or host. On the host they take no memory of a GPU, "
        "and rows are sent to and fro, which is slower."
    ),
]


def transcoder_paths(given: list[str]) -> list[str]:
    """The transcoders themselves: a folder that is none stands for those in it, other dictionaries left out."""
    found: list[str] = []
    for path in given:
        folder = Path(path)
        if folder.is_dir() and not (folder / "cfg.json").is_file():
            inside = sorted(str(cfg.parent) for cfg in folder.glob("*/cfg.json") if _writes_elsewhere(cfg))
            if not inside:
                raise InvalidInputError(f"{path} holds no transcoders; expected folders with a cfg.json each.")
            found += inside
        else:
            found.append(path)
    if not found:
        raise InvalidInputError("No transcoders were given; say where they lie with --transcoders.")
    return found


def _writes_elsewhere(cfg: Path) -> bool:
    """Whether a dictionary may be a transcoder, as far as its file says; loading it says what is wrong with it."""
    try:
        architecture = str(json.loads(cfg.read_text()).get("architecture", "transcoder"))
    except (OSError, ValueError, AttributeError):
        return True
    return "transcoder" in architecture or architecture == "clt"


def opened(
    model: str,
    saes: list[str],
    device: str | None,
    allow_download: bool,
    embeddings: EmbeddingPlace,
    dictionaries: DictionaryPlace = "device",
) -> tuple[Any, list[Any]]:
    """The model, and the dictionaries at some paths, which are loaded first; on the model's device, or on the host."""
    from scope.saes.formats import load

    loaded = [load(path, allow_download=allow_download) for path in saes]
    language_model = load_model(model, device=device, allow_download=allow_download, embeddings=embeddings)
    return language_model, [sae.to("cpu" if dictionaries == "host" else language_model.device) for sae in loaded]
