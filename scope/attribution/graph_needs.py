"""What the memory of a circuit graph is made of: each large tensor by its shape.

Some are there from the first edge to the last: what was recorded of the prompt, and the edges that are kept. Others
come and go one after the other, so that only the largest of them counts: reading the prompt, pulling a batch of targets
back through the model, following influence along all edges.

How many features fire is not known before the prompt has been read: k is taken for it, and the estimate is made again
with their number before anything is expanded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scope.attribution.freezing import PATTERN_BYTES
from scope.attribution.frozen_attention import QUERY_CHUNK
from scope.attribution.graph_settings import GraphSettings

if TYPE_CHECKING:
    from scope.attribution.dictionaries import MlpDictionaries

__all__ = ["POSITION_CHUNK", "ROOM", "GraphNeeds", "graph_needs"]

ROOM = 1.2
"""Multiple of what is counted that is asked for."""
UNKNOWN_L0 = 64
"""Features of a layer that are taken to fire on a token where the dictionary does not say."""
POSITION_CHUNK = 256
"""Positions whose decoder rows a graph gathers at once."""
EDITED = 3
"""Further gradients of each target at once in front of interventions."""


@dataclass(frozen=True)
class GraphNeeds:
    """What the memory of a graph depends on, beside its settings."""

    n_tokens: int
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_model: int
    d_encoded: int
    """Features that are encoded at once: the widest layer's, or all of a cross-layer transcoder."""
    l0: float
    """Features that fire on a token, over all layers."""
    itemsize: int
    """Bytes of a number of the model."""
    d_mlp: int
    n_gradients: int = 2
    """Gradients as wide as the residual stream that each target has at once on its way through a layer's attention: in
    front of it, and what comes through it; more where norms or shared values need them."""
    n_tables: int = 0
    """Layers with an embedding table of their own."""
    n_skips: int = 0
    """Layers whose transcoder has a linear part."""
    n_streams: int = 1
    """Residual streams (AltUp)."""

    def parts(self, settings: GraphSettings) -> dict[str, int]:
        """Bytes, by what they are for: the prompt, the edges, and the largest of what comes and goes."""
        b = min(settings.batch_size, settings.max_features + settings.max_logits)
        targets = min(settings.max_features, self._firing) + settings.max_logits
        edges = targets * min(settings.edges_per_target, self._sources)
        passing = {
            f"expanding {b} targets at once": self._expanding(b),
            "reading": self._reading(),
            "influence": 44 * edges,  # all edges in one list, their shares, and what each passes on
        }
        largest = max(passing, key=lambda name: passing[name])
        return {"the prompt": self._prompt(), "edges": 8 * edges, largest: passing[largest]}

    def total(self, settings: GraphSettings) -> int:
        """Bytes in all."""
        return int(ROOM * sum(self.parts(settings).values()))

    @property
    def _firing(self) -> int:
        return int(self.n_tokens * self.l0)

    @property
    def _sources(self) -> int:
        return self.n_tokens * (1 + self.n_layers + self.n_tables) + self._firing

    @property
    def _patterns(self) -> int:
        """All layers' attention patterns, where they are kept."""
        size = 4 * self.n_layers * self.n_heads * self.n_tokens**2
        return size if size <= PATTERN_BYTES else 0

    @property
    def _attending(self) -> int:
        """Scores and pattern of a layer's queries: of a chunk, or of all where patterns are kept."""
        queries = self.n_tokens if self._patterns else min(self.n_tokens, QUERY_CHUNK)
        return 2 * 4 * self.n_heads * queries * self.n_tokens

    def _prompt(self) -> int:
        """What is kept of the prompt as long as edges are made."""
        t, d, n, heads = self.n_tokens, self.d_model, self.n_layers, self.n_heads + self.n_key_value_heads
        kept = 4 * t * d * (4 * n + 2 + 2 * self.n_tables)  # MLPs: output, error, biases, input; embedding, result
        kept += n * t * (heads + self.n_key_value_heads) * self.d_head * self.itemsize  # queries, keys, perhaps values
        kept += 2 * t * t * self.itemsize  # masks
        kept += 4 * d * (n * heads * self.d_head + self.n_skips * d)  # W_V, W_O, W_skip
        kept += 8 * (self.n_streams - 1) * d * d  # what makes AltUp's streams of the embedding, and one of them all
        return kept + self._patterns + 80 * self._firing  # where each feature is, its value, its place in a piece

    def _reading(self) -> int:
        """What one layer takes while the prompt is read: the model's, or its dictionary."""
        t, d = self.n_tokens, self.d_model
        run = t * (3 * self.d_mlp + 6 * d) * self.itemsize + 2 * self._attending
        return max(run, self.d_encoded * (t * (8 + 2 * self.itemsize) + 4 * d) + 3 * 4 * t * d)

    def _expanding(self, b: int) -> int:
        """What a batch of targets takes: on the way through attention, or for its edges, or for keeping the largest."""
        t, d, width = self.n_tokens, self.d_model, self.n_heads * self.d_head
        stream, edges = 4 * b * t * d, 4 * b * self._sources
        at_values = 4 * b * t * self.n_key_value_heads * self.d_head
        chunk = self._attending + 4 * b * min(t, QUERY_CHUNK) * width
        through = (self.n_gradients - 1) * stream + 4 * b * t * width + at_values + max(chunk, stream + at_values)
        most = int(2 * self.l0 / self.n_layers + 1)  # features of a token in one layer
        found = min(t, POSITION_CHUNK) * most * (d * (4 + self.itemsize) + 12 * b)
        found += self.n_streams * stream + 2 * 4 * b * self._firing // self.n_layers
        return edges + max(through, found, stream + 2 * edges)


