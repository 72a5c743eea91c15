"""The workspace: models, stores, SAEs, indexes, trainings, graphs, comparisons: how good they are, what they were made
from, and whether their bytes are what was written (asked for with a button, read in a thread of its own)."""

from typing import Any

from dash import Dash, html

from dashboards.artefacts import Artefact, Model, describe, models
from dashboards.components import states, verify
from dashboards.components.controls import code, link_button
from dashboards.components.stats import interval, stat, stats
from dashboards.components.tables import stacking_table
from dashboards.context import Context
from dashboards.format import count, exact, number, percent, plural
from dashboards.links import (
    View,
    circuit_link,
    compare_link,
    features_link,
    model_link,
    prompt_link,
    training_link,
)
from dashboards.pages import Page
from dashboards.trainings import settings_in_words
from dashboards.verifications import Verifier
from scope.errors import ScopeError
from scope.training.runs import Run, RunState

__all__ = ["register", "render"]

RUNS = 8
"""Finished trainings that are listed, at most."""
HEALTH = {RunState.RUNNING: "running", RunState.FINISHED: "good", RunState.STOPPED: "bad", RunState.LOST: "bad"}
UNITS = (("d_sae", "features"), ("rows", "tokens"), ("documents", "documents"), ("trained_on", "tokens of training"))


def render(context: Context, view: View) -> Page:
    """The page of the whole workspace."""
    workspace, verifier = context.workspace, verify.verifier_of(context)
    indexes = [_described_index(context, entry) for entry in workspace.indexes()]
    saes = [describe(workspace, entry) for entry in workspace.saes()]
    stores = [_described_store(context, entry) for entry in workspace.stores()]
    runs, graphs, diffs = workspace.trainings(), workspace.graphs(), workspace.entries("model-diff")
    parts: list[Any] = [html.H1("Workspace"), html.P(html.Code(str(workspace.path)), className="muted small")]
    if not (indexes or saes or stores or runs or graphs or diffs):
        parts.append(
            states.empty(
                "Nothing here yet",
                "A workspace holds activation stores, the SAEs trained on them, and the feature indexes that this "
                "dashboard shows. The demo makes one of each from Gemma 3 270M in a few minutes.",
                command=f"scope demo {workspace.path}",
            )
        )
    else:
        parts.append(_indexes(verifier, indexes))
        parts += _table(
            verifier, "SAEs", saes, "scope train STORE --hook NAME --arch topk --d-sae 4096 --k 32 --out SAE_DIR"
        )
        parts += _table(
            verifier,
            "Activation stores",
            stores,
            "scope capture --model gemma-3-270m --data FILE --hook NAME --out STORE",
        )
        parts += [_trainings(runs, saes), _models(models([*stores, *indexes]), indexes), _graphs(graphs)]
        parts += _diffs(diffs)
        parts.append(verify.verify_poll(verifier, [artefact.entry for artefact in (*indexes, *saes, *stores)]))
    return Page(html.Div(parts, className="workspace-page"), "Workspace", "workspace")


def register(app: Dash, context: Context) -> None:
    """Verifying on demand."""
    verify.register(app, context)


def _described_index(context: Context, entry: Any) -> Artefact:
    if entry.problem is None:
        try:
            return describe(context.workspace, entry, context.index(entry.id))
        except (ScopeError, OSError, KeyError, ValueError) as problem:
            return Artefact(entry, entry.manifest, (), str(problem))
    return describe(context.workspace, entry)


def _described_store(context: Context, entry: Any) -> Artefact:
    """A store's tables take a while to read: once for each state of its ledger."""
    known: dict[Any, Artefact] = context.once("stores", dict)
    ledger = entry.path / "ledger"
    try:
        state = (entry.id, max(path.stat().st_mtime_ns for path in (ledger, *ledger.iterdir())))
    except (OSError, ValueError):
        return describe(context.workspace, entry)
    if state not in known:
        known[state] = describe(context.workspace, entry)
    return known[state]


def _indexes(verifier: Verifier, indexes: list[Artefact]) -> Any:
    if not indexes:
        return html.Section([html.H2("Feature indexes"), states.no_index()])
    return html.Section(
        [html.H2("Feature indexes"), html.Div([_index_card(verifier, index) for index in indexes], className="cards")]
    )


