"""`SAETrainer`: one SAE, trained a batch at a time.

1. The first batch (or `initialise`, given a larger sample) settles the scale of each hook, after which rows have an
   expected norm of sqrt(d_in), b_dec, the sample's geometric median, and where the activation function starts.
2. Each `step` scales its batch, takes the gradient of the architecture's `training_loss`, takes out what would only
   change the norm of a decoder row, clips it, and lets Adam move the weights; then the decoder's rows are brought back
   to norm 1. A batch with a NaN or an Inf is refused before.
3. After it the sparsity coefficient moves towards the target L0 (`scope.training.sparsity`), and now and then, if asked
   for, dead features start anew (`scope.training.resampling`).
4. `export` folds the scales into the weights. As the decoder's rows have norm 1, one scale leaves W_enc and W_dec alone
   and divides the biases: the exported SAE takes raw activations, and its values are in the model's own units.

For SAEs and transcoders of TopK, BatchTopK and JumpReLU steps 1 and 2 go without autograd (`scope.training.fast`): the
same numbers, sooner, and a GPU is not waited for.

Several processes train one SAE as a `scope.training.team`: what is a sum over rows or features is one over theirs.

The trainer knows nothing of stores, files or logs; `scope.training.run` is the loop around it.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.errors import InvalidInputError, MismatchError, NonFiniteError
from scope.saes import registry
from scope.saes.base import SAE, Port, Ports, SAEMetadata, TrainingContext
from scope.saes.folding import fold_decoder_norm, fold_scales
from scope.saes.sharing import ALONE as SHARED_WITH_NOBODY
from scope.saes.sharing import FeatureShare, Sharing
from scope.training.config import TrainConfig
from scope.training.distributed_fast import fast_step_for
from scope.training.initialisation import centre_of, expected_norm_scale
from scope.training.resampling import resample
from scope.training.schedules import annealed_k, learning_rate_share
from scope.training.sparsity import FrequencyPenalty, SparsityController
from scope.training.team import ALONE, Team

__all__ = ["OVER_DENSE", "SAETrainer", "StepReport"]

OVER_DENSE = 0.1
"""A feature that fires on a larger share of the rows is over-dense."""


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
    """The loss's further terms, divided by d_in, by name ("auxk", "sparsity", "frequency", …)."""
    coefficient: Float[Tensor, ""] | None = None
    """Weight of the sparsity penalty in this step; None where the activation function has none."""
    over_dense: Float[Tensor, ""] | None = None
    """Features that fired on more than a tenth of the batch's rows."""


