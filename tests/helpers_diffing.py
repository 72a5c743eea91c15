"""Fake models whose rows are sparse sums of known directions, for comparisons of which the answer is known."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from helpers_activations import FakeModel, write_text

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.diffing.pair import PairedStores

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
    """Both models captured on one text."""
    text = TextSource([write_text(folder / "text.jsonl", n_documents=n_documents)])
    opened = []
    for which, model in (("base", base), ("tuned", tuned)):
        capture(model, text, [HOOK], folder / f"{which}.zarr", context_size=64, dtype="float32")
        opened.append(ActivationStore.open(folder / f"{which}.zarr"))
    return PairedStores(*opened)
