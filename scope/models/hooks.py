"""Hook names: one vocabulary, TransformerLens's, for the fast path and for the bridge.

A `HookPoint` is a place in the model. Its name is the one that people know (`blocks.8.hook_resid_post`); the
names that TransformerBridge calls canonical (`blocks.8.hook_out`) are aliases and resolve to it. Points with
`path="fast"` know the HF module they stand for (`Site`); the others can only be seen through the bridge.

Where a name has two meanings in TransformerLens, ours is the one of `HookedTransformer`: `hook_resid_mid` *is* the
residual stream, so an edit there changes both what the MLP reads and what it is added to, while `hook_mlp_in` is
only what the MLP branch reads. (TransformerBridge 3.9 treats an edit of `hook_resid_mid` like one of `hook_mlp_in`.)
Where attention and MLP read the same (Pythia), nothing is between them: there is no `hook_resid_mid`.

Where the residual stream is a stack of streams (Gemma 3n's AltUp), `hook_resid_pre` and `hook_resid_post` are its
active stream, as in TransformerBridge, and `hook_streams_pre` and `hook_streams_post` are all of them, (batch, seq,
n_streams, d_model). What the final norm reads is then a hook of its own, `ln_final.hook_in`.

The hooks of per-layer embeddings are described in `scope.models.per_layer`, those of mixtures of experts in
`scope.models.experts`, those of models that denoise in `scope.models.diffusion`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from scope.errors import UnknownNameError
from scope.models.architectures import Layout
from scope.models.bridge_hooks import bridge_hooks

__all__ = ["ENCODER", "HookKind", "HookPoint", "HookTable", "Site", "build_hook_table"]

HookKind = Literal["embedding", "per_layer", "residual", "attention", "mlp", "experts", "norm"]
Where = Literal["input", "output"]
ENCODER = "encoder."
"""Begins the names of hooks in the stack that reads the prompt, in models that have a stack of their own for that."""
HOOK_KINDS: tuple[HookKind, ...] = ("embedding", "per_layer", "residual", "attention", "mlp", "experts", "norm")


@dataclass(frozen=True)
class Site:
    """Where the fast path finds a hook's tensor."""

    module: str
    """Path of the HF module."""
    where: Where
    """Whether the tensor goes into the module or comes out of it."""
    heads: tuple[int, int] | None = None
    """(n_heads, d_head) that the last dimension is split into."""
    part: tuple[int, int] | None = None
    """(start, width) of a slice of the last dimension, where one module computes q, k and v."""
    part_of_heads: bool = False
    """The slice is one of each head, not of all heads side by side."""
    argument: int = 0
    """Which of the module's arguments, where the tensor goes in."""
    item: int = 0
    """Which of the module's outputs, where it gives several."""
    rows_of: str | None = None
    """The tensor is (batch * seq, width): the module, the layer, whose input says how many are in a batch."""
    experts: Literal["reroute", "outputs"] | None = None
    """What an edit entails: of a router's logits that it chooses anew; or the tensor is what each chosen expert of the
    module writes, computed again, and an edit takes the place of their sum. See `scope.models.experts`."""
    select: int | None = None
    """A place in the third dimension, where the tensor is (batch, seq, several, width)."""
    stacked: bool = False
    """The tensor is (streams, batch, seq, d_model), a stack of streams; shown as (batch, seq, streams, ...)."""
    stream: bool = False
    """The tensor is the residual stream itself: an edit is written into it, for all who read it."""


@dataclass(frozen=True)
class HookPoint:
    """A place in the model where activations can be read and changed."""

    name: str
    """The name in TransformerLens's vocabulary."""
    kind: HookKind
    shape: tuple[str | int, ...]
    """Such as ("batch", "seq", 640)."""
    path: Literal["fast", "bridge"]
    """"fast": plain forward hooks, capture and training can use it. "bridge": only `run`, through TransformerLens."""
    aliases: tuple[str, ...] = ()
    """Further names of the same place."""
    site: Site | None = field(default=None, repr=False)
    read_only: bool = False
    """An edit here would change nothing: the model does not go on with this tensor."""

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """The shape of one token's activation; None where the tensor has no token dimension of its own."""
        rest = self.shape[2:]
        if self.shape[:2] != ("batch", "seq") or not rest or any(isinstance(size, str) for size in rest):
            return None
        return tuple(int(size) for size in rest)


