"""The training steps of peers, as their documentation says to run them, over the same rows and the same weights.

Nothing of theirs is imported before it is run. Each function gives a callable that does one whole step on a batch.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scope.bench.synthetic import DictionaryLike, row_maker
from scope.training.config import TrainConfig
from scope.training.trainer import SAETrainer

__all__ = ["losses_on_the_same_batches", "saelens_fit", "saelens_step", "sparsify_step", "without_wandb"]

Step = Callable[[Tensor], Any]
NEVER = 1_000_000
"""Steps since a dead feature fired."""
SAELENS_ARCHITECTURES = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}


def saelens_step(
    data: DictionaryLike, scale: float, arch: str, k: int, lr: float, compiled: bool, threshold: float | None = None
) -> Step:
    """SAELens's trainer: `SAETrainer.step`, with autocast on a GPU, its AuxK on the dead features, its Adam.

    Args:
        data: the weights to start from.
        scale: rows are multiplied by it before they are given.
        arch: one of `SAELENS_ARCHITECTURES`.
        k: firing features.
        lr: learning rate.
        compiled: whether its forward pass goes through `torch.compile`.
        threshold: of all features of a JumpReLU.
    """
    d_sae, d_in = data.W_dec.shape
    trainer = _saelens_trainer(arch, d_in, d_sae, k, lr, len(data.batches[0]), data.W_dec.device)
    with torch.no_grad():
        trainer.sae.W_enc.copy_(data.W_enc.T)
        trainer.sae.W_dec.copy_(data.W_dec)
        trainer.sae.b_enc.copy_(data.b_enc * scale)
        if threshold is not None:
            trainer.sae.threshold.fill_(threshold)
    if compiled:
        trainer.sae.training_forward_pass = torch.compile(trainer.sae.training_forward_pass)
    trainer.n_forward_passes_since_fired[d_sae - data.n_dead :] = NEVER

    def step(batch: Tensor) -> Any:
        output = trainer.step(batch * scale)
        trainer.n_training_steps += 1
        return output

    return step


def _saelens_trainer(
    arch: str,
    d_in: int,
    d_sae: int,
    k: int,
    lr: float,
    batch_size: int,
    device: torch.device,
    *,
    batches: Iterator[Tensor] | None = None,
    sae_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    import sae_lens
    from sae_lens import SAETrainer
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    name = SAELENS_ARCHITECTURES[arch]
    sizes: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "device": str(device), "dtype": "float32"}
    sizes |= ({} if arch == "jumprelu" else {"k": k}) | dict(sae_options or {})
    sae = getattr(sae_lens, f"{name}TrainingSAE")(getattr(sae_lens, f"{name}TrainingSAEConfig")(**sizes))
    settings: dict[str, Any] = {
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "save_final_checkpoint": False,
        "total_training_samples": batch_size * NEVER,
        "device": str(device),
        "autocast": device.type == "cuda",
        "lr": lr,
        "lr_end": lr / 10,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "train_batch_size_samples": batch_size,
        "dead_feature_window": 1000,
        "feature_sampling_window": 1000,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return SAETrainer(SAETrainerConfig(**settings | options), sae, iter(()) if batches is None else batches)


def saelens_fit(
    arch: str,
    shape: tuple[int, int, int],
    lr: float,
    batches: Iterator[Tensor],
    steps: int,
    sample: Sequence[Tensor],
    folder: Path,
) -> None:
    """SAELens's `SAETrainer.fit` with its defaults for the SAE, saved for inference in its own format.

    Args:
        arch: one of `SAELENS_ARCHITECTURES`.
        shape: d_in, d_sae, k.
        lr: peak learning rate; it rises over a twentieth of the run and falls to 0 over the last fifth.
        batches: raw rows, as many batches as there are steps, on the device to train on.
        steps: steps in the run.
        sample: batches that the scale of the rows is estimated from.
        folder: where it is saved.
    """
    d_in, d_sae, k = shape
    n_rows, device = len(sample[0]), sample[0].device
    schedule = {"lr_warm_up_steps": max(1, steps // 20), "lr_decay_steps": max(1, steps // 5)}
    trainer = _saelens_trainer(
        arch,
        d_in,
        d_sae,
        k,
        lr,
        n_rows,
        device,
        batches=batches,
        sae_options={"normalize_activations": "expected_average_only_in"},
        total_training_samples=steps * n_rows,
        dead_feature_window=min(1000, max(1, steps // 10)),
        **schedule,
    )
    trainer.activation_scaler.estimate_scaling_factor(
        d_in=d_in, data_provider=iter(sample), n_batches_for_norm_estimate=len(sample)
    )
    trainer.fit().save_inference_model(str(folder))


def sparsify_step(data: DictionaryLike, scale: float, k: int, lr: float) -> Step:
    """sparsify's `SparseCoder` and fused Adam under autocast; without AuxK, which its own defaults leave out."""
    from sparsify import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    d_sae, d_in = data.W_dec.shape
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=data.W_dec.device, dtype=torch.float32)
    with torch.no_grad():
        coder.encoder.weight.copy_(data.W_enc)
        coder.encoder.bias.copy_(data.b_enc * scale)
        assert coder.W_dec is not None
        coder.W_dec.copy_(data.W_dec)
    optimiser = torch.optim.Adam(coder.parameters(), lr=lr, fused=True)

    def step(batch: Tensor) -> Any:
        coder.set_decoder_norm_to_unit_norm()
        output = coder(batch * scale)
        output.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        return output

    return step


@contextlib.contextmanager
def without_wandb() -> Iterator[None]:
    """An empty `wandb` where there is none: SAELens imports it at load, and nothing here logs to it."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        empty = types.ModuleType("wandb")
        empty.__spec__ = ModuleSpec("wandb", None)
        for name in ("init", "log", "Artifact", "Histogram"):
            setattr(empty, name, type(name, (), {}))
        sys.modules["wandb"] = empty
    yield


def losses_on_the_same_batches(
    arch: str, d_in: int, d_sae: int, k: int, batch_size: int, n_steps: int, device: torch.device
) -> tuple[float, float]:
    """Squared error a row, over the last tenth of the steps, of our trainer and of SAELens's.

    Both start from the same weights (ours, untrained) and take the same scaled batches, each once, at the same constant
    learning rate (our default); what else they do is their own.
    """
    config = TrainConfig(
        arch=arch,
        d_sae=d_sae,
        k=k,
        tokens=n_steps * batch_size,
        batch_size=batch_size,
        warmup=0.0,
        decay=0.0,
        device=str(device),
    )
    ours = SAETrainer(config, d_in)
    theirs = _saelens_trainer(arch, d_in, d_sae, k, config.peak_lr, batch_size, device)
    errors: list[tuple[Tensor, Tensor]] = []
    rows = row_maker(d_in, d_sae, k, device)
    for number in range(n_steps):
        batch = rows(batch_size)
        if number == 0:
            ours.initialise(batch)
            theirs.sae.load_state_dict(ours.sae.state_dict(), strict=False)
        report = ours.step(batch)
        assert ours.scale is not None
        output = theirs.step(batch * ours.scale)
        theirs.n_training_steps += 1
        if number >= n_steps - max(1, n_steps // 10):
            mine = (report.loss - sum(report.parts.values())) * d_in
            errors.append((mine, output.losses["mse_loss"].detach()))
    return tuple(float(torch.stack(of).mean()) for of in zip(*errors, strict=True))  # type: ignore[return-value]
