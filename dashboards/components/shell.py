"""What stands around every page: the rail, the header that says what one is looking at, the list of keys."""

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import dash_mantine_components as dmc
from dash import dcc, html

from dashboards.artefacts import sae_name
from dashboards.components.controls import button, icon
from dashboards.links import (
    circuit_link,
    compare_link,
    features_link,
    lens_link,
    model_link,
    prompt_link,
    steer_link,
    training_link,
    workspace_link,
)

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.workspace import Entry

__all__ = ["header", "rail", "shell"]

KEYS = (
    ("←", "previous feature, of the list that one came from"),
    ("→", "next feature"),
    ("r", "a random feature that fires"),
    ("/", "search features"),
    ("c", "copy a link to exactly this view"),
    ("← ↑ → ↓", "in a circuit: the next node that way"),
    ("Enter", "in a circuit: pin the node, let it go"),
    ("Space", "in a circuit: select the node"),
    ("h", "in a circuit: hide what is selected or pinned"),
    ("g", "in a circuit: group it under a name"),
    ("Esc", "close, leave a field, let go"),
    ("?", "this list"),
)


RAIL = (
    ("workspace", "Workspace", workspace_link()),
    ("features", "Features", features_link("")),
    ("prompt", "Prompt", prompt_link("")),
    ("lens", "Lens", lens_link("")),
    ("circuit", "Circuit", circuit_link()),
    ("steer", "Steer", steer_link("")),
    ("model", "Model", model_link("")),
    ("training", "Training", training_link()),
    ("compare", "Compare", compare_link()),
)
WITH_INDEX = ("features", "prompt", "lens", "steer", "model")
"""Pages that are about one index: it is carried from one to the next."""


def rail(pages: Container[str]) -> list[Any]:
    """Links to the pages. They stay where they are while the dashboard is open: a link that is drawn anew with every
    view is lost under a finger that is just pressing it. assets/10_navigate.js keeps the index in their addresses."""
    return [
        html.A(
            [icon(name), title],
            href=href,
            **{"data-page": name, **({"data-with-index": "true"} if name in WITH_INDEX else {})},
        )
        for name, title, href in RAIL
        if name in pages
    ]


def header(entries: "list[Entry]", index: "FeatureIndex | None") -> list[Any]:
    """Which model, hook and SAE the page is about, and what to switch to."""
    if index is None:
        return [html.Dl(html.Div([html.Dt("Workspace")]), className="looking-at")]
    facts = [
        ("Model", index.model_info.get("name", "unknown")),
        ("Hook", html.Code(index.hook_name)),
        ("SAE", sae_name(index)),
    ]
    choices = [{"value": entry.id, "label": entry.name} for entry in entries]
    return [
        html.Dl([html.Div([html.Dt(name), html.Dd(value)]) for name, value in facts], className="looking-at"),
        dmc.Select(
            id="index-select",
            data=choices,
            value=index.id,
            allowDeselect=False,
            size="xs",
            className="index-select",
            comboboxProps={"shadow": "md"},
            **{"aria-label": "Index"},
        ),
        _search(index.id),
    ]


def _search(index: str) -> html.Div:
    return html.Div(
        className="search",
        children=dmc.TextInput(
            placeholder="Search features",
            size="xs",
            rightSection=html.Kbd("/"),
            attributes={
                "input": {
                    "data-search": "true",
                    "data-focus": "/",
                    "data-index": index,
                    "aria-label": "Search features",
                }
            },
        ),
    )


def _keys() -> html.Dialog:
    return html.Dialog(
        id="keys",
        className="keys",
        **{"aria-label": "Keys"},
        children=[
            html.H2("Keys"),
            html.Dl([part for key, words in KEYS for part in (html.Dt(html.Kbd(key)), html.Dd(words))]),
            button("Close", **{"data-close": "true"}),
        ],
    )


def shell(theme: str, pages: Container[str]) -> dmc.MantineProvider:
    """The frame of the dashboard, with nothing in it yet. `pages` are the names of those that there are."""
    return dmc.MantineProvider(
        id="theme",
        forceColorScheme=theme,
        theme={
            "fontFamily": "var(--scope-font)",
            "primaryColor": "gray",
            "defaultRadius": "sm",
            "cursorType": "pointer",
        },
        children=[
            dcc.Store(id="view"),
            dcc.Store(id="about"),
            dcc.Store(id="theme-now", data=theme),
            dcc.Store(id="trouble"),
            html.A("Skip to the page", href="#page", className="skip"),
            html.Div(
                className="shell",
                children=[
                    html.Nav(
                        className="rail",
                        **{"aria-label": "Pages"},
                        children=[
                            html.Div(rail(pages), id="rail", style={"display": "contents"}),
                            html.Div(
                                className="rail-end",
                                children=[
                                    html.Button(
                                        [icon("keys"), "Keys"],
                                        type="button",
                                        className="keys-button",
                                        **{"data-keys": "true"},
                                    ),
                                    html.Button(
                                        [icon("sun"), icon("moon"), "Theme"],
                                        type="button",
                                        className="theme-toggle",
                                        **{"aria-label": "Switch between light and dark"},
                                    ),
                                ],
                            ),
                        ],
                    ),
                    html.Header(id="header", className="header"),
                    html.Main(html.Div(id="content", className="page"), id="page", className="main", tabIndex=-1),
                ],
            ),
            _keys(),
        ],
    )
