"""Two things at once: numpy and Arrow let other threads run while they work, so two cores answer a question sooner."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["both"]

First = TypeVar("First")
Second = TypeVar("Second")


def both(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """What two functions return, the second one called in a thread of its own."""
    with ThreadPoolExecutor(1, "beside") as thread:
        other = thread.submit(second)
        return first(), other.result()
