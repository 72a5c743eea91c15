"""What a fine-tuning, or a quantisation, changed inside a model: two models with one tokenizer on the same text.

- `diff_models`: the whole report, as `scope diff` and `scope quantisation` make it.
- `ModelPair`: the two models; `capture_pair`: their activations on one text, row by row aligned.
- `layer_changes`: how far activations and predictions are apart, by layer and by source.
- `feature_changes`: what a given SAE makes of both: reconstruction, and rate and decoder feature by feature.
- `scale_features`: which features of a crosscoder one model alone has, told from artefacts by latent scaling.
"""

from scope.diffing.features import FeatureChanges, feature_changes
from scope.diffing.layers import LayerChanges, layer_changes
from scope.diffing.pair import ModelPair, capture_pair
from scope.diffing.report import DiffReport, diff_models
from scope.diffing.scaling import FeatureScaling, scale_features
from scope.diffing.settings import DiffConfig

__all__ = [
    "DiffConfig",
    "DiffReport",
    "FeatureChanges",
    "FeatureScaling",
    "LayerChanges",
    "ModelPair",
    "capture_pair",
    "diff_models",
    "feature_changes",
    "layer_changes",
    "scale_features",
]
