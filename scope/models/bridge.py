"""The analysis path: a TransformerBridge over the same weights. The only module that imports transformer_lens.

Booting a bridge rewires the module tree that it is given, so it gets a tree of its own whose parameters are the
fast path's very own: no weight is held twice. It runs with eager attention, which is what lets it see patterns.
"""

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from scope.errors import InvalidInputError, MissingDependencyError, UnknownNameError
from scope.models.architectures import Layout
from scope.models.bridge_hooks import GATED_HOOKS
from scope.models.hooks import HookPoint
from scope.models.loading import quiet_transformers
from scope.models.taps import Countdown, Handler, StopForward, apply_handler, attached

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel
    from scope.models.media import MediaInputs

__all__ = ["boot_bridge", "bridge_forward"]


def boot_bridge(model: "LanguageModel") -> Any:
    """A new TransformerBridge that shares the model's parameters.

    Raises:
        MissingDependencyError: transformer_lens is not installed.
        InvalidInputError: the model's lookup tables lie on the host, where a bridge would not leave them.
    """
    elsewhere = {str(parameter.device) for parameter in model.hf.parameters()} - {str(model.device)}
    if elsewhere:
        raise InvalidInputError(
            f"A part of the model lies on {', '.join(sorted(elsewhere))}, and the rest on {model.device}; the bridge "
            'needs all of it in one place. Load the model with embeddings="device".'
        )
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ModuleNotFoundError as error:
        raise MissingDependencyError("transformer-lens", "bridge", "model.bridge") from error
    tree = copy.deepcopy(model.hf, {id(parameter): parameter for parameter in model.hf.parameters()})
    tree.set_attn_implementation("eager")
    _know_gemma3n()
    with _no_installs(), quiet_transformers():
        return TransformerBridge.boot_transformers(
            str(model.files.folder), hf_model=tree, tokenizer=model.tokenizer, device=str(model.device)
        )


def _know_gemma3n() -> None:
    """TransformerLens 3.9 adapts the multimodal class alone, and asks for timm, which text does not need."""
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )
    from transformer_lens.model_bridge.supported_architectures.gemma3n import Gemma3nArchitectureAdapter

    name = "Gemma3nForCausalLM"
    if name in SUPPORTED_ARCHITECTURES:
        return

    class TextAdapter(Gemma3nArchitectureAdapter):
        required_libraries: ClassVar[list[str]] = []

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self._reprefix_components("model.language_model.", "model.")

    SUPPORTED_ARCHITECTURES[name] = TextAdapter
    ArchitectureAdapterFactory.register_adapter(name, TextAdapter)


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
    media: "MediaInputs | None" = None,
) -> Float[Tensor, "batch n d_vocab"] | None:
    """What `LanguageModel.forward` does, through the bridge."""
    bridge = model.bridge
    countdown = Countdown(len(handlers), stop=not logits)
    names = {point: _name_in(bridge, point, model.layout) for point in handlers}
    hooks = [
        (name, partial(_hook, point=point, handler=handler, countdown=countdown))
        for point, handler in handlers.items()
        if (name := names[point]) is not None
    ]
    unnamed = {point: handler for point, handler in handlers.items() if names[point] is None}
    output = None
    opened = _opened(bridge, [name for name, _ in hooks])
    tree = attached(bridge.original_model, unnamed, countdown)
    with model.lock, opened, bridge.hooks(fwd_hooks=hooks), contextlib.suppress(StopForward), tree:
        output = bridge(tokens, **({} if media is None else media.encoded(model)))
    if output is None and countdown.remaining:
        raise InvalidInputError("TransformerLens did not call a hook that it lists; ask for others.")
    if output is None or not logits:
        return None
    return output[:, -1:] if logits == "last" else output


def _hook(tensor: Tensor, hook: Any, point: HookPoint, handler: Handler, countdown: Countdown) -> Tensor | None:
    """A hook function as the bridge calls it."""
    if point.site is not None and point.site.stacked and tensor.ndim == 4:
        new: Tensor | None = apply_handler(point.site, handler, tensor)
    else:
        new = handler(tensor)
        if new is not None and point.site is not None and point.site.stream:
            new = tensor.copy_(new)  # the layer adds to this very tensor: see scope.models.taps
    countdown.tick()
    return new


def _name_in(bridge: Any, point: HookPoint, layout: Layout) -> str | None:
    """What the bridge calls a hook; None where it has no name for it and its own module tree is tapped."""
    ours = (*point.aliases, point.name) if layout.family.delegated else (point.name, *point.aliases)
    names = [_altup_name(name, layout) for name in ours] if layout.n_streams > 1 else ours
    name = next((name for name in names if name in bridge.hook_dict), None)
    if name is None and point.site is None:
        raise UnknownNameError("hook of the bridge", point.name, bridge.hook_dict)
    return name


def _altup_name(name: str, layout: Layout) -> str:
    """In blocks with AltUp the bridge names modules as transformers does, and calls by `hook_attn_out` and
    `hook_mlp_out` what our hooks of these names follow: their input to a norm."""
    family = layout.family
    own = {"ln1": family.ln1, "ln1_post": family.ln1_post, "ln2": family.ln2, "ln2_post": family.ln2_post}
    parts = name.split(".")
    if parts[0] == "blocks":
        parts[2] = {**own, "attn": family.attention}.get(parts[2], parts[2]) or parts[2]
    return ".".join(parts)


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
