"""dictionary_learning (Marks, Karvonen, Mueller 2024): `ae.pt` and `config.json`, whose `trainer.dict_class` decides.

    AutoEncoder             f = ReLU((x - bias) Wᵀ + b)
    AutoEncoderNew          f = ReLU(x Wᵀ + b)
    GatedAutoEncoder        f = H(p + gate_bias) ReLU(exp(r_mag) p + mag_bias),  p = (x - decoder_bias) Wᵀ
    AutoEncoderTopK         f = TopK(ReLU((x - b_dec) Wᵀ + b))
    JumpReluAutoEncoder     f = z H(z - threshold),  z = x W_enc + b_enc
    BatchTopKSAE and MatryoshkaBatchTopKSAE, as used: f = z H(z - threshold),  z = ReLU((x - b_dec) Wᵀ + b)

and x_hat = f Dᵀ + bias for all, with W `encoder.weight` `(dict_size, activation_dim)` and D `decoder.weight`
`(activation_dim, dict_size)`, or `W_enc` and `W_dec` the other way round. Gated and JumpReLU dictionaries of some
versions show their features times the decoder's norms, and divide by them again to decode; here a feature's strength
is that product.

`ae.pt` is a pickle. It is read by torch's loader for tensors alone, which runs nothing that it holds.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scope.errors import IntegrityError, InvalidInputError
from scope.saes.base import SAE, SAEMetadata
from scope.saes.formats import hooks
from scope.saes.formats.building import build, read_json, require_finite, require_tensors, thresholds

__all__ = ["load", "recognises"]

WEIGHTS, CONFIG = "ae.pt", "config.json"


class _Layout(NamedTuple):
    """A class of theirs, in our terms."""

    architecture: str
    centred: bool
    """Whether the encoder subtracts the decoder's bias."""
    names: Mapping[str, str]
    """Our name of a tensor -> theirs."""


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_OWN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_GATED = {
    "W_enc": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_dec": "decoder_bias",
    "b_gate": "gate_bias",
    "b_mag": "mag_bias",
    "r_mag": "r_mag",
}
CLASSES = {
    "AutoEncoder": _Layout("standard", True, {**_LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": _Layout("standard", False, {**_LINEAR, "b_dec": "decoder.bias"}),
    "GatedAutoEncoder": _Layout("gated", True, _GATED),
    "AutoEncoderTopK": _Layout("topk", True, {**_LINEAR, "b_dec": "b_dec"}),
    "JumpReluAutoEncoder": _Layout("jumprelu", False, _OWN),
    "BatchTopKSAE": _Layout("jumprelu", True, {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": _Layout("jumprelu", True, _OWN),
}


def recognises(path: Path) -> bool:
    """Whether the folder has dictionary_learning's weights."""
    return (path / WEIGHTS).is_file()


def load(path: Path) -> SAE:
    """See `scope.saes.formats.load`."""
    if not (path / CONFIG).is_file():
        raise InvalidInputError(
            f"{path} has dictionary_learning's {WEIGHTS}, but no {CONFIG} beside it, which says what kind it is."
        )
    config = read_json(path / CONFIG)
    trainer: dict[str, Any] = config.get("trainer") or {}
    name = str(trainer.get("dict_class"))
    if name not in CLASSES:
        raise InvalidInputError(f"{path / CONFIG} has the dict_class {name!r}. Readable: {', '.join(CLASSES)}.")
    layout, raw = CLASSES[name], _read(path / WEIGHTS)
    dimensions = {theirs: 2 if ours.startswith("W_") else 1 for ours, theirs in layout.names.items()}
    if "threshold" in raw:
        dimensions["threshold"] = min(raw["threshold"].ndim, 1)
    require_tensors(raw, {own: n for own, n in dimensions.items() if own in layout.names.values()}, path / WEIGHTS)
    weights = {
        ours: raw[theirs].T if theirs.endswith(".weight") else raw[theirs] for ours, theirs in layout.names.items()
    }
    settings: dict[str, Any] = {"apply_b_dec_to_input": layout.centred}
    if layout.architecture == "topk":
        settings["k"] = int(raw["k"]) if "k" in raw else int(trainer["k"])
    if "threshold" in weights:
        weights["threshold"] = thresholds(weights["threshold"], weights["W_enc"].shape[1])
    metadata = SAEMetadata(
        model_name=trainer.get("lm_name"),
        hook_name=hooks.from_layer_folder(trainer.get("submodule_name"))
        or hooks.from_layer_folder(path.absolute().as_posix()),
        context_size=(config.get("buffer") or {}).get("ctx_len"),
        extra={"source_format": "dictionary_learning", "dict_class": name},
    )
    return build(layout.architecture, weights, metadata, str(path / WEIGHTS), **settings)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IntegrityError(
            f"{path} cannot be read as plain tensors ({reason}), and nothing else in it is run."
        ) from error
    if not isinstance(raw, dict) or not all(isinstance(tensor, Tensor) for tensor in raw.values()):
        raise InvalidInputError(f"{path} holds something else than named tensors; expected a state dict.")
    require_finite(raw, str(path))
    return raw
