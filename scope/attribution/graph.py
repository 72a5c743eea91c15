"""`build_graph`: the circuit behind a prompt's next token, as a graph of exact linear effects.

In the local replacement model (Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language
Models", section 3) every MLP is a transcoder plus an error node, attention patterns and norm denominators are fixed. A
node's value is then a sum over everything written before it:

    pre-activation of feature t = Σ_s a_s (d_s . g_ts) + errors + embeddings + biases
    edge s -> t                 = a_s d_s . g_ts

with a_s the activation of feature s, d_s its decoder row, and g_ts the encoder column of t pulled back through the
frozen model to what the layer of s writes at the position of s (`scope.attribution.frozen`). A feature of a cross-layer
transcoder writes several layers; its edge is the sum over those before t. Doubling s changes t by the edge's weight. A
logit node is a token's logit relative to the mean over the vocabulary.

1. The prompt is read once (`scope.attribution.reading`): all firing features, errors, embeddings, the likeliest next
   tokens.
2. Logits are expanded first, that is, all their edges are computed. Then, in rounds, the features with the most
   influence on the logits through what is known so far, until there are `max_features` of them.
3. Edges are kept by target, the largest first, `edges_per_target` of them: there is never a dense matrix.

On a GPU the edges of a model in half precision are as exact as TF32's 10 bits, those of a float32 model as float32.

What BOS makes of the MLP is an error node: no dictionary is trained on it.

Where layers have embedding tables of their own (Gemma 3n; Gemma 4 E2B, E4B), what a layer's table wrote for a token is
a source too, a "table" node of that layer and position; what the projection of the main embedding wrote there is
counted to the "embedding" node of the token. The gate between the two and the residual stream is held fixed, as
attention is.

Under a standing intervention (`spec`) all of this is of the model as edited. What the intervention lets through is part
of the linear map; what it puts there, at each token, is an "intervention" node with edges of its own; features of the
transcoders that it sets have the value that they are set to, and no edges into them. See
`scope.attribution.graph_edits` and `scope.attribution.linear_edits`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.dictionaries import mlp_dictionaries
from scope.attribution.firing_effects import effects, pieces_of
from scope.attribution.frozen import tensor_cores
from scope.attribution.graph_edits import graph_edits
from scope.attribution.graph_needs import graph_needs
from scope.attribution.graph_nodes import given_nodes
from scope.attribution.graph_settings import GraphSettings
from scope.attribution.influence import influences
from scope.attribution.memory import require_graph_fits
from scope.attribution.reading import Prompt, read
from scope.attribution.targets import single_token

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from scope.interventions.resolving import Maxima, SaesByName
    from scope.interventions.spec import InterventionSpec

__all__ = ["CircuitGraph", "build_graph"]

KINDS = ("embedding", "error", "table", "intervention", "feature", "logit")
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, eq=False)
class CircuitGraph:
    """A circuit: nodes, and the effects between them."""

    prompt: str
    tokens: tuple[str, ...]
    """The prompt's tokens as they read."""
    token_ids: tuple[int, ...]
    nodes: "pd.DataFrame"
    """node, kind ("embedding", "error", "table", "intervention", "feature", "logit"), layer (-1 for embeddings,
    n_layers for logits; of an intervention the last one whose MLP is in front of it), position, feature (the feature's
    id, a logit's token id, an intervention's place in `spec`, else -1), activation (a feature's, in its transcoder's
    units; a logit's centred value; the norm of an error, an embedding or what a table wrote or an intervention put
    there), label (an intervention's in words, else the token), probability (of logits), influence (share of the logits
    that goes through the node), total_in (Σ |edge| of all incoming edges, kept or not; 0 of a feature that an
    intervention holds), bias (what biases add to the node), value (what it was: pre-activation without b_enc, or
    centred logit)."""
    source: "np.ndarray"
    """int32 `(n_edges,)`: node that an edge comes from."""
    target: "np.ndarray"
    """int32 `(n_edges,)`: node that it goes to."""
    weight: "np.ndarray"
    """float32 `(n_edges,)`: what the target would lose without the source."""
    n_layers: int
    n_active: int
    """Features that fire on the prompt, in all."""
    model_name: str
    transcoders: tuple[str, ...] = ()
    """Where the transcoders lie, as far as whoever made the graph said so."""
    spec: "InterventionSpec | None" = None
    """The interventions that are in force in the model that it explains; values of features as firing strengths."""

    def edges(self) -> "pd.DataFrame":
        """Columns source, target, weight: by target, the largest first."""
        import pandas as pd

        return pd.DataFrame({"source": self.source, "target": self.target, "weight": self.weight})

    @property
    def logit_weights(self) -> "np.ndarray":
        """float64 `(n_nodes,)`: each logit node's probability as a share of all of theirs; 0 for other nodes."""
        weights = self.nodes["probability"].fillna(0.0).to_numpy(dtype="float64")
        return weights / weights.sum()

    def __repr__(self) -> str:
        counts = self.nodes["kind"].value_counts()
        words = ", ".join(f"{counts.get(kind, 0):,} {kind}" for kind in KINDS)
        under = "" if self.spec is None else f", under {len(self.spec.interventions)} interventions"
        return f"CircuitGraph({self.prompt[:40]!r}: {words} nodes, {len(self.weight):,} edges{under})"


