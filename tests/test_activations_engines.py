"""Engines: a capture by several processes leaves the store that one process leaves, whatever dies on the way."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_activations import FakeModel, FakePending, pythons_own_sigint, tree, write_text

from activations.capture import CaptureReport, capture
from activations.engines import detected_engine, open_crew
from activations.engines.worker import LANES, GroupWork, GroupWorker, Job
from activations.errors import (
    ActivationsError,
    InterruptedRunError,
    InvalidInputError,
    NonFiniteError,
    UnknownNameError,
)
from activations.layout import PLAN
from activations.passes import CapturePass, PassSettings
from activations.pipeline import Worker
from activations.selection import RowSelection
from activations.store import ActivationStore
from activations.text import TextSource
from activations.writer import StoreWriter

RESID, Z, OTHER = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.hook_resid_post"
TILDE = ord("~") + 3
SETTINGS: dict[str, Any] = {"context_size": 16, "rows_per_group": 64, "batch_size": 128}


@dataclass
class Announced(FakeModel):
    """Leaves a file with the name of its process, and poisons what it is told to."""

    folder: str = ""
    poisoned: bool = False

    def __post_init__(self) -> None:
        if self.folder:
            (Path(self.folder) / f"pid-{os.getpid()}").touch()

    def rows_at(self, hook: str, window: np.ndarray) -> np.ndarray:
        rows = super().rows_at(hook, window)
        if self.poisoned and hook == Z:
            rows[(window == TILDE) & (np.arange(len(window)) > 13), 1, 2] = np.nan
        return rows


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    return TextSource(write_text(tmp_path_factory.mktemp("text") / "text.jsonl", n_documents=48))


@pytest.fixture(scope="module")
def expected(text: TextSource, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that this process leaves."""
    out = tmp_path_factory.mktemp("local") / "s.zarr"
    return tree(capture(FakeModel, text, [RESID, Z], out, **SETTINGS).store.path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray on this machine for all tests that need it."""
    ray = pytest.importorskip("ray")
    from activations.engines.ray import start_local_ray

    start_local_ray(2)
    yield
    ray.shutdown()


def with_ray(model: Any, text: TextSource | None, out: Path, hooks: Any = (RESID, Z), **settings: Any) -> CaptureReport:
    return capture(model, text, hooks, out, engine="ray", workers=2, **SETTINGS, **settings)


# ---- Ray


@pytest.mark.usefixtures("cluster")
def test_actors_leave_the_store_of_one_process(text: TextSource, expected: dict[str, bytes], tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    model = partial(Announced, folder=str(tmp_path))
    report = with_ray(model, text, tmp_path / "s.zarr", progress=lambda *done: seen.append(done))
    assert tree(report.store.path) == expected
    assert (report.new_rows, report.resumed) == (report.rows, False)
    assert seen[-1] == (report.rows, report.rows)
    assert len(list(tmp_path.glob("pid-*"))) == 2
    assert not (tmp_path / f"pid-{os.getpid()}").exists()
    more = with_ray(FakeModel, None, tmp_path / "s.zarr", ["blocks.*.hook_resid_post"])
    assert more.store.hooks == (OTHER, Z, RESID)
    assert more.store.complete
    assert more.store.verify() == []
    local = capture(FakeModel, text, [OTHER], tmp_path / "t.zarr", **SETTINGS).store
    np.testing.assert_array_equal(more.store.read(OTHER, 0, more.rows), local.read(OTHER, 0, more.rows))


@pytest.mark.usefixtures("cluster")
def test_a_killed_actor_is_replaced(text: TextSource, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    killed = []

    def kill_one(done: int, total: int | None) -> None:
        if not killed:
            victim = sorted(tmp_path.glob("pid-*"))[0]
            killed.append(int(victim.name.removeprefix("pid-")))
            os.kill(killed[0], signal.SIGKILL)
            (out / "hooks" / RESID / f"c.3.0.tmp-{killed[0]}").write_bytes(b"half a shard")

    report = with_ray(partial(Announced, folder=str(tmp_path)), text, out, progress=kill_one)
    assert killed
    assert len(list(tmp_path.glob("pid-*"))) >= 3
    assert tree(report.store.path) == expected


@pytest.mark.usefixtures("cluster")
def test_an_error_of_the_model_is_that_of_one_process(
    text: TextSource, expected: dict[str, bytes], tmp_path: Path
) -> None:
    poisoned = partial(Announced, poisoned=True)
    with pytest.raises(NonFiniteError, match=f"The hook {Z} gave a NaN or Inf at row .*, in the document") as caught:
        with_ray(poisoned, text, tmp_path / "s.zarr")
    assert type(caught.value) is NonFiniteError
    assert any("run the same command again" in note for note in caught.value.__notes__)
    store = ActivationStore.open(tmp_path / "s.zarr")
    assert not store.complete
    assert store.verify() == []
    report = capture(FakeModel, text, [RESID, Z], tmp_path / "s.zarr", **SETTINGS)
    assert tree(report.store.path) == expected


@pytest.mark.usefixtures("cluster")
def test_ctrl_c_keeps_what_is_written(text: TextSource, expected: dict[str, bytes], tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    stopped = pytest.raises(InterruptedRunError, match=r"Interrupted\. .* rows are committed .* to resume")
    with pythons_own_sigint(), stopped:
        with_ray(FakeModel, text, tmp_path / "s.zarr", progress=interrupt)
    assert not (tmp_path / "s.zarr" / "lock").exists()
    store = ActivationStore.open(tmp_path / "s.zarr")
    assert not store.complete
    report = with_ray(FakeModel, text, tmp_path / "s.zarr")
    assert report.resumed
    assert tree(report.store.path) == expected


@pytest.mark.usefixtures("cluster")
def test_actors_append_to_a_store_of_chosen_tokens(text: TextSource, tmp_path: Path) -> None:
    """A row group that is half full is filled up elsewhere, and tokens are chosen by texts that an actor gives."""
    more = TextSource(write_text(tmp_path / "more.jsonl", n_documents=12, seed=3))
    selection = RowSelection(skip_bos=True, pattern="[abc]")
    trees = []
    for name, engine in (("local", {}), ("ray", {"engine": "ray", "workers": 2})):
        settings: dict[str, Any] = {**SETTINGS, **engine, "selection": selection}
        first = capture(FakeModel, text, [RESID, Z], tmp_path / name, **settings)
        assert first.rows % 64
        report = capture(FakeModel, more, [RESID, Z], tmp_path / name, append=True, **settings)
        assert 0 < report.new_rows < report.rows
        trees.append(tree(report.store.path))
    assert trees[0] == trees[1]


@pytest.mark.usefixtures("cluster")
def test_ray_listens_on_the_loopback_device_only() -> None:
    psutil = pytest.importorskip("psutil")
    listening = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            listening |= {one.laddr.ip for one in child.net_connections("inet") if one.status == "LISTEN"}
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.usefixtures("cluster")
def test_what_only_the_cluster_knows_is_refused(text: TextSource, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SETTINGS, "engine": "ray", "workers": 1}
    with pytest.raises(InvalidInputError, match="1 workers with 9 GPUs each were asked for"):
        capture(FakeModel, text, [RESID], tmp_path / "s.zarr", gpus_per_worker=9, **settings)
    with pytest.raises(UnknownNameError, match=f"Did you mean {RESID}"):
        capture(FakeModel, text, ["blocks.1.hook_resid_pots"], tmp_path / "s.zarr", **settings)
    assert not (tmp_path / "s.zarr").exists()


def test_what_an_engine_cannot_do_is_said(text: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(InvalidInputError, match=match):
            capture(settings.pop("model", FakeModel), text, [RESID], tmp_path / "s.zarr", **settings)
        assert not (tmp_path / "s.zarr").exists()

    refused("no engine 'rey'. Did you mean ray", engine="rey")
    refused("the engine is local", workers=2)
    refused("nproc-per-node", engine="torchrun", workers=2)
    refused("give a function that makes one", engine="ray", model=FakeModel())
    refused("workers is 0", engine="ray", workers=0)
    refused("RANK is not set", engine="torchrun")
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(r"pip install 'scope-workbench\[ray\]'", engine="ray")


def test_torchrun_is_recognised() -> None:
    assert detected_engine({}) == "local"
    assert detected_engine({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "1"}) == "local"
    assert detected_engine({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2"}) == "torchrun"


def test_errors_survive_a_pickle() -> None:
    from scope.errors import MissingDependencyError

    errors: list[ActivationsError] = [
        UnknownNameError("hook", "blocks.1", [RESID], "Look again."),
        MissingDependencyError("ray", "ray", "The engine"),
        NonFiniteError("The hook gave a NaN."),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)


# ---- one worker


@pytest.fixture
def planned(text: TextSource, tmp_path: Path) -> Iterator[Callable[[FakeModel], tuple[GroupWorker, list[GroupWork]]]]:
    """A store with its plan, and a worker for it with all its work."""
    with StoreWriter(tmp_path / "s.zarr", _spec(), {"text": {}, "max_tokens": None}, [RESID]) as writer:
        capture_id = writer.declare_hooks({RESID: (12,)}, {})
        plan = CapturePass(FakeModel(), PassSettings(text, writer, (capture_id,), 600, 128, None))
        planner = Worker("planner", plan._plan, plan._wind_down)
        planner.start()
        works = []
        for group in plan.groups:
            works.append(GroupWork(writer.ledger.records[PLAN][group], plan._windows(group)))
        planner.join_fully()
        job = Job("one", str(writer.folder), writer.spec, (capture_id,), 128)
        yield lambda model: (GroupWorker(model, job), works)


def _spec() -> Any:
    from activations.spec import CaptureSpec

    return CaptureSpec("fake", None, "w", "t", 16, 2, "float32", "bfloat16", 64)


def test_the_model_runs_while_shards_are_written(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first group's shards are not written before the model has begun with the second group."""
    begun = threading.Event()

    class Watched(FakeModel):
        def forward_rows(self, windows: Any, *arguments: Any) -> FakePending:
            if sum(tokens for _, tokens in self.calls) >= 64:  # the first group's are done
                begun.set()
            return super().forward_rows(windows, *arguments)

    write_shard = StoreWriter.write_shard

    def waiting(self: StoreWriter, *arguments: Any) -> Any:
        assert begun.wait(120)
        return write_shard(self, *arguments)

    monkeypatch.setattr(StoreWriter, "write_shard", waiting)
    worker, works = planned(Watched())
    with ThreadPoolExecutor(LANES) as lanes:
        answers = list(lanes.map(worker.compute, works))
    worker.close()
    assert all(
        set(answer) == {f"hooks/{RESID}/c.{n}.0", f"tokens/norm/{RESID}/c.{n}"} for n, answer in enumerate(answers)
    )


def test_a_stopped_worker_answers_none(planned: Any) -> None:
    worker, works = planned(FakeModel())
    assert worker.compute(works[0])
    worker.stop()
    assert worker.compute(works[1]) is None
    worker.close()


def test_a_failed_worker_raises_in_every_call(planned: Any) -> None:
    class Broken(FakeModel):
        def forward_rows(self, *arguments: Any) -> FakePending:
            raise RuntimeError("CUDA out of memory")

    worker, works = planned(Broken())
    for work in works[:2]:
        with pytest.raises(RuntimeError, match="CUDA out of memory"):
            worker.compute(work)
    worker.close()


# ---- torchrun

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from helpers_activations import FakeModel
from activations.capture import capture
from activations.errors import ActivationsError
from activations.text import TextSource

class Dying(FakeModel):
    # Rank 1 dies at the last of the row groups that it surely gets, once something is committed.
    def forward_rows(self, *arguments):
        if os.environ["RANK"] == "1" and len(self.calls) == {lanes!r} - 1 and {dies!r}:
            while not list(Path({out!r}).glob("ledger/hooks-*/0*.json")):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward_rows(*arguments)

try:
    report = capture(Dying, TextSource({text!r}), {hooks!r}, {out!r}, engine="torchrun", **{settings!r})
except ActivationsError as error:
    sys.exit(f"rank {{os.environ['RANK']}}: {{error}}")
Path({out!r} + f".rank-{{os.environ['RANK']}}").write_text(f"{{report.rows}} {{report.new_rows}}")
"""


def test_torchrun_leaves_the_store_of_one_process(text: TextSource, expected: dict[str, bytes], tmp_path: Path) -> None:
    """A rank that dies ends the run, which says so; the same command then completes the store."""
    out = tmp_path / "s.zarr"
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for dies in (True, False):
        script = tmp_path / f"dies-{dies}.py"
        (file,) = text.paths  # type: ignore[misc]
        script.write_text(
            SCRIPT.format(
                paths=[str(here.parent), str(here)],
                text=str(file),
                hooks=[RESID, Z],
                out=str(out),
                settings=SETTINGS,
                lanes=LANES,
                dies=dies,
            )
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        if dies:
            assert done.returncode != 0
            assert "rank 0: torchrun ended this process" in done.stderr
            assert "run the same command again to resume" in done.stderr
            assert not ActivationStore.open(out).complete
            assert list(out.glob("ledger/hooks-*/0*.json"))
            assert not (out / "lock").exists()
        else:
            assert done.returncode == 0, done.stderr
    n_rows = ActivationStore.open(out).n_rows
    assert tree(out) == expected
    reports = [Path(f"{out}.rank-{rank}").read_text().split() for rank in (0, 1)]
    assert reports[0] == reports[1]
    assert int(reports[0][0]) == n_rows >= int(reports[0][1]) > 0


def test_a_process_alone_leads() -> None:
    crew = open_crew("local", FakeModel, None, None)
    assert crew.leads
    with crew:
        assert crew.model is crew.model
