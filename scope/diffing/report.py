"""`diff_models`: the whole comparison of two models, written to a folder that a workspace lists.

1. Tokenizers, hooks and SAEs are checked; nothing is written before all of it is found good.
2. *Layers* (`scope.diffing.layers`): both models side by side on some rows.
3. *Captures* (`scope.diffing.pair`): the hooks that SAEs and the crosscoder need, each model into a store.
4. *SAEs* (`scope.diffing.features`): drift, and rate and decoder feature by feature; with a control, what changed
   beyond it (`scope.diffing.control`).
5. *Crosscoder*: BatchTopK over both models' rows of one hook (Minder et al. 2025), and latent scaling of its features
   (`scope.diffing.scaling`).
6. With `conclusions`, what holds of the second model as it does of the first (`scope.diffing.conclusions`).

    OUT/
      manifest.json          format "model-diff"
      report.json            all figures, and the strongest examples of the features that changed most
      sae-N.parquet          one row a feature of the N-th SAE
      sae-N-firings.npz      how often its features fire in the second model, for a comparison that this is a control of
      crosscoder.parquet     one row a feature of the crosscoder
      crosscoder/            the crosscoder, as any SAE
      captures/              the two stores; deleted at the end unless they are to be kept

A run that stopped goes on with the captures that are there; one that has finished is opened.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from activations.manifest import read_manifest, write_atomically, write_manifest
from activations.plain import plain
from activations.spec import fingerprint_of
from activations.text import TextSource
from scope._version import __version__
from scope.diffing.conclusions import conclusions_of
from scope.diffing.control import Control
from scope.diffing.examples import snippets
from scope.diffing.features import FeatureChanges, feature_changes
from scope.diffing.layers import layer_changes
from scope.diffing.pair import BASE, TUNED, ModelPair, PairedStores, capture_pair
from scope.diffing.readings import Readings, read_model, sample_of
from scope.diffing.reference import ReferencePass
from scope.diffing.scaling import FeatureScaling, scale_features
from scope.diffing.settings import ComparisonConfig, DiffConfig
from scope.diffing.stored import CROSSCODER, FORMAT, MANIFEST, REPORT, DiffReport, firings_file, sae_file
from scope.errors import InvalidInputError, MismatchError, OccupiedError
from scope.saes.base import SAE
from scope.saes.crosscoder import Crosscoder
from scope.training import TrainConfig, train

__all__ = ["diff_models"]

CAPTURES = "captures"
Progress = Callable[[str, int, int | None], None]


def diff_models(
    pair: ModelPair,
    text: TextSource,
    out: str | Path,
    config: ComparisonConfig,
    *,
    hook: str | None = None,
    saes: Mapping[str, SAE] | None = None,
    control: Control | None = None,
    conclusions: bool = False,
    reference: ReferencePass | None = None,
    keep_captures: bool = False,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare two models and write the report.

    Args:
        pair: the models.
        text: what they read.
        out: the folder to make; one where a run with the same settings stopped is taken up.
        config: the settings; a `DiffConfig` trains a crosscoder.
        hook: of the crosscoder; None for the first SAE's, or the residual stream after the middle layer.
        saes: by name, dictionaries of the base model that reconstruct one hook each.
        control: the finished comparison of a control with the base model, on the same text and with these SAEs.
        conclusions: whether to say what holds of the second model as it does of the first.
        reference: what an earlier comparison with the same base model, text, settings and SAEs left for this one.
        keep_captures: whether the stores stay.
        progress: called with (what is done, rows done, rows in all).

    Raises:
        UnknownNameError, MismatchError: the models, hooks, SAEs and control do not belong together.
        InvalidInputError: there is nothing to do, or an SAE names no hook.
        OccupiedError: `out` holds something else.
    """
    report = progress or (lambda what, done, total: None)
    saes = dict(saes or {})
    hooks = {name: _hook_of(pair, name, sae) for name, sae in saes.items()}
    training = config if isinstance(config, DiffConfig) and config.d_sae else None
    crosscoder_hook = _crosscoder_hook(pair, hook, hooks) if training else None
    needed = list(dict.fromkeys([*([crosscoder_hook] if crosscoder_hook else []), *hooks.values()]))
    if not needed and not config.layer_tokens:
        raise InvalidInputError("There is nothing to compare: no layers, no crosscoder, and no SAE was given.")
    if config.layer_tokens:
        pair.require_equal_stacks()
    text.check()
    folder = Path(out)
    identity = _identity(pair, text, config, hooks, saes, crosscoder_hook, conclusions)
    if control is not None:
        control.require_same(identity)
        identity["control"] = control.to_dict()
    fingerprint = fingerprint_of(identity)
    if _is_finished(folder, fingerprint):
        return DiffReport.open(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {**identity, "saes": [], "crosscoder": None, "conclusions": None}
    layers = None
    if config.layer_tokens:
        kept = None if reference is None else reference.layers
        layers = layer_changes(pair, text, config, lambda done, total: report("Layers", done, total), kept)
        figures |= layers.to_dict()
    changes: dict[str, FeatureChanges] = {}
    readings: dict[str, tuple[Readings, Readings]] = {}
    if needed:
        stores = capture_pair(
            pair,
            text,
            needed,
            folder / CAPTURES,
            config,
            lambda which, done, total: report(f"Capture {which}", done, total),
            None if reference is None else reference.folder,
        )
        for number, (name, sae) in enumerate(saes.items()):
            found = feature_changes(sae, hooks[name], stores, config.seed)
            found.counts.save(folder / firings_file(number))
            if control is not None:
                found = found.against(control.counts(sae.fingerprint), config.seed)
            changes[name] = found
            found.table.to_parquet(folder / sae_file(number))
            if conclusions:
                readings[name] = _readings(pair, name, sae, hooks[name], stores, config.seed, reference)
            known = {"name": name, "fingerprint": sae.fingerprint, **found.to_dict()}
            known["changed_in_control"] = None if control is None else control.changed(sae.fingerprint)
            figures["saes"].append({**known, "examples": _changed(pair, stores, found, config.examples)})
        if training and crosscoder_hook:
            figures["crosscoder"] = _crosscoder(pair, stores, crosscoder_hook, folder, training, report)
    if conclusions:
        figures["conclusions"] = [one.to_dict() for one in conclusions_of(layers, changes, readings)]
    write_atomically(folder / REPORT, (json.dumps(plain(figures), indent=1, allow_nan=False) + "\n").encode())
    write_manifest(
        folder,
        FORMAT,
        fingerprint,
        [sae.fingerprint for sae in saes.values()],
        f"scope-workbench {__version__}",
        base=identity["base"],
        tuned=identity["tuned"],
    )
    if not keep_captures:  # last: without them nothing says that a run was under way here
        shutil.rmtree(folder / CAPTURES, ignore_errors=True)
    return DiffReport.open(folder)


def _hook_of(pair: ModelPair, name: str, sae: SAE) -> str:
    if sae.hook_name is None or len(sae.cfg.ports.inputs) != 1 or sae.cfg.ports.outputs:
        raise InvalidInputError(f"{name} does not reconstruct one hook that it names; give SAEs that do.")
    hook = pair.require_hook(sae.hook_name)
    width = int(np.prod(pair.base.hook_shape(hook)))
    if width != sae.d_in:
        raise MismatchError(f"{name} reads {sae.d_in:,} values; {hook} of {pair.base.name} has {width:,}.")
    return hook


def _crosscoder_hook(pair: ModelPair, hook: str | None, hooks: Mapping[str, str]) -> str:
    if hook is None:
        hook = next(iter(hooks.values()), f"blocks.{(pair.base.n_layers - 1) // 2}.hook_resid_post")
    return pair.require_hook(hook)


def _identity(
    pair: ModelPair,
    text: TextSource,
    config: ComparisonConfig,
    hooks: Mapping[str, str],
    saes: Mapping[str, SAE],
    crosscoder_hook: str | None,
    conclusions: bool,
) -> dict[str, Any]:
    """What makes this comparison another one than any other."""
    models = {
        which: {
            "model": identity.model,
            "revision": identity.revision,
            "weight_hash": identity.weight_hash,
            "dtype": identity.compute_dtype,
        }
        for which, identity in ((BASE, pair.base.identity), (TUNED, pair.tuned.identity))
    }
    return {
        **models,
        "text": text.described,
        "config": config.to_dict(),
        "hook": crosscoder_hook,
        "sae_fingerprints": {name: sae.fingerprint for name, sae in saes.items()},
        "sae_hooks": dict(hooks),
        "quantisation": conclusions,
    }


def _is_finished(folder: Path, fingerprint: str) -> bool:
    """Whether the folder holds this very report; raises `OccupiedError` where it holds something else."""
    if folder.is_file():
        raise OccupiedError(f"{folder} is a file. Give a folder that does not exist yet.")
    inside = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if MANIFEST in inside and read_manifest(folder)["fingerprint"] == fingerprint:
        return True
    if MANIFEST in inside or (inside and CAPTURES not in inside):
        raise OccupiedError(f"{folder} holds something else. Give a folder that does not exist yet.")
    return False


def _crosscoder(
    pair: ModelPair, stores: PairedStores, hook: str, folder: Path, config: DiffConfig, report: Progress
) -> dict[str, Any]:
    settings = TrainConfig(
        arch="crosscoder",
        d_sae=config.d_sae,
        k=config.k,
        tokens=config.train_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        device=str(pair.base.device),
    )
    shutil.rmtree(folder / CROSSCODER, ignore_errors=True)  # of a run that stopped before its report was written
    trained = train(
        stores.aligned,
        [f"{BASE}:{hook}", f"{TUNED}:{hook}"],
        settings,
        folder / CROSSCODER,
        progress=lambda done, total: report("Crosscoder", done, total),
    )
    assert isinstance(trained.sae, Crosscoder)
    scaling = scale_features(trained.sae, hook, stores, config.seed)
    scaling.table.to_parquet(folder / f"{CROSSCODER}.parquet")
    return {
        "hook": hook,
        "fvu": trained.fvu,
        "l0": trained.l0,
        **scaling.to_dict(),
        "examples": {which: _examples(pair, stores, scaling, which, config.examples) for which in (TUNED, BASE)},
    }


def _changed(pair: ModelPair, stores: PairedStores, changes: FeatureChanges, n: int) -> dict[int, dict[str, Any]]:
    """The strongest examples in either model of the features that changed most."""
    tops = {BASE: changes.top_base, TUNED: changes.top_tuned}
    return {
        int(feature): {which: snippets(stores.base, pair.base, top.of(int(feature))) for which, top in tops.items()}
        for feature in changes.changed["feature"].head(n)
    }


def _examples(
    pair: ModelPair, stores: PairedStores, scaling: FeatureScaling, which: str, n: int
) -> list[dict[str, Any]]:
    rows: list[dict[Any, Any]] = scaling.specific(which).head(n).to_dict("records")
    return [{**row, "examples": snippets(stores.base, pair.base, scaling.top.of(int(row["feature"])))} for row in rows]


def _readings(
    pair: ModelPair, name: str, sae: SAE, hook: str, stores: PairedStores, seed: int, reference: ReferencePass | None
) -> tuple[Readings, Readings]:
    windows, residual = sample_of(stores, hook, seed)
    known = {} if reference is None else reference.readings
    rows = residual or (None, None)
    if name not in known:
        known[name] = read_model(pair.base, sae, windows, rows[0])
    return known[name], read_model(pair.tuned, sae, windows, rows[1])
