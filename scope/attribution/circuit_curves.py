"""`graph_faithfulness`: whether the features of a graph carry what it explains when nothing else does.

1. Nodes are all features that fire on the prompt, and an error node for each token and layer. The n features of the
   graph with the most influence are kept, all others are set to a baseline ("ablate the rest"; Marks et al. 2024, arXiv
   2403.19647, section 4).
2. The model runs with every MLP's output made of its nodes. What is kept is computed anew by the dictionaries from what
   the layers before have left, so that a circuit whose early features are missing does not have its late ones; with
   `recompute=False` it is held at what it was. A skip transcoder's linear part and per-layer embeddings (Gemma 4) run
   on in every circuit, also in the empty one. Attention and norms react.
3. With T the target and ∅ the run that keeps no feature,

       faithfulness(n) = (T(n) - T(∅)) / (T(x) - T(∅))

   once with every error node as it was and once with all of them at the baseline.
4. Beside it stand random circuits of as many of the features that fire, and the run that keeps all of them: with the
   errors kept that is the model itself (but for features that fire in the baseline alone), with the errors ablated it
   is the best that these dictionaries can do.

Of a graph under a standing intervention, the model is the model under it, in every run, that of a counterfactual prompt
too. Features of the dictionaries that it changes have their changed values where they are kept.

A layer without a dictionary is all error. What BOS makes of an MLP is error, and no zero or mean baseline changes it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.baselines import Baseline, zero
from scope.attribution.comparison import shares_kept
from scope.attribution.dictionaries import MlpDictionaries, MlpValues, mlp_dictionaries, mlp_values
from scope.attribution.evaluate import check_targets
from scope.attribution.graph_edits import GraphEdits, edited_handlers, edits_of
from scope.attribution.graph_fit import tokens_of
from scope.attribution.targets import Target, logit, logit_difference
from scope.errors import InvalidInputError, MismatchError
from scope.models.edits import EditContext
from scope.models.taps import Handler, tapped

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.graph import CircuitGraph
    from scope.interventions.resolving import SaesByName

__all__ = ["SIZES", "GraphFaithfulness", "default_target", "graph_faithfulness"]

SIZES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
ENTRIES = 2**26
"""Feature activations of one layer that are held at once."""
Circuit = list[tuple[int, int, int]]
"""Features that are kept: (layer, position, feature)."""
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class GraphFaithfulness:
    """How much of a target the features of a graph carry."""

    target: str
    value: float
    """T(x)."""
    baseline: str
    recomputed: bool
    """Whether kept features were computed anew."""
    n_features: int
    """Feature nodes of the graph."""
    table: "pd.DataFrame"
    """nodes ("graph", "random" or "all"), errors ("kept" or "ablated"), size, value (T), faithfulness; of random
    circuits the means, and low and high, the least and the largest faithfulness among the draws."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "target": self.target,
            "value": self.value,
            "baseline": self.baseline,
            "recomputed": self.recomputed,
            "features": self.n_features,
            "curve": self.table.to_dict("records"),
        }


def default_target(graph: "CircuitGraph") -> Target:
    """The logit of the likeliest token that a graph explains minus that of the next one, if it explains two."""
    logits = graph.nodes[graph.nodes["kind"] == "logit"].nlargest(2, "probability")
    ids = [int(token) for token in logits["feature"]]
    return logit_difference(*ids) if len(ids) > 1 else logit(ids[0])


