"""The interventions of a command: a file or a name in the workspace, the SAEs that they name, and features' maxima."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scope.errors import InvalidInputError, MismatchError

if TYPE_CHECKING:
    from scope.attribution.graph import CircuitGraph
    from scope.interventions.spec import InterventionSpec

__all__ = ["GRAPH_SAE_HELP", "SPEC_HELP", "SaeFinder", "declared", "finder_of_graph", "maxima_of", "with_addresses"]

SPEC_HELP = "a file of interventions (JSON, YAML or TOML), or the name of one that the workspace keeps."
GRAPH_SAE_HELP = (
    "The SAE of the features of the graph's interventions, where it lies elsewhere than they say; those on features of "
    "the graph's own transcoders keep these."
)


def declared(spec: str, workspace: Path) -> "InterventionSpec":
    """The interventions in a file, or those that the workspace keeps under a name."""
    from scope.interventions.spec import InterventionSpec
    from scope.workspace import Workspace

    path = Path(spec)  # a name may have a dot in it, so that an ending alone makes no file
    is_file = path.is_file() or path.suffix in (".json", ".yaml", ".yml", ".toml")
    return InterventionSpec.load(path) if is_file else Workspace(workspace).intervention(spec)


class SaeFinder:
    """Finds SAEs by the names that interventions use.

    Args:
        given: the SAE of all but `known` ones; None for those that they name.
        workspace: where names that are no paths are looked up.
        allow_download: whether an SAE may be fetched.
        known: SAEs that are loaded, by their paths, which go on standing for them.
        device: where SAEs are put; None for where they are loaded.
    """

    def __init__(
        self,
        given: str | None,
        workspace: Path,
        allow_download: bool,
        known: Mapping[str, Any] | None = None,
        device: Any = None,
    ) -> None:
        self.given, self.workspace, self.allow_download = given, workspace, allow_download
        self.device = device
        self._loaded = {_key(path): sae for path, sae in (known or {}).items()}

    def knows(self, name: str) -> bool:
        """Whether a name is the path of an SAE that is loaded."""
        return bool(name) and _key(name) in self._loaded

    def address(self, name: str) -> str:
        """A path or an address of what is found by a name."""
        from scope.saes.formats.addresses import is_address
        from scope.workspace import Workspace

        if self.knows(name):
            return name
        address = self.given or name
        if not address:
            raise InvalidInputError("These interventions do not name the SAE of their features; give it with --sae.")
        if self.given is not None or Path(address).exists() or is_address(address):
            return address
        return str(Workspace(self.workspace).find(address, "sae").path)

    def __call__(self, name: str) -> Any:
        """The SAE of a name, loaded once."""
        from scope.saes.formats import load

        address = self.address(name)
        key = _key(address)
        if key not in self._loaded:
            loaded = load(address, allow_download=self.allow_download)
            self._loaded[key] = loaded if self.device is None else loaded.to(self.device)
        return self._loaded[key]


def _key(address: str) -> str:
    return str(Path(address).resolve())


def finder_of_graph(
    graph: "CircuitGraph", given: str | None, paths: Sequence[str], transcoders: Sequence[Any], allow_download: bool
) -> SaeFinder:
    """Finds the SAEs of the interventions that a graph is under.

    Args:
        graph: the graph.
        given: where an SAE lies that is no transcoder of the graph; None for where they say.
        paths: where the graph's transcoders lie, which may be elsewhere than when it was made.
        transcoders: those, loaded.
        allow_download: whether an SAE may be fetched.

    Raises:
        InvalidInputError: one SAE was given in the place of several.
    """
    by_name = {Path(path).name: sae for path, sae in zip(paths, transcoders, strict=True)}
    known = dict(zip(paths, transcoders, strict=True))
    if len(by_name) == len(paths):
        known |= {old: by_name[Path(old).name] for old in graph.transcoders if Path(old).name in by_name}
    finder = SaeFinder(given, Path("workspace"), allow_download, known, transcoders[0].device)
    ones = () if graph.spec is None else graph.spec.interventions
    others = sorted({one.sae for one in ones if one.features and not finder.knows(one.sae)})
    if given is not None and len(others) > 1:
        raise InvalidInputError(
            f"The graph's interventions are on features of {len(others)} SAEs ({', '.join(others)}); --sae gives one. "
            "Leave it out, and have them lie where they say."
        )
    return finder


def with_addresses(spec: "InterventionSpec", saes: SaeFinder) -> "InterventionSpec":
    """Interventions that say where the SAEs of their features lie, so that they can be made again."""
    settled = (replace(one, sae=saes.address(one.sae)) if one.features else one for one in spec.interventions)
    return replace(spec, interventions=tuple(settled))


def maxima_of(index: Path | None, saes: Callable[[str], Any]) -> Callable[[str, int], float] | None:
    """Says a feature's largest firing strength, as an index of its SAE has it; None without an index."""
    if index is None:
        return None
    from scope.features.index import FeatureIndex

    table = FeatureIndex.open(index)

    def largest(sae: str, feature: int) -> float:
        found, known = str(saes(sae).fingerprint), str(table.sae_info["fingerprint"])
        if found != known:
            raise MismatchError(
                f"{index} is of the SAE {known[:12]}; it knows no maximum of a feature of {found[:12]}. Give values as "
                "firing strengths, or the index of that SAE."
            )
        return float(table.feature(feature).statistics["max_value"])

    return largest
