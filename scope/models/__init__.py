"""Hooked language models: loading, hook names, activations, edits, losses.

    from scope.models import LanguageModel
    model = LanguageModel.load("gemma-3-270m")
    result = model.run("The opposite of hot is", hooks=["blocks.8.hook_resid_post"])

Names are loaded when they are first used: importing this package imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.models.dictionaries import Dictionary
    from scope.models.edits import EditContext, EditFunction, Edits
    from scope.models.generation import Generation, NewToken
    from scope.models.hooks import HookPoint, HookTable
    from scope.models.language_model import LanguageModel
    from scope.models.live import LiveActivations
    from scope.models.run import RunResult
    from scope.models.token_text import TokenText

__all__ = [
    "Dictionary",
    "EditContext",
    "EditFunction",
    "Edits",
    "Generation",
    "HookPoint",
    "HookTable",
    "LanguageModel",
    "LiveActivations",
    "NewToken",
    "RunResult",
    "TokenText",
]

_HOMES = {
    "Dictionary": "dictionaries",
    "EditContext": "edits",
    "EditFunction": "edits",
    "Edits": "edits",
    "Generation": "generation",
    "HookPoint": "hooks",
    "HookTable": "hooks",
    "LanguageModel": "language_model",
    "LiveActivations": "live",
    "NewToken": "generation",
    "RunResult": "run",
    "TokenText": "token_text",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"scope.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'scope.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
