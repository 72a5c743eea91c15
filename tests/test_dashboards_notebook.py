"""`dashboards.serve` in a notebook returns at once with a handle; elsewhere it serves until interrupted."""

import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from helpers_features import tiny_index

import dashboards
from dashboards.notebook import in_notebook
from scope.errors import InvalidInputError
from scope.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    built, _, _ = tiny_index(folder)
    opened = Workspace(folder / "w")
    opened.add(built.path)
    return opened


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=True)))


def fetch(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.status, answer.read().decode()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_handle_serves_until_it_is_stopped_and_frees_the_port(workspace, kernel, host):
    handle = dashboards.serve(workspace, host, 0)
    assert handle.running
    assert fetch(handle.url)[0] == 200
    assert f'href="{handle.url}"' in handle._repr_html_()
    port = int(handle.url.rsplit(":", 1)[1])
    handle.stop()
    handle.stop()
    assert not handle.running
    assert "stopped" in handle._repr_html_()
    with pytest.raises(urllib.error.URLError):
        fetch(handle.url)
    with dashboards.serve(workspace, host, port) as again:
        assert fetch(again.url)[0] == 200


def test_two_cells_get_two_ports_and_a_port_that_was_asked_for_is_not_swapped(workspace, kernel):
    with dashboards.serve(str(workspace.path)) as first, dashboards.serve(workspace) as second:
        assert first.url != second.url
        with pytest.raises(InvalidInputError, match="cannot be served"):
            dashboards.serve(workspace, port=int(first.url.rsplit(":", 1)[1]))


def test_outside_a_notebook_it_blocks_unless_told(workspace, monkeypatch):
    assert not in_notebook()
    served = []
    monkeypatch.setattr("dashboards.app.serve", lambda *arguments, **settings: served.append(arguments))
    assert dashboards.serve(workspace) is None
    assert served == [(workspace, "127.0.0.1", 8050)]
    with dashboards.serve(workspace, port=0, block=False) as handle:
        assert handle.running
