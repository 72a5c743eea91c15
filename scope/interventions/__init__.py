"""Ready-made edits of activations and features, to be given to `model.run`, `generate` and `cross_entropy`.

from scope.interventions import ablate_features, add_direction, combine
edits = combine(ablate_features(sae, [17]), add_direction("blocks.12.hook_resid_post", direction, 4.0))
model.run("The opposite of hot is", edits=edits)

The same as data, which the command line and the dashboard read too:

from scope.interventions import InterventionSpec, intervene
spec = InterventionSpec.load("no_sentiment.json")
with intervene(model, spec, sae):
    model.generate("The opposite of hot is")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.interventions.activations import ablate, add_direction, patch, project_out, scale, set_
    from scope.interventions.edit import Edit, combine
    from scope.interventions.experts import (
        ablate_experts,
        forbid_expert,
        force_expert,
        scale_experts,
        set_experts,
        swap_experts,
    )
    from scope.interventions.features import ablate_features, scale_features, set_features, splice, splice_edits
    from scope.interventions.resolving import control, intervene
    from scope.interventions.spec import Intervention, InterventionSpec
    from scope.interventions.steering import Steering, steer, steer_with, steering_edit

__all__ = [
    "Edit",
    "Intervention",
    "InterventionSpec",
    "Steering",
    "ablate",
    "ablate_experts",
    "ablate_features",
    "add_direction",
    "combine",
    "control",
    "forbid_expert",
    "force_expert",
    "intervene",
    "patch",
    "project_out",
    "scale",
    "scale_experts",
    "scale_features",
    "set_",
    "set_experts",
    "set_features",
    "splice",
    "splice_edits",
    "steer",
    "steer_with",
    "steering_edit",
    "swap_experts",
]

_HOMES = {
    "edit": ("Edit", "combine"),
    "activations": ("ablate", "add_direction", "patch", "project_out", "scale", "set_"),
    "experts": ("ablate_experts", "forbid_expert", "force_expert", "scale_experts", "set_experts", "swap_experts"),
    "features": ("ablate_features", "scale_features", "set_features", "splice", "splice_edits"),
    "resolving": ("control", "intervene"),
    "spec": ("Intervention", "InterventionSpec"),
    "steering": ("Steering", "steer", "steer_with", "steering_edit"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"scope.interventions.{home}"), name)
    raise AttributeError(f"module 'scope.interventions' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
