"""Gemma Scope 2: `params.safetensors` and `config.json`, JumpReLU SAEs and transcoders of Gemma 3.

    f = z H(z - threshold),  z = x w_enc + b_enc      y_hat = f w_dec + b_dec (+ x affine_skip_connection)

`config.json` names the model and the places in Hugging Face's modules that are read and written
(`hf_hook_point_in`, `hf_hook_point_out`); an SAE names no second one, or the same. The skip connection is stored
`(d_in, d_out)`, ours the other way round. Where the configuration was not published, the folder's name
(`resid_post/layer_12_width_16k_l0_medium`) says the hook. Crosscoders and cross-layer transcoders, which have a third
dimension, are refused.
"""

import re
from pathlib import Path
from typing import Any

from scope.errors import InvalidInputError
from scope.saes.base import SAE, SAEMetadata
from scope.saes.formats import hooks
from scope.saes.formats.building import build, read_json, read_weights, require_tensors, thresholds

__all__ = ["load", "recognises"]

PARAMS, CONFIG = "params.safetensors", "config.json"
TENSORS = {"w_enc": 2, "w_dec": 2, "b_enc": 1, "b_dec": 1, "threshold": 1}
SKIP = "affine_skip_connection"
_BEFORE_MLP, _AFTER_MLP = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
_FOLDERS = {
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": (_AFTER_MLP, None),
    "transcoder": (_BEFORE_MLP, _AFTER_MLP),
}


def recognises(path: Path) -> bool:
    """Whether the folder has Gemma Scope 2's weights."""
    return (path / PARAMS).is_file()


def load(path: Path) -> SAE:
    """See `scope.saes.formats.load`."""
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else _inferred(path)
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise InvalidInputError(f"{path / CONFIG} has the architecture {config['architecture']!r}; expected jump_relu.")
    raw = read_weights(path / PARAMS)
    if "w_dec" in raw and raw["w_dec"].ndim == 3:
        raise InvalidInputError(
            f"{path / PARAMS} holds a {config.get('type') or 'dictionary'} of several layers: w_dec has the shape "
            f"{tuple(raw['w_dec'].shape)}. Of Gemma Scope 2, SAEs and transcoders of one layer are read."
        )
    require_tensors(raw, TENSORS, path / PARAMS)
    read, written = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    transcoder = SKIP in raw or "transcoder" in str(config.get("type", "")) or (written is not None and written != read)
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    weights = {name: raw[name.lower()] for name in names}
    weights["threshold"] = thresholds(raw["threshold"], raw["w_enc"].shape[1])
    if SKIP in raw:
        weights["W_skip"] = raw[SKIP].T.contiguous()
    kind = ("jumprelu_skip_transcoder" if SKIP in raw else "jumprelu_transcoder") if transcoder else "jumprelu"
    hook = hooks.from_module(read)
    extra = {"hf_hook_name": read, "hf_hook_name_out": written if transcoder else None, "l0": config.get("l0")}
    metadata = SAEMetadata(
        model_name=_model_name(config.get("model_name")),
        hook_name=hook,
        hook_name_out=hooks.from_module(written) if transcoder else None,
        prepend_bos=True,
        extra={"source_format": "gemma_scope_2", **{name: value for name, value in extra.items() if value is not None}},
    )
    reshape = "hook_z" if hook and hook.endswith("hook_z") else "none"
    where = str(path / PARAMS)
    return build(kind, weights, metadata, where, apply_b_dec_to_input=False, reshape_activations=reshape)


def _model_name(published: str | None) -> str | None:
    """The name on the Hugging Face hub; configurations also say `gemma-v3-270m-pt`, which has no `-pt` there."""
    if not published:
        return None
    name = published.replace("gemma-v3", "gemma-3")
    name = name if "/" in name or not name.startswith("gemma-") else f"google/{name}"
    return name.removesuffix("-pt") if "270m" in name else name


def _inferred(path: Path) -> dict[str, Any]:
    """What the folder's and the repository's names say."""
    where = path.absolute().as_posix()
    layer, repository = re.search(r"layer_(\d+)", path.name), re.search(r"gemma-scope-2-(\w+-(?:pt|it))", where)
    kind = next((kind for kind in _FOLDERS if f"/{kind}" in where), None)
    config: dict[str, Any] = {"model_name": f"google/gemma-3-{repository[1]}" if repository else None}
    if layer and kind:
        places = [place and f"model.layers.{layer[1]}.{place}" for place in _FOLDERS[kind]]
        config["hf_hook_point_in"], config["hf_hook_point_out"] = places
    return config
