"""Runs of a graph's prompt in the model itself, with something written into them and the graph's nodes read off.

`verify` and `path_patching` stand on it. What is written is added to the output of an MLP, or to the embeddings;
everything behind it reacts, but for what is held: attention patterns (`scope.attribution.frozen.attention_as_frozen`)
or what MLPs write (`HeldMlps`). The interventions that the graph is under are in force, behind what is written.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.attribution.dictionaries import MlpDictionaries
from scope.attribution.graph_edits import GraphEdits, edited_handlers
from scope.attribution.reading import Prompt
from scope.errors import InvalidInputError
from scope.models.edits import EditContext
from scope.models.taps import Handler, tapped

if TYPE_CHECKING:
    from scope.attribution.graph import CircuitGraph

__all__ = ["FACTORS", "FeatureNode", "GraphRuns", "HeldMlps", "Write"]

FACTORS = (0.0, 2.0)
"""What each source is set to, times its value."""
EMBEDDING = -1
"""Stands for the layer of an MLP where the embeddings are written to."""
Write = list[tuple[int, int, Tensor]]
"""What one run adds: (layer, or -1 for the embeddings; position; what is added there)."""


class FeatureNode(NamedTuple):
    """A feature of a graph."""

    node: int
    layer: int
    position: int
    feature: int
    activation: float


class HeldMlps(NamedTuple):
    """What every MLP wrote on the prompt, to be written again whatever it reads, with what interventions make of its
    features in it."""

    written: Mapping[int, Float[Tensor, "seq d_model"]]
    reads: Mapping[int, Float[Tensor, "seq d_model"]]
    """What MLPs with a linear part read: that part goes on, as it is on the way of an edge and no node."""


class GraphRuns:
    """Runs of a graph's prompt.

    Args:
        graph: the graph.
        model: the model that it explains.
        dictionaries: those that it was made with.
        tokens: the graph's.
        edits: the interventions that it is under.
    """

    def __init__(
        self,
        graph: "CircuitGraph",
        model: Any,
        dictionaries: MlpDictionaries,
        tokens: Int[Tensor, " seq"],
        edits: GraphEdits | None = None,
    ) -> None:
        self.graph, self.model, self.dictionaries, self.tokens = graph, model, dictionaries, tokens
        self.edits = edits
        targets = graph.nodes[graph.nodes["kind"].isin(["feature", "logit"])]
        self.features = targets[targets["kind"] == "feature"]
        self.logits = targets[targets["kind"] == "logit"]
        self.nodes = np.concatenate([self.features["node"].to_numpy(), self.logits["node"].to_numpy()])
        """The nodes that are read off: features, then logits."""
        self.layers = np.concatenate([self.features["layer"].to_numpy(), self.logits["layer"].to_numpy()])
        self.positions = np.concatenate([self.features["position"].to_numpy(), self.logits["position"].to_numpy()])
        logit_ids = torch.tensor(self.logits["feature"].to_numpy(), device=model.device)
        self.directions = model.W_U[logit_ids].float() - model.W_U.mean(0, dtype=torch.float32)
        self.held_features = {
            layer: set(own["feature"].tolist())
            for layer, own in graph.nodes[graph.nodes["kind"] == "feature"].groupby("layer")
        }
        self.skips = {layer: skip for layer in dictionaries.layers if (skip := dictionaries.skip(layer)) is not None}

    def write(self, node: FeatureNode, feature: int, size: float) -> Write:
        """So many units of a node's value, written along the rows of a feature of its layer, as long as its own."""
        ids = torch.tensor([node.feature, feature])
        rows = {
            layer: self.dictionaries.decoder(node.layer, ids, layer)
            for layer in self.dictionaries.written_from(node.layer)
        }
        own, other = torch.stack([torch.cat(list(part)).norm() for part in zip(*rows.values(), strict=True)])
        scale = size * own / other.clamp_min(1e-12)
        return [(layer, node.position, scale * row[1]) for layer, row in rows.items()]

    def other(self, node: FeatureNode, rng: np.random.Generator) -> int:
        """A random feature of the same layer that the graph does not hold."""
        choices = np.setdiff1d(np.arange(self.dictionaries.width(node.layer)), list(self.held_features[node.layer]))
        if not len(choices):
            raise InvalidInputError(
                f"The graph holds every feature of layer {node.layer}'s transcoder; the control needs one that it does "
                "not hold. Prune the graph first."
            )
        return int(rng.choice(choices))

    def is_behind(self, node: FeatureNode) -> np.ndarray:
        """Which nodes a feature can change at all."""
        return (self.layers > node.layer) & (self.positions >= node.position)

    def attention(self) -> AbstractContextManager[None]:
        """Within it the model attends by itself, or as the graph's interventions want it."""
        return nullcontext() if self.edits is None else self.edits.attention(self.model, self.tokens)

    def mlps(self, read: Prompt) -> HeldMlps:
        """What every MLP writes on the prompt."""
        written = {layer: frozen.mlp_out for layer, frozen in enumerate(read.frozen.layers)}
        return HeldMlps(written, read.reads)

    def measure(
        self, writes: Sequence[Write], attention: AbstractContextManager[None], held: HeldMlps | None = None
    ) -> Float[np.ndarray, "runs nodes"]:
        """Pre-activations and centred logits of the graph's nodes, each run with what is written in it.

        Args:
            writes: what each run adds; without any there is one run of the prompt as it is.
            attention: within it the model runs.
            held: what MLPs write; None for what they make of what they read.
        """
        model = self.model
        runs = max(1, len(writes))
        found = torch.zeros(runs, len(self.nodes), device=model.device)
        handlers: dict[str, Handler] = {}
        written = {layer for write in writes for layer, _, _ in write}
        for layer in sorted({*self.features["layer"].tolist(), *written, *(held.written if held else ())}):
            added = [(run, place, what) for run, write in enumerate(writes) for at, place, what in write if at == layer]
            if layer == EMBEDDING:
                handlers["hook_embed"] = _Writer(added)
                continue
            here = self.features["layer"].to_numpy() == layer
            reader = self._reader(layer, here, found) if here.any() else None
            writer = _Writer(added, held, layer, self.skips.get(layer)) if held or added else None
            if reader is not None or (held is not None and layer in self.skips):
                handlers[f"blocks.{layer}.ln2.hook_out"] = _Reader(reader, writer)
            if writer is not None:
                handlers[f"blocks.{layer}.hook_mlp_out"] = writer
        # What is written to the embeddings is what is left of them under interventions; all else is in front of these.
        behind = {hook: handlers.pop(hook) for hook in ("hook_embed",) if hook in handlers}
        tokens = self.tokens.expand(runs, -1)
        taps = edited_handlers(model, self.edits, tokens, handlers, behind, own=held is None)
        with model.lock, attention, tapped(model.hf, taps, stop=False):
            hidden = model.hidden_states(tokens)
        found[:, len(self.features) :] = hidden[:, -1].float() @ self.directions.T
        return found.cpu().numpy()

    def _reader(self, layer: int, here: np.ndarray, found: Tensor) -> Handler:
        ids = torch.tensor(self.features["feature"].to_numpy()[here])
        columns = self.dictionaries.encoder(layer, ids).to(found.device)
        places = torch.tensor(self.features["position"].to_numpy()[here], device=found.device)
        if self.edits is not None:  # what is set does not follow what it reads
            context = EditContext("", self.tokens[None], self.model.bos_mask(self.tokens[None]))
            columns = columns * self.edits.factors(layer, places, ids.to(places.device), context)[:, None]
        where = torch.tensor(np.nonzero(here)[0], device=found.device)

        def read(value: Tensor) -> None:
            found[:, where] = (value[:, places].float() * columns).sum(-1)

        return read


