"""Do the SAE, the activations and the model belong together? Answered before any compute."""

import math
import warnings
from typing import Any

from scope.errors import MismatchError, UnknownNameError

__all__ = ["check_model", "check_sae"]


def check_sae(source: Any, sae: Any, allow_mismatch: bool) -> tuple[str, list[str]]:
    """The source's name of the SAE's hook, and what was allowed to differ.

    Raises:
        UnknownNameError: the source lacks the SAE's hook, or the SAE does not say which it reads.
        MismatchError: the SAE has another width than the hook, or was trained on another model or tokenizer.
    """
    if not sae.hook_name:
        raise UnknownNameError("hook", sae.hook_name, source.hooks, hint="The SAE does not say which hook it reads.")
    hook = _resolve(source, sae.hook_name)
    width = math.prod(source.hook_shape(hook))
    if width != sae.d_in:
        raise MismatchError(
            f"The SAE reads activations of width {sae.d_in:,}; {hook} has {width:,} in this store. "
            "Give the store that the SAE was trained on, or one captured from the same model."
        )
    metadata = sae.cfg.metadata
    pairs = {
        "model weights": (metadata.weight_hash, source.spec.weight_hash),
        "tokenizer": (metadata.tokenizer_hash, source.spec.tokenizer_hash),
    }
    if all(theirs is None for theirs, _ in pairs.values()):
        warnings.warn(
            f"The SAE does not record which model it was trained on (it says {metadata.model_name or 'nothing'}); "
            f"nothing shows that it fits the store's, {source.spec.model}.",
            stacklevel=3,
        )
    return hook, _compare("the SAE", metadata.model_name, source.spec.model, pairs, allow_mismatch)


def check_model(source: Any, model: Any, allow_mismatch: bool) -> list[str]:
    """What was allowed to differ between the model that gives strings and logits and the one that filled the store.

    Raises:
        MismatchError: it is another model or tokenizer.
    """
    identity = model.identity
    pairs = {
        "model weights": (identity.weight_hash, source.spec.weight_hash),
        "tokenizer": (identity.tokenizer_hash, source.spec.tokenizer_hash),
    }
    return _compare("the model", identity.model, source.spec.model, pairs, allow_mismatch)


def _resolve(source: Any, name: str) -> str:
    resolve = getattr(source, "resolve_hook", None)
    if resolve is not None:
        return str(resolve(name))
    if name not in source.hooks:
        raise UnknownNameError("hook", name, source.hooks, hint="The SAE reads it; the store does not have it.")
    return name


def _compare(
    what: str, theirs: str | None, stores: str, pairs: dict[str, tuple[str | None, str]], allow: bool
) -> list[str]:
    differing = [name for name, (own, other) in pairs.items() if own is not None and own != other]
    if differing and not allow:
        raise MismatchError(
            f"The {' and the '.join(differing)} of {what} ({theirs or 'unnamed'}) and of the store ({stores}) are not "
            "the same. Capture a store from the right model, or allow the mismatch (--allow-mismatch), which the index "
            "will record."
        )
    return [f"{name} of {what}" for name in differing]
