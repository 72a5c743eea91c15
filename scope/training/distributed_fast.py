"""`FastStep` for several processes: what each does of a step, and what they exchange.

By rows, with n processes (each has all weights, and its own rows):

1. the gradients of W_dec and W_enc go to who moves those rows (reduce-scatter), half of the features while the next
   half's are computed, so that half of W_enc's alone is waited for. They are in the compute dtype, and so are the sums.
   What is small (biases, counts, sums for the log) is summed for all;
2. process r moves the r-th n-th of each half of the rows of both matrices (Rajbhandari et al. 2020, "ZeRO", stage 1):
   Adam, which one process does for all rows, takes an n-th of the time;
3. the copies in the compute dtype go to everyone (all-gather), each half while the next is moved and the next step
   begins: W_enc's are waited for before the encoder, W_dec's before the decoder. The float32 weights and Adam's moments
   of rows that others move are fetched when somebody wants to see them (`settle`).

By features (each has an n-th of the features, and all rows):

1. TopK and BatchTopK choose among all processes' candidates (`scope.training.distributed`);
2. the residual is the sum of the processes' parts: f W_dec - (scale y - b_dec)/n of their own features, float32;
3. AuxK sends the pre-activations of the dead features to all and chooses among them; ê is a sum once more;
4. gradients, Adam and copies are each process's own; b_dec's gradient and the norms are summed.

The products are those of `scope.training.fast`; nobody waits for a device here either.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from scope.kernels import step as products
from scope.kernels.adam import adam_rows
from scope.kernels.tensors import uses_triton
from scope.kernels.topk import keep_largest, linear_topk
from scope.training.distributed import ByFeatures, ByRows, exchange
from scope.training.fast import AUX_MULTIPLE, MAX_AUX, FastStep, supports_fast_step
from scope.training.schedules import learning_rate_share
from scope.training.selection import Selected, batchtopk_width, padded

if TYPE_CHECKING:
    from scope.training.fast import _Aux, _Entries
    from scope.training.trainer import SAETrainer

__all__ = ["FastStepByFeatures", "FastStepByRows", "fast_step_for"]

PARTS = 2
"""In how many parts, one after the other, processes that share rows exchange a matrix."""
AUX_MARGIN = 6.0
"""Standard deviations by which the dead features of one process may be more than their share, on a GPU."""


def fast_step_for(trainer: "SAETrainer") -> FastStep | None:
    """The fast step for a trainer and its team; None where its settings, or how they are divided, have none."""
    if not supports_fast_step(trainer):
        return None
    team, config = trainer.team, trainer.config
    if isinstance(team, ByFeatures):
        cfg: Any = trainer.sae.cfg
        over_rows = (
            trainer.sae.activation.name == "jumprelu" and cfg.sparsity_loss == "quadratic"
        )  # of a row's whole L0
        return None if over_rows else FastStepByFeatures(trainer)
    if isinstance(team, ByRows):
        even = config.batch_size % team.size == 0 and config.d_sae % team.size == 0
        return FastStepByRows(trainer) if even else None
    return FastStep(trainer)


class _Shared(FastStep):
    """What both ways have in common."""

    team: ByRows | ByFeatures

    def __init__(self, trainer: "SAETrainer", lag: int | None = None) -> None:
        self.team = trainer.team  # type: ignore[assignment]
        super().__init__(trainer, lag)

    def _most(self, tensor: Tensor) -> Tensor:
        return self.team.total(tensor, dist.ReduceOp.MAX)

    def _select_batchtopk(self, centred: Tensor, n: int) -> Selected:
        """The n largest pre-activations above 0 of all processes; on a GPU of each at most `batchtopk_width` a row."""
        W, b = self._copies["W_enc"], self.trainer.sae.b_enc.to(self.dtype)
        if not uses_triton(centred):
            pre = torch.addmm(b, centred, W.T)
            return padded(pre, self.team.largest(pre, n))
        values, ids = linear_topk(centred, W, b, batchtopk_width(self.trainer.config.k, len(W)))
        values = values.float().relu_()
        values = torch.where(self.team.mask_of_largest(values, n), values, 0.0)
        return Selected(values, ids.int(), values > 0)


class FastStepByFeatures(_Shared):
    """The fast step of a process with some of the features."""

    team: ByFeatures

    def _over_features(self, tensor: Tensor) -> Tensor:
        return self.team.total(tensor)

    def _means(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: part if name == "auxk" else self.team.total(part) for name, part in parts.items()}

    def _encode(self, centred: Tensor) -> Selected:
        k, W = self.trainer.config.k, self._copies["W_enc"]
        if self._jumps:
            return super()._encode(centred)
        if self._over_batch:
            return self._select_batchtopk(centred, k * len(centred))
        values, ids = linear_topk(centred, W, self.trainer.sae.b_enc.to(self.dtype), min(k, len(W)))
        values = values.float().relu_()
        values = torch.where(self.team.among_largest(values, k), values, 0.0)
        return Selected(values, ids.int(), values > 0)

    def _residual(self, y: Tensor, selected: Selected) -> products.Residual:
        scale, b_dec, W_dec = self._scale_out, self.trainer.sae.b_dec, self._copies["W_dec"]
        values, ids, counted, _ = selected
        share = 1 / self.team.size
        part = products.residual_and_dots(
            y, scale * share, values, ids, W_dec, b_dec * share, counted, dtype=torch.float32
        )
        whole = self.team.total(part.residual)
        # Of an SAE that gives 0, the "residual" of -whole is whole itself: its dot products are what is left to do.
        nothing = torch.zeros_like(values)
        counted = counted if counted is not None else values > 0
        return products.residual_and_dots(whole, -1.0, nothing, ids, W_dec, torch.zeros_like(b_dec), counted)

    def _aux_width(self, known: int, dead: Tensor) -> int:
        if self.lag == 0:
            return max(1, int(self._most(dead.sum())))
        share = known / self.team.size
        room = math.ceil(share + AUX_MARGIN * math.sqrt(share))
        return min(MAX_AUX, -(-room // AUX_MULTIPLE) * AUX_MULTIPLE, self.trainer.config.d_sae // self.team.size)

    def _aux_kept(self, pre: Tensor, n_taken: Tensor, k_aux: int) -> Tensor:
        width = pre.shape[1]
        valid = torch.arange(width, device=pre.device) < n_taken
        everyone = torch.cat(self.team.gathered(torch.where(valid, pre, -torch.inf)), dim=1)
        n_all = torch.tensor(everyone.shape[1]) if self.lag == 0 else n_taken.new_full((), everyone.shape[1])
        return keep_largest(everyone, n_all, k_aux)[:, self.team.rank * width :][:, :width].contiguous()

    def _aux_left(self, residual: Tensor, f: Tensor, W_dec: Tensor) -> Tensor:
        return self.team.total(f @ W_dec).add_(residual)

    def _gradient(
        self, centred: Tensor, residual: Tensor, entries: "_Entries", aux: "_Aux | None"
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        gradients, parts = super()._gradient(centred, residual, entries, aux)
        own = self.team.total(torch.stack([part for number, part in enumerate(parts) if number != 3]))
        return gradients, [*own, parts[3]]  # the fourth is b_dec's, which all have


class FastStepByRows(_Shared):
    """The fast step of a process with some of the rows."""

    team: ByRows

    def __init__(self, trainer: "SAETrainer", lag: int | None = None) -> None:
        super().__init__(trainer, lag)
        d_sae, size = trainer.sae.d_sae, self.team.size
        n_parts = PARTS if d_sae % (PARTS * size) == 0 else 1
        n, own = d_sae // n_parts, d_sae // n_parts // size
        self._parts = [slice(part * n, (part + 1) * n) for part in range(n_parts)]
        """What is exchanged at once, of all features."""
        self._own = [
            slice(part.start + self.team.rank * own, part.start + (self.team.rank + 1) * own) for part in self._parts
        ]
        """What of each part this process moves."""
        self._places = [slice(part * own, (part + 1) * own) for part in range(n_parts)]
        """Where among its own rows these are."""
        self._summed = {
            name: torch.empty((n_parts * own, whole.shape[1]), dtype=whole.dtype, device=whole.device)
            for name, whole in self._gradients.items()
        }
        self._of_sums = torch.tensor([1 / self.team.size, 1.0], device=trainer.sae.device)
        self._under_way: dict[str, list[Any]] = {}
        self._others_moved = False

    def _rows_of_all(self, own: int) -> int:
        return own * self.team.size

    def _over_rows(self, tensor: Tensor) -> Tensor:
        return self.team.total(tensor)

    def _means(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.team.total(part) / self.team.size for name, part in parts.items()}

    def _encode(self, centred: Tensor) -> Selected:
        if self._over_batch:
            return self._select_batchtopk(centred, self.trainer.config.k * self.team.size * len(centred))
        return super()._encode(centred)

    def _residual(self, y: Tensor, selected: Selected) -> products.Residual:
        self._wait_for("W_dec")
        return super()._residual(y, selected)

    def _renew_copies(self) -> None:
        self._wait_for("W_enc")
        super()._renew_copies()

    def _gradient(
        self, centred: Tensor, residual: Tensor, entries: "_Entries", aux: "_Aux | None"
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """As for one process, summed over the processes' mean losses: n times too large, which `_move` undoes."""
        own, _ = super()._gradient(centred, residual, entries, aux)
        small = [name for name in own if name not in self._gradients]
        sizes = [len(own[name]) for name in small]
        summed = self.team.total(torch.cat([own[name] for name in small])).split(sizes)
        gradients = {**dict(zip(small, summed, strict=True)), **self._summed}
        along = gradients["along"] = torch.cat([gradients["along"][own] for own in self._own])
        for name in self._gradients:
            self._wait_for(name)
        squares = {
            name: torch.linalg.vector_norm(part, dim=1, dtype=torch.float32).square_()
            for name, part in self._summed.items()
        }
        rows = [(squares["W_dec"] - along.square()).clamp_min(0).sum(), squares["W_enc"].sum()]
        others = [gradients[name].square().sum() for name in small if name != "along"]
        return gradients, [part / self.team.size**2 for part in (*self.team.total(torch.stack(rows)), *others)]

    def _sum_rows(
        self,
        name: str,
        source: Tensor,
        weights: Tensor,
        entries: "_Entries",
        slots: Tensor | None,
        further: Tensor | None,
    ) -> Tensor:
        ids, groups, whole, summed = entries.ids, entries.groups, self._gradients[name], self._summed[name]

        def send(number: int) -> None:
            part, place = self._parts[number], self._places[number]
            self._begun(name, self.team.scatter_sum(whole[part], summed[place]))

        return products.feature_rows(source, weights, ids, groups, whole, slots, further, self._parts, send)

    def _move(
        self, gradients: dict[str, Tensor], control: Tensor, groups: products.EntryGroups, aux: "_Aux | None"
    ) -> float:
        """Adam on this process's rows of the matrices, and on all of what is small."""
        trainer, config = self.trainer, self.trainer.config
        share = learning_rate_share(trainer.steps_done, config.steps, config.warmup, config.decay)
        control = control * self._of_sums
        factors = {group["params"][0]: group["factor"] for group in trainer.optimiser.param_groups}
        everywhere = [(slice(None), slice(None))]
        for name, weight in self._weights.items():
            state, divided = trainer.optimiser.state[weight], name in self._gradients
            has_copy = divided and self._copies[name] is not weight
            for number, (own, place) in enumerate(zip(self._own, self._places, strict=True) if divided else everywhere):
                adam_rows(
                    weight[own],
                    state["exp_avg"][own],
                    state["exp_avg_sq"][own],
                    gradients[name][place],
                    control,
                    lr=config.peak_lr * share * factors[weight],
                    betas=(config.beta1, config.beta2),
                    step=trainer.steps_done + 1,
                    along=gradients["along"][place] if name == "W_dec" else None,
                    copy=self._copies[name][own] if has_copy else None,
                )
                if divided:
                    self._gather(name, self._copies[name], number)
        self._others_moved = True
        return config.peak_lr * share

    def settle(self) -> None:
        super().settle()
        for name in self._gradients:
            self._wait_for(name)
        if not self._others_moved:
            return
        for name in self._gradients:
            weight = self._weights[name]
            state = self.trainer.optimiser.state[weight]
            for whole in (weight, state["exp_avg"], state["exp_avg_sq"]):
                for number in range(len(self._parts)):
                    self._gather(name, whole, number)
                self._wait_for(name)
        self._others_moved = False

    def _gather(self, name: str, whole: Tensor, number: int) -> None:
        """Begin to fill a part of a matrix with what each process has of it."""
        part, own = self._parts[number], self._own[number]
        within = slice(own.start - part.start, own.stop - part.start)
        self._begun(name, self.team.gather_into(whole[part], within))

    def _begun(self, name: str, work: Any) -> None:
        if work is not None:
            self._under_way.setdefault(name, []).append(work)

    def _wait_for(self, name: str) -> None:
        """Let what comes next wait for the messages under way; on a GPU the host does not."""
        for work in self._under_way.pop(name, ()):
            with exchange():
                work.wait()
