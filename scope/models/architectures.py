"""Which Hugging Face module a hook name stands for, per architecture.

1. A `Family` names the modules of one layout of a transformer (GPT-2's, Pythia's, Llama's, Gemma's).
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
    """Three projections, or one whose output holds q, k and v side by side: all heads' q, all k, all v, unless
    `interleaved`."""
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
    interleaved: bool = False
    """The one projection holds q, k and v of the first head, then those of the second, and so on."""
    rotary: bool = True
    centred_norm: bool = False
    """The norms subtract the mean (LayerNorm)."""
    gain_offset: bool = False
    """The norms multiply by 1 + weight."""
    per_layer_argument: int | None = None
    """Where in a layer's arguments its per-layer input stands, in families that know per-layer embeddings."""
    altup: bool = False
    """The residual stream is a stack of streams (AltUp), the first dimension of what layers pass on."""
    router: str | None = None
    """In layers with experts: what chooses them."""
    router_logits: str | None = None
    """The module that gives the router's logits, where there is one; else the router's first output."""
    experts: str | None = None
    dense_post: str | None = None
    """Where experts stand beside a dense MLP: the norm behind the MLP, before both are added."""
    experts_post: str | None = None
    """The same behind the experts."""
    delegated: bool = False
    """TransformerLens leaves attention and norms to transformers: attention can be read there and not edited."""
    encoder: str | None = None
    """A second stack of the same layers that reads the prompt, where the backbone only denoises
    (`scope.models.diffusion`)."""
    denoises: bool = False
    """The model fills in a canvas step by step, and has no next token."""


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
MIXTURE = replace(LLAMA, router="mlp.gate", experts="mlp.experts")
GEMMA4 = replace(
    GEMMA,
    gain_offset=False,
    per_layer_argument=1,
    delegated=True,
    router="router",
    router_logits="router.proj",
    experts="experts",
    dense_post="post_feedforward_layernorm_1",
    experts_post="post_feedforward_layernorm_2",
)
DIFFUSION_GEMMA = replace(
    GEMMA4,
    backbones=("model.decoder",),
    per_layer_argument=None,
    encoder="model.encoder.language_model",
    denoises=True,
)
DREAM = replace(LLAMA, denoises=True)
LLADA = replace(
    LLAMA,
    backbones=("model.transformer",),
    embed="wte",
    layers="blocks",
    final_norm="ln_f",
    ln1="attn_norm",
    attention="",
    qkv=("q_proj", "k_proj", "v_proj"),
    o="attn_out",
    ln2="ff_norm",
    mlp="",
    mlp_gate="ff_proj",
    mlp_in="up_proj",
    mlp_out="ff_out",
    denoises=True,
)
GEMMA3N = replace(GEMMA4, per_layer_argument=2, altup=True)
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
NEOX = replace(
    GPT2,
    backbones=("gpt_neox",),
    embed="embed_in",
    pos_embed=None,
    layers="layers",
    final_norm="final_layer_norm",
    ln1="input_layernorm",
    attention="attention",
    qkv=("attention.query_key_value",),
    interleaved=True,
    o="attention.dense",
    ln2="post_attention_layernorm",
    mlp_in="mlp.dense_h_to_4h",
    mlp_out="mlp.dense_4h_to_h",
    rotary=True,
)

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "neox": NEOX,
    "llama": LLAMA,
    "gemma": GEMMA,
    "gemma3n": GEMMA3N,
    "gemma4": GEMMA4,
    "mixture": MIXTURE,
    "diffusion_gemma": DIFFUSION_GEMMA,
    "llada": LLADA,
    "dream": DREAM,
}
HEADS = ("num_attention_heads", "n_heads")
MODEL_TYPES: dict[str, str] = {
    "gpt2": "gpt2",
    "gpt_neox": "neox",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "mixtral": "mixture",
    "qwen3_moe": "mixture",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "gemma3": "gemma",
    "gemma3n_text": "gemma3n",
    "gemma3n": "gemma3n",
    "gemma4_text": "gemma4",
    "gemma4": "gemma4",
    "diffusion_gemma": "diffusion_gemma",
    "llada": "llada",
    "Dream": "dream",
}
"""transformers' `config.model_type` -> layout. Each has been held equal to TransformerLens in a test, those that
denoise to the hidden states that their own classes give."""


