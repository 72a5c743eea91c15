"""Who caused this logit, and by how much."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.attribution.direct import direct_logit_effects

__all__ = ["direct_logit_effects"]


def __getattr__(name: str) -> Any:
    if name != "direct_logit_effects":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module(f"{__name__}.direct").direct_logit_effects
