"""`per_layer_writes`: for each token, how much each layer's own table wrote into the residual, along which features.

1. The prompt runs once; every layer's write, `hook_ple_out`, is split into what the look-up of the layer's table wrote
   and what the projection of the main embedding wrote (`scope.models.per_layer`): the two add up to it exactly, with
   the layer's gate and norm as they were.
2. Each part's size is its norm, and its share that norm over the norm of the residual stream it was added to, taken
   after the addition (for AltUp, of the streams that it was added to, side by side).
3. Along features: an SAE reads x, and feature f's pre-activation is linear in it. A write w that reaches x along the
   skip connections as c w (c the scalars at the ends of the layers between, in Gemma 4) adds

       effect = c w . W_enc[:, f]

   to it. Only features that fire are listed, as each one's value beside it says what the sum came to.

What later layers make of a write on other ways than the skip connection is no part of it; `build_graph` follows those.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from scope.attribution.baselines import hooks_of
from scope.errors import InvalidInputError
from scope.models.dictionaries import as_read
from scope.models.per_layer import layer_scale, require_per_layer, write_hooks, write_parts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PerLayerReport", "per_layer_writes", "require_readable"]

PARTS = ("table", "projection")


@dataclass(frozen=True, eq=False)
class PerLayerReport:
    """What per-layer embeddings wrote on one prompt."""

    tokens: tuple[str, ...]
    """The prompt's tokens as they read."""
    writes: "pd.DataFrame"
    """layer, position, token, part ("table" or "projection"), norm, share (of the residual stream's norm): by layer and
    position."""
    features: "pd.DataFrame"
    """layer (that wrote), hook (of the SAE), position, token, feature, value (its activation), table, projection (what
    each part added to its pre-activation): by |table|, the largest first."""

    def of_token(self, position: int) -> "pd.DataFrame":
        """The writes at one position, a row for each layer: layer, table, projection (norms), share_table,
        share_projection."""
        import pandas as pd

        rows = self.writes[self.writes["position"] == position]
        wide = rows.pivot(index="layer", columns="part", values=["norm", "share"])
        columns = {part: wide["norm", part] for part in PARTS}
        columns |= {f"share_{part}": wide["share", part] for part in PARTS}
        return pd.DataFrame(columns).rename_axis("layer").reset_index()


@torch.no_grad()
def per_layer_writes(model: Any, prompt: Any, saes: Sequence[Any] = (), top: int | None = 20) -> PerLayerReport:
    """What each layer's embedding table wrote for each token of a prompt.

    Args:
        model: a `scope.models.LanguageModel` with per-layer embeddings (Gemma 3n, Gemma 4 E2B and E4B).
        prompt: a text, chat messages or token ids.
        saes: dictionaries whose features are asked about. They read `blocks.L.hook_resid_post` (Gemma 4; all writes
            up to L count), `blocks.L.hook_streams_post` (Gemma 3n; the write of L) or `blocks.L.hook_ple_out` (the
            write itself).
        top: features to list per layer, position and SAE, at most; None for all that fire.

    Raises:
        InvalidInputError: the model has no per-layer embeddings, or an SAE reads another hook.
    """
    import pandas as pd

    require_per_layer(model)
    tokens = model.prompt_tokens(prompt)
    n_layers, stacked = model.n_layers, model.layout.n_streams > 1
    reads = {sae: _read_layer(model, sae) for sae in saes}
    after = [f"blocks.{layer}.{'hook_streams_post' if stacked else 'hook_resid_post'}" for layer in range(n_layers)]
    hooks = [name for layer in range(n_layers) for name in write_hooks(layer)]
    sae_hooks = [hooks_of(model, sae)[0] for sae in saes]
    seen = model.run(tokens, hooks=list(dict.fromkeys([*hooks, *after, *sae_hooks])), logits=False).activations
    texts = tuple(token.display for token in model.token_strings(tokens))
    writes, features = [], []
    for layer in range(n_layers):
        parts = write_parts(model, layer, seen)
        scale = layer_scale(model, layer)
        stream = seen[after[layer]].float()
        written = 1 if not stacked else model.layout.n_streams - 1
        size = stream[:, 1:].flatten(1).norm(dim=-1) if stacked else stream.norm(dim=-1) / abs(scale)
        for name, part in zip(PARTS, parts, strict=True):
            norm = part.norm(dim=-1)
            share = norm * written**0.5 / size.clamp_min(1e-30)
            writes.append(_frame(layer, texts, {"part": name, "norm": norm.tolist(), "share": share.tolist()}))
        for sae, (read_layer, where) in reads.items():
            if layer == read_layer or (where == "hook_resid_post" and layer < read_layer):
                pushed = {
                    name: _as_seen(model, where, part, layer, read_layer) for name, part in parts._asdict().items()
                }
                hook = hooks_of(model, sae)[0]
                features.append(_features(model, sae, hook, seen[hook], pushed, layer, texts, tokens, top))
    columns = ["layer", "hook", "position", "token", "feature", "value", *PARTS]
    found = pd.concat(features, ignore_index=True) if features else pd.DataFrame(columns=columns)
    return PerLayerReport(
        texts,
        pd.concat(writes, ignore_index=True).sort_values(["layer", "position"], kind="stable", ignore_index=True),
        found.sort_values("table", key=abs, ascending=False, kind="stable", ignore_index=True),
    )


