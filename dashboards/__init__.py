"""The dashboard: what a workspace holds, shown in a browser. `dashboards.serve(workspace)` starts it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from dashboards.notebook import Dashboard
    from scope.models.placement import EmbeddingPlace
    from scope.workspace import Workspace

__all__ = ["serve"]


def serve(
    workspace: "Workspace | str | Path",
    host: str = "127.0.0.1",
    port: int | None = None,
    *,
    allow_hosts: "Iterable[str]" = (),
    n_links: int = 1,
    announce: "Callable[[list[str]], None] | None" = None,
    block: bool | None = None,
    chat_template: str | None = None,
    embeddings: "EmbeddingPlace" = "device",
) -> "Dashboard | None":
    """Serve the dashboard of a workspace: until interrupted or, in a notebook, beside the cells that follow.

    Args:
        workspace: a `scope.workspace.Workspace` or the path of its folder.
        host: the address to bind to. Only requests that name it (or this machine itself) are served. Anything but this
            machine's loopback, such as 0.0.0.0, asks everyone for a one-time link.
        port: the TCP port; 0 takes a free one. By default 8050, in a notebook a free one where that is taken.
        allow_hosts: names that requests may call this machine by, beside its own.
        n_links: one-time links to make, where they are needed: so many browsers are let in.
        announce: is told the addresses at which to look, once they are served; by default they go to standard error
            or, with a handle, nowhere: it shows them.
        block: whether to serve until interrupted; by default everywhere but in a notebook.
        chat_template: a Jinja template that chats are written with, in place of an index's or a tokenizer's own.
        embeddings: "host" keeps the lookup tables of models in the host's memory.

    Returns:
        A handle with `url` and `stop()` where it does not block.

    Raises:
        InvalidInputError: nothing can be served at this address, most often because its port is taken; or an allowed
            host is not a host's name.
    """
    from dashboards.notebook import PORT, in_notebook, start

    if block or (block is None and not in_notebook()):
        from dashboards.app import serve as serve_app

        at = PORT if port is None else port
        serve_app(
            workspace,
            host,
            at,
            allow_hosts=allow_hosts,
            n_links=n_links,
            announce=announce,
            chat_template=chat_template,
            embeddings=embeddings,
        )
        return None
    return start(
        workspace,
        host,
        port,
        allow_hosts=allow_hosts,
        n_links=n_links,
        announce=announce,
        chat_template=chat_template,
        embeddings=embeddings,
    )
