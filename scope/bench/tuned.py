"""`scope bench tune`: a copy of a model, fine-tuned a little on one source of a text, so that `scope diff` has a pair
of which one knows what was trained in.

1. *Text*: windows of `context_size` tokens, BOS first, of the documents of `source` that are not held out, in random
   order. With the source `model` the windows are drawn from the model itself, token by token at temperature 1: text
   on which its loss has no slope on average, the control that a fine-tuning on nothing is.
2. *Loss*: the cross-entropy of the next token. With `own_vocabulary` the softmax is over the token types of the windows
   and of the beginnings of up to 2,000 documents of all sources, as most of a step's cost is a vocabulary of 262,144.
   Of types in neither the copy learns nothing; with those of the windows alone it would unlearn whatever they lack.
3. *Weights*: those of the layers from `first_layer` to `last_layer`, with Adam, without weight decay; embeddings, norms
   outside the layers and everything else stay as they are. The learning rate rises over a tenth of the steps and falls
   linearly to 0 over the rest; a step's gradient is clipped to norm 1.
4. *What it gained*: the loss before and after on `held_out` windows of each source of the text, of held-out documents,
   with the whole vocabulary. A copy that learnt its source falls on it, and moves little on the others.

The copy is written as Hugging Face lays a model out, in float32, with the tokenizer and `tuned.json`, which says how it
was made. The same settings give the same copy on the same machine.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from activations.text import TextSource, is_held_out
from scope.bench.settings import TunedCopy
from scope.errors import InvalidInputError, OccupiedError, UnknownNameError
from scope.models import LanguageModel
from scope.sample import sample_text

__all__ = ["OWN_TEXT", "tuned_copy"]

OWN_TEXT = "model"
"""The source that stands for text which the model writes itself."""
TOLD = 10
"""How often the loss is told, and lies in what is returned."""
DOCUMENTS_AT_ONCE = 64
KNOWN_DOCUMENTS, KNOWN_CHARACTERS = 2_000, 500
"""Beginnings of documents whose token types are in the softmax."""


def tuned_copy(settings: TunedCopy, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Fine-tune a copy of a model and write it.

    Args:
        settings: which model, which text, how long.
        out: the folder to make.
        say: told what is done, now and then.

    Returns:
        The settings, `losses` (of ten stretches of the run, nats a token), `held_out` (by source `[before, after]`,
        nats a token), `n_tokens`, `n_types`, `n_trained` (parameters) and `seconds`.

    Raises:
        OccupiedError: `out` exists and is not empty.
        UnknownNameError: the text has no such source.
        InvalidInputError: the source has too few tokens, or the layers do not exist.
    """
    if out.exists() and any(out.iterdir()):
        raise OccupiedError(f"{out} is not empty. Give a folder that does not exist yet.")
    model = LanguageModel.load(settings.model, device=settings.device, dtype="float32")
    first, last = _layers(settings, model)
    n_windows = min(settings.steps, settings.windows_at_most) * settings.batch_size
    started = time.perf_counter()
    windows = _own_windows(model, settings, n_windows, say) if settings.source == OWN_TEXT else None
    if windows is None:
        windows = _text_windows(model, settings, n_windows)
    say(f"{len(windows):,} windows of {settings.context_size} tokens ({time.perf_counter() - started:.0f} s)")
    trained = [
        parameter
        for layer in range(first, last + 1)
        for parameter in model.hf.get_submodule(model.layout.layer(layer)).parameters()
    ]
    types = _types(model, settings, windows)
    measured = _held_out_windows(model, settings)
    before = _losses(model, measured)
    losses = _train(model, windows, types, trained, settings, say)
    after = _losses(model, measured)
    for source in measured:
        say(f"held-out {source}: loss {before[source]:.3f} -> {after[source]:.3f}")
    figures = {
        **asdict(settings),
        "losses": losses,
        "held_out": {source: [before[source], after[source]] for source in measured},
        "n_tokens": settings.steps * settings.batch_size * (settings.context_size - 1),
        "n_types": len(types),
        "n_trained": sum(parameter.numel() for parameter in trained),
        "seconds": round(time.perf_counter() - started, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    model.hf.save_pretrained(out)
    model.tokenizer.save_pretrained(out)
    (out / "tuned.json").write_text(json.dumps(figures, indent=2, default=str) + "\n")
    return figures


def _layers(settings: TunedCopy, model: LanguageModel) -> tuple[int, int]:
    last = model.n_layers - 1 if settings.last_layer is None else settings.last_layer
    if not 0 <= settings.first_layer <= last < model.n_layers:
        raise InvalidInputError(
            f"The layers from {settings.first_layer} to {last} were asked for; {model.name} has 0 to "
            f"{model.n_layers - 1}."
        )
    return settings.first_layer, last


def _text_windows(model: LanguageModel, settings: TunedCopy, n: int) -> np.ndarray:
    """Windows of the source, `(n, context_size)` at most, int64."""
    bos = [] if model.bos_token_id is None else [model.bos_token_id]
    width = settings.context_size - len(bos)
    found: list[np.ndarray] = []
    for texts in _texts(settings):
        for ids in model.encode_documents(texts):
            found += [np.concatenate([bos, ids[at : at + width]]) for at in range(0, len(ids) - width + 1, width)]
    if len(found) < settings.batch_size:
        raise InvalidInputError(
            f"The source {settings.source!r} gives {len(found):,} windows of {settings.context_size} tokens, fewer "
            f"than a batch of {settings.batch_size}. Take a longer text, or shorter windows."
        )
    order = np.random.default_rng(settings.seed).permutation(len(found))[:n]
    return np.stack([found[place] for place in order]).astype(np.int64)


def _texts(settings: TunedCopy) -> Iterator[list[str]]:
    """Texts of the source, some documents at a time."""
    seen: set[str] = set()
    texts: list[str] = []
    found = False
    for document in TextSource(settings.data or sample_text()).documents():
        seen.add(document.source)
        if document.source != settings.source or is_held_out(document):
            continue
        found = True
        texts.append(document.text)
        if len(texts) == DOCUMENTS_AT_ONCE:
            yield texts
            texts = []
    if not found:
        raise UnknownNameError("source", settings.source, sorted(seen | {OWN_TEXT}))
    yield texts


def _types(model: LanguageModel, settings: TunedCopy, windows: np.ndarray) -> np.ndarray:
    """Token types that the softmax is over, ascending."""
    if not settings.own_vocabulary:
        return np.arange(model.d_vocab)
    documents = islice(TextSource(settings.data or sample_text(), shuffle_seed=0).documents(), KNOWN_DOCUMENTS)
    texts = [document.text[:KNOWN_CHARACTERS] for document in documents]
    return np.unique(np.concatenate([windows.ravel(), *model.encode_documents(texts)])).astype(np.int64)


def _held_out_windows(model: LanguageModel, settings: TunedCopy) -> dict[str, list[np.ndarray]]:
    """By source, the first window of some held-out documents; sources without any are left out."""
    texts: dict[str, list[str]] = {}
    for document in TextSource(settings.data or sample_text(), shuffle_seed=settings.seed).documents():
        found = texts.setdefault(document.source, [])
        if is_held_out(document) and len(found) < settings.held_out:
            found.append(document.text)
    bos = [] if model.bos_token_id is None else [model.bos_token_id]
    windows = {
        source: [np.concatenate([bos, ids])[: settings.context_size].astype(np.int32) for ids in encoded]
        for source, encoded in ((source, model.encode_documents(found)) for source, found in sorted(texts.items()))
    }
    return {source: kept for source, found in windows.items() if (kept := [one for one in found if len(one) > 1])}


def _losses(model: LanguageModel, windows: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Mean loss of a token by source, in nats."""
    return {
        source: round(float(np.concatenate(model.cross_entropy(found)).mean()), 4) for source, found in windows.items()
    }


@torch.no_grad()
def _own_windows(model: LanguageModel, settings: TunedCopy, n: int, say: Callable[[str], None]) -> np.ndarray:
    """Windows that the model writes from BOS on."""
    if model.bos_token_id is None:
        raise InvalidInputError(f"{model.name} has no BOS token to start from; name a source of a text.")
    torch.manual_seed(settings.seed)
    written: list[Tensor] = []
    while sum(map(len, written)) < n:
        start = torch.full((min(n, settings.sampled_at_once), 1), model.bos_token_id, device=model.device)
        length = settings.context_size
        # No end-of-text token is drawn before the last place: all windows have one length, as those of a text have.
        written.append(
            model.hf.generate(
                start, max_length=length, min_length=length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                pad_token_id=model.tokenizer.pad_token_id, attention_mask=torch.ones_like(start),
            )
        )  # fmt: skip
        say(f"{sum(map(len, written)):,} of {n:,} windows written")
    return torch.cat(written)[:n].cpu().numpy()


def _train(
    model: LanguageModel,
    windows: np.ndarray,
    types: np.ndarray,
    trained: list[Any],
    settings: TunedCopy,
    say: Callable[[str], None],
) -> list[float]:
    """Take the steps; the mean loss of each tenth of them."""
    head = model.W_U[torch.from_numpy(types).to(model.device)] if settings.own_vocabulary else model.W_U
    wanted = torch.from_numpy(np.searchsorted(types, windows)).to(model.device)
    tokens = torch.from_numpy(windows).to(model.device)
    cap = model.layout.final_logit_softcapping
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    order = np.random.default_rng(settings.seed + 1)
    model.hf.train()
    for step in range(settings.steps):
        batch = torch.from_numpy(order.choice(len(windows), settings.batch_size, replace=False)).to(model.device)
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * min(
                (step + 1) / (0.1 * settings.steps), (settings.steps - step) / settings.steps
            )
        hidden = model.hidden_states(tokens[batch])[:, :-1]
        logits = functional.linear(hidden, head)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = functional.cross_entropy(logits.flatten(0, 1), wanted[batch][:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        stretch = max(1, settings.steps // TOLD)
        if (step + 1) % stretch == 0:
            say(f"step {step + 1:,} of {settings.steps:,}: loss {np.mean(losses[-stretch:]):.3f}")
    model.hf.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    return [round(float(part.mean()), 4) for part in np.array_split(np.array(losses), min(TOLD, len(losses)))]
