"""Which features fire on a text that is not in the index, in the index's own units."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["PromptFeatures", "features_on_prompt"]


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """What fires on each token of a prompt."""

    hook_name: str
    d_sae: int
    tokens: tuple[str, ...]
    """Display strings, BOS included where the model has one."""
    token_ids: "np.ndarray"
    """int64 `(seq,)`."""
    flags: "np.ndarray"
    """`RowFlag` bits, uint8 `(seq,)`. Features on BOS and special tokens are left out, as in the index."""
    table: "pd.DataFrame"
    """Columns position, token, feature, value (firing strength), rank (within the position): every firing, by
    position, then by strength."""
    next_logits: "np.ndarray"
    """float32 `(seq, d_vocab)`: the model's own logits after each token."""
    final_residual: "np.ndarray"
    """float32 `(seq, d_model)`: the residual stream that goes into the final norm."""

    @property
    def features(self) -> "np.ndarray":
        """Ids of the features that fire anywhere, by their strongest firing."""
        raise NotImplementedError

    def at(self, position: int) -> "pd.DataFrame":
        """The rows of `table` for one position; raises OutOfRangeError."""
        raise NotImplementedError

    def values_of(self, feature: int) -> "np.ndarray":
        """float32 `(seq,)`: one feature's strength on each token, 0 where it does not fire."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        raise NotImplementedError


def features_on_prompt(model: Any, sae: Any, prompt: str, *, index: Any = None) -> PromptFeatures:
    """Run `model` on `prompt` and encode what the SAE's hook sees.

    Args:
        model: a `scope.models.LanguageModel`.
        sae: the dictionary.
        prompt: plain text; BOS is put in front where the model has one.
        index: the SAE's index; activations are then rounded to the dtype that it was built from, so that the same
            text gives the same firings (to bfloat16).
    Raises:
        InvalidInputError: the prompt is empty or longer than the model's context.
        MismatchError: SAE, model and index do not belong together.
    """
    raise NotImplementedError
