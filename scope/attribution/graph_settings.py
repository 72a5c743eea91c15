"""What a circuit graph is built with; the command line reads it, and must not load torch for that."""

from dataclasses import dataclass

from scope.errors import InvalidInputError

__all__ = ["GraphSettings"]


@dataclass(frozen=True)
class GraphSettings:
    """What a graph is built with."""

    max_features: int = 4096
    """Feature nodes that are expanded, at most; those with the most influence on the logits."""
    max_logits: int = 10
    """Next tokens to explain, at most."""
    logit_share: float = 0.95
    """The likeliest next tokens are explained until they have this share of the probability."""
    edges_per_target: int = 4096
    """Edges kept of each node's incoming ones, the largest first."""
    batch_size: int = 64
    """Targets expanded at once."""
    memory_gb: float | None = None
    """Memory that the graph may take beside the model and the transcoders, in GB (10⁹ bytes). None: what is free."""

    def __post_init__(self) -> None:
        for name in ("max_logits", "edges_per_target", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise InvalidInputError(f"memory_gb is {self.memory_gb}; expected more than 0.")
        if self.max_features < 0 or not 0 < self.logit_share <= 1:
            raise InvalidInputError(
                f"max_features is {self.max_features} and logit_share {self.logit_share}; expected 0 or more, and a "
                "share above 0 and at most 1."
            )
