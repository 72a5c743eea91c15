"""`forward_rows`: activations of many token windows as rows of real tokens, for capture.

1. Windows are sorted by length and packed into batches of at most `batch_size` tokens, padding included.
2. A batch is padded on the right, where causal attention never looks: no mask is needed, and attention stays on
   its fastest path. Where the model can (`scope.models.ragged`), windows stand one after another instead, unpadded.
3. On a GPU attention is kept from cuDNN, which builds a plan for every new shape (a tenth of a second each), and ragged
   text has many. The host never waits for the device, so that the next batch is queued while one is computed.
4. The rows of real tokens are picked out on the device, their norms taken in float32, and written, in the storage
   dtype, where they belong in the order of the windows.
5. On a GPU a side stream copies the result into pinned memory while the next windows are computed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from activations.batching import even_cuts
from activations.spec import StorageDtype
from scope.errors import InvalidInputError, OutOfRangeError
from scope.kernels.tensors import sent
from scope.models.ragged import ragged
from scope.models.unpacked import unpacked

__all__ = ["HostCopy", "WindowBatch", "as_rows", "check_windows", "collect_rows", "pack_windows"]

STORAGE: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class WindowBatch:
    """Some windows as one padded tensor, and where their tokens stand among the rows of all windows."""

    def __init__(self, windows: Sequence[np.ndarray], starts: Sequence[int], device: torch.device) -> None:
        lengths = np.array([len(window) for window in windows])
        longest = int(lengths.max())
        # Padded with their own last token: any id that the model knows will do.
        padded = np.stack([np.pad(window, (0, longest - len(window)), mode="edge") for window in windows])
        real = np.arange(longest) < lengths[:, None]
        rows = (np.asarray(starts)[:, None] + np.arange(longest))[real]
        self.tokens: Int[Tensor, "batch seq"] = _to_device(padded.astype(np.int64), device)
        self.real: Int[Tensor, " n"] | None = (
            None if real.all() else _to_device(np.flatnonzero(real.reshape(-1)), device)
        )
        """Which of the batch's tokens are real, by flat index; None where all are."""
        self.rows: Int[Tensor, " n"] = _to_device(rows, device)
        """Where each real token stands among the rows of all windows."""

    def pick(self, values: Num[Tensor, "batch seq *row"]) -> Num[Tensor, "n *row"]:
        """The real tokens' values."""
        batch, seq = self.tokens.shape
        flat = values.expand(batch, seq, *values.shape[2:]).flatten(0, 1)
        return flat if self.real is None else flat.index_select(0, self.real)


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return sent(torch.from_numpy(np.ascontiguousarray(array)), device)


def check_windows(windows: Sequence[np.ndarray], shortest: int, longest: int, d_vocab: int) -> None:
    """Refuse windows that a model cannot run.

    Raises:
        InvalidInputError: a window has fewer than `shortest` or more than `longest` tokens.
        OutOfRangeError: a token id that the vocabulary does not have.
    """
    for window in windows:
        if not shortest <= len(window) <= longest:
            raise InvalidInputError(f"A window has {len(window):,} tokens; expected from {shortest} to {longest:,}.")
        low, high = int(window.min()), int(window.max())
        if low < 0 or high >= d_vocab:
            raise OutOfRangeError(f"A window has token ids from {low} to {high}; the model has {d_vocab:,} tokens.")


def pack_windows(windows: Sequence[np.ndarray], batch_size: int) -> list[list[int]]:
    """Indices of the windows of each batch: longest first, at most `batch_size` tokens with padding; a single window
    that is longer than that runs alone."""
    if batch_size < 1:
        raise InvalidInputError(f"batch_size is {batch_size}; expected a number of tokens.")
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index]))
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        if not batches or (len(batches[-1]) + 1) * longest > batch_size:
            batches.append([])
            longest = len(windows[index])
        batches[-1].append(index)
    return batches


