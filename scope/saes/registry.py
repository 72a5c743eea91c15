"""Architectures by name. Every module of `scope.saes` that defines one is found; nothing is listed by hand."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from scope.errors import UnknownNameError
from scope.saes.base import SAE, SAEConfig

__all__ = ["architectures", "config_of", "get", "register"]

S = TypeVar("S", bound=type[SAE])
_CLASSES: dict[str, type[SAE]] = {}
_CONFIGS: dict[str, type[SAEConfig]] = {}


def register(config: type[SAEConfig], stored_as: Sequence[str] = ()) -> Callable[[S], S]:
    """Class decorator: make an SAE class known under its config's `architecture`.

    Args:
        config: the config's class.
        stored_as: further names that the architecture has in files.
    """

    def add(sae_class: S) -> S:
        name = config.architecture
        taken = _CLASSES.get(name)
        if not name or (taken is not None and taken.__qualname__ != sae_class.__qualname__):
            raise ValueError(f"The architecture name {name!r} of {sae_class.__name__} is empty or taken.")
        for known in (name, *stored_as):
            _CLASSES[known], _CONFIGS[known] = sae_class, config
        return sae_class

    return add


@cache
def _import_all() -> None:
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.ispkg:
            importlib.import_module(f"{package}.{module.name}")


def architectures() -> tuple[str, ...]:
    """The names of all architectures, sorted."""
    _import_all()
    return tuple(sorted({config.architecture for config in _CONFIGS.values()}))


def get(architecture: str) -> type[SAE]:
    """The class of an architecture.

    Raises:
        UnknownNameError: there is none of that name; the message names those there are.
    """
    names = architectures()
    if architecture not in _CLASSES:
        raise UnknownNameError("architecture", architecture, names, hint=f"This release has: {', '.join(names)}.")
    return _CLASSES[architecture]


def config_of(architecture: str) -> type[SAEConfig]:
    """The config class of an architecture; raises like `get`."""
    get(architecture)
    return _CONFIGS[architecture]
