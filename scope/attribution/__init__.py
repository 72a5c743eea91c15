"""Who caused this logit, and by how much; and what the model would say after each layer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope.attribution.direct import direct_logit_effects
    from scope.attribution.lens import LogitLens, logit_lens

__all__ = ["LogitLens", "direct_logit_effects", "logit_lens"]

_HOMES = {"LogitLens": "lens", "direct_logit_effects": "direct", "logit_lens": "lens"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
