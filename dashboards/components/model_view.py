"""What a model is made of: how many parameters, how many of them a token uses, and where they lie; and the links
between the pages about a model."""

from typing import Any

from dash import html

from dashboards.components import states
from dashboards.components.controls import panel
from dashboards.components.firings import plain_bar
from dashboards.components.stats import stat, stats
from dashboards.components.tables import stacking_table
from dashboards.format import count, number, percent, plural
from dashboards.links import embeddings_link, experts_link, model_link
from dashboards.models import ModelFacts

__all__ = ["BYTES", "UNITS", "draw_model", "model_nav", "no_experts", "no_tables", "short"]

UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))
BYTES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def model_nav(index: str, current: str) -> html.Nav:
    """Links between the pages about a model: "model", "embeddings", "experts"."""
    pages = (
        ("model", "Parameters", model_link(index)),
        ("embeddings", "Per-layer embeddings", embeddings_link(index)),
        ("experts", "Experts", experts_link(index)),
    )
    links = [
        html.A(
            words,
            href=href,
            className="chip",
            **{"aria-current": "page" if name == current else "false", "data-carry": "text chat"},
        )
        for name, words, href in pages
    ]
    return html.Nav(links, className="chips model-nav", **{"aria-label": "About this model"})


def no_tables(facts: ModelFacts) -> html.Div:
    """In words: the model has no per-layer embeddings."""
    return states.empty(
        "This model has no per-layer embeddings",
        f"{facts.name} ({facts.architecture}) looks each token up once, in one table, before its first layer. Gemma "
        "3n, Gemma 4 E2B and E4B have a table of their own for every layer.",
    )


def no_experts(facts: ModelFacts) -> html.Div:
    """In words: the model has no experts."""
    return states.empty(
        "This model has no experts",
        f"In {facts.name} ({facts.architecture}) every token goes through the same MLP of each layer. Mixtral, "
        "Qwen3-MoE and Gemma 4 26B-A4B have layers whose tokens go to a few of many experts.",
    )


def draw_model(facts: ModelFacts) -> html.Div:
    """The page's content."""
    size = facts.parameters
    figures = [
        _figure("total", size.total, "parameters_total"),
        _figure("active per token", size.active_per_token, "parameters_active"),
        _figure("effective", size.effective, "parameters_effective"),
        _figure("in lookup tables", sum(size.lookup_tables.values()), "parameters_tables"),
        _figure("in experts", size.experts, "parameters_experts"),
    ]
    if size.towers:
        figures.append(_figure("other modalities", size.towers, "parameters_towers"))
    return html.Div(
        [
            html.P(
                f"{facts.architecture} · {plural(facts.n_layers, 'layer')} · d_model {count(facts.d_model)} · "
                f"vocabulary {count(facts.d_vocab)} · context {count(facts.max_context_size)} · computes in "
                f"{facts.dtype}",
                className="muted small",
            ),
            stats(figures),
            _parts(facts),
            _places(facts),
        ],
        className="model-facts",
    )


def _figure(name: str, value: int, term: str) -> html.Div:
    return stat(name, short(value, UNITS), term=term, title=count(value))


def _parts(facts: ModelFacts) -> html.Section:
    """Lookup tables, experts, towers and the rest, which add up to the total."""
    size = facts.parameters
    rows: list[tuple[Any, int, str]] = []
    for path, parameters in size.lookup_tables.items():
        own = path.endswith("per_layer")
        words = f"one row of {count(facts.d_per_layer)} for each layer" if own else "one row for each token"
        if size.tied_unembedding and not own:
            words += "; it is the unembedding too, whose every row each logit needs"
        rows.append((html.Code(path), parameters, words))
    if size.experts:
        used = f"{size.experts_per_token} of {size.n_experts} in each of {plural(len(facts.experts), 'layer')}"
        rows.append(("Experts", size.experts, f"a token goes to {used}"))
    if size.towers:
        rows.append(("Other modalities", size.towers, "text does not use them"))
    rest = size.total - sum(parameters for _, parameters, _ in rows)
    rows.append(("Everything else", rest, "every token goes through all of it"))
    largest = max(parameters for _, parameters, _ in rows)
    drawn = [
        [
            name,
            html.Td(short(parameters, UNITS), title=count(parameters)),
            plain_bar(parameters / size.total, largest / size.total, words=percent(parameters / size.total)),
            words,
        ]
        for name, parameters, words in rows
    ]
    table = stacking_table(
        "Parts of the model", ("Part", "Parameters", "Share", "What a token uses"), drawn, numeric={1},
        className="model-parts",
    )  # fmt: skip
    return panel("Where parameters are", table)


def _places(facts: ModelFacts) -> html.Section:
    rows = [
        [
            html.Code(device),
            html.Td(short(place.parameters, UNITS), title=count(place.parameters)),
            html.Td(short(place.bytes, BYTES), title=f"{count(place.bytes)} bytes"),
            html.Td(short(place.lookup_tables, UNITS), title=count(place.lookup_tables)),
        ]
        for device, place in facts.parameters.devices.items()
    ]
    names = ("Device", "Parameters", "Memory", "Of lookup tables")
    return panel("Where they lie", stacking_table("Devices", names, rows, numeric={1, 2, 3}), term="parameters_place")


def short(value: int, units: tuple[tuple[int, str], ...]) -> str:
    """Three digits and a unit: 268M, 1.50 GB."""
    for size, unit in units:
        if value >= 0.9995 * size:  # what is rounded to it, too
            gap = " " if unit.endswith("B") and len(unit) > 1 else ""
            return f"{number(value / size)}{gap}{unit}"
    return count(value)
