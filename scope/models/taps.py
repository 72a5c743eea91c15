"""The fast path: plain forward hooks on Hugging Face modules, for the length of one forward pass.

1. Each hook point that is wanted gets a handler, a function of the tensor at the hook.
2. Handlers of one module are put behind one torch hook, in model order.
3. A handler sees the tensor in the hook's shape; what it returns takes the tensor's place.
4. Once every handler has been called, and where nothing after them is wanted, the pass is broken off.

No hook stays behind, whatever happens in between.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from scope.models.experts import expert_outputs, rerouted, summed
from scope.models.hooks import HookPoint, Site

__all__ = ["Countdown", "Handler", "StopForward", "apply_handler", "attached", "tapped"]

Handler = Callable[[Tensor], Tensor | None]
"""From the tensor at a hook, (batch, seq, *row_shape), to its replacement, or None to leave it as it is."""


class StopForward(Exception):  # noqa: N818  not an error: it leaves a forward pass early
    """Everything that was asked for has been seen."""


@contextmanager
def tapped(model: nn.Module, handlers: Mapping[HookPoint, Handler], stop: bool) -> Iterator[None]:
    """Run the body, one forward pass of `model`, with a handler at each hook point.

    Args:
        model: the Hugging Face model.
        handlers: fast-path hook points and their handlers, in model order.
        stop: break the pass off after the last handler; the body's remaining statements are then skipped.
    """
    with contextlib.suppress(StopForward), attached(model, handlers, Countdown(len(handlers), stop)):
        yield


@contextmanager
def attached(model: nn.Module, handlers: Mapping[HookPoint, Handler], countdown: "Countdown") -> Iterator[None]:
    """Run the body with a handler at each hook point; `StopForward` passes through when the countdown ends."""
    taps: dict[tuple[str, str, int], _Tap] = {}
    shapes = {site.rows_of: _Shape() for point in handlers if (site := point.site) is not None and site.rows_of}
    for point, handler in handlers.items():
        site = point.site
        assert site is not None, f"{point.name} is not on the fast path"
        key = (site.module, site.where, site.argument)
        shape = shapes[site.rows_of] if site.rows_of else None
        taps.setdefault(key, _Tap(countdown, site.argument, shape, [])).handlers.append((site, handler))
    handles = []
    try:
        for path, shape in shapes.items():
            assert path is not None
            handles.append(model.get_submodule(path).register_forward_pre_hook(shape.on_input))
        for (path, where, _), tap in taps.items():
            module = model.get_submodule(path)
            if where == "input":
                handles.append(module.register_forward_pre_hook(tap.on_input))
            else:
                handles.append(module.register_forward_hook(tap.on_output))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Countdown:
    """Ends a forward pass once the last handler has been called."""

    remaining: int
    stop: bool

    def tick(self) -> None:
        self.remaining -= 1
        if self.stop and self.remaining == 0:
            raise StopForward


@dataclass
class _Tap:
    """The handlers on one side of one module."""

    countdown: Countdown
    argument: int
    shape: "_Shape | None"
    handlers: list[tuple[Site, Handler]]

    def on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        place = self.argument
        return (*args[:place], self._through(args[place]), *args[place + 1 :])

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        for site, handler in self.handlers:
            if site.experts == "outputs":
                output = self._through_experts(module, args, output, handler)
                continue
            outputs = output if isinstance(output, tuple) else (output,)
            new = self._seen(site, handler, outputs[site.item])
            if site.experts == "reroute" and new is not outputs[site.item]:
                output = rerouted(module, new)
            elif isinstance(output, tuple):
                output = (*outputs[: site.item], new, *outputs[site.item + 1 :])
            else:
                output = new
        return output

    def _through(self, tensor: Tensor) -> Tensor:
        for site, handler in self.handlers:
            tensor = self._seen(site, handler, tensor)
        return tensor

    def _seen(self, site: Site, handler: Handler, tensor: Tensor) -> Tensor:
        if self.shape is not None:
            shown = tensor.unflatten(0, self.shape.batch_and_seq)
            new = apply_handler(site, handler, shown)
            tensor = tensor if new is shown else new.flatten(0, 1)
        else:
            tensor = apply_handler(site, handler, tensor)
        self.countdown.tick()
        return tensor

    def _through_experts(self, module: nn.Module, args: tuple[Any, ...], output: Tensor, handler: Handler) -> Tensor:
        """Show the handler what each chosen expert writes; without an edit the module's own sum stands."""
        x, chosen, weights = args
        assert self.shape is not None
        shown = expert_outputs(module, x, chosen).unflatten(0, self.shape.batch_and_seq)
        new = handler(shown)
        self.countdown.tick()
        return output if new is None else summed(new.flatten(0, 1), weights).to(output.dtype)


class _Shape:
    """Batch and sequence of a layer's input, for modules that see tokens without them."""

    batch_and_seq: tuple[int, int] = (0, 0)

    def on_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.batch_and_seq = (args[0].shape[0], args[0].shape[1])


def apply_handler(site: Site, handler: Handler, tensor: Tensor) -> Tensor:
    """Show the handler the site's part of `tensor`, and put its replacement back."""
    if site.stacked:
        return _in_stack(site, handler, tensor)
    if site.select is not None:
        selected = apply_handler(replace(site, select=None), handler, tensor[:, :, site.select])
        return _with(tensor, site.select, selected)
    if site.part_of_heads and site.heads:
        split = tensor.unflatten(-1, (site.heads[0], -1))
        own = apply_handler(replace(site, heads=None, part_of_heads=False), handler, split)
        return tensor if own is split else own.flatten(-2)
    start, width = site.part or (0, tensor.shape[-1])
    value = tensor[..., start : start + width] if site.part else tensor
    if site.heads:
        value = value.unflatten(-1, site.heads)
    new = handler(value)
    if new is None:
        return tensor
    if site.stream:
        # The layer holds this very tensor for its residual connection: only writing into it reaches both readers.
        return tensor if new is tensor else tensor.copy_(new)
    if site.heads:
        new = new.flatten(-2)
    if site.part:
        new = torch.cat([tensor[..., :start], new, tensor[..., start + width :]], dim=-1)
    return new


def _in_stack(site: Site, handler: Handler, tensor: Tensor) -> Tensor:
    """(streams, batch, seq, d_model), shown as (batch, seq, streams, d_model) or one stream of it."""
    shown = tensor.movedim(0, 2)
    new = apply_handler(replace(site, stacked=False), handler, shown)
    return tensor if new is shown else new.movedim(2, 0).contiguous()


def _with(tensor: Tensor, place: int, new: Tensor) -> Tensor:
    """`tensor` with `new` at a place of its third dimension."""
    old = tensor[:, :, place]
    if new.data_ptr() == old.data_ptr() and new.shape == old.shape:
        return tensor
    return torch.cat([tensor[:, :, :place], new.unsqueeze(2), tensor[:, :, place + 1 :]], dim=2)
