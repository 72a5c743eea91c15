"""Parts of the circuit page: the list of graphs, the form that makes one, a graph's frame, what verifying has found."""

import json
from collections.abc import Sequence
from shlex import quote
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
from dash import dcc, html

from dashboards.circuits import Thresholds
from dashboards.components import states
from dashboards.components.charts import chart
from dashboards.components.circuit_edge import test_part
from dashboards.components.controls import button, code, define, link_button
from dashboards.components.progress import progress_box
from dashboards.components.stats import stat, stats
from dashboards.dictionaries import Dictionary
from dashboards.format import count, exact, number, percent
from dashboards.links import circuit_link
from scope.figures import Theme, verification_scatter
from scope.figures.text import visible_token
from scope.interventions.words import spec_words
from scope.sample import text_of_commands

if TYPE_CHECKING:
    import pandas as pd

    from scope.attribution.graph import CircuitGraph
    from scope.attribution.verdicts import Verdicts
    from scope.attribution.verification import Verification
    from scope.workspace import Entry

__all__ = ["graph_table", "graph_view", "make_form", "missing_part", "verification"]

PAGE_FEATURES = 1024
"""Feature nodes that a graph made on the page has, at most, unless more are asked for."""
SCATTER_HEIGHT = 360
CONTROLS = (
    ("model", "In the model", "Nothing frozen"),
    ("random", "Random features", "Other features of the same layers written in their place"),
    ("attention_frozen", "Attention frozen", "Attention patterns held: nearer to how the graph was made, no evidence"),
)
TRAIN = (
    "scope train --model gemma-3-270m --data {text} --shuffle-seed 0 --arch transcoder "
    "--hook 'blocks.*.ln2.hook_out' --hook-out 'blocks.*.hook_mlp_out' {size} --out {workspace}/saes"
)
"""Transcoders of every layer, from one pass over a text."""
FULL = "--d-sae 16384 --k 50 --tokens 24000000 --batch-size 4096 --max-norm-ratio 100 --device cuda"
SMALL = "--d-sae 512 --k 16 --max-tokens 24000 --tokens 20000 --batch-size 512 --evaluate-tokens 1500"
MAKE = (
    'scope graph --model gemma-3-270m --transcoders {workspace}/saes --prompt "The opposite of hot is" '
    "--out {workspace}/graphs/opposite.json"
)


def graph_table(entries: "Sequence[Entry]", verified: set[str]) -> html.Div:
    """The graphs of a workspace; `verified` are the ids of those that were."""
    rows = [
        html.Tr(
            [
                html.Td(html.Strong(html.A(html.Bdi(entry.name), href=circuit_link(entry.id)))),
                html.Td(_what_is_explained(entry)),
                html.Td(entry.manifest["model"] or "–"),
                html.Td(count(entry.manifest["features"]), className="number"),
                html.Td(count(entry.manifest["edges"]), className="number"),
                html.Td("yes" if entry.id in verified else "no"),
            ]
        )
        for entry in entries
    ]
    names = ("Name", "Prompt", "Model", "Features", "Edges", "Verified")
    head = html.Thead(html.Tr([html.Th(name, className="number" if name in names[3:5] else None) for name in names]))
    table = html.Table([head, html.Tbody(rows)], className="table")
    return html.Div(table, className="scroll", tabIndex=0, role="region", **{"aria-label": "Circuit graphs"})


def _what_is_explained(entry: "Entry") -> list[Any]:
    """The prompt of a graph, and the interventions that it is under."""
    under = entry.manifest["interventions"]
    prompt = html.Bdi(entry.manifest["prompt"])
    return [prompt, html.Div(["Under ", html.Bdi(under)], className="muted small circuit-under")] if under else [prompt]


