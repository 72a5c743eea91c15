"""Stores of denoising: what they hold against the model's own generation, going on after a stop, further hooks."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import helpers_denoising
import numpy as np
import pytest
import torch
from helpers_denoising import captured
from helpers_models import one_thread as one_thread
from helpers_models import tiny_model

from activations.capture import capture
from activations.denoising import STATES, DenoisingSettings, canvas_of
from activations.denoising_capture import capture_denoising
from activations.errors import InterruptedRunError, InvalidInputError, MismatchError
from activations.source import RowFlag
from activations.store import ActivationStore
from activations.text import TextSource

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.0.hook_resid_mid"
PROMPTS: list[dict[str, object]] = [
    {"text": "The cat sat on the"},
    {"text": ""},
    {"text": "She thinks", "suffix": " deep", "gap": 3},
    {"text": "In 1905", "title": "mill"},
    {"text": "nobody knew why"},
]
SETTINGS = DenoisingSettings(seed=11)


def _prompts(folder: Path, prompts: list[dict[str, object]] = PROMPTS) -> TextSource:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, prompts)))
    return TextSource(path)


def _store(folder: Path, **more: object) -> ActivationStore:
    options = {"settings": SETTINGS, "rows_per_group": 64, **more}
    out = folder / "acts.zarr"
    return capture_denoising(tiny_model("diffusion_gemma"), _prompts(folder), [HOOK], out, **options).store  # type: ignore[arg-type]


def _bytes(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("journal.jsonl", "lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_rows_are_the_steps_of_what_generate_returns(tmp_path: Path) -> None:
    model, store = tiny_model("diffusion_gemma"), _store(tmp_path)
    assert store.complete
    assert not store.verify()
    columns = {name: store.column(name, 0, store.n_rows) for name in store.token_columns}
    sequences, documents = store.sequences(), store.documents()
    document_of = sequences.set_index("sequence")["document"]
    assert documents["document"].tolist() == [0, 1, 2, 3]
    for number, extra in enumerate(map(json.loads, documents["extra"])):
        seed = int(extra["seed"])
        assert seed == 11 + [0, 2, 3, 4][number]
        own = document_of.loc[columns["sequence"]].to_numpy() == number
        if number != 1:  # which has a suffix
            tokens = model.tokenize(extra["prompt"])
            torch.manual_seed(seed)
            theirs = model.hf.generate(tokens[None]).sequences[0, len(tokens) :].numpy()
        else:
            (document,) = [some for some in _prompts(tmp_path).documents() if some.extra.get("gap")]
            blocks = model.denoise(canvas_of(document, model), SETTINGS, seed, [], "float32")
            theirs = np.concatenate([block.final for block in blocks])
            assert (columns["state"][own] == STATES.index("prompt")).sum() == 5 * len(model.tokenize(" deep", False))
        for canvas in (0, 1):
            for step in range(5):
                here = own & (columns["block"] == canvas) & (columns["step"] == step)
                assert columns["position"][here].tolist() == list(range(8))
                assert np.array_equal(columns["final_id"][here], theirs[8 * canvas : 8 * canvas + 8])
    offsets = sequences[sequences["document"] == 0]["document_offset"].tolist()
    n_prompt = len(model.tokenize("The cat sat on the"))
    assert offsets == [n_prompt] * 5 + [n_prompt + 8] * 5
    # committed at a step, read as committed at the next
    state, step, commit = columns["state"], columns["step"], columns["commit_step"]
    assert (state[(commit >= 0) & (step == commit)] == STATES.index("committing")).all()
    assert (state[(commit >= 0) & (step > commit)] == STATES.index("committed")).all()
    held_out = (columns["flags"] & RowFlag.HELD_OUT) > 0
    assert np.array_equal(held_out, documents["held_out"].to_numpy()[document_of.loc[columns["sequence"]].to_numpy()])


def test_a_run_that_was_stopped_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    expected = _bytes(Path(_store(whole).path))

    def stop_after(n: int) -> Callable[[int, int | None], None]:
        calls = iter(range(n))

        def progress(done: int, total: int | None) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt

        return progress

    for n in (1, 2, 1):
        with pytest.raises(InterruptedRunError):
            _store(stopped, progress=stop_after(n))
    store = _store(stopped)
    assert _bytes(Path(store.path)) == expected
    assert _bytes(Path(_store(stopped).path)) == expected


def test_a_run_that_was_killed_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = _bytes(Path(captured(whole).path))
    for n in (3, 1, 9):
        command = [sys.executable, helpers_denoising.__file__, str(killed), str(n)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not ActivationStore.open(killed / "s.zarr").verify()
    assert _bytes(Path(captured(killed).path)) == expected


def test_further_hooks_see_the_same_steps(tmp_path: Path) -> None:
    model, prompts, out = tiny_model("diffusion_gemma"), _prompts(tmp_path), tmp_path / "acts.zarr"
    _store(tmp_path)
    capture_denoising(model, prompts, [OTHER], out, settings=SETTINGS, rows_per_group=64)
    together = capture_denoising(model, prompts, [HOOK, OTHER], tmp_path / "both.zarr", settings=SETTINGS).store
    store = ActivationStore.open(out)
    assert store.hooks == (OTHER, HOOK)
    for hook in store.hooks:
        assert np.array_equal(store.read(hook, 0, store.n_rows), together.read(hook, 0, store.n_rows))


def test_rows_stop_where_they_are_told_to(tmp_path: Path) -> None:
    store = _store(tmp_path, max_rows=100)
    assert store.n_rows == 100
    assert store.complete
    assert store.sequences()["n_rows"].sum() == 100
    assert len(store.documents()) == 2


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    model, out = tiny_model("diffusion_gemma"), tmp_path / "acts.zarr"
    store = _store(tmp_path)
    with pytest.raises(MismatchError, match="seed is 12, the store has 11"):
        _store(tmp_path, settings=DenoisingSettings(seed=12))
    with pytest.raises(InvalidInputError):
        capture(model, None, ["encoder.hook_embed"], out)
    with pytest.raises(InvalidInputError, match="a suffix alone"):
        capture_denoising(model, _prompts(tmp_path, [{"text": "a", "suffix": "b"}]), [HOOK], tmp_path / "x.zarr")
    prompts = _prompts(tmp_path, [{"text": "a", "suffix": "b", "gap": 8}])
    with pytest.raises(InvalidInputError, match="more than a canvas"):
        capture_denoising(model, prompts, [HOOK], tmp_path / "x.zarr")
    for lacking, said in (
        ({"text": "a", "suffix": "b" * 1001, "gap": 2}, "a gap alone; .* up to 1,000 characters"),
        ({"text": " ", "suffix": "b", "gap": 2}, "a gap and no text before it"),
    ):
        prompts = _prompts(tmp_path, [{"text": "a"}, lacking])
        with pytest.raises(InvalidInputError, match=said):
            capture_denoising(model, prompts, [HOOK], tmp_path / "x.zarr")
    assert not (tmp_path / "x.zarr").exists()
    with pytest.raises(InvalidInputError, match="max_steps is 0"):
        DenoisingSettings(max_steps=0)
    assert store.n_rows == 320
