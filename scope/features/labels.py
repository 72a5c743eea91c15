"""`FeatureLabels`: what people call the features of one SAE, with notes, stars and lists.

They live in WORKSPACE/workspace.db (SQLite, write-ahead log), one row per thing said, keyed by the SAE's fingerprint:
every index of one SAE shares them, and an index that is built again keeps them.

    feature_label  (sae, feature, source, key) -> text   one's own (source "own", key "") and imported ones, both kept
    feature_note   (sae, feature) -> notes, starred
    feature_list   (sae, list, feature)                     named lists, in the order of adding
    label_version  (sae) -> version                         counts edits, so that caches know

Several threads and processes may read and write at once: each call opens its own connection (a connection must not
cross a fork), each change is one immediate transaction, and a writer waits its turn.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from scope.errors import InvalidInputError, OutOfRangeError

__all__ = ["FeatureLabels", "ImportedLabel", "Label", "StoredLabel"]

OWN = "own"
MAX_LABEL = 2_000
"""Characters of a label, at most."""
MAX_NOTES = 20_000
"""Characters of a feature's notes, at most."""
MAX_LIST_NAME = 100
"""Characters of a list's name, at most."""
SCHEMA_VERSION = 1
WAIT = 30.0
"""Seconds that a writer waits for its turn."""
SETTLED_NS = 2_000_000_000
"""Age of a file from which on its time tells edits apart, in nanoseconds."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS feature_label (
    sae TEXT NOT NULL, feature INTEGER NOT NULL, source TEXT NOT NULL, key TEXT NOT NULL, text TEXT NOT NULL,
    created TEXT NOT NULL, PRIMARY KEY (sae, feature, source, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS feature_note (
    sae TEXT NOT NULL, feature INTEGER NOT NULL, notes TEXT NOT NULL DEFAULT '', starred INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (sae, feature)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS feature_list (
    number INTEGER PRIMARY KEY, sae TEXT NOT NULL, list TEXT NOT NULL, feature INTEGER NOT NULL,
    UNIQUE (sae, list, feature));
CREATE TABLE IF NOT EXISTS label_version (sae TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
"""
COLUMNS = ["feature", "label", "label_source", "notes", "starred", "lists"]


@dataclass(frozen=True)
class Label:
    """What is said of one feature. Empty where nothing is."""

    text: str = ""
    """One's own label, else the newest imported one."""
    source: str = ""
    """"own", or where the label was imported from; empty without a label."""
    notes: str = ""
    starred: bool = False
    lists: tuple[str, ...] = ()
    """Names of the lists that the feature is in, sorted."""


class StoredLabel(NamedTuple):
    """One of the labels that a feature has."""

    text: str
    source: str
    """"own", or where it was imported from."""
    created: str
    """When it was written, ISO 8601; of an imported one as its file says, else empty."""


class ImportedLabel(NamedTuple):
    """A label to take in from elsewhere."""

    feature: int
    text: str
    source: str
    """Where it is from, such as "neuronpedia: gpt-4o-mini, oai_token-act-pair"."""
    key: str
    """Tells the labels of one source and feature apart; the same key again replaces."""
    created: str = ""
    """ISO 8601; the newest one shows."""


