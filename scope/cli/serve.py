"""`scope serve`: the dashboard."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command, say

__all__ = ["register", "serve_workspace"]


def serve_workspace(path: Path, host: str, port: int) -> Outcome:
    """Serve the dashboard of a workspace until it is interrupted."""
    from dashboards import serve
    from scope.workspace import Workspace

    say(f"The dashboard of {path} is at http://{host}:{port}  (Ctrl-C stops it)")
    serve(Workspace(path), host=host, port=port)
    return Outcome({"workspace": str(path), "host": host, "port": port}, "Stopped.")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "serve")
    def serve(
        workspace: Annotated[Path, typer.Argument(help="The folder with stores, SAEs and indexes.")] = Path(
            "workspace"
        ),
        host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="Port to listen at.")] = 8050,
    ) -> Outcome:
        """Look at features, their examples, and prompts in the browser."""
        from scope.errors import UnknownNameError

        if not workspace.is_dir():
            raise UnknownNameError("workspace", str(workspace), hint="Make one with: scope demo " + str(workspace))
        return serve_workspace(workspace, host, port)
