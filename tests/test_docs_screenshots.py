"""The script that takes the screenshots knows every page."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import helpers_dashboards as fakes
import pytest
from helpers_runs import trained_workspace

from dashboards.app import PAGES
from dashboards.links import parse
from scope.workspace import Workspace


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[1] / "docs" / "screenshots.py"
    spec = importlib.util.spec_from_file_location("screenshots", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "screenshots", module)
    spec.loader.exec_module(module)
    return module


def test_each_page_has_a_screenshot(script: ModuleType, tmp_path: Path) -> None:
    shots = [
        *script.views(fakes.FakeWorkspace(fakes.FakeIndex(repeats=2))),
        *script.views(Workspace(trained_workspace(tmp_path / "workspace"))),
    ]
    assert {shot.page for shot in shots} == set(PAGES)
    for shot in shots:
        path, _, search = shot.address.partition("?")
        assert parse(path, search).page == shot.page


def test_an_empty_workspace_has_its_own_page(script: ModuleType, tmp_path: Path) -> None:
    assert [shot.name for shot in script.views(Workspace(tmp_path))] == ["workspace", "circuit", "training"]
