"""Strengths put in proportion to what is usual for their feature, and what differs between two prompts.

Comparing:

1. The two token sequences are aligned: runs of equal ids are matched as `difflib` finds them; between the runs, as many
   unequal tokens on one side as on the other are paired in order, the rest stands alone.
2. Per feature: its maximum on either side, on how many tokens it fires, and where its strength differs most between
   tokens that are equal and aligned.
"""

from difflib import SequenceMatcher
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scope.errors import MismatchError

if TYPE_CHECKING:
    from scope.features.index import FeatureIndex
    from scope.features.prompt import PromptFeatures

__all__ = ["PromptComparison", "align_tokens", "compare_prompts", "corrected_strengths"]


class PromptComparison(NamedTuple):
    """What `compare_prompts` found."""

    pairs: pd.DataFrame
    """Columns position_a, position_b (-1: it stands alone), same (whether the tokens are equal), in text order."""
    features: pd.DataFrame
    """One row per feature that fires anywhere: feature, max_a, max_b, n_a, n_b (tokens that it fires on), only ("a",
    "b", ""), change (value_b - value_a on the aligned equal tokens where that is largest in size; 0 where there are
    none), position_a, position_b (that place; -1), by the larger maximum."""


def corrected_strengths(firings: pd.DataFrame, index: "FeatureIndex") -> np.ndarray:
    """Density-corrected strengths, float32 `(n,)`, of firings (columns feature, value):

        corrected = value / mean strength of the feature's firings x log2(1 / density)

    in bits: how unlikely it is that the feature fires at all, times how strong this is for it. As in tf-idf, features
    that fire everywhere or are always strong fall back behind those that say something about this token. Mean and
    density are those of the index; a feature that never fires there counts as firing once, with this strength.
    """
    features = firings["feature"].to_numpy(dtype=np.int64)
    value = firings["value"].to_numpy(dtype=np.float64)
    table = index.table
    mean = table["mean_value"].to_numpy(dtype=np.float64)[features]
    density = table["density"].to_numpy(dtype=np.float64)[features]
    once = 1.0 / max(index.n_indexed_rows, 1)
    ratio = np.divide(value, mean, out=np.ones_like(value), where=np.nan_to_num(mean) > 0)
    return (ratio * -np.log2(np.clip(np.nan_to_num(density), once, 1.0))).astype(np.float32)


def align_tokens(a: np.ndarray, b: np.ndarray) -> pd.DataFrame:
    """Pairs of positions of two sequences of token ids: columns position_a, position_b, same; see step 1."""
    rows: list[tuple[int, int, bool]] = []
    for tag, a0, a1, b0, b1 in SequenceMatcher(
        None, list(map(int, a)), list(map(int, b)), autojunk=False
    ).get_opcodes():
        both = min(a1 - a0, b1 - b0)
        rows += [(a0 + step, b0 + step, tag == "equal") for step in range(both)]
        rows += [(place, -1, False) for place in range(a0 + both, a1)]
        rows += [(-1, place, False) for place in range(b0 + both, b1)]
    return pd.DataFrame(rows, columns=["position_a", "position_b", "same"]).astype(
        {"position_a": np.int64, "position_b": np.int64, "same": bool}
    )


def compare_prompts(a: "PromptFeatures", b: "PromptFeatures") -> PromptComparison:
    """What differs between two prompts that were read by the same SAE.

    Raises:
        MismatchError: the prompts were read by different SAEs, as far as hook and size tell.
    """
    if (a.hook_name, a.d_sae) != (b.hook_name, b.d_sae):
        raise MismatchError(
            f"The prompts were read by different SAEs: {a.d_sae:,} features at {a.hook_name}, {b.d_sae:,} at "
            f"{b.hook_name}."
        )
    pairs = align_tokens(a.token_ids, b.token_ids)
    sides = []
    for name, side in (("a", a), ("b", b)):
        grouped = side.table.groupby("feature")["value"]
        sides.append(pd.DataFrame({f"max_{name}": grouped.max(), f"n_{name}": grouped.size()}))
    found = sides[0].join(sides[1], how="outer").fillna(0)
    found = found.join(_changes(a.table, b.table, pairs), how="left")
    found["only"] = np.where(found["n_b"] == 0, "a", np.where(found["n_a"] == 0, "b", ""))
    found = found.fillna({"change": 0.0, "position_a": -1, "position_b": -1}).rename_axis("feature").reset_index()
    found = found.astype(dict.fromkeys(("feature", "n_a", "n_b", "position_a", "position_b"), np.int64))
    order = np.argsort(-found[["max_a", "max_b"]].max(axis=1).to_numpy(), kind="stable")
    columns = ["feature", "max_a", "max_b", "n_a", "n_b", "only", "change", "position_a", "position_b"]
    return PromptComparison(pairs, found.iloc[order][columns].reset_index(drop=True))


def _changes(a: pd.DataFrame, b: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """By feature: change, position_a, position_b of the aligned equal tokens where its strength differs most."""
    same = pairs[pairs["same"]]
    of_b = dict(zip(same["position_b"], same["position_a"], strict=True))
    there = b[b["position"].isin(list(of_b))]
    left = a[a["position"].isin(same["position_a"])][["feature", "position", "value"]]
    right = there.assign(position=there["position"].map(of_b))[["feature", "position", "value"]]
    both = left.merge(right, on=["feature", "position"], how="outer", suffixes=("_a", "_b")).fillna(0.0)
    both["change"] = both["value_b"].astype(float) - both["value_a"].astype(float)
    change = both.sort_values("change", key=abs, ascending=False, kind="stable").drop_duplicates("feature")
    change = change[["feature", "position", "change"]]
    to_b = dict(zip(same["position_a"], same["position_b"], strict=True))
    change["position_b"] = change["position"].map(to_b)
    return change.rename(columns={"position": "position_a"}).set_index("feature")
