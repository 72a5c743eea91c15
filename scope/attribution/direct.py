"""Direct logit attribution: how strongly each firing feature pushes one next token, along the residual stream alone."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["direct_logit_effects"]


def direct_logit_effects(model: Any, sae: Any, features: Any, position: int, target_token: int) -> "pd.DataFrame":
    """Columns feature, position, strength, effect: by absolute effect, the largest first.

    Args:
        model: a `scope.models.LanguageModel`.
        sae: the dictionary.
        features: a `scope.features.PromptFeatures` of this model and SAE.
        position: the token whose next token is asked about; the direct path never crosses positions.
        target_token: id of the next token.
    """
    raise NotImplementedError
