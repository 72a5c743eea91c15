"""Views that come while others are on their way: no click is lost, and the last one asked for is the one that stays."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.browser

LONG = 60.0


class SlowRouter:
    """Holds back the drawing of the addresses in `held` until `gate` opens."""

    def __init__(self, draw: Callable[[Any, Any], Any]) -> None:
        self.draw, self.held = draw, set[str]()
        self.gate, self.arrived, self.left = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, context: Any, view: Any) -> Any:
        if view.path not in self.held:
            return self.draw(context, view)
        self.arrived.set()
        self.gate.wait(LONG)
        page = self.draw(context, view)
        self.left.set()
        return page


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowRouter]:
    import dashboards.app as app

    slow = SlowRouter(app.draw)
    monkeypatch.setattr(app, "draw", slow)
    yield slow
    slow.gate.set()


def go(page: Any, address: str) -> None:
    page.evaluate("address => window.scope.go(address)", address)


def test_a_link_of_the_rail_can_be_pressed_while_a_view_arrives(visit: Callable, router: SlowRouter) -> None:
    opened = visit()
    page = opened.open("/feature/2", ".example")
    router.held.add("/features")
    go(page, "/features")
    assert router.arrived.wait(LONG)
    page.hover(".rail a[data-page=prompt]")
    page.mouse.down()
    router.gate.set()
    page.wait_for_selector(".features-grid .cell-spark", timeout=LONG * 1000)
    page.mouse.up()
    page.wait_for_selector("[data-sample]", timeout=LONG * 1000)
    opened.check()


def test_a_late_answer_does_not_replace_what_was_asked_for_after_it(visit: Callable, router: SlowRouter) -> None:
    opened = visit()
    page = opened.open("/feature/2", ".example")
    router.held.add("/features")
    go(page, "/features")  # without an index: its answer would rewrite the address
    assert router.arrived.wait(LONG)
    page.click(".rail a[data-page=prompt]")
    page.wait_for_selector("[data-sample]", timeout=LONG * 1000)
    router.gate.set()
    assert router.left.wait(LONG)
    opened.until("!document.body.classList.contains('navigating')")
    page.wait_for_timeout(500)  # nothing shall happen now
    assert "/prompt?" in page.url
    assert page.title().startswith("Prompt")
    assert page.is_visible("[data-sample]")
    assert page.get_attribute(".rail a[data-page=prompt]", "aria-current") == "page"
    opened.check()


def test_many_clicks_at_once_end_where_the_last_one_went(visit: Callable, router: SlowRouter) -> None:
    opened = visit()
    page = opened.open("/feature/2", ".example")
    for _ in range(3):
        for name in ("features", "prompt", "workspace", "features", "training", "prompt"):
            page.click(f".rail a[data-page={name}]")
    page.wait_for_selector("[data-sample]", timeout=LONG * 1000)
    page.go_back()
    page.go_back()
    page.click(".rail a[data-page=features]")
    page.wait_for_selector(".features-grid .cell-spark", timeout=LONG * 1000)
    opened.until("!document.body.classList.contains('navigating')")
    assert "/features" in page.url
    assert page.title().startswith("Features")
    opened.check()
