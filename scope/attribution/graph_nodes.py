"""The nodes of a graph that are there whatever else is: embeddings, errors, tables, what interventions put there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from scope.attribution.reading import Prompt

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["given_nodes"]


def given_nodes(read: Prompt, texts: Sequence[str]) -> "pd.DataFrame":
    """Columns kind, layer, position, feature, activation and label as of `CircuitGraph.nodes`, in the order of the
    prompt's sources, of which these are the first `n_fixed`; `texts` are its tokens as they read."""
    import pandas as pd

    layers, places = read.frozen.layers, range(len(texts))
    rows = [("embedding", -1, place, -1, texts[place]) for place in places]
    rows += [("error", layer, place, -1, texts[place]) for layer in range(len(layers)) for place in places]
    tables = [(layer, one.per_layer.table) for layer, one in enumerate(layers) if one.per_layer is not None]
    rows += [("table", layer, place, -1, texts[place]) for layer, _ in tables for place in places]
    rows += [
        ("intervention", edit.layer, place, edit.number, edit.words)
        for edit, _, positions in read.constants
        for place in positions.tolist()
    ]
    written = [read.frozen.embedding, *(read.errors[layer] for layer in range(len(layers)))]
    norms = [part.norm(dim=-1) for part in (*written, *(table for _, table in tables))]
    norms += [edit.constant[positions].norm(dim=-1) for edit, _, positions in read.constants]
    nodes = pd.DataFrame(rows, columns=["kind", "layer", "position", "feature", "label"])
    nodes.insert(4, "activation", torch.cat(norms).tolist())
    return nodes
