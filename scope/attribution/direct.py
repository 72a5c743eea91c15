"""Direct logit attribution: how strongly each firing feature pushes one next token, along the residual stream alone.

A feature with decoder row d that fires with strength s (in units of the row at unit norm) adds s d / ||d|| to the
residual stream. Attention and later MLPs may react to it; along the skip connections it reaches the final norm
unchanged. With the norm's scale held at its actual value, the rest is linear, and the token's logit, relative to the
mean over the vocabulary, moves by

    effect = s d / ||d|| * gain / scale(x) . (W_U[target] - mean W_U)

where x is the residual stream into the final norm at that position; a LayerNorm also takes the mean from d first.
For an SAE on the last layer's residual stream, the effects of all features, of `b_dec`, of the SAE's error and of the
norm's bias add up to the token's centred logit exactly. For earlier hooks they are the direct part.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (direct path); called direct logit
attribution since.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import MismatchError, OutOfRangeError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["FiringFeatures", "direct_effects", "direct_logit_effects"]


@runtime_checkable
class FiringFeatures(Protocol):
    """What fires on the tokens of a text; `scope.features.PromptFeatures` is one."""

    @property
    def hook_name(self) -> str: ...

    @property
    def d_sae(self) -> int: ...

    @property
    def table(self) -> "pd.DataFrame":
        """Columns position, feature, value (firing strength)."""
        ...

    @property
    def final_residual(self) -> "np.ndarray":
        """float32 `(seq, d_model)`: the residual stream that goes into the final norm."""
        ...

    def at(self, position: int) -> "pd.DataFrame":
        """The rows of `table` for one position."""
        ...


def direct_logit_effects(
    model: Any, sae: Any, features: FiringFeatures, position: int | None, target_token: int
) -> "pd.DataFrame":
    """Columns feature, position, strength, effect (logits): by absolute effect, the largest first.

    Args:
        model: a `scope.models.LanguageModel`.
        sae: the dictionary.
        features: what fires on a text, such as `scope.features.features_on_prompt` finds it.
        position: the token whose next token is asked about (the direct path never crosses positions); None for all.
        target_token: id of the next token.
    Raises:
        OutOfRangeError: there is no such position or token.
        MismatchError: the SAE does not write into the residual stream, or the features are of another SAE.
    """
    import pandas as pd

    if (features.hook_name, features.d_sae) != (sae.hook_name, sae.d_sae):
        raise MismatchError(
            f"The features are of an SAE with {features.d_sae:,} features at {features.hook_name}; the SAE given has "
            f"{sae.d_sae:,} at {sae.hook_name}."
        )
    firings = features.table if position is None else features.at(position)
    ids = torch.from_numpy(firings["feature"].to_numpy().copy())
    places = firings["position"].to_numpy()
    strengths = torch.from_numpy(firings["value"].to_numpy(dtype="float32").copy())
    rows = sae.W_dec.detach()[ids.to(sae.W_dec.device)].float()
    directions = strengths.to(rows.device)[:, None] * torch.nn.functional.normalize(rows, dim=1)
    residual = torch.from_numpy(features.final_residual[places])
    effect = direct_effects(model, directions, residual, target_token).cpu().numpy()
    table = pd.DataFrame({"feature": ids.numpy(), "position": places, "strength": strengths.numpy(), "effect": effect})
    return table.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)


@torch.no_grad()
def direct_effects(
    model: Any, directions: Float[Tensor, "n width"], residual: Float[Tensor, "n d_model"], target_token: int
) -> Float[Tensor, " n"]:
    """The centred logit of one token that each direction adds along the direct path.

    Args:
        model: a `scope.models.LanguageModel`.
        directions: what is added to the residual stream, as wide as it.
        residual: the residual stream into the final norm where each is added; it sets the norm's scale.
        target_token: id of the token.
    Raises:
        OutOfRangeError: there is no such token.
        MismatchError: the directions have another width than the residual stream.
    """
    from scope.models.losses import final_norm_scale

    if not 0 <= target_token < model.d_vocab:
        raise OutOfRangeError(f"There is no token {target_token}: the vocabulary has 0 to {model.d_vocab - 1:,}.")
    if directions.shape[1] != model.d_model:
        raise MismatchError(
            f"The directions have {directions.shape[1]:,} dimensions; the residual stream has {model.d_model:,}: only "
            "what is written into the residual stream has a direct effect on logits."
        )
    directions = directions.to(model.device, torch.float32)
    if model.layout.family.centred_norm:
        directions = directions - directions.mean(-1, keepdim=True)
    pull = model.W_U[target_token].float() - _mean_unembedding(model)
    scale = final_norm_scale(model, residual.to(model.device))
    return directions @ (model.final_norm_gain.float() * pull) / scale


def _mean_unembedding(model: Any) -> Float[Tensor, " d_model"]:
    """The mean row of W_U, kept on the model: a vocabulary of 262,144 takes a tenth of a second."""
    mean = getattr(model, "_mean_unembedding", None)
    if mean is None:
        mean = model.W_U.mean(0, dtype=torch.float32)
        model._mean_unembedding = mean
    return mean
