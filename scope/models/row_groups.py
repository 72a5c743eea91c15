"""Row groups of a text, run through a model in threads: what a live source hands out.

1. `planned` cuts the text into row groups as a capture does, and says which windows the model runs for each. A window
   that began in an earlier group runs from its start.
2. `RowGroups.stream` has a thread that plans and one that runs the model, a bounded number of groups ahead.
3. A group's rows are gathered on the model's device, batch by batch, where the plan says that they belong.
4. Whether all is finite is found on the device. On a GPU the next group is launched before anybody waits for that, so
   that the GPU does not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from activations.batching import Window, group_windows, pack_batches
from activations.pipeline import Channel, Worker
from activations.plan import PlannedGroup, Windowing, plan_groups
from activations.selection import Choosing
from activations.spec import StorageDtype
from activations.text import TextSource
from scope.errors import NonFiniteError
from scope.kernels.tensors import sent
from scope.models.rows import STORAGE, HostCopy

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["GROUPS_AHEAD", "PlannedWindows", "RowGroup", "RowGroups", "on_host", "planned"]

PLAN_AHEAD = 4
"""Row groups that are tokenised ahead of the model."""
GROUPS_AHEAD = 1
"""Row groups that wait for the consumer, besides the one that is computed and the one that is consumed."""


class PlannedWindows(NamedTuple):
    """A row group, and what the model runs for it."""

    plan: PlannedGroup
    windows: list[Window]


class RowGroup(NamedTuple):
    """A row group's rows where they are wanted, looked through."""

    plan: PlannedGroup
    values: Mapping[str, Tensor] | HostCopy
    """Per hook its rows."""
    figures: Mapping[str, np.ndarray]
    """Per `norm/<hook>` the rows' norms, float32."""


class _Launched(NamedTuple):
    """A row group's rows on the model's device, on a GPU perhaps not computed yet."""

    plan: PlannedGroup
    values: Mapping[str, Tensor]
    figures: HostCopy
    """Per `norm/<hook>` the rows' norms, and per `finite/<hook>` whether all is finite."""


def planned(
    text: TextSource,
    encode: Callable[[Sequence[str]], list[np.ndarray]],
    windowing: Windowing,
    choosing: Choosing | None = None,
) -> Iterator[PlannedWindows]:
    """All row groups of a text in order, with the windows that the model runs for each; `choosing`, of chats, says how
    they are encoded, and chooses all tokens."""
    begun = np.empty(0, np.int32)  # the window that goes on in the next group
    for plan in plan_groups(text, encode, windowing, choosing=choosing):
        tokens, positions = plan.columns["token_id"], plan.columns["position"]
        begun = begun[: int(positions[0])]
        tokens = np.concatenate([begun, tokens])
        positions = np.concatenate([np.arange(len(begun)), positions])
        yield PlannedWindows(plan, group_windows(tokens, positions, len(begun)))
        begun = tokens[np.flatnonzero(positions == 0)[-1] :]


