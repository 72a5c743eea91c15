"""`scope serve`: the dashboard."""

from pathlib import Path
from typing import Annotated

import typer

from scope.cli._command import Outcome, command, read_template, say
from scope.cli._model import EmbeddingPlace, EmbeddingsOption

__all__ = ["register", "serve_workspace"]


def serve_workspace(
    path: Path,
    host: str,
    port: int,
    allow_hosts: list[str] | None = None,
    n_links: int = 1,
    chat_template: str | None = None,
    embeddings: EmbeddingPlace = "device",
) -> Outcome:
    """Serve the dashboard of a workspace until it is interrupted."""
    from dashboards import serve
    from scope.workspace import Workspace

    def announce(addresses: list[str]) -> None:
        if "?token=" not in addresses[0]:
            say(f"The dashboard of {path} is at {addresses[0]}  (Ctrl-C stops it)")
            return
        say(f"The dashboard of {path} is open to other machines. Each link lets one browser in, once:")
        for address in addresses:
            say(f"  {address}")
        say("What goes over the network is not encrypted. Ctrl-C stops it.")

    serve(
        Workspace(path),
        host=host,
        port=port,
        allow_hosts=allow_hosts or (),
        n_links=n_links,
        announce=announce,
        chat_template=chat_template,
        embeddings=embeddings,
    )
    return Outcome({"workspace": str(path), "host": host, "port": port}, "Stopped.")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @command(app, "serve")
    def serve(
        workspace: Annotated[Path, typer.Argument(help="The folder with stores, SAEs and indexes.")] = Path(
            "workspace"
        ),
        host: Annotated[
            str,
            typer.Option(
                help="Address to listen at. Anything but this machine's own, such as 0.0.0.0, asks everyone for a "
                "one-time link, which is printed."
            ),
        ] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="Port to listen at.")] = 8050,
        allow_host: Annotated[
            list[str] | None,
            typer.Option(help="A name by which other machines call this one, beside its own. May be repeated."),
        ] = None,
        chat_template: Annotated[
            Path | None,
            typer.Option(
                help="A Jinja file that writes the chats of prompts, in place of the index's or the tokenizer's."
            ),
        ] = None,
        embeddings: EmbeddingsOption = "device",
        links: Annotated[int, typer.Option(help="One-time links to print, where they are needed.", min=1)] = 1,
    ) -> Outcome:
        """Look at features, their examples, and prompts in the browser."""
        from scope.errors import UnknownNameError

        if not workspace.is_dir():
            raise UnknownNameError("workspace", str(workspace), hint="Make one with: scope demo " + str(workspace))
        template = None if chat_template is None else read_template(chat_template)
        return serve_workspace(workspace, host, port, allow_host, links, template, embeddings)