def graph_needs(
    model: Any, n_tokens: int, dictionaries: "MlpDictionaries", l0: float | None = None, edited: bool = False
) -> GraphNeeds:
    """What a graph of a prompt of so many tokens needs.

    Args:
        model: the model.
        n_tokens: tokens of the prompt, BOS included.
        dictionaries: its transcoders.
        l0: features that fire on a token, over all layers; None for what the dictionaries say of themselves.
        edited: whether interventions are in force.
    """
    layout = model.layout
    widths = [dictionaries.width(layer) for layer in dictionaries.layers]
    return GraphNeeds(
        n_tokens,
        layout.n_layers,
        layout.n_heads,
        max(sizes.n_key_value_heads for sizes in layout.sizes),
        max(sizes.d_head for sizes in layout.sizes),
        layout.d_model,
        max(widths) if dictionaries.clt is None else sum(widths),
        sum(map(_l0, dictionaries.dictionaries)) if l0 is None else l0,
        model.dtype.itemsize,
        max(sizes.d_mlp for sizes in layout.sizes),
        _n_gradients(layout) + (EDITED if edited else 0),
        layout.n_layers if layout.d_per_layer else 0,
        sum(dictionaries.skip(layer) is not None for layer in dictionaries.layers),
        layout.n_streams,
    )


def _n_gradients(layout: Any) -> int:
    """One more behind a norm of what attention writes; two for a norm that takes the mean out; and where values are
    shared those that wait for the layers whose values they are, one for each kind of attention, and a sum. A stack of
    streams is there three times while it is mixed, beside what goes through the layer."""
    shared = any("k" not in sizes.projections for sizes in layout.sizes)
    stack = 3 * layout.n_streams if layout.n_streams > 1 else 0
    return 2 + bool(layout.family.ln1_post) + 2 * layout.family.centred_norm + (3 if shared else 0) + stack


def _l0(sae: Any) -> float:
    """Features that a dictionary says fire on a token."""
    training = sae.cfg.metadata.training or {}
    said = getattr(sae.cfg, "k", None) or training.get("k")
    layers = len(sae.cfg.ports.inputs)
    return float(said) if said else float(UNKNOWN_L0 * layers)
