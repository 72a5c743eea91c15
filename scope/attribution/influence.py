"""Influence of nodes on the logits: what pruning and the order of expansion go by.

Edges into a node are made shares of all that comes in, by absolute value; the influence of a node is the sum over all
paths from it to the logits of the product of their shares, each logit weighed by its probability (Ameisen et al. 2025,
"Circuit Tracing", section 3.2 and appendix "Pruning"):

    influence = w Ā + w Ā² + w Ā³ + …        Ā[t, s] = |edge s -> t| / Σ |edges into t|

The graph has no cycle, and an edge goes from a layer to a later one, so that the sum ends after as many terms as there
are layers.
"""

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["influences"]


def influences(
    targets: Int[Tensor, " edges"],
    sources: Int[Tensor, " edges"],
    shares: Float[Tensor, " edges"],
    weights: Float[Tensor, " nodes"],
    depth: int,
) -> Float[Tensor, " nodes"]:
    """The influence of each node on the logits.

    Args:
        targets: node that an edge goes to.
        sources: node that it comes from.
        shares: its share of what comes into the target.
        weights: of the logits; 0 for other nodes.
        depth: the longest path, in edges.
    """
    total = weights.new_zeros(len(weights))
    now = weights
    for _ in range(depth):
        now = weights.new_zeros(len(weights)).index_add_(0, sources, now[targets] * shares)
        if not bool(now.any()):
            break
        total += now
    return total
