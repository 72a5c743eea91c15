"""One look for every figure: the two palettes, the Plotly template, and the colour of a token.

`PALETTES` is the source of the workbench's colours: the dashboard's CSS variables come from `css_variables`, a
notebook's token strips from `activation_colour`. Colour means one thing each: *accent* is activation (one hue, even
steps from the page), *negative* and *positive* are signed effects (blue and orange, which colour-blind readers tell
apart), *categories* are languages, sources and the like, at most eight.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from scope.figures.colours import mix, ramp

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["CONFIG", "FONT", "PALETTES", "Palette", "Theme", "activation_colour", "css_variables", "effect_colour"]
__all__ += ["template"]

Theme = Literal["light", "dark"]

FONT = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans Arabic", "Noto Sans CJK JP", '
    '"Liberation Sans", "DejaVu Sans", sans-serif'
)

CONFIG: dict[str, Any] = {
    "displayModeBar": False,
    "displaylogo": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "responsive": True,
}
"""Plotly's `config` for every figure: no mode bar, nothing that leaves the machine."""


@dataclass(frozen=True)
class Palette:
    """The colours of one theme, as `#rrggbb`."""

    page: str
    """Background of the page and of every figure."""
    surface: str
    """Cards, table headers, the rail."""
    text: str
    muted: str
    """Secondary text; still readable on the page (contrast at least 4.5)."""
    rule: str
    """Lines, borders, grids."""
    accent: str
    """The full activation: text stays readable on it (contrast at least 4.5)."""
    accent_text: str
    """The accent where it colours text, bars or lines on the page."""
    negative: str
    positive: str
    negative_fill: str
    """The full negative effect as a background: text stays readable on it."""
    positive_fill: str
    categories: tuple[str, ...]
    """At most eight; what comes after is grouped as "other"."""

    @property
    def sequential(self) -> list[tuple[float, str]]:
        """Colour scale of activation."""
        return ramp(self.page, self.accent)

    @property
    def diverging(self) -> list[tuple[float, str]]:
        """Colour scale of signed effects, the page in its middle."""
        return ramp(self.negative_fill, self.page, self.positive_fill)


PALETTES: dict[Theme, Palette] = {
    "light": Palette(
        page="#ffffff",
        surface="#f6f7f8",
        text="#1b1f24",
        muted="#5c6570",
        rule="#dfe3e8",
        accent="#3fbf9b",
        accent_text="#0b7a5e",
        negative="#2f6fb5",
        positive="#b8550d",
        negative_fill="#7fb2e5",
        positive_fill="#f2a35e",
        categories=("#0b7a5e", "#2f6fb5", "#b8550d", "#8250a8", "#b0356b", "#6b7a12", "#0f7f95", "#5c6570"),
    ),
    "dark": Palette(
        page="#15181c",
        surface="#1d2126",
        text="#e8eaed",
        muted="#9ba5b0",
        rule="#333a42",
        accent="#12775c",
        accent_text="#4fcfab",
        negative="#6fa8e0",
        positive="#ee9648",
        negative_fill="#285f9c",
        positive_fill="#96500f",
        categories=("#4fcfab", "#6fa8e0", "#ee9648", "#bd95e0", "#ea82ae", "#b3c24a", "#55bfd6", "#9ba5b0"),
    ),
}


def activation_colour(value: float, maximum: float, theme: Theme = "light") -> str:
    """Background of a token that a feature fires on with `value`, on a scale from 0 to `maximum`."""
    palette = PALETTES[theme]
    return _shade(palette.page, palette.accent, value / maximum if maximum > 0 else 0.0)


def effect_colour(value: float, largest: float, theme: Theme = "light") -> str:
    """Background of a token with a signed effect, on a scale from `-largest` to `largest`."""
    palette = PALETTES[theme]
    fill = palette.negative_fill if value < 0 else palette.positive_fill
    return _shade(palette.page, fill, abs(value) / largest if largest > 0 else 0.0)


def _shade(page: str, fill: str, share: float) -> str:
    return _mixed(page, fill, round(255 * min(share, 1.0)))


@cache
def _mixed(page: str, fill: str, step: int) -> str:
    """One of the 256 steps from a page to a fill: a page of tokens asks thousands of times."""
    return mix(page, fill, step / 255)


def css_variables(theme: Theme) -> dict[str, str]:
    """The palette as CSS custom properties: `--scope-page`, `--scope-accent`, `--scope-category-1` and so on."""
    palette = PALETTES[theme]
    names = ("page", "surface", "text", "muted", "rule", "accent", "accent_text", "negative", "positive")
    variables = {f"--scope-{name.replace('_', '-')}": getattr(palette, name) for name in names}
    variables["--scope-negative-fill"] = palette.negative_fill
    variables["--scope-positive-fill"] = palette.positive_fill
    for number, colour in enumerate(palette.categories, start=1):
        variables[f"--scope-category-{number}"] = colour
    variables["--scope-font"] = FONT
    return variables


@cache
def template(theme: Theme = "light") -> "go.layout.Template":
    """The Plotly template of a theme."""
    import plotly.graph_objects as go

    palette = PALETTES[theme]
    axis = {
        "showgrid": False,
        "zeroline": False,
        "showline": True,
        "linecolor": palette.rule,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": palette.rule,
        "tickfont": {"color": palette.muted, "size": 12},
        "title": {"font": {"color": palette.muted, "size": 12}, "standoff": 8},
        "automargin": True,
        "separatethousands": True,
        "exponentformat": "power",
        "minexponent": 6,
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": palette.text},
            "title": {
                "font": {"size": 14, "color": palette.text},
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
                "automargin": True,
                "yref": "container",
                "y": 1,
                "yanchor": "top",
                "pad": {"t": 10, "b": 8},
            },
            "paper_bgcolor": palette.page,
            "plot_bgcolor": palette.page,
            "colorway": list(palette.categories),
            "colorscale": {
                "sequential": palette.sequential,
                "sequentialminus": palette.sequential,
                "diverging": palette.diverging,
            },
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 12, "r": 12, "t": 40, "b": 12},
            "hoverlabel": {
                "bgcolor": palette.surface,
                "bordercolor": palette.rule,
                "font": {"family": FONT, "color": palette.text, "size": 12},
            },
            "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right", "title": ""},
            "bargap": 0.08,
            "hovermode": "closest",
            "dragmode": False,
            "modebar": {"remove": ["toImage", "sendDataToCloud", "lasso2d", "select2d"]},
        }
    )
