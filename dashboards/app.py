"""The dashboard's application: `create_app` puts the pages together, `serve` serves them through waitress.

1. The browser's address is the state. `#view` holds the address to draw (assets/10_navigate.js writes it on the first
   visit, on links, on back and forward); one callback draws it.
2. An answer says which visit it belongs to: one that a later visit has overtaken changes nothing but what it drew, and
   the browser asks again where it came last. The rail is never drawn anew, the header only for another index.
3. A page is a module with `render(context, view)` and `register(app, context)`; what happens within a page is in its
   own callbacks, which keep the address in step.
4. Whatever goes wrong becomes a panel that says what happened to this request.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash import ClientsideFunction, Dash, Input, Output, State, no_update, set_props
from dash.exceptions import DependencyException, PreventUpdate
from flask import Response

from dashboards import api, circuit_api, exports, media, security
from dashboards.access import Access
from dashboards.components import labels, shell, states
from dashboards.components.charts import theme_of_request
from dashboards.context import Context, NoIndexError
from dashboards.links import View, parse
from dashboards.pages import (
    Page,
    circuit,
    compare,
    embeddings,
    experts,
    feature,
    features,
    generation,
    lens,
    model,
    prompt,
    steer,
    training,
    workspace,
)
from dashboards.turns import in_turn
from dashboards.worker import ModelWorker
from scope.errors import InvalidInputError, ScopeError, UnknownNameError
from scope.figures import PALETTES, css_variables

if TYPE_CHECKING:
    from scope.models.placement import EmbeddingPlace
    from scope.workspace import Workspace

__all__ = ["bind", "create_app", "serve"]

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
    "circuit": circuit.render,
    "steer": steer.render,
    "training": training.render,
    "compare": compare.render,
    "model": model.render,
    "embeddings": embeddings.render,
    "experts": experts.render,
    "generation": generation.render,
}
"""What draws each page. One that is not here has no entry in the rail."""
REGISTERED = (workspace, features, feature, prompt, lens, circuit, steer, training, compare, model, embeddings, experts)
"""Pages with callbacks of their own."""
ABOUT_AN_INDEX = ("features", "feature", "prompt", "lens", "steer", "model", "embeddings", "experts", "generation")
"""Pages that show the first index where their address names none."""
ADDRESSES = [
    "/",
    "/features",
    "/feature/ID",
    "/prompt",
    "/lens",
    "/circuit",
    "/steer",
    "/training",
    "/training/ID",
    "/compare",
    "/model",
    "/embeddings",
    "/experts",
    "/generation",
]
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


def create_app(
    workspace: "Workspace",
    *,
    host: str = "127.0.0.1",
    worker: ModelWorker | None = None,
    allow_hosts: Iterable[str] = (),
    access: Access | None = None,
    chat_template: str | None = None,
    embeddings: "EmbeddingPlace" = "device",
) -> Dash:
    """The dashboard of a workspace as a Dash application (`.server` is its Flask application).

    Args:
        workspace: what to show. It may be empty.
        host: the address that it will be served at; requests for other hosts are refused.
        worker: runs the model; by default a new one, which loads the model when it is first needed.
        allow_hosts: further names that requests may call it by.
        access: who is let in; None lets in everyone who can reach it.
        chat_template: a Jinja template that chats are written with, in place of an index's or a tokenizer's own.
        embeddings: where the lookup tables of models lie, as for `LanguageModel.load`.

    Raises:
        InvalidInputError: a name in `allow_hosts` is not a host's name.
    """
    context = Context(workspace, worker, chat_template, embeddings)
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
    labels.register(app, context)
    api.register(app.server, context)
    exports.register(app.server, context)
    media.register(app.server, context)
    circuit_api.register(app.server, context)
    app.server.add_url_rule("/palette.css", "palette", _palette)
    app.server.register_error_handler(DependencyException, lambda problem: ("There is no such library.", 404))
    security.protect(app, security.hosts_of(host, allow_hosts), access)
    app.server.wsgi_app = in_turn(app.server.wsgi_app)
    return app


def serve(
    workspace: "Workspace | str | Path",
    host: str = "127.0.0.1",
    port: int = 8050,
    *,
    allow_hosts: Iterable[str] = (),
    n_links: int = 1,
    announce: Callable[[list[str]], None] | None = None,
    chat_template: str | None = None,
    embeddings: "EmbeddingPlace" = "device",
) -> None:
    """Serve the dashboard of a workspace until interrupted: one process, threads for requests, one for the model.

    Args:
        workspace: a workspace or its folder.
        host: the address to bind to. Anything but this machine's loopback is served to those alone who come by a
            one-time link.
        port: the TCP port; 0 takes a free one.
        allow_hosts: names that requests may call this machine by, beside its own.
        n_links: one-time links to make, where they are needed.
        announce: is told the addresses at which to look, once they are served; by default they go to standard error.
        chat_template: as for `create_app`.
        embeddings: as for `create_app`.

    Raises:
        InvalidInputError: nothing can be served at this address, most often because its port is taken; or an allowed
            host is not a host's name.
    """
    server, addresses = bind(
        workspace,
        host,
        port,
        allow_hosts=allow_hosts,
        n_links=n_links,
        chat_template=chat_template,
        embeddings=embeddings,
    )
    (announce or _tell)(addresses)
    server.run()


def bind(
    workspace: "Workspace | str | Path",
    host: str,
    port: int,
    *,
    allow_hosts: Iterable[str] = (),
    n_links: int = 1,
    chat_template: str | None = None,
    embeddings: "EmbeddingPlace" = "device",
) -> tuple[Any, list[str]]:
    """The waitress server of a dashboard, bound and not yet run, and the addresses at which to look; see `serve`."""
    import waitress

    from scope.workspace import Workspace

    opened = workspace if isinstance(workspace, Workspace) else Workspace(workspace)
    hosts = security.hosts_of(host, allow_hosts)
    access = None if security.is_loopback(host) else Access(n_links)
    app = create_app(
        opened,
        host=host,
        allow_hosts=allow_hosts,
        access=access,
        chat_template=chat_template,
        embeddings=embeddings,
    )
    try:
        server = waitress.create_server(
            app.server, host=host, port=port, threads=THREADS, ident=None, max_request_body_size=MAX_REQUEST
        )
    except (OSError, OverflowError, ValueError) as problem:
        raise InvalidInputError(
            f"The dashboard cannot be served at {host}:{port} ({problem}). Is it served already? Give another --port."
        ) from problem
    at = getattr(server, "effective_port", port)
    return server, access.links(hosts[0].strip("[]"), at) if access else [f"http://{hosts[0]}:{at}"]


def _tell(addresses: list[str]) -> None:
    """On standard error and not in a log: these may let somebody in."""
    sys.stderr.write("".join(f"The dashboard is at {address}\n" for address in addresses))


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
        State("about", "data"),
        prevent_initial_call=True,
    )
    def show(data: dict[str, Any] | None, before: dict[str, Any] | None) -> tuple[Any, Any, Any]:
        if not data:
            raise PreventUpdate
        view = parse(data["path"], data["search"])
        page = draw(context, view)
        index = _current_index(context, view)
        about = {
            "title": f"{page.title} · {NAME}",
            "page": view.page,
            "rail": page.rail,
            "address": page.address,
            "index": index,
            "visit": data.get("visit"),
        }
        same = before is not None and before.get("index") == index
        return page.content, no_update if same else _header(context, index), about


def _current_index(context: Context, view: View) -> str:
    """The index that a view is about; "" for one that is about none."""
    if view.page not in ABOUT_AN_INDEX and not view.index:
        return ""
    try:
        return context.entry(view).id
    except (ScopeError, OSError):
        return ""


def _header(context: Context, index: str) -> Any:
    if not index:
        return shell.header([], None)
    try:
        return shell.header(context.indexes(), context.index(index))
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
