"""Several quantised files against one reference, in one go: what is the reference's is computed once.

1. The files' names are told apart (`names_of`).
2. Each is loaded, compared with the reference (`scope.diffing.report`) and let go before the next, so that no more than
   two models are in memory. The reference's captures, residual streams and readings come from the first comparison
   (`scope.diffing.reference`).
3. The reports lie in a folder each, by the file's name.
"""

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from activations.spec import fingerprint_of
from activations.text import TextSource
from scope.diffing.pair import ModelPair
from scope.diffing.reference import ReferencePass
from scope.diffing.report import Progress, diff_models
from scope.diffing.settings import ComparisonConfig
from scope.diffing.stored import DiffReport
from scope.errors import InvalidInputError
from scope.models import LanguageModel
from scope.saes.base import SAE

__all__ = ["names_of", "quantisation_reports"]


def names_of(files: Sequence[str]) -> dict[str, str]:
    """What each file's report is called: its name without its suffix, `.gguf`.

    Raises:
        InvalidInputError: two have one name.
    """
    found: dict[str, str] = {}
    for file in files:
        path = Path(file)
        name = path.stem if path.suffix.lower() == ".gguf" else path.name
        if name in found:
            raise InvalidInputError(f"{found[name]} and {file} are both called {name}; compare them one by one.")
        found[name] = file
    return found


def quantisation_reports(
    reference: LanguageModel,
    files: Mapping[str, str],
    load: Callable[[str], LanguageModel],
    text: TextSource,
    out: Path,
    config: ComparisonConfig,
    *,
    saes: Mapping[str, SAE] | None = None,
    keep_captures: bool = False,
    progress: Progress | None = None,
) -> dict[str, DiffReport]:
    """Compare each file with the reference.

    Args:
        reference: the model with reference weights.
        files: by the name of its report, what `load` takes.
        load: loads a model.
        text: what they read.
        out: the folder in which the reports' folders are made; of one file alone it is the report's own.
        config: the settings.
        saes: by name, dictionaries of the reference.
        keep_captures: whether the stores stay.
        progress: called with (what is done, rows done, rows in all).

    Raises:
        as `diff_models`.
    """
    saes = dict(saes or {})
    identity = {
        "base": (reference.identity.weight_hash, reference.identity.compute_dtype),
        "text": text.described,
        "config": config.to_dict(),
        "saes": [sae.fingerprint for sae in saes.values()],
    }
    shared = ReferencePass(out / f".reference-{fingerprint_of(identity)[:12]}")
    reports = {}
    for name, file in files.items():
        reports[name] = diff_models(
            ModelPair.of(reference, load(file)),
            text,
            out if len(files) == 1 else out / name,
            config,
            saes=saes,
            conclusions=True,
            reference=None if len(files) == 1 else shared,
            keep_captures=keep_captures,
            progress=_named(name, progress) if len(files) > 1 else progress,
        )
        gc.collect()  # what of the model lies in reference cycles goes before the next one is loaded
    if not keep_captures:
        shutil.rmtree(shared.folder, ignore_errors=True)
    return reports


def _named(name: str, progress: Progress | None) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done, total: progress(f"{name}: {what}", done, total)
