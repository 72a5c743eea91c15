"""Fake models whose rows are sparse sums of known directions, for comparisons of which the answer is known."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from helpers_activations import FakeModel, write_text

from activations.capture import capture
from activations.manifest import write_manifest
from activations.spec import fingerprint_of
from activations.store import ActivationStore
from activations.text import TextSource
from scope.diffing.pair import PairedStores
from scope.diffing.stored import CROSSCODER, FORMAT, REPORT, sae_file

HOOK = "blocks.1.hook_resid_post"
WIDTH, N_SHARED, ACTIVE = 24, 16, 3
OWN = N_SHARED
"""The direction that only the planted model writes."""


def directions() -> np.ndarray:
    """Orthonormal rows `(WIDTH, WIDTH)`."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]


@dataclass
class PlantedModel(FakeModel):
    """Each row has three of the shared directions; where `planted`, every seventh token or so one more of its own."""

    planted: float = 0.0
    """Size of the direction of its own."""
    noise: float = 0.02

    def __post_init__(self) -> None:
        self.hooks: Mapping[str, tuple[int, ...]] = {HOOK: (WIDTH,)}

    def rows_at(self, hook: str, window: np.ndarray) -> np.ndarray:
        state = np.cumsum(window.astype(np.int64) * (np.arange(len(window)) * 7919 + 104_729)) % 1_000_003
        rows = np.zeros((len(window), WIDTH))
        basis = directions()
        for at, value in enumerate(state):
            rng = np.random.default_rng(int(value))
            chosen = rng.choice(N_SHARED, ACTIVE, replace=False)
            rows[at] = rng.uniform(1, 3, ACTIVE) @ basis[chosen] + self.noise * rng.normal(size=WIDTH)
            own = rng.uniform(1, 3)
            rows[at] += (value % 7 == 0) * self.planted * own * basis[OWN]
        return rows.astype(np.float32)


def stores_of(folder: Path, base: FakeModel, tuned: FakeModel, n_documents: int = 120) -> PairedStores:
    """Both models captured on one text of two sources."""
    half = n_documents // 2
    text = TextSource([write_text(folder / f"{name}.jsonl", half, seed) for seed, name in enumerate(("one", "two"))])
    opened = []
    for which, model in (("base", base), ("tuned", tuned)):
        capture(model, text, [HOOK], folder / f"{which}.zarr", context_size=64, dtype="float32")
        opened.append(ActivationStore.open(folder / f"{which}.zarr"))
    return PairedStores(*opened)


def written_report(folder: Path, token: str = "<b>thou</b>") -> str:
    """A small report of two models in a folder, written by hand; returns its id."""
    example = {"row": 3, "strength": 2.0, "source": "plays", "title": "one", "before": "", "token": token, "after": ""}
    layers = [
        {"hook": f"blocks.{layer}.hook_resid_post", "layer": layer, "source": source, "change": 0.1 * layer,
         "change_low": 0.09 * layer, "change_high": 0.11 * layer, "cosine": 0.9, "n_rows": 50}
        for layer in range(3) for source in ("all", "plays")
    ]  # fmt: skip
    predictions = [
        {"source": source, "ce_base": 3.5, "ce_tuned": 3.25, "kl": 0.1, "top1": 0.8, "ce_change": -0.25,
         "ce_change_low": -0.3, "ce_change_high": -0.2, "n_tokens": 40, "n_documents": 4}
        for source in ("all", "plays")
    ]  # fmt: skip
    sae = {
        "name": "topk", "fingerprint": "0" * 64, "hook": HOOK, "fvu_base": 0.05, "fvu_tuned": 0.06,
        "fvu_change_interval": [0.005, 0.015], "changed": 1, "firing": 3, "more_often": 1, "less_often": 0,
        "n_rows": 50, "mean_agreement": 0.9, "mean_decoder_cosine": 0.99, "beyond": 1, "changed_in_control": 2,
        "by_source": [{"source": "plays", "firing": 3, "changed": 1, "more_often": 1, "beyond": 1,
                       "beyond_more_often": 1}],
        "examples": {"1": {"base": [], "tuned": [example]}},
    }  # fmt: skip
    crosscoder = {
        "hook": HOOK, "fvu": 0.1, "d_sae": 3, "places": {"shared": 1, "tuned": 2},
        "verdicts": {"tuned": {"specific": 1, "shrinkage": 1}, "base": {}},
        "limits": {"nu_error": 0.2, "nu_reconstruction": 0.5, "firings": 20},
        "examples": {"tuned": [{"feature": 1, "firings": 30, "nu_error": 0.1, "nu_reconstruction": 0.1,
                                "examples": [example]}], "base": []},
    }  # fmt: skip
    conclusions = [{"statement": "The loss is the same, in nats", "figure": 0.25, "limit": 0.05, "holds": False}]
    figures = {
        "base": {"model": "gemma"}, "tuned": {"model": "gemma on plays"}, "layers": layers, "predictions": predictions,
        "saes": [sae], "crosscoder": crosscoder, "conclusions": conclusions,
        "control": {"model": "gemma on nothing", "id": "0" * 12, "layers": [], "predictions": predictions,
                    "crosscoder": {"hook": HOOK, "places": {}, "verdicts": {"tuned": {"specific": 2}, "base": {}}}},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / REPORT).write_text(json.dumps(figures))
    rates = {"rate_base": 0.1, "rate_tuned": 0.2, "log_ratio": 1.0, "log_ratio_low": 0.5, "log_ratio_high": 1.5}
    known = {"z": 5.0, "agreement": 0.5, "decoder_cosine": 0.9, "source": "plays", "lift": 1.0}
    control = {"rate_control": 0.1, "excess": 1.0, "excess_low": 0.5, "excess_high": 1.5, "z_control": 4.0}
    rows = [
        {"feature": feature, **rates, **known, **control, "changed": feature == 1, "beyond": feature == 1}
        for feature in range(3)
    ]
    table = pd.DataFrame(rows)
    table.to_parquet(folder / sae_file(0))
    places, verdicts = ["shared", "tuned", "tuned"], ["", "specific", "shrinkage"]
    nu = {f"{name}{end}": 0.1 for name in ("nu_error", "nu_reconstruction") for end in ("", "_low", "_high")}
    table = pd.DataFrame({"feature": range(3), "firings": 30, "place": places, "verdict": verdicts, **nu})
    table.to_parquet(folder / f"{CROSSCODER}.parquet")
    manifest = write_manifest(folder, FORMAT, fingerprint_of(figures), [], "tests")
    return str(manifest["fingerprint"])[:12]