def build_graph(
    model: Any,
    prompt: Any,
    transcoders: Sequence[Any],
    settings: GraphSettings | None = None,
    *,
    targets: Sequence[int | str] = (),
    spec: "InterventionSpec | None" = None,
    saes: "SaesByName" = None,
    maxima: "Maxima" = None,
    progress: Progress | None = None,
) -> CircuitGraph:
    """Explain a prompt's next token.

    Args:
        model: a `scope.models.LanguageModel`.
        prompt: a text, chat messages or token ids.
        transcoders: from `ln2.hook_out` to `hook_mlp_out` of a layer, each; or one cross-layer transcoder between these
            hooks of several layers. A layer without one has an error node only.
        settings: see `GraphSettings`.
        targets: next tokens to explain; by default the likeliest.
        spec: interventions that are in force in the model that is explained.
        saes: the SAEs whose features those are on, as for `spec.resolve`.
        maxima: as for `spec.resolve`.
        progress: called with (what is done, how much, of how much).

    Raises:
        InvalidInputError: there is no transcoder, two are of one layer, or one reads or writes elsewhere; or the graph
            takes more memory than `settings.memory_gb`, or than is free; or an intervention has no exact place in a
            graph (experts, queries and keys, what is inside of an MLP).
        MismatchError: a transcoder has another width than the model, or `spec` is for another model.
        UnknownNameError, OutOfRangeError: an intervention is on what does not exist.
    """
    settings = settings or GraphSettings()
    tell = progress or (lambda step, done, total: None)
    tokens = model.prompt_tokens(prompt)
    dictionaries = mlp_dictionaries(model, transcoders)
    wanted = [single_token(model, token) for token in targets]
    needs = partial(graph_needs, model, len(tokens), dictionaries, edited=spec is not None)
    require_graph_fits(needs(), settings, model.device)
    edits = None if spec is None else graph_edits(spec, model, dictionaries, tokens, saes, maxima)
    tell("reading the prompt", 0, None)
    with torch.no_grad():
        found = read(model, tokens, dictionaries, settings, wanted, edits)
        l0 = (found.n_sources - found.n_fixed) / len(tokens)
        require_graph_fits(needs(l0=l0), settings, model.device)
        work = _Expansion(found, settings)
        with tensor_cores(model):
            work.run(tell)
        graph = work.graph(prompt if isinstance(prompt, str) else "")
    return graph if edits is None else replace(graph, spec=edits.spec)


