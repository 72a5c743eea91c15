"""`evaluate`: one call for the figures by which an SAE is judged, all on held-out documents of its store or text.

1. Reconstruction over all held-out rows (`reconstruction_metrics`): fvu, l0, dead and over-dense share.
2. With a model, cross-entropy with the SAE spliced in (`delta_ce`), over held-out windows drawn at random until
   `ce_tokens` are reached, two of each document before any gives more, so that the interval has documents to resample.
3. Of a live source the model runs once over the first rows of held-out documents (`ce_tokens` of them, at least 8,192,
   and no more than fit into 4 GiB), and over 8,192 rows of the others for the mean activation.
4. For an SAE that reads and writes one hook the same for its baselines (`scope.training.baselines`): PCA of the same
   rank, a random dictionary, the mean; on the same rows and the same windows.
   `evaluate_several` measures what SAEs of the same hooks have in common once.
5. `Quality.save` puts it beside the SAE as `evaluation.json`, where the workspace, the dashboard and the index find it:
   a flat object of figures, each with its `_interval` where it has one, and `baselines`, by name the same of each.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from activations.manifest import write_atomically
from activations.memory import MemoryActivations
from activations.store import ActivationStore
from scope.errors import InvalidInputError
from scope.models.live import LiveActivations
from scope.saes.base import SAE
from scope.saes.crosscoder import Crosscoder
from scope.training.aligned import AlignedStores
from scope.training.baselines import Moments, baselines_for, training_moments
from scope.training.cross_entropy import CrossEntropyMetrics, LossModel, SplicedLosses, output_hooks
from scope.training.metrics import ReconstructionMetrics, mean_activation, measure_all
from scope.training.runs import QUALITY_NAME, read_quality

__all__ = ["QUALITY_NAME", "Quality", "evaluate", "evaluate_several", "read_quality"]

COMPARED = ("fvu", "fvu_all", "l0", "delta_ce", "ce_recovered")
"""What is told of a baseline."""
WINDOWS_PER_DOCUMENT = 2
LIVE_ROWS = 2**13
"""Rows that the model computes for a live source's mean."""
LIVE_BYTES = 2**32
"""What the held-out rows of a live source may take in memory."""
DRAWN_FROM = 4
"""How much more held-out text of a live source is looked at than drawn from it, so that more documents take part."""

S = TypeVar("S")


