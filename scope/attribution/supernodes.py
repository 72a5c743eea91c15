"""Supernodes of circuit graphs: nodes that someone has put together under a name, in the workspace's database.

A graph's file may bring some (circuit-tracer's `qParams.supernodes`); what is said in the workspace takes their place.
The file itself is never written.
"""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from scope.attribution.graph_json import Supernode
from scope.errors import InvalidInputError

__all__ = ["Supernodes"]

SCHEMA = "CREATE TABLE IF NOT EXISTS supernodes (graph TEXT PRIMARY KEY, content TEXT NOT NULL)"
MAX_NAME = 120
MAX_GROUPS = 500


class Supernodes:
    """The supernodes of one graph.

    Args:
        graph: its fingerprint.
        database: the SQLite file; made when something is first written.
    """

    def __init__(self, graph: str, database: str | Path) -> None:
        self.graph, self.database = graph, Path(database)

    def read(self) -> list[Supernode] | None:
        """What was written, in order; None where nothing ever was."""
        if not self.database.is_file():
            return None
        with closing(sqlite3.connect(self.database, timeout=10)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'supernodes'").fetchone():
                return None
            row = database.execute("SELECT content FROM supernodes WHERE graph = ?", (self.graph,)).fetchone()
        return None if row is None else [Supernode(name, tuple(nodes)) for name, nodes in json.loads(row[0])]

    def write(self, groups: Sequence[Supernode]) -> None:
        """Put these in the place of all.

        Raises:
            InvalidInputError: one has no name or no nodes, a name is too long, a node is in two of them, or there are
                too many.
        """
        if len(groups) > MAX_GROUPS:
            raise InvalidInputError(f"{len(groups):,} supernodes were given; a graph keeps up to {MAX_GROUPS}.")
        seen: set[str] = set()
        for group in groups:
            if not group.name.strip() or len(group.name) > MAX_NAME:
                raise InvalidInputError(f"A supernode's name has 1 to {MAX_NAME} characters; got {group.name[:40]!r}.")
            if not group.nodes or seen & set(group.nodes) or len(set(group.nodes)) < len(group.nodes):
                raise InvalidInputError(f"The supernode {group.name!r} has no nodes, or one that is in another too.")
            seen |= set(group.nodes)
        content = json.dumps([[group.name.strip(), list(group.nodes)] for group in groups], ensure_ascii=False)
        self.database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.database, timeout=10)) as database, database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute(SCHEMA)
            database.execute("INSERT OR REPLACE INTO supernodes VALUES (?, ?)", (self.graph, content))
