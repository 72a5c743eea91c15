"""`scope graph writes`: which layers a graph's features write, how strongly, and what that does to a next token."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scope.cli._command import Outcome, command
from scope.cli._dictionaries import DictionariesOption, opened, transcoder_paths
from scope.cli._interventions import GRAPH_SAE_HELP, finder_of_graph
from scope.cli._model import EmbeddingsOption
from scope.cli.sae import DownloadOption
from scope.errors import UnknownNameError

if TYPE_CHECKING:
    from scope.attribution.graph import CircuitGraph

__all__ = ["register"]


def register(graphs: typer.Typer) -> None:
    """Add the command to `scope graph`."""

    @command(graphs, "writes")
    def writes(
        graph: Annotated[Path, typer.Argument(help="A graph's file.")],
        target: Annotated[
            str | None, typer.Option(help="A next token of the graph, as it reads; by default its likeliest.")
        ] = None,
        top: Annotated[int, typer.Option(help="Features to show, those with the most influence.", min=1)] = 20,
        model: Annotated[str | None, typer.Option(help="The model, where the graph does not say.")] = None,
        transcoders: Annotated[
            list[str] | None, typer.Option(help="The transcoders, where they lie elsewhere than the graph says.")
        ] = None,
        sae: Annotated[str | None, typer.Option(help=GRAPH_SAE_HELP)] = None,
        device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")] = None,
        embeddings: EmbeddingsOption = "device",
        dictionaries: DictionariesOption = "device",
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """How strongly each feature of a graph writes each layer (one of a cross-layer transcoder writes several), and
        what that adds to a next token's logit: the layers' effects sum to the graph's edge."""
        from scope.attribution.graph_json import load_graph
        from scope.attribution.writes import layer_writes

        read = load_graph(graph)
        logit = _logit(read, target)
        paths = transcoder_paths(transcoders or list(read.transcoders))
        language_model, saes = opened(model or read.model_name, paths, device, allow_download, embeddings, dictionaries)
        features = read.nodes[read.nodes["kind"] == "feature"]
        chosen = features.sort_values("influence", ascending=False, kind="stable").head(top)
        finder = finder_of_graph(read, sae, paths, saes, allow_download)
        table = layer_writes(read, language_model, saes, chosen.index.tolist(), logit, saes=finder)
        label = str(read.nodes["label"].iloc[logit])
        found = [
            {
                **{name: node[name] for name in ("layer", "feature", "position", "activation", "influence")},
                "effect": float(own["effect"].sum()),
                "writes": own[["layer", "norm", "written", "effect"]].to_dict("records"),
            }
            for number, own in table.groupby("node", sort=False)
            for node in [read.nodes.iloc[int(str(number))].to_dict()]
        ]
        lines = [f"What is added to the logit of {label!r}, and by way of which layers:"]
        for one in found:
            layers = "  ".join(
                f"L{row['layer']} {row['effect']:+.3g} (norm {row['norm']:.3g})" for row in one["writes"]
            )
            lines.append(
                f"L{one['layer']} feature {one['feature']} at {one['position']}: {one['effect']:+.3g} = {layers}"
            )
        return Outcome({"graph": str(graph), "target": label, "features": found}, "\n".join(lines))


def _logit(graph: "CircuitGraph", target: str | None) -> int:
    """The number of the logit of a next token.

    Raises:
        UnknownNameError: the graph explains no such token.
    """
    logits: Any = graph.nodes[graph.nodes["kind"] == "logit"]
    if target is None:
        return int(logits["probability"].idxmax())
    labels = [str(label) for label in logits["label"]]
    if target not in labels:
        raise UnknownNameError("next token of the graph", target, labels)
    return int(logits.index[labels.index(target)])
