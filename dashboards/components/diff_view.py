"""A comparison of two models (`scope diff`, `scope quantisation`) on the compare page, and the list of those there are.

1. What the models predict, by source: loss, KL, the same likeliest token.
2. How far the residual stream moved, layer by layer.
3. For each SAE which of its features changed, with the tokens that each is strongest on in either model, and by the
   source that they fire on most. With a control, which of them changed beyond it; without one, that any tuning changes
   features.
4. Which features of the crosscoder one model truly has alone, and which only seem so.
5. Of a quantised file: what holds of it as of its reference.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from dash import html

from dashboards.components import states
from dashboards.components.charts import chart
from dashboards.components.controls import panel
from dashboards.components.stats import stat, stats
from dashboards.context import Context
from dashboards.format import count, exact, number, percent
from dashboards.links import compare_link, feature_link
from scope.diffing.stored import DiffReport
from scope.errors import ScopeError
from scope.figures import Theme, layer_lines, scaling_scatter

__all__ = ["diff_list", "diff_view"]

FAILED = "This comparison of models could not be shown"
ROWS = 20
LINES = 4
"""Sources that are drawn: those whose residual stream moved most."""
TOKENS = 4
NO_CONTROL = (
    "Any tuning changes features, one on nothing too. What this one's text did, only a control tells (--control)."
)
VERDICTS = {
    "specific": "only in this model",
    "shrinkage": "in the other's error (shrinkage)",
    "decoupling": "written otherwise there (decoupling)",
    "both": "shrinkage and decoupling",
    "uncertain": "uncertain",
    "rare": "too rare to tell",
}


def diff_list(context: Context, shown: str = "") -> list[Any]:
    """Links to the comparisons of two models that the workspace holds; empty where it holds none."""
    entries = context.workspace.entries("model-diff")
    if not entries:
        return []
    chips = [
        html.A(
            entry.name,
            href=compare_link(diff=entry.id),
            className="chip",
            title=entry.problem,
            **{"aria-current": "true" if shown in (entry.id, entry.name) else "false"},
        )
        for entry in entries
    ]
    return [panel("Two models", html.Nav(chips, className="chips", **{"aria-label": "Comparisons of two models"}))]


def diff_view(context: Context, id: str, theme: Theme) -> list[Any]:
    """One comparison."""
    try:
        entry = context.workspace.find(id, "model-diff")
        report = DiffReport.open(entry.path)
        figures = report.figures
        control = figures.get("control")
        named = [", the control is ", html.B(control["model"])] if control else []
        parts: list[Any] = [
            html.P(
                ["A is ", html.B(figures["base"]["model"]), ", B is ", html.B(figures["tuned"]["model"]), *named, "."],
                className="muted",
            ),
            *_predictions(figures, theme),
        ]
        for place, sae in enumerate(figures["saes"]):
            parts += _sae(context, report.sae_table(place), sae, bool(figures["conclusions"]))
        parts += _crosscoder(report, theme)
        parts += _conclusions(figures)
    except (ScopeError, OSError, KeyError, ValueError) as problem:
        return [states.error(problem, FAILED)]
    return parts


def _predictions(figures: Mapping[str, Any], theme: Theme) -> list[Any]:
    if "layers" not in figures:
        return []
    whole = figures["predictions"][0]
    head = ["source", "tokens", "loss A", "loss B", "change (95%)", "KL, nats", "same likeliest"]
    rows = [
        [html.Bdi(row["source"]), count(row["n_tokens"]), _number(row["ce_base"]), _number(row["ce_tuned"]),
         _interval(row["ce_change"], row["ce_change_low"], row["ce_change_high"]), _number(row["kl"]),
         percent(row["top1"])]
        for row in figures["predictions"]
    ]  # fmt: skip
    control = {row["source"]: row for row in (figures.get("control") or {}).get("predictions", ())}
    if control:
        head.insert(5, "control's change (95%)")
        for cells, row in zip(rows, figures["predictions"], strict=True):
            same = control.get(row["source"], {})
            change = (same.get(f"ce_change{end}") for end in ("", "_low", "_high"))
            cells.insert(5, _interval(*change))
    lines = layer_lines(
        _most_moved(pd.DataFrame(figures["layers"])), "change", low="change_low", high="change_high", theme=theme,
        label="‖B − A‖ / ‖A‖",
    )  # fmt: skip
    words = "How far the residual stream moved, by layer, where it moved most"
    return [
        stats(
            [
                stat("loss of A", _short(whole["ce_base"]), note="nats a token"),
                stat("loss of B", _short(whole["ce_tuned"]), note="nats a token"),
                stat("KL(A ‖ B)", _short(whole["kl"]), note="nats a token"),
                stat("same likeliest token", percent(whole["top1"]), note=f"of {count(whole['n_tokens'])}"),
            ]
        ),
        panel(words, chart(lines, id="diff-layers", height=300, words=words)),
        panel("What the two predict", _table(head, rows, "Predictions by source")),
    ]


def _most_moved(layers: pd.DataFrame) -> pd.DataFrame:
    """All of the text, and the sources that moved most; a legend of more hides the lines on a phone."""
    whole = layers["source"] == "all"
    moved = layers[~whole].groupby("source")["change"].mean().sort_values(ascending=False, kind="stable").index[:LINES]
    return pd.concat([layers[whole], *(layers[layers["source"] == source] for source in moved)])


def _sae(context: Context, table: pd.DataFrame, sae: Mapping[str, Any], quantised: bool) -> list[Any]:
    index = next(
        (entry.id for entry in context.indexes() if sae["fingerprint"] in entry.manifest.get("parents", ())), None
    )
    controlled = sae.get("beyond") is not None
    chosen, score = ("beyond", "z_control") if controlled else ("changed", "z")
    changed = table[table[chosen]]
    changed = changed.reindex(changed[score].abs().sort_values(ascending=False, kind="stable").index)
    head = [
        "feature",
        "fires in A",
        "in B",
        "B / A, log2 (95%)",
        "same tokens",
        "decoder cosine",
        "most on",
        "strongest on",
    ]
    if controlled:
        head[3:4] = ["in the control", "B / A, log2 (95%)", "B / control, log2 (95%)"]
    rows = [
        [
            html.A(str(row["feature"]), href=feature_link(index, int(row["feature"])), className="number")
            if index
            else html.Span(str(row["feature"]), className="number"),
            percent(row["rate_base"]),
            percent(row["rate_tuned"]),
            *([percent(row["rate_control"])] if controlled else []),
            _interval(row["log_ratio"], row["log_ratio_low"], row["log_ratio_high"]),
            *([_interval(row["excess"], row["excess_low"], row["excess_high"])] if controlled else []),
            percent(row["agreement"]),
            _number(row["decoder_cosine"]),
            html.Bdi(row.get("source") or "–"),
            _tokens(sae["examples"].get(str(row["feature"]), {})),
        ]
        for row in changed.head(ROWS).to_dict("records")
    ]
    low, high = sae["fvu_change_interval"]
    words = "Features that changed beyond the control" if controlled else "Features that changed"
    return [
        panel(
            f"What became of the features of {sae['name']}",
            stats(
                [
                    stat("fvu in A", _short(sae["fvu_base"]), note=sae["hook"]),
                    stat("fvu in B", _short(sae["fvu_tuned"]), note=f"change {_signed(low)} to {_signed(high)}"),
                    stat("changed features", count(sae["changed"]), note=f"of {count(sae['firing'])} that fire"),
                    *_beyond(sae),
                    stat("more often", count(sae["more_often"])),
                    stat("less often", count(sae["less_often"])),
                ]
            ),
            *([] if controlled or quantised else [html.P(NO_CONTROL, className="muted small")]),
            _table(head, rows, words)
            if rows
            else html.P(f"No feature changed{' beyond the control' * controlled}.", className="muted"),
            *_more(len(changed)),
            *_homes(sae, controlled),
        )
    ]


def _beyond(sae: Mapping[str, Any]) -> list[Any]:
    if sae.get("beyond") is None:
        return []
    return [stat("beyond the control", count(sae["beyond"]), note=f"{count(sae['changed_in_control'])} changed in it")]


def _homes(sae: Mapping[str, Any], controlled: bool) -> list[Any]:
    """By the source that features fire on most, how many changed."""
    found = sae.get("by_source") or []
    if not found:
        return []
    parts = ["firing", "changed", "more_often", *(["beyond", "beyond_more_often"] if controlled else [])]
    head = ["source", "features", "changed", "more often", "beyond the control", "beyond it, more often"][
        : len(parts) + 1
    ]
    ordered = sorted(found, key=lambda row: (-row[parts[-1]], -row["changed"], row["source"]))
    rows = [[html.Bdi(row["source"]), *(count(row[part]) for part in parts)] for row in ordered]
    return [
        html.P("The same by the source that a feature fires on most in A:", className="muted small"),
        _table(head, rows, "Changed features by source"),
    ]


def _crosscoder(report: DiffReport, theme: Theme) -> list[Any]:
    found, table = report.figures["crosscoder"], report.crosscoder_table()
    if not found or table is None:
        return []
    places, limits = found["places"], found["limits"]
    control = (report.figures.get("control") or {}).get("crosscoder")
    seeming = table[table["place"].isin(["tuned", "base"]) & (table["verdict"] != "rare")]
    examples = {
        one["feature"]: [example["token"] for example in one["examples"]]
        for which in ("tuned", "base")
        for one in found["examples"][which]
    }
    ordered = seeming.assign(first=seeming["verdict"] != "specific").sort_values(
        ["first", "firings"], ascending=[True, False], kind="stable"
    )
    head = ["feature", "in", "verdict", "firings", "ν error (95%)", "ν reconstruction (95%)", "strongest on"]
    rows = [
        [
            html.Span(str(row["feature"]), className="number"),
            {"tuned": "B", "base": "A"}[row["place"]],
            VERDICTS[row["verdict"]],
            count(row["firings"]),
            _interval(row["nu_error"], row["nu_error_low"], row["nu_error_high"]),
            _interval(row["nu_reconstruction"], row["nu_reconstruction_low"], row["nu_reconstruction_high"]),
            _words(examples.get(row["feature"], [])),
        ]
        for row in ordered.head(ROWS).to_dict("records")
    ]
    words = "Features that seem to be of one model: what the other has of them"
    drawn: list[Any] = []
    if len(seeming):
        figure = scaling_scatter(seeming, limits["nu_error"], limits["nu_reconstruction"], theme=theme)
        drawn = [chart(figure, id="diff-scaling", height=320, words=words)]

    def verdict(which: str, name: str) -> int:
        return int(found["verdicts"][which].get(name, 0))

    def beside(which: str) -> str:
        """How many only seem to be, and how many the control has."""
        told = f"{places.get(which, 0)} seem so"
        return f"{told}; {control['verdicts'][which].get('specific', 0)} in the control" if control else told

    return [
        panel(
            "A crosscoder over both models",
            stats(
                [
                    stat(
                        "shared", count(places.get("shared", 0)), note=f"of {count(found['d_sae'])} at {found['hook']}"
                    ),
                    stat("only in B", count(verdict("tuned", "specific")), note=beside("tuned")),
                    stat("only in A", count(verdict("base", "specific")), note=beside("base")),
                    stat("fvu", _short(found["fvu"])),
                ]
            ),
            *drawn,
            _table(head, rows, "Features of one model")
            if rows
            else html.P("No feature seems to be of one model alone.", className="muted"),
            *_more(len(ordered)),
        )
    ]


def _conclusions(figures: Mapping[str, Any]) -> list[Any]:
    if not figures["conclusions"]:
        return []
    rows = [
        [one["statement"], "holds" if one["holds"] else "does not hold", _number(one["figure"]), _number(one["limit"])]
        for one in figures["conclusions"]
    ]
    return [panel("What holds of B as of A", _table(["statement", "", "figure", "limit"], rows, "Conclusions"))]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], words: str) -> html.Div:
    table = html.Table(
        [
            html.Thead(html.Tr([html.Th(name) for name in head])),
            html.Tbody([html.Tr([html.Td(cell) for cell in row]) for row in rows]),
        ],
        className="table",
    )
    return html.Div(table, className="scroll", tabIndex=0, role="region", **{"aria-label": words})


def _more(n: int) -> list[Any]:
    told = f"The first {ROWS} of {count(n)}; the tables in the report's folder hold all."
    return [html.P(told, className="muted small")] if n > ROWS else []


def _short(value: float | None) -> str:
    return "–" if value is None else number(value)


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3g}".replace("-", "−")


def _number(value: float | None) -> html.Span:
    if value is None or value != value:
        return html.Span("–", className="number")
    return html.Span(number(value), className="number", title=exact(value))


def _interval(value: float | None, low: float | None, high: float | None) -> html.Span:
    if value is None or value != value:
        return html.Span("–", className="number")
    return html.Span(
        [_signed(value), html.Span(f" {_signed(low)} to {_signed(high)}", className="muted small")], className="number"
    )


def _tokens(examples: Mapping[str, Any]) -> html.Span:
    """The tokens that a feature is strongest on: in B, or in A where B has none."""
    return _words([one["token"] for one in (examples.get("tuned") or examples.get("base") or [])])


def _words(tokens: Sequence[str]) -> html.Span:
    shown = list(dict.fromkeys(token.strip() or "␣" for token in tokens))[:TOKENS]
    return html.Span([part for token in shown for part in (" · ", html.Bdi(token))][1:] or "–")