class HookTable:
    """Hook points: those of the fast path in the order in which the model reaches them, then those of the bridge.

    Iterates over `HookPoint`s; indexed by name or alias.
    """

    def __init__(self, points: Iterable[HookPoint]) -> None:
        self._points = tuple(points)
        self._by_name = {name: point for point in self._points for name in (point.name, *point.aliases)}
        self._rank = {point.name: rank for rank, point in enumerate(self._points)}

    def __iter__(self) -> Iterator[HookPoint]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> HookPoint:
        """The hook point of a name or alias; raises `UnknownNameError` with near misses."""
        point = self._by_name.get(name) if isinstance(name, str) else None
        if point is None:
            raise UnknownNameError("hook", name, self._by_name, "model.hook_names() lists them all.")
        return point

    @property
    def names(self) -> tuple[str, ...]:
        """All names, without aliases, in model order."""
        return tuple(point.name for point in self._points)

    @property
    def all_names(self) -> tuple[str, ...]:
        """All names, with aliases."""
        return tuple(self._by_name)

    def rank(self, name: str) -> int:
        """Place of a hook in the table: for hooks of the fast path, in model order."""
        return self._rank[self[name].name]

    def select(self, kind: HookKind | None) -> "HookTable":
        """The points of one kind; all of them for None."""
        if kind is None:
            return self
        if kind not in HOOK_KINDS:
            raise UnknownNameError("kind of hook", kind, HOOK_KINDS)
        return HookTable(point for point in self._points if point.kind == kind)

    def __repr__(self) -> str:
        from scope.models.display import hook_table_text

        return hook_table_text(self)

    def _repr_html_(self) -> str:
        from scope.models.display import hook_table_html

        return hook_table_html(self)


def build_hook_table(layout: Layout) -> HookTable:
    """All hook points of a model: those of the fast path in model order, then those that only the bridge has."""
    fast = [*_first(layout), *(point for i in range(layout.n_layers) for point in _layer(layout, i)), *_last(layout)]
    if layout.family.denoises:
        return HookTable([*_prompt_reader(layout), *fast])
    taken = {name for point in fast for name in (point.name, *point.aliases)}
    bridge = [
        HookPoint(hook.name, _kind_of(hook.name), hook.shape, "bridge", hook.aliases, read_only=hook.read_only)
        for hook in bridge_hooks(layout)
        if hook.name not in taken
    ]
    return HookTable([*fast, *bridge])


def _prompt_reader(layout: Layout) -> Iterator[HookPoint]:
    """The hooks of the stack that reads the prompt, where that is one of its own: as the others, behind `encoder.`."""
    encoder = layout.encoder
    if encoder is None:
        return
    points = [*_first(encoder), *(point for i in range(encoder.n_layers) for point in _layer(encoder, i))]
    norm = Site(encoder.module(encoder.family.final_norm), "output")
    points.append(_point("ln_final.hook_out", "norm", (encoder.d_model,), norm))
    for point in points:
        yield replace(
            point,
            name=f"{ENCODER}{point.name}",
            aliases=tuple(f"{ENCODER}{alias}" for alias in point.aliases),
        )


def _kind_of(name: str) -> HookKind:
    parts = name.split(".")
    if parts[0] != "blocks":
        return "norm" if parts[0].startswith("ln") else "embedding"
    inside = parts[2]
    if inside.startswith("ln"):
        return "norm"
    if "per_layer" in inside:
        return "per_layer"
    return "mlp" if inside.startswith("mlp") else "attention"


def _point(name: str, kind: HookKind, row: tuple[int, ...], site: Site, *aliases: str) -> HookPoint:
    return HookPoint(name, kind, ("batch", "seq", *row), "fast", aliases, site)


def _first(layout: Layout) -> Iterator[HookPoint]:
    family, row = layout.family, (layout.d_model,)
    embed = Site(layout.module(family.embed), "output")
    yield _point("hook_embed", "embedding", row, embed, "embed.hook_out")
    if family.pos_embed:
        positions = Site(layout.module(family.pos_embed), "output")
        yield _point("hook_pos_embed", "embedding", row, positions, "pos_embed.hook_out")
    if family.encoder:
        conditioned = Site(layout.module("self_conditioning"), "output")
        yield _point("hook_self_conditioned", "embedding", row, conditioned)
    yield from _per_layer_inputs(layout)


