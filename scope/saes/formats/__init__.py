"""SAEs on disk: one file per format. `load` finds out which it is; `save` writes SAELens's.

A format is a module with `recognises(path) -> bool` and `load(path) -> SAE`, on the CPU and in our conventions. What
shares the work: `addresses` finds the folder, `building` reads and checks, `hooks` translates the names of places.
"""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.errors import InvalidInputError, MismatchError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scope.saes.base import SAE
    from scope.saes.formats.addresses import Found

__all__ = ["READABLE", "is_published", "is_release", "load", "locate", "recognised", "save", "save_converted"]

READABLE = {
    "saelens": "SAELens (cfg.json, sae_weights.safetensors)",
    "gemma_scope": "Gemma Scope 1 (params.npz)",
    "gemma_scope_2": "Gemma Scope 2 (params.safetensors, config.json)",
    "sparsify": "sparsify (sae.safetensors, cfg.json)",
    "dictionary_learning": "dictionary_learning (ae.pt, config.json)",
    "circuit_tracer": "circuit-tracer (layer_N.safetensors)",
}
"""The formats that `load` reads, by the name of their module."""

NAMED_FILES = 8
"""Files of an unreadable folder that the error names."""


def load(
    name: str | Path,
    *,
    device: "torch.device | str" = "cpu",
    allow_download: bool = False,
    hook: str | None = None,
    hook_out: str | None = None,
) -> "SAE":
    """The SAE in a folder, at an address, or of a SAELens release, whatever format it has.

    Args:
        name: a folder (or circuit-tracer's file), `hf://OWNER/REPOSITORY/FOLDER@REVISION`, or SAELens's `RELEASE/ID`.
        device: where its weights shall lie.
        allow_download: whether to fetch what is not on this machine from the Hugging Face hub.
        hook: the hook that it reads, where its files do not say.
        hook_out: the hook that a transcoder writes, where its files do not say.

    Raises:
        UnknownNameError: there is nothing of that name, or the SAE's architecture is none of ours.
        InvalidInputError: no SAE in a format that this release reads, or one that does what none of ours does.
        MismatchError: tensors are missing or have another shape than the configuration says, or the files name another
            hook.
        NonFiniteError: a weight is NaN or Inf.
        IntegrityError: a file cannot be read, or its content is not what the manifest recorded.
    """
    found = locate(name, allow_download=allow_download)
    format = recognised(found.path)
    if format is None:
        raise InvalidInputError(_unreadable(found))
    module = importlib.import_module(f"scope.saes.formats.{format}")
    sae: SAE = module.load(found.path, scale=found.scale) if format == "saelens" else module.load(found.path)
    if format != "saelens" and found.source is not None:
        metadata = sae.cfg.metadata
        metadata = replace(metadata, extra={**metadata.extra, "source": found.source})
        sae.cfg = replace(sae.cfg, metadata=metadata)
    _name_hooks(sae, {"hook_name": hook, "hook_name_out": hook_out})
    return sae.to(device)


def locate(name: str | Path, *, allow_download: bool = False) -> "Found":
    """Where an SAE lies on this machine; raises and downloads as `load` does."""
    from scope.saes.formats import addresses

    return addresses.find(name, allow_download)


def is_release(name: str) -> bool:
    """Whether SAELens's list has the release of `RELEASE/ID`; False where the list is not installed."""
    from scope.saes.formats import addresses

    return addresses.is_release(name)


def is_published(name: str | Path) -> bool:
    """Whether this is an SAE without a manifest of ours: another tool's folder or file, an address, or a release."""
    from scope.saes.formats import addresses

    if addresses.is_address(name):
        return True
    path = Path(name)
    if path.exists():
        return not (path / "manifest.json").is_file() and recognised(path) is not None
    return isinstance(name, str) and "/" in name and is_release(name)


def recognised(path: Path) -> str | None:
    """The format of a local path, one of `READABLE`; None where it has none of them."""
    formats = (name for name in READABLE if importlib.import_module(f"scope.saes.formats.{name}").recognises(path))
    return next(formats, None)


def _unreadable(found: "Found") -> str:
    path = found.path
    files = sorted(child.name for child in path.iterdir()) if path.is_dir() else []
    seen = ", ".join(files[:NAMED_FILES]) + (f" and {len(files) - NAMED_FILES:,} more" if files[NAMED_FILES:] else "")
    what = f"It holds {seen or 'nothing'}." if path.is_dir() else "It is a file of no format."
    if found.conversion:
        what += f" SAELens reads this release by {found.conversion!r}; save it from there to read it here."
    return f"{found.source or path} is no readable SAE. {what} Readable: {', '.join(READABLE.values())}."


def _name_hooks(sae: "SAE", given: Mapping[str, str | None]) -> None:
    """Put hooks that were given into an SAE's metadata where it has none."""
    changes: dict[str, Any] = {}
    for field, hook in given.items():
        known = getattr(sae.cfg.metadata, field)
        if hook is None or hook == known:
            continue
        if known is not None:
            raise MismatchError(f"The SAE's files have the {field} {known}; {hook} was given. Leave it out.")
        if field == "hook_name_out" and not sae.cfg.ports.outputs:
            raise InvalidInputError(
                f"{hook} was given as the hook that is written, but the architecture {sae.cfg.architecture} writes "
                "what it reads."
            )
        if sae.cfg.metadata.hook_names:
            raise InvalidInputError(f"{hook} was given as the hook, but the SAE has several: they are in its files.")
        changes[field] = hook
    if changes:
        sae.cfg = replace(sae.cfg, metadata=replace(sae.cfg.metadata, **changes))


def save(
    sae: "SAE",
    path: str | Path,
    *,
    density: "Tensor | None" = None,
    companions: Mapping[str, bytes] | None = None,
    **manifest: Any,
) -> Path:
    """Write an SAE in SAELens's format, with a manifest, so that it is there as a whole or not at all.

    Args:
        sae: what to save, in the model's own units. BatchTopK and Matryoshka become the JumpReLU SAEs that they are.
        path: the folder to make; it must not exist, or be empty.
        density: share of rows on which each feature fires, `(d_sae,)`; kept as SAELens's log10 sparsity.
        companions: further files to put beside it, by name.
        manifest: further JSON-able entries of the manifest.

    Returns:
        The folder.

    Raises:
        OccupiedError: the folder holds something already.
        NonFiniteError: a weight is NaN or Inf.
    """
    from scope.saes.formats import saelens

    return saelens.save(sae, Path(path), density=density, companions=companions, **manifest)


def save_converted(sae: "SAE", name: str | Path, path: str | Path) -> str:
    """`save` an SAE that `load` has read, with the density that lies beside it there.

    Args:
        sae: the SAE.
        name: what `load` was given.
        path: as for `save`.

    Returns:
        The format that it was read from, which the manifest has as `converted_from`.
    """
    from scope.saes.formats import saelens

    there = locate(name).path
    format = recognised(there)
    assert format is not None
    save(sae, path, density=saelens.read_density(there), converted_from=format)
    return format
