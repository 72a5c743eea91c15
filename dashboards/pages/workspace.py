"""The workspace: its indexes, SAEs and stores, how good they are, what they were made from."""

from typing import Any

from dash import html

from dashboards.artefacts import Artefact, describe
from dashboards.components import states
from dashboards.components.controls import code, link_button
from dashboards.components.stats import interval, stat, stats
from dashboards.context import Context
from dashboards.format import count, exact, number, percent
from dashboards.links import View, features_link, prompt_link
from dashboards.pages import Page
from scope.errors import ScopeError

__all__ = ["render"]

UNITS = (("d_sae", "features"), ("rows", "tokens"), ("documents", "documents"), ("trained_on", "tokens of training"))


def render(context: Context, view: View) -> Page:
    """The page of the whole workspace."""
    indexes = [_described_index(context, entry) for entry in context.workspace.indexes()]
    saes = [describe(context.workspace, entry) for entry in context.workspace.saes()]
    stores = [describe(context.workspace, entry) for entry in context.workspace.stores()]
    parts: list[Any] = [html.H1("Workspace"), html.P(html.Code(str(context.workspace.path)), className="muted small")]
    if not (indexes or saes or stores):
        parts.append(
            states.empty(
                "Nothing here yet",
                "A workspace holds activation stores, the SAEs trained on them, and the feature indexes that this "
                "dashboard shows. The demo makes one of each from Gemma 3 270M in a few minutes.",
                command=f"scope demo {context.workspace.path}",
            )
        )
    else:
        parts.append(_indexes(indexes))
        parts += _table("SAEs", saes, "scope train STORE --hook NAME --arch topk --d-sae 4096 --k 32 --out SAE_DIR")
        parts += _table(
            "Activation stores", stores, "scope capture --model gemma-3-270m --data FILE --hook NAME --out STORE"
        )
    return Page(html.Div(parts, className="workspace-page"), "Workspace", "workspace")


def _described_index(context: Context, entry: Any) -> Artefact:
    if entry.problem is None:
        try:
            return describe(context.workspace, entry, context.index(entry.id))
        except (ScopeError, OSError, KeyError, ValueError) as problem:
            return Artefact(entry, entry.manifest, (), str(problem))
    return describe(context.workspace, entry)


def _indexes(indexes: list[Artefact]) -> Any:
    if not indexes:
        return html.Section([html.H2("Feature indexes"), states.no_index()])
    return html.Section(
        [html.H2("Feature indexes"), html.Div([_index_card(index) for index in indexes], className="cards")]
    )


def _index_card(index: Artefact) -> html.Article:
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
                f"{count(facts['n_documents'])} documents in {len(facts['languages'])} languages",
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


def _table(title: str, artefacts: list[Artefact], command: str) -> list[Any]:
    if not artefacts:
        return [
            html.Section(
                [html.H2(title), html.P("None here. One is made with:", className="muted small"), code(command)]
            )
        ]
    rows = [
        html.Tr(
            [
                html.Td(html.Strong(artefact.entry.name)),
                html.Td(html.Code(artefact.entry.id or "–")),
                html.Td(_describe_row(artefact)),
                html.Td(_parents(artefact) if not artefact.problem else ""),
                html.Td(_health(artefact)),
            ]
        )
        for artefact in artefacts
    ]
    head = html.Thead(html.Tr([html.Th(name) for name in ("Name", "Id", "What it is", "Made from", "Health")]))
    return [
        html.Section(
            [html.H2(title), html.Div(html.Table([head, html.Tbody(rows)], className="table"), className="scroll")]
        )
    ]


def _describe_row(artefact: Artefact) -> Any:
    if artefact.problem:
        return artefact.problem
    facts = artefact.facts
    words = [str(facts["model"])] if facts.get("model") else []
    words += [f"{count(facts[name])} {unit}" for name, unit in UNITS if isinstance(facts.get(name), int)]
    hooks = [html.Code(hook) for hook in facts.get("hooks", ())]
    return html.Span([part for item in [*words, *hooks] for part in (" · ", item)][1:])
