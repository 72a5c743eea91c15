"""Gemma Scope 1 (Lieberum et al. 2024, arXiv 2408.05147): `params.npz`, JumpReLU SAEs and transcoders of Gemma 2.

    f = z H(z - threshold),  z = x W_enc + b_enc      x_hat = f W_dec + b_dec

The file holds `W_enc` `(d_in, d_sae)`, `W_dec`, `b_enc`, `b_dec` and `threshold`, float32. Nothing in it says which
model and hook it is for; the names of the repository and the folders do
(`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`), where they were kept.

Two kinds are special. SAEs of the embedding were trained on rows of the embedding matrix, which the model multiplies
by √d_model before `hook_embed`: that scale is folded in. Transcoders read the normalised row before its gain, since
the publishers folded the gain into the MLP; TransformerLens calls that `ln2.hook_normalized`.
"""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scope.errors import IntegrityError
from scope.saes.base import SAE, SAEMetadata
from scope.saes.folding import fold_scales
from scope.saes.formats.building import build, require_finite, require_tensors, thresholds

__all__ = ["load", "recognises"]

PARAMS = "params.npz"
TENSORS = {"W_enc": 2, "W_dec": 2, "b_enc": 1, "b_dec": 1, "threshold": 1}
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_HOOKS = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}


def recognises(path: Path) -> bool:
    """Whether the folder has Gemma Scope 1's file."""
    return (path / PARAMS).is_file()


def load(path: Path) -> SAE:
    """See `scope.saes.formats.load`."""
    weights, where = _read(path / PARAMS), path.absolute().as_posix()
    repository, layer = _REPOSITORY.search(where), re.search(r"layer_(\d+)", where)
    size, tuning, kind = repository.groups() if repository else (None, None, None)
    embedding = "/embedding/" in f"{where}/"
    hook, hook_out = (
        f"blocks.{layer[1]}.{name}" if layer and name else None for name in _HOOKS.get(str(kind), ("", ""))
    )
    metadata = SAEMetadata(
        model_name=f"google/gemma-2-{size}{'-it' if tuning == 'it' else ''}" if size else None,
        hook_name="hook_embed" if embedding else hook,
        hook_name_out=hook_out,
        prepend_bos=True,
        extra={"source_format": "gemma_scope"},
    )
    sae = build(
        "jumprelu_transcoder" if kind == "transcoders" else "jumprelu",
        weights,
        metadata,
        str(path / PARAMS),
        apply_b_dec_to_input=False,
        reshape_activations="hook_z" if kind == "att" else "none",
    )
    if embedding:
        fold_scales(sae, [sae.d_in**-0.5])
    return sae


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            raw = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise IntegrityError(f"{path} cannot be read ({error}). Copy or download the SAE again.") from error
    weights = {f"W_{name[2:]}" if name.startswith("w_") else name: tensor for name, tensor in raw.items()}
    require_finite(weights, str(path))
    require_tensors(weights, TENSORS, path)
    kept = {name: weights[name] for name in TENSORS}
    return {**kept, "threshold": thresholds(kept["threshold"], kept["W_enc"].shape[1])}
