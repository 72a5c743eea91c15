"""Baselines: what "without" means. Every method of a comparison, its yardstick and "ablate the rest" share one.

An activation x that an SAE reads is a sum of nodes, its features and its error:

    x = Σ_i f_i W_dec[i] + b_dec + error

A baseline says what each node would be without what is asked about: f'_i and error'. It comes to the activation
x' = Σ_i f'_i W_dec[i] + b_dec + error'.

- `zero()`: no feature fires, no error. Far from anything that the model ever sees: zero ablation breaks models.
- `mean(…)`: each feature's mean and the mean error, over the tokens of some text; of a cross-layer transcoder layer by
  layer, what all layers before it write counted.
- `counterfactual(prompt)`: what a prompt of as many tokens makes of them, at the same position. It keeps what both have
  in common: the one to take where there is a behaviour (Zhang & Nanda 2023, arXiv 2309.16042, section 2).

The BOS token, on which SAEs are not trained, is no feature's: its whole activation is its error, and no baseline
changes it unless the counterfactual prompt does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError
from scope.models.dictionaries import as_read, hook_of
from scope.saes.clt import CrossLayerTranscoder

__all__ = ["Baseline", "NodeValues", "counterfactual", "hooks_of", "mean", "node_values", "zero"]


class NodeValues(NamedTuple):
    """What the nodes of one SAE are on a prompt, float32."""

    features: Float[Tensor, "seq d_sae"]
    """Feature activations, in the SAE's own units; 0 on BOS."""
    errors: Float[Tensor, "seq d_out"]
    """What the features and b_dec leave of the activation that the SAE writes to; on BOS all of it but b_dec."""

    def activation(self, sae: Any) -> Float[Tensor, "seq d_out"]:
        """The activation that the nodes add up to."""
        W_dec, b_dec = (part.detach().float().to(self.errors.device) for part in (sae.W_dec, sae.b_dec))
        return self.features @ W_dec + b_dec + self.errors


def hooks_of(model: Any, sae: Any) -> tuple[str, str]:
    """The hook that an SAE reads and the one that its features write to: the same one, but for a transcoder.

    Raises:
        UnknownNameError: the model lacks a hook.
        MismatchError: the SAE has another width than the hook.
        InvalidInputError: it is a dictionary of several hooks.
    """
    ports = sae.cfg.ports
    if len(ports.inputs) > 1 or len(ports.outputs) > 1:
        raise InvalidInputError("Attribution takes dictionaries of one hook, and transcoders of one layer.")
    reads = model.resolve_hook(hook_of(sae))
    writes = model.resolve_hook(ports.outputs[0].hook) if ports.outputs else reads
    for hook, width in ((reads, sae.d_in), (writes, sae.d_out)):
        there = torch.Size(model.hook_shape(hook)).numel()
        if there != width:
            raise MismatchError(f"The SAE has a width of {width:,} at {hook}; the model has {there:,}.")
    return reads, writes


@torch.no_grad()
def node_values(
    sae: Any, read: Float[Tensor, "seq d_in"], written: Float[Tensor, "seq d_out"], has_bos: bool
) -> NodeValues:
    """Features and errors of a prompt from the activations that the SAE reads and writes to."""
    features = sae.encode(as_read(sae, read[None]))[0].float().to(written.device)
    if has_bos:
        features[0] = 0.0
    W_dec, b_dec = sae.W_dec.detach().float().to(written.device), sae.b_dec.detach().float().to(written.device)
    return NodeValues(features, written.float() - features @ W_dec - b_dec)


