"""What an index and an excerpt of one say of themselves alike: what stands in their manifests."""

from pathlib import Path
from typing import Any, ClassVar

from activations.manifest import ID_LENGTH

__all__ = ["Described"]


class Described:
    """An artefact about the features of one SAE over one text; its folder is called NAME and `SUFFIX`."""

    SUFFIX: ClassVar[str]
    path: Path
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """First 12 digits of the fingerprint."""
        return self.fingerprint[:ID_LENGTH]

    @property
    def name(self) -> str:
        """The folder's name without its suffix."""
        return self.path.name.removesuffix(self.SUFFIX)

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def hook_name(self) -> str:
        return str(self.manifest["hook_name"])

    @property
    def n_indexed_rows(self) -> int:
        """Rows (tokens) on which features can fire: neither BOS nor special. The denominator of every density."""
        return int(self.manifest["n_indexed_rows"])

    @property
    def n_firings(self) -> int:
        return int(self.manifest["n_firings"])

    @property
    def sae_info(self) -> dict[str, Any]:
        """Of the SAE: fingerprint, architecture, d_in, d_sae, hook_name, k, path as it was built from."""
        return dict(self.manifest["sae"])

    @property
    def model_info(self) -> dict[str, Any]:
        """Of the model: name as it is shown, revision, weight_hash, tokenizer_hash, context_size."""
        return dict(self.manifest["model"])
