"""Conversations on the prompt page: roles, calls and tools, over an index of chats in memory."""

import json
import time
from collections.abc import Callable
from urllib.parse import parse_qs, quote, urlsplit

import helpers_chats
import helpers_dashboards as fakes
import pytest
from helpers_browser import query, serious

pytestmark = pytest.mark.browser

GRID = "#prompt-heatmap table"
CHAT = helpers_chats.weather_chat()
CONVERSATION = {"messages": [message.as_dict for message in CHAT.messages[:4]], "tools": list(CHAT.tools[1:])}


@pytest.fixture(scope="module")
def chats(serve: Callable, fake_model: None):
    """A dashboard over an index of chats."""
    return serve(fakes.FakeWorkspace(fakes.FakeIndex("chats", 2, helpers_chats.BLOCKS)))


def asked(page) -> dict:
    return json.loads(parse_qs(urlsplit(page.url).query)["chat"][0])


def card_says(page, spot, words: str) -> None:
    """Point at something until its card says so: a strip that is drawn anew lets go of what was pointed at."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        page.mouse.move(2, 2)
        spot.hover()
        page.wait_for_timeout(300)
        if words in (page.text_content("#tip") or ""):
            return
    raise AssertionError(f"the card never said {words!r}: {page.text_content('#tip')!r}")


def test_a_conversation_is_pasted_run_and_changed(visit: Callable, chats) -> None:
    opened = visit(server=chats)
    page = opened.open("/prompt", "[data-sample]")
    page.click("[data-mode=chat]")
    page.click("[data-chat-open=paste]")
    page.fill(".chat-paste textarea", "no JSON")
    page.click("[data-use-pasted]")
    assert "no conversation" in page.text_content(".chat-problem")
    page.fill(".chat-paste textarea", json.dumps(CONVERSATION))
    page.click("[data-use-pasted]")
    assert page.locator(".prompt-editor[data-suffix=''] .turn-line").count() == 4
    assert [page.input_value(f".turn-role >> nth={n}") for n in range(4)] == ["system", "user", "assistant", "tool"]
    page.click("[data-run]")
    page.wait_for_selector(GRID)
    assert asked(page) == CONVERSATION
    turns = page.locator("#prompt-strip .turn").all_text_contents()
    assert turns == ["system", "definition of a tool", "user", "assistant · call", "tool"]
    card_says(page, page.locator("#prompt-strip .turn[data-role=tool] + .tok").first, "tool")
    assert page.locator("#prompt-heatmap th[data-role=markup], #prompt-heatmap th[data-role=system]").count() > 0
    # A call is written by hand; what is no JSON is said where it stands, and not run.
    page.click(".turn-line[data-role=assistant] .turn-calls")
    page.fill(".turn-calls:visible", '{"name": "sundial"')
    page.click("[data-run]")
    page.wait_for_selector(".turn-calls[aria-invalid=true]")
    assert "The calls of turn 3 cannot be read as JSON" in page.text_content(".chat-problem")
    page.fill(".turn-calls:visible", '{"name": "sundial"}')
    page.click("[data-run]")
    opened.until("new URL(location).searchParams.get('chat').includes('sundial')")
    page.wait_for_selector("#prompt-strip:has-text('sundial')")
    assert asked(page)["messages"][2]["tool_calls"] == [{"name": "sundial"}]
    page.reload()
    page.wait_for_selector(GRID)
    assert page.input_value(".turn-calls:visible") == '[{"name": "sundial"}]'
    assert json.loads(page.input_value(".chat-tools textarea")) == CONVERSATION["tools"]
    opened.check()


def test_the_lens_says_whose_tokens_they_are(visit: Callable, chats) -> None:
    opened = visit(server=chats)
    page = opened.open("/lens?token=3&chat=" + quote(json.dumps(CONVERSATION)), "#lens-grid table")
    roles = page.locator("#lens-grid th[data-role]").evaluate_all("all => all.map((one) => one.dataset.role)")
    assert {"system", "user"} & set(roles)
    assert page.locator("#lens-grid th[data-role=system]").first.get_attribute("title") == "system"
    assert "layer 5, " in page.text_content(".lens-result aside .unit")
    opened.open("/lens?text=plain+words", "#lens-grid table:has-text('plain')")
    assert page.locator("#lens-grid th[data-role]").count() == 0
    opened.check()


def test_rates_by_role_lead_to_what_fires_there(visit: Callable, chats) -> None:
    opened = visit(server=chats)
    page = opened.open("/feature/5", ".panel:has-text('By kind of content')")
    panel = page.locator(".panel:has(h2:has-text('By role'))")
    assert sorted(panel.locator(".bars .name").all_text_contents()) == ["assistant", "system", "tool", "user"]
    assert "a=role%3A" in panel.locator("a.name").first.get_attribute("href")
    opened.check()


def test_examples_and_features_of_a_role(visit: Callable, chats) -> None:
    opened = visit(server=chats)
    page = opened.open("/feature/0", "#examples .strip")
    page.fill("#examples-role", "assistant")
    page.click("[role=option]:has-text('assistant')")
    opened.until("new URL(location).searchParams.get('role') === 'assistant'")
    page.wait_for_selector("#examples .strip")
    opened.open("/feature/0?role=assistant&content=tool_call", "#examples .strip")
    assert page.input_value("#examples-content") == "tool_call"
    card_says(page, page.locator("#examples .strip .tok.centre").first, "assistant · call")
    opened.open("/feature/0?role=assistant&content=text", "#examples .state")
    assert "assistant and text" in page.text_content("#examples")
    page.click("a[aria-label='Next feature']")  # it shows the same part of the text
    page.wait_for_selector("h1:has-text('Feature 1')")
    assert {"role": "assistant", "content": "text"}.items() <= query(page).items()
    with page.expect_request(lambda request: "/api/kept" in request.url and "role=tool" in request.url):  # of the plot
        opened.open("/features?role=tool&cols=density,top_role,top_kind", ".ag-row")
    opened.until("document.querySelector('#features-count').textContent.includes(' of ')")
    assert set(page.locator(".ag-cell[col-id=top_role]").all_text_contents()) == {"tool"}
    page.fill("#features-content", "text")
    page.click("[role=option]:has-text('text')")
    opened.until("new URL(location).searchParams.get('content') === 'text'")
    opened.check()


def test_plain_text_offers_no_roles(visit: Callable) -> None:
    opened = visit()
    page = opened.open("/features", ".ag-row")
    assert not page.locator("#features-role").is_visible()
    assert "role" not in page.url
    page = opened.open("/feature/5", "#examples .strip")
    assert not page.locator("#examples-role").is_visible()
    opened.check()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_not_wider_than_a_phone(visit: Callable, chats, theme: str) -> None:
    opened = visit(width=390, theme=theme, server=chats)
    address = "/prompt?token=3&chat=" + quote(json.dumps(CONVERSATION))
    if theme == "light":
        page = opened.open(address, GRID)
    else:
        other = {**CONVERSATION, "messages": CONVERSATION["messages"][:2]}
        page = opened.open(f"{address}&chat2={quote(json.dumps(other))}", ".next-rows .next-row")
        assert page.locator("#prompt-strip-a .turn").all_text_contents()[-1] == "tool"
        assert page.locator("#prompt-strip-b .turn").all_text_contents()[-1] == "user"
        assert json.loads(page.input_value("[data-suffix='2'] .chat-tools textarea")) == CONVERSATION["tools"]
    page.click("[data-chat-open=paste]")
    page.wait_for_timeout(150)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious(page) == []
    opened.check()
