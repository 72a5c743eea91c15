"""Kill -9 at random moments of a build and of growth: nothing is ever wrong, and the end is byte for byte the same."""

import itertools
import os
import random
import signal
import time
from pathlib import Path

from helpers_index_nursery import IndexNursery, build_here, source
from test_features_grow import contents

from scope.errors import InvalidInputError
from scope.features import FeatureIndex

KILLS = 24
STAGES = (330, source(0).whole)


def rows_of(out: Path) -> int:
    """Rows of the index that readers see, all of whose bytes are right; 0 where there is none yet."""
    try:
        index = FeatureIndex.open(out)
    except InvalidInputError:
        assert not (out / "manifest.json").exists()
        return 0
    assert index.verify() == []
    assert len(index.features_in(0, index.n_rows)) == index.n_firings
    return index.n_rows


def test_kill_9_at_random_moments(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    whole = [
        contents(index) for index in build_here([str(tmp_path / name) for name in ("a.index", "b.index")], STAGES[-1])
    ]
    rng = random.Random(0)
    killed = completed = 0
    with IndexNursery() as nursery:
        nursery.start([str(tmp_path / "0" / name) for name in "ab"], STAGES[0])
        assert nursery.wait() == 0  # the next one is timed, warm
        begun = time.monotonic()
        nursery.start([str(tmp_path / "0" / name) for name in "ab"], STAGES[1])
        assert nursery.wait() == 0
        lasts = time.monotonic() - begun
        stage, completed = 0, 1
        outs = [tmp_path / "1" / name for name in "ab"]
        while killed < KILLS:
            pid = nursery.start(list(map(str, outs)), STAGES[stage])
            time.sleep(rng.uniform(0, 1.2 * lasts) * rng.random())
            os.kill(pid, signal.SIGKILL)
            status = nursery.wait()
            rows = [rows_of(out) for out in outs]
            assert set(rows) <= {STAGES[stage], STAGES[stage - 1] if stage else 0}
            if status == signal.SIGKILL:
                killed += 1
                if killed % 6:
                    continue
                nursery.start(list(map(str, outs)), STAGES[stage])
                status = nursery.wait()  # now and then one is left in peace
            else:
                lasts *= 0.9  # the kill came too late
            assert status == 0
            assert [rows_of(out) for out in outs] == [STAGES[stage]] * 2
            stage += 1
            if stage == len(STAGES):
                assert [contents(FeatureIndex.open(out)) for out in outs] == whole
                stage, completed = 0, completed + 1
                outs = [tmp_path / str(completed) / name for name in "ab"]
    assert completed >= 2


def test_killed_at_files_all_along_it_goes_on(tmp_path: Path, monkeypatch) -> None:
    """While it is built and while it grows, from the first file of either to the last."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    whole = [
        contents(index) for index in build_here([str(tmp_path / name) for name in ("a.index", "b.index")], STAGES[-1])
    ]
    with IndexNursery() as nursery:
        for stage, n_rows in enumerate(STAGES):
            before = STAGES[stage - 1] if stage else 0
            for number in itertools.count(1, 120):
                outs = [tmp_path / f"{stage}-{number}" / name for name in "ab"]
                if stage:
                    nursery.start(list(map(str, outs)), before)
                    assert nursery.wait() == 0
                nursery.start(list(map(str, outs)), n_rows, number)
                status = nursery.wait()
                if status == 0:
                    break
                assert status == signal.SIGKILL
                assert {rows_of(out) for out in outs} <= {before, n_rows}
                nursery.start(list(map(str, outs)), STAGES[-1])
                assert nursery.wait() == 0
                assert [contents(FeatureIndex.open(out)) for out in outs] == whole
            assert number > 120
