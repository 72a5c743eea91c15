"""SAELens's folder: `cfg.json`, `sae_weights.safetensors` and `sparsity.safetensors`, beside our `manifest.json`.

sae_lens reads what is written here (`SAE.load_from_disk`), and what it writes is read here, without importing it.
BatchTopK and Matryoshka are written as the JumpReLU SAEs that they are after training, as SAELens does. Where it lacks
an architecture, the layout is extended: a transcoder of TopK is a `topk_transcoder`; a `crosscoder` has its hooks side
by side in W_enc and W_dec, in the order of `hook_names` in the metadata, with their `widths`; a `clt` has `n_layers`
layers side by side, and features ordered by the layer that they read.
Our provenance lies in the config's metadata, where sae_lens keeps names that it does not know.

Two settings of SAELens are folded into the weights when read, which leaves features and outputs as they are:

- `rescale_acts_by_decoder_norm`: the encoder's columns and biases are multiplied by ‖W_dec row‖, the decoder's rows
  divided by it;
- `normalize_activations="expected_average_only_in"` with its `activation_scaler.json`, as in an unfinished training of
  SAELens, or with the factor that its list of releases gives: x was multiplied by a constant before it was encoded.
  Afterwards the SAE takes raw activations and gives values in the model's own units.

Configurations from before SAELens 6, which most published SAEs have, are flat: what is metadata now stands beside the
settings, TopK is an activation function of the standard architecture, and an SAE of `hook_z` reads all heads.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from activations.manifest import read_manifest, write_atomically, write_manifest
from scope._version import __version__
from scope.errors import IntegrityError, InvalidInputError, OccupiedError
from scope.saes import registry
from scope.saes.base import SAE
from scope.saes.config import SAEMetadata
from scope.saes.folding import fold_decoder_norm, fold_scales
from scope.saes.formats.building import fill, read_json, read_weights, require_finite

__all__ = ["load", "read_density", "recognises", "save"]

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SCALER = "activation_scaler.json"
FORMAT_VERSION = "6.0.0"
"""The release of SAELens that introduced this layout. sae_lens takes a config without a version for an older one."""
_RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
"""Names that the settings had before."""
SPARSITY_FLOOR = 1e-10
"""Added to a density before its logarithm is taken, as SAELens does."""


def recognises(folder: Path) -> bool:
    """Whether the folder has SAELens's two main files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def save(
    sae: SAE,
    folder: Path,
    *,
    density: Tensor | None = None,
    companions: Mapping[str, bytes] | None = None,
    **manifest: Any,
) -> Path:
    """See `scope.saes.formats.save`."""
    require_free(folder)
    sae = sae.for_inference()
    weights = sae.weights()
    require_finite(weights, "The SAE to be saved")
    files = {CONFIG: _config_bytes(sae), WEIGHTS: serialise(weights), **(companions or {})}
    if density is not None:
        log_density = torch.log10(density.detach().float().cpu() + SPARSITY_FLOOR)
        files[SPARSITY] = serialise({"sparsity": log_density.contiguous()})
    store = sae.cfg.metadata.store_fingerprint
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, content in files.items():
            write_atomically(temporary / name, content)
        created_by = f"scope-workbench {__version__}"
        write_manifest(temporary, "sae", sae.fingerprint, [store] if store else [], created_by, **manifest)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def load(folder: Path, *, device: torch.device | str = "cpu", scale: float | None = None) -> SAE:
    """See `scope.saes.formats.load`.

    Args:
        folder: where it lies.
        device: where its weights shall lie.
        scale: the factor of the input that the folder itself does not tell.
    """
    content = _read_config(folder)
    sae_class = registry.get(str(content["architecture"]))
    weights = _without_unused(read_weights(folder / WEIGHTS), folder)
    try:
        cfg = registry.config_of(content["architecture"]).from_dict(content)
    except TypeError as error:  # a field without a default is missing
        raise InvalidInputError(f"{folder / CONFIG} lacks a setting of its architecture ({error}).") from error
    sae = sae_class(cfg, initialise=False, device="meta").to_empty(device="cpu")
    fill(sae, weights, f"{folder / WEIGHTS} do not fit {folder / CONFIG}")
    if content.get("rescale_acts_by_decoder_norm"):
        fold_decoder_norm(sae)
    _fold_normalisation(sae, content, folder, scale)
    if (folder / "manifest.json").is_file():
        recorded = read_manifest(folder, "sae")["fingerprint"]
        if sae.fingerprint != recorded:
            raise IntegrityError(
                f"{folder}: configuration and weights are not what the manifest recorded ({recorded[:12]}, now "
                f"{sae.fingerprint[:12]}). Restore the folder, or delete its manifest.json to take it as it is."
            )
    return sae.to(device)


