"""Windows of different lengths one after another in a single row, without padding.

FlashAttention takes texts of different lengths side by side with the places where each begins ("varlen"; Dao,
"FlashAttention-2", 2023), which PyTorch has as `torch.nn.attention.varlen.varlen_attn`. Everything else in a decoder
works token by token and is told positions, so that a batch needs neither padding nor windows of a like length: it is
as full as it can be.

transformers asks a registry for the attention that a model names and for the mask that goes with it. Within `ragged`
its "sdpa", and the mask of it, are ours in this thread; outside they are transformers'.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope.kernels.tensors import sent

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["Lengths", "can_run_ragged", "ragged"]

WIDEST_HEAD = 256
"""FlashAttention's widest head; it also wants a multiple of 8."""

_here = threading.local()


class Lengths(NamedTuple):
    """Where the windows of a row begin and end."""

    starts: Int[Tensor, " n_windows+1"]
    """Place of each window's first token, and the number of tokens; int32."""
    longest: int


def can_run_ragged(model: "LanguageModel") -> bool:
    """Whether a model's windows can run without padding: on a GPU, in a dtype and with heads that FlashAttention
    knows, with no limit on its scores. Compiled layers keep to the shapes that they were compiled for, and models that
    denoise look both ways."""
    config: Any = model.hf.config.get_text_config()
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
        and _kernel() is not None
        and model.compiled_layers is None
        and not model.layout.family.denoises
        and config._attn_implementation == "sdpa"
        and getattr(config, "attn_logit_softcapping", None) is None
        and all(sizes.d_head <= WIDEST_HEAD and sizes.d_head % 8 == 0 for sizes in model.layout.sizes)
    )


@contextmanager
def ragged(lengths: Sequence[int], device: torch.device) -> Iterator[Int[Tensor, "1 n"]]:
    """Within it, in this thread, models take a row of tokens for windows of these lengths.

    Yields:
        Each token's position in its window, which the model must be given.
    """
    _install()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(torch.tensor(lengths))
    _here.lengths = Lengths(sent(ends.int(), device), max(lengths))
    try:
        yield sent(positions[None], device)
    finally:
        _here.lengths = None


@functools.cache
def _install() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    theirs, their_mask = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    @functools.wraps(theirs)
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **settings: Any) -> Any:
        lengths = getattr(_here, "lengths", None)
        if lengths is None:
            return theirs(module, query, key, value, *arguments, **settings)
        return attend_ragged(lengths, query, key, value, settings.get("scaling"), settings.get("sliding_window")), None

    @functools.wraps(their_mask)
    def mask(*arguments: Any, **settings: Any) -> Any:
        return None if getattr(_here, "lengths", None) is not None else their_mask(*arguments, **settings)

    AttentionInterface.register("sdpa", attend)
    AttentionMaskInterface.register("sdpa", mask)


def attend_ragged(
    lengths: Lengths,
    query: Float[Tensor, "1 n_heads n d_head"],
    key: Float[Tensor, "1 n_key_value_heads n d_head"],
    value: Float[Tensor, "1 n_key_value_heads n d_head"],
    scaling: float | None,
    sliding_window: int | None,
) -> Float[Tensor, "1 n n_heads d_head"]:
    """Causal attention within each window, of at most `sliding_window` tokens up to the query's own."""
    kernel = _kernel()
    assert kernel is not None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    attended: Tensor = kernel(
        q, k, v, lengths.starts, lengths.starts, lengths.longest, lengths.longest, scale=scaling, window_size=window
    )
    return attended[None]


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """PyTorch's attention over windows of different lengths, where it has one that knows sliding windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= set(known) else None
