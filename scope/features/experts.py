"""Experts and what goes to them: load, specialisation by language, source and token, and which features fire there.

All of it is counted on a store that has the hook `blocks.L.moe.hook_experts` (`scope.models.experts`): per token the
numbers of the k experts that the router chose. With it, shares are exact counts over the rows of the store; BOS and
other special tokens are left out.

    share(e | group) = tokens of the group that went to e / tokens of the group          (shares sum to k)
    lift             = share(e | group) / share(e)
    information(e)   = sum over groups of P(group | e) log2(P(group | e) / P(group))     bits

`information` is 0 for an expert that gets of every group its due, and log2(1 / P(group)) for one that gets a single
group's tokens alone. Where groups are small it is above 0 by chance too: beside it stands `information_by_chance`, the
mean over a few shuffles of the tokens' groups.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from activations.source import RowFlag
from scope.errors import InvalidInputError, MismatchError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from activations.store import ActivationStore
    from scope.models.edits import EditFunction

__all__ = [
    "Grouping",
    "Routing",
    "dense_against_experts",
    "expert_load",
    "expert_specialisation",
    "feature_experts",
    "feature_flips",
    "read_routing",
]

Grouping = Literal["language", "source", "token"]
GROUPINGS: tuple[Grouping, ...] = ("language", "source", "token")
BLOCK_ROWS = 2**15
EXACT = {"bfloat16": 2**8, "float16": 2**11, "float32": 2**24}
"""Whole numbers below this are exact in a dtype."""
SHUFFLES = 8


@dataclass(frozen=True, eq=False)
class Routing:
    """What the router of one layer chose for the tokens of a store, BOS and special tokens left out."""

    layer: int
    n_experts: int
    rows: np.ndarray
    """int64 `(n,)`: rows of the store."""
    chosen: np.ndarray
    """int32 `(n, k)`: expert numbers, the likeliest first."""
    weights: np.ndarray | None
    """float32 `(n, k)`, where the store has them."""

    @property
    def share(self) -> np.ndarray:
        """float64 `(n_experts,)`: of the tokens, how many went to each expert."""
        return np.bincount(self.chosen.ravel(), minlength=self.n_experts) / max(1, len(self.chosen))


def read_routing(store: "ActivationStore", layer: int, n_experts: int | None = None) -> Routing:
    """Read one layer's routing.

    Args:
        store: a store with the hook `blocks.L.moe.hook_experts`.
        layer: the layer.
        n_experts: how many experts the layer has; by default as many as the store's `hook_logits` is wide, or, without
            it, as are met.

    Raises:
        UnknownNameError: the store lacks the hook.
        InvalidInputError: its dtype does not hold so many experts' numbers, or there are no tokens.
    """
    block = f"blocks.{layer}.moe."
    hook = store.resolve_hook(f"{block}hook_experts")
    n_rows = store.rows_of(hook)
    left_out = RowFlag.BOS | RowFlag.SPECIAL
    rows = np.flatnonzero((store.flags(0, n_rows) & left_out) == 0)
    if not len(rows):
        raise InvalidInputError("The store has no tokens besides BOS and special ones.")
    chosen = _whole(store, hook, n_rows)[rows].astype(np.int32)
    if n_experts is None:
        stored = f"{block}hook_logits" in store.hooks
        n_experts = store.hook_shape(f"{block}hook_logits")[0] if stored else int(chosen.max()) + 1
    if max(n_experts, int(chosen.max()) + 1) > EXACT[store.dtype]:
        raise InvalidInputError(
            f"The store is in {store.dtype}, which rounds numbers above {EXACT[store.dtype]}; with {n_experts} experts "
            "capture hook_experts in float32."
        )
    weights = _whole(store, f"{block}hook_weights", n_rows)[rows] if f"{block}hook_weights" in store.hooks else None
    return Routing(layer, n_experts, rows, chosen, weights)


def _whole(store: "ActivationStore", hook: str, n_rows: int) -> np.ndarray:
    parts = [store.read_float32(hook, start, min(n_rows, start + BLOCK_ROWS)) for start in range(0, n_rows, BLOCK_ROWS)]
    return np.concatenate(parts)


def expert_load(store: "ActivationStore", layer: int, by: Grouping | None = None) -> "pd.DataFrame":
    """How many tokens went to each expert, in all or group by group.

    Args:
        store: a store with the layer's `moe.hook_experts`.
        layer: the layer.
        by: "language" or "source" (of the document) or "token" (the token's id).

    Returns:
        Columns group (where `by` is given), expert, tokens, share (of the group's tokens), lift (share over the
        expert's share of all tokens), weight (mean router weight where it was chosen; missing where the store lacks
        `moe.hook_weights`).
    """
    import pandas as pd

    routing = read_routing(store, layer)
    groups, names = _groups(store, routing, by) if by else (np.zeros(len(routing.rows), np.int64), np.array(["all"]))
    counts = _counts(routing, groups, len(names))
    sizes = np.bincount(groups, minlength=len(names))
    share = counts / np.maximum(sizes, 1)[:, None]
    sums = np.full(counts.shape, np.nan)
    if routing.weights is not None:
        sums = _counts(routing, groups, len(names), routing.weights)
    table = pd.DataFrame(
        {
            "group": np.repeat(names, routing.n_experts),
            "expert": np.tile(np.arange(routing.n_experts), len(names)),
            "tokens": counts.ravel().astype(np.int64),
            "share": share.ravel(),
            "lift": (share / np.maximum(routing.share, 1e-300)).ravel(),
            "weight": np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0).ravel(),
        }
    )
    return table if by else table.drop(columns="group")


def expert_specialisation(store: "ActivationStore", layer: int, by: Grouping, seed: int = 0) -> "pd.DataFrame":
    """How far each expert's tokens are those of some groups rather than of all alike.

    Args:
        store: a store with the layer's `moe.hook_experts`.
        layer: the layer.
        by: "language", "source" or "token".
        seed: of the shuffles.

    Returns:
        Columns expert, share, information (bits), information_by_chance, top_group, top_share (of the expert's tokens
        that are of it), top_lift: by information, the largest first.
    """
    import pandas as pd

    routing = read_routing(store, layer)
    groups, names = _groups(store, routing, by)
    rng = np.random.default_rng(seed)
    counts = _counts(routing, groups, len(names))
    chance = np.mean(
        [_information(_counts(routing, rng.permutation(groups), len(names)), groups) for _ in range(SHUFFLES)], axis=0
    )
    of_expert = counts / np.maximum(counts.sum(0), 1)
    expected = np.bincount(groups, minlength=len(names)) / len(groups)
    top = of_expert.argmax(0)
    every = np.arange(routing.n_experts)
    table = pd.DataFrame(
        {
            "expert": every,
            "share": routing.share,
            "information": _information(counts, groups),
            "information_by_chance": chance,
            "top_group": names[top],
            "top_share": of_expert[top, every],
            "top_lift": of_expert[top, every] / expected[top],
        }
    )
    return table.sort_values("information", ascending=False, kind="stable", ignore_index=True)


def _information(counts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Bits per expert that its tokens' groups differ from all tokens' by."""
    expected = (np.bincount(groups, minlength=len(counts)) / len(groups))[:, None]
    share = counts / np.maximum(counts.sum(0), 1)
    return np.sum(share * np.log2(np.divide(share, expected, out=np.ones_like(share), where=share > 0)), axis=0)


def _counts(routing: Routing, groups: np.ndarray, n_groups: int, weights: np.ndarray | None = None) -> np.ndarray:
    """`(n_groups, n_experts)`: tokens, or the sum of their weights."""
    flat = groups[:, None] * routing.n_experts + routing.chosen
    given = None if weights is None else weights.ravel()
    counts = np.bincount(flat.ravel(), weights=given, minlength=n_groups * routing.n_experts)
    return counts.reshape(n_groups, routing.n_experts).astype(np.float64)


def _groups(store: "ActivationStore", routing: Routing, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Per token the number of its group, and the groups' names."""
    if by not in GROUPINGS:
        raise UnknownNameError("grouping", by, GROUPINGS)
    end = int(routing.rows[-1]) + 1
    if by == "token":
        names, groups = np.unique(store.column("token_id", 0, end)[routing.rows], return_inverse=True)
        return groups, names
    sequences, documents = store.sequences(), store.documents()
    document_of = sequences.set_index("sequence")["document"]
    value_of = documents.set_index("document")[by].fillna("").astype(str)
    by_sequence = document_of.map(value_of)
    names, codes = np.unique(by_sequence.to_numpy(dtype=str), return_inverse=True)
    places = np.searchsorted(by_sequence.index.to_numpy(), store.column("sequence", 0, end)[routing.rows])
    return codes[places], names


def feature_experts(store: "ActivationStore", sae: Any, layer: int, min_firings: int = 10) -> "pd.DataFrame":
    """Which experts the tokens go to on which a feature fires.

    Args:
        store: a store with the SAE's hook and the layer's `moe.hook_experts`.
        sae: the dictionary.
        layer: the layer of the experts.
        min_firings: features that fire on fewer tokens are left out.

    Returns:
        Columns feature, expert, firings (of the feature), together (firings on tokens of the expert), share (together
        over firings), lift (share over the expert's share of all tokens): by feature, the largest lift first.

    Raises:
        MismatchError: the SAE has another width than the hook, or the hook has fewer rows than the router's.
    """
    import pandas as pd

    from scope.features.encode import encode_rows
    from scope.kernels.tensors import as_tensor

    routing = read_routing(store, layer)
    hook = store.resolve_hook(sae.hook_name)
    width = int(np.prod(store.hook_shape(hook)))
    if width != sae.d_in:
        raise MismatchError(f"The SAE reads {sae.d_in} dimensions; {hook} has {width}.")
    if store.rows_of(hook) <= routing.rows[-1]:
        raise MismatchError(
            f"{store.path} has {store.rows_of(hook):,} rows of {hook}, fewer than of the router's hooks. Finish its "
            "capture first."
        )
    together = np.zeros((sae.d_sae, routing.n_experts), np.int64)
    firings = np.zeros(sae.d_sae, np.int64)
    for start in range(0, int(routing.rows[-1]) + 1, BLOCK_ROWS):
        first, last = np.searchsorted(routing.rows, [start, start + BLOCK_ROWS])
        if first == last:
            continue
        read = store.read(hook, start, min(store.rows_of(hook), start + BLOCK_ROWS))
        x = as_tensor(read[routing.rows[first:last] - start], store.dtype).flatten(1)
        found = encode_rows(sae, x, sae.decoder_norms)
        token = np.repeat(np.arange(first, last), found.counts)
        firings += np.bincount(found.features, minlength=sae.d_sae)
        flat = found.features.astype(np.int64)[:, None] * routing.n_experts + routing.chosen[token]
        together += np.bincount(flat.ravel(), minlength=together.size).reshape(together.shape)
    kept = np.flatnonzero(firings >= min_firings)
    share = together[kept] / np.maximum(firings[kept], 1)[:, None]
    table = pd.DataFrame(
        {
            "feature": np.repeat(kept, routing.n_experts),
            "expert": np.tile(np.arange(routing.n_experts), len(kept)),
            "firings": np.repeat(firings[kept], routing.n_experts),
            "together": together[kept].ravel(),
            "share": share.ravel(),
            "lift": (share / np.maximum(routing.share, 1e-300)).ravel(),
        }
    )
    return table.sort_values(["feature", "lift"], ascending=[True, False], kind="stable", ignore_index=True)


def feature_flips(model: Any, sae: Any, prompt: Any, edits: "Mapping[str, EditFunction]") -> "pd.DataFrame":
    """The features that begin or cease to fire on a prompt when something is edited, such as the choice of experts.

    Args:
        model: a `scope.models.LanguageModel`.
        sae: the dictionary.
        prompt: a text, chat messages or token ids.
        edits: as `model.run` takes them, such as `combine(forbid_expert(model, 3, 17))`.

    Returns:
        Columns position, token, feature, before, after (activations, one of them 0), by the size of the change; BOS is
        left out.
    """
    import pandas as pd

    tokens = model.prompt_tokens(prompt)
    before, after = (
        next(iter(model.run(tokens, saes=sae, edits=changes, logits=False).features.values())).float().cpu()
        for changes in ({}, edits)
    )
    flipped = (before != 0) != (after != 0)
    flipped[model.bos_mask(tokens[None])[0].cpu()] = False
    position, feature = flipped.nonzero(as_tuple=True)
    texts = [token.display for token in model.token_strings(tokens)]
    table = pd.DataFrame(
        {
            "position": position.numpy(),
            "token": [texts[place] for place in position.tolist()],
            "feature": feature.numpy(),
            "before": before[position, feature].numpy(),
            "after": after[position, feature].numpy(),
        }
    )
    size = (table["after"] - table["before"]).abs()
    return table.loc[size.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def dense_against_experts(model: Any, prompt: Any) -> "pd.DataFrame":
    """The dense MLP and the experts of each layer side by side, token by token (Gemma 4, where they stand in parallel).

    Args:
        model: a `scope.models.LanguageModel` whose layers have both.
        prompt: a text, chat messages or token ids.

    Returns:
        Columns layer, position, token, dense and experts (norms of what each adds, behind its own norm), cosine (of the
        two), dense_share (of the sum's norm, along the sum: 1 where it is the dense MLP's alone), experts_chosen
        (numbers, the likeliest first).

    Raises:
        InvalidInputError: the model has no layer with both.
    """
    import pandas as pd
    import torch

    layers = [index for index, sizes in enumerate(model.layout.sizes) if sizes.n_experts and sizes.dense]
    if not layers:
        raise InvalidInputError(f"{model.name} has no layer with experts beside a dense MLP; Gemma 4 26B-A4B has.")
    names = ("hook_dense_normed", "hook_normed", "hook_experts")
    tokens = model.prompt_tokens(prompt)
    seen = model.run(tokens, hooks=[f"blocks.{i}.moe.{name}" for i in layers for name in names], logits=False)
    texts = [token.display for token in model.token_strings(tokens)]
    parts = []
    for layer in layers:
        dense, experts, chosen = (seen.activations[f"blocks.{layer}.moe.{name}"].float().cpu() for name in names)
        total = dense + experts
        along = (dense * total).sum(-1) / total.square().sum(-1).clamp_min(1e-30)
        parts.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "position": range(len(texts)),
                    "token": texts,
                    "dense": dense.norm(dim=-1).numpy(),
                    "experts": experts.norm(dim=-1).numpy(),
                    "cosine": torch.cosine_similarity(dense, experts, dim=-1).numpy(),
                    "dense_share": along.numpy(),
                    "experts_chosen": [tuple(map(int, row)) for row in chosen.tolist()],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
