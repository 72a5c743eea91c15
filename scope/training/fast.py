"""`FastStep`: the trainer's step for TopK, BatchTopK and JumpReLU, without autograd and without waiting for the device.

It computes what `SAETrainer` computes through autograd, with gradients written down by hand. With B rows, f the sparse
features, y what is to be written (x itself, or a transcoder's target, whose encoder sees x without b_dec taken off),
r = y_hat - y, and "at f" the entries of each row:

1. `centre` the rows; pre = (scale x - b_dec) W_enc + b_enc, in the compute dtype; the entries are what fires, for
   JumpReLU also what lies in a threshold's window (`scope.training.selection`).
2. r, and the gradient at f: (2/B) r · W_dec at f, where f > 0. JumpReLU's estimators make of it the gradients of
   pre-activations and thresholds, and add those of its penalty.
3. AuxK (Gao et al. 2024, A.2) over the dead features, which are few enough for dense products: ê from their k_aux
   largest pre-activations on each row, and the gradients of share x coefficient ‖r + ê‖² / B.
4. dW_dec = (2/B) fᵀ r and dW_enc = (gradient at f)ᵀ (scale x - b_dec), rows of active features only; db_enc and what
   of dW_dec lies along its rows come from sums over entries; db_dec = (2/B) Σ r, for an SAE less W_enc db_enc.
5. The norm of all this, and from it the clipping factor, stay on the device; so does the check for NaN and Inf.
6. Adam moves the weights (`scope.kernels.adam`), every feature's moments included, and renews their copies in the
   compute dtype.

The host reads what a step found `LAG` steps later, when the device has long finished it: whether its rows and its
gradient were finite, and how many features were dead. Until then a step that met a NaN has moved nothing, and neither
has any step after it. The number of dead features sizes the products of AuxK, so that a feature which died within the
last `LAG` steps may wait as long for its first aid. The fullest row says how many entries a row of a JumpReLU may have
`LAG` steps later. Checkpoints hold these numbers, and a resumed run does the same.

On the CPU the same code waits for nothing (its lag is 0). All sums are in a fixed order.

What several processes exchange in a step is in `scope.training.distributed_fast`, which overrides some of the methods.
"""

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope.kernels import step as products
from scope.kernels.adam import adam_rows
from scope.kernels.tensors import has_triton
from scope.kernels.topk import keep_largest, linear_topk
from scope.saes.batchtopk import BatchTopKSAE, followed_threshold
from scope.saes.jumprelu import JumpReLUSAE
from scope.saes.topk import TopKSAE
from scope.saes.transcoder import Transcoder
from scope.training.schedules import learning_rate_share
from scope.training.selection import (
    Estimates,
    Selected,
    estimate,
    next_width,
    select_batchtopk,
    select_jumprelu,
)

if TYPE_CHECKING:
    from scope.training.trainer import SAETrainer, StepReport

__all__ = ["FastStep", "supports_fast_step"]

LAG = 2
"""Steps between a step on a GPU and the host's reading what it found: one that runs, one that waits in the queue."""
AUX_MULTIPLE = 256
"""On a GPU the dead features that AuxK takes are padded to a multiple of this, which tensor cores like."""
ARCHITECTURES = (TopKSAE, BatchTopKSAE, JumpReLUSAE, Transcoder)
MAX_AUX = 16_384
"""Dead features that AuxK takes in one step, at most: with more, those with the lowest ids."""


def supports_fast_step(trainer: "SAETrainer") -> bool:
    """Whether this trainer's settings are ones that `FastStep` computes: an SAE or a transcoder of TopK, BatchTopK or
    JumpReLU, on a GPU in bfloat16, where there is Triton, or on the CPU; nothing but the gradient, the sparsity
    penalty, AuxK, and Adam with unit decoder rows."""
    sae, config = trainer.sae, trainer.config
    if (
        type(sae) not in ARCHITECTURES
        or sae.activation.name not in ("topk", "batchtopk", "jumprelu")
        or sae.dtype != torch.float32
    ):
        return False
    if len(trainer.ports.inputs) != 1 or not config.is_plain:
        return False
    if sae.device.type == "cuda":
        return config.product_dtype == "bfloat16" and has_triton()
    return sae.device.type == "cpu"