@dataclass(frozen=True)
class LayerSizes:
    """Widths that may differ from layer to layer (Gemma 3n, Gemma 4)."""

    d_mlp: int
    d_head: int
    n_key_value_heads: int
    """0 where the layer has no keys of its own."""
    projections: str
    """Those of "qkv" that the layer has: a layer may take keys and values from an earlier one, or values from keys."""
    n_experts: int = 0
    experts_per_token: int = 0
    dense: bool = True
    """Whether the layer has an MLP that every token goes through; else its MLP is experts alone, and `d_mlp` theirs."""


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
    sizes: tuple[LayerSizes, ...]
    """Of each layer; `d_mlp`, `d_head` and `n_key_value_heads` above are those of the first."""
    d_per_layer: int = 0
    """Width of a layer's row in the per-layer embedding table; 0 where the model has none."""
    n_streams: int = 1
    """Streams of the residual stack (AltUp); 1 everywhere else."""
    active_stream: int = 0
    """The one that attention and MLP read."""
    parallel: bool = False
    """Attention and MLP both read what the layer reads (Pythia), and nothing stands between them."""
    rotated: int = 0
    """How much of a head rotates with its position, where not all of it does (Pythia); 0 where all does."""

    @property
    def encoder(self) -> "Layout | None":
        """The stack that reads the prompt, where that is another one than the one that denoises."""
        path = self.family.encoder
        if path is None:
            return None
        family = replace(self.family, encoder=None, denoises=False)
        return replace(self, family=family, backbone=path, layers=f"{path}.{family.layers}")

    @property
    def final_residual(self) -> str:
        """Hook name of what goes into the final norm: the last layer's residual stream, or what AltUp makes of it."""
        return "ln_final.hook_in" if self.n_streams > 1 else f"blocks.{self.n_layers - 1}.hook_resid_post"

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
    mixed = family.experts is not None and _has(model, f"{first}.{family.experts}")
    mlp = (
        (family.experts,) if mixed and not _has(model, f"{first}.{family.mlp_out}") else (family.mlp_in, family.mlp_out)
    )
    parts = (family.ln1, family.o, *family.qkv, family.ln2, *mlp)
    missing = [path for path in (f"{first}.{part}" for part in parts) if not _has(model, path)]
    if missing:
        raise InvalidInputError(f"{type(model).__name__} lacks the modules {', '.join(missing)}.")
    weight: Tensor = model.get_submodule(head).weight  # type: ignore[assignment]
    n_heads, d_model = _setting(config, *HEADS), _setting(config, "hidden_size", "d_model")
    n_layers = _setting(config, "num_hidden_layers", "n_layers")
    layers = f"{backbone}.{family.layers}"
    sizes = tuple(_sizes(model, f"{layers}.{index}", family, config) for index in range(n_layers))
    per_layer = family.per_layer_argument is not None and config.hidden_size_per_layer_input
    return Layout(
        family=family,
        backbone=backbone,
        layers=layers,
        head=head,
        n_layers=n_layers,
        d_model=d_model,
        d_mlp=sizes[0].d_mlp,
        d_vocab=weight.shape[0],
        n_heads=n_heads,
        n_key_value_heads=sizes[0].n_key_value_heads,
        d_head=sizes[0].d_head,
        query_key_norms=_has(model, f"{first}.{family.attention}.q_norm".replace("..", ".")),
        max_context_size=_setting(config, "max_position_embeddings", "max_sequence_length"),
        final_logit_softcapping=getattr(config, "final_logit_softcapping", None),
        sizes=sizes,
        d_per_layer=config.hidden_size_per_layer_input if per_layer else 0,
        n_streams=config.altup_num_inputs if family.altup else 1,
        active_stream=config.altup_active_idx if family.altup else 0,
        parallel=bool(getattr(config, "use_parallel_residual", False)),
        rotated=int(sizes[0].d_head * config.rope_parameters["partial_rotary_factor"]) if family.interleaved else 0,
    )


def _sizes(model: nn.Module, layer: str, family: Family, config: Any) -> LayerSizes:
    """A layer's widths, read off its modules."""
    n_heads = _setting(config, *HEADS)
    d_head = _width_in(model.get_submodule(f"{layer}.{family.o}")) // n_heads
    n_key_value_heads, projections = n_heads, "qkv"
    if len(family.qkv) > 1:
        there = {letter: _projection(model, f"{layer}.{path}") for letter, path in zip("qkv", family.qkv, strict=True)}
        projections = "".join(letter for letter, module in there.items() if module is not None)
        keys: Any = there["k"]
        n_key_value_heads = 0 if keys is None else keys.weight.shape[0] // d_head
    dense = _has(model, f"{layer}.{family.mlp_out}")
    n_experts, chosen = 0, 0
    if family.experts is not None and _has(model, f"{layer}.{family.experts}"):
        experts: Any = model.get_submodule(f"{layer}.{family.experts}")
        n_experts, chosen = experts.down_proj.shape[0], experts_of(config)[1]
    d_mlp = _width_in(model.get_submodule(f"{layer}.{family.mlp_out}")) if dense else experts.down_proj.shape[-1]
    return LayerSizes(d_mlp, d_head, n_key_value_heads, projections, n_experts, chosen, dense)


def experts_of(config: Any) -> tuple[int, int]:
    """Experts of a layer, and how many of them a token goes to; 0 and 0 where the model has none."""

    def first(*names: str) -> int:
        return int(next((value for name in names if (value := getattr(config, name, None))), 0))

    return first("num_experts", "num_local_experts"), first("top_k_experts", "num_experts_per_tok")


def _setting(config: Any, *names: str) -> int:
    """A number of the configuration, under the first of its names that is there."""
    return int(next(value for name in names if (value := getattr(config, name, None)) is not None))


def _projection(model: nn.Module, path: str) -> nn.Module | None:
    """A projection, or None where the layer has none (the attribute is missing, or None)."""
    parent, name = path.rsplit(".", 1)
    found = getattr(model.get_submodule(parent), name, None)
    return found if isinstance(found, nn.Module) else None


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
