"""SAEs on disk: one file per format. `load` finds out which it is; `save` writes SAELens's.

A format is a module with `recognises(folder) -> bool` and `load(folder, device) -> SAE`.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activations.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scope.saes.base import SAE

__all__ = ["READABLE", "load", "save"]

READABLE = {"saelens": "SAELens (cfg.json, sae_weights.safetensors)"}
"""The formats that `load` reads, by the name of their module."""

_NOT_YET = {
    "params.npz": "Gemma Scope 1",
    "params.safetensors": "Gemma Scope 2",
    "sae.safetensors": "sparsify",
    "ae.pt": "dictionary_learning",
}


def load(path: str | Path, *, device: "torch.device | str" = "cpu") -> "SAE":
    """The SAE in a folder, whatever format it has.

    Raises:
        UnknownNameError: there is no such folder, or the SAE's architecture is none of ours.
        InvalidInputError: the folder holds no SAE in a format that this release reads.
        MismatchError: tensors are missing or have another shape than the configuration says.
        NonFiniteError: a weight is NaN or Inf.
        IntegrityError: a file cannot be read, or its content is not what the manifest recorded.
    """
    folder = Path(path)
    if not folder.is_dir():
        siblings = [str(child) for child in folder.parent.iterdir() if child.is_dir()] if folder.parent.is_dir() else []
        raise UnknownNameError("SAE folder", str(folder), siblings)
    for name in READABLE:
        module = importlib.import_module(f"scope.saes.formats.{name}")
        if module.recognises(folder):
            sae: SAE = module.load(folder, device=device)
            return sae
    seen = [label for file, label in _NOT_YET.items() if (folder / file).exists()]
    found = f"It looks like {seen[0]}'s format, which is not read yet." if seen else "No known file is in it."
    raise InvalidInputError(f"{folder} holds no readable SAE. {found} Readable: {', '.join(READABLE.values())}.")


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
