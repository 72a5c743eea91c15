"""Interventions written down: what is changed in a model, where and when, as data that a file can hold.

    {"name": "no sentiment", "model": "gemma-3-270m", "freeze_attention": false, "interventions": [
       {"kind": "add", "sae": "demo", "features": [17], "value": 2.0, "unit": "maximum"},
       {"kind": "ablate", "layer": 3, "heads": [0, 2], "positions": [4]},
       {"kind": "forbid", "layer": 3, "experts": [17]},
       {"kind": "project_out", "component": "residual", "layer": 8, "direction": [0.1, …], "during": "generated"}]}

The command line, the dashboard and Python share this one vocabulary. x is the activation of one token:

| kind        | features of an SAE      | heads, a component, a hook | a direction there (u at unit norm) |
|-------------|-------------------------|----------------------------|------------------------------------|
| ablate      | f -> 0                  | x -> 0                     |                                    |
| set         | f -> value              | x -> value                 | x -> x + (value - x·u) u           |
| scale       | f -> value f            | x -> value x               | x -> x + (value - 1)(x·u) u        |
| add         | x -> x + value row      |                            | x -> x + value direction           |
| project_out | rows out of x           |                            | x -> x - (x·u) u                   |
| patch       | f -> f of another prompt| x -> x of another prompt   |                                    |

Of experts, `scope.interventions.experts`: ablate, set and scale change what they write, E(x), as a component's x; and
the router's choice changes with

| kind   | experts of a layer with a mixture of them                                            |
|--------|--------------------------------------------------------------------------------------|
| forbid | no token goes to them; the next likeliest take their places                          |
| force  | every token goes to them; they take the place and probability of the least likely    |
| swap   | two: tokens of the one go to the other                                               |

Values of features are firing strengths, in the model's own units; `row` is the feature's decoder row at unit norm.
`scope.interventions.resolving` makes edits of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from activations.manifest import write_atomically
from scope.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    from scope.interventions.resolving import Maxima, SaesByName
    from scope.models.edits import Edits

__all__ = ["COMPONENTS", "Intervention", "InterventionSpec", "Kind", "Unit"]

Kind = Literal["ablate", "set", "scale", "add", "project_out", "patch", "force", "forbid", "swap"]
Unit = Literal["strength", "maximum"]
During = Literal["all", "prompt", "generated"]
COMPONENTS = {
    "attention": "blocks.{layer}.hook_attn_out",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "residual": "blocks.{layer}.hook_resid_post",
    "embedding": "hook_embed",
}
"""Names of components, and the hooks that they write to."""
VALUED = ("set", "scale", "add")
ROUTING = ("force", "forbid", "swap")
"""What is done to a router's choice."""
OF_EXPERTS = ("ablate", "set", "scale", *ROUTING)
TARGETS = ("features", "heads", "experts", "component", "hook")
MAX_VALUE = 1e12


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """One change. It is of features, of heads, of experts, of a component or of a hook."""

    kind: Kind
    """What is done."""
    sae: str = ""
    """Name, id or path of the features' SAE; "" for the only one that is given."""
    features: tuple[int, ...] = ()
    """Ids of features."""
    layer: int | None = None
    """Of heads, experts or a component, counted from 0."""
    heads: tuple[int, ...] = ()
    """Heads of the layer's attention: what each reads from values, before W_O (`attn.hook_z`)."""
    experts: tuple[int, ...] = ()
    """Experts of the layer: what they write where they are chosen, or whether they are."""
    component: str = ""
    """One of `COMPONENTS`."""
    hook: str = ""
    """The name of any hook."""
    direction: tuple[float, ...] = ()
    """A direction at the component or hook, as wide as its activation: only along it something is changed."""
    value: float | tuple[float, ...] | None = None
    """What to set to, scale by or add; one number, or one for each feature."""
    unit: Unit = "strength"
    """Of the value of features: "strength" for firing strength, "maximum" for multiples of the feature's largest
    firing strength, which an index knows."""
    prompt: str = ""
    """The other prompt of a patch; positions line up."""
    positions: tuple[int, ...] | None = None
    """Which tokens, counted from the start of the text, BOS included; None for all."""
    during: During = "all"
    """While a text is being written: all of it, the "prompt" alone, or what is "generated" alone."""
    keep_bos: bool = True
    """Leave the BOS token as it is."""
    error_term: bool = True
    """Of features: keep what the SAE misses of x; without it x becomes the SAE's reconstruction."""

    def __post_init__(self) -> None:
        _check_types({field.name: getattr(self, field.name) for field in fields(self)})
        self._check_target()

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each feature."""
        n = len(self.features)
        several = self.value if isinstance(self.value, tuple) else (self.value or 0.0,) * n
        return tuple(float(one) for one in several)

    def _check_target(self) -> None:
        targets = [name for name in TARGETS if getattr(self, name)]
        if len(targets) != 1:
            got = " and ".join(targets) or "none of them"
            raise InvalidInputError(
                f"An intervention is on features, heads, experts, a component or a hook; got {got}."
            )
        (target,) = targets
        if (self.layer is None) != (target in ("features", "hook") or self.component == "embedding"):
            raise InvalidInputError(
                f"layer goes with heads, experts, and the components attention, mlp and residual; this is on {target}."
            )
        if self.direction and target in ("features", "heads", "experts"):
            raise InvalidInputError("A direction is one at a component or hook; features, heads and experts take none.")
        if self.kind in ROUTING and target != "experts":
            raise InvalidInputError(f"{self.kind} is for experts, which a router chooses; this is on {target}.")
        if target == "experts" and self.kind not in OF_EXPERTS:
            raise InvalidInputError(f"Experts can be {', '.join(OF_EXPERTS)}; {self.kind} is not for them.")
        if self.kind == "swap" and len(self.experts) != 2:
            raise InvalidInputError(f"swap takes two experts; got {len(self.experts)}.")
        along = bool(self.direction) or target == "features"
        if (self.value is not None) != (self.kind in VALUED):
            wanted = "needs a value" if self.kind in VALUED else "takes no value"
            raise InvalidInputError(f"An intervention of kind {self.kind!r} {wanted}.")
        if self.kind in ("add", "project_out") and not along:
            raise InvalidInputError(f"{self.kind} needs features, or a direction at the component or hook.")
        if self.direction and self.kind in ("ablate", "patch"):
            raise InvalidInputError(f"{self.kind} takes no direction; project_out removes one.")
        if self.direction and not any(self.direction):
            raise InvalidInputError("The direction is zero.")
        if isinstance(self.value, tuple) and len(self.value) != len(self.features):
            raise InvalidInputError(f"{len(self.value)} values were given for {len(self.features)} features.")
        if self.unit == "maximum" and (target != "features" or self.kind not in ("set", "add")):
            raise InvalidInputError("The unit maximum is for features that are set or added.")
        if bool(self.prompt) != (self.kind == "patch"):
            raise InvalidInputError("A patch, and nothing else, needs the prompt that it is from.")

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, JSON-able."""
        known = {field.name: field.default for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value != known[name]
        }

    @classmethod
    def from_dict(cls, content: Any) -> "Intervention":
        """The intervention that a file describes.

        Raises:
            UnknownNameError: a field or a word in it is unknown; near misses are suggested.
            InvalidInputError: it is no intervention.
        """
        given = _known_fields(cls, content, "an intervention", needed=("kind",))
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        _check_types(given)
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class InterventionSpec:
    """Interventions that belong together; those of one hook are made in this order."""

    interventions: tuple[Intervention, ...]
    """At least one."""
    name: str = ""
    """What people call it."""
    model: str = ""
    """The model that it is for, by its name or as it is loaded; "" for any that has the hooks."""
    freeze_attention: bool = False
    """Let the model attend where it attends without the interventions; values are live."""

    def __post_init__(self) -> None:
        if not self.interventions:
            raise InvalidInputError("A set of interventions holds at least one.")

    def resolve(self, model: Any, saes: "SaesByName" = None, maxima: "Maxima" = None) -> "Edits":
        """The edits that `model.run`, `generate`, `cross_entropy` and `intervene` take: see
        `scope.interventions.resolving.resolve`."""
        from scope.interventions.resolving import resolve

        return resolve(self, model, saes, maxima)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "model": self.model,
            "freeze_attention": self.freeze_attention,
            "interventions": [one.to_dict() for one in self.interventions],
        }

    @classmethod
    def from_dict(cls, content: Any) -> "InterventionSpec":
        """What a file describes; a list of interventions, or one alone, will do.

        Raises:
            UnknownNameError: a field or a word in it is unknown; near misses are suggested.
            InvalidInputError: it describes something else.
        """
        if isinstance(content, Mapping) and "kind" in content:
            content = [content]
        if isinstance(content, list):
            content = {"interventions": content}
        given = _known_fields(cls, content, "a set of interventions", needed=("interventions",))
        if not isinstance(given["interventions"], list):
            raise InvalidInputError("interventions is a list.")
        for name in ("name", "model"):
            if not isinstance(given.get(name, ""), str):
                raise InvalidInputError(f"{name} of a set of interventions is text; got {given[name]!r}.")
        if not isinstance(given.get("freeze_attention", False), bool):
            raise InvalidInputError(f"freeze_attention is true or false; got {given['freeze_attention']!r}.")
        given["interventions"] = tuple(Intervention.from_dict(one) for one in given["interventions"])
        return cls(**given)

    @classmethod
    def load(cls, path: str | Path) -> "InterventionSpec":
        """Read a file of JSON, YAML or TOML, told apart by its ending.

        Raises:
            UnknownNameError: there is no such file.
            InvalidInputError: it cannot be read, or describes something else.
        """
        path = Path(path)
        if not path.is_file():
            raise UnknownNameError("file", str(path), hint="Give a file of interventions in JSON, YAML or TOML.")
        try:
            content = _read(path)
        except (ValueError, UnicodeDecodeError) as problem:
            raise InvalidInputError(f"{path} cannot be read: {problem}") from problem
        return cls.from_dict(content)

    def save(self, path: str | Path) -> None:
        """Write it as JSON; a file that was there is replaced as a whole."""
        write_atomically(Path(path), (json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())


def _check_types(given: Mapping[str, Any]) -> None:
    """Refuse fields of an intervention that hold something of another kind."""
    for name, known in (("kind", get_args(Kind)), ("unit", get_args(Unit)), ("during", get_args(During))):
        if name in given and given[name] not in known:
            raise UnknownNameError(f"{name} of intervention", str(given[name]), known)
    for name in ("sae", "component", "hook", "prompt"):
        if not isinstance(given.get(name, ""), str):
            raise InvalidInputError(f"{name} of an intervention is text; got {given[name]!r}.")
    if given.get("component") and given["component"] not in COMPONENTS:
        raise UnknownNameError("component", given["component"], COMPONENTS)
    for name in ("keep_bos", "error_term"):
        if not isinstance(given.get(name, True), bool):
            raise InvalidInputError(f"{name} of an intervention is true or false; got {given[name]!r}.")
    for name in ("features", "heads", "experts", "positions", "layer"):
        held = given.get(name)
        several = held if isinstance(held, tuple) else () if held is None else (held,)
        if any(isinstance(one, bool) or not isinstance(one, int) for one in several):
            raise InvalidInputError(f"{name} of an intervention: expected whole numbers; got {held!r}.")
        if held is not None and isinstance(held, tuple) == (name == "layer"):
            raise InvalidInputError(f"{name} of an intervention: got {held!r}; a layer is a number, the others lists.")
    direction, value = given.get("direction", ()), given.get("value")
    if not isinstance(direction, tuple):
        raise InvalidInputError(f"A direction is a list of numbers; got {direction!r}.")
    for number in (*direction, *(value if isinstance(value, tuple) else () if value is None else (value,))):
        fine = isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= MAX_VALUE
        if not fine:
            raise InvalidInputError(f"Values and directions are finite numbers; got {number!r}.")


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as problem:
            raise ValueError(str(problem)) from problem
    if path.suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    return json.loads(text)


def _known_fields(cls: Any, content: Any, what: str, needed: Sequence[str]) -> dict[str, Any]:
    names = [field.name for field in fields(cls)]
    if not isinstance(content, Mapping):
        raise InvalidInputError(f"Expected {what} (a mapping with {', '.join(needed)}); got {type(content).__name__}.")
    for name in content:
        if name not in names:
            raise UnknownNameError(f"field of {what}", str(name), names)
    missing = [name for name in needed if name not in content]
    if missing:
        raise InvalidInputError(f"{what[:1].upper()}{what[1:]} needs {missing[0]!r}.")
    return dict(content)
