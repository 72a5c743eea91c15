"""A tiny index built for real: a fake store over texts in several languages (Arabic, Japanese, a token that is part of
a character, `<script>`), small SAEs, and a fake model that gives strings and logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from activations.source import ActivationBatch, ModelIdentity, RowFlag, bf16_to_float32, float32_to_bf16
from activations.spec import CaptureSpec, fingerprint_of
from scope.features import FeatureIndex, build_index
from scope.models.token_text import texts_of
from scope.saes.base import SAEMetadata, SparseFeatures
from scope.saes.topk import TopKConfig, TopKSAE

HOOK = "blocks.1.hook_resid_post"
D_IN = 12
BOS = 1
TEXTS = [
    ("alice", "gutenberg", "en", "Alice was beginning to get very tired of sitting by her sister on the bank. "),
    ("sockets.py", "code", "code-python", "def f(x):\n    return '<script>alert(1)</script>' + x\n"),
    ("ألف ليلة", "handbook", "ar", "يُحكى أنه كان في قديم الزمان ملك من ملوك ساسان"),
    ("吾輩は猫である", "handbook", "ja", "吾輩は猫である。名前はまだ無い。"),
    ("<b>markup</b> & more", "handbook", "en", "Every page of the book is translated. Every page is the same. "),
]


@dataclass
class FakeModel:
    """Tokens are words, single signs, or the bytes of CJK characters."""

    d_model: int = D_IN
    name: str = "fake model"
    weight_hash: str = "weights"
    vocabulary: list[bytes] = field(default_factory=lambda: [b"<pad>", b"<bos>"])

    def __post_init__(self) -> None:
        self._ids = {piece: number for number, piece in enumerate(self.vocabulary)}

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(self.name, None, self.weight_hash, "tokenizer", BOS, "float32")

    @property
    def d_vocab(self) -> int:
        return len(self.vocabulary)

    special_token_ids = frozenset({0, BOS})

    def encode(self, text: str) -> list[int]:
        import re

        pieces: list[bytes] = []
        for part in re.findall(r" ?[^\W\d_\u3040-\u9fff]+|\s|.", text):
            split = len(part) == 1 and ord(part) > 0x3000
            pieces += [bytes([byte]) for byte in part.encode()] if split else [part.encode()]
        for piece in pieces:
            if piece not in self._ids:
                self._ids[piece] = len(self.vocabulary)
                self.vocabulary.append(piece)
        return [self._ids[piece] for piece in pieces]

    def vocabulary_strings(self, ids: Sequence[int]) -> list[str]:
        return [texts_of([token], [self.vocabulary[token]], frozenset())[0].text for token in ids]

    def logit_effects(self, directions: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        unembedding = torch.randn(self.d_vocab, self.d_model, generator=generator)
        effects = directions @ unembedding.T
        return effects - effects.mean(-1, keepdim=True)


class FakeStore:
    """What `build_index` asks of a store, in memory; rows are random, and a BOS row is a hundred times as long."""

    dtype = "bfloat16"
    hooks = (HOOK,)

    def __init__(self, model: FakeModel, repeats: int = 2, context_size: int = 24, seed: int = 0) -> None:
        self.model = model
        documents, sequences = [], []
        columns: dict[str, list[int]] = {"token_id": [], "sequence": [], "position": [], "flags": []}
        for document, (title, source, language, text) in enumerate(TEXTS * repeats):
            ids = model.encode(text * (1 + document % 3))
            documents.append((document, title, source, language, "CC0", len(ids), False))
            for offset in range(0, len(ids), context_size - 1):
                window = [BOS, *ids[offset : offset + context_size - 1]]
                number = len(sequences)
                sequences.append((number, document, len(columns["token_id"]), len(window), offset))
                columns["token_id"] += window
                columns["sequence"] += [number] * len(window)
                columns["position"] += range(len(window))
                columns["flags"] += [int(RowFlag.BOS), *[0] * (len(window) - 1)]
        self.columns = {name: np.array(values) for name, values in columns.items()}
        self._documents = pd.DataFrame(
            documents, columns=["document", "title", "source", "language", "license", "n_tokens", "held_out"]
        )
        names = ["sequence", "document", "start_row", "n_rows", "document_offset"]
        self._sequences = pd.DataFrame(sequences, columns=names)
        rng = np.random.default_rng(seed)
        # Rows depend on their token, so that features have top tokens.
        by_token = rng.normal(size=(model.d_vocab, D_IN))
        x = by_token[self.columns["token_id"]] + 0.5 * rng.normal(size=(self.n_rows, D_IN))
        x[self.columns["flags"] > 0] *= 100
        self.x = bf16_to_float32(float32_to_bf16(x.astype(np.float32)))
        self.fail_at: int | None = None
        self.spec = CaptureSpec(model.name, None, "weights", "tokenizer", context_size, BOS, "float32", "bfloat16", 64)

    @property
    def n_rows(self) -> int:
        return len(self.columns["token_id"])

    @property
    def fingerprint(self) -> str:
        return fingerprint_of([self.spec.fingerprint, self.n_rows, float(self.x.sum())])

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return (D_IN,)

    def rows(self, start: int, stop: int) -> Any:
        return type("Rows", (), {name: column[start:stop] for name, column in self.columns.items()})

    def sequences(self) -> pd.DataFrame:
        return self._sequences.copy()

    def documents(self) -> pd.DataFrame:
        return self._documents.copy()

    def batches(self, hooks: Sequence[str], batch_size: int, start: int = 0) -> Iterator[ActivationBatch]:
        for first in range(start, self.n_rows, batch_size):
            if self.fail_at is not None and first >= self.fail_at:
                raise KeyboardInterrupt
            rows = np.arange(first, min(first + batch_size, self.n_rows))
            x = self.x[rows]
            norms = {HOOK: np.linalg.norm(x, axis=1).astype(np.float32)}
            yield ActivationBatch(rows, {HOOK: float32_to_bf16(x)}, self.columns["flags"][rows].astype(np.uint8), norms)


class GrowingStore(FakeStore):
    """A store that holds its first `rows_so_far` rows as yet; what it will hold is there from the start."""

    def __init__(self, model: FakeModel, rows_so_far: int, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.whole = len(self.columns["token_id"])
        self.rows_so_far = rows_so_far

    @property
    def n_rows(self) -> int:
        return getattr(self, "rows_so_far", len(self.columns["token_id"]))

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(["growing", self.spec.fingerprint, float(self.x.sum())])

    def sequences(self) -> pd.DataFrame:
        table = self._sequences[self._sequences["start_row"] < self.n_rows].reset_index(drop=True)
        return table.assign(n_rows=table["n_rows"].clip(upper=self.n_rows - table["start_row"]))

    def documents(self) -> pd.DataFrame:
        return self._documents[self._documents["document"] <= self.sequences()["document"].max()].reset_index(drop=True)


def small_sae(d_sae: int = 40, k: int = 4, seed: int = 0, **metadata: Any) -> TopKSAE:
    """A TopK SAE with decoder rows of unlike norms, of the fake store's model; feature 5 never fires."""
    known = {"hook_name": HOOK, "model_name": "fake model", "weight_hash": "weights", "tokenizer_hash": "tokenizer"}
    config = TopKConfig(d_in=D_IN, d_sae=d_sae, k=k, metadata=SAEMetadata(**{**known, **metadata}))
    sae = TopKSAE(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, d_sae)[:, None])
        sae.b_enc[5] = -1e6
    return sae


