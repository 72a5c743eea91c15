"""`SAETrainer`: one SAE, trained a batch at a time.

1. The first batch (or `initialise`, given a larger sample) settles the scale, after which rows have an expected norm of
   sqrt(d_in), and b_dec, the sample's geometric median.
2. Each `step` scales its batch, takes the gradient of the architecture's `training_loss`, takes out what would only
   change the norm of a decoder row, clips it, and lets Adam move the weights; then the decoder's rows are brought back
   to norm 1. A batch with a NaN or an Inf is refused before.
3. `export` folds the scale into the weights. As the decoder's rows have norm 1, that leaves W_enc and W_dec alone and
   divides the biases: the exported SAE takes raw activations, and its values are in the model's own units.

For TopK step 2 goes without autograd (`scope.training.fast`): the same numbers, sooner, and a GPU is not waited for.

The trainer knows nothing of stores, files or logs; `scope.training.run` is the loop around it.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, NonFiniteError
from scope.saes import registry
from scope.saes.base import SAE, SAEMetadata, TrainingContext
from scope.training.config import TrainConfig
from scope.training.fast import FastStep, supports_fast_step
from scope.training.initialisation import expected_norm_scale, geometric_median
from scope.training.schedules import learning_rate_share

__all__ = ["SAETrainer", "StepReport"]


class StepReport(NamedTuple):
    """What a step did. The tensors are on the trainer's device, so that reading them is what makes it wait."""

    step: int
    """Steps done, this one included."""
    tokens: int
    """Rows trained on, this step's included."""
    learning_rate: float
    """Adam's learning rate in this step."""
    loss: Float[Tensor, ""]
    """The loss divided by d_in: with scaled rows, about the share of the mean square that is left."""
    grad_norm: Float[Tensor, ""]
    """Norm of that loss's gradient before clipping."""
    fvu: Float[Tensor, ""]
    """Residual sum of squares / total sum of squares about the batch's mean."""
    l0: Float[Tensor, ""]
    """Features that fired on a row, on average."""
    dead: Float[Tensor, ""]
    """Features that counted as dead at this step."""
    parts: dict[str, Float[Tensor, ""]]
    """The loss's further terms, divided by d_in, by name ("auxk")."""


