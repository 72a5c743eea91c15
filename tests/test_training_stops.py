"""A run that meets a NaN stops, whatever the architecture and wherever it arises; its last good checkpoint stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_training import one_thread, synthetic  # noqa: F401  # a fixture
from safetensors.torch import load_file
from test_training_sweep import Several

from scope.errors import NonFiniteError
from scope.saes import registry
from scope.training import SAETrainer, TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")
FIRST, SECOND = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
THIRD, FOURTH = "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"
HOOKS: dict[str, tuple[list[str], list[str]]] = {
    "transcoder": ([FIRST], [THIRD]),
    "skip_transcoder": ([FIRST], [THIRD]),
    "crosscoder": ([FIRST, SECOND], []),
    "clt": ([FIRST, SECOND], [THIRD, FOURTH]),
}
SETTINGS: dict[str, Any] = {"d_sae": 16, "k": 3, "tokens": 20 * 64, "batch_size": 64, "log_steps": 1}


@pytest.fixture(scope="module")
def source() -> Several:
    rows = synthetic(800, d_in=8, n_features=16, active=3).rows
    return Several({FIRST: rows, SECOND: rows.roll(1, 1), THIRD: rows.roll(2, 1), FOURTH: rows.roll(3, 1)})


@pytest.mark.parametrize("architecture", registry.architectures())
@pytest.mark.parametrize("place", ["one weight", "all gradients", "a moment"])
def test_the_last_good_checkpoint_stays(
    source: Several, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, place: str
) -> None:
    step, at = SAETrainer.step, 12

    def spoiled(self: SAETrainer, batch: torch.Tensor, *further: Any) -> Any:
        if place == "all gradients" and self.steps_done == at:
            batch = batch * torch.where(torch.arange(len(batch))[:, None] == 5, 1e30, 1.0)  # finite, its square is not
        report = step(self, batch, *further)
        row = next(iter(self._rows.values()))
        with torch.no_grad():
            if place == "one weight" and self.steps_done == at:
                row[3, 1] = torch.nan
            if place == "a moment" and self.steps_done == at:
                self.optimiser.state[row]["exp_avg_sq"][3, 1] = torch.inf
        return report

    monkeypatch.setattr(SAETrainer, "step", spoiled)
    hooks, written = HOOKS.get(architecture, ([FIRST], []))
    config = TrainConfig(arch=architecture, checkpoint_steps=5, clip_grad_norm=0.0, **SETTINGS)
    with pytest.raises(NonFiniteError):
        train(source, hooks, config, tmp_path / "one", hook_out=written)
    assert not (tmp_path / "one").exists()
    kept = load_file(tmp_path / ".one.training" / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values() if tensor.is_floating_point())

    monkeypatch.setattr(SAETrainer, "step", step)
    resumed = train(source, hooks, config, tmp_path / "one", hook_out=written)
    assert resumed.resumed_at == 10
    assert all(torch.isfinite(weight).all() for weight in resumed.sae.weights().values())
