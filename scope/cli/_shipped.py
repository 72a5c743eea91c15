"""What ships with the workbench, put into a workspace."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from activations.disk import sync_folder

if TYPE_CHECKING:
    from scope.features.excerpt import FeatureExcerpt

__all__ = ["copy_excerpt", "copy_sae"]


def copy_sae(shipped: Path, path: Path) -> Path:
    """Put an SAE into a workspace, with all that lies beside it; one that is there stays."""
    from scope.saes.formats import load, save

    if (path / "manifest.json").is_file():
        return path
    sae = load(shipped)
    made_anew = {"cfg.json", "sae_weights.safetensors", "manifest.json"}
    beside = {file.name: file.read_bytes() for file in shipped.iterdir() if file.is_file()}
    tokens = (sae.cfg.metadata.training or {}).get("tokens")
    return save(
        sae,
        path,
        companions={name: content for name, content in beside.items() if name not in made_anew},
        training={"hook": sae.hook_name, "d_sae": sae.d_sae, "tokens": tokens},
    )


def copy_excerpt(shipped: Path, path: Path) -> "FeatureExcerpt":
    """Put an excerpt into a workspace; one that is there stays, with the text that it has."""
    from scope.features.excerpt import FeatureExcerpt

    if not (path / "manifest.json").is_file():
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(shipped, part)
        part.rename(path)
        sync_folder(path.parent)
    return FeatureExcerpt.open(path)