class Quality(NamedTuple):
    """How good an SAE is on held-out documents; the definitions are in `scope.training.metrics`."""

    reconstruction: ReconstructionMetrics
    cross_entropy: CrossEntropyMetrics | None
    """None where no model was given, and for a crosscoder."""
    baselines: Mapping[str, "Quality"] = {}
    """The same of what it is to be compared with, by name: "pca", "random", "mean"."""

    def figures(self) -> dict[str, Any]:
        """Its own figures, flat and JSON-able: fvu, fvu_all, l0, dead_share, …, delta_ce, ce_recovered, …"""
        return {
            **self.reconstruction.to_dict(),
            **(self.cross_entropy.to_dict() if self.cross_entropy else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """`figures`, and as `baselines` those of the baselines that a reader compares."""
        named = [*COMPARED, *(f"{name}_interval" for name in COMPARED)]
        compared = {
            which: {name: value for name, value in quality.figures().items() if name in named}
            for which, quality in self.baselines.items()
        }
        return {**self.figures(), **({"baselines": compared} if compared else {})}

    def save(self, folder: Path) -> None:
        """Write `evaluation.json` into the SAE's folder."""
        write_atomically(folder / QUALITY_NAME, (json.dumps(self.to_dict(), indent=2) + "\n").encode())

    def summary(self) -> str:
        """A few lines for a person."""
        seen = self.reconstruction
        lines = [
            f"On {seen.n_rows:,} held-out rows: fvu {seen.fvu:.4f}{_interval(seen.fvu_interval)}, l0 {seen.l0:.1f}, "
            f"no firing there {seen.dead_share:.1%}, denser than 10% {seen.over_dense_share:.1%}",
        ]
        for hook, fvu in (seen.fvu_by_output or {}).items():
            lines.append(f"  {hook}: fvu {fvu:.4f}")
        loss = self.cross_entropy
        if loss is not None:
            lines.append(
                f"On {loss.n_tokens:,} held-out tokens: delta_ce {loss.delta_ce:.3f}{_interval(loss.delta_ce_interval)}"
                f" nats (plain {loss.ce:.3f}, spliced {loss.ce_sae:.3f}, mean in its place {loss.ce_mean:.3f}; "
                f"recovered {loss.ce_recovered:.1%}{_interval(loss.ce_recovered_interval)})"
            )
        for which, quality in self.baselines.items():
            seen, loss = quality.reconstruction, quality.cross_entropy
            name = {"pca": f"PCA of rank {seen.l0:.0f}", "random": "random dictionary", "mean": "mean"}[which]
            spliced = f", delta_ce {loss.delta_ce:.3f}, recovered {loss.ce_recovered:.1%}" if loss else ""
            lines.append(f"  beside it, {name}: fvu {seen.fvu:.4f}{spliced}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.summary())}</pre>"


def _interval(interval: tuple[float, float] | None) -> str:
    return f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""


def evaluate(
    sae: SAE,
    store: ActivationStore | LiveActivations | AlignedStores,
    model: LossModel | None = None,
    *,
    ce_tokens: int = 4096,
    baselines: bool = True,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> Quality:
    """Measure an SAE on the held-out documents of a store.

    Args:
        sae: takes raw activations; its `hook_name` is captured in the store.
        store: the activations, and the tokens for the cross-entropy; or a live source.
        model: the model that filled the store; None leaves the cross-entropy out, as a crosscoder does.
        ce_tokens: tokens to measure the cross-entropy on, at least.
        baselines: whether to measure PCA of the same rank, a random dictionary and the mean as well, where the SAE
            reads and writes one hook.
        seed: of the draw of windows and of the intervals.
        progress: called with (passes done, passes in all).

    Raises:
        InvalidInputError: the store has no held-out rows.
        UnknownNameError, MismatchError: the store lacks the SAE's hook, or it has another width.
    """
    together = evaluate_several(
        {"": sae}, store, model, ce_tokens=ce_tokens, baselines=baselines, seed=seed, progress=progress
    )
    return next(together)[1]


def evaluate_several(
    saes: Mapping[str, SAE],
    store: ActivationStore | LiveActivations | AlignedStores,
    model: LossModel | None = None,
    *,
    ce_tokens: int = 4096,
    baselines: bool = True,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> Iterator[tuple[str, Quality]]:
    """As `evaluate`, for several SAEs: their names and figures, each as soon as it is known.

    What SAEs of the same hooks have in common is measured once: the rows, the model as it is and with the mean, and
    baselines that are the same, such as PCA of one rank. SAEs of other hooks come after one another.
    """
    groups: dict[tuple[Any, bool], dict[str, SAE]] = {}
    for name, sae in saes.items():
        groups.setdefault((sae.cfg.ports, isinstance(sae, Crosscoder)), {})[name] = sae
    counter = _Passes(progress)
    made = [_Together(group, store, model, ce_tokens, baselines, seed, counter) for group in groups.values()]
    for group in made:
        yield from group.measure()


class _Passes:
    """Counts passes over text or rows, and tells of each."""

    def __init__(self, progress: Callable[[int, int | None], None] | None) -> None:
        self.done, self.total, self._tell = 0, 0, progress or (lambda done, total: None)

    def advance(self, *_: Any) -> None:
        """One more."""
        self.done += 1
        self._tell(self.done, self.total)


class _Together:
    """SAEs that read and write the same hooks."""

    def __init__(
        self,
        saes: Mapping[str, SAE],
        store: ActivationStore | LiveActivations | AlignedStores,
        model: LossModel | None,
        ce_tokens: int,
        baselines: bool,
        seed: int,
        passes: _Passes,
    ) -> None:
        self.saes, self.store, self.model = saes, store, model
        self.ce_tokens, self.seed, self.passes = ce_tokens, seed, passes
        first = self.first = next(iter(saes.values()))
        self.spliced = model is not None and not isinstance(first, Crosscoder) and not isinstance(store, AlignedStores)
        self.compared = baselines and len(first.cfg.ports.inputs) == 1 and not first.cfg.ports.outputs
        own = 1 + (2 + len(saes) if self.spliced else 0)
        passes.total += own + len(saes) * (1 + (2 if self.spliced else 0) if self.compared else 0)
        self._reconstructions: dict[tuple[Any, ...], ReconstructionMetrics] = {}
        self._losses: dict[tuple[Any, ...], CrossEntropyMetrics] = {}

    def measure(self) -> Iterator[tuple[str, Quality]]:
        """Each SAE's name and figures, as soon as they are known."""
        live = LIVE_ROWS if isinstance(self.store, LiveActivations) else None
        measured = held_out_part(self.store, self.ce_tokens)
        own = measure_all(self.saes, measured, seed=self.seed)
        self.passes.advance()
        moments, means = None, {}
        if self.compared:
            hook = str(self.first.hook_name)
            moments = training_moments(self.store, hook, max_rows=live, device=self.first.device, seed=self.seed)
            means = {hook: moments.mean}
        elif self.spliced:
            means = {hook: mean_activation(self.store, hook, max_rows=live) for hook in output_hooks(self.first)}
        losses = self._losses_with(means) if self.spliced else None
        for name, sae in self.saes.items():
            spliced = losses.of(sae) if losses else None
            others = {} if moments is None else self._baselines(sae, moments, own[name].l0, measured, losses)
            yield name, Quality(own[name], spliced, others)

    def _losses_with(self, means: Mapping[str, Tensor]) -> SplicedLosses:
        assert self.model is not None
        assert not isinstance(self.store, AlignedStores)
        windows, documents = held_out_windows(self.store, self.ce_tokens, self.seed)
        on_device = {hook: mean.to(self.first.device) for hook, mean in means.items()}
        return SplicedLosses(
            self.model, windows, on_device, documents=documents, seed=self.seed, progress=self.passes.advance
        )

    def _baselines(
        self, sae: SAE, moments: Moments, l0: float, measured: Any, losses: SplicedLosses | None
    ) -> dict[str, Quality]:
        """Figures of an SAE's baselines; those that another SAE had too are looked up."""
        others = baselines_for(sae, moments, l0, self.seed)
        keys = {name: (name, one.d_sae, round(l0) if name == "random" else 0) for name, one in others.items()}
        new = {key: others[name] for name, key in keys.items() if key not in self._reconstructions}
        if new:
            found = measure_all({str(key): one for key, one in new.items()}, measured, seed=self.seed)
            self._reconstructions |= {key: found[str(key)] for key in new}
        self.passes.advance()
        for name, key in keys.items() if losses else ():
            assert losses is not None
            if key in self._losses:
                if name != "mean":
                    self.passes.advance()
                continue
            self._losses[key] = losses.of_mean() if name == "mean" else losses.of(others[name])
        return {name: Quality(self._reconstructions[key], self._losses.get(key)) for name, key in keys.items()}


def held_out_part(source: S, n_tokens: int) -> S | MemoryActivations:
    """What the held-out rows are read from: of a live source `n_tokens` of them, or what fits into `LIVE_BYTES`."""
    if not isinstance(source, LiveActivations):
        return source
    return source.held_out(max(LIVE_ROWS, min(n_tokens, LIVE_BYTES // source.row_bytes)))


def held_out_windows(
    source: ActivationStore | LiveActivations, n_tokens: int, seed: int
) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of held-out windows of two tokens or more, drawn without replacement, and each one's document.

    Two windows of each document are taken before any document gives more.
    """
    store = (
        source.held_out_tokens(max(LIVE_ROWS, DRAWN_FROM * n_tokens)) if isinstance(source, LiveActivations) else source
    )
    held_out = store.documents().query("held_out")["document"]
    sequences = store.sequences()
    sequences = sequences[sequences["document"].isin(held_out) & (sequences["n_rows"] > 1)]
    if sequences.empty:
        raise InvalidInputError(
            "The store has no held-out documents to measure on; capture more text (one title in ten is held out)."
        )
    drawn = sequences.sample(frac=1, random_state=seed)
    drawn["rank"] = drawn.groupby("document").cumcount() // WINDOWS_PER_DOCUMENT
    drawn = drawn.sort_values("rank", kind="stable")
    enough = int(np.searchsorted(drawn["n_rows"].cumsum().to_numpy(), n_tokens)) + 1
    chosen = drawn.head(enough)
    windows = store.window_tokens(chosen["sequence"].tolist())
    return windows, chosen["document"].astype(int).tolist()
