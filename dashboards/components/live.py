"""The live test box of a feature page: a text is typed, the model worker runs it, and the feature's strength colours
its tokens. The text is part of the address (`try`)."""

from typing import Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html
from dash.exceptions import PreventUpdate

from dashboards.components.controls import button, define, link_button
from dashboards.components.progress import Asked, progress_box, register_progress
from dashboards.components.strip import token, token_strip
from dashboards.context import Context
from dashboards.format import exact, number
from dashboards.links import prompt_link
from dashboards.prompts import Analysis, prompt_jobs
from dashboards.worker import Job
from scope.errors import ScopeError

__all__ = ["live_box", "register"]


def live_box(index: str, feature: int, text: str) -> html.Section:
    """The box, with the text of the address in it."""
    return html.Section(
        className="live",
        **{"aria-label": "Test this feature on a text"},
        children=[
            html.Div(
                className="live-form",
                children=[
                    dmc.Textarea(
                        id="live-text",
                        value=text,
                        placeholder="Type a text to test it on",
                        autosize=True,
                        minRows=1,
                        maxRows=8,
                        attributes={"input": {"aria-label": "Text to test the feature on", "spellcheck": "false"}},
                    ),
                    button("Test", id="live-run", **{"data-run": "true", "title": "Ctrl Enter"}),
                ],
            ),
            progress_box("live"),
            html.Div(id="live-result", **{"aria-live": "polite"}),
            dcc.Store(id="live-request", data={"text": text, "index": index, "feature": feature}),
        ],
    )


def register(app: Dash, context: Context) -> None:
    """From the text to a job, and from its result to coloured tokens."""
    app.clientside_callback(
        ClientsideFunction("scope", "runLive"),
        Output("live-request", "data"),
        Input("live-run", "n_clicks"),
        State("live-request", "data"),
        prevent_initial_call=True,
    )

    @app.callback(Output("live-job", "data"), Input("live-request", "data"))
    def start(asked: Asked | None) -> Asked:
        if not asked or not str(asked.get("text") or "").strip():
            raise PreventUpdate
        try:
            job = prompt_jobs(context).submit_analysis(asked["index"], asked["text"])
        except ScopeError as problem:
            return {**asked, "problem": str(problem)}
        return {**asked, "id": job.id}

    register_progress(
        app,
        context.worker,
        "live",
        lambda asked, job: _result(context, asked, job),
        "The text could not be run",
    )


def _result(context: Context, asked: Asked, job: Job) -> Any:
    analysis: Analysis = job.result
    index, feature = context.index(asked["index"]), int(asked["feature"])
    values = analysis.features.values_of(feature)
    largest = float(index.table["max_value"].iloc[feature])
    strip = token_strip(
        analysis.features.tokens,
        values.tolist(),
        scale=largest or float(values.max(initial=0)) or 1.0,
        label="The text, coloured by this feature's strength. Arrow keys step through the tokens.",
        special=analysis.special,
        extra={"c": 0},
    )
    return html.Div([strip, html.P(_words(analysis, values, largest, asked), className="small muted")])


def _words(analysis: Analysis, values: Any, largest: float, asked: Asked) -> list[Any]:
    link = link_button(
        "All features on this text", href=prompt_link(asked["index"], text=asked["text"], feature=asked["feature"])
    )
    best = int(values.argmax())
    if values[best] <= 0:
        return ["It does not fire on this text. ", link]
    share = f", {number(100 * float(values[best]) / largest)}% of the strongest in the index" if largest else ""
    strongest = html.Span(number(float(values[best])), className="number", title=exact(float(values[best])))
    return [
        "Strongest on ",
        token(analysis.features.tokens[best]),
        ": ",
        strongest,
        share,
        define("strength"),
        " ",
        link,
    ]
