"""Compiled layers for capture: `torch.compile` around each decoder layer, and everything between layers as it was.

Most of a layer's time beside its matrix products goes into small elementwise steps (norms, rotation, gates), which
the compiler fuses. Only the layers' `forward` is compiled, in place for the length of one pass: hooks at a layer's
input and output stay outside of it. A hook inside a layer could not be seen by what was compiled without it, so that
layer runs as it is.

Fused steps round less often, so activations differ from the plain model's in their last digits.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["CompiledLayers"]


class CompiledLayers:
    """Compiled forwards of some layers. Compiling happens when they first run.

    Args:
        layers: by module path. Their code is compiled once for all that are alike, with sizes left open.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self._layers = layers
        self._forwards = {path: torch.compile(layer.forward, dynamic=True) for path, layer in layers.items()}

    @contextmanager
    def in_place(self, hooked: Iterable[str]) -> Iterator[None]:
        """Run the body with compiled layers.

        Args:
            hooked: paths of the modules that carry hooks; a layer that holds one of them inside stays as it is.
        """
        busy = {path for path in self._layers for module in hooked if module.startswith(f"{path}.")}
        replaced = [path for path in self._layers if path not in busy]
        for path in replaced:
            self._layers[path].forward = self._forwards[path]
        try:
            yield
        finally:
            for path in replaced:
                del self._layers[path].forward
