"""How a command loads the model that it was given, and where it puts the lookup tables."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from scope.models import LanguageModel

__all__ = ["EmbeddingPlace", "EmbeddingsOption", "TrustOption", "load_model"]

EmbeddingPlace = Literal["device", "host"]
"""As in `scope.models.placement`, which takes seconds to import."""
EmbeddingsOption = Annotated[
    EmbeddingPlace,
    typer.Option(
        "--embeddings",
        help="Where the model's lookup tables lie; host saves the accelerator's memory (Gemma 3n, Gemma 4 E2B, E4B), "
        "and what is computed is the same.",
    ),
]
"""Of every command that loads a model; its default is "device"."""
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model (LLaDA, Dream).")
]
"""Of the commands for models that bring code; its default is False."""


def load_model(name: str, *, embeddings: EmbeddingPlace, **settings: Any) -> "LanguageModel":
    """Load a model; arguments and errors are those of `scope.models.LanguageModel.load`."""
    from scope.models import LanguageModel

    return LanguageModel.load(name, embeddings=embeddings, **settings)
