"""Labels, notes, stars and lists: kept, found again, and safe when several write at once."""

import os
import sqlite3
import subprocess
import sys
import threading

import pandas as pd
import pytest
from helpers_features import tiny_index

from scope.errors import InvalidInputError, OutOfRangeError
from scope.features.labels import MAX_LABEL, MAX_LIST_NAME, MAX_NOTES, FeatureLabels, ImportedLabel, Label, StoredLabel
from scope.workspace import Workspace

SAE = "ab" * 32
HARD = [
    '<script>alert("x")</script>',
    "=cmd|' /C calc'!A0",
    "قط يجلس على السطح",
    "長い" * 100,
    "o'hara; DROP TABLE x --",
]


@pytest.fixture(params=["memory", "file"])
def labels(request, tmp_path):
    return FeatureLabels(SAE, None if request.param == "memory" else tmp_path / "w" / "workspace.db", d_sae=40)


def test_nothing_is_said_at_first_and_looking_writes_nothing(tmp_path):
    labels = FeatureLabels(SAE, tmp_path / "w" / "workspace.db")
    assert labels.get(3) == Label()
    assert labels.version == 0
    assert labels.lists() == {}
    assert labels.table().empty
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("text", HARD)
def test_any_text_is_kept_as_it_is(labels, text):
    labels.set(3, text=text, notes=text)
    labels.add_to_list(3, text[:MAX_LIST_NAME])
    assert labels.get(3) == Label(text, "own", text, False, (text[:MAX_LIST_NAME],))
    assert labels.table().to_dict("records") == [
        {"feature": 3, "label": text, "label_source": "own", "notes": text, "starred": False,
         "lists": [text[:MAX_LIST_NAME]]}
    ]  # fmt: skip


def test_a_part_that_is_not_given_stays(labels):
    labels.set(3, text="cats", notes="seen in Alice")
    labels.set(3, starred=True)
    assert labels.set(3, text="  two\n lines ") == Label("two lines", "own", "seen in Alice", True)
    assert labels.set(3, notes="", starred=False) == Label("two lines", "own")
    labels.set(3, text="")
    assert labels.get(3) == Label()
    assert labels.table().empty


def test_ones_own_label_wins_and_imported_ones_are_kept(labels):
    imported = [
        ImportedLabel(3, "old", "np: a", "1", "2024-01-01"),
        ImportedLabel(3, "new", "np: b", "2", "2025-01-01"),
        ImportedLabel(7, "seven", "np: a", "3"),
    ]
    assert labels.take_in(imported) == labels.take_in(imported) == 3
    assert labels.get(3) == Label("new", "np: b")
    labels.set(3, text="mine")
    labels.take_in(imported)
    assert (labels.get(3).text, labels.get(3).source) == ("mine", "own")
    assert [(stored.text, stored.source) for stored in labels.all(3)] == [
        ("mine", "own"),
        ("new", "np: b"),
        ("old", "np: a"),
    ]
    assert labels.table()[["feature", "label", "label_source"]].to_numpy().tolist() == [
        [3, "mine", "own"],
        [7, "seven", "np: a"],
    ]
    labels.set(3, text="")
    assert labels.get(3).text == "new"
    assert labels.forget("np: a") == 2
    assert labels.all(3) == [StoredLabel("new", "np: b", "2025-01-01")]
    assert labels.get(7) == Label()


def test_lists_keep_the_order_of_adding(labels):
    for feature in (9, 2, 5, 2):
        labels.add_to_list(feature, "to look at")
    labels.add_to_list(2, "animals")
    assert labels.lists() == {"animals": [2], "to look at": [9, 2, 5]}
    assert labels.get(2).lists == ("animals", "to look at")
    labels.remove_from_list(2, "animals")
    assert labels.lists() == {"to look at": [9, 2, 5]}


def test_the_version_changes_with_every_edit_and_the_table_follows(labels):
    seen = {labels.version}
    for change in (
        lambda: labels.set(1, text="a"),
        lambda: labels.set(1, starred=True),
        lambda: labels.add_to_list(1, "b"),
        lambda: labels.remove_from_list(1, "b"),
        lambda: labels.take_in([ImportedLabel(1, "x", "np", "1")]),
        lambda: labels.forget("np"),
    ):
        labels.table()
        change()
        assert labels.version not in seen
        seen.add(labels.version)
    assert labels.table()["starred"].tolist() == [True]


