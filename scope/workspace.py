"""`Workspace`: a folder of stores, SAEs, indexes and circuit graphs, listed by id. The one place that knows the layout.

    WORKSPACE/
      stores/NAME.zarr      activation stores
      saes/NAME/            sparse autoencoders, other tools' too, once they were taken in
      saes/SWEEP/NAME/      those of a sweep, or of a set of transcoders; their name is SWEEP/NAME
      saes/.NAME.training/  a run under way, or stopped, of what is to become saes/NAME
      indexes/NAME.index/   feature indexes
      excerpts/NAME.excerpt/  what indexes over larger texts say of the features of an SAE
      diffs/NAME/           comparisons of two models
      graphs/NAME.json      circuit graphs, in circuit-tracer's JSON
      graphs/.verified/ID   what verifying the graph of this id has measured
      interventions/NAME.json  named interventions (scope.interventions.spec)
      workspace.db          labels, notes and lists, and what was taken in from elsewhere (SQLite, WAL)

The id of an artefact is the first 12 hex digits of its fingerprint (a graph's is that of its file's bytes); whoever
knows an id never needs a path, and no path ever comes from a request. Artefacts that lie elsewhere, and published SAEs,
are taken in with `Workspace.add`.
"""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from activations.manifest import ID_LENGTH, read_manifest
from scope.errors import InvalidInputError, ScopeError, UnknownNameError

if TYPE_CHECKING:
    from activations.store import ActivationStore
    from scope.attribution.graph import CircuitGraph
    from scope.features.excerpt import FeatureExcerpt
    from scope.features.index import FeatureIndex
    from scope.features.labels import FeatureLabels
    from scope.features.neuronpedia import SAEAddress
    from scope.interventions.spec import InterventionSpec
    from scope.saes.base import SAE
    from scope.training.runs import Run

__all__ = ["Entry", "Kind", "Workspace", "open_index"]

Kind = Literal["activation-store", "sae", "feature-index", "feature-excerpt", "model-diff", "circuit-graph"]
FOLDERS: dict[Kind, str] = {
    "activation-store": "stores",
    "sae": "saes",
    "feature-index": "indexes",
    "feature-excerpt": "excerpts",
    "model-diff": "diffs",
    "circuit-graph": "graphs",
}
SUFFIXES: dict[Kind, str] = {
    "activation-store": ".zarr",
    "sae": "",
    "feature-index": ".index",
    "feature-excerpt": ".excerpt",
    "model-diff": "",
    "circuit-graph": ".json",
}
GRAPH: Kind = "circuit-graph"
VERIFIED = ".verified"
INTERVENTIONS = "interventions"
NAME = re.compile(r"[^\W_]([\w .-]{0,58}[^\W_])?")
"""Names of interventions, which are names of files too."""
SCHEMA = "CREATE TABLE IF NOT EXISTS added (path TEXT PRIMARY KEY)"
BUSY = 30.0
"""Seconds to wait for somebody else who writes into the database."""


@dataclass(frozen=True)
class Entry:
    """One artefact of a workspace."""

    kind: Kind
    id: str
    """First 12 hex digits of the fingerprint."""
    name: str
    """The name of the folder, or of a graph's file, without its suffix."""
    path: Path
    manifest: dict[str, Any]
    problem: str | None = None
    """Why the artefact cannot be read, if it cannot."""


