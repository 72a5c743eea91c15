"""What the readers of all formats share: reading files without running anything in them, and building an SAE.

Every reader ends in `build`: an architecture of ours, its settings, and its weights by our names and in our layout,
`W_enc` `(d_in, d_sae)` and `W_dec` `(d_sae, d_out)`. Shapes and values are checked there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scope.errors import IntegrityError, InvalidInputError, MismatchError, NonFiniteError
from scope.saes import registry
from scope.saes.base import SAE, SAEMetadata

__all__ = ["build", "fill", "read_json", "read_weights", "require_finite", "require_tensors", "thresholds"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        IntegrityError: the file cannot be read as one.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path} is no readable configuration of an SAE ({error}). Copy or download the SAE again."
        ) from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} is no readable configuration of an SAE: JSON, but no object.")
    return content


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, all of them finite.

    Raises:
        IntegrityError: the file cannot be read.
        NonFiniteError: a weight is NaN or Inf.
    """
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}). Copy or download the SAE again.") from error
    require_finite(weights, str(path))
    return weights


def require_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise `NonFiniteError` where a weight is NaN or Inf."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            n_bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(f"{where}: {n_bad:,} of the {tensor.numel():,} entries of {name} are NaN or Inf.")


def require_tensors(weights: Mapping[str, Tensor], dimensions: Mapping[str, int], where: Path) -> None:
    """Raise `MismatchError` unless these tensors are there with so many dimensions."""
    wrong = []
    for name, n in dimensions.items():
        if name not in weights:
            wrong.append(f"{name} is missing")
        elif weights[name].ndim != n:
            wrong.append(f"{name} has the shape {tuple(weights[name].shape)}, expected {n} dimensions")
    if wrong:
        there = ", ".join(sorted(weights)) or "nothing"
        raise MismatchError(f"{where} does not hold the tensors of its format: {'; '.join(wrong)}. It holds {there}.")


def thresholds(value: Tensor, d_sae: int) -> Tensor:
    """One threshold for each feature, from one for all or one for each; what is below 0 passes what ReLU passes."""
    return value.reshape(-1).expand(d_sae).clamp_min(0) if value.numel() == 1 else value.clamp_min(0)


def fill(sae: SAE, weights: Mapping[str, Tensor], where: str) -> None:
    """Give an SAE its weights.

    Raises:
        MismatchError: tensors are missing, not known, or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        wrong = [
            f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
        ]
        raise MismatchError(f"The tensors in {where}: {'; '.join(wrong)}.")
    sae.load_state_dict(dict(weights))


def build(architecture: str, weights: Mapping[str, Tensor], metadata: SAEMetadata, where: str, **settings: Any) -> SAE:
    """An SAE on the CPU from weights in our layout; `d_in`, `d_sae` and `d_out` are read off them.

    Args:
        architecture: one of the registry's names.
        weights: by our names; all get the dtype of W_dec.
        metadata: where it comes from.
        where: the file, for errors.
        settings: further fields of the architecture's config.
    """
    (d_in, d_sae), dtype = weights["W_enc"].shape, weights["W_dec"].dtype
    content = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "d_out": weights["W_dec"].shape[-1],
        "dtype": str(dtype).removeprefix("torch."),
        "metadata": metadata.to_dict(),
        **settings,
    }
    if not dtype.is_floating_point:
        raise InvalidInputError(f"The tensors in {where} have the dtype {content['dtype']}; expected floating point.")
    cfg = registry.config_of(architecture).from_dict(content)
    sae = registry.get(architecture)(cfg, initialise=False, device="meta").to_empty(device="cpu")
    fill(sae, {name: tensor.to(dtype) for name, tensor in weights.items()}, f"{where} do not fit each other")
    return sae
