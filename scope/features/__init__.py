"""The feature index: every firing of one SAE over one text, both ways, and a table with one row per feature.

    from scope.features import FeatureIndex, build_index
    index = build_index(store, sae, "workspace/indexes/NAME.index", model=model)
    index.feature(123)

Names are resolved on first use, so that importing the package costs nothing and opening an index never needs torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.features.ablation import AblationEffect, ablation_effect
    from scope.features.build import build_index, build_indexes
    from scope.features.conditions import Condition
    from scope.features.contrast import Contrast
    from scope.features.examples import Example, Examples
    from scope.features.excerpt import FeatureExcerpt
    from scope.features.excerpt_settings import ExcerptSettings
    from scope.features.excerpt_writing import make_excerpt
    from scope.features.feature import Feature
    from scope.features.grids import feature_grid, write_grid
    from scope.features.index import FeatureIndex
    from scope.features.labels import FeatureLabels, Label
    from scope.features.neuronpedia import import_explanations
    from scope.features.neuronpedia_export import NeuronpediaNames, export_neuronpedia, feature_json
    from scope.features.prompt import PromptFeatures, features_on_prompt

__all__ = [
    "AblationEffect",
    "Condition",
    "Contrast",
    "Example",
    "Examples",
    "ExcerptSettings",
    "Feature",
    "FeatureExcerpt",
    "FeatureIndex",
    "FeatureLabels",
    "Label",
    "NeuronpediaNames",
    "PromptFeatures",
    "ablation_effect",
    "build_index",
    "build_indexes",
    "export_neuronpedia",
    "feature_grid",
    "feature_json",
    "features_on_prompt",
    "import_explanations",
    "make_excerpt",
    "write_grid",
]

_HOMES = {
    "AblationEffect": "ablation",
    "ablation_effect": "ablation",
    "Condition": "conditions",
    "Contrast": "contrast",
    "Example": "examples",
    "Examples": "examples",
    "ExcerptSettings": "excerpt_settings",
    "Feature": "feature",
    "FeatureExcerpt": "excerpt",
    "FeatureIndex": "index",
    "FeatureLabels": "labels",
    "Label": "labels",
    "NeuronpediaNames": "neuronpedia_export",
    "PromptFeatures": "prompt",
    "build_index": "build",
    "build_indexes": "build",
    "export_neuronpedia": "neuronpedia_export",
    "feature_grid": "grids",
    "feature_json": "neuronpedia_export",
    "features_on_prompt": "prompt",
    "import_explanations": "neuronpedia",
    "make_excerpt": "excerpt_writing",
    "write_grid": "grids",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