class RowGroups:
    """Runs a model on row groups.

    Args:
        model: the model.
        shapes: shape of a row, by canonical hook name.
        dtype: of the activations.
        batch_size: tokens that the model runs at once, padding included.
        device: where the activations are wanted.
        document_at: the document that a row belongs to, for an error's message.
    """

    def __init__(
        self,
        model: "LanguageModel",
        shapes: Mapping[str, tuple[int, ...]],
        dtype: StorageDtype,
        batch_size: int,
        device: torch.device,
        document_at: Callable[[int], Mapping[str, Any]],
    ) -> None:
        self._model, self._shapes, self._dtype = model, shapes, dtype
        self._batch_size, self._device, self._document_at = batch_size, device, document_at

    def stream(self, plans: Iterable[PlannedWindows]) -> Iterator[RowGroup]:
        """The rows of these groups, in order, computed by threads that end with this generator.

        Raises:
            NonFiniteError: a NaN or an Inf; hook, row and document are named.
        """
        waiting: Channel[PlannedWindows] = Channel(PLAN_AHEAD)
        finished: Channel[RowGroup] = Channel(GROUPS_AHEAD)

        def plan() -> None:
            for item in plans:
                waiting.put(item)
            waiting.close()

        def compute() -> None:
            for group in self._in_flight(waiting):
                finished.put(self._delivered(group))
            finished.close()

        def end() -> None:
            waiting.stop()
            finished.close()  # what is computed may still be taken

        workers = [Worker("planner", plan, end), Worker("live model", compute, end)]
        for worker in workers:
            worker.start()
        try:
            yield from finished
        finally:
            waiting.stop()
            finished.stop()
            for worker in workers:
                worker.join_fully()
        error = next((worker.error for worker in workers if worker.error is not None), None)
        if error is not None:
            raise error

    def _in_flight(self, plans: Iterable[PlannedWindows]) -> Iterator[_Launched]:
        """Row groups as they are computed, on a GPU one behind."""
        previous: _Launched | None = None
        for item in plans:
            launched = self._launched(item)
            if self._model.device.type != "cuda":
                yield launched
                continue
            if previous is not None:
                yield previous
            previous = launched
        if previous is not None:
            yield previous

    def _launched(self, item: PlannedWindows) -> _Launched:
        n_rows = item.plan.row_stop - item.plan.row_start
        storage, device = STORAGE[self._dtype], self._model.device
        values = {
            hook: torch.empty((n_rows, *shape), dtype=storage, device=device) for hook, shape in self._shapes.items()
        }
        norms = {f"norm/{hook}": torch.empty(n_rows, device=device) for hook in self._shapes}
        self._run(item, values | norms)
        finite = {
            f"finite/{hook}": torch.isfinite(rows).all() & torch.isfinite(norms[f"norm/{hook}"]).all()
            for hook, rows in values.items()
        }
        return _Launched(item.plan, values, HostCopy(norms | finite))

    @torch.inference_mode()
    def _run(self, item: PlannedWindows, out: Mapping[str, Tensor]) -> None:
        """Run the model on a row group's windows and put the rows where they belong."""
        device = self._model.device
        for batch in pack_batches(item.windows, self._batch_size, self._model.pads):
            found = self._model.device_rows(batch.windows, list(self._shapes), self._dtype, self._batch_size)
            places = _to(batch.rows, device)
            kept = None if batch.kept is None else _to(np.flatnonzero(batch.kept), device)
            for name, values in found.items():
                out[name].index_copy_(0, places, values if kept is None else values.index_select(0, kept))

    def _delivered(self, group: _Launched) -> RowGroup:
        figures = group.figures.wait()
        for hook in self._shapes:
            if not figures[f"finite/{hook}"]:
                self._refuse(hook, group.plan, group.values[hook], torch.from_numpy(figures[f"norm/{hook}"]))
        return RowGroup(group.plan, _moved(group.values, self._device), figures)

    def _refuse(self, hook: str, plan: PlannedGroup, values: Tensor, norms: Tensor) -> None:
        finite = torch.isfinite(values.flatten(1)).all(dim=1).cpu() & torch.isfinite(norms)
        bad = int((~finite).nonzero()[0])
        row = plan.row_start + bad
        document = self._document_at(row)
        named = document.get("title") or f"number {document.get('document')}"
        if torch.isfinite(norms[bad]):
            problem = f"a value too large for {self._dtype} (the row's norm is {float(norms[bad]):,.0f})"
            advice = "Use bfloat16 or float32."
        else:
            problem = "a NaN or Inf"
            advice = "The model made it; look at this document, or run the model in another dtype."
        raise NonFiniteError(f"The hook {hook} gave {problem} at row {row:,}, in the document {named!r}. {advice}")


def on_host(values: Mapping[str, Tensor] | HostCopy) -> Mapping[str, np.ndarray]:
    """A row group's rows as numpy arrays, bfloat16 as its bits."""
    return values.wait() if isinstance(values, HostCopy) else HostCopy(values).wait()


def _to(indices: np.ndarray, device: torch.device) -> Tensor:
    return sent(torch.from_numpy(np.ascontiguousarray(indices, np.int64)), device)


def _moved(values: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor] | HostCopy:
    """Rows on their way to where they are wanted."""
    here = next(iter(values.values())).device
    if here == device:
        return values
    if device.type == "cpu":
        return HostCopy(values)
    if here.type == "cpu":
        return {name: tensor.to(device) for name, tensor in values.items()}
    stream = torch.cuda.Stream(here)
    stream.wait_stream(torch.cuda.current_stream(here))
    moved = {}
    with torch.cuda.stream(stream):
        for name, tensor in values.items():
            # PyTorch lets the other device's current stream wait for a copy between two GPUs.
            moved[name] = tensor.to(device, non_blocking=True)
            tensor.record_stream(stream)
    return moved
