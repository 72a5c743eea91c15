"""What ships with the workbench: the sample text, and an SAE with what an index over all of that text says of it.

In an installed wheel they lie in `scope/_data`, in a checkout in `data/`.
"""

from pathlib import Path
from typing import NamedTuple

from scope.errors import MissingDependencyError

__all__ = ["SAMPLE_SEED", "SampleSAE", "sample_sae", "sample_text", "text_of_commands"]

SAMPLE_SEED = 0
"""Shuffle seed of the order that the sample's documents are captured in."""
SAE_NAME = "gemma-3-270m-topk-8192"


class SampleSAE(NamedTuple):
    """The SAE that ships."""

    name: str
    path: Path
    """Its folder, as SAELens has it."""
    excerpt: Path
    """What an index over the whole sample says of its features (`scope.features.excerpt`)."""


def sample_text() -> Path:
    """Path of `sample.parquet`: 3,805 documents in 26 languages and code; columns text, source, language, license,
    title.

    Raises:
        MissingDependencyError: the installation has no sample text.
    """
    found = _shipped("sample.parquet")
    if found is None:
        raise MissingDependencyError("sample.parquet", "demo", "The demo")
    return found


def sample_sae() -> SampleSAE | None:
    """The SAE of Gemma 3 270M that ships, trained on the whole sample; None where the installation has none."""
    path, excerpt = _shipped(SAE_NAME), _shipped(f"{SAE_NAME}.excerpt")
    return None if path is None or excerpt is None else SampleSAE(SAE_NAME, path, excerpt)


def text_of_commands() -> str:
    """The text in commands that are shown to be copied: the sample's path, or `TEXT.parquet` where it is not installed,
    for a text of one's own."""
    try:
        return str(sample_text())
    except MissingDependencyError:
        return "TEXT.parquet"


def _shipped(name: str) -> Path | None:
    here = Path(__file__).resolve().parent
    folders = (here / "_data", here.parent / "data")
    return next((folder / name for folder in folders if (folder / name).exists()), None)
