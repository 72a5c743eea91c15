"""The transcoders of a workspace that a circuit graph can be made with."""

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
    """A transcoder of the workspace, as a graph takes it: from an MLP's input to its output."""

    entry: "Entry"
    layer: int
    model: str
    """What the model is loaded as."""
    about: str
    """In words: its size and kind."""


def dictionaries(context: Context) -> list[Dictionary]:
    """The transcoders of the workspace, by model and layer."""
    found = [_dictionary(context, entry) for entry in context.workspace.saes() if not entry.problem]
    return sorted((one for one in found if one is not None), key=lambda one: (one.model, one.layer, one.entry.name))


def _dictionary(context: Context, entry: "Entry") -> Dictionary | None:
    """A transcoder of the workspace, or None for any other SAE. From its configuration alone: its weights would load
    torch."""
    try:
        cfg = json.loads((entry.path / "cfg.json").read_text())
        metadata = cfg["metadata"]
        reads, writes = str(metadata.get("hook_name")), str(metadata.get("hook_name_out"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    match = re.fullmatch(r"blocks\.(\d+)\.ln2\.hook_out", reads)
    if match is None or writes != f"blocks.{match[1]}.hook_mlp_out":
        return None
    model = str(metadata.get("model_name") or "")
    for parent in context.workspace.parents(entry):
        model = str(parent.manifest.get("load_name") or model)
    about = f"{int(cfg.get('d_sae', 0)):,} features" + (f", k = {cfg['k']}" if cfg.get("k") else "")
    return Dictionary(entry, int(match[1]), model, about)


def require_one_model(chosen: Sequence[Dictionary]) -> str:
    """The model of some transcoders.

    Raises:
        InvalidInputError: there are none, they are of several models, or two are of one layer.
    """
    if not chosen:
        raise InvalidInputError("Choose at least one transcoder, better one for every layer.")
    models = sorted({one.model for one in chosen})
    if len(models) > 1:
        raise InvalidInputError(f"These transcoders are of several models ({', '.join(models)}); choose those of one.")
    layers = [one.layer for one in chosen]
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        names = ", ".join(one.entry.name for one in chosen if one.layer == twice)
        raise InvalidInputError(f"Several transcoders are of layer {twice} ({names}); choose one of them.")
    if not models[0]:
        raise InvalidInputError(
            "Nothing says which model these transcoders are of; scope graph --model makes the graph."
        )
    return models[0]
