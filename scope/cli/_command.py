"""How every command of the CLI behaves: options, output, errors, exit codes.

`command` turns a function that returns an `Outcome` into a typer command:

1. its own parameters, the fields of a config dataclass (each default stands once, beside its docstring, in the
   config), `--config FILE.toml` and `--json` become options;
2. the outcome is printed on standard output, as text or, with `--json`, as one JSON object on the last line;
   progress and logs go to standard error;
3. the exit code is 0 (done), 1 (failed) or 2 (something in what was given is wrong; nothing was written).
"""

import ast
import dataclasses
import inspect
import itertools
import json as json_module
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

import typer

from scope.errors import InterruptedRunError, InvalidInputError, NonFiniteError, ScopeError

__all__ = ["Outcome", "command", "follows", "progress_bar", "say"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did."""

    data: dict[str, Any]
    """JSON-able; what is no number becomes null."""
    text: str
    """The same for a person."""
    exit_code: int = 0


_answered = False


def said_something() -> bool:
    """Whether a command of this process has printed its answer or its error."""
    return _answered


def _answer(line: str) -> None:
    global _answered
    _answered = True
    typer.echo(line)


def follows() -> bool:
    """Whether this process works for another one, of those that torchrun started, which says what is to be said."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def say(message: str) -> None:
    """A line of log, on standard error."""
    if not follows():
        typer.echo(message, err=True)


ProgressCallback = Callable[[int, int | None], None]


@contextmanager
def progress_bar(label: str) -> Iterator[ProgressCallback]:
    """A progress bar on standard error as a context; what it yields takes (done, total or None)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=follows() or not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        last_tenth = -1

        def update(done: int, total: int | None) -> None:
            nonlocal last_tenth
            progress.update(task, completed=done, total=total)
            tenth = done * 10 // total if total else 0
            if not console.is_terminal and tenth != last_tenth:
                last_tenth = tenth
                say(f"{label}: {done:,}{f' of {total:,}' if total else ''}")

        yield update


def command(
    app: typer.Typer,
    name: str,
    config: type | None = None,
    required: Iterable[str] = (),
    several: Iterable[str] = (),
) -> Callable[[Callable[..., Outcome]], Callable[..., None]]:
    """Register a function as a command of `app`.

    Args:
        app: the typer application.
        name: the command's name.
        config: a frozen dataclass; its fields become options, and the function's parameter `config` gets the object.
        required: fields of `config` that must be given.
        several: fields of `config` that take several values, separated by commas. `config` has the first of each, and
            the function's parameter `swept` gets all: by field, a tuple of values.
    """

    def decorate(function: Callable[..., Outcome]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name not in ("config", "swept")
        ]
        from_config = _config_parameters(config, set(required), set(several)) if config is not None else []

        def run(**values: Any) -> None:
            as_json = values.pop("json")
            values.pop("config_file")
            try:
                if config is not None:
                    fields = {parameter.name: values.pop(parameter.name) for parameter in from_config}
                    values |= _configured(config, fields, several)
                outcome = function(**values)
            except ScopeError as error:
                _fail(error, as_json, 2 if isinstance(error, InvalidInputError) else 1)
            except KeyboardInterrupt:
                _fail(KeyboardInterrupt("Interrupted."), as_json, 1)
            except OSError as error:
                _fail(error, as_json, 1)
            _answer(_as_json(outcome.data) if as_json else outcome.text)
            raise typer.Exit(outcome.exit_code)

        run.__signature__ = inspect.Signature([*own, *from_config, *_common_parameters()])  # type: ignore[attr-defined]
        run.__doc__ = function.__doc__
        run.__name__ = function.__name__
        app.command(name)(run)
        return run

    return decorate


def _as_json(data: dict[str, Any]) -> str:
    from activations.plain import plain

    return json_module.dumps(plain(data), default=str, allow_nan=False)


def _fail(error: BaseException, as_json: bool, exit_code: int) -> NoReturn:
    if follows():
        # What all processes find wrong, the first one says. What befell this one alone is for this one to say.
        common = isinstance(error, InvalidInputError | NonFiniteError | InterruptedRunError | KeyboardInterrupt)
        if not common and not getattr(error, "told", True):
            typer.echo(f"Error (process {os.environ['RANK']}): {error}", err=True)
        raise typer.Exit(exit_code)
    say(f"Error: {error}")
    if as_json:
        _answer(json_module.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
    raise typer.Exit(exit_code)


def _common_parameters() -> list[inspect.Parameter]:
    json_option = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of output.")]
    config_option = Annotated[
        Path | None,
        typer.Option("--config", callback=_load_defaults, is_eager=True, help="A TOML file with values for the flags."),
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("config_file", keyword, default=None, annotation=config_option),
        inspect.Parameter("json", keyword, default=False, annotation=json_option),
    ]


def _load_defaults(context: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as TOML: {error}") from error
    known = {str(parameter.name): parameter for parameter in context.command.params}
    renamed = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(renamed) - set(known))
    if unknown:
        raise typer.BadParameter(f"{path} sets {', '.join(unknown)}, which {context.info_name} does not know.")
    for name, value in renamed.items():
        takes_several = getattr(known[name], "multiple", False)
        if takes_several and not isinstance(value, list):
            renamed[name] = [value]
        elif isinstance(value, list) and not takes_several:
            renamed[name] = ",".join(map(str, value))
    context.default_map = {**(context.default_map or {}), **renamed}
    return path


def _config_parameters(config: type, required: set[str], several: set[str]) -> list[inspect.Parameter]:
    hints = get_type_hints(config)
    documentation = _field_docstrings(config)
    parameters = []
    for field in dataclasses.fields(config):
        default = inspect.Parameter.empty if field.name in required else field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else default
        flag = "--" + field.name.replace("_", "-")
        declaration = f"{flag}/--no-{flag[2:]}" if hints[field.name] is bool else flag
        hint: Any = hints[field.name]
        told = documentation.get(field.name, "")
        if field.name in several:
            told += " Several, separated by commas, make a sweep."
        if field.name in several or _is_list(hint):
            hint, default = (
                str | None,
                default if default is inspect.Parameter.empty or default is None else str(default),
            )
        option = typer.Option(declaration, help=told)
        annotation = Annotated[hint, option]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return parameters


def _is_list(hint: Any) -> bool:
    """Whether a field's type is `tuple[X, ...]`, or that or None."""
    return any(get_origin(part) is tuple for part in (hint, *get_args(hint)))


def _item_type(hint: Any) -> type:
    """The type of one value of a field: X of X, `X | None`, `tuple[X, ...]` and `tuple[X, ...] | None`."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    first = next(part for part in parts if part is not type(None))
    item: type = get_args(first)[0] if get_origin(first) is tuple else first
    return item


def _configured(config: type, given: dict[str, Any], several: Iterable[str]) -> dict[str, Any]:
    """The config from its options, and with `several` all values of each of these."""
    hints, names = get_type_hints(config), tuple(several)
    parsed: dict[str, tuple[Any, ...]] = {}
    for name, text in given.items():
        if text is not None and (name in names or _is_list(hints[name])):
            parsed[name] = _listed(name, text, _item_type(hints[name]))
    first = {name: values if _is_list(hints[name]) else values[0] for name, values in parsed.items()}
    made = {"config": config(**{**given, **first})}
    return {**made, "swept": {name: parsed[name] for name in names if name in parsed}} if names else made


def _listed(name: str, text: str, item: type) -> tuple[Any, ...]:
    try:
        return tuple(item(part.strip()) for part in str(text).strip("[]() ").split(",") if part.strip(" '\""))
    except ValueError as error:
        raise InvalidInputError(
            f"{name} is {text!r}; expected one {item.__name__}, or several separated by commas."
        ) from error


def _field_docstrings(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, those of the dataclasses that it extends included."""
    found: dict[str, str] = {}
    for part in reversed([one for one in config.__mro__ if dataclasses.is_dataclass(one)]):
        found |= _own_docstrings(part)
    return found


def _own_docstrings(config: type) -> dict[str, str]:
    tree = ast.parse(inspect.cleandoc(inspect.getsource(config)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    found = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def read_template(path: Path) -> str:
    """A chat template from a file."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"The chat template {path} cannot be read: {error}") from error
