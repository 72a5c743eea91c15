"""circuit-tracer's transcoders of one layer: a file `layer_12.safetensors`, and `config.yaml` beside it for the set.

    f = act(x W_encᵀ + b_enc)      y_hat = f W_dec + b_dec (+ x W_skipᵀ)

`W_enc` and `W_dec` are `(d_sae, d_model)`. With `activation_function.threshold` act is JumpReLU; with `k` in the file
or `activation: topk` in the configuration TopK, which there keeps negative values too where fewer than k are positive
and here never does; otherwise ReLU. Repositories of mwhanna store `W_enc` the same way.

`config.yaml` names the model and the hooks of a layer (`feature_input_hook: mlp.hook_in`). Cross-layer transcoders
(`W_enc_12.safetensors`, `W_dec_12.safetensors`) are not read.
"""

import re
from pathlib import Path
from typing import Any

from scope.errors import IntegrityError, InvalidInputError
from scope.saes.base import SAE, SAEMetadata
from scope.saes.formats.building import build, read_weights, require_tensors

__all__ = ["load", "recognises"]

TENSORS = {"W_enc": 2, "W_dec": 2, "b_enc": 1, "b_dec": 1}
THRESHOLD, CONFIG = "activation_function.threshold", "config.yaml"
_FILE = re.compile(r"layer_(\d+)\.safetensors")


def recognises(path: Path) -> bool:
    """Whether the path is a file of one layer."""
    return path.is_file() and _FILE.fullmatch(path.name) is not None


def load(path: Path) -> SAE:
    """See `scope.saes.formats.load`."""
    raw, config = read_weights(path), _read_config(path.parent / CONFIG)
    require_tensors(raw, TENSORS, path)
    weights = {"W_enc": raw["W_enc"].T, **{name: raw[name] for name in TENSORS if name != "W_enc"}}
    settings: dict[str, Any] = {}
    if THRESHOLD in raw:
        threshold = raw[THRESHOLD]
        if bool((threshold < 0).any()):
            raise InvalidInputError(
                f"{path}: {int((threshold < 0).sum()):,} thresholds are below 0, so that features may be negative; "
                "here they never are."
            )
        activation = "jumprelu"
        weights["threshold"] = threshold.reshape(-1).expand(len(raw["b_enc"]))
    elif "k" in raw or config.get("activation") == "topk":
        k = int(raw["k"]) if "k" in raw else config.get("k")
        if k is None:
            raise InvalidInputError(f"{path.parent / CONFIG} says activation: topk, but not k, the features of a row.")
        activation, settings["k"] = "topk", int(k)
    else:
        activation = "relu"
    if "W_skip" in raw:
        weights["W_skip"] = raw["W_skip"]
    kind = "skip_transcoder" if "W_skip" in raw else "transcoder"
    layer = path.stem.removeprefix("layer_")
    hook, hook_out = (config.get(name) for name in ("feature_input_hook", "feature_output_hook"))
    metadata = SAEMetadata(
        model_name=config.get("model_name"),
        hook_name=f"blocks.{layer}.{hook}" if hook else None,
        hook_name_out=f"blocks.{layer}.{hook_out}" if hook_out else None,
        extra={"source_format": "circuit_tracer"},
    )
    return build(kind, weights, metadata, str(path), activation=activation, apply_b_dec_to_input=False, **settings)


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read as YAML ({error}).") from error
    return content if isinstance(content, dict) else {}
