"""The analysis path: a TransformerBridge over the same weights. The only module that imports transformer_lens.

Booting a bridge rewires the module tree that it is given, so it gets a tree of its own whose parameters are the
fast path's very own: no weight is held twice. It runs with eager attention, which is what lets it see patterns.
"""

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError, MissingDependencyError, UnknownNameError
from scope.models.bridge_hooks import GATED_HOOKS
from scope.models.hooks import HookPoint
from scope.models.loading import quiet_transformers
from scope.models.taps import Countdown, Handler, StopForward

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["boot_bridge", "bridge_forward"]


def boot_bridge(model: "LanguageModel") -> Any:
    """A new TransformerBridge that shares the model's parameters.

    Raises:
        MissingDependencyError: transformer_lens is not installed.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ModuleNotFoundError as error:
        raise MissingDependencyError("transformer-lens", "bridge", "model.bridge") from error
    tree = copy.deepcopy(model.hf, {id(parameter): parameter for parameter in model.hf.parameters()})
    tree.set_attn_implementation("eager")
    with _no_installs(), quiet_transformers():
        return TransformerBridge.boot_transformers(
            str(model.files.folder), hf_model=tree, tokenizer=model.tokenizer, device=str(model.device)
        )


@contextlib.contextmanager
def _no_installs() -> Iterator[None]:
    """Booting a multimodal model whose processor is missing runs `pip install torchvision`; not here."""
    before = os.environ.get("PIP_NO_INDEX")
    os.environ["PIP_NO_INDEX"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PIP_NO_INDEX"]
        else:
            os.environ["PIP_NO_INDEX"] = before


def bridge_forward(
    model: "LanguageModel",
    tokens: Int[Tensor, "batch seq"],
    handlers: Mapping[HookPoint, Handler],
    logits: bool | Literal["last"],
) -> Float[Tensor, "batch n d_vocab"] | None:
    """What `LanguageModel.forward` does, through the bridge."""
    bridge = model.bridge
    countdown = Countdown(len(handlers), stop=not logits)
    hooks = [
        (_name_in(bridge, point), partial(_hook, point=point, handler=handler, countdown=countdown))
        for point, handler in handlers.items()
    ]
    output = None
    opened = _opened(bridge, [name for name, _ in hooks])
    with model.lock, opened, bridge.hooks(fwd_hooks=hooks), contextlib.suppress(StopForward):
        output = bridge(tokens)
    if output is None and countdown.remaining:
        raise InvalidInputError("TransformerLens did not call a hook that it lists; ask for others.")
    if output is None or not logits:
        return None
    return output[:, -1:] if logits == "last" else output


def _hook(tensor: Tensor, hook: Any, point: HookPoint, handler: Handler, countdown: Countdown) -> Tensor | None:
    """A hook function as the bridge calls it."""
    new = handler(tensor)
    if new is not None and point.site is not None and point.site.stream:
        new = tensor.copy_(new)  # the layer adds to this very tensor: see scope.models.taps
    countdown.tick()
    return new


def _name_in(bridge: Any, point: HookPoint) -> str:
    name = next((name for name in (point.name, *point.aliases) if name in bridge.hook_dict), None)
    if name is None:
        raise UnknownNameError("hook of the bridge", point.name, bridge.hook_dict)
    return name


@contextlib.contextmanager
def _opened(bridge: Any, names: list[str]) -> Iterator[None]:
    """Have the bridge call hooks that it leaves out unless told otherwise."""
    setters = {setter for name in names for ending, setter in GATED_HOOKS.items() if name.endswith(f".{ending}")}
    try:
        for setter in setters:
            getattr(bridge, setter)(True)
        yield
    finally:
        for setter in setters:
            getattr(bridge, setter)(False)