def _per_layer_inputs(layout: Layout) -> Iterator[HookPoint]:
    """What the look-ups and the projection make for each layer, all before the first layer runs."""
    width = layout.d_per_layer
    table, norm = layout.module("embed_tokens_per_layer"), layout.module("per_layer_projection_norm")
    for index in range(layout.n_layers if width else 0):
        looked_up = Site(table, "output", part=(index * width, width))
        yield _point(f"blocks.{index}.ple.hook_table", "per_layer", (width,), looked_up)
    for index in range(layout.n_layers if width else 0):
        projected = Site(norm, "output", select=index)
        yield _point(f"blocks.{index}.ple.hook_projection", "per_layer", (width,), projected)


def _last(layout: Layout) -> Iterator[HookPoint]:
    path = layout.module(layout.family.final_norm)
    norm = Site(path, "output")
    if layout.n_streams > 1:
        yield _point("ln_final.hook_in", "residual", (layout.d_model,), Site(path, "input"))
    yield _point("ln_final.hook_out", "norm", (layout.d_model,), norm, "unembed.hook_in")
    yield _point("hook_unembed", "embedding", (layout.d_vocab,), Site(layout.head, "output"), "unembed.hook_out")


def _layer(layout: Layout, index: int) -> Iterator[HookPoint]:
    """The hook points of one layer, in the order in which the layer reaches them."""
    family, row = layout.family, (layout.d_model,)
    block = f"blocks.{index}."

    def point(
        name: str, kind: HookKind, row: tuple[int, ...], module: str, where: Where, *aliases: str, **site: Any
    ) -> HookPoint:
        place = Site(layout.layer(index, module), where, **site)
        return _point(block + name, kind, row, place, *(block + alias for alias in aliases))

    if layout.n_streams > 1:
        streams = (layout.n_streams, layout.d_model)
        yield point("hook_streams_pre", "residual", streams, "", "input", "hook_in", stacked=True)
        active = {"stacked": True, "select": layout.active_stream}
        yield point("hook_resid_pre", "residual", row, "", "input", **active)
    else:
        yield point("hook_resid_pre", "residual", row, "", "input", "hook_in")
    if layout.d_per_layer:
        argument = family.per_layer_argument
        yield point("ple.hook_input", "per_layer", (layout.d_per_layer,), "", "input", argument=argument)
    # With AltUp a low-rank branch (Laurel) reads the norm's output beside attention.
    reads = () if layout.n_streams > 1 else ("attn.hook_in",)
    yield point("ln1.hook_out", "norm", row, family.ln1, "output", *reads)
    yield from _queries_keys_values(layout, index)
    heads = (layout.n_heads, layout.sizes[index].d_head)
    yield point("attn.hook_z", "attention", heads, family.o, "input", "attn.o.hook_in", heads=heads)
    if family.ln1_post:
        yield point("attn.hook_out", "attention", row, family.o, "output", "attn.o.hook_out")
        yield point("hook_attn_out", "attention", row, family.ln1_post, "output", "ln1_post.hook_out")
    else:
        yield point("hook_attn_out", "attention", row, family.o, "output", "attn.hook_out", "attn.o.hook_out")
    if not layout.parallel:
        yield point("hook_resid_mid", "residual", row, family.ln2, "input", stream=True)
    yield point("hook_mlp_in", "mlp", row, family.ln2, "input", "ln2.hook_in")
    yield point("ln2.hook_out", "norm", row, family.ln2, "output", "mlp.hook_in")
    yield from _experts(layout, index)
    if layout.sizes[index].dense:
        yield from _dense_mlp(layout, index)
    else:
        yield point("hook_mlp_out", "mlp", row, family.mlp, "output", "mlp.hook_out")
    if layout.d_per_layer:
        narrow = (layout.d_per_layer,)
        gate, out, post = "per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"
        yield point("ple.hook_pre", "per_layer", narrow, gate, "output", f"{gate}.hook_out")
        yield point("ple.hook_gate", "per_layer", narrow, "act_fn", "output")
        yield point("ple.hook_product", "per_layer", narrow, out, "input", f"{out}.hook_in")
        yield point("ple.hook_out", "per_layer", row, out, "output", f"{out}.hook_out")
        yield point("hook_ple_out", "per_layer", row, post, "output", f"{post}.hook_out")
    if layout.n_streams > 1:
        yield point("hook_resid_post", "residual", row, "", "output", **active)
        yield point("hook_streams_post", "residual", streams, "", "output", "hook_out", stacked=True)
        return
    last = index == layout.n_layers - 1
    final = Site(layout.layer(index), "output")
    aliases = (f"{block}hook_out", *(["ln_final.hook_in"] if last else []))
    yield _point(f"{block}hook_resid_post", "residual", row, final, *aliases)


