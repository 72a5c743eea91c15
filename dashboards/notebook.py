"""The dashboard beside a notebook's cells: served by a thread, shown as a link, stopped by hand."""

import sys
import threading
from collections.abc import Callable, Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from scope.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

    from scope.models.placement import EmbeddingPlace
    from scope.workspace import Workspace

__all__ = ["Dashboard", "in_notebook", "start"]

PORT = 8050
PATIENCE = 60.0
"""Seconds that `stop` waits for requests under way."""


class Dashboard:
    """A dashboard that is being served. It ends with `stop()`, at the end of a `with` block, or with the process."""

    def __init__(self, server: Any, urls: list[str]) -> None:
        self.urls = urls
        """Where to look; with one-time links, one for each."""
        self._server = server
        self._thread = threading.Thread(target=server.run, name="dashboard", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where to look."""
        return self.urls[0]

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Serve no longer, and free the port. Stopping twice does nothing."""
        if not self.running:
            return
        sockets = getattr(self._server, "_map", None) or self._server.map
        trigger = next(one for one in sockets.values() if hasattr(one, "pull_trigger"))
        # Sockets are closed by the thread that waits on them: its loop ends when none is left.
        trigger.pull_trigger(lambda: [one.close() for one in list(sockets.values())])
        self._thread.join(PATIENCE)
        self._server.task_dispatcher.shutdown(timeout=PATIENCE)

    def __enter__(self) -> "Dashboard":
        return self

    def __exit__(self, *problem: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Dashboard({self.url!r}{'' if self.running else ', stopped'})"

    def _repr_html_(self) -> str:
        if not self.running:
            return f"<p>The dashboard at <code>{escape(self.url)}</code> is stopped.</p>"
        links = " · ".join(
            f'<a href="{escape(url)}" target="_blank" rel="noopener">{escape(url)}</a>' for url in self.urls
        )
        return f"<p>The dashboard is at {links}. <code>stop()</code> ends it.</p>"


def in_notebook() -> bool:
    """Whether this runs in a cell of a notebook: in a Jupyter kernel, where a call that blocks holds up the rest."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def start(
    workspace: "Workspace | str | Path",
    host: str,
    port: int | None,
    *,
    allow_hosts: Iterable[str] = (),
    n_links: int = 1,
    announce: Callable[[list[str]], None] | None = None,
    chat_template: str | None = None,
    embeddings: "EmbeddingPlace" = "device",
) -> Dashboard:
    """Serve a workspace without blocking; see `dashboards.serve`."""
    from dashboards.app import bind

    options: dict[str, Any] = {
        "allow_hosts": allow_hosts,
        "n_links": n_links,
        "chat_template": chat_template,
        "embeddings": embeddings,
    }
    try:
        server, urls = bind(workspace, host, PORT if port is None else port, **options)
    except InvalidInputError:
        if port is not None:
            raise
        server, urls = bind(workspace, host, 0, **options)
    if announce is not None:
        announce(urls)
    return Dashboard(server, urls)
