"""A workspace of tiny models with experts, with per-layer embeddings, and with neither, each with an SAE and its index;
the store of the one with experts has the router's choices."""

import json
from pathlib import Path

from helpers_models import TEXT, tiny_folder
from helpers_saes import make

from activations.capture import capture
from activations.store import ActivationStore
from activations.text import TextSource
from scope.features import build_index
from scope.models import LanguageModel
from scope.saes.base import SAEMetadata
from scope.saes.formats import save
from scope.workspace import Workspace

__all__ = ["HOOK", "LAYERS", "family_workspace"]

HOOK = "blocks.1.hook_resid_post"
LAYERS = (0, 1, 2)
"""Of Mixtral, whose choices the store has."""
FRENCH = "Le café était fermé à midi. La rivière est <b>profonde</b>. " * 4


def family_workspace(folder: Path, kinds: tuple[str, ...] = ("mixtral", "gemma4", "llama")) -> Workspace:
    """Indexes named like their kinds; models compute in the processor's own dtype, as the dashboard loads them."""
    workspace = Workspace(folder)
    text = folder / "text.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text": words, "title": f"{language} {number}", "language": language, "source": f"book {number % 2}"}
        for number in range(4)
        for language, words in (("en", TEXT), ("fr", FRENCH))
    ]
    text.write_text("\n".join(map(json.dumps, rows)))
    for kind in kinds:
        model = LanguageModel.load(str(tiny_folder(kind)))
        hooks = [HOOK]
        if kind == "mixtral":
            hooks += [f"blocks.{one}.moe.{name}" for one in LAYERS for name in ("hook_experts", "hook_weights")]
        path = workspace.path_for("activation-store", kind)
        capture(model, TextSource(text), hooks, path, context_size=32, dtype="float32")
        sae = make("topk", d_in=32, d_sae=60, k=6, seed=1, metadata=SAEMetadata(hook_name=HOOK, model_name=model.name))
        save(sae, workspace.path_for("sae", kind))
        build_index(
            ActivationStore.open(path), workspace.sae(kind), workspace.path_for("feature-index", kind), model=model
        )
    return workspace
