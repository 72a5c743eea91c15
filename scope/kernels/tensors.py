"""From the arrays of an `ActivationSource` to torch tensors."""

import importlib.util
import os
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_tensor", "has_triton", "sent", "uses_triton"]


@cache
def has_triton() -> bool:
    """Whether Triton kernels can be built here: torch brings Triton on Linux, not everywhere."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(tensor: Tensor) -> bool:
    """Whether the kernels of this tensor's device are Triton's: on a CUDA device, or on any in Triton's interpreter."""
    return (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and has_triton()


def as_tensor(values: Any, dtype: str, device: torch.device | str = "cpu") -> Tensor:
    """Activations of a source as a tensor on `device`, in their storage dtype and without a copy where possible.

    Args:
        values: numpy array `(n, *feature_shape)` (bfloat16 as uint16 bits), or already a tensor.
        dtype: the source's storage dtype.
        device: where the tensor shall lie.
    """
    if isinstance(values, Tensor):
        return values.to(device)
    values = np.ascontiguousarray(values)
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    if dtype == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on its way to a device; to a GPU through pinned memory, so that the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
