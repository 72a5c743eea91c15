"""Where tokens go in a mixture of experts: over the layers of a store, and token by token on a prompt.

1. `load_by_layer` counts, for each layer whose router a store has, the share of tokens that went to each expert.
2. `prompt_routing` runs a prompt and tells each token's chosen experts, with their weights.
3. `edit_effects` runs it twice, without and with edits such as `forbid_expert`, and tells the features that flip and
   how the next token's probabilities change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from scope.errors import InvalidInputError, OutOfRangeError
from scope.features.experts import expert_load, feature_flips
from scope.models.experts import require_experts
from scope.models.losses import unembed

if TYPE_CHECKING:
    import pandas as pd

    from activations.store import ActivationStore
    from scope.models.edits import EditFunction

__all__ = ["EditEffects", "edit_effects", "expert_layers", "load_by_layer", "prompt_routing"]

FINAL = "ln_final.hook_out"


@dataclass(frozen=True, eq=False)
class EditEffects:
    """What an edit does to a prompt."""

    position: int
    """After which token the next one is asked for."""
    next_tokens: "pd.DataFrame"
    """token_id, token, before, after (probabilities), change: the largest changes first."""
    kl: float
    """KL divergence of what comes next, with the edit, from what comes without it, in nats."""
    flips: "pd.DataFrame | None"
    """As `feature_flips` gives them; None without an SAE."""


def expert_layers(store: "ActivationStore") -> list[int]:
    """The layers whose chosen experts a store has, `blocks.L.moe.hook_experts`, ascending."""
    parts = [name.split(".") for name in store.hooks if name.endswith(".moe.hook_experts")]
    return sorted(int(part[1]) for part in parts)


def load_by_layer(
    store: "ActivationStore",
    layers: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "pd.DataFrame":
    """How many tokens went to each expert of each layer.

    Args:
        store: a store with `blocks.L.moe.hook_experts` of some layers.
        layers: which ones; by default all that it has.
        progress: hears of (layers done, layers).

    Returns:
        Columns layer, and those of `scope.features.experts.expert_load`, by layer and expert.

    Raises:
        InvalidInputError: the store has no layer's choices.
        UnknownNameError: it lacks one of `layers`.
    """
    import pandas as pd

    asked = list(layers) if layers is not None else expert_layers(store)
    if not asked:
        raise InvalidInputError(
            f"{store.path} has no chosen experts. Capture them: scope capture … --hook blocks.L.moe.hook_experts "
            "--hook blocks.L.moe.hook_weights for the layers L that have experts."
        )
    parts = []
    for done, layer in enumerate(asked):
        if progress:
            progress(done, len(asked))
        load = expert_load(store, layer)
        load.insert(0, "layer", layer)
        parts.append(load)
    return pd.concat(parts, ignore_index=True)


def prompt_routing(model: Any, prompt: Any) -> "pd.DataFrame":
    """The experts that each token of a prompt goes to.

    Args:
        model: a `scope.models.LanguageModel` with experts.
        prompt: a text, chat messages or token ids.

    Returns:
        Columns layer, position, token, slot (0: the router's first choice), expert, weight (of the expert's output),
        probability (the router's softmax over all experts): by layer, position and slot.

    Raises:
        InvalidInputError: the model has no experts.
    """
    import pandas as pd

    require_experts(model)
    layers = [index for index, sizes in enumerate(model.layout.sizes) if sizes.n_experts]
    tokens = model.prompt_tokens(prompt)
    names = ("hook_experts", "hook_weights", "hook_logits")
    seen = model.run(tokens, hooks=[f"blocks.{i}.moe.{name}" for i in layers for name in names], logits=False)
    texts = [token.display for token in model.token_strings(tokens)]
    parts = []
    for layer in layers:
        chosen, weights, logits = (seen.activations[f"blocks.{layer}.moe.{name}"].float().cpu() for name in names)
        probability = logits.softmax(-1).gather(-1, chosen.long())
        n, k = chosen.shape
        parts.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "position": [place for place in range(n) for _ in range(k)],
                    "token": [text for text in texts for _ in range(k)],
                    "slot": list(range(k)) * n,
                    "expert": chosen.long().flatten().numpy(),
                    "weight": weights.flatten().numpy(),
                    "probability": probability.flatten().numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def edit_effects(
    model: Any,
    prompt: Any,
    edits: "Mapping[str, EditFunction]",
    sae: Any = None,
    position: int = -1,
    n: int = 10,
) -> EditEffects:
    """What edits change on a prompt: the next token's probabilities, and the features that begin or cease to fire.

    Args:
        model: a `scope.models.LanguageModel`.
        prompt: a text, chat messages or token ids.
        edits: as `model.run` takes them, such as `combine(swap_experts(model, 3, 17, 4))`.
        sae: whose features are looked at, if any.
        position: after which token the next one is asked for; -1 is the last.
        n: next tokens to tell, at most.

    Raises:
        OutOfRangeError: the prompt has no such position.
    """
    import pandas as pd

    tokens = model.prompt_tokens(prompt)
    if not -len(tokens) <= position < len(tokens):
        raise OutOfRangeError(f"Position {position} is out of range: the prompt has {len(tokens)} tokens.")
    place = position % len(tokens)
    rows = [model.run(tokens, hooks=[FINAL], edits=one, logits=False).activations[FINAL][place] for one in ({}, edits)]
    with model.lock:
        before, after = unembed(model, torch.stack(rows)).double().cpu().log_softmax(-1)
    kl = float((after.exp() * (after - before)).nan_to_num(0.0).sum().clamp_min(0.0))
    p, q = before.exp(), after.exp()
    ids = (q - p).abs().topk(min(n, len(p))).indices
    table = pd.DataFrame(
        {
            "token_id": ids.tolist(),
            "token": model.vocabulary_strings(ids.tolist()),
            "before": p[ids].tolist(),
            "after": q[ids].tolist(),
            "change": (q - p)[ids].tolist(),
        }
    )
    return EditEffects(place, table, kl, None if sae is None else feature_flips(model, sae, tokens, edits))
