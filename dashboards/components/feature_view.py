"""What the feature page shows beside the examples: its head, its statistics, and the column on the right."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dash import html

from dashboards.components import bars, states
from dashboards.components.charts import HISTOGRAM_HEIGHT, LOGITS_HEIGHT, chart, strength_histogram, theme_of_request
from dashboards.components.controls import button, code, icon, link_button, panel
from dashboards.components.stats import interval, stat, stats
from dashboards.feature_jobs import AllLogits
from dashboards.format import count, density, exact, number, percent, plural
from dashboards.links import feature_link, features_link, generation_link, list_query, prompt_link
from dashboards.marks import marks_of
from dashboards.queries import LISTED, FeatureSummary, effect_words, feature_name, tokens_label
from scope.figures import logit_histogram, step_rates

if TYPE_CHECKING:
    import pandas as pd

    from scope.features.index import FeatureIndex
    from scope.workspace import Workspace

__all__ = ["all_logits", "feature_head", "feature_side", "feature_statistics", "no_firings", "python_snippet"]

SHOWN_GROUPS = 6
"""Languages or sources that are listed at once."""
PANELS = {
    "role": "By role",
    "kind": "By kind of content",
    "modality": "By modality",
    "state": "By state of the token",
}
"""Titles of the rates by what tokens are."""
CARRIED = "show language source role content context logits try whole"
"""What of the address the moves from one feature to the next keep."""


def feature_head(index: str, feature: FeatureSummary, came_from: str = "") -> html.Header:
    """Id, name, and where to go from here; `came_from` is the query of the list that it was reached from."""
    title = feature_name(feature.row, 5)
    return html.Header(
        className="feature-head",
        children=[
            html.Div(
                [
                    *_place(index, feature, came_from),
                    html.H1(["Feature ", html.Span(str(feature.id), className="number")]),
                    html.P(
                        title,
                        className="feature-title",
                        dir="auto",
                        **{
                            "data-label-of": f"{index}:{feature.id}",
                            "data-label-else": tokens_label(feature.row, 5),
                        },
                    ),
                    html.P(effect_words(feature), className="feature-words", dir="auto"),
                ],
            ),
            html.Div(
                className="feature-moves",
                children=[
                    *(
                        link_button(
                            icon(name),
                            href=feature_link(index, other, **{"in": came_from}),
                            label=words,
                            className="icon-only",
                            **{"data-key": key, "data-carry": CARRIED},
                        )
                        for name, other, words, key in (
                            ("left", feature.previous, "Previous feature", "ArrowLeft"),
                            ("right", feature.next, "Next feature", "ArrowRight"),
                            ("shuffle", feature.random, "A random feature", "r"),
                        )
                    ),
                    link_button(
                        icon("prompt"),
                        href=prompt_link(index, feature=feature.id),
                        label="Look for it in a prompt",
                        className="icon-only",
                    ),
                    button(
                        icon("link"),
                        label="Copy a link to this view",
                        className="icon-only",
                        **{"data-copy-link": "true"},
                    ),
                ],
            ),
        ],
    )


def _place(index: str, feature: FeatureSummary, came_from: str) -> list[html.P]:
    """Where in the list it stands that it was reached from, and the way back there."""
    if not came_from:
        return []
    back = html.A("Back to the list", href=features_link(index, **list_query(came_from)))
    words = "no longer on it" if feature.place is None else f"{count(feature.place)} of {count(feature.n_listed)}"
    return [html.P([back, f" · {words}"], className="small muted")]


def feature_statistics(feature: FeatureSummary) -> html.Dl:
    """The feature in numbers."""
    row = feature.row
    drawn = interval(row["density_low"], row["density"], row["density_high"], density)
    shown = [
        stat("density", density(row["density"]), term="density", note=drawn, title=exact(row["density"])),
        stat("firings", count(row["n_firings"]), term="firings"),
    ]
    if feature.fires:
        shown += [
            stat("maximum", number(row["max_value"]), term="max", title=exact(row["max_value"])),
            stat("mean", number(row["mean_value"]), term="mean", title=exact(row["mean_value"])),
        ]
        shown += [_one(row, *which) for which in STATISTICS if _known(row, which[0])]
    elif _known(row, "encoder_decoder_cosine"):
        shown.append(_one(row, *STATISTICS[0]))
    if row.get("over_dense"):
        shown.append(stat("flag", "over-dense", term="over_dense"))
    return stats(shown)


def _bits(value: float) -> str:
    return f"{number(value)} bits"


STATISTICS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("encoder_decoder_cosine", "enc–dec cosine", "encoder_decoder_cosine", number),
    ("q50", "median", "quantiles", number),
    ("top_token_share", "top token", "token_share", percent),
    ("token_entropy", "token entropy", "token_entropy", _bits),
    ("token_bits", "token dependence", "token_bits", _bits),
    ("position_bits", "position dependence", "position_bits", _bits),
    ("language_entropy", "language entropy", "language_entropy", _bits),
    ("special_share", "on special tokens", "special_share", percent),
)
"""Column of the table, name, key of the definition, how it is written."""


def _known(row: Mapping[str, Any], name: str) -> bool:
    value = row.get(name)
    return value is not None and math.isfinite(float(value))


def _one(row: Mapping[str, Any], name: str, title: str, term: str, form: Callable[[float], str]) -> html.Div:
    value = float(row[name])
    return stat(title, form(value), term=term, title=exact(value))


def no_firings(index: "FeatureIndex", feature: FeatureSummary) -> html.Div:
    """What stands in the place of examples where there are none."""
    return html.Div(
        [
            states.empty(
                "This feature never fires",
                f"It is zero on all {count(index.n_indexed_rows)} tokens of this index, so there are no examples. What "
                "it would promote and which features point the same way is still known. A larger text may wake it: "
                "index more documents, or look at another feature.",
            ),
            link_button(
                "A random feature that fires", href=feature_link(index.id, feature.random), className="main-action"
            ),
        ]
    )


def feature_side(
    workspace: "Workspace", index: "FeatureIndex", feature: FeatureSummary, label: Any, logits: Any
) -> list[Any]:
    """The column on the right, from what people call the feature to how to load it.

    Args:
        workspace: what is served.
        index: the feature's.
        feature: what is known of it.
        label: the panel with its label, notes, star and lists.
        logits: what stands under its strongest logits: the histogram of all of them.
    """
    id, names = index.id, marks_of(index).labels
    parts: list[Any] = [label] if label is not None else []
    if feature.fires:
        parts.append(html.Div(_histogram(feature), className="panel"))
        fires_on = bars.token_list(feature.top_tokens)
        parts.append(
            panel("Fires on", fires_on, _by_mean(feature.row), unit="share of all strength", term="token_share")
        )
    parts.append(_logits(feature, logits))
    if feature.fires:
        for name, frame in (("language", feature.by_language), ("source", feature.by_source)):
            links = {str(value): feature_link(id, feature.id, **{name: value}) for value in frame[name]}
            parts.append(
                panel(
                    f"By {name}",
                    bars.rate_list(frame, links, SHOWN_GROUPS),
                    unit="firings per 1,000 tokens",
                    term="rate",
                )
            )
        for name, frame in feature.by_spoken.items():
            links = {str(value): features_link(id, a=f"{name}:{value}") for value in frame[name]}
            parts.append(
                panel(
                    PANELS[name],
                    bars.rate_list(frame, links, SHOWN_GROUPS),
                    unit="firings per 1,000 tokens",
                    term="rate",
                )
            )
        if feature.by_step is not None:
            parts.append(_by_step(id, feature, feature.by_step))
    if len(feature.neighbours):
        listed = bars.feature_list(feature.neighbours, id, "cosine", "cosine {cosine:.4f}", names)
        parts.append(panel("Decoder neighbours", listed, unit="cosine", term="neighbours"))
    if len(feature.cofiring):
        parts.append(panel("Fires with", bars.cofiring_table(feature.cofiring, id, names), term="cofiring"))
    parts.append(panel("In Python", code(python_snippet(workspace, index, feature.id))))
    parts.append(panel("Download", _downloads(index, feature)))
    return parts


def _by_step(index: str, feature: FeatureSummary, rates: "pd.DataFrame") -> Any:
    """How often it fires over the steps of denoising, and the way to a generation coloured by it."""
    figure = step_rates(rates, theme=theme_of_request())
    words = f"How often feature {feature.id} fires at each of {count(len(rates))} steps of denoising"
    drawn = chart(figure, id="feature-steps", height=HISTOGRAM_HEIGHT, words=words)
    link = html.A("One generation, step by step", href=generation_link(index, feature=feature.id))
    return panel("By step of denoising", drawn, html.P(link), term="denoising_step")


def _by_mean(row: Mapping[str, Any]) -> Any:
    """The tokens that it fires on most strongly, whatever their number, where the index lists them."""
    tokens, values = (list(row.get(name, ())) for name in ("mean_top_tokens", "mean_top_values"))
    if not tokens:
        return None
    return html.Details(
        [html.Summary("By mean strength", className="small muted"), bars.value_list(tokens[:LISTED], values[:LISTED])]
    )


def _downloads(index: "FeatureIndex", feature: FeatureSummary) -> html.Div:
    """Files of this feature; dashboards.exports serves them."""
    base = f"/export/{quote(index.id, safe='')}/feature/{feature.id}"
    links = [
        ("Neuronpedia JSON", f"{base}/neuronpedia.json", "examples, logits and statistics in its import format"),
        ("CSV", f"{base}/activations.csv", "every firing with its token, document and position"),
        ("Parquet", f"{base}/activations.parquet", "the same, typed"),
    ]
    return html.Div(
        [html.A(name, href=href, download="", className="button", title=words) for name, href, words in links],
        className="chips",
    )


def _histogram(feature: FeatureSummary) -> Any:
    figure = strength_histogram(feature.edges, feature.counts, theme_of_request())
    words = f"Histogram of {plural(int(feature.counts.sum()), 'firing')}; a click on a bar shows its examples"
    return chart(figure, id="feature-histogram", height=HISTOGRAM_HEIGHT, words=words)


def _logits(feature: FeatureSummary, everything: Any) -> Any:
    if not len(feature.top_logits):
        lists: Any = html.P(
            "The index was built without the model, so the strongest ones are not known. Build it again with the "
            "model at hand.",
            className="muted small",
        )
        return panel("Direct logit effects", lists, term="logits")
    scale = max(feature.top_logits["effect"].abs().max(), feature.bottom_logits["effect"].abs().max())
    two = html.Div(
        className="two",
        children=[
            html.Div(
                [html.H3("Promotes", className="small muted"), bars.logit_list(feature.top_logits, scale, "positive")]
            ),
            html.Div(
                [
                    html.H3("Suppresses", className="small muted"),
                    bars.logit_list(feature.bottom_logits, scale, "negative"),
                ]
            ),
        ],
    )
    return panel("Direct logit effects", two, everything, unit="per unit of strength", term="logits")


def all_logits(found: AllLogits | None, problem: Any = None) -> list[Any]:
    """The histogram of a feature's effects on every logit, or the button that asks for it."""
    if found is None:
        ask = button("Histogram over the whole vocabulary", id="logits-ask", className="more")
        return [ask, *([problem] if problem is not None else [])]
    figure = logit_histogram(found.edges, found.counts, theme=theme_of_request())
    words = f"Histogram of the feature's effects on the logits of all {count(len(found.effects))} tokens"
    return [chart(figure, id="logits-histogram", height=LOGITS_HEIGHT, words=words)]


def _sae_address(workspace: "Workspace", index: "FeatureIndex") -> str:
    """What `Workspace.sae` finds the SAE by: its id, or the address of a published one that lies outside."""
    fingerprint = str(index.sae_info["fingerprint"])
    if any(entry.manifest.get("fingerprint") == fingerprint for entry in workspace.saes()):
        return fingerprint[:12]
    source = (index.sae_info.get("metadata") or {}).get("source")
    return str(source) if source else fingerprint[:12]


def python_snippet(workspace: "Workspace", index: "FeatureIndex", feature: int) -> str:
    """Lines that load the feature; they run as they stand, where a published SAE is on this machine."""
    sae = _sae_address(workspace, index)
    return (
        "from scope.workspace import Workspace\n\n"
        f"workspace = Workspace({str(workspace.path.resolve())!r})\n"
        f"index = workspace.index({index.id!r})\n"
        f"feature = index.feature({feature})  # shows itself in a notebook\n"
        f"firings = index.activations([{feature}])  # every firing\n"
        f"examples = index.top_examples({feature}, n=20)\n\n"
        f"sae = workspace.sae({sae!r})\n"
        f"direction = sae.W_dec[{feature}]\n"
    )
