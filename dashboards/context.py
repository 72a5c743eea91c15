"""What every page needs: the workspace, its opened indexes, and the model worker."""

import threading
from typing import TYPE_CHECKING

from dashboards.links import View
from dashboards.worker import ModelWorker
from scope.errors import UnknownNameError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.workspace import Entry, Workspace

__all__ = ["Context", "NoIndexError"]


CHECK_LIMIT = 3600.0
"""Seconds that a verification may take."""


class NoIndexError(UnknownNameError):
    """The workspace holds no index at all."""


class Context:
    """Shared by all pages and requests; safe to use from several threads."""

    def __init__(self, workspace: "Workspace", worker: ModelWorker | None = None) -> None:
        self.workspace = workspace
        self.worker = worker or ModelWorker()
        """Whatever needs a model or torch."""
        self.checks = ModelWorker(CHECK_LIMIT, "checks")
        """Reading artefacts from end to end: minutes of the disk, for which no prompt shall wait."""
        self.shared: dict[str, object] = {}
        """What pages share with each other, by name."""
        self._indexes: dict[str, FeatureIndex] = {}
        self._lock = threading.Lock()

    def indexes(self) -> "list[Entry]":
        """The readable indexes of the workspace, by name."""
        return [entry for entry in self.workspace.indexes() if entry.problem is None]

    def entry(self, view: View) -> "Entry":
        """The index that a view is about; the first one where its address leaves that open.

        Raises:
            NoIndexError: the workspace has none.
            UnknownNameError: it has none with this id.
        """
        entries = self.indexes()
        if not entries:
            raise NoIndexError("index", view.index or "any", hint="Make one with: scope demo")
        if not view.index:
            return entries[0]
        return self.workspace.find(view.index, "feature-index")

    def index(self, id: str) -> "FeatureIndex":
        """The index with this id, opened once."""
        entry = self.workspace.find(id, "feature-index")
        with self._lock:
            opened = self._indexes.get(entry.id)
            if opened is None:
                opened = self._indexes[entry.id] = self.workspace.index(entry.id)
            return opened