class Workspace:
    """A folder of stores, SAEs, indexes and circuit graphs.

    Args:
        path: the folder. It may be empty; it is only created when something is put into it.

    Raises:
        InvalidInputError: `path` exists and is not a folder.
    """

    def __init__(self, path: str | Path = "workspace") -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InvalidInputError(f"{self.path} is a file; a workspace is a folder.")
        self._known: dict[Path, tuple[tuple[int, int], Entry]] = {}

    @property
    def database(self) -> Path:
        """Where labels lie, and what was taken in from elsewhere (SQLite). Made when something is first written."""
        return self.path / "workspace.db"

    def path_for(self, kind: Kind, name: str) -> Path:
        """Where an artefact of this kind and name belongs. The folder above it is created."""
        folder = self.path / FOLDERS[kind]
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}{SUFFIXES[kind]}"

    def entries(self, kind: Kind | None = None) -> list[Entry]:
        """All artefacts, or those of one kind, by name. What cannot be read is listed with its problem."""
        return sorted(
            (entry for entry in self._scan(kind) if kind is None or entry.kind == kind),
            key=lambda entry: (list(FOLDERS).index(entry.kind), entry.name),
        )

    def stores(self) -> list[Entry]:
        """The activation stores."""
        return self.entries("activation-store")

    def saes(self) -> list[Entry]:
        """The sparse autoencoders."""
        return self.entries("sae")

    def indexes(self) -> list[Entry]:
        """The feature indexes."""
        return self.entries("feature-index")

    def diffs(self) -> list[Entry]:
        """The comparisons of two models."""
        return self.entries("model-diff")

    def trainings(self) -> "list[Run]":
        """The training runs, those under way first: of SAEs that lie, or will lie, in this workspace."""
        from scope.training.runs import LOG_NAME, discover, finished_run

        runs = discover([self.path / FOLDERS["sae"]])
        known = {run.out.resolve() for run in runs}
        for entry in self.saes():
            if entry.path.resolve() not in known and (entry.path / LOG_NAME).is_file():
                runs.append(finished_run(entry.path, entry.name))
        return runs

    def training(self, id: str) -> "Run":
        """The training run with this id or name.

        Raises:
            UnknownNameError: there is none.
        """
        runs = self.trainings()
        for run in runs:
            if id in (run.id, run.name):
                return run
        known = [name for run in runs for name in (run.id, run.name)]
        raise UnknownNameError("training", id, known, hint=f"The workspace is {self.path}.")

    def graphs(self) -> list[Entry]:
        """The circuit graphs; an entry's manifest says what `scope.attribution.graph_json.graph_facts` does."""
        return self.entries("circuit-graph")

    def find(self, id: str, kind: Kind | None = None) -> Entry:
        """The artefact with this id, fingerprint or name.

        Raises:
            UnknownNameError: there is none; the ids and names that exist are suggested.
        """
        entries = self.entries(kind)
        for entry in entries:
            if id in (entry.id, entry.name) or (len(id) > ID_LENGTH and entry.manifest.get("fingerprint") == id):
                return entry
        known = [name for entry in entries for name in (entry.id, entry.name)]
        raise UnknownNameError(kind or "artefact", id, known, hint=f"The workspace is {self.path}.")

    def store(self, id: str) -> "ActivationStore":
        """The activation store with this id."""
        from activations.store import ActivationStore

        return ActivationStore.open(self.find(id, "activation-store").path)

    def sae(self, id: str) -> "SAE":
        """The sparse autoencoder with this id, or at an absolute path, an address or a `RELEASE/ID` that
        `scope.saes.formats.load` takes."""
        from scope.saes.formats import is_release, load
        from scope.saes.formats.addresses import is_address

        if is_address(id) or Path(id).is_absolute():
            return load(id)
        try:
            return load(self.find(id, "sae").path)
        except UnknownNameError:
            if "/" not in id or not is_release(id):
                raise
            return load(id)

    def index(self, id: str) -> "FeatureIndex":
        """The feature index with this id, with the labels that the workspace has of its SAE's features."""
        return _open_labelled(self.find(id, "feature-index").path, self.database)

    def excerpt(self, id: str) -> "FeatureExcerpt":
        """The excerpt with this id."""
        from scope.features.excerpt import FeatureExcerpt

        return FeatureExcerpt.open(self.find(id, "feature-excerpt").path)

    def excerpt_of(self, sae: str) -> Entry | None:
        """The excerpt of the SAE with this fingerprint, of several the one over the most tokens; None where there is
        none."""
        readable = [entry for entry in self.entries("feature-excerpt") if entry.problem is None]
        found = [entry for entry in readable if entry.manifest["sae"]["fingerprint"] == sae]
        return max(found, key=lambda entry: int(entry.manifest["n_rows"]), default=None)

    def graph(self, id: str) -> "CircuitGraph":
        """The circuit graph with this id."""
        from scope.attribution.graph_json import load_graph

        return load_graph(self.find(id, "circuit-graph").path)

    def verification_path(self, id: str) -> Path:
        """Where what verifying a graph has measured lies, or will lie (`scope.attribution.verdicts`)."""
        return self.path / FOLDERS["circuit-graph"] / VERIFIED / f"{self.find(id, 'circuit-graph').id}.parquet"

    def edge_tests_path(self, id: str) -> Path:
        """Where what path patching has measured of a graph's edges lies, or will lie (the same format)."""
        return self.verification_path(id).with_suffix(".edges.parquet")

    def labels(self, id: str) -> "FeatureLabels":
        """The labels of an SAE's features. `id` is that of the SAE or of an index of it, or a path or address that
        `scope.saes.formats.load` takes.

        Raises:
            UnknownNameError: there is no such SAE.
        """
        return self.labelled(id)[0]

    def labelled(self, id: str) -> "tuple[FeatureLabels, SAEAddress]":
        """As `labels`, and what the SAE is of, which an import of labels compares with."""
        from scope.features.labels import FeatureLabels
        from scope.features.neuronpedia import SAEAddress

        for entry in self.indexes():
            about = entry.manifest.get("sae", {})
            fingerprint = str(about.get("fingerprint", ""))
            if entry.problem is None and id in (entry.id, entry.name, fingerprint, fingerprint[:ID_LENGTH]):
                address = SAEAddress.of(entry.manifest["model"]["name"], about["hook_name"], about.get("metadata"))
                return FeatureLabels(fingerprint, self.database, d_sae=int(entry.manifest["d_sae"])), address
        sae = self.sae(id)
        metadata = sae.cfg.metadata
        address = SAEAddress.of(metadata.model_name, metadata.hook_name, metadata.extra)
        return FeatureLabels(sae.fingerprint, self.database, d_sae=sae.d_sae), address

    def interventions(self) -> list[str]:
        """The names of the interventions that are kept, in alphabetical order."""
        return sorted(path.stem for path in (self.path / INTERVENTIONS).glob("*.json") if NAME.fullmatch(path.stem))

    def intervention(self, name: str) -> "InterventionSpec":
        """The named interventions.

        Raises:
            UnknownNameError: there are none of this name.
            InvalidInputError: their file cannot be read.
        """
        from scope.interventions.spec import InterventionSpec

        if name not in self.interventions():
            raise UnknownNameError(
                "named intervention", name, self.interventions(), hint=f"The workspace is {self.path}."
            )
        return InterventionSpec.load(self.path / INTERVENTIONS / f"{name}.json")

    def save_intervention(self, spec: "InterventionSpec") -> None:
        """Keep interventions under their name; others of that name are replaced.

        Raises:
            InvalidInputError: the name is not one to 60 letters, digits, blanks, dots, dashes and underscores.
        """
        if not NAME.fullmatch(spec.name):
            raise InvalidInputError(
                f"{spec.name!r} cannot be a name: take one to 60 letters, digits, blanks, dashes, dots or underscores, "
                "a letter or digit first and last."
            )
        folder = self.path / INTERVENTIONS
        folder.mkdir(parents=True, exist_ok=True)
        spec.save(folder / f"{spec.name}.json")

    def parents(self, entry: Entry) -> list[Entry]:
        """What an artefact was made from, as far as it lies in this workspace."""
        wanted = set(entry.manifest.get("parents", ()))
        return [other for other in self._scan() if other.manifest.get("fingerprint") in wanted]

    def add(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        hook: str | None = None,
        hook_out: str | None = None,
        allow_download: bool = False,
    ) -> Entry:
        """Take in an artefact that lies elsewhere; it stays where it is.

        An SAE without our manifest has no id. Whatever `scope.saes.formats.load` reads, another tool's folder, an
        address on the Hugging Face hub or a release of SAELens, is therefore written into this workspace in SAELens's
        format; one whose weights are here already is not written again.

        Args:
            path: where it lies, or an SAE's address or `RELEASE/ID`.
            name: the folder's name of an SAE that is written; by default the last part of `path`.
            hook, hook_out, allow_download: of an SAE that is written, as for `scope.saes.formats.load`.

        Raises:
            UnknownNameError: there is no artefact at `path`.
            InvalidInputError: it is a file and no circuit graph; or a name was given and nothing is to be written.
            OccupiedError: the workspace has another SAE of that name.
        """
        from scope.saes.formats import is_published

        if is_published(path):
            return self._written(path, name, hook, hook_out, allow_download)
        if name or hook or hook_out:
            raise InvalidInputError(
                f"{path} stays where it is, as it is; a name and hooks are for SAEs of other tools, which are copied."
            )
        folder = Path(path).resolve()
        entry = _graph_entry(folder) if folder.is_file() else _entry(folder, read_manifest(folder))
        self.path.mkdir(parents=True, exist_ok=True)
        with closing(self._database()) as database, database:
            database.execute("INSERT OR IGNORE INTO added VALUES (?)", (str(folder),))
        return entry

    def _written(
        self, path: str | Path, name: str | None, hook: str | None, hook_out: str | None, allow_download: bool
    ) -> Entry:
        from scope.saes import formats

        sae = formats.load(path, hook=hook, hook_out=hook_out, allow_download=allow_download).for_inference()
        known = [entry for entry in self.saes() if entry.manifest.get("fingerprint") == sae.fingerprint]
        if known:
            return known[0]
        name = name or Path(str(path).rpartition("@")[0] or path).name.removesuffix(".safetensors")
        if name != Path(name).name or name.startswith("."):
            raise InvalidInputError(f"{name!r} cannot be the name of an SAE's folder.")
        folder = self.path_for("sae", name)
        formats.save_converted(sae, path, folder)
        return self._read(folder)

    def _database(self) -> sqlite3.Connection:
        # Not in write-ahead mode, as labels are: SQLite refuses the switch at once where somebody else writes.
        database = sqlite3.connect(self.database, timeout=BUSY)
        database.execute(SCHEMA)
        return database

    def _added(self) -> list[Path]:
        if not self.database.is_file():
            return []
        # A look must neither make a table nor switch modes while somebody writes the first label.
        with closing(sqlite3.connect(self.database, timeout=BUSY)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'added'").fetchone():
                return []
            return [Path(row[0]) for row in database.execute("SELECT path FROM added ORDER BY path")]

    def _scan(self, wanted: Kind | None = None) -> Iterator[Entry]:
        """All artefacts; graphs, which are read to be listed, only where all or graphs are asked for."""
        if wanted in (None, GRAPH):
            yield from self._scan_graphs()
        seen: set[Path] = set()
        for path, before in self._places():
            if path.resolve() in seen or not (path / "manifest.json").is_file():
                continue
            seen.add(path.resolve())
            try:
                yield self._read(path, before)
            except FileNotFoundError:  # removed since it was seen
                continue
            except ScopeError as error:
                within = path.relative_to(self.path).parts[0] if path.is_relative_to(self.path) else ""
                kind = next((kind for kind, folder in FOLDERS.items() if within == folder), None)
                if kind is not None:
                    yield Entry(kind, "", before + path.name, path, {}, problem=str(error))

    def _places(self) -> Iterator[tuple[Path, str]]:
        """Where artefacts may lie, each with what stands before its name: SAEs of a sweep lie one folder deeper."""
        from scope.training.runs import levels

        for kind, folder in FOLDERS.items():
            for inner, before in levels(self.path / folder) if kind == "sae" else [(self.path / folder, "")]:
                yield from ((path, before) for path in sorted(inner.glob("*")))
        yield from ((path, "") for path in self._added())

    def _read(self, path: Path, before: str = "") -> Entry:
        """The artefact in a folder, read anew when its manifest was replaced: a page asks for it many times."""
        stat = (path / "manifest.json").stat()
        version = (stat.st_ino, stat.st_mtime_ns)
        if self._known.get(path, (None,))[0] != version:
            entry = _entry(path, read_manifest(path))
            self._known[path] = version, replace(entry, name=before + entry.name)
        return self._known[path][1]

    def _scan_graphs(self) -> Iterator[Entry]:
        seen: set[Path] = set()
        within = sorted((self.path / FOLDERS[GRAPH]).glob(f"*{SUFFIXES[GRAPH]}"))
        for path in [*within, *(path for path in self._added() if path.is_file())]:
            if path.resolve() in seen or path.name.startswith("."):
                continue
            seen.add(path.resolve())
            try:
                yield _graph_entry(path)
            except ScopeError as error:
                yield Entry(GRAPH, "", path.stem, path, {}, problem=str(error))

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.entries(kind))} {folder}" for kind, folder in FOLDERS.items())
        return f"Workspace({str(self.path)!r}: {counts})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(entry.kind)}</td><td><code>{escape(entry.id)}</code></td>"
            f"<td>{escape(entry.name)}</td><td>{escape(str(entry.problem or entry.path))}</td></tr>"
            for entry in self.entries()
        )
        return (
            f"<b>Workspace</b> <code>{escape(str(self.path))}</code>"
            f"<table><tr><th>kind</th><th>id</th><th>name</th><th>where</th></tr>{rows}</table>"
        )