def test_a_version_that_was_read_without_opening_the_database_still_follows_another_writer(tmp_path):
    path = tmp_path / "workspace.db"
    labels, other = FeatureLabels(SAE, path), FeatureLabels(SAE, path)
    for edit in range(1, 4):
        other.set(3, text=f"edit {edit}")
        assert labels.version == edit
        for file in tmp_path.iterdir():
            os.utime(file, (1, edit))
        assert [labels.version for _ in range(3)] == [edit] * 3
    assert labels.table()["label"].tolist() == ["edit 3"]


def test_two_saes_in_one_database_know_nothing_of_each_other(tmp_path):
    one, other = (FeatureLabels(sae, tmp_path / "workspace.db") for sae in (SAE, "cd" * 32))
    one.set(3, text="mine")
    one.add_to_list(3, "list")
    assert other.get(3) == Label()
    assert other.lists() == {}
    assert other.version == 0


def test_what_is_too_long_or_no_text_is_refused_with_its_length(labels):
    with pytest.raises(InvalidInputError, match=r"label has 2,001 characters; at most 2,000"):
        labels.set(3, text="x" * (MAX_LABEL + 1))
    with pytest.raises(InvalidInputError, match=r"note has 20,001 characters; at most 20,000"):
        labels.set(3, text="kept out too", notes="x" * (MAX_NOTES + 1))
    with pytest.raises(InvalidInputError, match=r"list's name has 101 characters"):
        labels.add_to_list(3, "x" * (MAX_LIST_NAME + 1))
    with pytest.raises(InvalidInputError, match="needs a name"):
        labels.add_to_list(3, "  ")
    with pytest.raises(InvalidInputError, match="surrogate"):
        labels.set(3, text="\ud800")
    assert labels.table().empty


@pytest.mark.parametrize("feature", [-1, 40, 10**6])
def test_a_feature_that_does_not_exist_is_refused(labels, feature):
    for attempt in (labels.get, lambda f: labels.set(f, text="x"), lambda f: labels.add_to_list(f, "x")):
        with pytest.raises(OutOfRangeError, match=r"from 0 to 39"):
            attempt(feature)


def test_an_import_is_taken_in_whole_or_not_at_all(labels):
    with pytest.raises(OutOfRangeError):
        labels.take_in([ImportedLabel(1, "good", "np", "1"), ImportedLabel(40, "no such", "np", "2")])
    with pytest.raises(InvalidInputError, match="says where it is from"):
        labels.take_in([ImportedLabel(1, "good", "own", "1")])
    assert labels.table().empty


WRITER = """
import sys
from scope.features.labels import FeatureLabels
labels = FeatureLabels("ab" * 32, sys.argv[1])
offset = int(sys.argv[2])
for feature in range(offset, offset + 40):
    labels.set(feature, text=f"label {feature}", starred=feature % 2 == 0)
    labels.add_to_list(feature, "all")
    labels.set(1000, notes=labels.get(1000).notes)
"""


def test_processes_and_threads_write_at_once_and_nothing_is_lost(tmp_path):
    path = tmp_path / "workspace.db"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(offset)], stderr=subprocess.PIPE, text=True)
        for offset in (0, 40)
    ]
    labels = FeatureLabels(SAE, path)
    threads = [threading.Thread(target=labels.set, args=(feature, f"label {feature}")) for feature in range(80, 120)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        _, errors = writer.communicate(timeout=600)
        assert writer.returncode == 0, errors
    table = labels.table().set_index("feature")
    assert table["label"].to_dict() == {feature: f"label {feature}" for feature in range(120)}
    assert sorted(labels.lists()["all"]) == list(range(80))
    assert labels.version == 80 * 3 + 40
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_database_of_a_newer_release_is_refused(tmp_path):
    path = tmp_path / "workspace.db"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=99")
    with pytest.raises(InvalidInputError, match="Upgrade scope-workbench"):
        FeatureLabels(SAE, path).get(0)


def test_a_workspaces_index_has_its_labels_and_another_index_of_the_sae_shares_them(tmp_path):
    workspace = Workspace(tmp_path / "w")
    built, _, sae = tiny_index(tmp_path)
    built.labels.set(3, text="in memory")
    workspace.add(built.path)
    index = workspace.index(built.id)
    assert index.labels.get(3) == Label()
    index.labels.set(3, text="kept", starred=True)
    assert workspace.index("tiny").labels.get(3).text == "kept"
    assert (
        workspace.labels(sae.fingerprint[:12]).get(3)
        == workspace.labels(built.id).get(3)
        == Label("kept", "own", "", True)
    )
    assert Workspace(tmp_path / "w").indexes()[0].id == built.id  # the folder's other table is still there
    with pytest.raises(OutOfRangeError):
        index.labels.get(index.d_sae)
    pd.testing.assert_frame_equal(index.labels.table(), workspace.labels("tiny").table())
