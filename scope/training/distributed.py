"""Several processes that train one SAE: started by torchrun, each on its own GPU or CPU cores.

    torchrun --nproc-per-node 2 -m scope.cli train STORE --hook … [--parallel features]

Every process makes the same calls (`train`, or `SAETrainer.step`), and reads the same stream of batches. The batch is
`batch_size` rows over all of them, and so is every figure. The result is one process's, up to the order of sums.

By rows (`ByRows`, --parallel data):

1. process r of n takes rows r B/n to (r + 1) B/n of each batch of B and computes its loss, with the weight of its rows;
2. gradients, firing counts and sums for the log are added up over the processes;
3. each takes the same step. BatchTopK's k B largest entries are chosen over the whole batch (see below).

By features (`ByFeatures`, --parallel features):

1. process r has features r, r + n, r + 2n, … with their weights and Adam's moments, encodes all rows with them (only
   the random initial weights are drawn by each for all features, on the host, so that they are one process's);
2. TopK: each sends its k largest values of a row; all choose the same k among the n k candidates. BatchTopK: the k B
   largest are chosen over all processes. JumpReLU, ReLU and gated need nothing. AuxK is TopK among the dead;
3. the partial reconstructions are added up (batch x d_out); from there each has the gradients of its own features. The
   bias b_dec, which all features read, and the gradient's norm are added up once more.

The n largest entries over all processes are found exactly, without sending them (`_nth_largest_bits`): floats above 0
are ordered as their bits are, so three histograms, of the upper 11 bits, the next 11 and the last 9, lead to the n-th
largest.

On CUDA devices messages go through NCCL, on CPUs through gloo. When a process ends early, the others learn it from the
next exchange, and why from the store by which they found each other.
"""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from scope.errors import InterruptedRunError, InvalidInputError
from scope.kernels.entries import largest
from scope.kernels.topk import topk
from scope.saes.sharing import FeatureShare
from scope.training.team import ALONE, Team

__all__ = [
    "ByFeatures",
    "ByRows",
    "LostProcessError",
    "exchange",
    "local_device",
    "n_processes",
    "own_gpu",
    "team_for",
    "watched",
]

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others; saving a large checkpoint takes the leading one a while."""
REASON = "scope/reason"
REASON_PATIENCE = timedelta(seconds=5)
DIGIT_BITS = (11, 11, 9)
"""Bits of a float above 0, its sign apart, that each histogram of the selection looks at."""

T = TypeVar("T")
_failed: list[BaseException] = []


class LostProcessError(InterruptedRunError):
    """Another process of the run ended before its time, or did not answer."""


def n_processes(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun started to train together; 1 where it did not start this one."""
    return int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment and "MASTER_ADDR" in environment else 1


