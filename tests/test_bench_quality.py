"""The comparison of qualities: same rows for both, an honest answer, and figures that can be read by a program."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import one_thread  # noqa: F401  # a fixture
from test_cli import scope
from test_cli_train import RESID, store  # noqa: F401  # a fixture

from activations.store import ActivationStore
from scope.bench import train_peers
from scope.bench.quality import _Comparison, compared, student_interval
from scope.bench.settings import QualityBench
from scope.errors import InvalidInputError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SMALL = QualityBench(hook=RESID, d_sae=32, k=4, batch_size=64, tokens=64 * 24, seeds=2, evaluate_tokens=0, device="cpu")


def test_intervals_are_students() -> None:
    assert student_interval([1.0]) is None
    low, high = student_interval([1.0, 2.0, 3.0])  # type: ignore[misc]
    assert (low, high) == (pytest.approx(2 - 4.303 / math.sqrt(3)), pytest.approx(2 + 4.303 / math.sqrt(3)))


def test_better_means_lower_beyond_the_interval() -> None:
    def runs(*values: float) -> list[dict[str, float]]:
        return [{"fvu": value, "delta_ce": value, "dead_share": value, "fvu_all": value} for value in values]

    clear = compared(runs(0.1, 0.2, 0.3), runs(0.2, 0.3, 0.4))
    assert clear["better"] == dict.fromkeys(("delta_ce", "fvu", "dead_share", "fvu_all"), True)
    assert clear["difference"]["fvu"]["mean"] == pytest.approx(-0.1)
    unclear = compared(runs(0.1, 0.2, 0.3), runs(0.3, 0.2, 0.2))
    assert unclear["better"] == {"delta_ce": False, "fvu": False, "dead_share": True, "fvu_all": False}
    worse = compared(runs(0.2, 0.3), runs(0.1, 0.2))
    assert not any(worse["better"].values())
    assert not compared(runs(0.1), runs(0.2))["better"]["fvu"]  # one seed says nothing


def test_both_take_the_same_batches_once_a_pass(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    seen: dict[str, list[torch.Tensor]] = {"ours": [], "saelens": []}
    comparison = _Comparison(ActivationStore.open(store), None, SMALL, lambda message: None)
    trainer_step = comparison._ours.__globals__["SAETrainer"].step

    def noted(self: Any, batch: torch.Tensor) -> Any:
        seen["ours"].append(batch.clone())
        return trainer_step(self, batch)

    monkeypatch.setattr("scope.bench.quality.SAETrainer.step", noted)
    comparison._ours(1e-3, 3)
    with train_peers.without_wandb():
        from sae_lens import SAETrainer as Theirs

    their_step = Theirs._train_step

    def their_noted(self: Any, sae: Any, sae_in: torch.Tensor) -> Any:
        seen["saelens"].append(sae_in / self.activation_scaler.scaling_factor)
        return their_step(self, sae, sae_in)

    monkeypatch.setattr(Theirs, "_train_step", their_noted)
    theirs = comparison._saelens(1e-3, 3)
    assert (theirs.d_sae, theirs.d_in) == (32, comparison.d_in)
    assert len(seen["ours"]) == len(seen["saelens"]) == comparison.steps == 24
    for one, other in zip(seen["ours"], seen["saelens"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    n_rows = len(comparison.rows)
    whole = torch.cat(seen["ours"])[:n_rows]
    assert torch.equal(whole.sort(dim=0).values, comparison.rows[: len(whole)].float().sort(dim=0).values) or (
        len(whole) < n_rows
    )
    assert comparison.held.tuning.n_rows > 0
    assert comparison.held.scored.n_rows > 0


def test_the_command_compares(store: Path) -> None:  # noqa: F811
    answer = scope(
        *("bench", "quality", store, "--hook", RESID, "--d-sae", 32, "--k", 4, "--batch-size", 64, "--tokens", 64 * 20),
        *("--seeds", 2, "--factors", "1,2", "--evaluate-tokens", 200, "--device", "cpu", "--json"),
    )
    for name in ("ours", "saelens"):
        assert len(answer[name]["tuning"]) == 2
        assert [run["seed"] for run in answer[name]["runs"]] == [0, 1]
        assert answer[name]["l0"] <= 4 + 1e-6
        low, high = answer[name]["fvu_interval"]
        assert low <= answer[name]["fvu"] <= high
    assert answer["scored_tokens"] > 0
    assert set(answer["difference"]) == set(answer["better"]) == {"delta_ce", "fvu", "dead_share", "fvu_all"}
    mean = answer["ours"]["fvu"] - answer["saelens"]["fvu"]
    assert answer["difference"]["fvu"]["mean"] == pytest.approx(mean)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"factors": ()}, {"passes": 0}, {"seeds": 0}, {"arch": "jumprelu"}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong)) if "arch" not in wrong else "same L0"):
        QualityBench(**wrong)


def test_too_few_steps_are_refused(store: Path) -> None:  # noqa: F811
    with pytest.raises(InvalidInputError, match="20 or more"):
        _Comparison(
            ActivationStore.open(store), None, QualityBench(hook=RESID, tokens=64, batch_size=64), lambda m: None
        )
