"""What a training run reports."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scope.saes.base import SAE

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TrainReport"]


@dataclass(frozen=True)
class TrainReport:
    """A finished run. Its figures are of training rows; `scope.training.metrics` measures on held-out ones."""

    sae: SAE
    """The SAE; it takes raw activations and gives values in the model's own units."""
    path: Path | None
    """Where it was saved."""
    hook: str
    """The hook it was trained on."""
    steps: int
    tokens: int
    """Rows trained on."""
    seconds: float
    """Time spent in the training loop, earlier parts of an interrupted run included."""
    resumed_at: int
    """The step at which this call took up an earlier run; 0 where it started anew."""
    fvu: float
    """Residual / total sum of squares, mean over the last tenth of the run log."""
    l0: float
    """Features that fired on a row, on average over the same part."""
    dead_share: float
    """Share of features without a firing in the last `dead_tokens` rows."""
    dead_tokens: int
    """Rows that `dead_share` looks back over."""
    over_dense_share: float
    """Share of features that fired on more than a tenth of the rows during the decay."""
    log: tuple[dict[str, Any], ...]
    """The run log's lines."""
    data_wait_share: float = 0.0
    """Share of the time that the loop waited for its next batch."""

    @property
    def tokens_per_second(self) -> float:
        """Rows trained on in a second, on average."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def log_frame(self) -> "pd.DataFrame":
        """The run log as a DataFrame: step, tokens, loss, fvu, l0, dead, learning_rate, grad_norm, tokens_per_s, …"""
        import pandas as pd

        return pd.DataFrame(list(self.log))

    def to_dict(self) -> dict[str, Any]:
        """The figures, JSON-able."""
        return {
            "path": str(self.path) if self.path else None,
            "hook": self.hook,
            "d_sae": self.sae.d_sae,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "resumed_at": self.resumed_at,
            "train_fvu": self.fvu,
            "train_l0": self.l0,
            "train_dead_share": self.dead_share,
            "train_dead_tokens": self.dead_tokens,
            "train_over_dense_share": self.over_dense_share,
            "train_data_wait_share": round(self.data_wait_share, 4),
        }

    def summary(self) -> str:
        """A few lines for a person."""
        where = f" -> {self.path}" if self.path else ""
        return (
            f"Trained {self.sae.d_sae:,} features on {self.tokens:,} rows of {self.hook} in {self.seconds:,.0f} s "
            f"({self.tokens_per_second:,.0f} rows/s, {self.data_wait_share:.1%} of the time waiting for data){where}\n"
            f"On training rows: fvu {self.fvu:.4f}, l0 {self.l0:.1f}, dead {self.dead_share:.1%} "
            f"(no firing in {self.dead_tokens:,} rows), denser than 10%: {self.over_dense_share:.1%}"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.summary())}</pre>"
