"""Images and sounds that are handed over for a prompt: taken in, listed, let go (assets/25_prompt.js puts them into the
address when the prompt is run)."""

from collections.abc import Sequence
from typing import Any

from dash import Dash, Input, Output, State, no_update
from dash.exceptions import PreventUpdate

from dashboards.components.prompt_form import file_chips
from dashboards.context import Context
from dashboards.prompts import MAX_FILES
from dashboards.uploads import uploads_of
from scope.errors import ScopeError

__all__ = ["register"]

Files = list[list[str]]


def register(app: Dash, context: Context) -> None:
    """The callbacks of the prompt form's files."""

    @app.callback(
        Output("prompt-files", "data"),
        Output("prompt-file-problem", "children"),
        Input("prompt-upload", "contents"),
        State("prompt-upload", "filename"),
        State("prompt-files", "data"),
        prevent_initial_call=True,
    )
    def take(contents: str | None, name: str | None, now: Files | None) -> tuple[Any, Any]:
        if not contents:
            raise PreventUpdate
        files = list(now or [])
        if len(files) >= MAX_FILES:
            return no_update, f"A prompt takes up to {MAX_FILES} images and sounds."
        try:
            found = uploads_of(context).add(name or "", contents)
        except ScopeError as problem:
            return no_update, str(problem)
        return [*files, [found.digest, found.name]], ""

    @app.callback(Output("prompt-file-chips", "children"), Input("prompt-files", "data"), prevent_initial_call=True)
    def listed(files: Sequence[Sequence[str]] | None) -> list[Any]:
        return file_chips(files or [])
