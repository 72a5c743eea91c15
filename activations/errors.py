"""The exceptions of the workbench's lower half, as one tree.

    ActivationsError
    ├── InvalidInputError (ValueError)      what was given is wrong; nothing was written
    │   ├── UnknownNameError (KeyError)     a name that does not exist; near misses are suggested
    │   ├── MismatchError                   two things that do not belong together (model, tokenizer, hook, width)
    │   └── OccupiedError (FileExistsError) the output folder holds something else
    ├── IntegrityError (RuntimeError)       bytes on disk are not what the ledger says
    ├── NonFiniteError (ArithmeticError)    a NaN or Inf where there must be none
    ├── LockedError (RuntimeError)          another writer holds the artefact
    └── InterruptedRunError (RuntimeError)  a run stopped early; what is committed stays

Every message says what was got, what was expected, and what to do. `scope.errors` grows the same tree.
"""

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ActivationsError",
    "IntegrityError",
    "InterruptedRunError",
    "InvalidInputError",
    "LockedError",
    "MismatchError",
    "NonFiniteError",
    "OccupiedError",
    "UnknownNameError",
    "near_misses",
]


class ActivationsError(Exception):
    """The root: everything that this project raises on purpose."""

    def __str__(self) -> str:  # KeyError would show the repr of its argument
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Any, ...]:  # by the message: some of them are made from other things than that
        return _remade, (type(self), self.args), self.__dict__


def _remade(kind: type[ActivationsError], args: tuple[Any, ...]) -> ActivationsError:
    """An error that was pickled, on its way from a worker."""
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class InvalidInputError(ActivationsError, ValueError):
    """What was given is wrong. Raised before any compute; nothing was written."""


class UnknownNameError(InvalidInputError, KeyError):
    """A name that does not exist where it was looked for.

    Args:
        kind: what sort of name, as a reader would say it ("hook", "column", "architecture").
        name: the name that was asked for.
        known: the names that exist.
        hint: what to do, one sentence.
    """

    def __init__(self, kind: str, name: object, known: Iterable[object] = (), hint: str = "") -> None:
        names = [str(candidate) for candidate in known]
        near = near_misses(str(name), names)
        if near:
            suggestion = f" Did you mean {' or '.join(near)}?"
        elif 0 < len(names) <= 12:
            suggestion = f" There are: {', '.join(names)}."
        else:
            suggestion = ""
        super().__init__(f"There is no {kind} {name!r}.{suggestion}{' ' + hint if hint else ''}")
        self.name = name
        self.near = near


class MismatchError(InvalidInputError):
    """Two things that do not belong together: another model, tokenizer, hook or width."""


class OccupiedError(InvalidInputError, FileExistsError):
    """The output folder holds something else."""


class IntegrityError(ActivationsError, RuntimeError):
    """The bytes on disk are not what the ledger recorded."""


class NonFiniteError(ActivationsError, ArithmeticError):
    """A NaN or an Inf in activations or weights; the message names hook, row and document."""


class LockedError(ActivationsError, RuntimeError):
    """Another writer holds the artefact; the message names its host and pid."""


class InterruptedRunError(ActivationsError, RuntimeError):
    """A run stopped before its end; what is committed stays and the message says how to resume."""


def near_misses(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` of the known names that look like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.6)
