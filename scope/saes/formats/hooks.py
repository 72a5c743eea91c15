"""From what publishers call a place in a model to the hook name that TransformerLens has for it.

A name that is not in a table gives None: a wrong hook would be taken silently where widths agree, a missing one is
asked for.
"""

import re

__all__ = ["from_layer_folder", "from_module", "from_sparsify"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")

_MODULES = {
    "output": "hook_resid_post",
    "input": "hook_resid_pre",
    "self_attn.o_proj.input": "attn.hook_z",
    "self_attn.o_proj.output": "attn.hook_out",
    "post_attention_layernorm.output": "hook_attn_out",
    "pre_feedforward_layernorm.input": "hook_mlp_in",
    "pre_feedforward_layernorm.output": "ln2.hook_out",
    "mlp.input": "ln2.hook_out",
    "mlp.output": "mlp.hook_out",
    "mlp.down_proj.input": "mlp.hook_post",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""Modules of Gemma 2 and 3 in Hugging Face's code, with the side of the module."""

_SPARSIFY = re.compile(r"(?:^|\.)(?:layers|h)[._](\d+)(?:\.(mlp|self_attn|attention|attn))?$")
_FOLDERS = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "mlp.hook_out",
    "attn_out": "attn.hook_out",
}


def from_module(point: str | None) -> str | None:
    """The hook of a place such as `model.layers.12.post_feedforward_layernorm.output`."""
    match = _LAYER.search(point or "")
    name = _MODULES.get(match[2]) if match else None
    return f"blocks.{match[1]}.{name}" if match and name else None


def from_sparsify(folder: str, transcoder: bool) -> tuple[str | None, str | None]:
    """What a coder of sparsify reads and writes, from its folder's name: that of the module whose output it models.

    A transcoder reads the module's input; that of a whole layer is the residual stream before it.
    """
    if folder == "embed_tokens" and not transcoder:
        return "hook_embed", None
    match = _SPARSIFY.search(folder)
    if match is None:
        return None, None
    layer, module = match.groups()
    written = {None: "hook_resid_post", "mlp": "mlp.hook_out"}.get(module, "attn.hook_out")
    read = {None: "hook_resid_pre", "mlp": "ln2.hook_out"}.get(module, "ln1.hook_out")
    if not transcoder:
        return f"blocks.{layer}.{written}", None
    return f"blocks.{layer}.{read}", f"blocks.{layer}.{written}"


def from_layer_folder(text: str | None) -> str | None:
    """The hook in a name such as `resid_post_layer_12`."""
    match = re.search(r"(resid_post|resid_pre|mlp_out|attn_out)_layer_?(\d+)", text or "")
    return f"blocks.{match[2]}.{_FOLDERS[match[1]]}" if match else None
