"""Hook names with a * for the layer's number: "blocks.*.hook_resid_post" is that hook of every layer."""

import re
from collections.abc import Sequence

from activations.errors import InvalidInputError

__all__ = ["every_layer", "hooks_by_layer"]


def hooks_by_layer(pattern: str, known: Sequence[str]) -> list[str]:
    """The hooks that a pattern with one * for the layer stands for, by layer: "blocks.*.ln2.hook_out".

    Raises:
        InvalidInputError: no known hook fits.
    """
    expression = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    found = {int(match.group(1)): name for name in known if (match := expression.fullmatch(name))}
    if not found:
        raise InvalidInputError(
            f"No hook fits {pattern!r}; * stands for a layer's number, as in blocks.*.ln2.hook_out."
        )
    return [found[layer] for layer in sorted(found)]


def every_layer(hooks: Sequence[str], known: Sequence[str]) -> list[str]:
    """Hooks with those that a * for the layer stands for, each once."""
    found = [name for hook in hooks for name in (hooks_by_layer(hook, known) if "*" in hook else [hook])]
    return list(dict.fromkeys(found))
