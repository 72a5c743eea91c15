"""The dashboard's server without a browser: who is let in, what every answer carries, what a request may name."""

import json
import socket
import subprocess
import sys
from typing import Any

import helpers_dashboards as fakes
import pytest

from dashboards import serve
from dashboards.app import create_app
from scope.errors import InvalidInputError


@pytest.fixture(scope="module")
def index() -> fakes.FakeIndex:
    return fakes.FakeIndex(repeats=2)


@pytest.fixture
def client(index: fakes.FakeIndex) -> Any:
    return create_app(fakes.FakeWorkspace(index)).server.test_client()  # type: ignore[arg-type]


def get(client: Any, path: str, host: str = "127.0.0.1:8050", **headers: str) -> Any:
    return client.get(path, headers={"Host": host, **headers})


def draw(client: Any, path: str, search: str = "", origin: str | None = None) -> Any:
    """What the router's callback answers for an address."""
    outputs = ["content.children", "header.children", "about.data"]
    parts = [name.split(".") for name in outputs]
    body = {
        "output": ".." + "...".join(outputs) + "..",
        "outputs": [{"id": id, "property": name} for id, name in parts],
        "inputs": [{"id": "view", "property": "data", "value": {"path": path, "search": search, "visit": 1}}],
        "state": [{"id": "about", "property": "data", "value": None}],
        "changedPropIds": ["view.data"],
    }
    headers = {"Host": "127.0.0.1:8050", **({"Origin": origin} if origin else {})}
    return client.post("/_dash-update-component", json=body, headers=headers)


@pytest.mark.parametrize(
    "path", ["/", "/features", "/palette.css", "/assets/10_base.css", "/_dash-layout", "/api/token"]
)
def test_every_answer_carries_the_headers(client: Any, path: str) -> None:
    headers = get(client, path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8050", "127.0.0.1.evil.example"])
def test_foreign_host_is_refused(client: Any, host: str) -> None:
    assert get(client, "/", host=host).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost:9000"])
def test_our_own_hosts_are_served(client: Any, host: str) -> None:
    assert get(client, "/", host=host).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:9999", "null"])
def test_foreign_origin_is_refused(client: Any, origin: str) -> None:
    assert draw(client, "/", origin=origin).status_code == 403


def test_own_origin_is_served(client: Any) -> None:
    assert draw(client, "/", origin="http://127.0.0.1:8050").status_code == 200


@pytest.mark.parametrize(
    ("path", "search", "expected"),
    [
        ("/", "", "readable"),
        ("/features", "", "features-grid"),
        ("/feature/2", "", "Feature "),
        ("/feature/7", "", "never fires"),
        ("/feature/96", "", "numbered 0 to 95"),
        ("/feature/-1", "", "numbered 0 to 95"),
        ("/feature/٣", "", "numbered 0 to 95"),
        ("/feature/2", "?index=../../etc", "There is no feature-index"),
        ("/features", "?index=nothing", "There is no feature-index"),
        ("/prompt", "", "prompt-text"),
        ("/nowhere", "", "There is no page"),
        ("/feature/2", "?index=", "Feature "),
        ("/feature/2", "?feature=5&index=&path=x", "Feature "),
        ("/features", "?index=&index=", "features-grid"),
        ("/prompt", "?index=&text=", "prompt-text"),
        ("/lens", "?index=", "lens-request"),
        ("/feature/2", "?in=show%3Ddead", "no longer on it"),
        ("/feature/2", "?in=list%3Dgone%26index%3D..", "no longer on it"),
        ("/feature/2", "?in=sort%3Ddensity%3Adesc", "of 96"),
        ("/feature/2", "?document=3", "Show all documents"),
        ("/feature/2", "?document=99999", "There is no document"),
        ("/feature/2", "?document=-1&n=-3&low=nan&high=x&seed=1e9", "example"),
        ("/feature/2", "?in=" + "%25" * 2000, "Feature "),
        ("/compare", "?a=&b=%00", "There is no SAE"),
        ("/training/" + "x" * 500, "", "There is no training"),
    ],
)
def test_every_address_is_answered_with_a_page(client: Any, path: str, search: str, expected: str) -> None:
    answer = draw(client, path, search)
    assert answer.status_code == 200
    assert expected in json.dumps(answer.json["response"]["content"], ensure_ascii=False)


def test_an_unexpected_failure_becomes_a_panel(
    client: Any, index: fakes.FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "histogram", lambda feature: 1 / 0)
    content = json.dumps(draw(client, "/feature/2").json["response"]["content"])
    assert "could not be shown" in content
    assert "ZeroDivisionError" in content


def test_token_detail(client: Any, index: fakes.FakeIndex) -> None:
    row = int(index.firings(2, 0, 1)["row"].iloc[0])
    answer = get(client, f"/api/token?index={index.id}&row={row}&feature=2")
    assert answer.status_code == 200
    assert answer.json["n_features"] == len(index.features_at(row))
    assert 2 in [one["feature"] for one in answer.json["features"]]


@pytest.mark.parametrize("query", ["", "row=1", "index=../x&row=1", "index={id}&row=-1", "index={id}&row=1e3"])
def test_token_detail_refuses_what_does_not_exist(client: Any, index: fakes.FakeIndex, query: str) -> None:
    answer = get(client, "/api/token?" + query.format(id=index.id))
    assert answer.status_code == 400
    assert answer.json["error"]


def test_palette_has_both_themes(client: Any) -> None:
    text = get(client, "/palette.css").text
    assert text.count("--scope-accent:") == 2


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInputError, match=f"127.0.0.1:{port}"):
            serve("nowhere", port=port)


def test_importing_the_dashboard_leaves_torch_alone() -> None:
    code = "import sys, dashboards.app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_what_asks_again_waits_for_the_answer(client: Any) -> None:
    """Dash drops the answer to a request that another has followed: a slow server would be asked in vain."""
    asking = [
        spec
        for spec in get(client, "/_dash-dependencies").json
        if any(one["property"] == "n_intervals" for one in spec["inputs"])
    ]
    assert len(asking) > 5
    for spec in asking:
        (poll,) = (one["id"] for one in spec["inputs"] if one["property"] == "n_intervals")
        assert f"{poll}.interval" in (spec.get("running") or {}).get("running", {}), spec["output"]
