"""Dropping hooks: what is left is the store that never had them, and a crash on the way leaves one that opens."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_activations import ALIASES, FakeModel, expected_rows, tree, write_text

from activations.capture import capture
from activations.errors import InvalidInputError, LockedError, UnknownNameError
from activations.ledger import WriterLock
from activations.source import float32_to_bf16
from activations.store import ActivationStore
from activations.text import TextSource

RESID, Z, OTHER = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.hook_resid_post"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    return TextSource(write_text(tmp_path / "text.jsonl", n_documents=10))


def run(text: TextSource | None, out: Path, hooks: Any = (RESID, Z)) -> ActivationStore:
    return capture(FakeModel(), text, hooks, out, context_size=16, rows_per_group=32, batch_size=64).store


def check(store: ActivationStore) -> None:
    assert store.verify() == []
    for hook in store.hooks:
        expected = float32_to_bf16(expected_rows(FakeModel(), store, hook))
        np.testing.assert_array_equal(store.read(hook, 0, store.n_rows), expected)


def test_dropped_hooks_leave_no_trace(text: TextSource, tmp_path: Path) -> None:
    run(text, tmp_path / "never.zarr", [RESID])
    run(text, tmp_path / "s.zarr", [RESID])
    store = run(None, tmp_path / "s.zarr", [Z, OTHER])
    bytes_before = store.info()["bytes"]
    assert store.drop_hooks([Z]) == (Z,)
    assert store.hooks == (OTHER, RESID)
    check(store)
    assert store.info()["bytes"] < bytes_before
    with pytest.raises(UnknownNameError, match="no hook"):
        store.read(Z, 0, 1)
    store.drop_hooks(OTHER)
    assert tree(store.path) == tree(tmp_path / "never.zarr")


def test_a_dropped_hook_can_be_captured_again_and_text_appended(text: TextSource, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    store = run(text, out)
    fingerprint = store.fingerprint
    store.drop_hooks(Z)
    check(run(None, out, [Z]))
    ActivationStore.open(out).drop_hooks([RESID])
    more = TextSource(write_text(tmp_path / "more.jsonl", n_documents=4, seed=5))
    store = capture(FakeModel(), more, [], out, append=True, batch_size=64).store
    assert store.hooks == (Z,)
    check(store)
    store = run(None, out)
    assert store.hooks == (Z, RESID)
    assert store.fingerprint == fingerprint
    check(store)


def test_what_cannot_be_dropped(text: TextSource, tmp_path: Path) -> None:
    (alias, hook), *_ = ALIASES.items()
    store = run(text, tmp_path / "s.zarr", [alias, Z])
    before = tree(store.path)
    with pytest.raises(UnknownNameError, match=f"Did you mean {Z}"):
        store.drop_hooks(Z[:-1])
    with pytest.raises(InvalidInputError, match="one must stay"):
        store.drop_hooks([Z, alias])
    with pytest.raises(InvalidInputError, match="got none to drop"):
        store.drop_hooks([])
    assert tree(store.path) == before
    with WriterLock(store.path), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        store.drop_hooks(Z)
    assert tree(store.path) == before
    assert store.drop_hooks(alias) == (hook,)
    with pytest.raises(UnknownNameError):
        store.resolve_hook(alias)


class Crash(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("together", [True, False])
def test_a_crash_while_dropping(together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TextSource(write_text(tmp_path / "short.jsonl", n_documents=4))
    start = run(text, tmp_path / "start.zarr", [RESID, Z] if together else [RESID])
    start = start if together else run(None, start.path, [Z])
    shutil.copytree(start.path, tmp_path / "whole.zarr")
    ActivationStore.open(tmp_path / "whole.zarr").drop_hooks(Z)
    expected = tree(tmp_path / "whole.zarr")
    actions = {name: getattr(os, name) for name in ("replace", "unlink", "rmdir")}
    point, crashed, dropped = 1, True, set()
    while crashed:
        out, count = tmp_path / f"{point}.zarr", [0]
        shutil.copytree(start.path, out)

        def step(name: str, *arguments: Any, count: list[int] = count, point: int = point, **how: Any) -> Any:
            if str(arguments[0]).endswith("lock"):  # a process that is gone holds none
                return actions[name](*arguments, **how)
            count[0] += 1
            if count[0] >= point:
                raise Crash
            return actions[name](*arguments, **how)

        for name in actions:
            monkeypatch.setattr(os, name, lambda *a, name=name, step=step, **how: step(name, *a, **how))
        with contextlib.suppress(Crash):
            ActivationStore.open(out).drop_hooks(Z)
        for name, action in actions.items():
            monkeypatch.setattr(os, name, action)
        crashed = count[0] >= point
        store = ActivationStore.open(out)
        check(store)
        dropped.add(Z not in store.hooks)
        run(text, out, store.hooks)  # any writer clears what is left
        if Z not in store.hooks:
            assert tree(out) == expected
        point += 3
    assert dropped == {True, False}