class _Expansion:
    """Edges of one prompt's nodes, a batch of targets at a time."""

    def __init__(self, read: Prompt, settings: GraphSettings) -> None:
        self.read, self.settings = read, settings
        self.targets: list[int] = []
        """What has been expanded, in order: logits as n_sources + number, features as their source."""
        self.rows: list[tuple[Tensor, Tensor]] = []
        """Per target (sources, weights)."""
        self.totals: list[float] = []
        self.biases: list[float] = []
        self.values: list[float] = []
        layers, places, ids, values = [], [], [], []
        for layer, firing in read.firing.items():
            layers.append(torch.full_like(firing.feature, layer))
            places.append(firing.position)
            ids.append(firing.feature)
            values.append(firing.activation)
        self.layer, self.position, self.feature = (torch.cat(part) for part in (layers, places, ids))
        self.activation = torch.cat(values)
        self.biased = {layer for layer, bias in enumerate(read.attention_biases) if bool(bias.any())}
        """Layers whose attention, or the norm before it, has biases."""
        self.pieces = {layer: pieces_of(firing, read.frozen.n_tokens) for layer, firing in read.firing.items()}
        self.constants = {one.edit: one for one in read.constants}

    def run(self, tell: Progress) -> None:
        read, settings = self.read, self.settings
        n_logits, n_features = len(read.logit_ids), len(self.feature)
        budget = min(settings.max_features, n_features)
        last = read.frozen.n_tokens - 1
        directions = read.frozen.model.W_U[read.logit_ids].float() - read.mean_unembedding
        places = torch.full((n_logits,), last, device=directions.device)
        gradients = read.frozen.at_logits(directions, places)
        layers = torch.full_like(places, len(read.frozen.layers))
        values, biases = read.logit_values.tolist(), self._logit_biases(directions)
        for start in range(0, n_logits, settings.batch_size):
            part = slice(start, start + settings.batch_size)
            numbers = [read.n_sources + number for number in range(n_logits)[part]]
            self._expand(numbers, layers[part], places[part], gradients[part], values[part], biases[part])
        done = torch.zeros(n_features, dtype=torch.bool, device=places.device)
        while int(done.sum()) < budget:
            tell("expanding features", int(done.sum()), budget)
            influence = self.influence()[read.n_fixed : read.n_sources].masked_fill(done, -1.0)
            left = budget - int(done.sum())
            n = min(left, max(settings.batch_size, budget // 8))
            chosen = influence.topk(n).indices.sort().values
            done[chosen] = True
            for batch in self._batches(chosen):
                self._expand_features(batch)
        tell("expanding features", budget, budget)

    def _batches(self, chosen: Int[Tensor, " n"]) -> list[Tensor]:
        """Features, which come by layer, in batches of neighbours in layer and position: a batch is pulled back from
        its last layer, and as far as its last position."""
        size = self.settings.batch_size
        n_batches = -(-len(chosen) // size)
        blocks = chosen.split(size * -(-n_batches // max(1, round(n_batches**0.5))))
        return [part for block in blocks for part in block[self.position[block].argsort(stable=True)].split(size)]

    def _logit_biases(self, directions: Tensor) -> list[float]:
        norm, head = self.read.frozen.final_norm, self.read.frozen.model
        own = torch.zeros(len(directions), device=directions.device)
        if norm.bias is not None:
            own = own + directions @ norm.bias
        bias = getattr(head.hf.get_submodule(head.layout.head), "bias", None)
        if bias is not None:
            own = own + bias[self.read.logit_ids].float() - bias.float().mean()
        return own.tolist()

    def _expand_features(self, chosen: Int[Tensor, " n"]) -> None:
        read = self.read
        layers, places, ids = self.layer[chosen], self.position[chosen], self.feature[chosen]
        columns = torch.empty(len(chosen), read.frozen.embedding.shape[1], device=places.device)
        offsets = torch.zeros(len(chosen), device=places.device)
        for layer in layers.unique().tolist():
            here = layers == layer
            columns[here] = read.dictionaries.encoder(layer, ids[here]).to(places.device)
            norm_bias = read.frozen.layers[layer].ln2.bias
            if norm_bias is not None:
                offsets[here] = columns[here] @ norm_bias
            taken = read.dictionaries.b_dec_read(layer)
            if taken is not None:
                offsets[here] -= columns[here] @ taken.to(places.device)
        gradients = torch.empty_like(columns)
        for layer in layers.unique().tolist():
            here = layers == layer
            gradients[here] = read.frozen.at_mlp_input(layer, columns[here], places[here])
        factors = self._factors(chosen)
        gradients *= factors[:, None]
        values = self._pre_activations(chosen, factors)
        # Nothing comes into what is held: all of its value is given.
        biases = torch.where(factors == 0, values, factors * offsets)
        self._expand((read.n_fixed + chosen).tolist(), layers, places, gradients, values.tolist(), biases.tolist())

    def _factors(self, chosen: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """How far the value of each feature follows what it reads: 1 where no intervention changes it."""
        found = torch.ones(len(chosen), device=chosen.device)
        for layer, factors in self.read.factors.items():
            here = self.layer[chosen] == layer
            found[here] = factors[chosen[here] + self.read.n_fixed - self.read.first_feature[layer]]
        return found

    def _pre_activations(self, chosen: Int[Tensor, " n"], factors: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """What each feature's value is without its own bias: activation minus b_enc, for what fires."""
        values = self.activation[chosen].clone()
        for layer in self.layer[chosen].unique().tolist():
            here = self.layer[chosen] == layer
            bias = self.read.dictionaries.b_enc(layer, self.feature[chosen][here]).to(values.device)
            values[here] -= factors[here] * bias
        return values

    def _expand(
        self,
        numbers: list[int],
        layers: Tensor,
        places: Tensor,
        gradients: Tensor,
        values: list[float],
        own_biases: list[float],
    ) -> None:
        """Compute all incoming edges of some targets, and keep the largest."""
        read = self.read
        n, seq = len(numbers), read.frozen.n_tokens
        weights = torch.zeros(n, read.n_sources, device=gradients.device)
        bias = torch.tensor(own_biases, device=gradients.device)
        rows = int(places.max()) + 1
        for layer, where, gradient, edit in read.frozen.pull_back(layers, places, gradients):
            if edit is not None:
                one = self.constants[edit]
                there = one.positions[one.positions < rows]
                found = _dots(gradient[:, there], edit.constant[there])
                weights[:, one.first : one.first + len(there)] = found
            elif where == "embedding":
                weights[:, :rows] += _dots(gradient, read.frozen.embedding[:rows])
            elif where == "ple_out":
                written, first = read.frozen.layers[layer].per_layer, read.first_table(layer)
                assert written is not None
                weights[:, first : first + rows] = _dots(gradient, written.table[:rows])
                weights[:, :rows] += _dots(gradient, written.projection[:rows])
            elif where == "attn_out":
                if layer in self.biased:
                    bias += _dots(gradient, read.attention_biases[layer][:rows]).sum(-1)
            else:
                weights[:, seq * (1 + layer) : seq * (1 + layer) + rows] = _dots(gradient, read.errors[layer][:rows])
                if layer in read.mlp_biases:
                    bias += gradient.sum(1) @ read.mlp_biases[layer]
                for source in read.dictionaries.writers_of(layer):
                    first, firing = read.first_feature[source], read.firing[source]
                    decoder = partial(read.dictionaries.decoder, source, written=layer)
                    part = slice(first, first + len(firing.feature))
                    weights[:, part] += effects(self.pieces[source], firing, gradient, decoder)
        self._keep(numbers, weights, values, bias.tolist())

    def _keep(self, numbers: list[int], weights: Tensor, values: list[float], biases: list[float]) -> None:
        magnitude = weights.abs()
        totals = magnitude.sum(-1).tolist()
        k = min(self.settings.edges_per_target, weights.shape[1])
        order = magnitude.topk(k, dim=-1).indices
        for row, number in enumerate(numbers):
            sources = order[row]
            kept = weights[row, sources]
            nonzero = kept != 0
            self.targets.append(number)
            self.rows.append((sources[nonzero].to(torch.int32), kept[nonzero]))
            self.totals.append(totals[row])
            self.values.append(values[row])
            self.biases.append(biases[row])

    def coo(self) -> tuple[Tensor, Tensor, Tensor]:
        """(targets, sources, weights) of all edges so far, logits numbered behind the sources."""
        device = self.activation.device
        counts = torch.tensor([len(sources) for sources, _ in self.rows], device=device)
        return (
            torch.tensor(self.targets, device=device).repeat_interleave(counts),
            torch.cat([sources for sources, _ in self.rows]),
            torch.cat([weights for _, weights in self.rows]),
        )

    def influence(self) -> Float[Tensor, " n"]:
        """Of every source on the logits, through what is expanded."""
        targets, sources, weights = self.coo()
        n = self.read.n_sources + len(self.read.logit_ids)
        totals = torch.ones(n, device=weights.device)
        own = torch.tensor(self.totals, device=weights.device).clamp_min(1e-30)
        totals[torch.tensor(self.targets, device=weights.device)] = own
        start = torch.zeros(n, device=weights.device)
        start[self.read.n_sources :] = self.read.logit_probabilities / self.read.logit_probabilities.sum()
        return influences(targets, sources, weights.abs() / totals[targets], start, len(self.read.frozen.layers) + 1)

    def graph(self, prompt: str) -> CircuitGraph:
        """Nodes and edges with numbers of their own: embeddings, errors, expanded features, logits."""
        import pandas as pd

        read, model = self.read, self.read.frozen.model
        seq, n_layers = read.frozen.n_tokens, len(read.frozen.layers)
        expanded = sorted(number for number in self.targets if number < read.n_sources)
        logits = [read.n_sources + number for number in range(len(read.logit_ids))]
        kept = torch.tensor([*range(read.n_fixed), *expanded, *logits])
        new = torch.full((read.n_sources + len(logits),), -1)
        new[kept] = torch.arange(len(kept))
        targets, sources, weights = (part.cpu() for part in self.coo())
        there = new[sources] >= 0
        influence = self.influence().cpu()[kept]
        place = {number: row for row, number in enumerate(self.targets)}
        texts = [token.text for token in model.token_strings(read.frozen.tokens)]
        chosen = torch.tensor([number - read.n_fixed for number in expanded], dtype=torch.int64)
        picked = chosen.to(self.layer.device)
        positions = self.position[picked].tolist()
        found = pd.DataFrame(
            {
                "kind": ["feature"] * len(expanded) + ["logit"] * len(logits),
                "layer": self.layer[picked].tolist() + [n_layers] * len(logits),
                "position": positions + [seq - 1] * len(logits),
                "feature": self.feature[picked].tolist() + read.logit_ids.tolist(),
                "activation": self.activation[picked].tolist() + read.logit_values.tolist(),
                "label": [texts[place] for place in positions] + model.vocabulary_strings(read.logit_ids.tolist()),
            }
        )
        nodes = pd.concat([given_nodes(read, texts), found], ignore_index=True)
        nodes.insert(0, "node", range(len(kept)))
        nodes["probability"] = [None] * (read.n_fixed + len(expanded)) + read.logit_probabilities.tolist()
        nodes["influence"] = influence.tolist()
        for name, column in (("total_in", self.totals), ("bias", self.biases), ("value", self.values)):
            own = [column[place[number]] for number in [*expanded, *logits]]
            nodes[name] = [float("nan")] * read.n_fixed + own
        return CircuitGraph(
            prompt,
            tuple(texts),
            tuple(read.frozen.tokens.tolist()),
            nodes,
            new[sources[there]].to(torch.int32).numpy(),
            new[targets[there]].to(torch.int32).numpy(),
            weights[there].numpy(),
            n_layers,
            len(self.feature),
            model.name,
        )


def _dots(gradient: Float[Tensor, "n rows d_model"], written: Float[Tensor, "rows d_model"]) -> Float[Tensor, "n rows"]:
    """Each target's gradient times what was written, position by position, without a tensor of their products."""
    return torch.bmm(gradient.transpose(0, 1), written[:, :, None])[:, :, 0].T
