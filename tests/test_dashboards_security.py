"""Who is let in, and what a request may name: hosts, origins, one-time links, ids, markup."""

import logging
import re
from typing import Any

import helpers_dashboards as fakes
import pytest

from dashboards.access import Access
from dashboards.app import create_app
from dashboards.security import hosts_of, is_loopback
from scope.errors import InvalidInputError

EVIL = "<img src=x onerror=alert(1)>"
HOST = "scope.example:8050"
PAGES = ["/", "/features", "/feature/2", "/assets/10_base.css", "/palette.css", "/_dash-layout", "/api/token", "/no"]


@pytest.fixture(scope="module")
def index() -> fakes.FakeIndex:
    return fakes.FakeIndex(repeats=1)


def guarded(index: fakes.FakeIndex, n_links: int = 1) -> tuple[Any, list[str]]:
    """A client of a dashboard that is served to other machines, and the tokens of its links."""
    access = Access(n_links)
    app = create_app(
        fakes.FakeWorkspace(index),  # type: ignore[arg-type]
        host="0.0.0.0",
        allow_hosts=["scope.example"],
        access=access,
    )
    links = access.links("scope.example", 8050)
    assert all(link.startswith(f"http://{HOST}/?token=") for link in links)
    return app.server.test_client(), [link.partition("token=")[2] for link in links]


def get(client: Any, path: str, **headers: str) -> Any:
    return client.get(path, headers={"Host": HOST, **headers})


def test_without_a_cookie_nothing_is_served_and_the_page_says_what_to_do(index: fakes.FakeIndex) -> None:
    client, _ = guarded(index)
    for path in PAGES:
        answer = get(client, path)
        assert answer.status_code == 401, path
        assert "scope serve" in answer.text
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert client.post("/_dash-update-component", json={}, headers={"Host": HOST}).status_code == 401


def test_a_link_lets_one_browser_in_once(index: fakes.FakeIndex) -> None:
    client, (token,) = guarded(index)
    other = client.application.test_client()
    answer = get(client, f"/feature/2?index=x&token={token}&n=4")
    assert answer.status_code == 303
    assert answer.headers["Location"] == "/feature/2?index=x&n=4"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert token not in cookie
    assert {get(client, path).status_code for path in PAGES} <= {200, 400, 404}
    assert get(other, f"/?token={token}").status_code == 401
    assert get(other, "/").status_code == 401
    assert get(client, f"/?token={token}").status_code == 303  # who is in already stays in, without the token


def test_each_of_several_links_works(index: fakes.FakeIndex) -> None:
    client, tokens = guarded(index, 3)
    browsers = [client.application.test_client() for _ in tokens]
    assert [get(one, f"/?token={token}").status_code for one, token in zip(browsers, tokens, strict=True)] == [303] * 3


@pytest.mark.parametrize("token", ["", "wrong", "é", "../..", "%00"])
def test_a_wrong_token_is_refused_and_spends_nothing(index: fakes.FakeIndex, token: str) -> None:
    client, (right,) = guarded(index)
    assert get(client, f"/?token={token}").status_code == 401
    assert client.post(f"/?token={right}", headers={"Host": HOST}).status_code == 401
    assert get(client, f"/?token={right}").status_code == 303


def test_a_wrong_cookie_is_refused(index: fakes.FakeIndex) -> None:
    client, (token,) = guarded(index)
    name = get(client, f"/?token={token}").headers["Set-Cookie"].partition("=")[0]
    other = client.application.test_client()
    assert get(other, "/", Cookie=f"{name}=guess").status_code == 401


