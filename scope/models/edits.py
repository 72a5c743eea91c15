"""What a change of activations is to the model: a function per hook, several of them in turn, some that stay in force.

`scope.interventions` makes such functions; `run`, `generate`, `stream` and `cross_entropy` take them.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError
from scope.models.hooks import HookPoint, HookTable

__all__ = [
    "EditContext",
    "EditFunction",
    "Edits",
    "Several",
    "Standing",
    "apply_edits",
    "by_token",
    "freezes_attention",
    "resolve_edits",
]


class EditContext(NamedTuple):
    """What an edit is told besides the activation."""

    name: str
    """The hook's name."""
    tokens: Int[Tensor, "batch seq"]
    """Token ids of the windows; shorter windows are padded on the right."""
    bos: Bool[Tensor, "batch seq"]
    """Where the BOS token that starts a window stands."""
    start: int = 0
    """The position of the first token: 0, but where a text goes on from a cache and only its new tokens are run."""
    n_prompt: int | None = None
    """While a text is being written, how many of its tokens the prompt has; None elsewhere."""


EditFunction = Callable[[Tensor, EditContext], Tensor | None]
"""From the activation at a hook, (batch, seq, *row_shape), to what takes its place, of the same shape. The tensor is
the function's own: it may be changed in place, and then None may be returned. A function with a method
`check(point: HookPoint, n_tokens: int)` has it called before anything is computed. One with `by_token = True` says that
what takes a token's place depends on that token's activation alone, wherever the tensor begins (`context.start`): then
a text can be written from a cache."""


class Edits(dict[str, EditFunction]):
    """Edits by hook name, and whether attention stays where the model without them attends."""

    def __init__(
        self,
        edits: Mapping[str, EditFunction] | Iterable[tuple[str, EditFunction]] = (),
        freeze_attention: bool = False,
    ) -> None:
        super().__init__(edits)
        self.freeze_attention = freeze_attention


def freezes_attention(edits: Mapping[str, EditFunction] | None) -> bool:
    """Whether the edits ask for attention to stay as it is without them."""
    return bool(getattr(edits, "freeze_attention", False))


def by_token(edits: Iterable[EditFunction]) -> bool:
    """Whether all of them work token by token."""
    return all(getattr(edit, "by_token", False) for edit in edits)


@dataclass(frozen=True)
class Several:
    """Several edits of one hook, in order."""

    edits: tuple[EditFunction, ...]

    @property
    def by_token(self) -> bool:
        return by_token(self.edits)

    def __call__(self, value: Tensor, context: EditContext) -> Tensor:
        return apply_edits(self.edits, value, context)

    def check(self, point: HookPoint, n_tokens: int) -> None:
        for edit in self.edits:
            _check(edit, point, n_tokens)


def apply_edits(edits: Iterable[EditFunction], value: Tensor, context: EditContext) -> Tensor:
    """The activation after each edit in turn.

    Raises:
        MismatchError: an edit returned something else than a tensor of the activation's shape.
    """
    for edit in edits:
        own = value.clone()
        new = edit(own, context)
        new = own if new is None else new
        if not isinstance(new, Tensor) or new.shape != value.shape:
            got = f"a tensor of shape {tuple(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
            raise MismatchError(
                f"The edit at {context.name} returned {got}; expected a tensor of shape {tuple(value.shape)}."
            )
        value = new.to(value.device, value.dtype)
    return value


def resolve_edits(
    table: HookTable, edits: Mapping[str, EditFunction] | None, n_tokens: int, *, bridge: bool = True
) -> dict[str, list[EditFunction]]:
    """Edits by canonical hook name, checked as far as that is possible before the model runs.

    Args:
        table: the model's hooks.
        edits: by hook name or alias.
        n_tokens: tokens of the shortest text that is to be run.
        bridge: whether whoever asks goes through the bridge, where only that can make an edit.

    Raises:
        UnknownNameError: there is no such hook.
        InvalidInputError: an edit is not callable, or refuses this hook or prompt; or only the bridge can make it, and
            attention is to stay as it is or the bridge is not there.
    """
    resolved: dict[str, list[EditFunction]] = {}
    for name, edit in (edits or {}).items():
        point = table[name]
        if not callable(edit):
            raise InvalidInputError(f"The edit at {name} is a {type(edit).__name__}; expected a function.")
        if point.read_only:
            raise InvalidInputError(
                f"{point.name} can be read but not edited on this architecture: the model does not go on with it. "
                "Edit the attention's output (attn.hook_z) instead."
            )
        if point.path == "bridge" and not bridge:
            raise InvalidInputError(
                f"{point.name} can only be edited through the bridge, which takes one prompt at a time: model.run and "
                "model.generate do."
            )
        if freezes_attention(edits) and point.path == "bridge":
            raise InvalidInputError(f"Attention cannot be held beside an edit at {name}, which only the bridge sees.")
        _check(edit, point, n_tokens)
        resolved.setdefault(point.name, []).append(edit)
    return resolved


def _check(edit: EditFunction, point: HookPoint, n_tokens: int) -> None:
    check = getattr(edit, "check", None)
    if check is not None:
        check(point, n_tokens)


class Standing(threading.local):
    """The edits that are in force in a thread, the outermost first."""

    def __init__(self) -> None:
        self._edits: list[Mapping[str, EditFunction]] = []
        self._taken_in = 0

    @contextmanager
    def hold(self, edits: Mapping[str, EditFunction]) -> Iterator[None]:
        """Have edits in force within the body."""
        self._edits.append(edits)
        try:
            yield
        finally:
            self._edits.pop()

    def with_these(self, table: HookTable, edits: Mapping[str, EditFunction] | None) -> Mapping[str, EditFunction]:
        """The edits in force, and after them those given."""
        if not self._edits:
            return edits or {}
        several = [*self._edits, edits or {}]
        by_hook: dict[str, list[EditFunction]] = {}
        for some in several:
            for name, edit in some.items():
                by_hook.setdefault(table[name].name, []).append(edit)
        joined = {name: there[0] if len(there) == 1 else Several(tuple(there)) for name, there in by_hook.items()}
        return Edits(joined, any(freezes_attention(some) for some in several))

    @contextmanager
    def taken_in(self) -> Iterator[None]:
        """Within the body the model runs with the edits in force among those that it makes, or on purpose without."""
        self._taken_in += 1
        try:
            yield
        finally:
            self._taken_in -= 1

    def require_taken_in(self) -> None:
        """Refuse a pass that knows nothing of the edits in force.

        Raises:
            InvalidInputError: some are in force.
        """
        if self._edits and not self._taken_in:
            raise InvalidInputError(
                "An intervention is in force (model.intervene), and this does not take part in it: only run, generate, "
                "stream and cross_entropy do. Do it outside of the with block."
            )
