"""Which features fire on a text that is not in the index, in the index's own units.

1. Run the model once, keeping what the SAE's hook sees and the residual stream before the final norm.
2. Round the activations to the dtype that the index was built from, and encode all rows but BOS and special tokens.
3. Turn feature activations into firing strengths, rounded to bfloat16, as the index does.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from activations.media import MODALITIES
from activations.source import RowFlag, bf16_to_float32
from scope.errors import MismatchError, OutOfRangeError
from scope.features.media import MARKS

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex

__all__ = ["PromptFeatures", "features_on_prompt", "require_same"]


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """What fires on each token of a prompt."""

    hook_name: str
    d_sae: int
    tokens: tuple[str, ...]
    """Display strings, BOS included where the model has one."""
    token_ids: np.ndarray
    """int64 `(seq,)`."""
    flags: np.ndarray
    """`RowFlag` bits, uint8 `(seq,)`. Features on BOS and special tokens are left out, as in the index."""
    table: pd.DataFrame
    """Columns position, token, feature, value (firing strength), rank (within the position): every firing, by
    position, then by strength."""
    next_logits: np.ndarray | None
    """float32 `(seq, d_vocab)`: the model's own logits after each token; None where they were not asked for."""
    final_residual: np.ndarray
    """float32 `(seq, d_model)`: the residual stream that goes into the final norm."""

    @property
    def features(self) -> np.ndarray:
        """Ids of the features that fire anywhere, by their strongest firing."""
        strongest = self.table.groupby("feature")["value"].max().sort_values(ascending=False, kind="stable")
        return strongest.index.to_numpy(np.int64)

    def at(self, position: int) -> pd.DataFrame:
        """The rows of `table` for one position; raises OutOfRangeError."""
        if not 0 <= position < len(self.tokens):
            last = len(self.tokens) - 1
            raise OutOfRangeError(f"There is no position {position}: the prompt has positions 0 to {last}.")
        return self.table[self.table["position"] == position]

    def values_of(self, feature: int) -> np.ndarray:
        """float32 `(seq,)`: one feature's strength on each token, 0 where it does not fire."""
        if not 0 <= feature < self.d_sae:
            raise OutOfRangeError(f"There is no feature {feature}: the SAE has features 0 to {self.d_sae - 1:,}.")
        values = np.zeros(len(self.tokens), np.float32)
        here = self.table[self.table["feature"] == feature]
        values[here["position"].to_numpy()] = here["value"]
        return values

    def _repr_html_(self) -> str:
        from scope.features.html import prompt_html

        return prompt_html(self)


def features_on_prompt(
    model: Any, sae: Any, prompt: Any, *, index: "FeatureIndex | None" = None, logits: bool = True
) -> PromptFeatures:
    """Run `model` on `prompt` and encode what the SAE's hook sees.

    Args:
        model: a `scope.models.LanguageModel`.
        sae: the dictionary.
        prompt: a text (BOS is put in front where the model has one), chat messages, or token ids, as for `model.run`.
        index: the SAE's index; activations are then rounded to the dtype that it was built from, so that the same
            text gives the same firings (to bfloat16).
        logits: False leaves `next_logits` out: with a vocabulary of 262,144 they take a megabyte a token.
            `scope.models.losses.likeliest_tokens` reads the likeliest tokens from `final_residual` in bounded memory.
    Raises:
        InvalidInputError: the prompt is empty or longer than the model's context.
        MismatchError: SAE, model and index do not belong together.
        NonFiniteError: an activation or a feature is NaN or infinite.
    """
    import torch

    from scope.features.encode import encode_rows

    if index is not None:
        require_same(model, sae, index)
    last = model.layout.final_residual
    run = model.run(prompt, hooks=list(dict.fromkeys([sae.hook_name, last])), logits=logits)
    token_ids = run.tokens.cpu().numpy().astype(np.int64)
    kinds = _kinds(prompt, len(token_ids))
    flags = _flags(token_ids, model, kinds)
    indexed = np.flatnonzero(flags & (RowFlag.BOS | RowFlag.SPECIAL) == 0)
    x = run.activations[sae.hook_name].flatten(1)[torch.from_numpy(indexed).to(run.tokens.device)]
    if index is not None:
        x = x.to(getattr(torch, index.model_info["activation_dtype"]))
    firings = encode_rows(sae, x, sae.decoder_norms)
    strings = [text.display for text in model.token_strings(run.tokens)]
    tokens = [MARKS.get(MODALITIES[kind], own) for own, kind in zip(strings, kinds.tolist(), strict=True)]
    position = np.repeat(indexed, firings.counts)
    ends = np.cumsum(firings.counts)
    table = pd.DataFrame(
        {
            "position": position,
            "token": [tokens[place] for place in position],
            "feature": firings.features.astype(np.int64),
            "value": bf16_to_float32(firings.values),
            "rank": np.arange(len(position)) - np.repeat(ends - firings.counts, firings.counts),
        }
    )
    return PromptFeatures(
        hook_name=sae.hook_name,
        d_sae=sae.d_sae,
        tokens=tuple(tokens),
        token_ids=token_ids,
        flags=flags,
        table=table,
        next_logits=run.logits.float().cpu().numpy() if logits else None,
        final_residual=run.activations[last].float().cpu().numpy(),
    )


def _kinds(prompt: Any, n_tokens: int) -> np.ndarray:
    """The modality of each token, by its code."""
    columns = getattr(prompt, "columns", None)  # of a prompt with media
    return np.zeros(n_tokens, np.uint8) if columns is None else np.asarray(columns["modality"])


def _flags(token_ids: np.ndarray, model: Any, kinds: np.ndarray) -> np.ndarray:
    special = np.isin(token_ids, sorted(model.special_token_ids)) & (kinds == 0)
    flags = np.where(special, np.uint8(RowFlag.SPECIAL), np.uint8(0))
    if model.bos_token_id is not None and token_ids[0] == model.bos_token_id:
        flags[0] = RowFlag.BOS
    return flags


def require_same(model: Any, sae: Any, index: "FeatureIndex") -> None:
    """Raise `MismatchError` unless an index is of this SAE and was built from this model."""
    if sae.fingerprint != index.sae_info["fingerprint"]:
        raise MismatchError(
            f"The index {index.name} is of another SAE ({index.sae_info['fingerprint'][:12]}) than the one given "
            f"({sae.fingerprint[:12]})."
        )
    if model.identity.weight_hash != index.model_info["weight_hash"]:
        raise MismatchError(
            f"The index {index.name} was built from {index.model_info['name']}; the model given is {model.name}, with "
            "other weights."
        )
