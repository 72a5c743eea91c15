"""What a fine-tuning, or a quantisation, changed inside a model: two models with one tokenizer on the same text.

- `diff_models`: the whole report, as `scope diff` and `scope quantisation` make it; `DiffReport` opens one.
- `quantisation_reports`: several quantised files against one reference, which is run once.
- `ModelPair`: the two models; `capture_pair`: their activations on one text, row by row aligned.
- `layer_changes`: how far activations and predictions are apart, by layer and by source.
- `feature_changes`: what a given SAE makes of both: reconstruction, and rate and decoder feature by feature.
- `Control`: a finished comparison of a copy that was tuned on nothing, which says what any tuning changes.
- `scale_features`: which features of a crosscoder one model alone has, told from artefacts by latent scaling.

Names are resolved on first use, so that a report can be opened without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.diffing.control import Control
    from scope.diffing.features import FeatureChanges, feature_changes
    from scope.diffing.layers import LayerChanges, layer_changes
    from scope.diffing.pair import ModelPair, capture_pair
    from scope.diffing.report import diff_models
    from scope.diffing.scaling import FeatureScaling, scale_features
    from scope.diffing.settings import ComparisonConfig, DiffConfig, QuantisationConfig
    from scope.diffing.several import quantisation_reports
    from scope.diffing.stored import DiffReport

__all__ = [
    "ComparisonConfig",
    "Control",
    "DiffConfig",
    "DiffReport",
    "FeatureChanges",
    "FeatureScaling",
    "LayerChanges",
    "ModelPair",
    "QuantisationConfig",
    "capture_pair",
    "diff_models",
    "feature_changes",
    "layer_changes",
    "quantisation_reports",
    "scale_features",
]

_HOMES = {
    "ComparisonConfig": "settings",
    "Control": "control",
    "DiffConfig": "settings",
    "DiffReport": "stored",
    "FeatureChanges": "features",
    "FeatureScaling": "scaling",
    "LayerChanges": "layers",
    "ModelPair": "pair",
    "QuantisationConfig": "settings",
    "capture_pair": "pair",
    "diff_models": "report",
    "feature_changes": "features",
    "layer_changes": "layers",
    "quantisation_reports": "several",
    "scale_features": "scaling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
