"""`scope bench dashboard`: how fast pages are answered while many people click and a model works.

1. A dashboard over one index is served by a process of its own, through waitress as `scope serve` does it. Its model
   worker is kept busy all the time with a job that multiplies matrices.
2. So many clients, each a thread with a connection of its own, ask for pages of the index in turn, all at once and
   without a pause: the feature browser and blocks of its rows, features drawn at random and their examples, what fires
   on a token.
3. What is timed is a request from its first byte to the last of its answer. Figures are percentiles a kind of page.
"""

import http.client
import json
import multiprocessing
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scope.errors import InvalidInputError, ScopeError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["KINDS", "Client", "bench_dashboard", "click", "click_together"]

BLOCK = 60
SORTS = ("density", "max_value", "mean_value")
SIDE = 512
"""Rows of the matrices that the model worker multiplies."""
KINDS = ("workspace", "features", "rows", "feature", "examples", "token")
"""What is asked for; the keys of the result are these with `_p95_ms`."""


class Client:
    """Asks one dashboard for what a browser would, through the callbacks that it names itself."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._connection = http.client.HTTPConnection(host, port, timeout=60)
        self._callbacks = json.loads(self.get("/_dash-dependencies"))

    def get(self, path: str) -> bytes:
        """The body at an address; anything but success raises."""
        return self._ask("GET", path)

    def view(self, path: str, search: str = "") -> dict[str, Any]:
        """What the router answers for an address."""
        view = {"path": path, "search": search, "visit": 1}
        answer = self.call("content.children", {"view.data": view}, "view.data")
        if '"role": "alert"' in json.dumps(answer):
            raise ScopeError(f"{path}{search} shows an error.")
        return answer

    def call(self, output: str, values: dict[str, Any], changed: str) -> dict[str, Any]:
        """What the callback with this output answers; inputs and states that are not given are null."""
        callback = next(one for one in self._callbacks if output in one["output"] and not one["clientside_function"])
        names = [name.split(".") for name in callback["output"].strip(".").split("...")]
        outputs = [{"id": id, "property": name.split("@")[0]} for id, name in names]

        def given(kind: str) -> list[dict[str, Any]]:
            return [{**one, "value": values.get(f"{one['id']}.{one['property']}")} for one in callback[kind]]

        body = {
            "output": callback["output"],
            "outputs": outputs if len(outputs) > 1 else outputs[0],
            "inputs": given("inputs"),
            "state": given("state"),
            "changedPropIds": [changed],
        }
        answer: dict[str, Any] = json.loads(self._ask("POST", "/_dash-update-component", json.dumps(body)))
        return answer

    def _ask(self, method: str, path: str, body: str | None = None) -> bytes:
        self._connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise ScopeError(f"{method} {path} was answered with {answer.status}.")
        return content


def click(client: Client, kind: str, index: str, n_features: int, n_rows: int, rng: random.Random) -> None:
    """One request of a kind; raises where the answer is an error."""
    feature = rng.randrange(n_features)
    if kind == "workspace":
        client.view("/")
    elif kind == "features":
        client.view("/features", f"?index={index}")
    elif kind == "feature":
        client.view(f"/feature/{feature}", f"?index={index}")
    elif kind == "token":
        client.get(f"/api/token?index={index}&row={rng.randrange(n_rows)}")
    elif kind == "rows":
        start = BLOCK * rng.randrange(max(1, n_features // BLOCK))
        sort = [{"colId": rng.choice(SORTS), "sort": "desc"}]
        asked = {"startRow": start, "endRow": start + BLOCK, "sortModel": sort, "context": {"index": index}}
        values = {"features-grid.getRowsRequest": asked, "features-show.value": "all"}
        answer = client.call("features-grid.getRowsResponse", values, "features-grid.getRowsRequest")
        if not answer["response"]["features-grid"]["getRowsResponse"]["rowData"]:
            raise ScopeError(f"No row of features {start} to {start + BLOCK} came.")
    elif kind == "examples":
        client.view(f"/feature/{feature}", f"?index={index}&show=quantiles&seed={rng.randrange(1000)}")
    else:
        raise InvalidInputError(f"{kind} is no kind of request; expected one of {', '.join(KINDS)}.")


def bench_dashboard(
    workspace: Path, index: str | None, clients: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Serve the workspace, click, and time the answers.

    Args:
        workspace: the folder.
        index: the index's id or name; None takes the first one.
        clients: people who click at once.
        seconds: how long.
        say: is told what happens.

    Returns:
        `<kind>_p95_ms` and `<kind>_p50_ms` for each of `KINDS`, requests, errors, requests_per_s.

    Raises:
        UnknownNameError: the workspace has no such index, or none.
    """
    from scope.workspace import Workspace

    opened = Workspace(workspace)
    entries = [opened.find(index, "feature-index")] if index else opened.indexes()
    if not entries:
        opened.find("any", "feature-index")  # raises, saying what there is
    about = opened.index(entries[0].id)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(workspace, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(120):
            raise ScopeError("The dashboard did not start within two minutes.")
        port = ours.recv()
        say(f"{clients} clients click for {seconds:g} s at {entries[0].name}, {about.d_sae:,} features")
        for kind in KINDS:  # once, so that everything is opened
            click(Client("127.0.0.1", port), kind, about.id, about.d_sae, about.n_rows, random.Random(0))
        times, errors, taken = click_together(port, about.id, about.d_sae, about.n_rows, clients, seconds)
    finally:
        process.terminate()
        process.join()
    for error in errors[:5]:
        say(f"Error: {error}")
    n = sum(map(len, times.values()))
    figures: dict[str, Any] = {
        f"{kind}_p{share}_ms": round(float(np.percentile(times[kind], share)) * 1000, 1) if times[kind] else None
        for share in (95, 50)
        for kind in KINDS
    }
    return {**figures, "clients": clients, "requests": n, "errors": len(errors), "requests_per_s": round(n / taken, 1)}


def click_together(
    port: int, index: str, n_features: int, n_rows: int, clients: int, seconds: float
) -> tuple[dict[str, list[float]], list[str], float]:
    """Let clients click at once; returns the seconds of each answer by kind, what went wrong, and the time it took."""
    times: dict[str, list[float]] = defaultdict(list)
    errors: list[str] = []
    started = time.perf_counter()

    def one(number: int) -> None:
        rng = random.Random(number)
        try:
            client = Client("127.0.0.1", port)
            turn = number
            while time.perf_counter() - started < seconds:
                kind = KINDS[turn % len(KINDS)]
                turn += 1
                before = time.perf_counter()
                click(client, kind, index, n_features, n_rows, rng)
                times[kind].append(time.perf_counter() - before)
        except Exception as problem:
            errors.append(f"{type(problem).__name__}: {problem}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, errors, time.perf_counter() - started


def _serve(workspace: Path, pipe: "Connection") -> None:
    """Runs in a process of its own: a dashboard whose model worker is busy."""
    import waitress

    from dashboards.app import THREADS, create_app
    from dashboards.worker import Job, ModelWorker
    from scope.workspace import Workspace

    def work(job: Job) -> None:
        matrix = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
        while True:
            matrix = matrix @ matrix
            matrix /= np.abs(matrix).max()
            job.report("multiplying")

    worker = ModelWorker(time_limit=3600)
    app = create_app(Workspace(workspace), worker=worker)
    server = waitress.create_server(app.server, host="127.0.0.1", port=0, threads=THREADS, ident=None)
    worker.submit("busy", work)
    pipe.send(server.effective_port)
    server.run()
