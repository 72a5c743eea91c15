"""The nodes that `scope.attribution.methods` attributes to: the features and the error of some SAEs at each token of a
prompt, with the values that they are set against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.baselines import Baseline, NodeValues, hooks_of, node_values
from scope.errors import InvalidInputError

__all__ = ["Prepared", "SaeNodes", "prepare"]


@dataclass(frozen=True, eq=False)
class SaeNodes:
    """The nodes of one SAE on one prompt."""

    sae: Any
    reads: str
    writes: str
    actual: NodeValues
    baseline: NodeValues

    @property
    def change(self) -> NodeValues:
        """a - a'."""
        return NodeValues(self.actual.features - self.baseline.features, self.actual.errors - self.baseline.errors)

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_out"]:
        """W_dec, float32, on the model's device."""
        return self.sae.W_dec.detach().float().to(self.actual.errors.device)

    def firing(self) -> Int[Tensor, "n 2"]:
        """(position, feature) of every feature node that is not as its baseline."""
        return self.change.features.nonzero()


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prompt with all its nodes."""

    tokens: Int[Tensor, " seq"]
    baseline: Baseline
    other: Int[Tensor, " seq"] | None
    """Tokens of the counterfactual prompt."""
    nodes: tuple[SaeNodes, ...]


def prepare(model: Any, prompt: Any, saes: Any, baseline: Baseline) -> Prepared:
    """Run a prompt and its counterfactual, and find all nodes.

    Raises:
        UnknownNameError, MismatchError, InvalidInputError: an SAE does not fit the model, or two read one hook; or the
            counterfactual has another number of tokens.
    """
    several = list(saes) if isinstance(saes, Sequence) else [saes]
    if not several:
        raise InvalidInputError("No SAE was given; attribution is to the features of at least one.")
    tokens = model.prompt_tokens(prompt)
    pairs = [(sae, *hooks_of(model, sae)) for sae in several]
    if len({writes for _, _, writes in pairs}) < len(pairs):
        raise InvalidInputError("Two SAEs write to the same hook; the nodes of a hook are those of one SAE.")
    hooks = list(dict.fromkeys(hook for _, reads, writes in pairs for hook in (reads, writes)))
    other = baseline.tokens(model, tokens) if baseline.kind == "counterfactual" else None

    def nodes_of(ids: Tensor) -> list[NodeValues]:
        seen = model.run(ids, hooks=hooks, logits=False).activations
        bos = bool(model.bos_mask(ids[None])[0, 0])
        return [node_values(sae, seen[reads].flatten(1), seen[writes].flatten(1), bos) for sae, reads, writes in pairs]

    actual = nodes_of(tokens)
    bos = bool(model.bos_mask(tokens[None])[0, 0])
    if other is None:
        base = [baseline.of(model, sae, own, bos) for (sae, _, _), own in zip(pairs, actual, strict=True)]
    else:
        base = nodes_of(other)
    nodes = tuple(SaeNodes(*pair, own, there) for pair, own, there in zip(pairs, actual, base, strict=True))
    return Prepared(tokens, baseline, other, nodes)