def read_density(folder: Path) -> Tensor | None:
    """Share of the training's rows on which each feature fired, `(d_sae,)`; None where it was not recorded."""
    if not (folder / SPARSITY).is_file():
        return None
    log_density = load_file(folder / SPARSITY)["sparsity"]
    return (10**log_density - SPARSITY_FLOOR).clamp_min(0)


def require_free(folder: Path) -> None:
    """Raise `OccupiedError` unless the folder is free to be made: absent, or empty."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise OccupiedError(f"{folder} holds something already. Give another output folder, or move that one away.")


def _config_bytes(sae: SAE) -> bytes:
    content = sae.config_as_stored().to_dict()
    metadata = {"sae_lens_version": FORMAT_VERSION, "sae_lens_training_version": None, **content["metadata"]}
    content = {**content, "device": "cpu", "normalize_activations": "none", "metadata": metadata}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _read_config(folder: Path) -> dict[str, Any]:
    content = _as_since_6(read_json(folder / CONFIG))
    try:
        metadata = content.setdefault("metadata", {})
        content["d_in"], content["d_sae"] = int(content["d_in"]), int(content["d_sae"])
        content["dtype"] = content["dtype"].removeprefix("torch.")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntegrityError(f"{folder / CONFIG} is no readable configuration of an SAE ({error!r}).") from error
    # What `save` adds for sae_lens alone, so that saving and loading leave the metadata as it was.
    if metadata.get("sae_lens_version") == FORMAT_VERSION:
        metadata.pop("sae_lens_version")
    if metadata.get("sae_lens_training_version", "") is None:
        metadata.pop("sae_lens_training_version")
    return content


def _as_since_6(content: dict[str, Any]) -> dict[str, Any]:
    """A configuration from before SAELens 6 in the present layout; the present ones as they are."""
    if "hook_name" not in content and "hook_point" not in content:
        return {"architecture": "standard", **content}
    content = {_RENAMED.get(name, name): value for name, value in content.items()}
    hook = str(content.get("hook_name"))
    own = {f.name for f in fields(SAEMetadata)} - {"training", "extra"}
    metadata = {name: value for name, value in content.items() if name in own and value is not None}
    settings = {"architecture": "standard", "apply_b_dec_to_input": True, **content}
    settings.setdefault("reshape_activations", "hook_z" if "hook_z" in hook else "none")
    kwargs = content.get("activation_fn_kwargs") or {}
    if content.get("activation_fn") == "topk" and kwargs.get("k") is not None:
        settings |= {"architecture": "topk", "k": kwargs["k"]}
    elif content.get("activation_fn", "relu") != "relu":
        raise InvalidInputError(
            f"The SAE has the activation function {content['activation_fn']!r}; expected relu or topk."
        )
    normalised = content.get("normalize_activations") or "none"
    settings["normalize_activations"] = "expected_average_only_in" if normalised is True else normalised
    return {**settings, "metadata": metadata}


def _without_unused(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Early releases stored a factor for each feature, which is 1 unless the SAE was tuned by it."""
    factors = weights.pop("scaling_factor", None)
    if factors is not None and not torch.allclose(factors, torch.ones_like(factors)):
        raise InvalidInputError(
            f"{folder / WEIGHTS} scales each feature by a tuned scaling_factor, which no architecture of ours has."
        )
    return weights


@torch.no_grad()
def _fold_normalisation(sae: SAE, content: Mapping[str, Any], folder: Path, scale: float | None) -> None:
    mode = content.get("normalize_activations") or "none"
    if mode == "none":
        return
    if mode == "expected_average_only_in" and (scale is not None or (folder / SCALER).is_file()):
        if (folder / SCALER).is_file():
            scale = json.loads((folder / SCALER).read_text()).get("scaling_factor")
        if scale is not None:
            fold_scales(sae, [scale])
        return
    raise InvalidInputError(
        f"{folder} normalises its input ({mode!r}) in a way that its files do not settle, so that its features would "
        "be wrong. Fold the normalisation into the weights with sae_lens, and save it again."
    )