def open_index(what: str | Path, workspace: str | Path | None = None) -> "FeatureIndex":
    """An index with its labels, by its folder or by id or name.

    Args:
        what: a folder, or an id or name in the workspace.
        workspace: where it and its labels lie; by default the one that the folder is in, else "workspace".
    Raises:
        UnknownNameError: there is no such index.
    """
    folder = Path(what)
    if not (folder / "manifest.json").is_file():
        return Workspace(workspace or "workspace").index(str(what))
    within = folder.resolve().parent
    if workspace is None and within.name == FOLDERS["feature-index"]:
        workspace = within.parent
    return _open_labelled(folder, None if workspace is None else Workspace(workspace).database)


def _open_labelled(folder: Path, database: Path | None) -> "FeatureIndex":
    from scope.features.index import FeatureIndex
    from scope.features.labels import FeatureLabels

    manifest = read_manifest(folder, "feature-index")
    labels = FeatureLabels(manifest["sae"]["fingerprint"], database, d_sae=int(manifest["d_sae"]))
    return FeatureIndex.open(folder, labels)


def _graph_entry(path: Path) -> Entry:
    from scope.attribution.graph_json import graph_facts

    facts = graph_facts(path)
    manifest = {**facts, "format": GRAPH, "parents": []}
    return Entry(GRAPH, facts["fingerprint"][:ID_LENGTH], path.name.removesuffix(SUFFIXES[GRAPH]), path, manifest)


def _entry(path: Path, manifest: dict[str, Any]) -> Entry:
    kind = manifest["format"]
    if kind not in FOLDERS:
        raise InvalidInputError(f"{path} is of format {kind!r}, which a workspace does not hold.")
    return Entry(kind, manifest["fingerprint"][:ID_LENGTH], path.name.removesuffix(SUFFIXES[kind]), path, manifest)
