"""A model without torch that denoises, and a capture of it that kills itself.

python tests/helpers_denoising.py FOLDER N      kill -9 when N row groups were handed on
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from helpers_activations import FakeModel

from activations.denoising import Canvas, DenoisedBlock, DenoisingSettings, states_of
from activations.denoising_capture import capture_denoising
from activations.spec import StorageDtype
from activations.store import ActivationStore
from activations.text import TextSource

HOOK = "blocks.1.hook_resid_post"


class Planted(FakeModel):
    """Commits two tokens of eight a step; a row is noise, and on tokens that are noise one direction besides."""

    def denoising_configuration(self, settings: DenoisingSettings) -> dict[str, Any]:
        return {"steps": 4}

    def require_canvas(self, canvas: Canvas, settings: DenoisingSettings) -> None: ...

    def denoise(
        self, canvas: Canvas, settings: DenoisingSettings, seed: int, hooks: Sequence[str], dtype: StorageDtype
    ) -> list[DenoisedBlock]:
        rng = np.random.default_rng(seed)
        accepted = rng.permutation(8) < 2 * np.arange(1, 5)[:, None]
        given = np.zeros(8, bool)
        tokens = rng.integers(3, 259, (4, 8)).astype(np.int32)
        states = states_of(accepted, given)
        rows = 0.1 * rng.normal(size=(32, 12)).astype(np.float32)
        rows[:, 5] = np.isin(states.ravel(), [1, 2]) * 3.0
        values = {HOOK: rows, f"norm/{HOOK}": np.linalg.norm(rows, axis=1).astype(np.float32)}
        return [DenoisedBlock(0, len(canvas.prefix), tokens, accepted, given, tokens[-1], values)]


class Wide(FakeModel):
    """Gives a row group of 512 zeros for each prompt, four steps of a canvas of 128 tokens."""

    def denoising_configuration(self, settings: DenoisingSettings) -> dict[str, Any]:
        return {}

    def require_canvas(self, canvas: Canvas, settings: DenoisingSettings) -> None: ...

    def denoise(
        self, canvas: Canvas, settings: DenoisingSettings, seed: int, hooks: Sequence[str], dtype: StorageDtype
    ) -> list[DenoisedBlock]:
        (hook,) = hooks
        tokens, accepted = np.full((4, 128), 9, np.int32), np.ones((4, 128), bool)
        values = {hook: np.zeros((512, *self.hooks[hook]), np.uint16), f"norm/{hook}": np.zeros(512, np.float32)}
        return [DenoisedBlock(0, len(canvas.prefix), tokens, accepted, np.zeros(128, bool), tokens[0], values)]


def captured(folder: Path, kill_after: int | None = None) -> ActivationStore:
    """Twelve prompts, 384 rows in groups of 16; killed after so many groups, if that is said."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(f'{{"text": "prompt {n}"}}' for n in range(12)))
    left = kill_after

    def progress(done: int, total: int | None) -> None:
        nonlocal left
        if left is not None:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return capture_denoising(
        Planted(), TextSource(prompts), [HOOK], folder / "s.zarr", dtype="float32", rows_per_group=16, progress=progress
    ).store


if __name__ == "__main__":
    captured(Path(sys.argv[1]), int(sys.argv[2]))
