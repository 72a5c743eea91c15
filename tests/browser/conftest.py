"""Chromium through Playwright, and dashboards served in threads of this process.

Chromium is the one of `CHROMIUM=` or Debian's. Where there is none these tests are skipped; with `CI` set they fail.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers_dashboards as fakes

TIMEOUT = 60_000
"""Milliseconds."""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Server:
    """A dashboard in a thread, at a free port."""

    def __init__(self, workspace: Any) -> None:
        import waitress

        from dashboards.app import create_app
        from dashboards.notebook import Dashboard

        server = waitress.create_server(create_app(workspace).server, host="127.0.0.1", port=0, threads=8, ident=None)
        self.url = f"http://127.0.0.1:{server.effective_port}"
        self._dashboard = Dashboard(server, [self.url])

    def close(self) -> None:
        self._dashboard.stop()


class Visit:
    """A browser page, and everything that should not have happened on it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", self._dialog)
        page.on("request", self._request)

    def _dialog(self, dialog: Any) -> None:
        self.errors.append(f"a dialog opened: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url + "/", "data:", "blob:")):
            self.outside.append(request.url)

    def open(self, path: str, wait_for: str = "#content > *") -> Any:
        """Go to an address of the dashboard and wait until `wait_for` is there; as a link does it where the tab
        already shows the dashboard, which is much faster than loading it anew."""
        if self.page.url.startswith(self.url):
            self.page.evaluate("path => window.scope.go(path)", path)
            self.until("!document.body.classList.contains('navigating')")
        else:
            self.page.goto(self.url + path)
        self.page.wait_for_selector(wait_for)
        return self.page

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression holds (the page's own policy forbids Playwright's wait_for_function). One
        that fails asks for what is not there yet, or of a page that is being left."""
        from playwright.sync_api import Error

        deadline = time.monotonic() + TIMEOUT / 1000
        while True:
            try:
                found = self.page.evaluate(expression)
            except Error as problem:
                found, said = False, f": {problem}"
            else:
                said = ""
            if found:
                return
            assert time.monotonic() < deadline, f"never true: {expression}{said}"
            self.page.wait_for_timeout(30)

    def check(self) -> None:
        """Nothing left the machine, nothing failed, nothing opened."""
        assert self.outside == []
        assert self.errors == []


def find_chromium() -> str | None:
    """The browser to drive."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    executable = find_chromium()
    if executable is None:
        message = "There is no Chromium: install Debian's chromium, or give one with CHROMIUM=."
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=FLAGS, timeout=3 * TIMEOUT)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Any], Server]]:
    """Serves workspaces until the session ends."""
    servers: list[Server] = []

    def start(workspace: Any) -> Server:
        servers.append(Server(workspace))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def fake_model() -> Iterator[None]:
    """A `FakeIndex` gets a `FakeModel`, and the fakes answer what is asked about either; all else is as always."""
    import dashboards.prompts as prompts
    import scope.attribution.direct as direct
    import scope.attribution.lens as lens
    import scope.attribution.methods as methods
    import scope.features.ablation as ablation
    import scope.features.prompt as prompt
    import scope.interventions.resolving as resolving
    import scope.interventions.steering as steering
    import scope.models.losses as losses

    fake_answers = [
        (prompts, "_load_model", fakes.FakeModel),
        (prompt, "features_on_prompt", fakes.fake_features_on_prompt),
        (direct, "direct_logit_effects", fakes.fake_direct_logit_effects),
        (lens, "logit_lens", fakes.fake_logit_lens),
        (losses, "residual_logits", lambda model, residual: model.residual_logits(residual)),
        (methods, "attribute", fakes.fake_attribute),
        (ablation, "ablation_effect", fakes.fake_ablation_effect),
        (resolving, "resolve", lambda spec, model, *rest: fakes.fake_resolve(spec, model).edits),
        (resolving, "control", fakes.fake_resolve),
        (steering, "steer_with", fakes.fake_steer_with),
    ]

    def either(fake: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*of: Any, **more: Any) -> Any:
            about_a_fake = any(isinstance(one, fakes.FakeModel | fakes.FakeIndex) for one in of[:2])
            return (fake if about_a_fake else real)(*of, **more)

        return answer

    with pytest.MonkeyPatch.context() as patch:
        for module, name, fake in fake_answers:
            patch.setattr(module, name, either(fake, getattr(module, name)))
        yield


@pytest.fixture(scope="session")
def fake_dashboard(serve: Callable[[Any], Server], fake_model: None) -> Server:
    """A dashboard over the index in memory; a prompt with "wait" in it keeps the model busy until `GATE` opens."""
    return serve(fakes.FakeWorkspace(fakes.FakeIndex()))


@pytest.fixture(scope="session")
def contexts(browser: Any) -> Iterator[dict[tuple[int, str], Any]]:
    """One browser context per width and theme, so that scripts are fetched and compiled once."""
    made: dict[tuple[int, str], Any] = {}
    yield made
    for context in made.values():
        context.close()


@pytest.fixture
def visit(browser: Any, contexts: dict[tuple[int, str], Any], fake_dashboard: Server) -> Iterator[Callable[..., Visit]]:
    """Opens a tab: `visit(width=390, theme="dark", server=…)`; what it remembers is forgotten afterwards."""
    pages = []

    def start(width: int = 1440, theme: str = "light", server: Server | None = None) -> Visit:
        if (width, theme) not in contexts:
            contexts[width, theme] = browser.new_context(
                viewport={"width": width, "height": 900 if width > 500 else 844},
                color_scheme=theme,
                permissions=["clipboard-read", "clipboard-write"],
            )
            contexts[width, theme].set_default_timeout(TIMEOUT)
        pages.append(contexts[width, theme].new_page())
        return Visit(pages[-1], (server or fake_dashboard).url)

    yield start
    fakes.GATE.set()  # no job of a test that has failed keeps the worker from the next one
    for page in pages:
        if page.url.startswith("http"):
            page.evaluate("localStorage.clear()")
        page.close()