def local_device(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """The device of this process, where "cuda" is asked for: that of its rank on this machine."""
    if device == "cuda" and n_processes(environment) > 1:
        return f"cuda:{int(environment.get('LOCAL_RANK', '0')) % max(1, torch.cuda.device_count())}"
    return device


def own_gpu(environment: Mapping[str, str] = os.environ) -> str | None:
    """The GPU of this process's rank; None where torchrun did not start it, or there is no GPU."""
    if n_processes(environment) == 1 or not torch.cuda.is_available():
        return None
    return local_device("cuda", environment)


def team_for(parallel: str, device: str = "cpu") -> Team:
    """The team of the processes that torchrun started, once all are there; one process where it started none.

    Args:
        parallel: "data" or "features".
        device: where this process trains.

    Raises:
        LostProcessError: not all processes came.
    """
    if n_processes() == 1:
        return ALONE
    if not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(torch.device(device))
        with exchange():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
        atexit.register(_leave)
    return ByFeatures() if parallel == "features" else ByRows()


def _leave() -> None:
    # Where something went wrong the others may never come to say good-bye.
    if dist.is_initialized() and not _failed:
        dist.destroy_process_group()


@contextlib.contextmanager
def exchange() -> Iterator[None]:
    """Around a message: what torch raises when a process does not answer becomes a `LostProcessError`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch's own kinds of error are RuntimeErrors
        raise LostProcessError(
            f"Another process of this run does not answer any more ({_first_line(error)})."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Around a run: a process that fails leaves word for the others, and the others' error says what it left.

    An error gets the attribute `told`: whether another process said it before.
    """
    try:
        yield
    except LostProcessError as error:
        _failed.append(error)
        reason = _word() if dist.is_initialized() else None
        why = reason or "It left no word: it was killed, or its machine is out of reach."
        lost = LostProcessError(f"Another process of this run ended. {why}")
        lost.told = reason is not None  # type: ignore[attr-defined]
        raise lost from error
    except Exception as error:
        if dist.is_initialized():
            _failed.append(error)
        error.told = dist.is_initialized() and not _leave_word(error)  # type: ignore[attr-defined]
        raise


def _leave_word(error: Exception) -> bool:
    """Leave word of an error; False where another process did so before."""
    try:
        store = _store()
        if store.add(f"{REASON}/count", 1) > 1:
            return False
        store.set(REASON, f"Process {dist.get_rank()} said: {error}")
    except Exception:
        return True
    return True


def _word() -> str | None:
    try:
        store = _store()
        store.wait([REASON], REASON_PATIENCE)
        return str(store.get(REASON).decode())
    except Exception:
        return None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


class _Processes(Team):
    """What both ways have in common."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.leads = self.rank == 0

    def total(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The sum over all processes, or the least or largest."""
        whole = tensor.detach().clone(memory_format=torch.contiguous_format)
        with exchange():
            dist.all_reduce(whole, op=op)
        return whole

    def all_true(self, flag: Tensor) -> bool:
        return bool(self.total(flag.float(), dist.ReduceOp.MIN) > 0)

    def any(self, flag: bool) -> bool:
        return bool(self.total(torch.tensor(float(flag)), dist.ReduceOp.MAX) > 0)

    def all_listed(self, numbers: Sequence[int]) -> list[int]:
        sizes = self.gathered(torch.tensor([len(numbers)]))
        most = max(1, int(torch.cat(sizes).max()))
        own = torch.full((most,), -1)
        own[: len(numbers)] = torch.tensor(list(numbers), dtype=torch.int64)
        return sorted(set(torch.cat(self.gathered(own)).tolist()) - {-1})

    def same(self, number: int) -> int:
        told = torch.tensor([number])
        self.take_over([told])
        return int(told)

    def take_over(self, tensors: Sequence[Tensor]) -> None:
        with exchange():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Everyone's tensor, all of one shape, on every process."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with exchange():
            dist.all_gather(parts, tensor.detach().contiguous())
        return parts

    def led(self, act: Callable[[], T]) -> T | None:
        error: Exception | None = None
        made: T | None = None
        if self.leads:
            try:
                made = act()
            except Exception as raised:
                error = raised
        went_well = self.same(int(error is None))
        if error is not None:
            raise error
        if not went_well:
            raise InterruptedRunError("The first process of this run stopped; it says why.")
        return made

    def largest(self, pre: Tensor, n: int) -> Tensor:
        index = largest(pre, n)
        return index[self.mask_of_largest(pre.detach().flatten()[index].float(), n)]

    def mask_of_largest(self, values: Tensor, n: int) -> Tensor:
        """Which of these values, 0 or more, are among the n largest of all processes.

        Of those that equal the n-th largest, the first processes' first ones fill the places that are left.
        """
        flat = values.flatten()
        own, bits = flat.view(torch.int32), _nth_largest_bits(self, flat, n)
        above, equal = own > bits, own == bits
        everyone = torch.stack(self.gathered(torch.stack([above.sum(), equal.sum()])))
        left = n - everyone[:, 0].sum() - everyone[: self.rank, 1].sum()
        return (above | (equal & (equal.cumsum(0) <= left))).view(values.shape)

    def smallest(self, values: Tensor) -> Tensor:
        return self.total(super().smallest(values).float(), dist.ReduceOp.MIN)


def _nth_largest_bits(team: _Processes, values: Tensor, n: int) -> Tensor:
    """The bits, as int32, of the n-th largest of all processes' values above 0; 0 where there are fewer than n."""
    bits = values.view(torch.int32)
    found = bits.new_zeros(())
    left = torch.as_tensor(n, device=values.device)
    below = sum(DIGIT_BITS)
    inside = torch.ones_like(bits, dtype=torch.bool)
    for width in DIGIT_BITS:
        below -= width
        digits = (bits >> below) & ((1 << width) - 1)
        counts = _histogram(torch.where(inside, digits, -1), 1 << width)
        from_top = team.total(counts).flip(0).cumsum(0)
        place = (from_top < left).sum().clamp_max((1 << width) - 1)  # the digit, counted from the largest one
        left = left - torch.where(place > 0, from_top[(place - 1).clamp_min(0)], 0)
        digit = ((1 << width) - 1 - place).to(torch.int32)
        found = found | (digit << below)
        inside = inside & (digits == digit)
    return found


def _histogram(digits: Tensor, n: int) -> Tensor:
    """How often each number from 0 to n - 1 stands there; others are passed over. No GPU is waited for."""
    if digits.is_cuda:
        return torch.histc(digits.float(), n, 0, n).long()
    return torch.bincount(digits + 1, minlength=n + 1)[1:]


class ByRows(_Processes):
    """Each process has some rows of a batch, and all features."""

    def part_of(self, n_rows: int) -> slice:
        if n_rows < self.size:
            raise InvalidInputError(
                f"A batch of {n_rows:,} rows cannot be divided among {self.size} processes: give a larger batch_size, "
                "or start fewer."
            )
        return slice(self.rank * n_rows // self.size, (self.rank + 1) * n_rows // self.size)

    def opening(self, own: int, fine: Tensor) -> tuple[int, bool]:
        told = self.total(torch.stack([torch.tensor(own, device=fine.device), (~fine).long()])).tolist()
        return told[0], told[1] == 0

    def all_rows(self, rows: Tensor) -> Tensor:
        sizes = [int(size) for size in self.gathered(torch.tensor([len(rows)]))]
        padded = functional.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
        return torch.cat([part[:size] for part, size in zip(self.gathered(padded), sizes, strict=True)])

    def sum_over_rows(self, tensor: Tensor) -> Tensor:
        return self.total(tensor)

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        with exchange():
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                assert work is not None
                work.wait()

    def scatter_sum(self, whole: Tensor, own: Tensor) -> Any:
        """Begin to put the sum of this process's rows of everyone's matrix into `own`; returns what to wait for."""
        with exchange():
            if whole.is_cuda:
                return dist.reduce_scatter_tensor(own, whole, async_op=True)
            dist.all_reduce(whole)  # gloo scatters no sums
            own.copy_(whole[self.rank * len(own) : (self.rank + 1) * len(own)])
            return None

    def gather_into(self, whole: Tensor, own: slice) -> Any:
        """Begin to fill a matrix with the rows that each process has; returns what to wait for."""
        with exchange():
            if whole.is_cuda:
                return dist.all_gather_into_tensor(whole, whole[own], async_op=True)
            whole.copy_(torch.cat(self.gathered(whole[own])))
            return None


class ByFeatures(_Processes):
    """Each process has all rows of a batch, and every n-th feature."""

    def __init__(self) -> None:
        super().__init__()
        self.features = FeatureShare(self.rank, self.size)

    def opening(self, own: int, fine: Tensor) -> tuple[int, bool]:
        return own, self.all_true(fine)

    def sum_over_features(self, partial: Tensor) -> Tensor:
        summed: Tensor = _Summed.apply(partial.float(), self)
        return summed

    def read_by_features(self, tensor: Tensor) -> Tensor:
        read: Tensor = _Read.apply(tensor, self)
        return read

    def total_over_features(self, tensor: Tensor) -> Tensor:
        return self.total(tensor)

    def among_largest(self, values: Tensor, k: int) -> Tensor:
        padded = functional.pad(values, (0, k - values.shape[1]), value=-1.0)
        everyone = torch.cat(self.gathered(padded), dim=1)
        taken = torch.zeros_like(everyone, dtype=torch.bool)
        taken.scatter_(1, topk(everyone, k).ids, True)
        return taken[:, self.rank * k : self.rank * k + values.shape[1]]

    def kth_largest(self, values: Tensor, k: int, n_all: int) -> Tensor | None:
        if n_all <= k:
            return None
        own = topk(values, min(k, values.shape[1])).values if values.shape[1] else values
        padded = functional.pad(own, (0, k - own.shape[1]), value=-torch.inf)
        return topk(torch.cat(self.gathered(padded), dim=1), k).values.amin(dim=-1, keepdim=True)

    def nth_largest(self, pre: Tensor, n: int) -> Tensor:
        above = pre.flatten()[pre.flatten() > 0].float()
        return _nth_largest_bits(self, above, n).view(torch.float32)

    def all_features(self, rows: Tensor) -> Tensor:
        n = int(self.total(torch.tensor([len(rows)])))
        most = -(-n // self.size)
        own = functional.pad(rows.detach(), (0, 0) * (rows.ndim - 1) + (0, most - len(rows))).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.leads else None
        with exchange():
            dist.gather(own, parts, 0)
        return rows if parts is None else torch.stack(parts, dim=1).flatten(0, 1)[:n]


class _Summed(torch.autograd.Function):
    """A sum over processes, each of which computes the same loss from it: the gradient is everyone's own."""

    @staticmethod
    def forward(ctx, partial, team):  # type: ignore[no-untyped-def]
        return team.total(partial)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient, None


class _Read(torch.autograd.Function):
    """A tensor that everyone has, and reads with other features: its gradient is the sum."""

    @staticmethod
    def forward(ctx, tensor, team):  # type: ignore[no-untyped-def]
        ctx.team = team
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return ctx.team.total(gradient), None
