"""Which Hugging Face module a hook name stands for, per architecture.

1. A `Family` names the modules of one layout of a transformer (GPT-2's, Llama's, Gemma's).
2. `MODEL_TYPES` says which of transformers' model types have which layout.
3. `find_layout` checks that the modules are really there and collects the widths: a `Layout`.

`scope.models.hooks` turns a layout into the table of hook points. To add an architecture, add a line to
`MODEL_TYPES` (and a `Family` where the layout is new), and a tiny model to the parity test.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from scope.errors import InvalidInputError

__all__ = ["FAMILIES", "MODEL_TYPES", "Family", "Layout", "find_layout"]


@dataclass(frozen=True)
class Family:
    """Names of modules; those of a layer are relative to the layer."""

    backbones: tuple[str, ...]
    """Where the stack without the unembedding may lie, relative to the model; the first that exists counts."""
    embed: str
    pos_embed: str | None
    layers: str
    final_norm: str
    ln1: str
    attention: str
    qkv: tuple[str, ...]
    """Three projections, or one whose output holds q, k and v side by side."""
    o: str
    ln1_post: str | None
    """A norm between attention and the residual stream."""
    ln2: str
    mlp: str
    mlp_gate: str | None
    mlp_in: str
    mlp_out: str
    ln2_post: str | None
    """A norm between the MLP and the residual stream."""
    rotary: bool = True
    centred_norm: bool = False
    """The norms subtract the mean (LayerNorm)."""
    gain_offset: bool = False
    """The norms multiply by 1 + weight."""


LLAMA = Family(
    backbones=("model.language_model", "model"),
    embed="embed_tokens",
    pos_embed=None,
    layers="layers",
    final_norm="norm",
    ln1="input_layernorm",
    attention="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    ln1_post=None,
    ln2="post_attention_layernorm",
    mlp="mlp",
    mlp_gate="mlp.gate_proj",
    mlp_in="mlp.up_proj",
    mlp_out="mlp.down_proj",
    ln2_post=None,
)
GEMMA = replace(
    LLAMA,
    ln1_post="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    ln2_post="post_feedforward_layernorm",
    gain_offset=True,
)
GPT2 = Family(
    backbones=("transformer",),
    embed="wte",
    pos_embed="wpe",
    layers="h",
    final_norm="ln_f",
    ln1="ln_1",
    attention="attn",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    ln1_post=None,
    ln2="ln_2",
    mlp="mlp",
    mlp_gate=None,
    mlp_in="mlp.c_fc",
    mlp_out="mlp.c_proj",
    ln2_post=None,
    rotary=False,
    centred_norm=True,
)

FAMILIES: dict[str, Family] = {"gpt2": GPT2, "llama": LLAMA, "gemma": GEMMA}
MODEL_TYPES: dict[str, str] = {
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "gemma3": "gemma",
}
"""transformers' `config.model_type` -> layout. Each has been held equal to TransformerLens in a test."""


@dataclass(frozen=True)
class Layout:
    """A model's modules and widths."""

    family: Family
    backbone: str
    """Path of the stack that ends with the final norm."""
    layers: str
    """Path of the list of layers."""
    head: str
    """Path of the unembedding."""
    n_layers: int
    d_model: int
    d_mlp: int
    d_vocab: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    query_key_norms: bool
    max_context_size: int
    final_logit_softcapping: float | None

    def module(self, relative: str) -> str:
        """Path of a module that lies directly in the backbone."""
        return f"{self.backbone}.{relative}"

    def layer(self, index: int, relative: str = "") -> str:
        """Path of a layer, or of a module in it."""
        return f"{self.layers}.{index}.{relative}" if relative else f"{self.layers}.{index}"


def find_layout(model: nn.Module) -> Layout:
    """The layout of a Hugging Face causal language model.

    Raises:
        InvalidInputError: the architecture is not one of `MODEL_TYPES`, or its modules are not where they should be.
    """
    outer: Any = model.config
    model_type = outer.model_type
    if model_type not in MODEL_TYPES:
        raise InvalidInputError(
            f"Models of type {model_type!r} are not supported. Supported model types: {', '.join(sorted(MODEL_TYPES))}."
        )
    family = FAMILIES[MODEL_TYPES[model_type]]
    config: Any = outer.get_text_config()
    backbone = next((path for path in family.backbones if _has(model, path)), None)
    if backbone is None:
        raise InvalidInputError(f"{type(model).__name__} has none of the modules {', '.join(family.backbones)}.")
    head = _path_of(model, model.get_output_embeddings())  # type: ignore[operator]
    first = f"{backbone}.{family.layers}.0"
    parts = (family.ln1, family.o, *family.qkv, family.ln2, family.mlp_in, family.mlp_out)
    missing = [path for path in (f"{first}.{part}" for part in parts) if not _has(model, path)]
    if missing:
        raise InvalidInputError(f"{type(model).__name__} lacks the modules {', '.join(missing)}.")
    weight: Tensor = model.get_submodule(head).weight  # type: ignore[assignment]
    n_heads = config.num_attention_heads
    d_model = config.hidden_size
    return Layout(
        family=family,
        backbone=backbone,
        layers=f"{backbone}.{family.layers}",
        head=head,
        n_layers=config.num_hidden_layers,
        d_model=d_model,
        d_mlp=_width_in(model.get_submodule(f"{first}.{family.mlp_out}")),
        d_vocab=weight.shape[0],
        n_heads=n_heads,
        n_key_value_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_head=getattr(config, "head_dim", None) or d_model // n_heads,
        query_key_norms=_has(model, f"{first}.{family.attention}.q_norm"),
        max_context_size=config.max_position_embeddings,
        final_logit_softcapping=getattr(config, "final_logit_softcapping", None),
    )


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _path_of(model: nn.Module, module: nn.Module | None) -> str:
    for path, candidate in model.named_modules():
        if candidate is module and path:
            return path
    raise InvalidInputError(f"{type(model).__name__} has no unembedding; expected a causal language model.")


def _width_in(projection: nn.Module) -> int:
    """Input width of a Linear, or of GPT-2's Conv1D, whose weight is transposed."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    return int(weight.shape[1] if isinstance(projection, nn.Linear) else weight.shape[0])
