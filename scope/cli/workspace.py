"""`scope workspace`: list what a workspace holds, take in what lies elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command
from scope.cli.sae import DownloadOption, HookOption, HookOutOption

__all__ = ["register"]

Folder = Annotated[Path, typer.Option("--workspace", help="The workspace folder.")]


def register(app: typer.Typer) -> None:
    """Add the group of commands to `app`."""
    group = typer.Typer(name="workspace", help="List what a workspace holds, and add to it.", no_args_is_help=True)
    app.add_typer(group)

    @command(group, "list")
    def list_entries(workspace: Folder = Path("workspace")) -> Outcome:
        """The stores, SAEs, indexes, excerpts and circuit graphs of a workspace."""
        from scope.workspace import Workspace

        entries = Workspace(workspace).entries()
        data = [
            {"kind": entry.kind, "id": entry.id, "name": entry.name, "path": str(entry.path), "problem": entry.problem}
            for entry in entries
        ]
        lines = [f"{entry.kind:<18}{entry.id or '-':<14}{entry.problem or entry.path}" for entry in entries]
        return Outcome({"entries": data}, "\n".join(lines) or f"{workspace} is empty. Fill it with: scope demo")

    @command(group, "add")
    def add(
        path: Annotated[
            str,
            typer.Argument(
                help="A store, SAE, index, excerpt or circuit graph that lies elsewhere; or an SAE in any readable "
                "format, hf://OWNER/REPOSITORY/FOLDER@REVISION, or SAELens's RELEASE/ID."
            ),
        ],
        workspace: Folder = Path("workspace"),
        name: Annotated[
            str | None, typer.Option(help="Of an SAE that is copied: its name; by default the last part of PATH.")
        ] = None,
        hook: HookOption = None,
        hook_out: HookOutOption = None,
        allow_download: DownloadOption = False,
    ) -> Outcome:
        """Take in an artefact that lies elsewhere; it stays where it is. An SAE of another tool, or from the hub, is
        copied into the workspace in SAELens's format, so that the dashboard lists it."""
        from scope.workspace import Workspace

        entry = Workspace(workspace).add(path, name=name, hook=hook, hook_out=hook_out, allow_download=allow_download)
        text = f"Added {entry.kind} {entry.id}, {entry.path}."
        return Outcome({"kind": entry.kind, "id": entry.id, "path": str(entry.path)}, text)
