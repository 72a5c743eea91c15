"""Which features of a crosscoder one model alone has, and which only look so: latent scaling.

A crosscoder over two models writes feature j along d_B,j in the base model and along d_T,j in the other. Where one of
the two is short, the feature seems to be of one model. Minder et al. 2025, "Robustly identifying concepts introduced
during chat fine-tuning using crosscoders" (arXiv 2504.02922), section 3, name two ways in which that can be wrong and
a measurement that tells them:

1. `share` = ½ (1 + (‖d_T‖ - ‖d_B‖) / max(‖d_T‖, ‖d_B‖)) says where a feature seems to be: *tuned* from 0.9 on, *base*
   up to 0.1, *shared* from 0.4 to 0.6, else *between*.
2. Take d, the longer of the two, and fit what is in a model M along it, by least squares, with the feature's own
   values f: once to what all *other* features leave of M's rows, once to what all features write in M,

       β^ε_M = Σ f ⟨d, x_M - b_M - Σ over k ≠ j of f_k d_M,k⟩ / (‖d‖² Σ f²)
       β^r_M = Σ f ⟨d, Σ over k of f_k d_M,k⟩ / (‖d‖² Σ f²)

3. ν^ε and ν^r are β of the model where the feature is short over β of the model where it is long. Both are about 1 for
   a feature that both have, and about 0 for one that the other model truly lacks.
4. *Complete shrinkage*: ν^ε is high. The other model has the concept, but nothing writes it: it lies in the error.
   *Latent decoupling*: ν^r is high. The other model has it, written by other features.

A feature is *specific* where it seems to be of one model, fires on `FIRINGS` rows or more, and the upper ends of both
intervals lie below the thresholds with which the authors tell chat-specific features in their code (notebooks/art.py of
science-of-finetuning/sparsity-artifacts-crosscoders), `NU_ERROR` and `NU_RECONSTRUCTION`. One that fires on fewer is
*rare*, one whose interval crosses a threshold *uncertain*. Ours, and not the paper's, are `FIRINGS`, the intervals,
which resample groups of documents, and that ν^r leaves the decoder's bias out, as it is written whatever fires. Rows of
more than ten times the median norm are left out.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from scope.diffing.examples import TopRows
from scope.diffing.pair import PairedRows, PairedStores
from scope.diffing.resampling import middle_95, weights_of
from scope.errors import MismatchError
from scope.saes.crosscoder import Crosscoder

__all__ = ["FIRINGS", "NU_ERROR", "NU_RECONSTRUCTION", "FeatureScaling", "scale_features"]

NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
FIRINGS = 20
TUNED_FROM, BASE_TO, SHARED = 0.9, 0.1, (0.4, 0.6)


@dataclass(frozen=True, eq=False)
class FeatureScaling:
    """Where each feature of a crosscoder is."""

    table: pd.DataFrame
    """One row a feature: feature, firings, rate, norm_base, norm_tuned, share, cosine (of the two decoder rows),
    nu_error and nu_reconstruction with _low and _high, place ("tuned", "base", "shared", "between", "dead"), verdict
    ("specific", "shrinkage", "decoupling", "both", "uncertain", "rare"; empty where it seems to be of both)."""
    top: TopRows
    n_rows: int

    def specific(self, place: str) -> pd.DataFrame:
        """The features that one model ("tuned" or "base") truly has alone, those that fire most first."""
        found = self.table[(self.table["place"] == place) & (self.table["verdict"] == "specific")]
        return found.sort_values("firings", ascending=False, kind="stable", ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """Counts by place, and by verdict for those that seem to be of one model; and the limits."""
        places = self.table["place"].value_counts().to_dict()
        verdicts = {
            place: self.table.loc[self.table["place"] == place, "verdict"].value_counts().to_dict()
            for place in ("tuned", "base")
        }
        limits = {"nu_error": NU_ERROR, "nu_reconstruction": NU_RECONSTRUCTION, "firings": FIRINGS}
        return {
            "n_rows": self.n_rows,
            "d_sae": len(self.table),
            "places": places,
            "verdicts": verdicts,
            "limits": limits,
        }


@torch.inference_mode()
def scale_features(crosscoder: Crosscoder, hook: str, stores: PairedStores, seed: int = 0) -> FeatureScaling:
    """Latent scaling of every feature of a crosscoder over two models.

    Args:
        crosscoder: over the hook in the base model and in the other, in this order.
        hook: the hook's name in both stores.
        stores: the two models' activations.
        seed: of the intervals.

    Raises:
        MismatchError: it is of more than two hooks, or they have different widths.
    """
    widths = crosscoder.cfg.widths
    if len(widths) != 2 or widths[0] != widths[1]:
        raise MismatchError(
            f"The crosscoder reads widths {', '.join(map(str, widths))}; latent scaling compares directions of two "
            "models and needs two hooks of one width."
        )
    sums = _Sums(crosscoder, stores.n_groups)
    for rows in stores.paired_rows(hook, crosscoder.device):
        sums.add(rows)
    return sums.scaling(seed)


class _Sums:
    """Per model and group of documents Σ f ⟨d, ·⟩ of what the others leave, and of what all write."""

    def __init__(self, crosscoder: Crosscoder, n_groups: int) -> None:
        self.crosscoder = crosscoder
        device, d_sae = crosscoder.device, crosscoder.d_sae
        decoders = [part.float() for part in crosscoder.W_dec.split(crosscoder.cfg.widths, dim=-1)]
        self.norms = [part.norm(dim=-1) for part in decoders]
        self.longer_is_tuned = self.norms[1] >= self.norms[0]
        self.direction = torch.where(self.longer_is_tuned[:, None], decoders[1], decoders[0])
        self.cosine = functional.cosine_similarity(decoders[0], decoders[1], dim=-1)
        # What feature j itself writes along d, for each unit of f.
        self.along = [(part * self.direction).sum(dim=-1) for part in decoders]
        self.biases = [part.float() for part in crosscoder.b_dec.split(crosscoder.cfg.widths)]
        shape = (2, n_groups, d_sae)
        self.left = torch.zeros(shape, dtype=torch.float64, device=device)
        self.made = torch.zeros(shape, dtype=torch.float64, device=device)
        self.firings = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.top = TopRows(d_sae, device=device)
        self.n_rows = 0

    def add(self, rows: PairedRows) -> None:
        within = rows.within
        if not within.any():
            return
        models = [rows.base[within], rows.tuned[within]]
        x = torch.cat(models, dim=1)
        f = self.crosscoder.encode(x).float()
        made = self.crosscoder.decode(f).float().split(self.crosscoder.cfg.widths, dim=-1)
        groups = torch.from_numpy(rows.groups).to(x.device)[within]
        by_group = functional.one_hot(groups, self.left.shape[1]).float()
        squares = f.square()
        for model in (0, 1):
            error = models[model] - made[model]
            written = made[model] - self.biases[model]
            along_error = f * (error @ self.direction.T) + squares * self.along[model]
            self.left[model] += (by_group.T @ along_error).double()
            self.made[model] += (by_group.T @ (f * (written @ self.direction.T))).double()
        self.firings += (f > 0).sum(dim=0)
        self.top.add(f * self.crosscoder.decoder_norms, rows.rows[within.cpu().numpy()])
        self.n_rows += len(x)

    def scaling(self, seed: int) -> FeatureScaling:
        tuned_longer = self.longer_is_tuned.cpu().numpy()
        drawn = weights_of(self.left.shape[1], seed)
        norms = [part.cpu().numpy().astype(np.float64) for part in self.norms]
        firings = self.firings.cpu().numpy()
        share = 0.5 * (1 + (norms[1] - norms[0]) / np.maximum(np.maximum(*norms), 1e-30))
        columns: dict[str, Any] = {
            "feature": np.arange(len(firings)),
            "firings": firings,
            "rate": firings / max(self.n_rows, 1),
            "norm_base": norms[0],
            "norm_tuned": norms[1],
            "share": share,
            "cosine": self.cosine.cpu().numpy().astype(np.float64),
        }
        for name, sums in (("nu_error", self.left), ("nu_reconstruction", self.made)):
            parts = sums.cpu().numpy()
            columns[name] = _ratio(parts.sum(axis=1), tuned_longer)
            resampled = _ratio(np.stack([drawn @ part for part in parts]), tuned_longer)
            columns[f"{name}_low"], columns[f"{name}_high"] = middle_95(resampled)
        table = pd.DataFrame(columns)
        table["place"] = np.select(
            [firings == 0, share >= TUNED_FROM, share <= BASE_TO, (share >= SHARED[0]) & (share <= SHARED[1])],
            ["dead", "tuned", "base", "shared"],
            "between",
        )
        table["verdict"] = _verdicts(table)
        return FeatureScaling(table, self.top, self.n_rows)


def _ratio(sums: np.ndarray, tuned_longer: np.ndarray) -> np.ndarray:
    """Of the model where a feature is short over that where it is long, `(..., d_sae)`; NaN where that is not above 0.

    Args:
        sums: `(2, ..., d_sae)`, of the base model and of the other.
    """
    short = np.where(tuned_longer, sums[0], sums[1])
    long = np.where(tuned_longer, sums[1], sums[0])
    return np.divide(short, long, out=np.full(short.shape, np.nan), where=long > 0)


def _verdicts(table: pd.DataFrame) -> np.ndarray:
    of_one = table["place"].isin(["tuned", "base"])
    shrunk = table["nu_error"] >= NU_ERROR
    decoupled = table["nu_reconstruction"] >= NU_RECONSTRUCTION
    clear = (table["nu_error_high"] < NU_ERROR) & (table["nu_reconstruction_high"] < NU_RECONSTRUCTION)
    return np.select(
        [
            ~of_one,
            table["firings"] < FIRINGS,
            shrunk & decoupled,
            shrunk,
            decoupled,
            clear,
        ],
        ["", "rare", "both", "shrinkage", "decoupling", "specific"],
        "uncertain",
    )