class HostCopy:
    """Rows on their way to the host: see `activations.source.PendingRows`."""

    def __init__(self, on_device: Mapping[str, Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        first = next(iter(on_device.values()), None)
        if first is None or first.device.type != "cuda":
            self._host = {name: tensor.cpu() for name, tensor in on_device.items()}
            return
        stream = _copy_stream(first.device)
        stream.wait_stream(torch.cuda.current_stream(first.device))
        self._host = {}
        with torch.cuda.stream(stream):
            for name, tensor in on_device.items():
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
                self._host[name] = host
            self._event = torch.cuda.Event()
            self._event.record(stream)

    def wait(self) -> dict[str, np.ndarray]:
        """Block until the copy is done; per hook its rows, and per `norm/<hook>` their norms."""
        if self._event is not None:
            self._event.synchronize()
        return {name: _as_numpy(tensor) for name, tensor in self._host.items()}


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _as_numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_rows(values: Num[Tensor, "n *row"], dtype: torch.dtype) -> tuple[Tensor, Float[Tensor, " n"]]:
    """The values in the storage dtype, and the L2 norm of each row in float32, taken before rounding."""
    norms = torch.linalg.vector_norm(values.flatten(1).float(), dim=1)
    return values.to(dtype), norms


def _batches(
    windows: Sequence[np.ndarray], starts: np.ndarray, batch_size: int, device: torch.device, pads: bool
) -> Iterator[tuple[Sequence[int], WindowBatch, Tensor | None]]:
    """Numbers of windows that run together, their batch, and the tokens' positions where they stand one after another
    in a single row."""
    if pads:
        for indices in pack_windows(windows, batch_size):
            yield indices, WindowBatch([windows[i] for i in indices], [int(starts[i]) for i in indices], device), None
        return
    lengths = [len(window) for window in windows]
    for start, end in pairwise([0, *even_cuts(lengths, batch_size)]):
        with ragged(lengths[start:end], device) as positions:
            batch = WindowBatch([np.concatenate(windows[start:end])], [int(starts[start])], device)
            yield range(start, end), batch, positions


def collect_rows(
    windows: Sequence[np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: StorageDtype,
    batch_size: int,
    device: torch.device,
    forward: Callable[[Sequence[int], Tensor, Mapping[str, Callable[[Tensor], None]], Tensor | None], None],
    pads: bool = True,
) -> dict[str, Tensor]:
    """Run all windows and collect what the hooks see, on the model's device: per hook its rows in the order of the
    windows, and per `norm/<hook>` their norms.

    Args:
        windows: token ids of each window.
        shapes: row shape per hook.
        dtype: storage dtype.
        batch_size: tokens to run at once, padding included.
        device: where the model runs.
        forward: given the numbers of some windows, their tokens as a batch, and the tokens' positions where they are
            not counted from each row's first, runs them and hands each hook's tensor to its function.
        pads: whether windows of a batch are padded, or stand one after another in a single row.
    """
    storage = STORAGE[dtype]
    lengths = [len(window) for window in windows]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    n_rows = int(starts[-1])
    out = {name: torch.empty((n_rows, *shape), dtype=storage, device=device) for name, shape in shapes.items()}
    norms = {name: torch.empty(n_rows, dtype=torch.float32, device=device) for name in shapes}

    def keep(name: str, batch: WindowBatch, values: Tensor) -> None:
        rows, row_norms = as_rows(batch.pick(values), storage)
        out[name].index_copy_(0, batch.rows, rows)
        norms[name].index_copy_(0, batch.rows, row_norms)

    with unpacked(), sdpa_kernel(ANY_SHAPE) if device.type == "cuda" else nullcontext():
        for indices, batch, positions in _batches(windows, starts, batch_size, device, pads):
            forward(indices, batch.tokens, {name: partial(keep, name, batch) for name in shapes}, positions)
    return {**out, **{f"norm/{name}": values for name, values in norms.items()}}
