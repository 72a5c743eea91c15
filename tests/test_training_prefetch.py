"""Batches sent ahead to the device."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from scope.training.data import Batch
from scope.training.prefetch import DEPTH, on_device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Counted:
    """Batches of one number each, and how many were taken."""

    def __init__(self, n: int, fails_at: int | None = None, device: str = "cpu") -> None:
        self.n, self.fails_at, self.taken, self.device = n, fails_at, 0, device

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.n):
            if number == self.fails_at:
                raise OSError("the disk is gone")
            self.taken += 1
            yield Batch(np.array([number]), torch.full((2, 3), float(number), device=self.device).bfloat16())


@pytest.mark.parametrize("made_on", DEVICES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_same_batches_in_the_same_order(device: str, made_on: str) -> None:
    """From the host's memory, or from a model on a GPU."""
    if device == "cpu" and made_on != "cpu":
        pytest.skip("a trainer on the CPU gets its rows on the host")
    got = list(on_device(iter(Counted(20, device=made_on)), device))
    assert [int(batch.rows[0]) for batch in got] == list(range(20))
    assert all(batch.values.device.type == device for batch in got)
    assert [float(batch.values[1, 2]) for batch in got] == list(range(20))


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_the_stream_arrives(device: str) -> None:
    batches = on_device(iter(Counted(20, fails_at=5)), device)
    with pytest.raises(OSError, match="the disk is gone"):
        list(batches)


@pytest.mark.parametrize("device", DEVICES)
def test_only_so_many_are_taken_ahead_and_none_after_the_end(device: str) -> None:
    source = Counted(100)
    batches = on_device(iter(source), device)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    taken = source.taken
    assert taken <= DEPTH + 3
    assert source.taken == taken