class SAETrainer:
    """Trains one SAE on batches of raw activations.

    Args:
        config: the settings.
        d_in: width of the activations, or all hooks that are read and written, with their widths.
        metadata: provenance for the SAE; its hook name is used in errors.
        reshape_activations: "hook_z" where the rows were flattened from heads x d_head.
        team: the processes that train this SAE together, each with a trainer of the same settings.

    Raises:
        UnknownNameError: there is no such architecture.
        InvalidInputError: the device cannot be used, or the architecture does not read or write so many hooks.

    Attributes:
        sae: the SAE in training, in scaled units, with this process's features. Use `export` for one that takes raw
            activations.
        scales: the factors that raw activations are multiplied by, of each input and then of each output that is no
            input; None before the first batch.
        steps_done, tokens_done: how far the run is.
    """

    def __init__(
        self,
        config: TrainConfig,
        d_in: int | Ports,
        metadata: SAEMetadata | None = None,
        reshape_activations: str = "none",
        team: Team = ALONE,
    ) -> None:
        _require_device(config.device)
        self.config, self.team = config, team
        self.metadata = metadata or SAEMetadata()
        self.ports = Ports((Port(self.metadata.hook_name, d_in),), ()) if isinstance(d_in, int) else d_in
        sae_class, config_class = registry.get(config.arch), registry.config_of(config.arch)
        cfg = config_class.for_training(
            **config_class.shape_of(self.ports),
            d_sae=config.d_sae,
            k=config.k,
            metadata=self.metadata,
            reshape_activations=reshape_activations,
            **config.architecture_options(config_class),
        )
        generator = torch.Generator().manual_seed(config.seed)
        config.require_divisible(team.features.stride, getattr(cfg, "n_layers", 1))
        self.sae: SAE = sae_class(cfg, initialise=False, device=config.device, share=team.features)
        self._by_feature = {"W_enc", "W_dec", *self.sae.activation.parameters}
        self.sae.initialise(generator, tied=config.tied_init)
        config.require_fits(self.sae.activation.coefficient is not None)
        with torch.no_grad():
            self.sae.W_enc.mul_(config.init_encoder_scale)
        # Adam works on contiguous views of the same memory: W_enc is laid out by feature.
        self._rows = {name: _by_rows(name, tensor.detach()) for name, tensor in self.sae.named_parameters()}
        groups = [
            {"params": [row], "factor": config.threshold_lr if name == "threshold" else 1.0}
            for name, row in self._rows.items()
        ]
        self.optimiser = torch.optim.Adam(groups, lr=config.peak_lr, betas=(config.beta1, config.beta2), fused=True)
        self.controller = SparsityController.of(config, self.sae)
        self.frequency = FrequencyPenalty.of(config, self.sae)
        self.scales: tuple[float, ...] | None = None
        self.steps_done = 0
        self.tokens_done = 0
        self.tokens_since_fired = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=config.device)
        self.firings = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=config.device)
        self.firing_tokens = 0
        self.fast = fast_step_for(self)

    @property
    def scale(self) -> float | None:
        """The factor that raw activations of the first input are multiplied by; None before the first batch."""
        return self.scales[0] if self.scales else None

    @torch.no_grad()
    def initialise(
        self, sample: Float[Tensor, "rows *width"], target: Float[Tensor, "rows d_out"] | None = None
    ) -> None:
        """Settle the scales, b_dec and the activation function's start from a sample of raw activations.

        Every process of a team is given the whole sample.
        """
        raw = [part for part in (self._raw(sample), self._raw_target(target)) if part is not None]
        for part in raw:
            self.require_finite(part)
        parts = [part for rows, ports in zip(raw, self.ports, strict=False) for part in _split(rows, ports)]
        self.scales = tuple(expected_norm_scale(part) if self.config.scale_inputs else 1.0 for part in parts)
        scaled = [self._scaled(rows, number) for number, rows in enumerate(raw)]
        self.sae.settle(scaled[0], centre_of(scaled[-1], self.config.b_dec_init), self.config.k, self._feature_sharing)
        # All computed the same; but replicas on several devices must not differ by a bit, or they part.
        scales = torch.tensor(self.scales, dtype=torch.float64)
        replicated = [name for name in self.sae.state_dict() if name not in self._by_feature or not self._divided]
        whole = [self._own_state(name) for name in replicated]
        self.team.take_over([scales, *whole])
        self.scales = tuple(scales.tolist())

    @property
    def _divided(self) -> bool:
        """Whether other processes have other features."""
        return self.team.features.stride > 1

    @property
    def _feature_sharing(self) -> Sharing:
        return self.team if self._divided else SHARED_WITH_NOBODY

    def step(
        self,
        batch: Float[Tensor, "batch *width"],
        rows: Any = None,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> StepReport:
        """Train on a batch of raw activations.

        Args:
            batch: the activations, any floating dtype; those of several inputs side by side. Of a team that divides
                rows, this process's part of the batch.
            rows: their row ids, for the error message.
            target: what a transcoder is to write, the outputs side by side; None where the inputs are reconstructed.

        Raises:
            MismatchError: the batch has another width than the SAE.
            NonFiniteError: the batch holds a NaN or an Inf, or the gradient became one; the weights are untouched.
                On a GPU it may come up to two steps later (`scope.training.fast`).
        """
        if self.fast is not None:
            return self.fast.step(self._rows_of(batch), rows, self._target_of(target))
        raw, raw_target = self._raw(batch), self._raw_target(target)
        given = [part for part in (raw, raw_target) if part is not None]
        finite = torch.stack([torch.isfinite(part.sum(dtype=torch.float32)) for part in given]).all()
        team, (n_rows, fine) = self.team, self.team.opening(len(raw), finite)
        if not fine:
            for part in given:
                self.require_finite(part, rows)
        if self.scales is None:
            self.initialise(team.all_rows(raw), None if raw_target is None else team.all_rows(raw_target))
        x = self._scaled(raw, 0)
        y = x if raw_target is None else self._scaled(raw_target, 1)
        config = self.config
        k = annealed_k(self.steps_done, config.steps, config.k, config.k_start_for(), config.k_anneal)
        dead = self.tokens_since_fired >= config.dead_after
        coefficient = self.controller.coefficient(self.steps_done) if self.controller else None
        n_dead = team.total_over_features(dead.sum())
        context = TrainingContext(
            dead=dead if config.auxk_coefficient and bool(n_dead > 0) else None,
            auxk_coefficient=config.auxk_coefficient,
            k_aux=config.k_aux_for(self.sae.d_out),
            sparsity_coefficient=coefficient if coefficient is not None else 0.0,
            k=k,
            frequency_weights=self.frequency.weights() if self.frequency else None,
            n_dead=int(n_dead),
            n_rows=n_rows,
            sharing=team,
        )
        with torch.enable_grad(), self._autocast():
            loss = self.sae.training_loss(x, context, None if raw_target is None else y)
        weight = len(x) / n_rows
        loss.total.backward(torch.full_like(loss.total, weight))
        learning_rate = config.peak_lr * learning_rate_share(self.steps_done, config.steps, config.warmup, config.decay)
        grad_norm = self._move(learning_rate)
        terms = {"loss": loss.total.detach(), "error": loss.squared_error, **loss.parts}
        means = torch.stack([term.float() for term in terms.values()]) * weight
        sums = torch.cat([loss.counts.float(), y.sum(dim=0), y.square().sum()[None], means])
        of_rows = (self.sae.d_sae, self.sae.d_out, 1, len(means))
        counts, total, squares, means = team.sum_over_rows(sums).split(of_rows)
        counts = counts.long()
        self.sae.activation.after_step(self.sae, counts)
        self._count(counts, n_rows)
        of_features = torch.stack([counts.sum(), (counts > OVER_DENSE * n_rows).sum()])
        fired, over_dense = team.total_over_features(of_features)
        if self.controller:
            self.controller.observe(self.steps_done, fired / n_rows, k)
        if self.frequency:
            self.frequency.observe(counts, n_rows)
        if config.resample_steps and self.steps_done % config.resample_steps == 0:
            self._resample(team.all_rows(x), team.all_rows(y))
        mean_of = dict(zip(terms, means / self.sae.d_out, strict=True))
        return StepReport(
            step=self.steps_done,
            tokens=self.tokens_done,
            learning_rate=learning_rate,
            loss=mean_of.pop("loss"),
            grad_norm=grad_norm,
            fvu=mean_of.pop("error") * self.sae.d_out * n_rows / (squares[0] - total.square().sum() / n_rows),
            l0=fired / n_rows,
            dead=n_dead.float(),
            parts=mean_of,
            coefficient=coefficient,
            over_dense=over_dense.float(),
        )

    @torch.no_grad()
    def export(self) -> SAE:
        """A copy of the SAE that takes raw activations and gives values in the model's own units, on the CPU, in the
        form that it is stored and used in (BatchTopK becomes JumpReLU).

        Where processes have different features, all must call it: the first gets the whole, the others their own.
        """
        self._settle()
        share = FeatureShare() if self.team.leads else self.team.features
        sae = type(self.sae)(self.sae.cfg, initialise=False, share=share)
        for name, tensor in sae.state_dict().items():
            _by_rows(name, tensor).copy_(self._whole(name, self._own_state(name)))
        if self.config.decoder_norm == "free":
            fold_decoder_norm(sae)
        if self.scales is not None:
            n = len(self.ports.inputs)
            fold_scales(sae, self.scales[:n], self.scales[n:])
        return sae.for_inference()

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, Adam's state and firing counters, by name: with `counters`, all that a later step depends on.

        Where processes have different features, all must call it: the first gets those of all, the others their own.
        """
        self._settle()
        return {name: self._whole(name, tensor) for name, tensor in self._own_tensors().items()}

    def _own_tensors(self) -> dict[str, Tensor]:
        tensors = {"tokens_since_fired": self.tokens_since_fired, "firings": self.firings}
        for name, row in self._rows.items():
            tensors[name] = row
            for key, value in self.optimiser.state[row].items():
                tensors[f"adam.{key}.{name}"] = value
        return {**tensors, **self._further_state()}

    def _own_state(self, name: str) -> Tensor:
        """A tensor of the SAE's `state_dict`, with features as its rows where it has features."""
        return self._rows[name] if name in self._rows else dict(self.sae.named_buffers())[name]

    def _has_features(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor of the state has a row for each feature."""
        counts = ("tokens_since_fired", "firings", "frequency.shares")
        return tensor.ndim > 0 and (name in counts or name.rpartition(".")[2] in self._by_feature)

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        return self.team.all_features(tensor) if self._has_features(name, tensor) else tensor

    def _further_state(self) -> dict[str, Tensor]:
        """Buffers of the SAE, and what the sparsity control and the frequency penalty remember."""
        state = dict(self.sae.named_buffers())
        for part in (self.controller, self.frequency):
            state |= part.state() if part else {}
        return state

    def counters(self) -> dict[str, Any]:
        """Scale and counts, JSON-able."""
        self._settle()
        return {
            **(self.fast.counters() if self.fast else {}),
            "scales": list(self.scales) if self.scales else None,
            "steps_done": self.steps_done,
            "tokens_done": self.tokens_done,
            "firing_tokens": self.firing_tokens,
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Take over `state_tensors` and `counters` of another trainer with the same settings, however many processes
        it had."""
        if self._divided:  # Adam's fused step takes its moments to be contiguous
            own = self.team.features.of
            tensors = {
                n: own(part).contiguous() if self._has_features(n, part) else part for n, part in tensors.items()
            }
        self.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        self.firings.copy_(tensors["firings"])
        for name, row in self._rows.items():
            row.copy_(tensors[name])
            keys = [key.split(".")[1] for key in tensors if key.startswith("adam.") and key.endswith(f".{name}")]
            self.optimiser.state[row] = {key: tensors[f"adam.{key}.{name}"].to(row.device) for key in keys}
        for name, tensor in self._further_state().items():
            tensor.copy_(tensors[name])
        self.scales = tuple(counters["scales"]) if counters["scales"] else None
        self.steps_done, self.tokens_done = counters["steps_done"], counters["tokens_done"]
        self.firing_tokens = counters["firing_tokens"]
        if self.fast:
            self.fast.restore(counters)

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of rows on which each feature fired, over the run's decay (or all of it, where there was none).

        Where processes have different features, all must ask for it: the first gets those of all, the others their own.
        """
        return self.team.all_features(self.firings).double().cpu() / max(1, self.firing_tokens)

    @property
    def dead_share(self) -> float:
        """Share of features that count as dead; all processes must ask for it."""
        dead = self.team.total_over_features((self.tokens_since_fired >= self.config.dead_after).sum())
        return int(dead) / self.config.d_sae

    def require_finite(self, batch: Float[Tensor, "batch *width"], rows: Any = None) -> None:
        """Raise `NonFiniteError` that names the hook and the rows (also as `error.rows`) if any entry is not finite.

        In a team all members call it, and all raise.
        """
        if self.team.all_true(torch.isfinite(batch.sum(dtype=torch.float32))):
            return
        own = (~torch.isfinite(batch.flatten(1)).all(dim=-1)).nonzero().flatten().tolist()
        named = bad = self.team.all_listed(own if rows is None else [int(rows[i]) for i in own])
        if not bad:
            return
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

    def require_finite_weights(self) -> None:
        """Raise `NonFiniteError` that names the first of the weights and Adam's moments with a NaN or an Inf in it.

        In a team all members call it, and all raise.
        """
        self._settle()
        floating = {name: part for name, part in self._own_tensors().items() if part.is_floating_point()}
        finite = [torch.isfinite(part).all() for part in floating.values()]
        if self.team.all_true(torch.stack(finite).all()):
            return
        for name, part in zip(floating, finite, strict=True):
            if not self.team.all_true(part):
                raise NonFiniteError(
                    f"{name} holds a NaN or an Inf after step {self.steps_done:,}. Lower the learning rate; the last "
                    "checkpoint, where there is one, is from before."
                )

    def _settle(self) -> None:
        if self.fast is not None:
            self.fast.settle()

    def _scaled(self, rows: Tensor, number: int) -> Tensor:
        """Raw inputs (number 0) or outputs (1) times the scale of each port."""
        assert self.scales is not None
        ports, first = self.ports[number], 0 if number == 0 else len(self.ports.inputs)
        if len(ports) == 1:
            return rows * self.scales[first]
        scaled = [part * self.scales[first + i] for i, part in enumerate(_split(rows, ports))]
        return torch.cat(scaled, dim=-1)

    def _raw_target(self, target: Tensor | None) -> Tensor | None:
        rows = self._target_of(target)
        return None if rows is None else rows.to(self.config.device, torch.float32)

    def _target_of(self, target: Tensor | None) -> Tensor | None:
        """The target's rows; None where the inputs are what is written."""
        if not self.ports.outputs:
            return None
        width = sum(port.width for port in self.ports.outputs)
        if target is None or target.ndim != 2 or target.shape[-1] != width:
            got = "none" if target is None else f"shape {tuple(target.shape)}"
            raise MismatchError(f"The target has {got}; expected rows of width {width:,}, the outputs side by side.")
        return target

    @torch.no_grad()
    def _resample(self, x: Tensor, y: Tensor) -> None:
        if self.steps_done > (1 - self.config.decay) * self.config.steps:
            return  # too late to learn anything
        dead = (self.tokens_since_fired >= self.config.dead_after).nonzero().flatten()
        generator = torch.Generator().manual_seed(self.config.seed + self.steps_done)
        started = resample(self.sae, dead, x, y, generator)
        self.tokens_since_fired[started] = 0
        for name, row in self._rows.items():
            if name in ("W_enc", "W_dec", *self.sae.activation.parameters):
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimiser.state[row][moment][started] = 0

    def _raw(self, batch: Tensor) -> Tensor:
        return self._rows_of(batch).to(self.config.device, torch.float32)

    def _rows_of(self, batch: Tensor) -> Tensor:
        flat = batch.flatten(1) if batch.ndim > 2 else batch
        if flat.ndim != 2 or flat.shape[-1] != self.sae.d_in:
            raise MismatchError(
                f"The batch has shape {tuple(batch.shape)}; expected rows of width {self.sae.d_in:,} (d_in)."
            )
        return flat

    @torch.no_grad()
    def _move(self, learning_rate: float) -> Tensor:
        gradients: dict[str, Tensor] = {}
        for name, parameter in self.sae.named_parameters():
            assert parameter.grad is not None
            self._rows[name].grad = gradients[name] = _by_rows(name, parameter.grad)
        self.team.sum_gradients(list(gradients.values()))
        unit_rows = self.config.decoder_norm == "unit"
        if unit_rows:
            along = (gradients["W_dec"] * self.sae.W_dec).sum(dim=-1, keepdim=True)
            gradients["W_dec"].addcmul_(along, self.sae.W_dec, value=-1)
        norms = torch.stack([gradient.norm() for gradient in gradients.values()])
        if self._divided:
            own = torch.tensor([name in self._by_feature for name in self._rows], device=norms.device)
            norms = torch.where(own, self.team.total_over_features(norms.square()).sqrt(), norms)
        grad_norm = norms.norm() / self.sae.d_out
        if not torch.isfinite(grad_norm):
            self.sae.zero_grad(set_to_none=True)
            raise self.gradient_error()
        if self.config.clip_grad_norm and grad_norm > self.config.clip_grad_norm:
            for gradient in gradients.values():
                gradient.mul_(self.config.clip_grad_norm / grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.sae.zero_grad(set_to_none=True)
        if unit_rows:
            self.sae.normalise_decoder()
        return grad_norm

    @torch.no_grad()
    def _count(self, counts: Tensor, n_rows: int) -> None:
        self.tokens_since_fired.add_(n_rows).masked_fill_(counts > 0, 0)
        self.steps_done += 1
        self.tokens_done += n_rows
        if self.steps_done > (1 - self.config.decay) * self.config.steps or not self.config.decay:
            self.firings += counts
            self.firing_tokens += n_rows

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.product_dtype == "bfloat16":
            return torch.autocast(torch.device(self.config.device).type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(f"The device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _split(rows: Tensor, ports: tuple[Port, ...]) -> tuple[Tensor, ...]:
    return rows.split([port.width for port in ports], dim=-1)


def _by_rows(name: str, tensor: Tensor) -> Tensor:
    """A parameter, or its gradient, contiguous and with features as its rows; over the same memory where it can be."""
    return (tensor.T if name == "W_enc" else tensor).contiguous()
