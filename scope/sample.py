"""The sample text that ships with the workbench."""

from pathlib import Path

from scope.errors import MissingDependencyError

__all__ = ["sample_text"]


def sample_text() -> Path:
    """Path of `sample.parquet`: 3,805 documents in 26 languages and code; columns text, source, language, license,
    title. In an installed wheel it lies in `scope/_data`, in a checkout in `data/`.

    Raises:
        MissingDependencyError: the installation has no sample text.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "_data", here.parent / "data"):
        if (folder / "sample.parquet").is_file():
            return folder / "sample.parquet"
    raise MissingDependencyError("sample.parquet", "demo", "The demo")
