"""The training steps of peers, as their documentation says to run them, over the same rows and the same weights.

Nothing of theirs is imported before it is run. Each function gives a callable that does one whole step on a batch.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor

from scope.bench.synthetic import DictionaryLike

__all__ = ["saelens_step", "sparsify_step"]

Step = Callable[[Tensor], Any]
NEVER = 1_000_000
"""Steps since a dead feature fired."""
SAELENS_ARCHITECTURES = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}


def saelens_step(data: DictionaryLike, scale: float, arch: str, k: int, lr: float, compiled: bool) -> Step:
    """SAELens's trainer: `SAETrainer.step`, with autocast on a GPU, its AuxK on the dead features, its Adam.

    Args:
        data: the weights to start from.
        scale: its rows are multiplied by it before they are given.
        arch: "topk", "batchtopk" or "jumprelu".
        k: firing features.
        lr: learning rate.
        compiled: whether its forward pass goes through `torch.compile`.
    """
    import sae_lens
    from sae_lens import SAETrainer
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    name = SAELENS_ARCHITECTURES[arch]
    device, batch_size = str(data.W_dec.device.type), len(data.batches[0])
    d_sae, d_in = data.W_dec.shape
    sizes = {"d_in": d_in, "d_sae": d_sae, "device": device, "dtype": "float32"}
    sizes |= {} if arch == "jumprelu" else {"k": k}
    sae = getattr(sae_lens, f"{name}TrainingSAE")(getattr(sae_lens, f"{name}TrainingSAEConfig")(**sizes))
    with torch.no_grad():
        sae.W_enc.copy_(data.W_enc.T)
        sae.W_dec.copy_(data.W_dec)
        sae.b_enc.copy_(data.b_enc * scale)
    if compiled:
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=batch_size * NEVER,
        device=device,
        autocast=device == "cuda",
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=batch_size,
        dead_feature_window=1000,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
    )

    def nothing() -> Iterator[Tensor]:
        yield from ()

    trainer = SAETrainer(config, sae, nothing())
    trainer.n_forward_passes_since_fired[d_sae - data.n_dead :] = NEVER

    def step(batch: Tensor) -> Any:
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        return output

    return step


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
        output = coder(batch)
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