def _index_card(verifier: Verifier, index: Artefact) -> html.Article:
    if index.problem:
        return html.Article(
            className="card",
            children=[html.H3(index.entry.name), html.Div([_health(index), " ", index.problem], className="small")],
        )
    facts = index.facts
    link = features_link(index.entry.id)
    return html.Article(
        className="card",
        children=[
            html.Header([html.H3(html.A(facts["name"], href=link)), _health(index)]),
            html.P(
                [
                    facts["model"],
                    " · ",
                    html.Code(facts["hook"]),
                    f" · {facts['sae']}",
                ],
                className="muted small",
            ),
            stats(_quality(facts)),
            html.P(
                f"{count(facts['n_firings'])} firings on {count(facts['n_rows'])} tokens of "
                f"{count(facts['n_documents'])} documents in {len(facts['languages'])} languages"
                + (f"; examples over {count(facts['excerpt_rows'])} tokens" if facts["excerpt_rows"] else ""),
                className="small muted",
            ),
            html.Div(
                [
                    link_button("Look at features", href=link, className="main-action"),
                    link_button("Try a prompt", href=prompt_link(index.entry.id)),
                ],
                className="chips",
            ),
            *(
                html.P(f"Built although it does not fit: {mismatch}", className="small warning")
                for mismatch in facts["mismatches"]
            ),
            verify.verify_box(verifier, index.entry),
            _provenance(index),
        ],
    )


def _quality(facts: Any) -> list[html.Div]:
    metrics = facts["metrics"]
    shown = []
    for name, term, title in (
        ("fvu", "fvu", "fvu"),
        ("l0", "l0", "l0"),
        ("delta_ce", "delta_ce", "delta CE"),
        ("ce_recovered", "ce_recovered", "CE recovered"),
    ):
        if metrics.get(name) is not None:
            unit = " nats" if name == "delta_ce" else ""
            ends = metrics.get(f"{name}_interval")
            drawn = interval(ends[0], metrics[name], ends[1]) if ends else None
            shown.append(stat(title, number(metrics[name]) + unit, term=term, title=exact(metrics[name]), note=drawn))
    d_sae = facts["d_sae"]
    shown.append(stat("dead", percent(facts["dead"] / d_sae), term="dead", title=f"{count(facts['dead'])} features"))
    shown.append(
        stat(
            "over-dense",
            percent(facts["over_dense"] / d_sae),
            term="over_dense",
            title=f"{count(facts['over_dense'])} features",
        )
    )
    return shown


def _health(artefact: Artefact) -> html.Span:
    if artefact.problem:
        return html.Span("cannot be read", className="health bad")
    if artefact.facts.get("complete") is False:
        return html.Span("not complete; capturing again goes on", className="health bad")
    return html.Span("readable", className="health good")


def _provenance(artefact: Artefact) -> html.Details:
    manifest = artefact.entry.manifest
    rows = [
        ("id", html.Code(artefact.entry.id)),
        ("made by", manifest.get("created_by", "unknown")),
        ("format", f"{manifest.get('format')} {manifest.get('version')}"),
        ("made from", _parents(artefact)),
        ("folder", html.Code(str(artefact.entry.path))),
    ]
    return html.Details(
        className="provenance",
        children=[
            html.Summary("Provenance", className="small muted"),
            html.Dl([part for name, value in rows for part in (html.Dt(name), html.Dd(value))]),
        ],
    )


def _parents(artefact: Artefact) -> str:
    known = list(artefact.facts.get("files", ()))
    missing = len(artefact.entry.manifest.get("parents", ())) - len(artefact.parents)
    known += [f"{parent.name} ({parent.id})" for parent in artefact.parents]
    if missing > 0:
        known.append(f"{missing} not in this workspace")
    return ", ".join(known) or "nothing recorded"


def _table(verifier: Verifier, title: str, artefacts: list[Artefact], command: str) -> list[Any]:
    if not artefacts:
        return [
            html.Section(
                [html.H2(title), html.P("None here. One is made with:", className="muted small"), code(command)]
            )
        ]
    rows = [
        [
            html.Strong(html.Bdi(artefact.entry.name)),
            html.Code(artefact.entry.id or "–"),
            _describe_row(artefact),
            _parents(artefact) if not artefact.problem else "",
            [_health(artefact), *([] if artefact.problem else [verify.verify_box(verifier, artefact.entry)])],
        ]
        for artefact in artefacts
    ]
    names = ("Name", "Id", "What it is", "Made from", "Health")
    return [html.Section([html.H2(title), stacking_table(title, names, rows)])]


def _describe_row(artefact: Artefact) -> Any:
    if artefact.problem:
        return artefact.problem
    facts = artefact.facts
    words = [str(facts["model"])] if facts.get("model") else []
    words += [f"{count(facts[name])} {unit}" for name, unit in UNITS if isinstance(facts.get(name), int)]
    hooks = [html.Code(hook) for hook in facts.get("hooks", ())]
    return html.Span([part for item in [*words, *hooks] for part in (" · ", item)][1:])


def _scrolling(title: str, table: html.Table) -> html.Div:
    return html.Div(table, className="scroll", tabIndex=0, role="region", **{"aria-label": title})


