"""What a dictionary is configured by: its shape, its provenance, and the hooks that it reads and writes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from scope.errors import InvalidInputError

__all__ = ["Port", "Ports", "SAEConfig", "SAEMetadata"]

C = TypeVar("C", bound="SAEConfig")
DTYPES = ("float32", "float64", "bfloat16", "float16")


class Port(NamedTuple):
    """One hook that a dictionary reads or writes."""

    hook: str | None
    """The hook's name; None where it is not known."""
    width: int
    """Entries of a row there."""


class Ports(NamedTuple):
    """All hooks that a dictionary reads and writes."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    """Empty: it writes what it reads."""


@dataclass(frozen=True)
class SAEMetadata:
    """Where an SAE comes from and what it reads. Everything is None where it is not known."""

    model_name: str | None = None
    """Name of the model as it is shown."""
    model_revision: str | None = None
    """Revision of the model, where it has one."""
    weight_hash: str | None = None
    """Digest of the model's weights (hex)."""
    tokenizer_hash: str | None = None
    """Digest of the model's tokenizer (hex)."""
    hook_name: str | None = None
    """The hook whose activations the SAE reads; None where it reads several."""
    hook_name_out: str | None = None
    """The hook that a transcoder writes; None where it is the one that is read, or where it is several."""
    hook_names: tuple[str, ...] | None = None
    """The hooks that a crosscoder or a cross-layer transcoder reads, in order."""
    hook_names_out: tuple[str, ...] | None = None
    """The hooks that a cross-layer transcoder writes, in order."""
    dataset_path: str | None = None
    """The text it was trained on."""
    context_size: int | None = None
    """Tokens in the longest window, BOS included."""
    prepend_bos: bool | None = None
    """Whether windows start with BOS."""
    store_fingerprint: str | None = None
    """Fingerprint of the activation store that it was trained on (hex)."""
    training: Mapping[str, Any] | None = None
    """The training configuration."""
    scope_version: str | None = None
    """The release of this package that trained it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What other tools recorded, under their own names."""

    def to_dict(self) -> dict[str, Any]:
        """What is known, as one flat JSON-able mapping."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {**self.extra, **{name: value for name, value in own.items() if value is not None}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "SAEMetadata":
        """The inverse of `to_dict`; unknown names go to `extra`."""
        names = {f.name for f in fields(cls)} - {"extra"}
        own = {name: value for name, value in content.items() if name in names}
        for name in ("hook_names", "hook_names_out"):
            if own.get(name) is not None:
                own[name] = tuple(own[name])
        return cls(**own, extra={name: value for name, value in content.items() if name not in names})


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What all architectures are configured by."""

    architecture: ClassVar[str] = ""

    d_in: int
    """Width of the activations that the SAE reads."""
    d_sae: int
    """Number of features."""
    dtype: str = "float32"
    """dtype of the weights."""
    apply_b_dec_to_input: bool = True
    """Whether the encoder subtracts `b_dec` from its input."""
    reshape_activations: Literal["none", "hook_z"] = "none"
    """"hook_z": the input has two feature dimensions, heads and d_head, whose product is `d_in`."""
    metadata: SAEMetadata = field(default_factory=SAEMetadata)
    """Where the SAE comes from and what it reads."""

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_sae < 1:
            raise InvalidInputError(
                f"d_in is {self.d_in} and d_sae {self.d_sae}; an SAE needs at least 1 of each: "
                "its input's width and its number of features."
            )
        if self.dtype not in DTYPES:
            raise InvalidInputError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if self.reshape_activations not in ("none", "hook_z"):
            raise InvalidInputError(
                f"reshape_activations is {self.reshape_activations!r}; expected 'none' or 'hook_z'."
            )

    @property
    def hook_name(self) -> str | None:
        """The hook whose activations the SAE reads."""
        return self.metadata.hook_name

    @property
    def stored_architecture(self) -> str:
        """The architecture's name in files."""
        return self.architecture

    @property
    def encoder_width(self) -> int:
        """Entries that one feature reads."""
        return self.d_in

    @property
    def output_width(self) -> int:
        """Entries that are reconstructed, of all outputs together."""
        return self.d_in

    @property
    def ports(self) -> Ports:
        """The hooks that are read and written, each with its width."""
        return Ports((Port(self.hook_name, self.d_in),), ())

    @classmethod
    def shape_of(cls, ports: Ports) -> dict[str, Any]:
        """The fields that follow from the hooks.

        Raises:
            InvalidInputError: the architecture does not read or write so many hooks.
        """
        if len(ports.inputs) != 1 or ports.outputs:
            raise InvalidInputError(
                f"The architecture {cls.architecture} reads one hook and reconstructs it; got "
                f"{len(ports.inputs)} to read and {len(ports.outputs)} to write. A transcoder writes another hook, a "
                "crosscoder reads several."
            )
        return {"d_in": ports.inputs[0].width}

    @classmethod
    def for_training(cls: type[C], *, d_sae: int, k: int, **common: Any) -> C:
        """The configuration that aims at `k` firing features a row; `common` are further fields, `d_in` among them."""
        return cls(d_sae=d_sae, **common)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the architecture, JSON-able."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"architecture": self.stored_architecture, **content, "metadata": self.metadata.to_dict()}

    @classmethod
    def from_dict(cls: type[C], content: Mapping[str, Any]) -> C:
        """The inverse of `to_dict`; names that are no field are ignored."""
        own = {f.name: content[f.name] for f in fields(cls) if f.name in content and f.name != "metadata"}
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
        return cls(**own, metadata=SAEMetadata.from_dict(content.get("metadata") or {}))
