"""Reading back: verified rows in order and shuffled, against the disk, with the page cache emptied before each.

The store that is read is large enough for the disk to matter on any machine, so a model that makes rows from nothing
fills it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from activations.capture import capture
from activations.chats import Chat, ChatTokens
from activations.shuffle import NO_FLAGS, Selection, ShuffledBatches
from activations.source import ModelIdentity
from activations.spec import StorageDtype
from activations.store import ActivationStore
from activations.text import TextSource
from scope.bench.machine import drop_from_cache, raw_read_bandwidth

__all__ = ["reading_figures"]

HOOK = "blocks.0.hook_resid_post"
WIDTH = 2048
ROWS = 2**18
MEMORY_BYTES = 2**28
"""Of the shuffled stream's buffer: a quarter of the store."""
BATCH_ROWS = 4096
ROUNDS = 3


class _Rows:
    """Rows on their way to the host, which they never left."""

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        self._values = values

    def wait(self) -> Mapping[str, np.ndarray]:
        return self._values


class _RowMaker:
    """A `HookedModel` of one hook, whose rows are cut from one block of random bfloat16 bits; tokens are bytes."""

    special_token_ids = frozenset({0})
    max_context_size = 1024
    default_batch_size = 8192
    pads = True
    chat_template = None

    def __init__(self) -> None:
        self._block = np.random.default_rng(0).integers(0, 0x7F00, (self.default_batch_size, WIDTH), np.uint16)
        self._norms = np.ones(self.default_batch_size, np.float32)

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity("rows from nothing", None, "none", "bytes", 0, "none")

    def known_hooks(self) -> list[str]:
        return [HOOK]

    def resolve_hook(self, name: str) -> str:
        return name

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return (WIDTH,)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1 for text in texts]

    def encode_chats(self, chats: Sequence[Chat], template: str) -> list[ChatTokens]:
        raise AssertionError("the benchmark's text is no chats")

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return [chr(token - 1) for token in ids]

    def forward_rows(
        self, windows: Sequence[np.ndarray], hooks: Sequence[str], dtype: StorageDtype, batch_size: int
    ) -> _Rows:
        n_rows = sum(map(len, windows))
        return _Rows({HOOK: self._block[:n_rows], f"norm/{HOOK}": self._norms[:n_rows]})


def reading_figures(folder: Path, text: TextSource, say: Callable[[str], None]) -> dict[str, float]:
    """Bytes per second of writing such a store, of the disk's plain reads, and of ours in order and shuffled; the best
    of three rounds each.

    Args:
        folder: where the store goes; a gigabyte.
        text: of at least 260,000 bytes.
        say: is told what is measured next.
    """
    say(f"Reading back {ROWS * WIDTH * 2 / 2**30:.0f} GiB")
    out = folder / "reading.zarr"
    started = time.perf_counter()
    store = capture(_RowMaker(), text, [HOOK], out, max_tokens=ROWS, context_size=1024).store
    n_bytes = store.n_rows * WIDTH * 2
    figures = {"store_write_bytes_per_second": n_bytes / (time.perf_counter() - started)}
    files = sorted((out / "hooks" / HOOK).glob("c.*"))
    runs: dict[str, Callable[[], float]] = {
        "disk_read_bytes_per_second": lambda: max(raw_read_bandwidth(files, threads) for threads in (1, 2, 4)),
        "read_bytes_per_second": lambda: n_bytes / _seconds(lambda: _in_order(store), files),
        "shuffled_bytes_per_second": lambda: n_bytes / _seconds(lambda: _shuffled(store), files),
    }
    for name, run in runs.items():
        figures[name] = max(run() for _ in range(ROUNDS))
    figures["read_ratio_to_disk"] = figures["read_bytes_per_second"] / figures["disk_read_bytes_per_second"]
    figures["shuffled_ratio_to_read"] = figures["shuffled_bytes_per_second"] / figures["read_bytes_per_second"]
    return figures


def _seconds(run: Callable[[], int], files: Sequence[Path]) -> float:
    drop_from_cache(list(files))
    started = time.perf_counter()
    n_rows = run()
    seconds = time.perf_counter() - started
    assert n_rows == ROWS, "all rows were read"
    return seconds


def _in_order(store: ActivationStore) -> int:
    return sum(len(batch.rows) for batch in store.batches([HOOK], BATCH_ROWS))


def _shuffled(store: ActivationStore) -> int:
    everything = Selection(NO_FLAGS)
    batches = ShuffledBatches(store, HOOK, BATCH_ROWS, seed=0, passes=1, memory_bytes=MEMORY_BYTES, select=everything)
    return sum(len(batch.rows) for batch in batches)