class SAETrainer:
    """Trains one SAE on batches of raw activations.

    Args:
        config: the settings.
        d_in: width of the activations.
        metadata: provenance for the SAE; its hook name is used in errors.
        reshape_activations: "hook_z" where the rows were flattened from heads x d_head.

    Raises:
        UnknownNameError: there is no such architecture.
        InvalidInputError: the device cannot be used.

    Attributes:
        sae: the SAE in training, in scaled units. Use `export` for one that takes raw activations.
        scale: the factor that raw activations are multiplied by; None before the first batch.
        steps_done, tokens_done: how far the run is.
    """

    def __init__(
        self,
        config: TrainConfig,
        d_in: int,
        metadata: SAEMetadata | None = None,
        reshape_activations: str = "none",
    ) -> None:
        _require_device(config.device)
        self.config = config
        self.metadata = metadata or SAEMetadata()
        sae_class, config_class = registry.get(config.arch), registry.config_of(config.arch)
        cfg = config_class.for_training(
            d_in=d_in,
            d_sae=config.d_sae,
            k=config.k,
            metadata=self.metadata,
            reshape_activations=reshape_activations,
        )
        generator = torch.Generator().manual_seed(config.seed)
        self.sae: SAE = sae_class(cfg, generator=generator, device=config.device)
        with torch.no_grad():
            self.sae.W_enc.mul_(config.init_encoder_scale)
        # Adam works on contiguous views of the same memory: W_enc is laid out by feature.
        self._rows = {name: _by_rows(tensor.detach()) for name, tensor in self.sae.named_parameters()}
        self.optimiser = torch.optim.Adam(
            self._rows.values(), lr=config.peak_lr, betas=(config.beta1, config.beta2), fused=True
        )
        self.scale: float | None = None
        self.steps_done = 0
        self.tokens_done = 0
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=config.device)
        self.firings = torch.zeros(config.d_sae, dtype=torch.int64, device=config.device)
        self.firing_tokens = 0
        self.fast = FastStep(self) if supports_fast_step(self) else None

    @torch.no_grad()
    def initialise(self, sample: Float[Tensor, "rows *width"]) -> None:
        """Settle the scale and b_dec from a sample of raw activations."""
        rows = self._checked(sample)
        self.scale = expected_norm_scale(rows)
        self.sae.b_dec.copy_(geometric_median(rows * self.scale))

    def step(self, batch: Float[Tensor, "batch *width"], rows: Any = None) -> StepReport:
        """Train on a batch of raw activations.

        Args:
            batch: the activations, any floating dtype.
            rows: their row ids, for the error message.

        Raises:
            MismatchError: the batch has another width than the SAE.
            NonFiniteError: the batch holds a NaN or an Inf, or the gradient became one; the weights are untouched.
                On a GPU it may come up to two steps later (`scope.training.fast`).
        """
        if self.fast is not None:
            return self.fast.step(self._rows_of(batch), rows)
        raw = self._checked(batch, rows)
        if self.scale is None:
            self.initialise(raw)
        assert self.scale is not None
        x = raw * self.scale
        dead = self.tokens_since_fired >= self.config.dead_after
        context = TrainingContext(
            dead=dead if self.config.auxk_coefficient and bool(dead.any()) else None,
            auxk_coefficient=self.config.auxk_coefficient,
            k_aux=self.config.k_aux_for(self.sae.d_in),
        )
        with torch.enable_grad(), self._autocast():
            loss = self.sae.training_loss(x, context)
        loss.total.backward()
        learning_rate = self.config.peak_lr * learning_rate_share(
            self.steps_done, self.config.steps, self.config.warmup, self.config.decay
        )
        grad_norm = self._move(learning_rate)
        fired = self._count(loss.features.ids, loss.features.values)
        d_in = self.sae.d_in
        return StepReport(
            step=self.steps_done,
            tokens=self.tokens_done,
            learning_rate=learning_rate,
            loss=loss.total.detach() / d_in,
            grad_norm=grad_norm,
            fvu=loss.squared_error * len(x) / (x.norm().square() - len(x) * x.mean(dim=0).norm().square()),
            l0=fired / len(x),
            dead=dead.sum().float(),
            parts={name: value / d_in for name, value in loss.parts.items()},
        )

    @torch.no_grad()
    def export(self) -> SAE:
        """A copy of the SAE that takes raw activations and gives values in the model's own units, on the CPU."""
        self._settle()
        scale = self.scale or 1.0
        sae = type(self.sae)(self.sae.cfg, initialise=False)
        sae.load_state_dict(self.sae.state_dict())
        for bias in (sae.b_enc, sae.b_dec):
            bias.div_(scale)
        return sae

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, Adam's state and firing counters, by name: with `counters`, all that a later step depends on."""
        self._settle()
        tensors = {"tokens_since_fired": self.tokens_since_fired, "firings": self.firings}
        for name, row in self._rows.items():
            tensors[name] = row
            for key, value in self.optimiser.state[row].items():
                tensors[f"adam.{key}.{name}"] = value
        return tensors

    def counters(self) -> dict[str, Any]:
        """Scale and counts, JSON-able."""
        self._settle()
        return {
            **(self.fast.counters() if self.fast else {}),
            "scale": self.scale,
            "steps_done": self.steps_done,
            "tokens_done": self.tokens_done,
            "firing_tokens": self.firing_tokens,
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Take over `state_tensors` and `counters` of another trainer with the same settings."""
        self.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        self.firings.copy_(tensors["firings"])
        for name, row in self._rows.items():
            row.copy_(tensors[name])
            keys = [key.split(".")[1] for key in tensors if key.startswith("adam.") and key.endswith(f".{name}")]
            self.optimiser.state[row] = {key: tensors[f"adam.{key}.{name}"].to(row.device) for key in keys}
        self.scale = counters["scale"]
        self.steps_done, self.tokens_done = counters["steps_done"], counters["tokens_done"]
        self.firing_tokens = counters["firing_tokens"]
        if self.fast:
            self.fast.restore(counters)

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of rows on which each feature fired, over the run's decay (or all of it, where there was none)."""
        return self.firings.double().cpu() / max(1, self.firing_tokens)

    def require_finite(self, batch: Float[Tensor, "batch *width"], rows: Any = None) -> None:
        """Raise `NonFiniteError` that names the hook and the rows (also as `error.rows`) if any entry is not finite."""
        if torch.isfinite(batch.sum(dtype=torch.float32)):
            return
        bad = (~torch.isfinite(batch.flatten(1)).all(dim=-1)).nonzero().flatten().tolist()
        if not bad:
            return
        named = bad if rows is None else [int(rows[i]) for i in bad]
        where = f" at {self.metadata.hook_name}" if self.metadata.hook_name else ""
        listed = ", ".join(map(str, named[:5])) + (" …" if len(named) > 5 else "")
        error = NonFiniteError(
            f"{len(bad):,} rows of a batch hold a NaN or an Inf{where}: {'positions' if rows is None else 'rows'} "
            f"{listed} (step {self.steps_done + 1:,}). The weights were not stepped on them."
        )
        error.rows = [] if rows is None else named  # type: ignore[attr-defined]
        raise error

    def gradient_error(self) -> NonFiniteError:
        """What is raised for a gradient that is not finite."""
        return NonFiniteError(
            f"The gradient of step {self.steps_done + 1:,} is not finite. The weights were not stepped on it; "
            "lower the learning rate, or look for extreme activations."
        )

    def _settle(self) -> None:
        if self.fast is not None:
            self.fast.settle()

    def _checked(self, batch: Tensor, rows: Any = None) -> Tensor:
        flat = self._rows_of(batch).to(self.config.device, torch.float32)
        self.require_finite(flat, rows)
        return flat

    def _rows_of(self, batch: Tensor) -> Tensor:
        flat = batch.flatten(1) if batch.ndim > 2 else batch
        if flat.ndim != 2 or flat.shape[-1] != self.sae.d_in:
            raise MismatchError(
                f"The batch has shape {tuple(batch.shape)}; expected rows of width {self.sae.d_in:,} (d_in)."
            )
        return flat

    @torch.no_grad()
    def _move(self, learning_rate: float) -> Tensor:
        assert self.sae.W_dec.grad is not None
        along = (self.sae.W_dec.grad * self.sae.W_dec).sum(dim=-1, keepdim=True)
        self.sae.W_dec.grad.addcmul_(along, self.sae.W_dec, value=-1)
        for name, parameter in self.sae.named_parameters():
            assert parameter.grad is not None
            self._rows[name].grad = _by_rows(parameter.grad)
        norms = torch.stack([row.grad.norm() for row in self._rows.values() if row.grad is not None])
        grad_norm = norms.norm() / self.sae.d_in
        if not torch.isfinite(grad_norm):
            self.sae.zero_grad(set_to_none=True)
            raise self.gradient_error()
        if self.config.clip_grad_norm and grad_norm > self.config.clip_grad_norm:
            for row in self._rows.values():
                assert row.grad is not None
                row.grad.mul_(self.config.clip_grad_norm / grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.sae.zero_grad(set_to_none=True)
        self.sae.W_dec.div_(self.sae.W_dec.norm(dim=-1, keepdim=True))
        return grad_norm

    @torch.no_grad()
    def _count(self, ids: Tensor, values: Tensor) -> Tensor:
        firing = ids[values > 0]
        counts = torch.bincount(firing, minlength=self.sae.d_sae)
        n_rows = len(ids)
        self.tokens_since_fired.add_(n_rows).masked_fill_(counts > 0, 0)
        self.steps_done += 1
        self.tokens_done += n_rows
        if self.steps_done > (1 - self.config.decay) * self.config.steps or not self.config.decay:
            self.firings += counts
            self.firing_tokens += n_rows
        return counts.sum()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.product_dtype == "bfloat16":
            return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(f"The device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _by_rows(tensor: Tensor) -> Tensor:
    """A contiguous tensor over the same memory where there is one."""
    return tensor.T if tensor.ndim == 2 and tensor.T.is_contiguous() else tensor.contiguous()
