"""The dashboard: what a workspace holds, shown in a browser. `dashboards.serve(workspace)` starts it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from scope.workspace import Workspace

__all__ = ["serve"]


def serve(workspace: "Workspace | str | Path", host: str = "127.0.0.1", port: int = 8050) -> None:
    """Serve the dashboard of a workspace until interrupted.

    Args:
        workspace: a `scope.workspace.Workspace` or the path of its folder.
        host: the address to bind to. Only requests that name it (or this machine itself) are served, and there is no
            login: leave it at 127.0.0.1 unless everyone on the network may look.
        port: the TCP port.

    Raises:
        InvalidInputError: nothing can be served at this address, most often because its port is taken.
    """
    from dashboards.app import serve as serve_app

    serve_app(workspace, host, port)