@dataclass(frozen=True, eq=False)
class Baseline:
    """What every node is set against; made by `zero`, `mean` or `counterfactual`."""

    kind: str
    """ "zero", "mean" or "counterfactual"."""
    prompt: Any = None
    """The counterfactual prompt."""
    means: dict[str, NodeValues] = field(default_factory=dict, repr=False)
    """Per hook that an SAE reads, one row of mean features and errors."""

    def tokens(self, model: Any, tokens: Int[Tensor, " seq"]) -> Int[Tensor, " seq"]:
        """The tokens of the counterfactual prompt, as many as the prompt's own.

        Raises:
            MismatchError: it has another number of tokens.
        """
        other = model.prompt_tokens(self.prompt)
        if len(other) != len(tokens):
            raise MismatchError(
                f"The counterfactual prompt has {len(other)} tokens, the prompt {len(tokens)}; they have to line up. "
                f"Counterfactual: {model.vocabulary_strings(other.tolist())}. "
                f"Prompt: {model.vocabulary_strings(tokens.tolist())}."
            )
        return other

    def of(self, model: Any, sae: Any, actual: NodeValues, has_bos: bool) -> NodeValues:
        """The baseline's node values for a zero or mean baseline, on as many tokens as `actual` has."""
        if self.kind == "zero":
            base = NodeValues(torch.zeros_like(actual.features), torch.zeros_like(actual.errors))
        else:
            found = self.means.get(hooks_of(model, sae)[0])
            if found is None or found.features.shape[1] != sae.d_sae:
                raise MismatchError(
                    f"The mean baseline is not of this SAE at {hook_of(sae)}: make it with mean(model, saes, texts)."
                )
            base = NodeValues(
                found.features.to(actual.features.device).expand_as(actual.features).clone(),
                found.errors.to(actual.errors.device).expand_as(actual.errors).clone(),
            )
        if has_bos:
            base.features[0], base.errors[0] = actual.features[0], actual.errors[0]
        return base


def zero() -> Baseline:
    """No feature fires and there is no error: what is left is b_dec."""
    return Baseline("zero")


def counterfactual(prompt: Any) -> Baseline:
    """What another prompt of as many tokens makes of each node, at the same position."""
    return Baseline("counterfactual", prompt=prompt)


@torch.no_grad()
def mean(model: Any, saes: Sequence[Any], texts: Sequence[Any]) -> Baseline:
    """Each node's mean over the tokens of some texts, BOS left out.

    Args:
        model: a `scope.models.LanguageModel`.
        saes: SAEs and transcoders of one hook each; or one cross-layer transcoder, for ablations of its graphs.
        texts: texts, chats or token ids.

    Raises:
        InvalidInputError: there is no text, or nothing but BOS in them; or there are others beside a cross-layer
            transcoder.
    """
    if any(isinstance(sae, CrossLayerTranscoder) for sae in saes):
        return Baseline("mean", means=_means_of_mlps(model, saes, texts))
    sums: dict[str, list[Tensor]] = {}
    count = 0
    pairs = {sae: hooks_of(model, sae) for sae in saes}
    hooks = list(dict.fromkeys(hook for pair in pairs.values() for hook in pair))
    for text in texts:
        tokens = model.prompt_tokens(text)
        has_bos = bool(model.bos_mask(tokens[None])[0, 0])
        seen = model.run(tokens, hooks=hooks, logits=False).activations
        count += len(tokens) - has_bos
        for sae, (reads, writes) in pairs.items():
            nodes = node_values(sae, seen[reads].flatten(1), seen[writes].flatten(1), has_bos)
            parts = [nodes.features[has_bos:].double().sum(0), nodes.errors[has_bos:].double().sum(0)]
            sums[reads] = [a + b for a, b in zip(sums[reads], parts, strict=True)] if reads in sums else parts
    return Baseline("mean", means=_divided(sums, count))


def _means_of_mlps(model: Any, saes: Sequence[Any], texts: Sequence[Any]) -> dict[str, NodeValues]:
    """Means by what each layer's MLP reads; a layer without features has an error only."""
    # It stands on this module.
    from scope.attribution.dictionaries import mlp_dictionaries, mlp_values

    dictionaries = mlp_dictionaries(model, saes)
    sums: dict[str, list[Tensor]] = {}
    count = 0
    for text in texts:
        tokens = model.prompt_tokens(text)
        has_bos = bool(model.bos_mask(tokens[None])[0, 0])
        values = mlp_values(model, dictionaries, tokens)
        count += len(tokens) - has_bos
        for layer, errors in values.errors.items():
            features = values.features.get(layer, errors.new_zeros(len(errors), 0))
            parts = [part[has_bos:].double().sum(0) for part in (features, errors)]
            hook = f"blocks.{layer}.ln2.hook_out"
            sums[hook] = [a + b for a, b in zip(sums[hook], parts, strict=True)] if hook in sums else parts
    return _divided(sums, count)


def _divided(sums: dict[str, list[Tensor]], count: int) -> dict[str, NodeValues]:
    if count == 0:
        raise InvalidInputError("The mean baseline needs texts with at least one token besides BOS.")
    return {hook: NodeValues(*((part / count).float()[None] for part in parts)) for hook, parts in sums.items()}
