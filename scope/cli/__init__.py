"""The command line: `scope`. Thin: each command checks its input, calls the library, and says what was done."""

import json
import logging
import sys

import typer

from scope.cli import (
    _command,
    attribution,
    bench,
    capture,
    compare,
    demo,
    denoising,
    diff,
    evaluate,
    excerpt,
    experts,
    export,
    finetune,
    index,
    inspect,
    labels,
    languages,
    per_layer,
    roles,
    sae,
    serve,
    steer,
    store,
    train,
    workspace,
)

__all__ = ["app", "main"]

WRONG_USE = 2

HELP = """\
A mechanistic interpretability workbench: from text to a person looking at a feature.

\b
The line, in order:
  scope capture   run a model over text, keep what its hooks see          text -> STORE
  scope train     train a sparse autoencoder on a store                   STORE -> SAE_DIR
  scope index     note every firing of every feature, both ways           STORE, SAE_DIR -> INDEX
  scope serve     look at features, examples and prompts in the browser   WORKSPACE

`scope demo` does all of it on Gemma 3 270M and a sample text. `scope info` and `scope verify` tell what an
artefact is and whether its bytes are what was written. Every command takes --json (the last line of standard
output is one JSON object) and --config FILE.toml, and exits with 0 (done), 1 (failed) or 2 (something in what was
given is wrong, and nothing was written).
"""

app = typer.Typer(
    name="scope", help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,
)  # fmt: skip
for module in (
    demo,
    capture,
    denoising,
    store,
    export,
    train,
    finetune,
    sae,
    evaluate,
    index,
    excerpt,
    labels,
    compare,
    diff,
    languages,
    roles,
    experts,
    per_layer,
    attribution,
    steer,
    serve,
    inspect,
    workspace,
    bench,
):
    module.register(app)


def main() -> None:
    """The entry point of the command `scope`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app(standalone_mode=True)
    except SystemExit as leaving:
        if leaving.code == WRONG_USE and "--json" in sys.argv and not _command.said_something():
            message = "The command line cannot be read; standard error says why."
            typer.echo(json.dumps({"error": {"type": "UsageError", "message": message}}))
        raise
