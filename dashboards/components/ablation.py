"""What a feature is worth to the model: on demand the model worker ablates it on its strongest examples, and the change
of the loss colours their tokens. That it has been asked for is part of the address (`ablate`)."""

from typing import TYPE_CHECKING

from dash import Dash, dcc, html

from dashboards.components.controls import button, define, link_button
from dashboards.components.progress import progress_box, register_demand
from dashboards.components.strip import legend, token_strip
from dashboards.context import Context
from dashboards.format import exact, number, plural
from dashboards.links import steer_link
from dashboards.prompts import prompt_jobs
from dashboards.worker import Job

if TYPE_CHECKING:
    from scope.features.ablation import AblationEffect

__all__ = ["ablation_box", "register"]

EXAMPLES = 12
CLIP = 0.99
"""Quantile of the changes' size that gets the full colour: one token can move ten times as far as all others."""
TIME_LIMIT = 600.0
"""Seconds."""


def ablation_box(context: Context, index: str, feature: int, asked: bool) -> html.Section:
    """The part of a feature's page; `asked` where the address asks for the effect."""
    known = context.worker.result(_key(index, feature))
    return html.Section(
        className="panel ablation",
        children=[
            html.Header(
                [
                    html.H2("What it does for the loss"),
                    define("ablation"),
                    html.Span(f"ablated on its {EXAMPLES} strongest examples", className="unit"),
                    link_button("Steer with it", href=steer_link(index, push=f"{feature}:1"), className="push"),
                ]
            ),
            progress_box("ablation"),
            html.Div(
                draw(known) if known is not None else [] if asked else button("Ablate it", id="ablation-ask"),
                id="ablation-result",
            ),
            dcc.Store(id="ablation-request", data={"ask": 1} if asked and known is None else None),
        ],
    )


def register(app: Dash, context: Context) -> None:
    """From the button to a job, and from its result to coloured tokens."""

    def submit(index: str, feature: int) -> Job:
        return context.worker.submit(
            _key(index, feature), lambda job: _ablate(context, job, index, feature), TIME_LIMIT
        )

    register_demand(app, context.worker, "ablation", "askAblation", submit, draw, "The feature could not be ablated")


def _key(index: str, feature: int) -> tuple[str, str, int]:
    return ("ablation", index, feature)


def _ablate(context: Context, job: Job, index: str, feature: int) -> "AblationEffect":
    from scope.features.ablation import ablation_effect

    model, sae = prompt_jobs(context).loaded(job, index)
    job.report("reading the examples with it and without")
    return ablation_effect(
        context.index(index),
        model,
        sae,
        feature,
        EXAMPLES,
        progress=lambda done, total: job.report("reading the examples with it and without", done, total),
    )


def draw(found: "AblationEffect") -> html.Div:
    """The mean change, and each example with the change at each of its tokens."""
    sizes = found.tokens["change"].abs().dropna()
    scale = float(sizes.quantile(CLIP)) if len(sizes) else 0.0
    low, high = found.interval
    known = f"95% interval {number(low)} to {number(high)}" if low == low else "no interval: all of one document"
    words = "rises" if found.mean_change > 0 else "falls"
    summary = html.P(
        [
            f"Without it the loss {words} by ",
            html.Strong(f"{number(abs(found.mean_change))} nats a token", title=exact(found.mean_change)),
            f" after it fires ({known}), over {plural(len(found.examples), 'example')}.",
        ]
    )
    about = html.Div(
        [legend(scale, "effect", "change of the loss on the token, nats"), define("ablation")],
        className="legend-with-help",
    )
    lines = [_line(found, place, scale) for place in range(len(found.examples))]
    return html.Div([summary, about, *lines], className="examples")


def _line(found: "AblationEffect", place: int, scale: float) -> html.Div:
    example = found.examples.iloc[place]
    tokens = found.tokens[found.tokens["example"] == place]
    strip = token_strip(
        tokens["token"].tolist(),
        tokens["change"].fillna(0.0).tolist(),
        scale=scale or 1.0,
        kind="effect",
        centre=int(example["row"] - tokens["row"].iloc[0]),
        label="An example, coloured by how the loss on each token changes without the feature",
        extra={"r": int(tokens["row"].iloc[0])},
    )
    change = float(example["change"])
    sign = "+" if change > 0 else ""
    return html.Div(
        className="example",
        children=[
            strip,
            html.Div(
                html.Div(f"{sign}{number(change)}", className="value number", title=f"{exact(change)} nats a token"),
                className="example-side",
            ),
            html.Div(
                [html.Bdi(example["title"]), f" · next token {number(float(example['next_change']))} nats"],
                className="from",
            ),
        ],
    )