def make_form(known: Sequence[Dictionary], workspace: str, kept: Sequence[str] = ()) -> html.Section:
    """The form that makes a graph, or what to do where there is nothing to make it with; `kept` are the names of the
    interventions of the workspace."""
    if not known:
        return html.Section(
            className="state",
            children=[
                html.H2("Make a graph"),
                html.P(
                    "A graph explains a next token through transcoders, which stand in for the model's MLPs. This "
                    "workspace has none. Train one for every layer, all from one pass over a text, on a GPU:",
                    className="muted",
                ),
                code(_train(workspace, FULL)),
                html.P("Or small ones, in some minutes of a CPU, to see how it goes:", className="muted"),
                code(_train(workspace, SMALL)),
                html.P("Then make a graph here, or on the command line:", className="muted"),
                code(MAKE.format(workspace=quote(workspace))),
            ],
        )
    # One for each layer of the first model; a cross-layer one where there are no others.
    model = known[0].model
    chosen: dict[tuple[int, ...], str] = {}
    for one in known:
        if one.model == model and (not one.across or not chosen):
            chosen.setdefault(one.layers, one.entry.id)
    groups: dict[str, list[dict[str, str]]] = {}
    for one in known:
        where = f"L{one.layers[0]} to L{one.layers[-1]}, cross-layer" if one.across else f"L{one.layers[0]}"
        label = f"{where} · {one.entry.name} ({one.about})"
        groups.setdefault(one.model or "unknown model", []).append({"value": one.entry.id, "label": label})
    return html.Section(
        className="circuit-make",
        children=[
            html.H2("Make a graph"),
            html.P(
                "What a graph can say depends on its transcoders: a layer without one is an error node, and so is what "
                "they miss.",
                className="muted small",
            ),
            dmc.Textarea(
                id="circuit-prompt",
                label="Text whose next token is explained",
                placeholder="The opposite of hot is",
                autosize=True,
                minRows=1,
                maxRows=6,
            ),
            dmc.MultiSelect(
                id="circuit-transcoders",
                label="Transcoders, one for each layer; or one cross-layer transcoder",
                data=[{"group": name, "items": items} for name, items in groups.items()],
                value=list(chosen.values()),
                searchable=True,
                comboboxProps={"shadow": "md"},
            ),
            html.Div(
                className="circuit-make-line",
                children=[
                    dmc.TextInput(
                        id="circuit-targets",
                        label="Next tokens to explain, separated by commas",
                        placeholder="the likeliest",
                    ),
                    dmc.NumberInput(
                        id="circuit-max-features", label="Feature nodes, at most", value=PAGE_FEATURES, min=1, step=256
                    ),
                ],
            ),
            dmc.Select(
                id="circuit-interventions",
                label="Interventions that are in force in the model, as named on the steering page",
                data=list(kept),
                placeholder="none" if kept else "none are kept yet",
                disabled=not kept,
                clearable=True,
                searchable=True,
                comboboxProps={"shadow": "md"},
            ),
            html.Div([button("Make the graph", id="circuit-make-run", className="main-action")], className="chips"),
            progress_box("circuit-make"),
            html.Div(id="circuit-make-result"),
            html.Details(
                className="small muted",
                children=[
                    html.Summary("On the command line"),
                    code(MAKE.format(workspace=quote(workspace))),
                ],
            ),
        ],
    )


def _train(workspace: str, size: str) -> str:
    """The command that trains transcoders on the sample text, or, where it is not installed, on a text of one's own."""
    return TRAIN.format(workspace=quote(workspace), text=quote(text_of_commands()), size=size)


def graph_view(
    entry: "Entry", graph: "CircuitGraph", thresholds: Thresholds, verified: Any, missing: Any = None
) -> html.Div:
    """A graph: the picture, which assets/49_circuit_page.js draws, what is pinned beside it, what holds of it below;
    `missing` says which transcoders it lacks (`missing_part`)."""
    from scope.attribution.pruning import scores

    found = scores(graph)
    given = {"graph": entry.id, "name": entry.name, "thresholds": thresholds._asdict()}
    logits = graph.nodes[graph.nodes["kind"] == "logit"]
    place = int(logits["probability"].to_numpy().argmax())
    likeliest, share = str(logits["label"].iloc[place]), float(logits["probability"].iloc[place])
    return html.Div(
        className="circuit-page",
        children=[
            html.Header(
                className="page-head",
                children=[
                    html.H1([html.Bdi(entry.name)]),
                    define("circuit_graph"),
                    link_button("All graphs", href=circuit_link()),
                ],
            ),
            html.P([html.Q(html.Bdi(entry.manifest["prompt"])), f" in {graph.model_name or 'an unnamed model'}"]),
            *([html.P(["Under interventions: ", html.Bdi(spec_words(graph.spec))])] if graph.spec else []),
            missing,
            stats(
                [
                    stat(
                        "likeliest next token",
                        f"“{likeliest.strip() or visible_token(likeliest)}”",
                        note=percent(share),
                    ),
                    stat("replacement", number(found.replacement), term="replacement", title=exact(found.replacement)),
                    stat(
                        "completeness", number(found.completeness), term="completeness", title=exact(found.completeness)
                    ),
                    stat("features that fire", count(graph.n_active)),
                ]
            ),
            html.Div(
                className="columns circuit-columns",
                children=[
                    html.Div(
                        className="circuit",
                        role="region",
                        **{"data-circuit": json.dumps(given), "aria-label": "The circuit"},
                        children=states.skeleton(34, 560),
                    ),
                    html.Aside(
                        [
                            html.Div(id="circuit-panel", className="circuit-panel"),
                            html.Section(
                                id="circuit-edge-part",
                                className="circuit-edge",
                                hidden=True,
                                children=[
                                    test_part(),
                                    html.Div([progress_box("circuit-heads"), html.Div(id="circuit-heads-result")]),
                                ],
                            ),
                        ],
                        **{"aria-label": "What is pinned"},
                    ),
                    html.Section(
                        id="circuit-pairs-part",
                        className="circuit-pairs",
                        hidden=True,
                        children=[progress_box("circuit-pairs"), html.Div(id="circuit-pairs-result")],
                    ),
                ],
            ),
            html.Section(
                className="circuit-verification",
                children=[
                    html.Header(
                        className="page-head",
                        children=[html.H2("Does it hold in the model?"), define("verification")],
                    ),
                    html.P(
                        "A graph is exact about a copy of the model with attention and norms frozen. Of the model "
                        "itself it is a hypothesis: each feature is set to 0 and to twice its value in the real model, "
                        "and what changes behind it is compared with what the graph predicts.",
                        className="muted small circuit-words",
                    ),
                    html.Div([button("Verify", id="circuit-verify-run")], className="chips"),
                    progress_box("circuit-verify"),
                    html.Div(verified, id="circuit-verify-result"),
                ],
            ),
            dcc.Store(id="circuit-view", data={"graph": entry.id}),
            dcc.Store(id="circuit-edge"),
            dcc.Store(id="circuit-head"),
            dcc.Store(id="circuit-groups"),
            dcc.Store(id="circuit-saved"),
        ],
    )


