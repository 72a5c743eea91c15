"""EleutherAI's sparsify: `sae.safetensors` and `cfg.json`, TopK SAEs, transcoders and skip transcoders.

    f = TopK(ReLU((x - b_dec) Wᵀ + b))      x_hat = f W_dec + b_dec          autoencoder
    f = TopK(ReLU(x Wᵀ + b))                y_hat = f W_dec + b_dec (+ x W_skipᵀ)    transcoder

with W `encoder.weight` and W_dec both `(num_latents, d_in)`. The folder is named for the module that is modelled
(`layers.12`, `layers.12.mlp`); the training's `config.json` one folder up names the model. Refused is what our TopK
does not do: groupmax, signed features, skips from elsewhere, tables of n-grams.
"""

from pathlib import Path
from typing import Any

import torch

from scope.errors import InvalidInputError
from scope.saes.base import SAE, SAEMetadata
from scope.saes.formats import hooks
from scope.saes.formats.building import build, read_json, read_weights, require_tensors

__all__ = ["load", "recognises"]

WEIGHTS, CONFIG, RUN_CONFIG = "sae.safetensors", "cfg.json", "config.json"
TENSORS = {"encoder.weight": 2, "encoder.bias": 1, "W_dec": 2, "b_dec": 1}


def recognises(path: Path) -> bool:
    """Whether the folder has sparsify's weights."""
    return (path / WEIGHTS).is_file()


def load(path: Path) -> SAE:
    """See `scope.saes.formats.load`."""
    if not (path / CONFIG).is_file():
        raise InvalidInputError(f"{path} has sparsify's {WEIGHTS}, but no {CONFIG} beside it, which says k.")
    config, raw = read_json(path / CONFIG), read_weights(path / WEIGHTS)
    transcoder = bool(config.get("transcode"))
    _require_known(config, transcoder, path / CONFIG)
    if "encoder.bias" not in raw and "encoder.weight" in raw:  # the first releases had none in some coders
        raw["encoder.bias"] = torch.zeros_like(raw["encoder.weight"][:, 0])
    require_tensors(raw, TENSORS, path / WEIGHTS)
    weights = {
        "W_enc": raw["encoder.weight"].T,
        "b_enc": raw["encoder.bias"],
        "W_dec": raw["W_dec"],
        "b_dec": raw["b_dec"],
    }
    if "W_skip" in raw:
        weights["W_skip"] = raw["W_skip"]
    kind = "topk" if not transcoder else "topk_skip_transcoder" if "W_skip" in raw else "topk_transcoder"
    run = read_json(path.parent / RUN_CONFIG) if (path.parent / RUN_CONFIG).is_file() else {}
    hook, hook_out = hooks.from_sparsify(path.absolute().name, transcoder)
    metadata = SAEMetadata(
        model_name=run.get("model"),
        hook_name=hook,
        hook_name_out=hook_out,
        dataset_path=run.get("dataset"),
        context_size=run.get("ctx_len"),
        extra={"source_format": "sparsify"},
    )
    where = str(path / WEIGHTS)
    return build(kind, weights, metadata, where, k=int(config["k"]), apply_b_dec_to_input=not transcoder)


def _require_known(config: dict[str, Any], transcoder: bool, where: Path) -> None:
    reasons = {
        f"its activation function is {config.get('activation')!r}": config.get("activation", "topk") != "topk",
        "it keeps negative features (signed)": bool(config.get("signed")),
        "it has a skip connection from the embedding (embed_skip)": bool(config.get("embed_skip")),
        "it subtracts a table of n-grams (gram_lookup)": bool(config.get("gram_lookup")),
        "it is an autoencoder with a skip connection": bool(config.get("skip_connection")) and not transcoder,
        "it does not say k": not isinstance(config.get("k"), int),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise InvalidInputError(f"{where}: {' and '.join(found)}. Of sparsify, plain TopK coders are read.")