class WideSAE:
    """Every feature whose pre-activation passes a threshold fires: rows have unlike numbers of firings, some of them
    negative, and ids may pass 65,536."""

    def __init__(self, d_sae: int, threshold: float = 1.5, signed: bool = False) -> None:
        base = small_sae(d_sae)
        self.cfg = replace(base.cfg, k=1)
        self.W_enc, self.W_dec = base.W_enc.detach(), base.W_dec.detach()
        self.d_in, self.d_sae, self.hook_name = D_IN, d_sae, HOOK
        self.threshold, self.signed = threshold, signed
        self.decoder_norms = base.decoder_norms
        self.fingerprint = fingerprint_of(["wide", d_sae, threshold, signed])

    def encode(self, x: Tensor) -> Tensor:
        pre = x.float() @ self.W_enc
        return torch.where((pre.abs() if self.signed else pre) > self.threshold, pre, 0)

    def encode_sparse(self, x: Tensor) -> SparseFeatures:
        dense = self.encode(x)
        width = max(1, int((dense != 0).sum(dim=-1).max()))
        _, ids = torch.topk(dense.abs(), width, dim=-1, sorted=False)
        return SparseFeatures(ids, dense.gather(-1, ids))


def dense_strengths(store: FakeStore, sae: Any) -> np.ndarray:
    """Firing strengths of every row and feature, rounded to bfloat16, BOS rows zero: what an index must hold."""
    with torch.no_grad():
        dense = sae.encode(torch.from_numpy(store.x)) * sae.decoder_norms
    strengths = dense.to(torch.bfloat16).float().numpy()
    strengths[store.columns["flags"] > 0] = 0
    assert strengths.any(), "a comparison with nothing shows nothing"
    return strengths


def tiny_index(folder: Path, **options: Any) -> tuple[FeatureIndex, FakeStore, TopKSAE]:
    """An index with everything in it that is hard to show, its store and its SAE."""
    model = FakeModel()
    store = FakeStore(model)
    sae = small_sae()
    settings = {"model": model, "metrics": {"fvu": 0.1, "l0": 4.0}, "batch_size": 50, "segment_firings": 300}
    return build_index(store, sae, folder / "tiny.index", **{**settings, **options}), store, sae
