"""An intervention as the local replacement model has it: what it lets through of an activation, and what it puts there.

With gates held (which features of an SAE fire), every intervention on an activation x of one token is affine:

    x -> K x + c        K = diag(keep) + Σ_r write_r read_rᵀ

| kind        | K                                        | c                                     |
|-------------|------------------------------------------|---------------------------------------|
| add         | 1                                        | what is added                         |
| ablate      | 0                                        | 0                                     |
| set, patch  | 0                                        | what is put there                     |
| scale       | value                                    | 0                                     |
| project_out | 1 - Σ u uᵀ                               | 0                                     |
| a direction u that is set or scaled | 1 - u uᵀ, 1 + (value - 1) u uᵀ | value u, 0              |
| a feature f | 1 + (factor - 1) d ∇fᵀ where it fires    | value d, and what its biases leave    |

with d the feature's decoder row and factor 0 where it is ablated, set or patched. K lets gradients and effects through
(`backward`, `forward`); c is a source of its own, the "intervention" node of the token. It is taken from the run
itself, as what came out minus K times what went in.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from scope.interventions.words import intervention_words
from scope.models.dictionaries import as_read

if TYPE_CHECKING:
    from scope.interventions.edit import Edit
    from scope.interventions.resolving import Plan
    from scope.models.edits import EditContext

__all__ = ["LinearEdit", "linear_edit"]


@dataclass(frozen=True, eq=False)
class LinearEdit:
    """x -> K x + c at one hook, for every token of a prompt."""

    number: int
    """Of the intervention in its set."""
    hook: str
    words: str
    """The intervention in a line, without its positions."""
    keep: Float[Tensor, "seq #d"]
    on: Float[Tensor, " seq"]
    """1 where the intervention counts, else 0."""
    read: Float[Tensor, "#seq r d"] | None
    write: Float[Tensor, "r d"] | None
    constant: Float[Tensor, "seq d"]

    @property
    def layer(self) -> int:
        """The last layer whose MLP is in front of the hook; -1 where there is none."""
        if not self.hook.startswith("blocks."):
            return -1
        index = int(self.hook.split(".")[1])
        return index if self.hook.endswith((".hook_mlp_out", ".hook_resid_post")) else index - 1

    def forward(self, x: Float[Tensor, "*batch n d"], rows: slice) -> Float[Tensor, "*batch n d"]:
        """K x, for the rows of some positions."""
        new = x * self.keep[rows]
        if self.read is None or self.write is None:
            return new
        read = self.read if len(self.read) == 1 else self.read[rows]
        along = (read @ x[..., None])[..., 0] * self.on[rows, None]
        return new + along @ self.write

    def backward(self, gradient: Float[Tensor, "*batch n d"], rows: slice) -> Float[Tensor, "*batch n d"]:
        """Kᵀ g: from the gradient behind the intervention to that in front of it."""
        new = gradient * self.keep[rows]
        if self.read is None or self.write is None:
            return new
        read = self.read if len(self.read) == 1 else self.read[rows]
        along = (gradient @ self.write.T) * self.on[rows, None]
        return new + (along[..., None, :] @ read)[..., 0, :]


def linear_edit(
    number: int,
    plan: "Plan",
    edit: "Edit",
    before: Float[Tensor, "1 seq *row"],
    after: Float[Tensor, "1 seq *row"],
    context: "EditContext",
) -> LinearEdit:
    """What an edit was on a prompt.

    Args:
        number: of the intervention in its set.
        plan: the intervention.
        edit: the edit that it stands for.
        before: what the edit was given.
        after: what it made of it.
        context: what it was told.
    """
    one = plan.one
    x, y = (value[0].flatten(1).float() for value in (before, after))
    where = edit.where(before, context)
    on = torch.ones(len(x), device=x.device) if where is None else where[0].to(x.device, x.dtype)
    keep, read, write = torch.ones(1, device=x.device), None, None
    if one.kind == "add":
        pass
    elif one.features:
        read, write = _through_features(plan, before)
    elif one.direction:
        unit = torch.nn.functional.normalize(torch.tensor(one.direction, dtype=torch.float64), dim=0)
        read = unit.to(x.device, x.dtype)[None, None]
        write = (_factor(plan) - 1) * read[0]
    else:
        keep = torch.full((1,), _factor(plan), device=x.device)
        if one.heads:
            chosen = torch.zeros(plan.row_shape, dtype=torch.bool, device=x.device)
            chosen[list(one.heads)] = True
            keep = torch.where(chosen.flatten(), keep, 1.0)
    found = LinearEdit(
        number,
        edit.hook,
        intervention_words(replace(one, positions=None)),
        1 + on[:, None] * (keep - 1),
        on,
        read,
        write,
        torch.zeros_like(x),
    )
    if not (one.kind in ("add", "set", "patch") or (one.features and one.kind != "project_out")):
        return found  # nothing is put there: what differs is rounding
    constant = y - found.forward(x, slice(0, len(x)))
    return replace(found, constant=constant)


def _factor(plan: "Plan") -> float:
    """What becomes of a unit of what is changed."""
    value = plan.one.value
    return float(value[0] if isinstance(value, tuple) else value or 0.0) if plan.one.kind == "scale" else 0.0


def _through_features(plan: "Plan", before: Float[Tensor, "1 seq *row"]) -> tuple[Tensor, Tensor]:
    """read (seq or 1, r, d) and write (r, d) of an intervention on features of an SAE."""
    one, sae, ids = plan.one, plan.sae, list(plan.one.features)
    assert sae is not None
    rows = sae.W_dec.detach()[ids].float().to(before.device)
    if one.kind == "project_out":
        basis = torch.linalg.qr(rows.double().T).Q.float().T
        return basis[None], -basis
    with torch.enable_grad():
        x = as_read(sae, before).detach().requires_grad_()
        values = sae.encode(x)[0][:, ids]
        gradients = [
            torch.autograd.grad(values[:, number].sum(), x, retain_graph=number + 1 < len(ids))[0][0]
            for number in range(len(ids))
        ]
    factors = torch.tensor(one.values if one.kind == "scale" else (0.0,) * len(ids), device=before.device)
    read = torch.stack(gradients, dim=1).float().to(before.device)
    return read, (factors - 1)[:, None] * rows
