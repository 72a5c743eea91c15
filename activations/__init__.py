"""Activations of language models: captured from text, stored on disk, read back verified. Imports no torch.

Public names are loaded when they are first used, so that `import activations` costs nothing. The function `capture`
shares its name with its module: `from activations.capture import capture`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activations.capture import CaptureReport
    from activations.chats import Chat, Message
    from activations.selection import RowSelection
    from activations.shuffle import Selection, ShuffledBatches
    from activations.source import ActivationBatch, ActivationSource, HookedModel, ModelIdentity, PendingRows, RowFlag
    from activations.spec import CaptureSpec
    from activations.store import ActivationStore, Fault, TokenRows
    from activations.text import Document, TextSource

_MODULES = {
    "ActivationBatch": "source",
    "ActivationSource": "source",
    "ActivationStore": "store",
    "CaptureReport": "capture",
    "CaptureSpec": "spec",
    "Chat": "chats",
    "Document": "text",
    "Fault": "store",
    "HookedModel": "source",
    "Message": "chats",
    "ModelIdentity": "source",
    "PendingRows": "source",
    "RowFlag": "source",
    "RowSelection": "selection",
    "Selection": "shuffle",
    "ShuffledBatches": "shuffle",
    "TextSource": "text",
    "TokenRows": "store",
}

__all__ = [
    "ActivationBatch",
    "ActivationSource",
    "ActivationStore",
    "CaptureReport",
    "CaptureSpec",
    "Chat",
    "Document",
    "Fault",
    "HookedModel",
    "Message",
    "ModelIdentity",
    "PendingRows",
    "RowFlag",
    "RowSelection",
    "Selection",
    "ShuffledBatches",
    "TextSource",
    "TokenRows",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'activations' has no attribute {name!r}")
    return getattr(import_module(f"activations.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