def _frame(layer: int, texts: Sequence[str], columns: Mapping[str, Any]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame({"layer": layer, "position": range(len(texts)), "token": texts, **columns})


def require_readable(model: Any, sae: Any) -> None:
    """Refuse an SAE whose features the writes cannot be followed to.

    Raises:
        InvalidInputError: it reads another hook than those that `per_layer_writes` names.
    """
    _read_layer(model, sae)


def _read_layer(model: Any, sae: Any) -> tuple[int, str]:
    """The layer whose writes an SAE sees, and at which hook of it."""
    hook = hooks_of(model, sae)[0]
    stacked = model.layout.n_streams > 1
    known = ("hook_streams_post" if stacked else "hook_resid_post", "hook_ple_out")
    parts = hook.split(".")
    if len(parts) != 3 or parts[2] not in known:
        raise InvalidInputError(
            f"The SAE reads {hook}; what per-layer embeddings write can be followed along the skip connection to "
            f"{' and '.join(f'blocks.L.{name}' for name in known)} of this model."
        )
    return int(parts[1]), parts[2]


def _as_seen(
    model: Any, where: str, part: Float[Tensor, "seq d_model"], layer: int, read_layer: int
) -> Float[Tensor, "seq d_in"]:
    """A write of a layer as it arrives where an SAE reads."""
    if where == "hook_streams_post":
        nothing = torch.zeros_like(part)
        return torch.cat([nothing, *[part] * (model.layout.n_streams - 1)], dim=-1)
    if where == "hook_resid_post":
        for between in range(layer, read_layer + 1):
            part = part * layer_scale(model, between)
    return part


def _features(
    model: Any,
    sae: Any,
    hook: str,
    value: Tensor,
    pushed: Mapping[str, Tensor],
    layer: int,
    texts: Sequence[str],
    tokens: Tensor,
    top: int | None,
) -> "pd.DataFrame":
    """The features that fire, and what each part added to their pre-activations."""
    import pandas as pd

    firing = sae.encode(as_read(sae, value[None]))[0].float()
    firing[model.bos_mask(tokens[None])[0].to(firing.device)] = 0.0
    encoder = sae.W_enc.detach().float()
    effects = {name: part.to(encoder.device) @ encoder for name, part in pushed.items()}
    if top is not None and top < firing.shape[1]:
        ranked = effects["table"].abs().masked_fill(firing == 0, -1.0).topk(top, dim=-1).indices
        firing = torch.zeros_like(firing).scatter(1, ranked, firing.gather(1, ranked))
    position, feature = firing.nonzero(as_tuple=True)
    places = position.tolist()
    return pd.DataFrame(
        {
            "layer": layer,
            "hook": hook,
            "position": places,
            "token": [texts[place] for place in places],
            "feature": feature.tolist(),
            "value": firing[position, feature].tolist(),
            **{name: effect[position, feature].tolist() for name, effect in effects.items()},
        }
    )