def test_a_link_on_another_site_lets_in_too(index: fakes.FakeIndex) -> None:
    client, (token,) = guarded(index)
    answer = get(client, f"/features?token={token}", **{"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    assert 'content="0; url=/features"' in answer.text
    assert token not in answer.text
    assert get(client, "/features").status_code == 200


def test_no_redirect_leaves_the_dashboard(index: fakes.FakeIndex) -> None:
    client, (token,) = guarded(index)
    answer = client.get(f"/?token={token}", headers={"Host": HOST}, environ_overrides={"PATH_INFO": "//evil.example/x"})
    assert answer.headers["Location"] == "/evil.example/x"


def test_tokens_are_not_logged(index: fakes.FakeIndex, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client, (token,) = guarded(index)
    get(client, "/?token=wrong-one")
    get(client, f"/?token={token}")
    assert token not in caplog.text
    assert "wrong-one" not in caplog.text


def test_a_foreign_host_is_refused_before_its_token_is_looked_at(index: fakes.FakeIndex) -> None:
    client, (token,) = guarded(index)
    assert client.get(f"/?token={token}", headers={"Host": "evil.example"}).status_code == 400
    assert get(client, f"/?token={token}").status_code == 303


@pytest.mark.parametrize("method", ["get", "post"])
def test_a_foreign_origin_is_refused_even_with_the_cookie(index: fakes.FakeIndex, method: str) -> None:
    client, (token,) = guarded(index)
    get(client, f"/?token={token}")
    ask = getattr(client, method)
    path = "/_dash-layout" if method == "get" else "/_dash-update-component"
    assert ask(path, headers={"Host": HOST, "Origin": "http://evil.example"}).status_code == 403


def test_names_that_a_dashboard_may_be_called_by() -> None:
    assert hosts_of("0.0.0.0", ["scope.example"])[0] == "scope.example"
    assert "127.0.0.1" in hosts_of("0.0.0.0")
    assert hosts_of("::1")[0] == "[::1]"
    assert "0.0.0.0" not in hosts_of("0.0.0.0")
    for bad in ("http://scope.example", "scope.example:80", ".example", "", "a b"):
        with pytest.raises(InvalidInputError, match="not the name of a host"):
            hosts_of("0.0.0.0", [bad])


@pytest.mark.parametrize(
    ("host", "mine"), [("127.0.0.1", True), ("127.0.0.2", True), ("localhost", True), ("::1", True), ("0.0.0.0", False),
                       ("::", False), ("", False), ("192.168.1.2", False), ("127.0.0.1.evil.example", False)],
)  # fmt: skip
def test_only_loopback_goes_without_a_link(host: str, mine: bool) -> None:
    assert is_loopback(host) is mine


@pytest.fixture(scope="module")
def local(index: fakes.FakeIndex) -> fakes.LocalClient:
    return fakes.LocalClient(create_app(fakes.FakeWorkspace(index)))  # type: ignore[arg-type]


@pytest.mark.parametrize("id", ["../..", "/etc/passwd", "..%2F..", "hf://a/b", "C:\\", "\x00", "%2e%2e/"])
@pytest.mark.parametrize(
    ("path", "search"),
    [
        ("/features", "?index={}"),
        ("/feature/2", "?index={}"),
        ("/feature/{}", ""),
        ("/prompt", "?index={}"),
        ("/training/{}", ""),
        ("/training", "?runs={}"),
        ("/compare", "?a={}&b={}"),
        ("/{}", ""),
    ],
)
def test_ids_are_looked_up_and_never_opened(local: fakes.LocalClient, id: str, path: str, search: str) -> None:
    content = local.content(path.format(id), search.format(id, id))
    assert re.search(r"There is no|is no longer|numbered 0 to", content), content[:500]
    assert "root:" not in content


def test_assets_are_served_from_their_folder_alone(local: fakes.LocalClient) -> None:
    for path in ("/assets/../app.py", "/assets/%2e%2e/app.py", "/assets/..%2fapp.py", "/_dash-component-suites/../x"):
        assert b"create_app" not in local.get(path)


def test_markup_stays_text_in_every_page(index: fakes.FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from data or from the address is a child of a component, never raw HTML."""
    table = index.table.copy()
    table["label"] = EVIL
    monkeypatch.setitem(index.__dict__, "table", table)
    monkeypatch.setattr(index, "name", EVIL)
    local = fakes.LocalClient(create_app(fakes.FakeWorkspace(index)))  # type: ignore[arg-type]
    from urllib.parse import quote

    for path, search in (("/", ""), ("/feature/2", ""), ("/features", f"?q={quote(EVIL)}"), (f"/{quote(EVIL)}", "")):
        content = local.content(path, search)
        assert "dangerously" not in content
        assert '"type": "Markdown"' not in content
        assert '"srcDoc"' not in content
