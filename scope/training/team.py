"""`Team`: what a trainer and its loop ask of the processes that train one SAE; on its own, one process.

`scope.training.distributed` has the teams of several processes. All members make the same calls in the same order.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from scope.saes.sharing import Sharing

__all__ = ["ALONE", "Team"]

T = TypeVar("T")


class Team(Sharing):
    """One process, which does everything."""

    rank = 0
    size = 1
    leads = True
    """Whether this is the process that writes and speaks."""

    def part_of(self, n_rows: int) -> slice:
        """This process's part of a batch of so many rows."""
        return slice(None)

    def opening(self, own: int, fine: Tensor) -> tuple[int, bool]:
        """What a step begins with.

        Args:
            own: rows of the batch that this process has.
            fine: whether they are.

        Returns:
            Rows of the batch over all processes, and whether all are fine.
        """
        return own, bool(fine)

    def all_rows(self, rows: Tensor) -> Tensor:
        """All rows of a batch, in order, from each process's part."""
        return rows

    def sum_over_rows(self, tensor: Tensor) -> Tensor:
        """The sum over the whole batch of what is the sum over a process's rows. Not differentiable."""
        return tensor

    def total_over_features(self, tensor: Tensor) -> Tensor:
        """The sum over all features of what is the sum over a process's. Not differentiable."""
        return tensor

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients of the loss over a process's rows by those over the whole batch."""

    def all_features(self, rows: Tensor) -> Tensor:
        """All rows of a tensor with one for each feature: on the process that leads; the others keep their own."""
        return rows

    def all_true(self, flag: Tensor) -> bool:
        """Whether a flag is true on every process."""
        return bool(flag)

    def all_listed(self, numbers: Sequence[int]) -> list[int]:
        """The numbers that any process lists, ascending."""
        return sorted(set(numbers))

    def any(self, flag: bool) -> bool:
        """Whether a flag is true on any process."""
        return flag

    def same(self, number: int) -> int:
        """The leading process's number."""
        return number

    def take_over(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by the leading process's."""

    def led(self, act: Callable[[], T]) -> T | None:
        """Let the leading process do something; the others wait, and learn whether it went well.

        Returns:
            What it gave; None on the other processes.

        Raises:
            InterruptedRunError: on the other processes, where it failed; the leading process raises what it was.
        """
        return act()


ALONE = Team()