@torch.no_grad()
def graph_faithfulness(
    graph: "CircuitGraph",
    model: Any,
    transcoders: Sequence[Any],
    target: Target | None = None,
    baseline: Baseline | None = None,
    sizes: Sequence[int] = SIZES,
    *,
    saes: "SaesByName" = None,
    n_random: int = 10,
    recompute: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> GraphFaithfulness:
    """Keep the features of a graph with the most influence, ablate the rest, and see what is left of a target.

    Args:
        graph: a graph, pruned or not.
        model: the model that it explains.
        transcoders: those that it was made with.
        target: by default `default_target(graph)`.
        baseline: what ablated nodes are set to; by default zero. Give `counterfactual(prompt)` where there is a
            behaviour: zero is far from anything that the model ever sees.
        sizes: how many features to keep; those beyond what the graph has are left out, and all of the graph's added.
        saes: those whose features the graph's interventions are on, as for `build_graph`.
        n_random: random circuits of each size.
        recompute: whether kept features are computed anew, or held at what they were.
        batch_size: runs at once.
        seed: of the random circuits.
        progress: called with (runs done, runs in all).

    Raises:
        InvalidInputError: the graph has no features, a size is negative, or `recompute` with a cross-layer transcoder
            whose features depend on all layers at once.
        MismatchError: the baseline does not fit, or the graph is of another model or other transcoders.
        OutOfRangeError: the target is not of this prompt.
    """
    import pandas as pd

    if any(size < 0 for size in sizes) or n_random < 0 or batch_size < 1:
        raise InvalidInputError(
            f"sizes are {list(sizes)}, n_random {n_random} and batch_size {batch_size}; expected 0 or more, and a "
            "batch of 1 or more."
        )
    features = graph.nodes[graph.nodes["kind"] == "feature"].sort_values("influence", ascending=False, kind="stable")
    if features.empty:
        raise InvalidInputError("The graph has no feature nodes; there is no circuit to keep. Prune less of it.")
    target, baseline = target or default_target(graph), baseline or zero()
    dictionaries = mlp_dictionaries(model, transcoders)
    tokens = tokens_of(graph, model, dictionaries)
    check_targets(model, tokens, [target])
    edits = edits_of(graph, model, dictionaries, saes)
    bench = _Bench(model, tokens, dictionaries, baseline, recompute, edits)
    ordered: Circuit = list(zip(*(features[name].tolist() for name in ("layer", "position", "feature")), strict=True))
    kept_sizes = sorted({0, *(size for size in sizes if size < len(ordered)), len(ordered)})
    firing = bench.firing()
    circuits: list[tuple[str, int, Circuit]] = [("all", len(firing), firing)]
    rng = np.random.default_rng(seed)
    for size in kept_sizes:
        circuits.append(("graph", size, ordered[:size]))
        if 0 < size < len(firing):
            draws = (rng.choice(len(firing), size, replace=False) for _ in range(n_random))
            circuits += [("random", size, [firing[i] for i in draw]) for draw in draws]
    whole = bench.plain(target)
    batch_size = max(1, min(batch_size, ENTRIES // bench.entries))
    tell = progress or (lambda done, total: None)
    rows = []
    for number, errors in enumerate(("kept", "ablated")):
        values: list[float] = []
        for start in range(0, len(circuits), batch_size):
            batch = [kept for _, _, kept in circuits[start : start + batch_size]]
            values += bench.with_only(batch, errors == "kept", target)
            tell(number * len(circuits) + len(values), 2 * len(circuits))
        none = next(value for (_, size, _), value in zip(circuits, values, strict=True) if size == 0)
        found: dict[tuple[str, int], list[float]] = {}
        for (kind, size, _), value in zip(circuits, values, strict=True):
            found.setdefault((kind, size), []).append(value)
        for (kind, size), own in sorted(found.items()):
            rows.append({"nodes": kind, "errors": errors, "size": size, **shares_kept(own, none, whole)})
    return GraphFaithfulness(target.name, whole, baseline.kind, recompute, len(ordered), pd.DataFrame(rows))


class _Bench:
    """Runs of a prompt whose MLPs' outputs are made of nodes."""

    def __init__(
        self,
        model: Any,
        tokens: Int[Tensor, " seq"],
        dictionaries: MlpDictionaries,
        baseline: Baseline,
        recompute: bool,
        edits: GraphEdits | None = None,
    ) -> None:
        if recompute and not dictionaries.separable:
            raise InvalidInputError(
                f"The features of this cross-layer transcoder ({dictionaries.clt.cfg.activation}) depend on all layers "
                "at once and cannot be computed anew layer by layer; use recompute=False (--held)."
            )
        self.model, self.tokens, self.dictionaries, self.recompute = model, tokens, dictionaries, recompute
        self.edits = edits
        self.layers = range(model.n_layers)
        self.has_bos = bool(model.bos_mask(tokens[None])[0, 0])
        self.actual = self._values(tokens)
        self.base = self._baseline(baseline)

    @property
    def entries(self) -> int:
        """Feature activations of one layer in one run."""
        return len(self.tokens) * max(self.dictionaries.width(layer) for layer in self.dictionaries.layers)

    def firing(self) -> Circuit:
        """All features that fire on the prompt."""
        return [
            (layer, position, feature)
            for layer, values in self.actual.features.items()
            for position, feature in values.nonzero().tolist()
        ]

    def plain(self, target: Target) -> float:
        """The target in the model as it is."""
        state = self._seen(self.tokens, [target.hook])[target.hook]
        return float(target.value(self.model, state.flatten(1), self.tokens))

    def _seen(self, tokens: Int[Tensor, " seq"], hooks: Sequence[str]) -> dict[str, Tensor]:
        """What is at some hooks; of an MLP's output what interventions on its features, and no others, have made of
        it."""
        model = self.model
        seen: dict[str, Tensor] = {}

        def keep(hook: str) -> Handler:
            def at(value: Tensor) -> None:
                seen[hook] = value[0].clone()

            return at

        outputs = {hook for hook in hooks if hook.endswith("hook_mlp_out")}
        before, after = ({hook: keep(hook) for hook in some} for some in (outputs, set(hooks) - outputs))
        taps = edited_handlers(model, self.edits, tokens[None], before, after)
        with model.lock, self._attention(tokens), tapped(model.hf, taps, stop=False):
            model.hidden_states(tokens[None])
        return seen

    def _attention(self, tokens: Int[Tensor, " seq"]) -> AbstractContextManager[None]:
        return nullcontext() if self.edits is None else self.edits.attention(self.model, tokens)

    def _values(self, tokens: Int[Tensor, " seq"]) -> MlpValues:
        """The nodes of a prompt, those that interventions change as they make them."""
        d = self.dictionaries
        if self.edits is None:
            return mlp_values(self.model, d, tokens)
        hooks = [f"blocks.{layer}.ln2.hook_out" for layer in d.layers]
        seen = self._seen(tokens, [*hooks, *(f"blocks.{layer}.hook_mlp_out" for layer in self.layers)])
        values = mlp_values(self.model, d, tokens, seen)
        features, errors = dict(values.features), dict(values.errors)
        context = EditContext("", tokens[None], self.model.bos_mask(tokens[None]))
        for layer in (layer for layer in features if self.edits.own(layer)):
            changed = self.edits.changed(layer, features[layer][None], context)[0]
            if self.has_bos:
                changed[0] = 0.0
            errors[layer] = errors[layer] - d.decode(layer, changed - features[layer], layer)
            features[layer] = changed
        return MlpValues(features, errors)

    def with_only(self, circuits: Sequence[Circuit], keep_errors: bool, target: Target) -> list[float]:
        """The target with all features but some at their baseline, each circuit in a run of its own."""
        model, d, table = self.model, self.dictionaries, self.model.hook_table
        features: dict[int, Tensor] = {}
        reads: dict[int, Tensor] = {}
        seen: dict[str, Tensor] = {}
        errors = (self.actual if keep_errors else self.base).errors

        def read(layer: int) -> Handler:
            places = [(run, p, f) for run, kept in enumerate(circuits) for at, p, f in kept if at == layer]

            def at(value: Tensor) -> None:
                x = value.float()
                made = self.base.features[layer].expand(len(circuits), -1, -1).clone()
                if places:
                    run, p, f = torch.tensor(places, device=x.device).T
                    live = self._live(layer, x)[run, p, f] if self.recompute else self.actual.features[layer][p, f]
                    made[run, p, f] = live
                features[layer] = made
                if d.skip(layer) is not None:
                    reads[layer] = x

            return at

        def write(layer: int) -> Handler:
            def at(value: Tensor) -> Tensor:
                made = errors[layer].expand(len(circuits), -1, -1)
                for source in d.writers_of(layer):
                    made = made + d.decode(source, features[source], layer)
                if layer in d.layers:
                    made = made + d.b_dec(layer).to(made.device)
                skip = d.skip(layer) if layer in d.layers else None
                if skip is not None:
                    made = made + reads.pop(layer) @ skip.to(made.device).T
                if d.clt is None:  # nobody else reads them
                    features.pop(layer, None)
                return made.to(value.dtype)

            return at

        def keep(value: Tensor) -> None:
            seen["target"] = value

        handlers = {f"blocks.{layer}.ln2.hook_out": read(layer) for layer in d.layers}
        handlers |= {f"blocks.{layer}.hook_mlp_out": write(layer) for layer in self.layers}
        name = table[target.hook].name
        if name in handlers:
            raise InvalidInputError(f"A target at {name} is what the circuit writes or reads; take a later hook.")
        tokens = self.tokens.expand(len(circuits), -1)
        taps = edited_handlers(model, self.edits, tokens, handlers, {name: keep}, own=False)
        with model.lock, self._attention(self.tokens), tapped(model.hf, taps, stop=False):
            model.hidden_states(tokens)
        states = seen["target"].flatten(2)
        return [float(target.value(model, state, self.tokens)) for state in states]

    def _live(self, layer: int, x: Float[Tensor, "runs seq d_model"]) -> Float[Tensor, "runs seq d_sae"]:
        """Features of a layer computed anew, with what interventions do to them."""
        features = self.dictionaries.encode_layer(layer, x)
        if self.edits is None:
            return features
        tokens = self.tokens.expand(len(x), -1)
        return self.edits.changed(layer, features, EditContext("", tokens, self.model.bos_mask(tokens)))

    def _baseline(self, baseline: Baseline) -> MlpValues:
        if baseline.kind == "counterfactual":
            return self._values(baseline.tokens(self.model, self.tokens))
        if baseline.kind == "zero":
            features = {layer: torch.zeros_like(values) for layer, values in self.actual.features.items()}
            errors = {layer: torch.zeros_like(values) for layer, values in self.actual.errors.items()}
        else:
            features, errors = self._means(baseline)
        if self.has_bos:
            for layer in self.layers:
                errors[layer][0] = self.actual.errors[layer][0]
                if layer in features:
                    features[layer][0] = 0.0
        return MlpValues(features, errors)

    def _means(self, baseline: Baseline) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        d = self.dictionaries
        features, errors = {}, {}
        for layer in self.layers:
            found = baseline.means.get(f"blocks.{layer}.ln2.hook_out")
            width = d.width(layer) if layer in d.layers else 0
            has_linear_part = bool(width) and d.skip(layer) is not None
            if has_linear_part or (found is None and not width):
                raise InvalidInputError(
                    "A mean baseline of a graph needs a transcoder without a linear part for every layer, or a "
                    "cross-layer transcoder; use zero() or counterfactual(prompt)."
                )
            if found is None or found.features.shape[1] != width:
                raise MismatchError(
                    f"The mean baseline is not of this transcoder of layer {layer}: make it with "
                    "mean(model, transcoders, texts)."
                )
            errors[layer] = found.errors.to(self.tokens.device).expand_as(self.actual.errors[layer]).clone()
            if width:
                features[layer] = found.features.to(self.tokens.device).expand_as(self.actual.features[layer]).clone()
        return features, errors
