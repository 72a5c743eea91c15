"""The workspace lists artefacts by id, and takes in what lies elsewhere."""

import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from activations.manifest import write_manifest
from scope.errors import InvalidInputError, UnknownNameError
from scope.workspace import Workspace


def make(folder, format="sae", fingerprint="ab" * 32, parents=()):
    folder.mkdir(parents=True)
    write_manifest(folder, format, fingerprint, parents, "tests")
    return folder


def test_artefacts_are_found_by_id_name_and_fingerprint(tmp_path):
    workspace = Workspace(tmp_path)
    make(workspace.path_for("sae", "small"))
    entry = workspace.find("abababababab")
    assert (entry.name, entry.kind) == ("small", "sae")
    assert workspace.find("small", "sae").path == workspace.find("ab" * 32).path == entry.path


def test_an_unknown_id_suggests_near_ones(tmp_path):
    make(Workspace(tmp_path).path_for("sae", "small"))
    with pytest.raises(UnknownNameError, match="Did you mean abababababab"):
        Workspace(tmp_path).find("abababababaa")


def test_what_lies_elsewhere_is_added_once(tmp_path):
    workspace = Workspace(tmp_path / "w")
    elsewhere = make(tmp_path / "elsewhere" / "store.zarr", "activation-store")
    assert workspace.add(elsewhere) == workspace.add(elsewhere)
    assert [entry.id for entry in workspace.stores()] == ["abababababab"]
    with pytest.raises(UnknownNameError):
        workspace.add(tmp_path / "nothing")


def test_the_saes_of_a_sweep_are_listed_with_its_name(tmp_path):
    workspace = Workspace(tmp_path)
    sweep = workspace.path_for("sae", "sweep")
    make(sweep / "k-16", fingerprint="12" * 32)
    make(sweep / "k-32", fingerprint="34" * 32)
    make(workspace.path_for("sae", "alone"), fingerprint="56" * 32)
    make(workspace.path_for("sae", "alone.snapshots") / "step-1", fingerprint="78" * 32)
    make(workspace.path_for("sae", ".k-64.training") / "inner", fingerprint="90" * 32)
    (make(sweep / "torn") / "manifest.json").write_text("{")
    for _ in range(2):  # the second time from what is known
        entries = workspace.saes()
        assert [entry.name for entry in entries] == ["alone", "sweep/k-16", "sweep/k-32", "sweep/torn"]
        assert [bool(entry.problem) for entry in entries] == [False, False, False, True]
    assert workspace.find("121212121212") == workspace.find("sweep/k-16", "sae")
    assert workspace.find("sweep/k-16").path == sweep / "k-16"


def test_parents_resolve_by_fingerprint(tmp_path):
    workspace = Workspace(tmp_path)
    make(workspace.path_for("activation-store", "s"), "activation-store", "cd" * 32)
    make(workspace.path_for("sae", "a"), parents=["cd" * 32])
    (sae,) = workspace.saes()
    assert [parent.name for parent in workspace.parents(sae)] == ["s"]


def test_a_broken_manifest_is_listed_with_its_problem(tmp_path):
    workspace = Workspace(tmp_path)
    folder = make(workspace.path_for("feature-index", "f"), "feature-index")
    (folder / "manifest.json").write_text("{")
    (entry,) = workspace.indexes()
    assert "not a readable manifest" in entry.problem
    assert "<b>Workspace</b>" in workspace._repr_html_()


def test_what_changes_while_others_list_it_is_read_anew_and_what_goes_is_gone(tmp_path):
    workspace = Workspace(tmp_path)
    grows, goes = (workspace.path_for("feature-index", name) for name in ("grows", "goes"))
    make(grows, "feature-index")
    rounds = 60

    def change():
        for n_rows in range(rounds):
            write_manifest(grows, "feature-index", "ab" * 32, (), "tests", n_rows=n_rows)
            make(goes, "feature-index", "cd" * 32)
            shutil.rmtree(goes)

    with ThreadPoolExecutor(3) as pool:
        changing = pool.submit(change)

        def listed():
            seen = []
            while not changing.done():
                entries = {entry.name: entry for entry in workspace.indexes()}
                assert entries["grows"].problem is None
                seen.append(entries["grows"].manifest.get("n_rows", -1))
            return seen

        watching = [pool.submit(listed) for _ in range(2)]
        changing.result()
        for watch in watching:
            assert (seen := watch.result()) == sorted(seen)
    (left,) = workspace.indexes()
    assert left.manifest["n_rows"] == rounds - 1


def test_who_adds_an_artefact_waits_for_another_who_writes(tmp_path):
    workspace, folder = Workspace(tmp_path / "w"), make(tmp_path / "elsewhere", "sae")
    workspace.path.mkdir()
    with closing(sqlite3.connect(workspace.database, isolation_level=None)) as other, ThreadPoolExecutor(1) as pool:
        other.execute("CREATE TABLE theirs (x)")
        other.execute("BEGIN IMMEDIATE")
        adding = pool.submit(workspace.add, folder)
        time.sleep(0.2)  # it meets the other's lock
        other.execute("COMMIT")
        assert adding.result().path == folder.resolve()
    assert [entry.path for entry in workspace.saes()] == [folder.resolve()]


def test_an_artefact_that_goes_between_two_looks_is_left_out(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path)
    folder = make(workspace.path_for("sae", "s"))
    real = Workspace._read
    monkeypatch.setattr(Workspace, "_read", lambda own, *where: (shutil.rmtree(folder), real(own, *where))[1])
    assert workspace.saes() == []


def test_a_newer_format_is_refused_and_said(tmp_path):
    folder = make(Workspace(tmp_path).path_for("sae", "s"))
    manifest = (folder / "manifest.json").read_text().replace('"version": 1', '"version": 99')
    (folder / "manifest.json").write_text(manifest)
    assert "Upgrade scope-workbench" in Workspace(tmp_path).saes()[0].problem


def test_a_file_is_not_a_workspace(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInputError, match="is a file"):
        Workspace(tmp_path / "file")
