"""The logit lens, drawn: layers by tokens, one cell's likeliest tokens, and tokens followed over the layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from dash import html

from dashboards.components.charts import chart
from dashboards.components.controls import define
from dashboards.components.firings import choice, prediction_chips
from dashboards.components.prompt_state import whole_number, whole_numbers
from dashboards.components.prompt_view import next_token_field
from dashboards.components.states import skeleton
from dashboards.components.strip import legend, token
from dashboards.components.token_grid import column_turner, column_window, grid_saves, token_grid
from dashboards.conversations import Said, words_of
from dashboards.format import number, percent
from dashboards.prompts import LensMode, Prediction
from scope.figures import Theme

if TYPE_CHECKING:
    from scope.attribution.lens import LogitLens

__all__ = ["SHOWN", "LensSelection", "LensView", "draw_lens"]

COLUMNS = 48
"""Tokens that are drawn at once: cells hold words."""
DEFAULT_FOLLOWED = 3
CHART_HEIGHT = 320
SHOWN = {
    "": ("Likeliest token", "probability of the likeliest token", "lens"),
    "entropy": ("Entropy", "entropy, nats", "lens_entropy"),
    "kl": ("KL to the end", "divergence from what the model says in the end, nats (log scale)", "lens_kl"),
    "probability": ("Probability", "probability of the followed token", "lens"),
    "rank": ("Rank", "rank of the followed token", "lens_rank"),
}
"""What the cells show: button, words, term of the glossary."""
MODES: dict[LensMode, str] = {"": "Residual stream", "read": "SAE read in place", "splice": "SAE spliced in"}


@dataclass(frozen=True)
class LensSelection:
    """What is selected on the page, as its address says; what cannot be read is left open."""

    token: int | None = None
    layer: int | None = None
    mode: LensMode = ""
    show: str = ""
    """One of `SHOWN`."""
    follow: tuple[int, ...] = ()
    """Followed tokens; the likeliest of the last layer where none is."""
    of: int | None = None
    """The followed token whose probability or rank the cells show."""
    start: int | None = None
    """First token that is drawn."""
    axis: str = ""
    """ "rank" for the chart of ranks."""

    @classmethod
    def of_query(cls, query: Mapping[str, Any] | None) -> "LensSelection":
        """The selection of an address."""
        query = query or {}
        show, mode = str(query.get("show", "")), str(query.get("sae", ""))
        return cls(
            token=whole_number(query, "token"),
            layer=whole_number(query, "layer"),
            mode="read" if mode == "read" else "splice" if mode == "splice" else "",
            show=show if show in SHOWN else "",
            follow=whole_numbers(query, "follow", 8),
            of=whole_number(query, "of"),
            start=whole_number(query, "from"),
            axis="rank" if query.get("axis") == "rank" else "",
        )

    def position(self, n_tokens: int) -> int:
        """The selected token; the last one where none is."""
        return n_tokens - 1 if self.token is None or self.token >= n_tokens else self.token

    def followed(self, lens: "LogitLens") -> tuple[int, ...]:
        """The tokens that are followed."""
        likeliest = lens.top_ids[-1, self.position(len(lens.tokens)), :DEFAULT_FOLLOWED]
        return self.follow or tuple(int(one) for one in likeliest)

    def shown_token(self, lens: "LogitLens") -> int | None:
        """The token whose probability or rank the cells show; None where they show something else."""
        if self.show not in ("probability", "rank"):
            return None
        followed = self.followed(lens)
        return self.of if self.of is not None else followed[0]


@dataclass(frozen=True, eq=False)
class LensView:
    """Everything that the drawing needs."""

    lens: "LogitLens"
    followed: "LogitLens | None"
    """At the selected position, with the followed tokens, once that is known."""
    plain: "LogitLens | None"
    """The same without the SAE, where there is one."""
    tracked: "LogitLens | None"
    """At all positions, with the token whose probability or rank is shown, once that is known."""
    selection: LensSelection
    d_vocab: int
    theme: Theme
    said: tuple[Said, ...] = ()
    """Of a chat: what each token is."""

    @property
    def position(self) -> int:
        """The selected token."""
        return self.selection.position(len(self.lens.tokens))

    @property
    def layer(self) -> int:
        """The selected layer; the last one where none is."""
        chosen = self.selection.layer
        return chosen if chosen in self.lens.layers else self.lens.layers[-1]

    def words_at(self, place: int) -> str:
        """What a token of a chat is; "" in plain text."""
        return words_of(self.said[place]) if self.said else ""


def draw_lens(view: LensView) -> html.Div:
    """The whole result."""
    return html.Div(
        className="lens-result",
        children=[
            _switches(view),
            _grid_part(view),
            html.Div([_chart_part(view), html.Aside([_cell_part(view)])], className="columns"),
        ],
    )


def _switches(view: LensView) -> html.Div:
    modes = [choice(words, {"sae": mode or None}, view.selection.mode == mode) for mode, words in MODES.items()]
    shown = [choice(words, {"show": name or None}, view.selection.show == name) for name, (words, *_) in SHOWN.items()]
    return html.Div(
        className="lens-switches",
        children=[
            html.Div([html.Span("Read", className="muted small"), *modes, define("lens_sae")], className="chips"),
            html.Div([html.Span("Cells", className="muted small"), *shown], className="chips"),
        ],
    )


def _cells(view: LensView) -> tuple[np.ndarray, list[list[str]] | None, np.ndarray, float, bool]:
    """Values, words (None: they are numbers of the value), colours from 0 to 1, end of the scale, whether known."""
    lens, show = view.lens, view.selection.show
    if show in ("probability", "rank"):
        if view.tracked is None:
            empty = np.zeros_like(lens.entropy)
            return empty, [["…"] * len(row) for row in empty], empty, 1.0, False
        if show == "probability":
            values = np.asarray(view.tracked.probability)[..., 0]
            return values, [[percent(float(one)) for one in row] for row in values], values, 1.0, True
        values = view.tracked.rank[..., 0].astype(float)
        words = [[f"{int(one):,}" for one in row] for row in values]
        return values, words, 1 - np.log(values) / np.log(max(view.d_vocab, 2)), 1.0, True
    if show in ("entropy", "kl"):
        values = lens.entropy if show == "entropy" else lens.kl
        scale = max(float(values.max(initial=0.0)), 1e-9)
        # The first layers can be a hundred nats away, which would leave all others white.
        colours = values / scale if show == "entropy" else np.log1p(values) / np.log1p(scale)
        return values, [[number(float(one)) for one in row] for row in values], colours, scale, True
    values = lens.top_probabilities[..., 0]
    return values, None, values, 1.0, True


def _grid_part(view: LensView) -> html.Section:
    lens, n = view.lens, len(view.lens.tokens)
    shown = column_window(n, view.selection.start, view.position, COLUMNS)
    values, words, colours, scale, known = _cells(view)
    part = slice(shown.start, shown.stop)
    rows = []
    for row in reversed(range(len(lens.layers))):
        marked = lens.layers[row] == lens.sae_layer
        tops = lens.top_tokens[row, part, 0].tolist()
        cells = tops if words is None else words[row][part]
        rows.append(
            {
                "id": lens.layers[row],
                "name": f"layer {lens.layers[row]}",
                "mark": "SAE" if marked else "",
                "v": values[row, part].tolist(),
                "c": [round(float(one), 3) for one in colours[row, part]],
                "w": cells,
                "h": [
                    f"entropy {number(float(e))}, KL to the end {number(float(k))} nats"
                    for e, k in zip(lens.entropy[row, part], lens.kl[row, part], strict=True)
                ],
            }
        )
    name, about, term = SHOWN[view.selection.show]
    whose: list[Any] = []
    if view.tracked is not None:
        whose = [" of ", token(view.tracked.followed_tokens[0])]
    grid = token_grid(
        [lens.tokens[place] for place in shown],
        list(shown),
        rows,
        what="layer",
        corner="Layer",
        caption=f"Layers by tokens: {about}" + ("" if known else ", still being computed"),
        scale=scale,
        at=view.position,
        row=view.layer,
        said=[view.words_at(place) for place in shown],
        text=True,
        plain=words is not None,
        value="probability" if words is None else name.lower(),
        id="lens-grid",
    )
    head = [
        html.H2(["After each layer", *whose]),
        html.Span("click a cell for its likeliest tokens", className="unit"),
        html.Span([_legend(view, scale, about), define(term)], className="legend-with-help push"),
    ]
    foot = html.Div([column_turner(shown, n, COLUMNS), grid_saves()], className="grid-foot")
    return html.Section([html.Header(head), grid, foot], className="panel heatmap-part")


def _legend(view: LensView, scale: float, about: str) -> html.Div:
    drawn = legend(scale, "activation", about)
    if view.selection.show == "rank":
        drawn.children[1].children, drawn.children[3].children = f"{view.d_vocab:,}", "1"
    return drawn


def _chart_part(view: LensView) -> html.Section:
    from scope.figures.lens import lens_lines

    here = token(view.lens.tokens[view.position])
    axis = view.selection.axis or "probability"
    chips = [
        choice("Probability", {"axis": None}, axis == "probability"),
        choice("Rank", {"axis": "rank"}, axis == "rank"),
    ]
    head = html.Header(
        [html.H2(["Tokens followed, after ", here]), html.Span(chips, className="chips push")], className="chart-head"
    )
    if view.followed is None:
        return html.Section([head, skeleton(CHART_HEIGHT)], className="panel")
    followed = view.followed
    figure = lens_lines(
        followed.followed(),
        axis,
        plain=None if view.plain is None else view.plain.followed(),
        sae_layer=followed.sae_layer,
        theme=view.theme,
        title=f"{axis.capitalize()} of the next token after each layer",
    )
    words = f"{axis} by layer of {', '.join(repr(one) for one in followed.followed_tokens)}"
    ids = list(followed.followed_ids)
    chips = []
    for one, text in zip(ids, followed.followed_tokens, strict=True):
        rest = ",".join(str(other) for other in ids if other != one)
        chips.append(
            html.Span(
                [
                    choice([token(text)], {"of": one}, one == view.selection.shown_token(view.lens)),
                    choice("×", {"follow": rest or None}, False, className="chip drop",
                           **{"aria-label": f"Do not follow {text!r}"}),
                ],
                className="chip-pair",
            )
        )  # fmt: skip
    note = html.P("Dotted: the same without the SAE.", className="small muted") if view.plain is not None else None
    return html.Section(
        className="panel",
        children=[
            head,
            html.Div(chips, className="chips"),
            chart(figure, id="lens-chart", height=CHART_HEIGHT, words=words),
            note,
        ],
    )


def _cell_part(view: LensView) -> html.Section:
    top = view.lens.top(view.layer, view.position)
    row = view.lens.layers.index(view.layer)
    columns = (top["token_id"].tolist(), top["token"].tolist(), top["probability"].tolist())
    predictions = [Prediction(*one) for one in zip(*columns, strict=True)]
    followed = list(view.selection.followed(view.lens))
    marked = " (SAE)" if view.layer == view.lens.sae_layer else ""
    what_it_is = view.words_at(view.position)
    return html.Section(
        className="panel",
        children=[
            html.Header(
                [
                    html.H2(["After ", token(view.lens.tokens[view.position])]),
                    html.Span(f"layer {view.layer}{marked}{', ' if what_it_is else ''}{what_it_is}", className="unit"),
                ]
            ),
            html.P(
                f"Entropy {number(float(view.lens.entropy[row, view.position]))} nats, "
                f"KL to the end {number(float(view.lens.kl[row, view.position]))} nats. Choose tokens to follow.",
                className="small muted",
            ),
            _follow_chips(predictions, followed),
            *next_token_field("lens", "follow another token, then Enter"),
        ],
    )


def _follow_chips(predictions: list[Prediction], followed: list[int]) -> html.Div:
    drawn = prediction_chips(predictions, None)
    for place, one in enumerate(predictions):
        inside = one.token_id in followed
        wanted = [other for other in followed if other != one.token_id] + ([] if inside else [one.token_id])
        drawn.children[place] = choice(
            drawn.children[place].children,
            {"follow": ",".join(map(str, wanted[-8:])) or None},
            inside,
        )
    return drawn
