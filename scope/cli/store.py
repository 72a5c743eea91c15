"""`scope store`: change a store in place."""

from typing import Annotated

import typer

from scope.cli._command import Outcome, command

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the group of commands to `app`."""
    group = typer.Typer(name="store", help="Change an activation store in place.", no_args_is_help=True)
    app.add_typer(group)
    group.callback()(lambda: None)  # with one command alone the group would become that command

    @command(group, "drop")
    def drop(
        store: Annotated[str, typer.Argument(help="The store: a folder or s3://BUCKET/NAME.")],
        hook: Annotated[
            list[str],
            typer.Option(help="A hook to remove. May be repeated; a * stands for every layer. One must stay."),
        ],
    ) -> Outcome:
        """Remove hooks from a store for good. Its tokens and other hooks stay, as do SAEs and indexes made from it."""
        from activations.hook_patterns import every_layer
        from activations.store import ActivationStore

        opened = ActivationStore.open(store)
        bytes_before = opened.info()["bytes"]
        dropped = opened.drop_hooks(every_layer(hook, opened.hooks))
        freed = bytes_before - opened.info()["bytes"]
        data = {"store": str(store), "dropped": list(dropped), "hooks": list(opened.hooks), "bytes_freed": freed}
        return Outcome(data, f"{store} has lost {', '.join(dropped)} and keeps {', '.join(opened.hooks)}.")
