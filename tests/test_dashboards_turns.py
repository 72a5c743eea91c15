"""Requests take turns: no more at a time than there are turns, and none holds one while it waits for the model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dashboards.turns import Turns, in_turn
from dashboards.worker import ModelWorker

LONG = 120.0


def test_no_more_than_there_are_turns_at_a_time() -> None:
    turns, inside, most = Turns(2), 0, 0
    lock, both = threading.Lock(), threading.Barrier(2)

    def one(_: int) -> None:
        nonlocal inside, most
        with turns.taken():
            with lock:
                inside += 1
                most = max(most, inside)
            both.wait(LONG)  # each stays until there is another one
            with lock:
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(40)))
    assert most == 2


def test_a_turn_is_given_back_after_an_error() -> None:
    turns = Turns(1)
    for _ in range(3):
        with pytest.raises(ValueError, match="drawn"), turns.taken():
            raise ValueError("drawn badly")


def test_who_waits_lets_others_draw_and_goes_on_in_turn() -> None:
    turns = Turns(1)
    waiting, drawn = threading.Event(), threading.Event()

    def slow() -> bool:
        with turns.taken():
            with turns.left():
                waiting.set()
                met = drawn.wait(LONG)
            with turns.left():  # has one again, so it can be left again
                pass
            return met

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(slow)
        assert waiting.wait(LONG)
        with turns.taken():
            drawn.set()
        assert answer.result(LONG)
    with turns.left():  # this thread has none
        pass


def test_a_page_is_drawn_while_another_waits_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(1)
    monkeypatch.setattr("dashboards.turns.TURNS", turns)
    monkeypatch.setattr("dashboards.worker.TURNS", turns)
    worker, gate = ModelWorker(), threading.Event()
    job = worker.submit(("slow", "one"), lambda _: gate.wait(LONG))

    def application(environ, start_response):
        if environ["QUERY_STRING"] == "waits":
            worker.wait(job, LONG)
        return [environ["QUERY_STRING"].encode()]

    served = in_turn(application)

    def ask(query: str) -> list[bytes]:
        return list(served({"PATH_INFO": "/_dash-update-component", "QUERY_STRING": query}, None))

    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(ask, "waits")
        assert pool.submit(ask, "draws").result(LONG) == [b"draws"]
        assert not waits.done()
        gate.set()
        assert waits.result(LONG) == [b"waits"]