class FeatureLabels:
    """The labels, notes, stars and lists of one SAE's features. Safe to use from several threads and processes.

    Args:
        sae: the SAE's fingerprint.
        path: the database; made when something is first written. None keeps everything in memory.
        d_sae: the number of features, where it is known: other ids are then refused.
    """

    def __init__(self, sae: str, path: str | Path | None = None, *, d_sae: int | None = None) -> None:
        self.sae, self.d_sae = sae, d_sae
        self.path = None if path is None else Path(path)
        self._lock = threading.RLock()
        self._memory = None if path is not None else _connect(":memory:")
        self._table: tuple[int, pd.DataFrame] | None = None
        self._seen: tuple[tuple[int, ...], int] | None = None

    # --- reading ----------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Grows with every edit, whichever process made it; 0 where nothing was ever said. Asked for all the time: the
        database is opened only where its files changed since."""
        stamp = self._stamp()
        with self._lock:
            if stamp is not None and self._seen is not None and self._seen[0] == stamp:
                return self._seen[1]
        with self._reading() as database:
            row = database.execute("SELECT version FROM label_version WHERE sae = ?", (self.sae,)).fetchone()
        version = int(row[0]) if row else 0
        with self._lock:
            self._seen = None if stamp is None else (stamp, version)
        return version

    def _stamp(self) -> tuple[int, ...] | None:
        """Sizes and times of the database and its log. None where they are so young that one more edit could leave
        them as they are, file systems' clocks being coarse."""
        if self.path is None:
            return None
        stamp: list[int] = []
        for path in (self.path, self.path.with_name(f"{self.path.name}-wal")):
            try:
                found = path.stat()
                stamp += [found.st_ino, found.st_size, found.st_mtime_ns]
            except OSError:
                stamp += [0, 0, 0]
        return tuple(stamp) if time.time_ns() - max(stamp[2], stamp[5]) > SETTLED_NS else None

    def get(self, feature: int) -> Label:
        """What is said of a feature.

        Raises:
            OutOfRangeError: the SAE has no such feature.
        """
        feature = self._checked(feature)
        own = (self.sae, feature)
        with self._reading() as database:
            labels = database.execute(
                "SELECT text, source FROM feature_label WHERE sae = ? AND feature = ? "
                f"ORDER BY {_PREFERENCE} LIMIT 1", own,
            ).fetchone()  # fmt: skip
            note = database.execute("SELECT notes, starred FROM feature_note WHERE sae = ? AND feature = ?", own)
            notes, starred = note.fetchone() or ("", 0)
            lists = database.execute("SELECT list FROM feature_list WHERE sae = ? AND feature = ? ORDER BY list", own)
            names = tuple(name for (name,) in lists)
        text, source = labels or ("", "")
        return Label(text, source, notes, bool(starred), names)

    def all(self, feature: int) -> list[StoredLabel]:
        """Every label of a feature, the one that shows first: one's own, then imported ones, the newest first."""
        with self._reading() as database:
            rows = database.execute(
                f"SELECT text, source, created FROM feature_label WHERE sae = ? AND feature = ? ORDER BY {_PREFERENCE}",
                (self.sae, self._checked(feature)),
            )
            return [StoredLabel(*row) for row in rows]

    def lists(self) -> dict[str, list[int]]:
        """Per list, by name, its features in the order in which they were added."""
        found: dict[str, list[int]] = {}
        with self._reading() as database:
            rows = database.execute(
                "SELECT list, feature FROM feature_list WHERE sae = ? ORDER BY list, number", (self.sae,)
            )
            for name, feature in rows:
                found.setdefault(name, []).append(feature)
        return found

    def table(self) -> pd.DataFrame:
        """feature (int64), label, label_source, notes (str), starred (bool), lists (list of str): one row for each
        feature of which anything is said, by feature. A copy."""
        with self._lock:
            version = self.version
            if self._table is None or self._table[0] != version:
                self._table = (version, self._read_table())
            return self._table[1].copy()

    def _read_table(self) -> pd.DataFrame:
        said: dict[int, dict[str, object]] = {}
        with self._reading() as database:
            labels = database.execute(
                f"SELECT feature, text, source FROM feature_label WHERE sae = ? ORDER BY feature, {_PREFERENCE}",
                (self.sae,),
            )
            for feature, text, source in labels:
                said.setdefault(feature, {"label": text, "label_source": source})
            notes = database.execute("SELECT feature, notes, starred FROM feature_note WHERE sae = ?", (self.sae,))
            for feature, text, starred in notes:
                said.setdefault(feature, {}).update(notes=text, starred=bool(starred))
            for feature, name in database.execute(
                "SELECT feature, list FROM feature_list WHERE sae = ? ORDER BY list", (self.sae,)
            ):
                said.setdefault(feature, {}).setdefault("lists", []).append(name)  # type: ignore[attr-defined]
        empty = {"label": "", "label_source": "", "notes": "", "starred": False}
        rows = [{"feature": feature, **empty, "lists": [], **said[feature]} for feature in sorted(said)]
        table = pd.DataFrame(rows, columns=COLUMNS)
        texts = dict.fromkeys(("label", "label_source", "notes"), "str")
        return table.astype({"feature": "int64", "starred": "bool", **texts})

    # --- writing ----------------------------------------------------------------------------------------------

    def set(
        self, feature: int, text: str | None = None, notes: str | None = None, starred: bool | None = None
    ) -> Label:
        """Change what is said of a feature; None leaves a part as it is. Returns what holds now.

        Args:
            text: one's own label. Line breaks become spaces; an empty one takes the own label away, so that an
                imported one shows again.
            notes: free text. Empty takes them away.
            starred: whether it is starred.
        Raises:
            OutOfRangeError: the SAE has no such feature.
            InvalidInputError: a text is longer than it may be.
        """
        feature = self._checked(feature)
        text = None if text is None else _checked_text(" ".join(text.split()), "label", MAX_LABEL)
        notes = None if notes is None else _checked_text(notes.strip(), "note", MAX_NOTES)
        with self._writing() as database:
            if text:
                self._put(database, [ImportedLabel(feature, text, OWN, "", _now())])
            elif text is not None:
                gone = (self.sae, feature, OWN)
                database.execute("DELETE FROM feature_label WHERE sae = ? AND feature = ? AND source = ?", gone)
            if notes is not None or starred is not None:
                self._put_note(database, feature, notes, starred)
                database.execute(
                    "DELETE FROM feature_note WHERE sae = ? AND feature = ? AND notes = '' AND starred = 0",
                    (self.sae, feature),
                )
        return self.get(feature)

    def add_to_list(self, feature: int, name: str) -> Label:
        """Put a feature into a list, which is made if it is new. Returns what holds now.

        Raises:
            OutOfRangeError: the SAE has no such feature.
            InvalidInputError: the name is empty or too long.
        """
        feature, name = self._checked(feature), _checked_name(name)
        with self._writing() as database:
            self._put_into_list(database, feature, name)
        return self.get(feature)

    def remove_from_list(self, feature: int, name: str) -> Label:
        """Take a feature out of a list; a list without features is gone. Returns what holds now."""
        feature, name = self._checked(feature), _checked_name(name)
        with self._writing() as database:
            database.execute(
                "DELETE FROM feature_list WHERE sae = ? AND list = ? AND feature = ?", (self.sae, name, feature)
            )
        return self.get(feature)

    def take_in(self, labels: Iterable[ImportedLabel]) -> int:
        """Take in labels from elsewhere, all of them or, on an error, none. Returns how many.

        One's own labels are left as they are and go on showing. A label with the source, feature and key of one that
        is there replaces it, so taking in a file twice changes nothing.

        Raises:
            OutOfRangeError: the SAE has no such feature.
            InvalidInputError: a label is empty or longer than it may be, or claims to be one's own.
        """
        checked = []
        for label in labels:
            text = _checked_text(" ".join(label.text.split()), "label", MAX_LABEL)
            if not text:
                raise InvalidInputError(f"The label of feature {label.feature} from {label.source} is empty.")
            if label.source in ("", OWN):
                raise InvalidInputError(f"An imported label's source says where it is from; it is {label.source!r}.")
            checked.append(label._replace(feature=self._checked(label.feature), text=text))
        if checked:
            with self._writing() as database:
                self._put(database, checked)
        return len(checked)

    def restore(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Take in what `table` gave, as records (of `scope labels export`). Returns of how many features.

        One's own labels and notes of the records replace those that are here; imported labels are added to those that
        are here, stars and lists too. All of it is taken in or, on an error, none.

        Raises:
            OutOfRangeError: the SAE has no such feature.
            InvalidInputError: a record is not one of `table`'s.
        """
        rows = [_checked_record(record, self._checked) for record in records]
        with self._writing() as database:
            for row in rows:
                if row["label"]:
                    key = "" if row["label_source"] == OWN else "restored"
                    label = ImportedLabel(row["feature"], row["label"], row["label_source"], key, "")
                    self._put(database, [label._replace(created=_now()) if not key else label])
                if row["notes"] or row["starred"]:
                    self._put_note(database, row["feature"], row["notes"] or None, row["starred"] or None)
                for name in row["lists"]:
                    self._put_into_list(database, row["feature"], name)
        return len(rows)

    def forget(self, source: str) -> int:
        """Take away all labels of one imported source. Returns how many there were."""
        if source == OWN:
            raise InvalidInputError("One's own labels are taken away one by one: set(feature, text='').")
        with self._writing() as database:
            return database.execute(
                "DELETE FROM feature_label WHERE sae = ? AND source = ?", (self.sae, source)
            ).rowcount

    # --- shared by the methods above --------------------------------------------------------------------------

    def _put(self, database: sqlite3.Connection, labels: Iterable[ImportedLabel]) -> None:
        database.executemany(
            "INSERT OR REPLACE INTO feature_label (sae, feature, source, key, text, created) VALUES (?, ?, ?, ?, ?, ?)",
            [(self.sae, label.feature, label.source, label.key, label.text, label.created) for label in labels],
        )

    def _put_note(self, database: sqlite3.Connection, feature: int, notes: str | None, starred: bool | None) -> None:
        database.execute(
            "INSERT INTO feature_note (sae, feature, notes, starred) VALUES (?1, ?2, ifnull(?3, ''), ifnull(?4, 0)) "
            "ON CONFLICT DO UPDATE SET notes = ifnull(?3, notes), starred = ifnull(?4, starred)",
            (self.sae, feature, notes, None if starred is None else int(starred)),
        )

    def _put_into_list(self, database: sqlite3.Connection, feature: int, name: str) -> None:
        database.execute(
            "INSERT OR IGNORE INTO feature_list (sae, list, feature) VALUES (?, ?, ?)", (self.sae, name, feature)
        )

    def _checked(self, feature: int) -> int:
        if isinstance(feature, bool) or int(feature) != feature:
            raise InvalidInputError(f"A feature is a whole number; got {feature!r}.")
        if feature < 0 or (self.d_sae is not None and feature >= self.d_sae):
            bound = "0 or more" if self.d_sae is None else f"from 0 to {self.d_sae - 1:,}"
            raise OutOfRangeError(f"There is no feature {feature}: ids run {bound}.")
        return int(feature)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if self._memory is not None:
            with self._lock:
                yield self._memory
        elif self.path is not None and self.path.is_file():
            with closing(_connect_to_read(self.path)) as database:
                yield database
        else:
            with closing(_connect(":memory:")) as database:
                yield database

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, which also counts the version up."""
        with self._lock:
            database = self._memory
            if database is None:
                assert self.path is not None
                self.path.parent.mkdir(parents=True, exist_ok=True)
                database = _connect(self.path)
            try:
                database.execute("BEGIN IMMEDIATE")
                with database:
                    yield database
                    database.execute(
                        "INSERT INTO label_version VALUES (?, 1) ON CONFLICT DO UPDATE SET version = version + 1",
                        (self.sae,),
                    )
            finally:
                if database is not self._memory:
                    database.close()

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"in {self.path}"
        return f"FeatureLabels({self.sae[:12]}, {len(self.table())} features, {where})"


_PREFERENCE = f"source != '{OWN}', created DESC, source, key"
"""One's own label first, then the newest."""


def _connect(path: str | Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    try:
        _prepare(database)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection) -> None:
    """Switch to the write-ahead log and make the tables. SQLite refuses the switch at once, without waiting, while
    another connection makes it: hence the repetition."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
            _check_version(database)
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'label_version'").fetchone():
                database.executescript(f"BEGIN IMMEDIATE;{SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
            return
        except sqlite3.OperationalError as problem:
            if "locked" not in str(problem) or time.monotonic() > deadline:
                raise
            if database.in_transaction:
                database.rollback()
            time.sleep(0.01)


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection that sees the tables; an empty one in memory where nobody has written a label yet.

    A database in a folder that may not be written to is read as it lies, without its log."""
    database = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
    try:
        _check_version(database)
        if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'label_version'").fetchone():
            return database
    except sqlite3.OperationalError as problem:
        database.close()
        if "readonly" not in str(problem) and "unable to open" not in str(problem):
            raise
        address = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
        database = sqlite3.connect(address, uri=True, isolation_level=None)
        if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'label_version'").fetchone():
            return database
    database.close()
    return _connect(":memory:")


def _check_version(database: sqlite3.Connection) -> None:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        database.close()
        raise InvalidInputError(
            f"The workspace's database has version {version}; this release reads up to {SCHEMA_VERSION}. "
            "Upgrade scope-workbench to open it."
        )


def _checked_record(record: Mapping[str, Any], check_feature: Callable[[int], int]) -> dict[str, Any]:
    missing = [name for name in COLUMNS if name not in record]
    if missing:
        raise InvalidInputError(f"A record has no {', '.join(missing)}; expected {', '.join(COLUMNS)}.")
    row = {name: record[name] for name in COLUMNS}
    if not isinstance(row["lists"], (list, tuple)):
        raise InvalidInputError(
            f"The lists of feature {row['feature']} are {row['lists']!r}; expected names in a list."
        )
    return {
        "feature": check_feature(row["feature"]),
        "label": _checked_text(" ".join(str(row["label"] or "").split()), "label", MAX_LABEL),
        "label_source": str(row["label_source"] or OWN),
        "notes": _checked_text(str(row["notes"] or ""), "note", MAX_NOTES),
        "starred": bool(row["starred"]),
        "lists": [_checked_name(str(name)) for name in row["lists"]],
    }


def _checked_name(name: str) -> str:
    name = _checked_text(" ".join(name.split()), "list's name", MAX_LIST_NAME)
    if not name:
        raise InvalidInputError("A list needs a name.")
    return name


def _checked_text(text: str, what: str, limit: int) -> str:
    if len(text) > limit:
        raise InvalidInputError(f"The {what} has {len(text):,} characters; at most {limit:,} are kept. Shorten it.")
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise InvalidInputError(f"The {what} holds half a character (a lone surrogate), which is no text.") from problem
    return text.replace("\0", "")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