def missing_part(missing: Sequence[str], n: int, workspace: str) -> html.Div | None:
    """What a graph of `n` transcoders cannot show because some lie elsewhere, and the command that takes them in."""
    if not missing:
        return None
    paths = " ".join(quote(path) for path in missing)
    verb = "is" if len(missing) == 1 else "are"
    which = (
        f"Its transcoders {verb}"
        if len(missing) == n > 1
        else f"{count(len(missing))} of its {count(n)} transcoders {verb}"
    )
    return html.Div(
        className="circuit-words",
        children=[
            html.P(
                f"{which} not in this workspace: their features have no names and no examples, and the model cannot be "
                "asked about the graph. Take them in:",
                className="muted small",
            ),
            code(f'for one in {paths}; do scope workspace add "$one" --workspace {quote(workspace)}; done'),
        ],
    )


def verification(found: "Verification", judged: "Verdicts", theme: Theme) -> html.Div:
    """What verifying a graph has found: agreement beside its controls, the scatter, how much holds."""
    rows = []
    for name, title, words in CONTROLS:
        part = getattr(found, name)
        rows.append(
            html.Tr(
                [
                    html.Th(title, scope="row", title=words),
                    html.Td(number(part.slope), className="number", title=exact(part.slope)),
                    html.Td(number(part.correlation), className="number", title=exact(part.correlation)),
                    html.Td(percent(part.sign_agreement), className="number", title=exact(part.sign_agreement)),
                    html.Td(count(part.n), className="number"),
                ]
            )
        )
    terms = (("Slope", "slope"), ("Correlation", "correlation"), ("Signs agree", "sign_agreement"), ("Pairs", None))
    head = html.Tr(
        [
            html.Th("Measured against predicted", scope="col"),
            *(
                html.Th([name, *([" ", define(term)] if term else [])], className="number", scope="col")
                for name, term in terms
            ),
        ]
    )
    nodes, pairs = judged.nodes, judged.pairs
    return html.Div(
        className="circuit-verified",
        children=[
            stats(
                [
                    stat(
                        "features that hold",
                        _of(nodes["holds"]),
                        term="holds",
                        note=f"random: {_of(nodes['holds_random'])}",
                    ),
                    stat(
                        "effects that hold",
                        _of(pairs["holds"]),
                        term="holds",
                        note=f"random: {_of(pairs['holds_random'])}",
                    ),
                ]
            ),
            html.Div(
                html.Table([html.Thead(head), html.Tbody(rows)], className="table circuit-agreement"),
                className="scroll",
                tabIndex=0,
                role="region",
                **{"aria-label": "Agreement of measured and predicted changes"},
            ),
            chart(
                verification_scatter(found.pairs, theme=theme),
                id="circuit-scatter",
                height=SCATTER_HEIGHT,
                words="Measured against predicted changes, in the model and with random features",
            ),
            html.P(
                "Dots: the sign is as predicted. Crosses: it is not. On the dotted line measured and predicted are "
                "equal. A point is one intervention on one feature and one node behind it.",
                className="muted small",
            ),
        ],
    )


def _of(holds: "pd.Series[bool]") -> str:
    return f"{count(int(holds.sum()))} of {count(len(holds))}"
