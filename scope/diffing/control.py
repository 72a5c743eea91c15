"""What a fine-tuning changed beyond what any tuning changes: the same figures of a control, feature by feature.

Every training moves features, one on nothing too. A control is another copy of the base model, tuned with the same
settings on text that teaches it nothing (`scope bench tune --source model`), and its finished comparison with the base
model on the same text, with the same SAE and the same rows. From both, with T the tuned copy, C the control and B the
base:

1. `excess` = log2 of a feature's rate in T over that in C, smoothed as everywhere; its interval resamples groups of
   documents.
2. `z_control` is the paired test of T against C (`scope.diffing.resampling.paired_z`). The rows on which exactly one of
   T and C fires are not known from two reports, but no more than those of B against T and of B against C together (the
   Hamming distance keeps the triangle inequality), and that sum is what is put in: the test errs on the careful side.
3. A feature is `beyond` the control where it `changed` against the base model, its excess goes the same way by a factor
   of `FOLD` or more, and the test finds it at a false discovery rate of 5% over all features that fire.

What that leaves standing of a second control, judged against the first, is how often it errs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from scope.diffing.resampling import middle_95, paired_z, two_sided, weights_of
from scope.diffing.stored import DiffReport, firings_file
from scope.errors import IntegrityError, MismatchError
from scope.features.contrast import log_ratio
from scope.features.discoveries import discoveries

__all__ = ["FOLD", "Control", "FiringCounts", "beyond_control"]

FOLD = 1.5
"""Factor from which a change of a rate is one that a reader should see."""
SAME = {
    "base": "base model",
    "dtype": "dtype that the base model ran in",
    "text": "text",
    "config": "text settings",
}
TEXT_SETTINGS = ("tokens", "context_size", "document_tokens", "shuffle_seed")


class FiringCounts(NamedTuple):
    """How often the features of one SAE fire in a tuned model: all that another comparison needs to know of it."""

    firings: Float[np.ndarray, "groups d_sae"]
    """By group of documents."""
    discordant: Float[np.ndarray, " d_sae"]
    """Rows on which a feature fires in exactly one of the tuned model and the base model."""
    rows: Float[np.ndarray, " groups"]
    """Rows of each group."""

    def save(self, path: Path) -> None:
        """Write them, as whole numbers."""
        np.savez_compressed(path, **{name: part.astype(np.uint32) for name, part in self._asdict().items()})

    @classmethod
    def load(cls, path: Path) -> "FiringCounts":
        """What `save` wrote.

        Raises:
            IntegrityError: there is no such file, or it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as held:
                return cls(*(held[name].astype(np.float64) for name in cls._fields))
        except (OSError, ValueError, KeyError) as error:
            raise IntegrityError(
                f"{path} cannot be read ({error}). Compare the control with its base again."
            ) from error


@dataclass(frozen=True, eq=False)
class Control:
    """The finished comparison of a control with the base model."""

    report: DiffReport

    @classmethod
    def open(cls, folder: str | Path) -> "Control":
        """The comparison in a folder, as `DiffReport.open`."""
        return cls(DiffReport.open(folder))

    def require_same(self, identity: Mapping[str, Any]) -> None:
        """Refuse a control of another base model, text or SAE.

        Args:
            identity: base, text, config and sae_fingerprints of the comparison that it is to be the control of.

        Raises:
            MismatchError: they differ; what differs is named.
            IntegrityError: the control has no counts of firings.
        """
        held = json.loads(json.dumps(_comparable(self.report.figures)))
        wanted = json.loads(json.dumps(_comparable(identity)))
        for part, words in SAME.items():
            if held[part] != wanted[part]:
                raise MismatchError(
                    f"The control {self.report.folder} has another {words}: {held[part]}; expected {wanted[part]}. "
                    "Compare the control with the same base model on the same text first."
                )
        missing = set(identity["sae_fingerprints"].values()) - set(self.report.figures["sae_fingerprints"].values())
        if missing:
            names = [name for name, one in identity["sae_fingerprints"].items() if one in missing]
            raise MismatchError(
                f"The control {self.report.folder} says nothing of {', '.join(names)}. Compare the control with the "
                "base model with the same --sae first."
            )
        for fingerprint in identity["sae_fingerprints"].values():
            self.counts(fingerprint)

    def _place(self, fingerprint: str) -> int:
        return next(n for n, sae in enumerate(self.report.figures["saes"]) if sae["fingerprint"] == fingerprint)

    def counts(self, fingerprint: str) -> FiringCounts:
        """Of the SAE with this fingerprint."""
        return FiringCounts.load(self.report.folder / firings_file(self._place(fingerprint)))

    def changed(self, fingerprint: str) -> int:
        """Features of that SAE that changed in the control."""
        return int(self.report.figures["saes"][self._place(fingerprint)]["changed"])

    def to_dict(self) -> dict[str, Any]:
        """Which it is, its predictions, how far its residual stream moved, and what its crosscoder, where it has one,
        found of one model alone; JSON-able."""
        figures = self.report.figures
        crosscoder = figures["crosscoder"]
        return {
            "model": figures["tuned"]["model"],
            "id": self.report.manifest["fingerprint"][:12],
            "layers": [row for row in figures.get("layers", ()) if row["source"] == "all"],
            "predictions": list(figures.get("predictions", ())),
            "crosscoder": crosscoder and {part: crosscoder[part] for part in ("hook", "places", "verdicts")},
        }


def _comparable(figures: Mapping[str, Any]) -> dict[str, Any]:
    config = figures["config"]
    return {
        "base": figures["base"]["weight_hash"],
        "dtype": figures["base"].get("dtype"),
        "text": figures["text"],
        "config": {name: config[name] for name in TEXT_SETTINGS},
    }


def beyond_control(table: pd.DataFrame, own: FiringCounts, control: FiringCounts, seed: int = 0) -> pd.DataFrame:
    """The table with rate_control, excess (log2 of tuned over control) with _low and _high, z_control and beyond.

    Args:
        table: `FeatureChanges.table`.
        own: the counts that it was made from.
        control: those of the control, on the same rows.
        seed: of the intervals.

    Raises:
        MismatchError: the control's rows are not these.
    """
    if own.firings.shape != control.firings.shape or not np.array_equal(own.rows, control.rows):
        raise MismatchError(
            f"The control has other rows ({int(control.rows.sum()):,} in {len(control.rows)} groups) than the tuned "
            f"model ({int(own.rows.sum()):,} in {len(own.rows)}). Compare both with the base model on the same text."
        )
    n = float(own.rows.sum())
    totals = [counts.firings.sum(axis=0) for counts in (own, control)]
    drawn = weights_of(len(own.rows), seed)
    drawn_rows = (drawn @ own.rows)[:, None]
    resampled = log_ratio(drawn @ own.firings, drawn_rows, drawn @ control.firings, drawn_rows)
    z = paired_z(control.firings, own.firings, own.discordant + control.discordant, own.rows)
    excess = log_ratio(totals[0], n, totals[1], n)
    low, high = middle_95(resampled)
    tested = (totals[0] + totals[1]) > 0
    found = np.zeros(len(table), bool)
    found[tested] = discoveries(two_sided(z[tested]))
    same_way = np.sign(excess) == np.sign(table["log_ratio"].to_numpy())
    return table.assign(
        rate_control=totals[1] / n,
        excess=excess,
        excess_low=low,
        excess_high=high,
        z_control=z,
        beyond=table["changed"].to_numpy() & found & same_way & (np.abs(excess) >= np.log2(FOLD)),
    )
