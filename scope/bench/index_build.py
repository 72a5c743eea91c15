"""Building a feature index, against the SAE's own encode: a store of rows like those of a trained dictionary.

1. A store on disk is filled with rows that `synthetic` makes, in windows of 256 tokens.
2. The SAE encodes rows from memory and throws the result away, in batches of the sizes that are usual; the fastest
   counts. It does so before the build and after it, so that a machine whose speed changes is not taken for a result.
3. The whole build from the store, to the last digest: reading, encoding, sorting, merging, statistics, co-firing
   features, neighbours. There is no model, hence no logit effects, which cost the same for any number of rows.

`ratio_to_encode` is by the clock; `cpu_ratio_to_encode` by processor seconds, which other work on the machine disturbs
less.
"""

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from activations.capture import capture
from activations.source import ModelIdentity, float32_to_bf16
from activations.spec import StorageDtype
from activations.store import ActivationStore
from activations.text import TextSource
from scope.bench.machine import describe_machine
from scope.bench.settings import IndexBuildBench
from scope.bench.synthetic import DictionaryLike, dictionary_like
from scope.features import FeatureIndex, build_index
from scope.saes.base import SAEMetadata
from scope.saes.topk import TopKConfig, TopKSAE

__all__ = ["bench_index_build"]

HOOK = "blocks.0.hook_resid_post"
CONTEXT = 256
MADE_ROWS = 2**14
"""Rows that are made; longer stores repeat them."""
ENCODE_BATCHES = (512, 2048, 4096)
SAMPLE_SECONDS = 0.02
LANGUAGES = 20


class _Speed(NamedTuple):
    rows_per_second: float
    rows_per_cpu_second: float


class _Pending:
    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        self._values = values

    def wait(self) -> Mapping[str, np.ndarray]:
        return self._values


class _RowModel:
    """A `HookedModel` whose rows are cut from made ones; tokens are bytes."""

    special_token_ids = frozenset({0})
    max_context_size = CONTEXT
    default_batch_size = 8192
    pads = True
    chat_template = None

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self._next = rows, 0

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity("made rows", None, "made", "bytes", 0, "none")

    def resolve_hook(self, name: str) -> str:
        return name

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return (self._rows.shape[1],)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1 for text in texts]

    def encode_chats(self, chats: Any, template: str) -> Any:
        raise AssertionError("the benchmark's text is no chats")

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return [chr(token - 1) for token in ids]

    def forward_rows(
        self, windows: Sequence[np.ndarray], hooks: Sequence[str], dtype: StorageDtype, batch_size: int
    ) -> _Pending:
        n = sum(map(len, windows))
        places = (self._next + np.arange(n)) % len(self._rows)
        self._next = (self._next + n) % len(self._rows)
        return _Pending({HOOK: self._rows[places], f"norm/{HOOK}": np.ones(n, np.float32)})


