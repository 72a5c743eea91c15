"""What a comparison of two models is configured by. Light to import: the CLI makes its options from it."""

from dataclasses import asdict, dataclass
from typing import Any

from scope.errors import InvalidInputError

__all__ = ["ComparisonConfig", "DiffConfig", "QuantisationConfig"]


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Settings of a comparison of two models."""

    tokens: int = 100_000
    """Rows of text that SAEs and the crosscoder see, BOS included."""
    context_size: int = 128
    """Tokens in a window, BOS included."""
    document_tokens: int | None = 256
    """Tokens that are taken of a document at most, so that many documents come in; None for all of each."""
    shuffle_seed: int | None = 0
    """Seed of the order of the documents; None keeps the order of the files."""
    layer_tokens: int = 8_192
    """Rows on which every layer's activations and the predictions are compared. 0 leaves that out."""
    examples: int = 20
    """Features of each list whose strongest examples are kept."""
    seed: int = 0
    """Seed of whatever is drawn: training, intervals."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("context_size", 2), ("examples", 0), ("layer_tokens", 0)):
            if getattr(self, name) < least:
                raise InvalidInputError(f"{name} is {getattr(self, name):,}; expected at least {least}.")
        if self.document_tokens is not None and self.document_tokens < 1:
            raise InvalidInputError(f"document_tokens is {self.document_tokens}; expected at least 1.")

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class DiffConfig(ComparisonConfig):
    """The same with a crosscoder over both models."""

    d_sae: int = 2_048
    """Features of the crosscoder. 0 trains none."""
    k: int = 32
    """Features of the crosscoder that fire on a row, on average."""
    train_tokens: int = 500_000
    """Rows that the crosscoder is trained on; more than the text has means several passes."""
    batch_size: int = 1_024
    """Rows of a training step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("d_sae", 0), ("k", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InvalidInputError(f"{name} is {getattr(self, name):,}; expected at least {least}.")
        if self.d_sae and self.k > self.d_sae:
            raise InvalidInputError(f"k is {self.k:,}; expected at most d_sae, {self.d_sae:,}.")


@dataclass(frozen=True, kw_only=True)
class QuantisationConfig(ComparisonConfig):
    """The same with less text: a quantisation moves rows less than a training, and several files are looked at."""

    tokens: int = 12_288
    """Rows of text that SAEs see, BOS included."""
    document_tokens: int | None = 128
    """Tokens that are taken of a document at most, so that many documents come in; None for all of each."""
    layer_tokens: int = 1_536
    """Rows on which every layer's activations and the predictions are compared. 0 leaves that out."""
