"""Circuit graphs made up for tests: as large and as awkward as the page has to bear, without a model."""

import numpy as np
import pandas as pd

from scope.attribution.graph import CircuitGraph

__all__ = ["TOKENS", "made_graph"]

TOKENS = ("<bos>", "The", " opposite", " of", " hot", " is", "\n", " قلب", " 東京", " <b>x</b>")


def made_graph(n_features: int = 420, n_layers: int = 12, seed: int = 0) -> CircuitGraph:
    """A graph of `n_features` features, an error and an embedding for every token, three logits, and edges from lower
    layers to higher ones; tokens are awkward to write."""
    rng = np.random.default_rng(seed)
    n_tokens, last = len(TOKENS), len(TOKENS) - 1
    rows = [("embedding", -1, position, -1, 5.0, TOKENS[position], None) for position in range(n_tokens)]
    rows += [("error", layer, last, -1, 3.0, TOKENS[last], None) for layer in range(n_layers)]
    taken: set[tuple[int, int, int]] = set()
    while len(taken) < n_features:
        layer, position = int(rng.integers(n_layers)), int(min(last, rng.geometric(0.25) - 1))
        taken.add((layer, last - position, int(rng.integers(512))))
    rows += [
        ("feature", layer, position, feature, float(rng.gamma(2.0)), TOKENS[position], None)
        for layer, position, feature in sorted(taken)
    ]
    logits = ((" cold", 0.6), (" <i>not</i>", 0.2), (" warm", 0.1))
    rows += [("logit", n_layers, last, 100 + number, 9.0, text, share) for number, (text, share) in enumerate(logits)]
    names = ["kind", "layer", "position", "feature", "activation", "label", "probability"]
    nodes = pd.DataFrame(rows, columns=names)
    nodes.insert(0, "node", range(len(nodes)))
    nodes["influence"] = rng.dirichlet(np.ones(len(nodes))) * 3
    for name in ("total_in", "bias", "value"):
        nodes[name] = 1.0
    layer, position, kind = (nodes[name].to_numpy() for name in ("layer", "position", "kind"))
    source, target = np.meshgrid(np.arange(len(nodes)), np.arange(len(nodes)), indexing="ij")
    possible = (layer[source] < layer[target]) & (position[source] <= position[target])
    possible &= np.isin(kind[target], ["feature", "logit"])
    fed = (kind[source] == "embedding") & (position[source] == position[target])
    chosen = possible & ((rng.random(possible.shape) < 0.06) | (kind[target] == "logit") | fed)
    ends = np.argwhere(chosen)
    return CircuitGraph(
        "The opposite of hot is",
        TOKENS,
        tuple(range(2, 2 + n_tokens)),
        nodes,
        ends[:, 0].astype(np.int32),
        ends[:, 1].astype(np.int32),
        rng.normal(size=len(ends)).astype(np.float32) * rng.gamma(1.0, size=len(ends)).astype(np.float32),
        n_layers,
        5000,
        "made-up",
    )
