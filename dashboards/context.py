"""What every page needs: the workspace, its opened indexes, and the model worker."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dashboards.links import View
from dashboards.worker import ModelWorker
from scope.errors import UnknownNameError

if TYPE_CHECKING:
    from scope.features.excerpt import FeatureExcerpt
    from scope.features.index import FeatureIndex
    from scope.models.placement import EmbeddingPlace
    from scope.workspace import Entry, Workspace

__all__ = ["Context", "NoIndexError"]

T = TypeVar("T")


CHECK_LIMIT = 3600.0
"""Seconds that a verification may take."""


class NoIndexError(UnknownNameError):
    """The workspace holds no index at all."""


class Context:
    """Shared by all pages and requests; safe to use from several threads."""

    def __init__(
        self,
        workspace: "Workspace",
        worker: ModelWorker | None = None,
        chat_template: str | None = None,
        embeddings: "EmbeddingPlace" = "device",
    ) -> None:
        self.workspace = workspace
        self.chat_template = chat_template
        """What chats are written with, in place of an index's or a tokenizer's own."""
        self.embeddings = embeddings
        """Where the lookup tables of models lie."""
        self.worker = worker or ModelWorker()
        """Whatever needs a model or torch."""
        self.checks = ModelWorker(CHECK_LIMIT, "checks")
        """Reading artefacts from end to end: minutes of the disk, for which no prompt shall wait."""
        self.shared: dict[str, object] = {}
        """What pages share with each other, by name."""
        self._indexes: dict[str, FeatureIndex] = {}
        self._excerpts: dict[Path, FeatureExcerpt] = {}
        self._lock = threading.Lock()
        self._things: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What a page keeps for as long as the dashboard is served, made when it is first asked for."""
        with self._lock:
            if name not in self._things:
                self._things[name] = make()
            kept: T = self._things[name]
            return kept

    def indexes(self) -> "list[Entry]":
        """The readable indexes of the workspace, by name."""
        return [entry for entry in self.workspace.indexes() if entry.problem is None]

    def entry(self, view: View) -> "Entry":
        """The index that a view is about. Where its address leaves that open: the first one whose SAE has an excerpt,
        of which most is known, else the first one.

        Raises:
            NoIndexError: the workspace has none.
            UnknownNameError: it has none with this id.
        """
        entries = self.indexes()
        if not entries:
            raise NoIndexError("index", view.index or "any", hint="Make one with: scope demo")
        if not view.index:
            known = (entry for entry in entries if self.workspace.excerpt_of(str(entry.manifest["sae"]["fingerprint"])))
            return next(known, entries[0])
        return self.workspace.find(view.index, "feature-index")

    def index(self, id: str) -> "FeatureIndex":
        """The index with this id, opened once."""
        entry = self.workspace.find(id, "feature-index")
        with self._lock:
            opened = self._indexes.get(entry.id)
            if opened is None:
                opened = self._indexes[entry.id] = self.workspace.index(entry.id)
            return opened

    def excerpt(self, index: "FeatureIndex") -> "FeatureExcerpt | None":
        """What the workspace has of an index's SAE over a larger text, opened once; None where it has nothing.

        Raises:
            IntegrityError: it is damaged.
        """
        entry = self.workspace.excerpt_of(str(index.sae_info["fingerprint"]))
        if entry is None:
            return None
        with self._lock:
            opened = self._excerpts.get(entry.path)
            if opened is None or opened.id != entry.id:
                opened = self._excerpts[entry.path] = self.workspace.excerpt(entry.id)
            return opened
