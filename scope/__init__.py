"""A mechanistic interpretability workbench: what is this model computing, token by token?

Public names are loaded on first use, so `import scope` is fast:

    from scope import LanguageModel, Workspace, build_index, capture, train
"""

import importlib
from typing import TYPE_CHECKING, Any

from scope._version import __version__

if TYPE_CHECKING:
    from activations.capture import capture
    from activations.store import ActivationStore
    from activations.text import TextSource
    from scope.attribution.lens import logit_lens
    from scope.features.build import build_index
    from scope.features.index import FeatureIndex
    from scope.features.prompt import features_on_prompt
    from scope.models import LanguageModel
    from scope.saes.base import SAE
    from scope.saes.formats import load as load_sae
    from scope.training import TrainConfig, train
    from scope.training.evaluate import evaluate
    from scope.workspace import Workspace

__all__ = [
    "SAE",
    "ActivationStore",
    "FeatureIndex",
    "LanguageModel",
    "RowSelection",
    "TextSource",
    "TrainConfig",
    "Workspace",
    "__version__",
    "build_index",
    "capture",
    "evaluate",
    "export_store",
    "features_on_prompt",
    "load_sae",
    "logit_lens",
    "sample_text",
    "train",
]

HOMES = {
    "ActivationStore": "activations.store",
    "FeatureIndex": "scope.features.index",
    "LanguageModel": "scope.models",
    "RowSelection": "activations.selection",
    "SAE": "scope.saes.base",
    "TextSource": "activations.text",
    "TrainConfig": "scope.training",
    "Workspace": "scope.workspace",
    "build_index": "scope.features.build",
    "capture": "activations.capture",
    "evaluate": "scope.training.evaluate",
    "export_store": "activations.export",
    "features_on_prompt": "scope.features.prompt",
    "load_sae": ("scope.saes.formats", "load"),
    "logit_lens": "scope.attribution.lens",
    "sample_text": "scope.sample",
    "train": "scope.training",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'scope' has no attribute {name!r}")
    home = HOMES[name]
    module, attribute = home if isinstance(home, tuple) else (home, name)
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
