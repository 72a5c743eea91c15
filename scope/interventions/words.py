"""Interventions in words, a line each, as the steering page, circuit graphs and the command line show them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scope.interventions.spec import Intervention, InterventionSpec

__all__ = ["intervention_words", "spec_words"]


def intervention_words(one: "Intervention") -> str:
    """An intervention in a line; of an SAE that is named by a path its last part."""
    if one.features:
        whose = f"{'features' if len(one.features) > 1 else 'feature'} {', '.join(map(str, one.features))}"
        whose += f" of {one.sae.rstrip('/').rpartition('/')[2]}" if "/" in one.sae else ""
    elif one.heads:
        whose = f"{'heads' if len(one.heads) > 1 else 'head'} {', '.join(map(str, one.heads))} of layer {one.layer}"
    elif one.experts:
        numbers = (" and " if one.kind == "swap" else ", ").join(map(str, one.experts))
        whose = f"{'experts' if len(one.experts) > 1 else 'expert'} {numbers} of layer {one.layer}"
    else:
        whose = one.hook or f"the {one.component}" + ("" if one.layer is None else f" of layer {one.layer}")
    if one.direction:
        whose = f"a direction at {whose}"
    values = ", ".join(f"{value:g}" for value in one.values) if one.features else f"{one.value}"
    unit = " × the maximum" if one.unit == "maximum" else ""
    verb = {
        "ablate": f"Ablate {whose}",
        "set": f"Set {whose} to {values}{unit}",
        "scale": f"Scale {whose} by {values}",
        "add": f"Add {values}{unit} of {whose}",
        "project_out": f"Project out {whose}",
        "patch": f"Patch {whose} from “{one.prompt}”",
        "force": f"Send every token to {whose}",
        "forbid": f"Send no token to {whose}",
        "swap": f"Swap {whose}",
    }[one.kind]
    n = len(one.positions or ())
    where = f", at position{'' if n == 1 else 's'} {', '.join(map(str, one.positions or ()))}" if n else ""
    when = {"all": "", "prompt": ", on the prompt", "generated": ", on the new text"}[one.during]
    return f"{verb}{where}{when}."


def spec_words(spec: "InterventionSpec") -> str:
    """All of a set of interventions in a line, its name in front where it has one."""
    name = f"{spec.name}: " if spec.name else ""
    held = " Attention stays where it is without them." if spec.freeze_attention else ""
    return name + " ".join(intervention_words(one) for one in spec.interventions) + held