def bench_index_build(config: IndexBuildBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        config: what to run.
        say: is told what is done next.

    Returns:
        Figures, JSON-able: rows per second of encode alone and of the whole build, `ratio_to_encode`,
        `bytes_per_firing` of both directions together, `peak_memory_bytes` that the build took beyond what was there.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    n_rows = config.rows or (2**21 if device.type == "cuda" else 2**18)
    say(f"Making rows of a dictionary of {config.d_sae:,} features")
    made = dictionary_like(config.d_in, config.d_sae, config.k, min(MADE_ROWS, n_rows), 1, device)
    folder = Path(tempfile.mkdtemp(prefix="scope-bench-", dir=config.folder))
    try:
        say(f"Writing a store of {n_rows:,} rows")
        store = _store(folder, made, n_rows)
        sae = _sae(made, config.k, device)
        say("Encoding alone")
        alone = [_encode_alone(sae, made)]
        say("Building the index")
        index, built, peak = _build(store, sae, folder / "bench.index")
        say("Encoding alone, again")
        alone.append(_encode_alone(sae, made))
        return {
            "rows": index.n_rows,
            "d_in": config.d_in,
            "d_sae": config.d_sae,
            "k": config.k,
            "firings": index.n_firings,
            "encode_rows_per_second": max(speed.rows_per_second for speed in alone),
            "encode_rows_per_second_of_each_turn": [speed.rows_per_second for speed in alone],
            "build_rows_per_second": built.rows_per_second,
            "ratio_to_encode": built.rows_per_second / max(speed.rows_per_second for speed in alone),
            "cpu_ratio_to_encode": built.rows_per_cpu_second / max(speed.rows_per_cpu_second for speed in alone),
            "bytes_per_firing": _list_bytes(index) / max(index.n_firings, 1),
            "peak_memory_bytes": peak,
            **describe_machine(device),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _store(folder: Path, made: DictionaryLike, n_rows: int) -> ActivationStore:
    rows = float32_to_bf16(made.batches[0].cpu().numpy())
    text = folder / "text.jsonl"
    rng = np.random.default_rng(0)
    with text.open("w") as file:
        for number in range(-(-n_rows // 3800)):
            letters = bytes(rng.choice(np.frombuffer(b"etaoinshrdlu ,.\n", np.uint8), 4000)).decode()
            file.write(_json(f"text {number}", f"language {number % LANGUAGES}", letters))
    settings = {"max_tokens": n_rows, "context_size": CONTEXT, "dtype": "bfloat16"}
    model: Any = _RowModel(rows)
    return capture(model, TextSource([text]), [HOOK], folder / "bench.zarr", **settings).store  # type: ignore[arg-type]


def _json(title: str, language: str, text: str) -> str:
    return json.dumps({"title": title, "language": language, "source": "made", "text": text}) + "\n"


def _sae(made: DictionaryLike, k: int, device: torch.device) -> TopKSAE:
    d_sae, d_in = made.W_dec.shape
    metadata = SAEMetadata(hook_name=HOOK, model_name="made rows", weight_hash="made", tokenizer_hash="bytes")
    config = TopKConfig(d_in=d_in, d_sae=d_sae, k=k, metadata=metadata)
    sae = TopKSAE(config, device=device)
    with torch.no_grad():
        sae.W_enc.copy_(made.W_enc.T)
        sae.W_dec.copy_(made.W_dec)
        sae.b_enc.copy_(made.b_enc)
        sae.b_dec.zero_()
    return sae


@torch.inference_mode()
def _encode_alone(sae: TopKSAE, made: DictionaryLike) -> _Speed:
    x = made.batches[0].to(torch.bfloat16)
    found = []
    sae.encode_sparse(x[: ENCODE_BATCHES[0]])  # warm
    for size in ENCODE_BATCHES:
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(x), size):
            sae.encode_sparse(x[start : start + size])
        if x.is_cuda:
            torch.cuda.synchronize()
        found.append(_Speed(len(x) / (time.perf_counter() - wall), len(x) / (time.process_time() - cpu)))
    return _Speed(*map(max, zip(*found, strict=True)))


def _build(store: ActivationStore, sae: TopKSAE, out: Path) -> tuple[FeatureIndex, _Speed, int]:
    with _PeakMemory() as memory:
        wall, cpu = time.perf_counter(), time.process_time()
        index = build_index(store, sae, out)
        took = _Speed(time.perf_counter() - wall, max(time.process_time() - cpu, 1e-9))
    return index, _Speed(*(index.n_rows / seconds for seconds in took)), memory.peak


class _PeakMemory:
    """The most memory of its own that this process took, beyond what it had, sampled; a context manager."""

    peak = 0

    def __enter__(self) -> "_PeakMemory":
        self._before, self._ended = _anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, _anonymous_bytes() - self._before)

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()


def _anonymous_bytes() -> int:
    """Memory that is not a file's; 0 where the system does not say."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _list_bytes(index: FeatureIndex) -> int:
    """Bytes of the lists of both directions, with where each row's and each feature's begins."""
    parts = ("by_token", "by_feature")
    return sum(path.stat().st_size for part in parts for path in (index.path / part).rglob("*") if path.is_file())
