"""The feature index: every firing of one SAE over one text, both ways, and a table with one row per feature.

    from scope.features import FeatureIndex, build_index
    index = build_index(store, sae, "workspace/indexes/NAME.index", model=model)
    index.feature(123)

Names are resolved on first use, so that importing the package costs nothing and opening an index never needs torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.features.build import build_index, build_indexes
    from scope.features.conditions import Condition
    from scope.features.contrast import Contrast
    from scope.features.examples import Example, Examples
    from scope.features.feature import Feature
    from scope.features.index import FeatureIndex
    from scope.features.labels import FeatureLabels, Label
    from scope.features.prompt import PromptFeatures, features_on_prompt

__all__ = [
    "Condition",
    "Contrast",
    "Example",
    "Examples",
    "Feature",
    "FeatureIndex",
    "FeatureLabels",
    "Label",
    "PromptFeatures",
    "build_index",
    "build_indexes",
    "features_on_prompt",
]

_HOMES = {
    "Condition": "conditions",
    "Contrast": "contrast",
    "Example": "examples",
    "Examples": "examples",
    "Feature": "feature",
    "FeatureIndex": "index",
    "FeatureLabels": "labels",
    "Label": "labels",
    "PromptFeatures": "prompt",
    "build_index": "build",
    "build_indexes": "build",
    "features_on_prompt": "prompt",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
