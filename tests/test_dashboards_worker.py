"""The model worker: order, equal requests, cancel, time limits, failures."""

import threading

import pytest

from dashboards.worker import MAX_QUEUED, CalledOffError, Job, JobState, ModelWorker
from scope.errors import InvalidInputError

LONG = 120.0


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


def test_jobs_run_one_at_a_time_in_order(gate: threading.Event) -> None:
    worker, seen = ModelWorker(), []
    blocker = worker.submit("blocker", lambda job: gate.wait(LONG))
    jobs = [worker.submit(n, lambda job, n=n: seen.append(n) or n) for n in range(5)]
    assert [worker.position(job) for job in jobs] == [1, 2, 3, 4, 5]
    gate.set()
    worker.wait(jobs[-1], LONG)
    assert blocker.state is JobState.DONE
    assert seen == [0, 1, 2, 3, 4]
    assert [job.result for job in jobs] == seen
    assert worker.result(3) == 3
    assert worker.result("unknown") is None


def test_equal_requests_are_one_job() -> None:
    worker, runs = ModelWorker(), []
    jobs = [worker.submit("same", lambda job: runs.append(1)) for _ in range(3)]
    worker.wait(jobs[0], LONG)
    assert worker.submit("same", lambda job: runs.append(1)) is jobs[0]
    assert runs == [1]


def test_a_failure_is_kept_and_a_new_request_tries_again() -> None:
    worker = ModelWorker()
    failed = worker.submit("x", lambda job: 1 / 0)
    worker.wait(failed, LONG)
    assert failed.state is JobState.FAILED
    assert isinstance(failed.error, ZeroDivisionError)
    again = worker.submit("x", lambda job: 7)
    worker.wait(again, LONG)
    assert again.result == 7


def test_a_queued_job_that_is_cancelled_never_runs(gate: threading.Event) -> None:
    worker, ran = ModelWorker(), []
    worker.submit("blocker", lambda job: gate.wait(LONG))
    job = worker.submit("x", lambda job: ran.append(1))
    worker.cancel(job.id)
    after = worker.submit("after", lambda job: None)
    gate.set()
    worker.wait(after, LONG)
    assert job.state is JobState.CANCELLED
    assert ran == []


def test_a_running_job_that_is_cancelled_stops_at_its_next_report(gate: threading.Event) -> None:
    worker, started, stopped = ModelWorker(), threading.Event(), threading.Event()

    def work(job: Job) -> None:
        started.set()
        gate.wait(LONG)
        try:
            job.report("going on")
        except CalledOffError:
            stopped.set()
            raise

    job = worker.submit("x", work)
    assert started.wait(LONG)
    worker.cancel(job.id)
    assert not job.pending
    gate.set()
    assert stopped.wait(LONG)
    after = worker.submit("after", lambda job: "served")
    worker.wait(after, LONG)
    assert after.result == "served"
    assert job.state is JobState.CANCELLED


def test_a_job_that_takes_too_long_is_answered(gate: threading.Event) -> None:
    worker, started = ModelWorker(), threading.Event()
    job = worker.submit("x", lambda job: (started.set(), gate.wait(LONG)), time_limit=1e-6)
    assert started.wait(LONG)
    known = worker.get(job.id)
    gate.set()
    assert known is job
    assert job.state is JobState.FAILED
    assert "stopped after" in str(job.error)


def test_a_full_queue_is_refused_and_old_results_are_forgotten(gate: threading.Event) -> None:
    worker = ModelWorker()
    started = threading.Event()
    worker.submit("blocker", lambda job: (started.set(), gate.wait(LONG)))
    assert started.wait(LONG)
    jobs = [worker.submit(n, lambda job: None) for n in range(MAX_QUEUED)]
    with pytest.raises(InvalidInputError, match="already wait"):
        worker.submit("one more", lambda job: None)
    gate.set()
    worker.wait(jobs[-1], LONG)
    for n in range(1000, 1100):
        worker.wait(worker.submit(n, lambda job: None), LONG)
    assert worker.get(jobs[0].id) is None


def test_a_job_that_nobody_polls_stops_when_its_time_is_up(gate: threading.Event) -> None:
    worker = ModelWorker()

    def work(job: Job) -> None:
        gate.wait(LONG)
        job.report("going on for too long")

    job = worker.submit("x", work, time_limit=1e-6)
    gate.set()
    worker.wait(job, LONG)
    assert job.state is JobState.FAILED
    assert isinstance(job.error, TimeoutError)


def test_who_waits_for_a_job_hears_at_once_that_it_was_cancelled(gate: threading.Event) -> None:
    worker, heard = ModelWorker(), threading.Event()
    job = worker.submit("x", lambda job: gate.wait(LONG))
    waiting = threading.Thread(target=lambda: (worker.wait(job, LONG), heard.set()))
    waiting.start()
    worker.cancel(job.id)
    assert heard.wait(LONG / 2)
    gate.set()
    waiting.join()
