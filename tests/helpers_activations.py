"""A `HookedModel` without torch: causal, deterministic, and as fast as numpy."""

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from activations.chats import CONTENT_KINDS, Chat, ChatTokens, role_code
from activations.errors import UnknownNameError
from activations.source import ModelIdentity, float32_to_bf16
from activations.spec import StorageDtype
from activations.store import ActivationStore

BOS = 2
SPECIAL = frozenset({0, 1, BOS})
HOOKS = {"blocks.0.hook_resid_post": (12,), "blocks.1.attn.hook_z": (3, 5), "blocks.1.hook_resid_post": (12,)}
ALIASES = {"blocks.1.hook_out": "blocks.1.hook_resid_post"}


@dataclass
class FakePending:
    values: Mapping[str, np.ndarray]

    def wait(self) -> Mapping[str, np.ndarray]:
        return self.values


@dataclass
class FakeModel:
    """Tokens are bytes + 3; a row is a fixed function of the tokens up to it, whatever runs beside it."""

    name: str = "fake"
    bos_token_id: int | None = BOS
    max_context_size: int = 512
    default_batch_size: int = 8192
    pads: bool = True
    hooks: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(HOOKS))
    calls: list[tuple[int, int]] = field(default_factory=list)
    """(windows, tokens with padding) of each forward pass."""

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(self.name, None, f"weights of {self.name}", "bytes", self.bos_token_id, "float32")

    @property
    def special_token_ids(self) -> frozenset[int]:
        return SPECIAL

    def known_hooks(self) -> list[str]:
        return [*self.hooks, *ALIASES]

    def resolve_hook(self, name: str) -> str:
        name = ALIASES.get(name, name)
        if name not in self.hooks:
            raise UnknownNameError("hook", name, self.hooks)
        return name

    def hook_shape(self, name: str) -> tuple[int, ...]:
        return self.hooks[name]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3 for text in texts]

    @property
    def chat_template(self) -> str | None:
        return "fake"

    def encode_chats(self, chats: Sequence[Chat], template: str) -> list[ChatTokens]:
        """Turns are written `<role>content`, calls as `name`, and the special token 1."""
        encoded = []
        for chat in chats:
            tokens, roles, kinds, numbers = [], [], [], []
            for number, message in enumerate(chat.messages):
                head, said = self.encode_documents([f"<{message.role}>", message.content])
                (calls,) = self.encode_documents(["".join(call["function"]["name"] for call in message.tool_calls)])
                spoken = "tool_response" if message.role == "tool" else "text"
                end = np.array([1])
                for piece, kind in ((head, "markup"), (said, spoken), (calls, "tool_call"), (end, "markup")):
                    tokens.append(piece)
                    roles.append(np.full(len(piece), 0 if piece is head else role_code(message.role)))
                    kinds.append(np.full(len(piece), CONTENT_KINDS.index(kind)))
                    numbers.append(np.full(len(piece), -1 if piece is head else number))
            encoded.append(
                ChatTokens(
                    np.concatenate(tokens).astype(np.int32),
                    np.concatenate(roles).astype(np.uint8),
                    np.concatenate(kinds).astype(np.uint8),
                    np.concatenate(numbers).astype(np.int32),
                )
            )
        return encoded

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return [chr(token - 3) if token >= 3 else f"<{token}>" for token in ids]

    def forward_rows(
        self, windows: Sequence[np.ndarray], hooks: Sequence[str], dtype: StorageDtype, batch_size: int
    ) -> FakePending:
        longest = max(map(len, windows))
        self.calls.append((len(windows), longest * len(windows)))
        assert len(windows) == 1 or longest * len(windows) <= batch_size
        values: dict[str, np.ndarray] = {}
        for hook in hooks:
            rows = np.concatenate([self.rows_at(hook, window) for window in windows])
            values[f"norm/{hook}"] = np.linalg.norm(rows.reshape(len(rows), -1), axis=1).astype(np.float32)
            with np.errstate(over="ignore"):  # float16: capture is to find it
                values[hook] = float32_to_bf16(rows) if dtype == "bfloat16" else rows.astype(dtype)
        return FakePending(values)

    def rows_at(self, hook: str, window: np.ndarray) -> np.ndarray:
        """float32 `(length, *feature_shape)`: a hash of each prefix, spread over the features."""
        shape = self.hooks[hook]
        state = np.cumsum(window.astype(np.int64) * (np.arange(len(window)) * 7919 + 104_729)) % 1_000_003
        phase = sorted(self.hooks).index(hook) + 1
        features = np.arange(1, np.prod(shape) + 1)
        values = np.sin(state[:, None] * 0.001 * features + phase) * (1 + state[:, None] % 7)
        return values.astype(np.float32).reshape(len(window), *shape)


def write_text(path: Path, n_documents: int = 24, seed: int = 0, longest: int = 90) -> Path:
    """A jsonl file of random documents, some empty, of several languages."""
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        for number in range(n_documents):
            text = "".join(rng.choice(list("abc ~"), rng.integers(0, longest)))
            row = {"text": text, "title": f"title {number}", "language": ["en", "de"][number % 2], "score": number}
            file.write(json.dumps(row) + "\n")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a store with its bytes, but the journal, which holds times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "journal.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def expected_rows(model: FakeModel, store: ActivationStore, hook: str) -> np.ndarray:
    """What the model gives for every row of a store, each window run alone and whole (float32)."""
    tokens = store.rows(0, store.n_rows)
    starts = np.flatnonzero(tokens.position == 0)
    windows = np.split(tokens.token_id, starts[1:])
    return np.concatenate([model.rows_at(hook, window) for window in windows])


@contextmanager
def pythons_own_sigint() -> Iterator[None]:
    """Within, Ctrl-C does what it does in a terminal: a shell's background jobs begin by ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