def _trainings(runs: list[Run], saes: list[Artefact]) -> html.Section:
    head = html.Header([html.H2("Trainings"), html.A("Curves", href=training_link(), className="small")])
    if not runs:
        words = "None whose SAE lies, or will lie, in this workspace. scope train, as above, shows here while it runs."
        return html.Section([head, html.P(words, className="muted small")])
    shown = [run for run in runs if run.state is not RunState.FINISHED]
    shown += [run for run in runs if run.state is RunState.FINISHED][: max(0, RUNS - len(shown))]
    rows = [
        [
            html.Strong(html.A(html.Bdi(run.name), href=training_link(run.id))),
            html.Code(run.id),
            [html.Code(run.hook), " ", settings_in_words(run.settings)],
            _made(run, saes),
            html.Span(run.state.value, className=f"health {HEALTH[run.state]}", title=run.problem),
        ]
        for run in shown
    ]
    names = ("Name", "Id", "What it is", "What it made", "Health")
    parts: list[Any] = [head, stacking_table("Trainings", names, rows)]
    if len(runs) > len(shown):
        parts.append(html.A(f"All {len(runs):,}", href=training_link(), className="small"))
    return html.Section(parts)


def _made(run: Run, saes: list[Artefact]) -> str:
    """The SAE of a finished run; what one that is not finished has kept so far."""
    kept = f"{plural(len(run.snapshots), 'snapshot')}" if run.snapshots else ""
    if run.sae:
        name = next((sae.entry.name for sae in saes if sae.entry.id == run.sae), "an SAE that is not here any more")
        return ", ".join(filter(None, [f"{name} ({run.sae})", kept]))
    last = f"a checkpoint of step {count(run.checkpoint.steps)}" if run.checkpoint else ""
    return ", ".join(filter(None, [last, kept])) or "nothing yet"


def _models(found: list[Model], indexes: list[Artefact]) -> html.Section:
    """Each with the way to its parameters, where an index says how to load it."""
    if not found:
        words = "None: models are known by the stores and indexes made with them."
        return html.Section([html.H2("Models"), html.P(words, className="muted small")])
    rows = [
        [
            html.Strong(_model_name(model, indexes)),
            html.Code(model.weight_hash[:12] or "not recorded", title=model.weight_hash or None),
            model.revision or "–",
            ", ".join(model.used_by),
            html.Span("weights recorded; others are refused", className="health good")
            if model.weight_hash
            else html.Span("only its name is known", className="health bad"),
        ]
        for model in found
    ]
    return html.Section(
        [html.H2("Models"), stacking_table("Models", ("Name", "Weights", "Revision", "Used by", "Health"), rows)]
    )


def _model_name(model: Model, indexes: list[Artefact]) -> Any:
    name = html.Bdi(model.name)
    for index in indexes:
        if index.entry.name in model.used_by and str(index.facts.get("weight_hash") or "") == model.weight_hash:
            return html.A(name, href=model_link(index.entry.id), title="Its parameters, embeddings and experts")
    return name


def _graphs(found: list[Any]) -> html.Section:
    if not found:
        words = "None. They are made on the page Circuit, or by scope graph into the workspace's folder graphs."
        return html.Section([html.H2("Circuit graphs"), html.P(words, className="muted small")])
    rows = [html.Tr([html.Td(cell) for cell in _graph_cells(entry)]) for entry in found]
    head = html.Thead(html.Tr([html.Th(name) for name in ("Name", "Id", "What it is", "File")]))
    return html.Section(
        [
            html.H2("Circuit graphs"),
            _scrolling("Circuit graphs", html.Table([head, html.Tbody(rows)], className="table")),
        ]
    )


def _diffs(found: list[Any]) -> list[html.Section]:
    """The comparisons of two models; nothing where there are none."""
    if not found:
        return []
    rows = [
        html.Tr(
            [
                html.Td(html.Strong(html.A(html.Bdi(entry.name), href=compare_link(diff=entry.id)))),
                html.Td(html.Code(entry.id) if entry.problem is None else "–"),
                html.Td(html.Span(entry.problem, className="health bad wrapping") if entry.problem else "readable"),
            ]
        )
        for entry in found
    ]
    head = html.Thead(html.Tr([html.Th(name) for name in ("Name", "Id", "Health")]))
    table = html.Table([head, html.Tbody(rows)], className="table")
    return [html.Section([html.H2("Comparisons of two models"), _scrolling("Comparisons of two models", table)])]


def _graph_cells(entry: Any) -> list[Any]:
    name, file = html.Bdi(entry.name), html.Code(entry.path.name)
    if entry.problem is not None:
        return [html.Strong(name), "–", html.Span(entry.problem, className="health bad wrapping"), file]
    facts = entry.manifest
    words = f"{plural(facts['features'], 'feature')} · {plural(facts['edges'], 'edge')} · {facts['model']}"
    link = html.Strong(html.A(name, href=circuit_link(entry.id)))
    return [link, html.Code(entry.id), [html.Q(html.Bdi(facts["prompt"])), html.Br(), words], file]
