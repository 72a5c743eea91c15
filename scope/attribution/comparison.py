"""How good an attribution is: methods beside exact patching, and how much of a behaviour its top nodes keep.

`compare_methods` ranks nodes by every method and sets each beside activation patching, which is what they estimate.

`faithfulness` keeps the top n feature nodes of an attribution as they are and sets all other features to their baseline
("ablate the rest"; Marks et al. 2024, arXiv 2403.19647, section 4):

    faithfulness(n) = (T(top n kept) - T(none kept)) / (T(x) - T(none kept))

once with the error nodes as they are and once with them at their baseline too, beside random nodes of the same number.
With several SAEs, those of later layers act on what the earlier ones left.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scope.attribution.baselines import Baseline, zero
from scope.attribution.evaluate import check_targets, evaluate
from scope.attribution.methods import ERROR, METHODS, Attribution, attribute
from scope.attribution.sae_nodes import Prepared, SaeNodes, prepare
from scope.attribution.targets import Target
from scope.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare_methods", "faithfulness"]

EXACT = "activation_patching"
Progress = Callable[[int, int | None], None]


def compare_methods(
    model: Any,
    prompt: Any,
    target: Target,
    saes: Any,
    baseline: Baseline | None = None,
    methods: Sequence[str] = tuple(METHODS),
    *,
    steps: int = 10,
    top: int = 20,
    max_nodes: int | None = 500,
    seed: int = 0,
    progress: Progress | None = None,
) -> "pd.DataFrame":
    """Every method beside exact patching, on the same nodes, target and baseline.

    Args:
        model, prompt, target, saes, baseline, steps: as for `attribute`; one prompt and one target.
        methods: which to compare.
        top: how many of the strongest nodes `top_overlap` is about.
        max_nodes: nodes that are patched, at most: the strongest by integrated gradients, and as many at random.
        seed: of those.
        progress: told of patching, (runs done, runs in all).

    Returns:
        Columns method, pearson, spearman (with the exact effects), top_overlap (share of the exact top nodes among the
        method's), slope (of the method's on the exact effects, through the origin), completeness (mean over hooks; NaN
        where the method promises none), seconds, n (nodes). A method that cannot take the baseline is left out.
    """
    import pandas as pd

    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UnknownNameError("method", unknown[0], METHODS)
    baseline = baseline or zero()
    found: dict[str, Attribution] = {}
    first = attribute(model, prompt, target, saes, "integrated_gradients", baseline, steps=steps)
    nodes = [(row.hook, row.position, row.feature) for row in first.table.itertuples()]
    if max_nodes is not None and len(nodes) > max_nodes:
        rest = np.random.default_rng(seed).permutation(np.arange(max_nodes // 2, len(nodes)))
        nodes = nodes[: max_nodes // 2] + [nodes[i] for i in rest[: max_nodes - max_nodes // 2]]
    found[EXACT] = attribute(model, prompt, target, saes, EXACT, baseline, nodes=nodes, progress=progress)
    key = ["hook", "position", "feature"]
    exact = found[EXACT].table.set_index(key)["effect"]
    rows = []
    for name in dict.fromkeys((EXACT, *methods)):
        if name == "eap_ig" and baseline.kind == "mean":
            continue
        if name not in found:
            found[name] = attribute(model, prompt, target, saes, name, baseline, steps=steps)
        own = found[name].table.set_index(key)["effect"].reindex(exact.index, fill_value=0.0)
        n = min(top, len(exact))
        best = set(exact.abs().nlargest(n).index)
        complete = list(found[name].completeness.values())
        rows.append(
            {
                "method": name,
                "pearson": own.corr(exact),
                "spearman": own.rank().corr(exact.rank()),
                "top_overlap": len(best & set(own.abs().nlargest(n).index)) / max(n, 1),
                "slope": float((own * exact).sum() / (exact * exact).sum()),
                "completeness": float(np.mean(complete)) if complete else float("nan"),
                "seconds": found[name].seconds,
                "n": len(exact),
            }
        )
    return pd.DataFrame(rows)


def faithfulness(
    model: Any,
    prompt: Any,
    target: Target,
    saes: Any,
    attribution: Attribution,
    baseline: Baseline | None = None,
    sizes: Sequence[int] = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500),
    *,
    n_random: int = 5,
    batch_size: int = 32,
    seed: int = 0,
) -> "pd.DataFrame":
    """How much of a target the top feature nodes of an attribution keep when all other features are ablated.

    Args:
        model, prompt, target, saes, baseline: what the attribution was made with.
        attribution: whose order counts, by the effect (not its absolute value: what works against is left out last).
        sizes: numbers of feature nodes to keep; those beyond what there are are left out.
        n_random: random circuits of each size.
        batch_size: runs at once.
        seed: of the random circuits.

    Returns:
        Columns nodes ("attributed" or "random"), errors ("kept" or "ablated"), size, value (T), faithfulness; for
        random circuits the mean, with low and high, the least and the largest of them.

    Raises:
        InvalidInputError: a size is negative.
    """
    import pandas as pd

    if any(size < 0 for size in sizes):
        raise InvalidInputError(f"sizes are {list(sizes)}; expected 0 or more each.")
    baseline = baseline or zero()
    check_targets(model, model.prompt_tokens(prompt), [target])
    prepared = prepare(model, prompt, saes, baseline)
    order = attribution.table[attribution.table["feature"] != ERROR].sort_values(
        "effect", ascending=False, kind="stable"
    )
    columns = (order[name].tolist() for name in ("hook", "position", "feature"))
    nodes: list[tuple[str, int, int]] = list(zip(*columns, strict=True))
    kept_sizes = sorted({min(size, len(nodes)) for size in sizes})
    rng = np.random.default_rng(seed)
    circuits: list[tuple[str, int, list[tuple[str, int, int]]]] = []
    for size in kept_sizes:
        circuits.append(("attributed", size, nodes[:size]))
        circuits += [("random", size, [nodes[i] for i in rng.permutation(len(nodes))[:size]]) for _ in range(n_random)]
    whole = float(evaluate(model, prepared.tokens[None], [target]).values[0])
    rows = []
    for errors in ("kept", "ablated"):
        values: list[float] = []
        for start in range(0, len(circuits), batch_size):
            batch = [kept for _, _, kept in circuits[start : start + batch_size]]
            values += _with_only(model, prepared, target, batch, keep_errors=errors == "kept")
        none = (
            next(value for (name, size, _), value in zip(circuits, values, strict=True) if size == 0)
            if (0 in kept_sizes)
            else _with_only(model, prepared, target, [[]], keep_errors=errors == "kept")[0]
        )
        for kind in ("attributed", "random"):
            for size in kept_sizes:
                own = [v for (name, n, _), v in zip(circuits, values, strict=True) if (name, n) == (kind, size)]
                if not own:
                    continue
                rows.append({"nodes": kind, "errors": errors, "size": size, **shares_kept(own, none, whole)})
    return pd.DataFrame(rows)


def shares_kept(values: Sequence[float], none: float, whole: float) -> dict[str, float]:
    """The mean of a target over circuits of one size, and what share of `whole - none` they keep: the mean, low and
    high."""
    shares = [(value - none) / (whole - none) if whole != none else float("nan") for value in values]
    return {
        "value": float(np.mean(values)),
        "faithfulness": float(np.mean(shares)),
        "low": float(np.min(shares)),
        "high": float(np.max(shares)),
    }


@torch.no_grad()
def _with_only(
    model: Any, prepared: Prepared, target: Target, circuits: list[list[tuple[str, int, int]]], keep_errors: bool
) -> list[float]:
    """The target with all features but some at their baseline, for each circuit a run."""
    changes = {}
    for nodes in prepared.nodes:
        kept = [[(p, f) for hook, p, f in circuit if hook == nodes.writes] for circuit in circuits]
        changes[nodes.writes] = _ablation(nodes, kept, keep_errors)
    tokens = prepared.tokens.expand(len(circuits), -1)
    return evaluate(model, tokens, [target] * len(circuits), changes=changes).values.tolist()


def _ablation(nodes: SaeNodes, kept: list[list[tuple[int, int]]], keep_errors: bool) -> Callable[[Tensor], Tensor]:
    """What the SAE's activation becomes: baseline everywhere, but for kept features, and errors where they are kept.

    The values are those of the prompt itself: a kept node is as it was, whatever was ablated before it.
    """
    base = nodes.baseline.activation(nodes.sae)
    change, decoder = nodes.change, nodes.decoder
    runs = []
    for places in kept:
        new = base + change.errors if keep_errors else base.clone()
        if places:
            p, f = (torch.tensor(part, device=base.device) for part in zip(*places, strict=True))
            new = new.index_add(0, p, change.features[p, f, None] * decoder[f])
        runs.append(new)
    made = torch.stack(runs)
    return lambda value: made.to(value.dtype).view(value.shape)
