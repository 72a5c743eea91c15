"""`scope attribute` and `scope graph`: who caused this token, feature by feature, and through which circuit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from scope.attribution.graph_settings import GraphSettings
from scope.cli import graph_writes
from scope.cli._command import Outcome, command, progress_bar
from scope.cli._dictionaries import DictionariesOption, transcoder_paths
from scope.cli._dictionaries import opened as opened_with
from scope.cli._interventions import (
    GRAPH_SAE_HELP,
    SPEC_HELP,
    SaeFinder,
    declared,
    finder_of_graph,
    maxima_of,
    with_addresses,
)
from scope.cli._model import EmbeddingsOption
from scope.cli.sae import SAE_HELP, DownloadOption

if TYPE_CHECKING:
    from scope.attribution.graph import CircuitGraph

__all__ = ["register"]

ModelOption = Annotated[str, typer.Option(help="A Hugging Face id, a folder, a GGUF file, or gemma-3-270m.")]
DeviceOption = Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the best there is.")]
GraphSaeOption = Annotated[str | None, typer.Option(help=GRAPH_SAE_HELP)]


COMPONENTS = "components"
"""The method that is no difference to a baseline."""


class _MakesByDefault(TyperGroup):
    """`scope graph --model …` makes a graph; `scope graph verify …` does something with one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["make", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""

    @command(app, "attribute")
    def attribute(
        model: ModelOption,
        prompt: Annotated[str, typer.Option(help="The text.")],
        target: Annotated[
            str | None, typer.Option(help="The next token that is asked about, with its space: ' cold'.")
        ] = None,
        sae: Annotated[
            list[str] | None,
            typer.Option(
                help="Whose features are asked about; may be repeated. The method components works without one, too. "
                f"{SAE_HELP}"
            ),
        ] = None,
        against: Annotated[
            str | None, typer.Option(help="Another next token: the difference of their logits is explained.")
        ] = None,
        router: Annotated[
            str | None,
            typer.Option(
                metavar="LAYER:EXPERT",
                help="In the place of a next token: what the router of a layer gives an expert, relative to the mean "
                "over the experts.",
            ),
        ] = None,
        counterfactual: Annotated[
            str | None,
            typer.Option(help="A prompt of as many tokens that nodes are set against; without one they are set to 0."),
        ] = None,
        method: Annotated[
            str,
            typer.Option(
                help="activation_patching (exact), gradient_x_activation, attribution_patching, integrated_gradients "
                "or eap_ig; or components: the logit as a sum over what embedding, heads, MLPs (or their features) and "
                "biases wrote, the direct path alone."
            ),
        ] = "integrated_gradients",
        position: Annotated[int, typer.Option(help="After which token; -1 is the last.")] = -1,
        steps: Annotated[int, typer.Option(help="Of the methods that integrate.")] = 10,
        batch_size: Annotated[int, typer.Option(help="Runs at once.")] = 32,
        memory_gb: Annotated[
            float | None, typer.Option(help="Memory that it may take beside the model, in GB; by default what is free.")
        ] = None,
        top: Annotated[int, typer.Option(help="Rows to show.")] = 20,
        device: DeviceOption = None,
        embeddings: EmbeddingsOption = "device",
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Attribute a next token, or an expert's choice, to the features and errors of some SAEs, or a next token to
        the model's own components."""
        from scope.attribution.baselines import counterfactual as against_prompt
        from scope.attribution.baselines import zero
        from scope.attribution.methods import attribute as run
        from scope.attribution.targets import logit, logit_difference, router_logit
        from scope.errors import InvalidInputError

        if router is not None:
            if target is not None or against is not None or method == COMPONENTS:
                raise InvalidInputError(
                    "--router asks about one expert, and about features of SAEs: it takes no --target, no --against "
                    "and no --method components."
                )
            layer, expert = _layer_and_expert(router)
        elif target is None:
            raise InvalidInputError("Give what is asked about: --target TOKEN, or --router LAYER:EXPERT.")
        elif method == COMPONENTS:
            if counterfactual is not None:
                raise InvalidInputError(
                    "--method components takes no --counterfactual: it splits the logit itself, not its difference to "
                    "a baseline. Leave it out, or take another method."
                )
            opened, dictionaries = opened_with(
                model, transcoder_paths(sae) if sae else [], device, allow_download, embeddings
            )
            return _components(opened, prompt, target, against, dictionaries, position, top)
        if not sae:
            raise InvalidInputError(
                f"--method {method} needs an SAE whose features are asked about: --sae DIR. Without one there is "
                "--method components."
            )
        opened, saes = opened_with(model, sae, device, allow_download, embeddings)
        if target is None:
            asked = router_logit(opened, layer, expert, position)
        else:
            asked = logit(target, position) if against is None else logit_difference(target, against, position)
        baseline = zero() if counterfactual is None else against_prompt(counterfactual)
        with progress_bar("Attributing (runs)") as progress:
            found = run(
                opened,
                prompt,
                asked,
                saes,
                method,
                baseline,
                steps=steps,
                batch_size=batch_size,
                memory_gb=memory_gb,
                progress=progress,
            )
        rows = found.table.head(top)
        data = {
            "target": found.target,
            "value": found.value,
            "method": found.method,
            "baseline": found.baseline,
            "completeness": found.completeness,
            "seconds": round(found.seconds, 3),
            "effects": rows.to_dict("records"),
        }
        text = (
            f"{found.target} = {found.value:.4g} ({method}, {found.baseline} baseline)\n{rows.to_string(index=False)}"
        )
        for hook, share in found.completeness.items():
            text += f"\nThe effects at {hook} add up to {share:.1%} of the difference to the baseline."
        return Outcome(data, text)

    graphs = typer.Typer(
        cls=_MakesByDefault, help="Circuit graphs: make one, or verify one by intervention.", rich_markup_mode=None
    )
    app.add_typer(graphs, name="graph")
    graph_writes.register(graphs)

    @command(graphs, "make", config=GraphSettings)
    def make(
        model: ModelOption,
        transcoders: Annotated[
            list[str],
            typer.Option(help="A transcoder, or a folder with one for each layer; may be repeated."),
        ],
        prompt: Annotated[str, typer.Option(help="The text whose next token is explained.")],
        out: Annotated[Path, typer.Option(help="The graph's file, in circuit-tracer's JSON.")],
        config: GraphSettings,
        target: Annotated[
            list[str] | None, typer.Option(help="A next token to explain; by default the likeliest. May be repeated.")
        ] = None,
        spec: Annotated[str | None, typer.Option(help=f"Explain the model under interventions: {SPEC_HELP}")] = None,
        sae: Annotated[
            str | None,
            typer.Option(
                help="The SAE of the interventions' features, in place of those they name but for the transcoders. "
                f"{SAE_HELP}"
            ),
        ] = None,
        index: Annotated[
            Path | None, typer.Option(help="An index of that SAE, for values in multiples of a feature's maximum.")
        ] = None,
        workspace: Annotated[
            Path, typer.Option(help="Where named interventions lie, and the SAEs that they name.")
        ] = Path("workspace"),
        node_share: Annotated[float, typer.Option(help="Share of the nodes' influence that pruning keeps.")] = 0.8,
        edge_share: Annotated[float, typer.Option(help="Share of the edges' influence that pruning keeps.")] = 0.98,
        device: DeviceOption = None,
        embeddings: EmbeddingsOption = "device",
        dictionaries: DictionariesOption = "device",
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Explain a prompt's next token as a graph of features, pruned to what matters; with --spec of the model under
        interventions."""
        from dataclasses import replace

        from scope.attribution.graph import build_graph
        from scope.attribution.graph_json import require_place_for_graph, save_graph
        from scope.attribution.pruning import prune, require_shares, scores
        from scope.errors import InvalidInputError

        require_shares(node_share, edge_share)
        require_place_for_graph(out)
        if spec is None and (sae is not None or index is not None):
            raise InvalidInputError("--sae and --index are of the features of interventions; give those with --spec.")
        paths = transcoder_paths(transcoders)
        wanted = None if spec is None else declared(spec, workspace)
        opened, saes = opened_with(model, paths, device, allow_download, embeddings, dictionaries)
        finder = SaeFinder(sae, workspace, allow_download, dict(zip(paths, saes, strict=True)), opened.device)
        wanted = None if wanted is None else with_addresses(wanted, finder)
        with progress_bar("Expanding features") as progress:
            whole = build_graph(
                opened,
                prompt,
                saes,
                config,
                targets=target or (),
                spec=wanted,
                saes=finder,
                maxima=maxima_of(index, finder),
                progress=lambda step, done, total: progress(done, total) if total else None,
            )
        graph = replace(prune(whole, node_share, edge_share), transcoders=tuple(paths), model_name=model)
        save_graph(graph, out, node_share)
        before, after = scores(whole), scores(graph)
        counts = {kind: int(n) for kind, n in graph.nodes["kind"].value_counts().items()}
        data = {
            "out": str(out),
            "nodes": counts,
            "edges": len(graph.weight),
            "active_features": whole.n_active,
            "replacement": before.replacement,
            "completeness": before.completeness,
            "replacement_pruned": after.replacement,
            "completeness_pruned": after.completeness,
            **_spec_of(graph),
        }
        words = ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
        text = (
            f"{out}: {words} nodes, {len(graph.weight):,} edges, of {whole.n_active:,} features that fire.\n"
            f"Replacement {before.replacement:.3f} and completeness {before.completeness:.3f} before pruning, "
            f"{after.replacement:.3f} and {after.completeness:.3f} after it.\n"
            f"{_under(graph)}"
            f"Whether it holds in the model itself: scope graph verify {out}"
        )
        return Outcome(data, text)

    @command(graphs, "verify")
    def verify(
        graph: Annotated[Path, typer.Argument(help="A graph's file.")],
        model: Annotated[str | None, typer.Option(help="The model, where the graph does not say.")] = None,
        transcoders: Annotated[
            list[str] | None, typer.Option(help="The transcoders, where they lie elsewhere than the graph says.")
        ] = None,
        max_features: Annotated[int, typer.Option(help="Feature nodes to test, at most.")] = 256,
        sae: GraphSaeOption = None,
        edges: Annotated[
            bool, typer.Option("--edges", help="Test single edges by path patching, and not effects over all paths.")
        ] = False,
        seed: Annotated[int, typer.Option(help="Of the random control.")] = 0,
        device: DeviceOption = None,
        embeddings: EmbeddingsOption = "device",
        dictionaries: DictionariesOption = "device",
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Set each feature of a graph to 0 and to twice its value in the model itself, and compare with the graph."""
        from scope.attribution.graph_json import load_graph
        from scope.attribution.path_patching import path_patching, strongest_sources
        from scope.attribution.verification import verify as run

        read = load_graph(graph)
        paths = transcoder_paths(transcoders or list(read.transcoders))
        opened, saes = opened_with(model or read.model_name, paths, device, allow_download, embeddings, dictionaries)
        finder = finder_of_graph(read, sae, paths, saes, allow_download)
        with progress_bar("Intervening (runs)") as progress:
            if edges:
                sources = strongest_sources(read, max_features)
                found = path_patching(read, opened, saes, sources, saes=finder, seed=seed, progress=progress)
            else:
                found = run(read, opened, saes, saes=finder, max_features=max_features, seed=seed, progress=progress)
        lines = [
            f"{name:<18} slope {part.slope:6.3f}   correlation {part.correlation:6.3f}   signs agree "
            f"{part.sign_agreement:6.1%}   of {part.n:,} pairs"
            for name, part in (
                ("in the model", found.model),
                ("random features", found.random),
                ("attention frozen", found.attention_frozen),
            )
        ]
        return Outcome({**found.to_dict(), **_spec_of(read)}, _under(read) + "\n".join(lines))

    @command(graphs, "faithfulness")
    def faithfulness(
        graph: Annotated[Path, typer.Argument(help="A graph's file.")],
        target: Annotated[
            str | None, typer.Option(help="The next token that is to be kept; by default the graph's likeliest.")
        ] = None,
        against: Annotated[
            str | None, typer.Option(help="Another next token, for the difference of their logits.")
        ] = None,
        counterfactual: Annotated[
            str | None,
            typer.Option(help="A prompt of as many tokens whose values ablated nodes get; without one they get 0."),
        ] = None,
        sizes: Annotated[str | None, typer.Option(help="Features to keep, separated by commas.")] = None,
        draws: Annotated[int, typer.Option(help="Random circuits of each size.", min=0)] = 10,
        held: Annotated[
            bool,
            typer.Option("--held", help="Hold kept features at what they were, instead of computing them anew."),
        ] = False,
        model: Annotated[str | None, typer.Option(help="The model, where the graph does not say.")] = None,
        transcoders: Annotated[
            list[str] | None, typer.Option(help="The transcoders, where they lie elsewhere than the graph says.")
        ] = None,
        sae: GraphSaeOption = None,
        seed: Annotated[int, typer.Option(help="Of the random circuits.")] = 0,
        figure: Annotated[Path | None, typer.Option(help="Draw the curves into this HTML file.")] = None,
        device: DeviceOption = None,
        embeddings: EmbeddingsOption = "device",
        dictionaries: DictionariesOption = "device",
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Keep a graph's features with the most influence, ablate the rest, and see how much of the target is left:
        with error nodes kept and ablated, beside random features of the same number."""
        from scope.attribution.baselines import counterfactual as against_prompt
        from scope.attribution.baselines import zero
        from scope.attribution.circuit_curves import SIZES, graph_faithfulness
        from scope.attribution.graph_json import load_graph
        from scope.attribution.targets import logit, logit_difference
        from scope.errors import InvalidInputError

        if against is not None and target is None:
            raise InvalidInputError("--against needs --target: which token is to be kept.")
        read = load_graph(graph)
        paths = transcoder_paths(transcoders or list(read.transcoders))
        kept = SIZES if sizes is None else _whole_numbers(sizes)
        opened, saes = opened_with(model or read.model_name, paths, device, allow_download, embeddings, dictionaries)
        asked = None if target is None else logit(target) if against is None else logit_difference(target, against)
        with progress_bar("Ablating (runs)") as progress:
            found = graph_faithfulness(
                read,
                opened,
                saes,
                asked,
                zero() if counterfactual is None else against_prompt(counterfactual),
                kept,
                saes=finder_of_graph(read, sae, paths, saes, allow_download),
                n_random=draws,
                recompute=not held,
                seed=seed,
                progress=progress,
            )
        if figure is not None:
            from scope.figures.circuits import faithfulness_curves

            faithfulness_curves(found.table).write_html(figure)
        table = found.table.to_string(index=False, float_format=lambda number: f"{number:.3f}")
        text = f"{_under(read)}{found.target} = {found.value:.4g} in the model, {found.baseline} baseline\n{table}"
        return Outcome({**found.to_dict(), **_spec_of(read)}, text)


def _under(graph: "CircuitGraph") -> str:
    """A line that says under which interventions the model is; "" where there are none."""
    from scope.interventions.words import spec_words

    return "" if graph.spec is None else f"Under interventions: {spec_words(graph.spec)}\n"


def _spec_of(graph: "CircuitGraph") -> dict[str, Any]:
    return {} if graph.spec is None else {"spec": graph.spec.to_dict()}


def _layer_and_expert(router: str) -> tuple[int, int]:
    from scope.errors import InvalidInputError

    layer, _, expert = router.partition(":")
    if not (layer.isdigit() and expert.isdigit()):
        raise InvalidInputError(f"--router is {router!r}; expected LAYER:EXPERT, such as 3:17.")
    return int(layer), int(expert)


def _components(
    model: Any, prompt: str, target: str, against: str | None, dictionaries: list[Any], position: int, top: int
) -> Outcome:
    from scope.attribution.components import logit_components

    found = logit_components(model, prompt, target, against, dictionaries, position)
    rows = found.table.head(top).astype(object)
    rows = rows.where(rows.notna(), None)
    summed = found.by_component()
    data = {
        "target": found.target,
        "value": found.value,
        "method": COMPONENTS,
        "position": found.position,
        "effects": rows.to_dict("records"),
        "by_component": summed.to_dict("records"),
    }
    text = (
        f"{found.target} = {found.value:.4g}, the sum over {len(found.table):,} components\n"
        f"{found.table.head(top).to_string(index=False, na_rep='')}\n\n{summed.to_string(index=False)}"
    )
    return Outcome(data, text)


def _whole_numbers(text: str) -> tuple[int, ...]:
    from scope.errors import InvalidInputError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise InvalidInputError(f"sizes is {text!r}; expected whole numbers separated by commas, such as 1,10,100.")
    return tuple(int(part) for part in parts)
