"""The dashboard's application: `create_app` puts the pages together, `serve` serves them through waitress.

1. The browser's address is the state. `#view` holds the address to draw (assets/10_navigate.js writes it on the first
   visit, on links, on back and forward); one callback draws it.
2. A page is a module with `render(context, view)` and `register(app, context)`; what happens within a page is in its
   own callbacks, which keep the address in step.
3. Whatever goes wrong becomes a panel that says what happened to this request.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash import ClientsideFunction, Dash, Input, Output, no_update, set_props
from dash.exceptions import PreventUpdate
from flask import Response

from dashboards import api, security
from dashboards.components import shell, states
from dashboards.components.charts import theme_of_request
from dashboards.context import Context, NoIndexError
from dashboards.links import View, parse
from dashboards.pages import Page, compare, feature, features, lens, prompt, training, workspace
from dashboards.worker import ModelWorker
from scope.errors import InvalidInputError, ScopeError, UnknownNameError
from scope.figures import PALETTES, css_variables

if TYPE_CHECKING:
    from scope.workspace import Workspace

__all__ = ["create_app", "serve"]

LOG = logging.getLogger("dashboards")
NAME = "Scope"
THREADS = 8
MAX_REQUEST = 2**22
"""Bytes of a request, at most."""
PAGES: dict[str, Callable[[Context, View], Page]] = {
    "workspace": workspace.render,
    "features": features.render,
    "feature": feature.render,
    "prompt": prompt.render,
    "lens": lens.render,
    "training": training.render,
    "compare": compare.render,
}
"""What draws each page. One that is not here has no entry in the rail."""
REGISTERED = (features, feature, prompt, lens, training, compare)
"""Pages with callbacks of their own."""
ADDRESSES = ["/", "/features", "/feature/ID", "/prompt", "/lens", "/training", "/training/ID", "/compare"]
INDEX = """<!DOCTYPE html>
<html lang="en">
  <head>
    {%metas%}
    <title>{%title%}</title>
    {%favicon%}
    <link rel="stylesheet" href="/palette.css">
    {%css%}
    <script src="/assets/theme.js"></script>
  </head>
  <body>
    {%app_entry%}
    <footer>{%config%}{%scripts%}{%renderer%}</footer>
  </body>
</html>
"""


def create_app(workspace: "Workspace", *, host: str = "127.0.0.1", worker: ModelWorker | None = None) -> Dash:
    """The dashboard of a workspace as a Dash application (`.server` is its Flask application).

    Args:
        workspace: what to show. It may be empty.
        host: the address that it will be served at; requests for other hosts are refused.
        worker: runs the model; by default a new one, which loads the model when it is first needed.
    """
    context = Context(workspace, worker)
    app = Dash(
        "dashboards",
        title=NAME,
        update_title=None,
        index_string=INDEX,
        assets_ignore=r"^theme\.js$",
        suppress_callback_exceptions=True,
        serve_locally=True,
        enable_mcp=False,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
        on_error=_log_and_keep,
    )
    app.layout = lambda: shell.shell(theme_of_request(), PAGES)
    _register_router(app, context)
    for page in REGISTERED:
        page.register(app, context)
    api.register(app.server, context)
    app.server.add_url_rule("/palette.css", "palette", _palette)
    security.protect(app, host)
    return app


def serve(workspace: "Workspace | str | Path", host: str = "127.0.0.1", port: int = 8050) -> None:
    """Serve the dashboard of a workspace until interrupted: one process, threads for requests, one for the model.

    Raises:
        InvalidInputError: nothing can be served at this address, most often because its port is taken.
    """
    import waitress

    from scope.workspace import Workspace

    opened = workspace if isinstance(workspace, Workspace) else Workspace(workspace)
    app = create_app(opened, host=host)
    try:
        server = waitress.create_server(
            app.server, host=host, port=port, threads=THREADS, ident=None, max_request_body_size=MAX_REQUEST
        )
    except (OSError, OverflowError) as problem:
        raise InvalidInputError(
            f"The dashboard cannot be served at {host}:{port} ({problem}). Is it served already? Give another --port."
        ) from problem
    server.run()


def draw(context: Context, view: View) -> Page:
    """Draw a view; an error becomes the page."""
    try:
        if view.page not in PAGES:
            raise UnknownNameError("page", view.path, ADDRESSES)
        return PAGES[view.page](context, view)
    except NoIndexError:
        return Page(states.no_index(), "No index yet", view.page)
    except Exception as problem:
        return Page(states.error(problem, "This view could not be shown"), "Not shown", view.page)


def _register_router(app: Dash, context: Context) -> None:
    app.clientside_callback(ClientsideFunction("scope", "start"), Output("view", "data"), Input("page", "id"))
    app.clientside_callback(
        ClientsideFunction("scope", "drawn"),
        Output("page", "title"),
        Input("content", "children"),
        Input("about", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("scope", "showTrouble"),
        Output("trouble", "storage_type"),
        Input("trouble", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("scope", "switchIndex"),
        Output("index-select", "className"),
        Input("index-select", "value"),
        prevent_initial_call=True,
    )

    @app.callback(
        Output("content", "children"),
        Output("header", "children"),
        Output("about", "data"),
        Input("view", "data"),
        prevent_initial_call=True,
    )
    def show(data: dict[str, Any] | None) -> tuple[Any, Any, Any]:
        if not data:
            raise PreventUpdate
        view = parse(data["path"], data["search"])
        page = draw(context, view)
        about = {
            "title": f"{page.title} · {NAME}",
            "page": view.page,
            "rail": page.rail,
            "address": page.address,
            "index": _current_index(context, view),
            "visit": data.get("visit"),
        }
        return page.content, _header(context, view), about


def _current_index(context: Context, view: View) -> str:
    try:
        return context.entry(view).id
    except (ScopeError, OSError):
        return ""


def _header(context: Context, view: View) -> Any:
    if view.page == "workspace" and not view.index:
        return shell.header([], None)
    try:
        return shell.header(context.indexes(), context.index(context.entry(view).id))
    except (ScopeError, OSError):
        return shell.header([], None)


def _log_and_keep(problem: Exception) -> Any:
    """The last resort for a callback that has no panel of its own: the page stays as it is, and says so."""
    LOG.error("A callback failed", exc_info=problem)
    words = str(problem) if isinstance(problem, ScopeError) else f"{type(problem).__name__}: {problem}"
    set_props("trouble", {"data": {"text": f"That did not work. {words}", "at": time.time()}})
    return no_update


def _palette() -> Response:
    """The colours of both themes as CSS variables, from the one place that defines them."""
    rules = []
    for theme in PALETTES:
        body = "".join(f"{name}:{value};" for name, value in css_variables(theme).items())
        rules.append(f'html[data-mantine-color-scheme="{theme}"]{{{body}color-scheme:{theme};}}')
    return Response("\n".join(rules), mimetype="text/css")