class _Entries(NamedTuple):
    """What fires, and what the gradients need of it."""

    weights: Tensor
    """(2/B) x value."""
    at_f: Tensor
    """The gradient of the pre-activation."""
    ids: Tensor
    groups: products.EntryGroups
    sums: products.FeatureSums
    """Its `bias_gradient` is the sum of `at_f`."""
    threshold_gradient: Tensor | None


class _Aux(NamedTuple):
    """AuxK's part of a step."""

    loss: Tensor
    slots: Tensor
    """For each feature its place among the dead ones taken, or -1; int32."""
    dec: Tensor
    enc: Tensor
    bias_gradient: Tensor
    along: Tensor


class _Pending(NamedTuple):
    """A step whose findings the host has not read."""

    found: Tensor
    """On the host, once `event` is done: rows finite, gradient finite, dead features, entries of the fullest row."""
    event: Any
    given: tuple[Tensor, ...]
    """The raw batch, and a transcoder's target."""
    rows: Any
    before: tuple[int, int, int]
    """The trainer's counts before the step."""


class FastStep:
    """The fast step of one trainer, which owns the weights, Adam's moments and the counts.

    Args:
        trainer: a trainer that `supports_fast_step`.
        lag: steps until the host reads what a step found.
    """

    def __init__(self, trainer: "SAETrainer", lag: int | None = None) -> None:
        self.trainer = trainer
        sae, config = trainer.sae, trainer.config
        self.lag = (LAG if sae.device.type == "cuda" else 0) if lag is None else lag
        self.dtype = getattr(torch, config.product_dtype)
        self.dead_counts: deque[tuple[int, int]] = deque(maxlen=self.lag + 1)
        """(steps done before, dead features) of the last steps that were read."""
        self.fullest: deque[tuple[int, int]] = deque(maxlen=self.lag + 1)
        """(steps done before, entries of the fullest row) of the same steps."""
        self._over_batch, self._jumps = sae.activation.name == "batchtopk", sae.activation.name == "jumprelu"
        self._pending: deque[_Pending] = deque()
        self._weights = trainer._rows
        for weight in self._weights.values():
            if not trainer.optimiser.state[weight]:
                trainer.optimiser.state[weight] = {
                    "step": torch.zeros((), dtype=torch.float32, device=sae.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        self._gradients = {
            name: torch.empty((sae.d_sae, width), dtype=self.dtype, device=sae.device)
            for name, width in (("W_enc", sae.d_in), ("W_dec", sae.d_out))
        }
        self._nothing = torch.zeros(sae.d_in, device=sae.device)
        self._copies: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._healthy = torch.ones((), device=sae.device)

    def counters(self) -> dict[str, Any]:
        """What of a later step depends on earlier ones, beside the trainer's own state; JSON-able."""
        return {
            "dead_counts": [list(pair) for pair in self.dead_counts],
            "fullest": [list(pair) for pair in self.fullest],
        }

    def restore(self, counters: dict[str, Any]) -> None:
        """Take over `counters`, and whatever weights the trainer has now."""
        for name in ("dead_counts", "fullest"):
            pairs = [(int(step), int(count)) for step, count in counters.get(name, [])]
            setattr(self, name, deque(pairs, maxlen=self.lag + 1))
        self._pending.clear()
        self._versions.clear()
        self._healthy.fill_(1.0)

    def settle(self) -> None:
        """Wait for all steps that were begun; raises `NonFiniteError` if one of them met a NaN or an Inf."""
        while self._pending:
            self._read(self._pending.popleft())
        for weight in self._weights.values():
            self.trainer.optimiser.state[weight]["step"].fill_(self.trainer.steps_done)

    @torch.no_grad()
    def step(
        self,
        batch: Float[Tensor, "batch d_in"],
        rows: Any = None,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> "StepReport":
        """Train on a batch of raw activations, as `SAETrainer.step` does.

        Raises:
            NonFiniteError: this batch, or (on a GPU) one of the last two, holds a NaN or an Inf, or its gradient does.
        """
        while self._pending and len(self._pending) >= max(1, self.lag):
            self._read(self._pending.popleft())
        trainer, config, sae = self.trainer, self.trainer.config, self.trainer.sae
        given = tuple(part.to(sae.device, non_blocking=True) for part in (batch, target) if part is not None)
        if trainer.scales is None:
            trainer.initialise(*(trainer.team.all_rows(part.float()) for part in given))
        assert trainer.scales is not None
        x, y = given[0], given[-1]
        self._renew_copies()
        n_rows = self._rows_of_all(len(x))
        before = (trainer.steps_done, trainer.tokens_done, trainer.firing_tokens)
        since = trainer.tokens_since_fired
        dead = since >= config.dead_after

        taken_off = sae.b_dec if sae.cfg.apply_b_dec_to_input else self._nothing
        centred, norms = products.centre(x, trainer.scales[0], taken_off, self.dtype)
        selected = self._encode(centred)
        values, _, counted, _ = selected
        residual, dots, squares = self._residual(y, selected)
        coefficient = trainer.controller.coefficient(trainer.steps_done) if trainer.controller else None
        entries, penalty = self._entries(selected, dots, coefficient)
        n_dead = self._over_features(dead.sum())
        aux = self._auxk(centred, residual, dead, n_dead) if config.auxk_coefficient else None
        of_y = norms.sum() if y is x else (y.float() * self._scale_out).square().sum()
        seen = torch.cat([torch.stack([squares.sum(), norms.sum(), of_y]), y.sum(dim=0, dtype=torch.float32)])
        error, of_x, square, total = self._over_rows(seen).split((1, 1, 1, sae.d_out))
        error = error[0] / n_rows
        parts = {} if penalty is None else {"sparsity": penalty}
        parts |= {"auxk": aux.loss} if aux else {}
        gradients, norms_of = self._gradient(centred, residual, entries, aux)
        grad_norm = torch.stack(norms_of).sum().sqrt() / sae.d_out
        rows_finite = torch.isfinite(of_x[0] + square[0])
        ok = rows_finite & torch.isfinite(grad_norm)
        self._healthy.mul_(ok)
        clip = (config.clip_grad_norm / grad_norm).clamp_max(1.0) if config.clip_grad_norm else torch.ones_like(error)
        learning_rate = self._move(gradients, torch.stack([clip, self._healthy]), entries.groups, aux)
        fires = self._over_rows(entries.sums.fired)
        fired, over_dense = self._count(fires, n_rows)
        self._follow(values, fired / n_rows)
        fullest = self._most(counted.sum(dim=1).max()) if counted is not None and self._jumps else n_dead
        self._note(torch.stack([rows_finite.float(), ok.float(), n_dead.float(), fullest.float()]), given, rows, before)
        mean = total * (self._scale_out / n_rows)
        parts = self._means(parts)
        if self.lag == 0:
            self._read(self._pending.popleft())
        from scope.training.trainer import StepReport  # which imports this module

        return StepReport(
            step=trainer.steps_done,
            tokens=trainer.tokens_done,
            learning_rate=learning_rate,
            loss=(error + sum(parts.values())) / sae.d_out,
            grad_norm=grad_norm,
            fvu=error * n_rows / (square[0] - n_rows * mean.square().sum()),
            l0=fired / n_rows,
            dead=n_dead.float(),
            parts={name: part / sae.d_out for name, part in parts.items()},
            coefficient=coefficient,
            over_dense=over_dense.float(),
        )

    @property
    def _scale_out(self) -> float:
        """The factor that what is to be written is multiplied by."""
        assert self.trainer.scales is not None
        return self.trainer.scales[-1]

    # What one process alone need not ask anybody; see `scope.training.distributed_fast`.

    def _rows_of_all(self, own: int) -> int:
        """Rows of the batch over all processes."""
        return own

    def _over_rows(self, tensor: Tensor) -> Tensor:
        """The sum over the whole batch of what is the sum over this process's rows."""
        return tensor

    def _over_features(self, tensor: Tensor) -> Tensor:
        """The sum over all features of what is the sum over this process's."""
        return tensor

    def _most(self, tensor: Tensor) -> Tensor:
        """The largest over all processes."""
        return tensor

    def _means(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss's further terms for the whole batch and all features."""
        return parts

    def _sum_rows(
        self,
        name: str,
        source: Tensor,
        weights: Tensor,
        entries: _Entries,
        slots: Tensor | None,
        further: Tensor | None,
    ) -> Tensor:
        """The gradient of a matrix: rows of `source` summed over each feature's entries; each row's squared norm."""
        ids, groups = entries.ids, entries.groups
        return products.feature_rows(source, weights, ids, groups, self._gradients[name], slots, further)

    def _residual(self, y: Tensor, selected: Selected) -> products.Residual:
        """What the decoder leaves over."""
        values, ids, counted, _ = selected
        W_dec, b_dec = self._copies["W_dec"], self.trainer.sae.b_dec
        return products.residual_and_dots(y, self._scale_out, values, ids, W_dec, b_dec, counted)

    def _aux_width(self, known: int, dead: Tensor) -> int:
        """How many dead features AuxK makes room for, where so many are known."""
        multiple = AUX_MULTIPLE if self.trainer.sae.device.type == "cuda" else 1
        return min(MAX_AUX, -(-known // multiple) * multiple, self.trainer.sae.d_sae)

    def _aux_kept(self, pre: Tensor, n_taken: Tensor, k_aux: int) -> Tensor:
        """ReLU of each row's k_aux largest of the dead features' pre-activations, of which the first n_taken count."""
        return keep_largest(pre, n_taken, k_aux)

    def _aux_left(self, residual: Tensor, f: Tensor, W_dec: Tensor) -> Tensor:
        """ê - e, as residual is -e."""
        return torch.addmm(residual, f, W_dec)

    def _encode(self, centred: Tensor) -> Selected:
        """The entries of each row."""
        sae, k, W = self.trainer.sae, self.trainer.config.k, self._copies["W_enc"]
        if self._jumps:
            width = next_width(self._found_then(self.fullest), k, sae.d_sae)
            return select_jumprelu(centred, W, sae.b_enc, sae.threshold, sae.cfg.bandwidth, width)  # type: ignore[attr-defined]
        if self._over_batch:
            return select_batchtopk(centred, W, sae.b_enc.to(self.dtype), k)
        values, ids = linear_topk(centred, W, sae.b_enc.to(self.dtype), k)
        return Selected(values.float().relu_(), ids.int())

    def _entries(self, selected: Selected, dots: Tensor, coefficient: Tensor | None) -> tuple[_Entries, Tensor | None]:
        """The gradients at the entries, and the sparsity penalty where there is one."""
        values, ids, counted, _ = selected
        d_sae, n_rows = self.trainer.sae.d_sae, len(values)
        at_values = torch.where(values > 0, dots * (2 / n_rows), 0.0)
        groups = products.group_entries(ids, d_sae, counted)
        sums = products.feature_sums(values, at_values, ids, groups)
        if coefficient is None:
            return _Entries(values * (2 / n_rows), at_values, ids, groups, sums, None), None
        found: Estimates = estimate(self.trainer.sae, selected, dots * (2 / n_rows), coefficient)
        at_threshold = products.feature_sums(values, found.at_threshold, ids, groups).bias_gradient
        bias = products.feature_sums(values, found.at_pre, ids, groups).bias_gradient
        entries = _Entries(
            values * (2 / n_rows), found.at_pre, ids, groups, sums._replace(bias_gradient=bias), at_threshold
        )
        return entries, found.penalty

    def _found_then(self, noted: deque[tuple[int, int]]) -> int | None:
        """What was noted of the step `lag` steps ago, or of the last one where the host may look."""
        return dict(noted).get(self.trainer.steps_done - max(1, self.lag))

    def _follow(self, values: Tensor, l0: Tensor) -> None:
        """What goes on beside the gradient: BatchTopK's running threshold, JumpReLU's L0 controller and its bounds.
        Nothing moves in a step that met a NaN."""
        trainer, sae = self.trainer, self.trainer.sae
        if self._over_batch:
            smallest = torch.where(values > 0, values, torch.inf).min()
            moved = followed_threshold(sae.threshold, -self._most(-smallest))
            sae.threshold.copy_(torch.where(self._healthy > 0, moved, sae.threshold))
        if trainer.controller:
            before = {name: tensor.clone() for name, tensor in trainer.controller.state().items()}
            trainer.controller.observe(trainer.steps_done, l0, trainer.config.k)
            for name, tensor in trainer.controller.state().items():
                tensor.copy_(torch.where(self._healthy > 0, tensor, before[name]))
        if self._jumps:
            sae.threshold.clamp_(min=0)

    def _auxk(self, centred: Tensor, residual: Tensor, dead: Tensor, n_dead: Tensor) -> _Aux | None:
        """Loss and gradients of AuxK; None while no feature was dead."""
        trainer, config, sae = self.trainer, self.trainer.config, self.trainer.sae
        known = int(n_dead) if self.lag == 0 else dict(self.dead_counts).get(trainer.steps_done - self.lag, 0)
        if not known:
            return None
        width = self._aux_width(known, dead)
        rank = dead.cumsum(0) - 1
        slots = torch.where(dead & (rank < width), rank, -1)
        ids = torch.zeros(width + 1, dtype=torch.int64, device=sae.device)
        ids.scatter_(0, torch.where(slots >= 0, slots, width), torch.arange(sae.d_sae, device=sae.device))
        ids = ids[:width]
        n_taken = dead.sum().clamp_max(width)
        k_aux, n_rows = config.k_aux_for(sae.d_out), len(centred)
        W_enc, W_dec = self._copies["W_enc"][ids], self._copies["W_dec"][ids]
        pre = torch.addmm(sae.b_enc[ids].to(self.dtype), centred, W_enc.T)
        f = self._aux_kept(pre, n_taken, k_aux)
        left = self._aux_left(residual, f, W_dec)
        # Few dead features explain little of the error; full weight would only make them noisy.
        weight = config.auxk_coefficient * (self._over_features(n_taken) / k_aux).clamp_max(1.0) / n_rows
        loss = weight * torch.linalg.vector_norm(left, dtype=torch.float32).square()
        left.mul_(2 * weight)
        at_f = torch.ops.aten.threshold_backward(left @ W_dec.T, f, 0)  # zero where f is
        dec = f.T @ left
        return _Aux(
            loss=loss,
            slots=slots.int(),
            dec=dec,
            enc=at_f.T @ centred,
            bias_gradient=at_f.sum(dim=0, dtype=torch.float32),
            along=(dec.float() * W_dec).sum(dim=1),
        )

    def _gradient(
        self,
        centred: Tensor,
        residual: Tensor,
        entries: _Entries,
        aux: _Aux | None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The gradients by name, with what of W_dec's lies along its rows; and the squares of their norms."""
        slots, dec, enc = (aux.slots, aux.dec, aux.enc) if aux else (None, None, None)
        sums, at_threshold = entries.sums, entries.threshold_gradient
        squares_dec = self._sum_rows("W_dec", residual, entries.weights, entries, slots, dec)
        squares_enc = self._sum_rows("W_enc", centred, entries.at_f, entries, slots, enc)
        bias, along = sums.bias_gradient, sums.along
        if aux:
            slot, has_slot = aux.slots.clamp_min(0).long(), aux.slots >= 0
            bias = bias + torch.where(has_slot, aux.bias_gradient[slot], 0.0)
            along = along + torch.where(has_slot, aux.along[slot], 0.0)
        b_dec = residual.sum(dim=0, dtype=torch.float32).mul_(2 / len(residual))
        if self.trainer.sae.cfg.apply_b_dec_to_input:
            b_dec -= self._over_features((bias.to(self.dtype) @ self._copies["W_enc"]).float())
        parts = [
            (squares_dec - along.square()).clamp_min(0).sum(),  # rows of norm 1: what is taken out along them
            squares_enc.sum(),
            bias.square().sum(),
            b_dec.square().sum(),
        ]
        gradients = {**self._gradients, "b_enc": bias, "b_dec": b_dec, "along": along}
        if at_threshold is not None:
            parts.append(at_threshold.square().sum())
            gradients["threshold"] = at_threshold
        return gradients, parts

    def _move(
        self,
        gradients: dict[str, Tensor],
        control: Tensor,
        groups: products.EntryGroups,
        aux: _Aux | None,
    ) -> float:
        """Adam on all weights; the learning rate."""
        trainer, config = self.trainer, self.trainer.config
        share = learning_rate_share(trainer.steps_done, config.steps, config.warmup, config.decay)
        learning_rate = config.peak_lr * share
        # On the CPU `feature_rows` writes every row, zeros too; on a GPU Adam reads active ones only.
        on_cuda = trainer.sae.device.type == "cuda"
        counts, slots = (groups.offsets.diff() if on_cuda else None), (aux.slots if aux else None)
        factors = {group["params"][0]: group["factor"] for group in trainer.optimiser.param_groups}
        for name, weight in self._weights.items():
            state = trainer.optimiser.state[weight]
            sparse: dict[str, Any] = {}
            if name in self._gradients:
                sparse = {"counts": counts, "slots": slots}
                sparse["copy"] = self._copies[name] if self._copies[name] is not weight else None
                sparse["along"] = gradients["along"] if name == "W_dec" else None
            adam_rows(
                weight,
                state["exp_avg"],
                state["exp_avg_sq"],
                gradients[name],
                control,
                lr=learning_rate * factors[weight],
                betas=(config.beta1, config.beta2),
                step=trainer.steps_done + 1,
                **sparse,
            )
        return learning_rate

    def _count(self, fired: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """Count firings and steps; how many entries fired, and how many features did so on a tenth of the rows."""
        from scope.training.trainer import OVER_DENSE  # which imports this module

        trainer, config = self.trainer, self.trainer.config
        healthy = self._healthy > 0
        since = torch.where(fired > 0, 0, trainer.tokens_since_fired + n_rows)
        trainer.tokens_since_fired.copy_(torch.where(healthy, since, trainer.tokens_since_fired))
        trainer.steps_done += 1
        trainer.tokens_done += n_rows
        if trainer.steps_done > (1 - config.decay) * config.steps or not config.decay:
            trainer.firings += torch.where(healthy, fired, 0)
            trainer.firing_tokens += n_rows
        counts = self._over_features(torch.stack([fired.sum(), (fired > OVER_DENSE * n_rows).sum()]))
        return counts[0], counts[1]

    def _note(self, found: Tensor, given: tuple[Tensor, ...], rows: Any, before: tuple[int, int, int]) -> None:
        event = None
        if found.is_cuda:
            host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            host.copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            found = host
        self._pending.append(_Pending(found, event, given, rows, before))

    def _read(self, pending: _Pending) -> None:
        if pending.event is not None:
            pending.event.synchronize()
        rows_finite, finite, n_dead, fullest = pending.found.tolist()
        if finite:
            self.dead_counts.append((pending.before[0], int(n_dead)))
            self.fullest.append((pending.before[0], int(fullest)))
            return
        trainer = self.trainer
        trainer.steps_done, trainer.tokens_done, trainer.firing_tokens = pending.before
        self._pending.clear()
        self._healthy.fill_(1.0)
        if not rows_finite or trainer.team.size > 1:  # all members look, or none
            for part in pending.given:
                trainer.require_finite(part, pending.rows)
        raise trainer.gradient_error()

    def _renew_copies(self) -> None:
        """Copy the weights to the compute dtype where someone else has changed them; Adam renews its own."""
        for name in ("W_enc", "W_dec"):
            weight = self._weights[name]
            if self._versions.get(name) == weight._version:
                continue
            self._copies[name] = weight if weight.dtype == self.dtype else weight.to(self.dtype)
            self._versions[name] = weight._version