def _dense_mlp(layout: Layout, index: int) -> Iterator[HookPoint]:
    """The hook points of an MLP that every token goes through, and of the norm behind it."""
    family, row, wide = layout.family, (layout.d_model,), (layout.sizes[index].d_mlp,)
    block = f"blocks.{index}."

    def point(name: str, row: tuple[int, ...], module: str, where: Where, *aliases: str) -> HookPoint:
        place = Site(layout.layer(index, module), where)
        return _point(block + name, "mlp", row, place, *(block + alias for alias in aliases))

    if family.mlp_gate:
        yield point("mlp.hook_pre", wide, family.mlp_gate, "output", "mlp.gate.hook_out")
        yield point("mlp.hook_pre_linear", wide, family.mlp_in, "output", "mlp.in.hook_out")
    else:
        yield point("mlp.hook_pre", wide, family.mlp_in, "output", "mlp.in.hook_out")
    yield point("mlp.hook_post", wide, family.mlp_out, "input", "mlp.out.hook_in")
    if family.ln2_post:
        yield point("mlp.hook_out", row, family.mlp_out, "output", "mlp.out.hook_out")
        yield point("hook_mlp_out", row, family.ln2_post, "output", "ln2_post.hook_out")
    else:
        yield point("hook_mlp_out", row, family.mlp_out, "output", "mlp.hook_out", "mlp.out.hook_out")


def _experts(layout: Layout, index: int) -> Iterator[HookPoint]:
    """The router's and the experts' hooks of one layer; described in `scope.models.experts`."""
    family, sizes = layout.family, layout.sizes[index]
    if not sizes.n_experts or family.router is None or family.experts is None:
        return
    chosen = (sizes.experts_per_token,)

    def point(name: str, row: tuple[int, ...], module: str, where: Where, **site: Any) -> HookPoint:
        place = Site(layout.layer(index, module), where, rows_of=layout.layer(index), **site)
        return _point(f"blocks.{index}.moe.{name}", "experts", row, place)

    if family.router_logits:
        yield point("hook_logits", (sizes.n_experts,), family.router_logits, "output")
    else:
        yield point("hook_logits", (sizes.n_experts,), family.router, "output", experts="reroute")
    yield point("hook_weights", chosen, family.router, "output", item=1)
    yield point("hook_experts", chosen, family.router, "output", item=2)
    yield point("hook_in", (layout.d_model,), family.experts, "input")
    yield point("hook_expert_out", (*chosen, layout.d_model), family.experts, "output", experts="outputs")
    yield point("hook_out", (layout.d_model,), family.experts, "output")
    for name, path in (("hook_dense_normed", family.dense_post), ("hook_normed", family.experts_post)):
        if path:
            post = Site(layout.layer(index, path), "output")
            alias = f"blocks.{index}.{path}.hook_out"
            yield _point(f"blocks.{index}.moe.{name}", "experts", (layout.d_model,), post, alias)


def _queries_keys_values(layout: Layout, index: int) -> Iterator[HookPoint]:
    """q, k and v per head, before rotation and before query and key norms, as TransformerLens has them. A layer that
    takes keys and values from elsewhere lacks them."""
    start, sizes = 0, layout.sizes[index]
    for position, letter in enumerate("qkv"):
        if letter not in sizes.projections:
            continue
        n_heads = layout.n_heads if letter == "q" else sizes.n_key_value_heads
        heads = (n_heads, sizes.d_head)
        width = n_heads * sizes.d_head
        fused, per_head = len(layout.family.qkv) == 1, layout.family.interleaved
        module = layout.layer(index, layout.family.qkv[0 if fused else position])
        part = (position * sizes.d_head, sizes.d_head) if per_head else (start, width) if fused else None
        site = Site(module, "output", heads=heads, part=part, part_of_heads=per_head)
        alias = f"blocks.{index}.attn.{letter}.hook_out"
        yield _point(f"blocks.{index}.attn.hook_{letter}", "attention", heads, site, alias)
        start += width
