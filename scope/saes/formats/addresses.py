"""Where an SAE lies: a local path, an address on the Hugging Face hub, or the name that SAELens has for it.

1. `hf://OWNER/REPOSITORY/FOLDER@REVISION` is a folder, or a file, of a repository; folder and revision may be left out.
2. What exists on this machine is a path.
3. `RELEASE/ID` is looked up in SAELens's list of releases, which gives a repository and a folder. The list is a file
   of the package sae_lens; it is read without importing the package, which would import wandb.

Of a repository only the files of the formats are fetched, and only with `allow_download`: otherwise what the hub's
cache on this machine holds is used.
"""

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from scope.errors import InvalidInputError, MissingDependencyError, UnknownNameError

__all__ = ["SCHEME", "Found", "find", "is_address", "is_release"]

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(rf"hf://(?P<repository>{_NAME}/{_NAME})(?:/(?P<folder>[^@]*))?(?:@(?P<revision>[\w./-]+))?")
FILES = (
    *("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "activation_scaler.json", "manifest.json"),
    *("params.npz", "params.safetensors", "config.json", "sae.safetensors", "ae.pt", "evaluation.json", "quality.json"),
)
"""The files of the formats that are folders."""
RUN_FILES = ("config.json", "config.yaml")
"""What lies in a repository's root for all its SAEs."""


class Found(NamedTuple):
    """An SAE's place on this machine."""

    path: Path
    """The folder, or the file of a format that is one."""
    source: str | None = None
    """Its address on the hub with the commit; None for what was given as a path."""
    scale: float | None = None
    """The factor that SAELens's list gives for the input; None where it gives none."""
    conversion: str | None = None
    """SAELens's name for the layout of the release, where it is not its own."""


def is_address(name: object) -> bool:
    """Whether this is an address on the Hugging Face hub."""
    return isinstance(name, str) and name.startswith(SCHEME)


def is_release(name: str) -> bool:
    """Whether SAELens's list has a release of that name, or the one of `RELEASE/ID`."""
    try:
        return name.partition("/")[0] in _releases()
    except MissingDependencyError:
        return False


def find(name: str | Path, allow_download: bool = False) -> Found:
    """The place of an SAE, fetched if it has to be and may.

    Raises:
        UnknownNameError: there is nothing of that name here (or, with `allow_download`, on the hub).
        InvalidInputError: the address cannot be read as one.
    """
    if is_address(name):
        return _from_hub(str(name), allow_download)
    path = Path(name).expanduser()
    if path.exists():
        return Found(path)
    if isinstance(name, str) and "/" in name and not name.startswith(("/", ".", "~")):
        return _from_release(name, allow_download)
    raise UnknownNameError("SAE folder", str(name), _siblings(path))


def _siblings(path: Path) -> list[str]:
    parent = path.parent
    return [str(child) for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []


def _from_hub(address: str, allow_download: bool) -> Found:
    match = _ADDRESS.fullmatch(address)
    folder = (match["folder"] or "").strip("/") if match else ""
    if match is None or ".." in folder.split("/"):
        raise InvalidInputError(f"{address!r} is no address of an SAE; expected hf://OWNER/REPOSITORY/FOLDER@REVISION.")
    return _fetched(match["repository"], folder, match["revision"], allow_download)


def _fetched(repository: str, folder: str, revision: str | None, allow_download: bool) -> Found:
    """The folder of a repository in the hub's cache."""
    from huggingface_hub import snapshot_download

    below = f"{folder}/" if folder else ""
    wanted = [*RUN_FILES, *(below + name for name in FILES)]
    wanted += [folder] if folder.endswith(".safetensors") else []
    if "/" in folder:
        wanted += [f"{folder.rpartition('/')[0]}/{name}" for name in RUN_FILES]
    named = f"{SCHEME}{repository}{'/' if folder else ''}{folder}"
    at = f"@{revision}" if revision else ""
    try:
        root = Path(
            snapshot_download(repository, revision=revision, allow_patterns=wanted, local_files_only=not allow_download)
        )
    except Exception as error:  # whatever the network, the hub or its cache may raise
        raise UnknownNameError("SAE", named + at, _repositories_here(), _hint(allow_download, error)) from error
    path = root / folder if folder else root
    if not path.exists():
        there = [f"{SCHEME}{repository}/{p.parent.relative_to(root)}" for name in FILES for p in root.rglob(name)]
        raise UnknownNameError("SAE", named + at, sorted(set(there) - {named}), _hint(allow_download, None))
    return Found(path, source=f"{named}@{root.name}")


def _hint(allow_download: bool, error: Exception | None) -> str:
    if not allow_download:
        return "It is not on this machine; allow_download=True (--allow-download) gets it from the Hugging Face hub."
    return f"Downloading it failed: {error}" if error else "The repository has no such folder with files of a format."


def _repositories_here() -> list[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*") if Path(HF_HUB_CACHE).is_dir() else iter(())
    return sorted(SCHEME + folder.name.removeprefix("models--").replace("--", "/") for folder in folders)


def _from_release(name: str, allow_download: bool) -> Found:
    release, _, id = name.partition("/")
    try:
        releases = _releases()
    except MissingDependencyError as error:
        hint = f"As a release of SAELens it could not be looked up: {error}"
        raise UnknownNameError("SAE folder", name, _siblings(Path(name)), hint) from error
    if release not in releases:
        known = [*_siblings(Path(name)), *releases]
        hint = "It is neither a folder nor RELEASE/ID of SAELens; a repository is named hf://OWNER/REPOSITORY/FOLDER."
        raise UnknownNameError("SAE", name if Path(name).parent.is_dir() else release, known, hint)
    content = releases[release]
    entry = next((entry for entry in content["saes"] if str(entry["id"]) == id), None)
    if entry is None:
        ids = [str(entry["id"]) for entry in content["saes"]]
        raise UnknownNameError(f"SAE of the release {release}", id, ids, f"It has {len(ids):,}, such as {ids[0]}.")
    folder, layout = str(entry["path"]), content.get("conversion_func")
    if layout == "gemma_3" and "clt" in folder:
        raise InvalidInputError(
            f"{name} is one layer of a cross-layer transcoder with its outputs to all layers, which is not read. Of "
            "Gemma Scope 2, SAEs and transcoders of one layer are."
        )
    found = _fetched(content["repo_id"], folder, None, allow_download)
    return found._replace(scale=entry.get("norm_scaling_factor"), conversion=layout)


@cache
def _releases() -> Mapping[str, Any]:
    """SAELens's list of releases, as its package brings it."""
    import yaml

    package = importlib.util.find_spec("sae_lens")
    places = list(package.submodule_search_locations or []) if package else []
    if not places:
        raise MissingDependencyError("sae-lens", "peers", "Looking up a release of SAELens")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with open(Path(places[0]) / "pretrained_saes.yaml") as file:
        content: Mapping[str, Any] = yaml.load(file, Loader=loader)
    return content
