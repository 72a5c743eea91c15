"""Who does a capture's work: the interface of an engine, and the engine that is this process."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from activations.arrays import ObjectRecord
from activations.passes import CapturePass, PassSettings
from activations.source import HookedModel

if TYPE_CHECKING:
    from activations.engines.driver import DriverPass
    from activations.engines.worker import GroupWork, Job

__all__ = ["Compute", "Crew", "LocalCrew", "Objects"]

Objects = Mapping[str, ObjectRecord]
"""The shards of one row group of a capture, all of them on disk, by path below the store."""

Compute = Callable[["Job", "GroupWork"], Objects | None]
"""Has one row group computed and written, and waits for it; None if the crew was stopped before that."""


class Crew(Protocol):
    """The workers of one call of `capture`; a context manager that ends them."""

    leads: bool
    """Whether this process drives the capture; the others only `follow`."""

    @property
    def model(self) -> HookedModel:
        """The model, or what stands for it: all of it but `forward_rows` works in the driver. Starts the workers."""
        ...

    def run_pass(self, settings: PassSettings) -> None:
        """Run the model over all rows that a capture lacks, and commit them; see `CapturePass.run`."""
        ...

    def share(self, figures: Mapping[str, Any]) -> None:
        """Give the processes that follow what the capture came to."""
        ...

    def follow(self) -> Mapping[str, Any]:
        """Work for the process that leads until it is done; returns what it shared."""
        ...

    def __enter__(self) -> "Crew": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class LocalCrew:
    """This process alone.

    Args:
        model: the model, or a function that makes it.
    """

    leads = True

    def __init__(self, model: HookedModel | Callable[[], HookedModel]) -> None:
        self._given = model
        self._made: HookedModel | None = None

    @property
    def model(self) -> HookedModel:
        if self._made is None:
            # Not isinstance: a runtime protocol evaluates its properties, and a model's identity may hash its weights.
            is_model = hasattr(type(self._given), "forward_rows")
            self._made = self._given if is_model else self._given()  # type: ignore[assignment, operator]
        assert self._made is not None
        return self._made

    def run_pass(self, settings: PassSettings) -> None:
        CapturePass(self.model, settings).run()

    def share(self, figures: Mapping[str, Any]) -> None:
        """There is nobody to give them to."""

    def follow(self) -> Mapping[str, Any]:
        raise AssertionError("a process alone leads")

    def __enter__(self) -> "LocalCrew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing was started."""


class RemoteCrew:
    """What crews of several processes share: a pass is driven by `activations.engines.driver`.

    A subclass sets `lanes`, how row groups get to workers, and says how to `stop` those.
    """

    leads = True
    under_way: "DriverPass | None" = None
    """The pass that runs now."""

    @property
    def model(self) -> HookedModel:
        raise NotImplementedError

    @property
    def lanes(self) -> Sequence[Compute]:
        """One for each row group that may be with a worker at once."""
        raise NotImplementedError

    def stop(self) -> None:
        """Let workers finish what they write and answer None for the rest. Never raises; may be called again."""
        raise NotImplementedError

    def run_pass(self, settings: PassSettings) -> None:
        from activations.engines.driver import DriverPass

        self.under_way = DriverPass(self, settings)
        try:
            self.under_way.run()
        finally:
            self.under_way = None

    def share(self, figures: Mapping[str, Any]) -> None:
        """There is nobody to give them to."""

    def follow(self) -> Mapping[str, Any]:
        raise AssertionError("this process leads")