class _Writer:
    """Adds to what an MLP writes, or to what it is held at."""

    def __init__(
        self,
        added: Sequence[tuple[int, int, Tensor]],
        held: HeldMlps | None = None,
        layer: int = EMBEDDING,
        skip: Float[Tensor, "d_model d_model"] | None = None,
    ) -> None:
        self.added, self.held, self.layer, self.skip = added, held, layer, skip
        self.change: Tensor | None = None
        """What the MLP's linear part makes of how far what it reads is from what it was."""

    def read(self, value: Tensor) -> None:
        if self.held is not None and self.skip is not None:
            moved = value.float() - self.held.reads[self.layer].float()
            self.change = moved @ self.skip.to(moved.device).T

    def __call__(self, value: Tensor) -> Tensor:
        new = value.clone()
        if self.held is not None:
            new[:] = self.held.written[self.layer].to(new.dtype)
        if self.change is not None:
            new += self.change.to(new.dtype)
        for run, position, what in self.added:
            new[run, position] += what.to(new.device, new.dtype)
        return new


class _Reader:
    """Reads features off what an MLP reads, and tells who writes what its linear part needs."""

    def __init__(self, features: Handler | None, writer: _Writer | None) -> None:
        self.features, self.writer = features, writer

    def __call__(self, value: Tensor) -> None:
        if self.features is not None:
            self.features(value)
        if self.writer is not None:
            self.writer.read(value)
