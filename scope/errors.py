"""The exceptions of the workbench: the tree of `activations.errors`, and what grows on it here.

ActivationsError (= ScopeError)
├── InvalidInputError
│   ├── UnknownNameError
│   ├── MismatchError
│   ├── OccupiedError
│   └── OutOfRangeError (IndexError)       a feature id, row or position that does not exist
├── MissingDependencyError (ImportError)   an optional package is not installed
├── IntegrityError, NonFiniteError, LockedError, InterruptedRunError
"""

from activations.errors import (
    ActivationsError,
    IntegrityError,
    InterruptedRunError,
    InvalidInputError,
    LockedError,
    MismatchError,
    NonFiniteError,
    OccupiedError,
    UnknownNameError,
)

__all__ = [
    "ActivationsError",
    "IntegrityError",
    "InterruptedRunError",
    "InvalidInputError",
    "LockedError",
    "MismatchError",
    "MissingDependencyError",
    "NonFiniteError",
    "OccupiedError",
    "OutOfRangeError",
    "ScopeError",
    "UnknownNameError",
]

ScopeError = ActivationsError


class OutOfRangeError(InvalidInputError, IndexError):
    """A feature id, row or position that does not exist. Negative ids are refused, never wrapped."""


class MissingDependencyError(ScopeError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed. "
            f"Install it with: pip install 'scope-workbench[{extra}]'"
        )
