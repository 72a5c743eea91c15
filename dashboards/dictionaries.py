"""The transcoders of a workspace that a circuit graph can be made with: one for each layer, or a cross-layer one."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dashboards.context import Context
from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from scope.workspace import Entry

__all__ = ["Dictionary", "dictionaries", "require_one_model"]


class Dictionary(NamedTuple):
    """A transcoder of the workspace, as a graph takes it: from an MLP's input to its output, or a cross-layer one, from
    the inputs of several to their outputs."""

    entry: "Entry"
    layers: tuple[int, ...]
    """The layers that its features read, ascending: one, unless it is a cross-layer transcoder."""
    model: str
    """What the model is loaded as."""
    about: str
    """In words: its size and kind."""
    width: int
    """Features of each layer."""

    @property
    def across(self) -> bool:
        """Whether it is a cross-layer transcoder."""
        return len(self.layers) > 1

    def written_from(self, layer: int) -> tuple[int, ...]:
        """The layers whose outputs the features that read a layer write."""
        return self.layers[self.layers.index(layer) :]

    def number(self, layer: int, feature: int) -> int:
        """The number in the dictionary of a layer's feature: those of a cross-layer transcoder stand one layer after
        the other."""
        return self.layers.index(layer) * self.width + feature


def dictionaries(context: Context) -> list[Dictionary]:
    """The transcoders of the workspace, by model and layer."""
    found = [_dictionary(context, entry) for entry in context.workspace.saes() if not entry.problem]
    return sorted(
        (one for one in found if one is not None), key=lambda one: (one.model, one.across, one.layers, one.entry.name)
    )


def _dictionary(context: Context, entry: "Entry") -> Dictionary | None:
    """A transcoder of the workspace, or None for any other SAE. From its configuration alone: its weights would load
    torch."""
    try:
        cfg = json.loads((entry.path / "cfg.json").read_text())
        metadata = cfg["metadata"]
        reads = metadata.get("hook_names") or [metadata.get("hook_name")]
        writes = metadata.get("hook_names_out") or [metadata.get("hook_name_out")]
        layers = tuple(_layer(str(one), str(other)) for one, other in zip(reads, writes, strict=True))
        d_sae = int(cfg.get("d_sae", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if -1 in layers or list(layers) != sorted(set(layers)) or (len(layers) > 1 and cfg.get("architecture") != "clt"):
        return None
    model = str(metadata.get("model_name") or "")
    for parent in context.workspace.parents(entry):
        model = str(parent.manifest.get("load_name") or model)
    about = f"{d_sae:,} features" + (f", k = {cfg['k']}" if cfg.get("k") else "")
    return Dictionary(entry, layers, model, about, d_sae // len(layers))


def _layer(reads: str, writes: str) -> int:
    """The layer from whose MLP's input to whose output these hooks lead; -1 for any others."""
    match = re.fullmatch(r"blocks\.(\d+)\.ln2\.hook_out", reads)
    return int(match[1]) if match is not None and writes == f"blocks.{match[1]}.hook_mlp_out" else -1


def require_one_model(chosen: Sequence[Dictionary]) -> str:
    """The model of some transcoders.

    Raises:
        InvalidInputError: there are none, they are of several models, two are of one layer, or there are others beside
            a cross-layer one.
    """
    if not chosen:
        raise InvalidInputError("Choose at least one transcoder, better one for every layer.")
    models = sorted({one.model for one in chosen})
    if len(models) > 1:
        raise InvalidInputError(f"These transcoders are of several models ({', '.join(models)}); choose those of one.")
    across = next((one for one in chosen if one.across), None)
    if across is not None and len(chosen) > 1:
        raise InvalidInputError(
            f"{across.entry.name} is a cross-layer transcoder and stands alone; choose it by itself."
        )
    layers = [layer for one in chosen for layer in one.layers]
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        names = ", ".join(one.entry.name for one in chosen if twice in one.layers)
        raise InvalidInputError(f"Several transcoders are of layer {twice} ({names}); choose one of them.")
    if not models[0]:
        raise InvalidInputError(
            "Nothing says which model these transcoders are of; scope graph --model makes the graph."
        )
    return models[0]
