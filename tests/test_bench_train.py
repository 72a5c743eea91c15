"""The training benchmark: rows that are like a trained dictionary's, and figures that can be read by a program."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from helpers_training import one_thread  # noqa: F401  # a fixture
from typer.testing import CliRunner

from scope.bench.floor import measure_floor
from scope.bench.settings import TrainBench
from scope.bench.synthetic import DEAD_SHARE, densities, dictionary_like, row_maker
from scope.bench.train import bench_train
from scope.errors import InvalidInputError

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = TrainBench(d_in=64, d_sae=512, k=16, batch_size=256, steps=2, rounds=1, with_peers=False, device="cpu")
RATIOS = ("ratio_to_saelens", "ratio_to_saelens_compiled", "ratio_to_sparsify", "ratio_to_floor")


@pytest.mark.parametrize(("d_sae", "k"), [(512, 8), (4096, 32), (65_536, 64)])
def test_densities_span_what_a_trained_dictionary_has(d_sae: int, k: int) -> None:
    p = densities(d_sae, k)
    live = p[p > 0]
    assert float(live.max()) == pytest.approx(0.9)
    assert float(live.min()) == pytest.approx(1e-6, rel=1e-3)
    assert float(p.sum()) == pytest.approx(2 * k, rel=1e-3)
    assert int((p == 0).sum()) == int(DEAD_SHARE * d_sae)
    assert (p.diff() <= 0).all()


def test_the_weights_fit_the_rows() -> None:
    data = dictionary_like(64, 512, 16, 256, 2, torch.device("cpu"))
    assert [batch.shape for batch in data.batches] == [(256, 64)] * 2
    torch.testing.assert_close(data.W_dec.norm(dim=1), torch.ones(512))
    # Directions that rows are made of are read best by their own features.
    rows = data.batches[0] - data.batches[0].mean(dim=0)
    pre = rows @ data.W_enc.T + data.b_enc
    values, ids = pre.topk(16)
    assert int((ids >= 512 - data.n_dead).sum()) < 0.01 * ids.numel()
    x_hat = torch.zeros_like(pre).scatter(1, ids, values.relu()) @ data.W_dec
    assert float((rows - x_hat).square().sum() / rows.square().sum()) < 0.8
    assert torch.equal(row_maker(64, 512, 16, torch.device("cpu"))(256), data.batches[0])


def test_figures_without_peers() -> None:
    figures = json.loads(json.dumps(bench_train(TINY, lambda message: None)))
    assert [figures[name] for name in RATIOS[:3]] == [None] * 3
    rates = figures["tokens_per_second"]
    assert figures["ratio_to_floor"] == pytest.approx(rates["ours"] / rates["floor"])
    assert figures["dead_share"] > 0.04
    assert 0 < figures["peak_bytes"]["ours"] < 2**30
    assert (figures["d_sae"], figures["k"], figures["batch_size"]) == (512, 16, 256)
    assert "saelens" not in rates


HOLDS = """
import torch

from scope.bench.machine import PeakMemory

for megabytes in (256, 64):
    memory = PeakMemory(torch.device("cpu"))
    for _ in range(3):
        torch.ones(megabytes * 2**20, dtype=torch.uint8)
    torch.ones(2**20, dtype=torch.uint8)
    print(memory.bytes())
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux says how much a process held at most")
def test_peak_memory_is_what_was_held_at_once_since_then() -> None:
    """In a process of its own: what other tests' threads hold counts as well."""
    told = subprocess.run([sys.executable, "-c", HOLDS], check=True, capture_output=True, text=True).stdout
    first, second = map(int, told.split())
    assert 0.9 * 256 < first / 2**20 < 1.5 * 256 + 32
    assert 0.9 * 64 < second / 2**20 < 1.5 * 64 + 32  # is not told of the first


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu"])
def test_saelens_takes_its_turn(arch: str) -> None:
    config = TrainBench(arch, "cpu", d_in=32, d_sae=128, k=4, batch_size=64, steps=1, rounds=1, loss_steps=3)
    figures = bench_train(config, lambda message: None)
    rates = figures["tokens_per_second"]
    assert figures["ratio_to_saelens"] == pytest.approx(rates["ours"] / rates["saelens"])
    assert figures["ratio_to_saelens_compiled"] is None
    assert figures["loss"] > 0
    assert figures["loss_ratio_to_saelens"] == pytest.approx(figures["loss"] / figures["saelens_loss"])


def test_the_command_answers_in_json() -> None:
    from scope.cli import app

    options = ["--d-in", "32", "--d-sae", "64", "--k", "2", "--batch-size", "32", "--steps", "1", "--rounds", "1"]
    result = CliRunner().invoke(app, ["bench", "train", "--device", "cpu", "--no-with-peers", "--json", *options])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert set(RATIOS) <= answer.keys()


def test_the_floor_adds_up() -> None:
    floor = measure_floor(32, 64, 4, 16, torch.device("cpu"))
    assert floor.seconds == pytest.approx(floor.encode + floor.output_pass + floor.gathers + floor.optimiser)
    assert min(floor) > 0
    assert floor.optimiser * floor.bytes_per_second == pytest.approx(2 * 32 * 64 * 24)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"rounds": 0}, {"loss_steps": -1}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        TrainBench(**wrong)  # type: ignore[arg-type]


def test_k_above_d_sae_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="k is 65"):
        bench_train(TrainBench(d_sae=64, k=65, device="cpu"), lambda message: None)
