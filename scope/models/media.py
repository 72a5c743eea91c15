"""Images and sounds of prompts and documents, through a model's own processor and towers.

1. The processor that lies in the model's folder prepares each medium by itself: tensors for a tower, and the text that
   stands for it, soft tokens with their markup. Where they go, a chat template or the document says.
2. The text is tokenised once all of it stands. What the soft tokens of an image show is a grid of patches over the
   whole image, row by row, as the tower pools them; those of a sound follow each other in time, a fixed span each.
3. A batch goes through transformers' multimodal model, with the tensors of all its media in the order of the tokens and
   the kind of each token, from which the model makes its masks: in Gemma 3, and on the local layers of Gemma 4 models
   that say so, the tokens of an image see each other. The hooks are in the text model inside of it, as for text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.chats import CHAT_COLUMNS
from activations.documents import Columns, Document, document_from
from activations.media import (
    BOX,
    MEDIA_COLUMNS,
    MODALITIES,
    NO_MEDIUM,
    SPAN,
    MediaTokens,
    MediumContent,
    PlacedMedium,
    places_in,
    read_medium,
)
from activations.spec import fingerprint_of
from scope.errors import InvalidInputError
from scope.models.chats import WrittenChat, chat_tokens, own_template, write_chat
from scope.models.media_files import image_from, samples_from
from scope.models.processor import MEDIA_TYPES, PROCESSED, load_processor

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["MediaInputs", "MediaPrompt", "MediaReader"]

TYPE_IDS = {"image": 1, "audio": 3}
"""transformers' `mm_token_type_ids` of soft tokens; 0 is text."""


@dataclass(frozen=True)
class MediaInputs:
    """What a multimodal model gets besides token ids, for one batch."""

    tensors: Mapping[str, Tensor]
    """By the argument's name."""

    def run(self, model: "LanguageModel", tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """The output of the final norm of the text model, run inside the multimodal one."""
        outer = model.hf.get_submodule(model.layout.backbone.rpartition(".")[0])
        hidden: Tensor = outer(input_ids=tokens, use_cache=False, **self.tensors).last_hidden_state
        return hidden

    def encoded(self, model: "LanguageModel") -> dict[str, Any]:
        """The same arguments with images as the model's own tower encodes them, for TransformerLens, whose adapter of
        Gemma 3's tower gives other features."""
        given: dict[str, Any] = dict(self.tensors)
        images = {name: given.pop(name) for name in ("pixel_values", "image_position_ids") if name in given}
        if images:
            outer: Any = model.hf.get_submodule(model.layout.backbone.rpartition(".")[0])
            given["mm_encoder_outputs"] = {"image": outer.get_image_features(**images, return_dict=True)}
        return given


@dataclass(frozen=True)
class MediaPrompt:
    """A prompt with images or sounds."""

    tokens: Int[Tensor, " seq"]
    """Token ids, BOS included, on the model's device."""
    inputs: MediaInputs | None
    """None where it has no media after all."""
    columns: Mapping[str, np.ndarray]
    """What the tokens are, BOS included: `activations.media.MEDIA_COLUMNS`, and those of chats, `(seq,)` each."""
    media: tuple[MediumContent, ...]


class _Prepared(NamedTuple):
    """A medium as the processor prepares it."""

    text: str
    """What stands for it."""
    tensors: Mapping[str, Tensor]
    """By the argument's name, (1, …) each."""
    places: Mapping[str, np.ndarray]
    """Of each soft token: `BOX` or `SPAN`."""

    @property
    def n_tokens(self) -> int:
        return len(next(iter(self.places.values())))


class MediaReader:
    """The processor of a model with towers.

    Raises:
        InvalidInputError: the model takes text alone, or its folder has no processor.
    """

    def __init__(self, model: "LanguageModel") -> None:
        self._model = model
        self._outer = model.hf.get_submodule(model.layout.backbone.rpartition(".")[0])
        self.kinds = _kinds(model, self._outer)
        """Which media the model takes: "image", "audio"."""
        self._processor = load_processor(model.files.folder, model.tokenizer, model.config.model_type)
        parameters = signature(self._outer.forward).parameters
        self._types = "mm_token_type_ids" if "mm_token_type_ids" in parameters else "token_type_ids"
        self._soft = {kind: self._soft_token(kind) for kind in self.kinds}

    @property
    def fingerprint(self) -> str:
        """Digest (hex) of the processor's settings."""
        folder = self._model.files.folder
        files = {name: path for name in PROCESSED if (path := folder / name).is_file()}
        return fingerprint_of({name: json.loads(path.read_text()) for name, path in files.items()})

    def max_tokens(self, kind: str, seconds: float) -> int:
        """The most tokens that an image takes, or a sound of so many seconds, markup included.

        Raises:
            InvalidInputError: the model takes no such medium, or none so long.
        """
        self._require(kind, seconds)
        processor = self._processor
        if kind == "image":
            soft = getattr(processor.image_processor, "max_soft_tokens", None) or processor.image_seq_length
        else:
            soft = min(processor.audio_seq_length, math.ceil(seconds * 1000 / processor.audio_ms_per_token) + 1)
        return int(soft) + self._markup(kind)

    def encode(self, documents: Sequence[Document], template: str | None) -> list[MediaTokens]:
        """See `activations.source.MediaModel.encode_media`."""
        return [self._encoded(document, template) for document in documents]

    def prompt(self, prompt: "str | Sequence[Any] | Document", template: str | None = None) -> MediaPrompt:
        """See `LanguageModel.media_prompt`; `template` in place of the model's own."""
        model = self._model
        if isinstance(prompt, Document):
            document = prompt
            template = (template or self._template()) if document.messages else None
        elif isinstance(prompt, str):
            document, template = Document(prompt), None
        else:
            try:
                row = {"messages": list(prompt)}
                document = document_from(row, Columns("messages", chats=True, message_media=True), "", Path())
            except ValueError as error:
                raise InvalidInputError(f"The prompt: {error}.") from error
            template = template or self._template()
        encoded = self._encoded(document, template, answer=bool(document.messages))
        tokens, columns = encoded.token_id, dict(encoded.columns)
        if model.bos_token_id is not None:
            start = {**NO_MEDIUM, "role": 0, "kind": 0, "message": -1}
            tokens = np.insert(tokens, 0, model.bos_token_id)
            columns = {name: np.insert(values, 0, start[name]) for name, values in columns.items()}
        prepared = [self._prepared(one) for one in encoded.media]
        ids = model.prompt_tokens(tokens.tolist())
        placed = [
            PlacedMedium(one.kind, one.name, int(first), own.n_tokens, one.content)
            for number, (one, own) in enumerate(zip(encoded.media, prepared, strict=True))
            for first in np.flatnonzero((columns["medium"] == number) & (columns["modality"] > 0))[:1]
        ]
        inputs = self._together(ids[None], [placed], prepared) if placed else None
        return MediaPrompt(ids, inputs, columns, encoded.media)

    def placed(self, tokens: Sequence[int], media: Sequence[PlacedMedium]) -> MediaPrompt:
        """A window of tokens, BOS included, with its media in their places, as a prompt."""
        ids = self._model.prompt_tokens(list(tokens))
        columns = {name: np.full(len(ids), NO_MEDIUM[name]).astype(dtype) for name, dtype in MEDIA_COLUMNS.items()}
        contents = tuple(MediumContent(one.kind, one.name, "", None, None, None, one.content) for one in media)
        prepared = [self._prepared(one) for one in contents]
        for number, (one, own) in enumerate(zip(media, prepared, strict=True)):
            span = slice(one.position, one.position + one.n_tokens)
            columns["medium"][span] = number
            columns["modality"][span] = MODALITIES.index(one.kind)
            for name, values in own.places.items():
                columns[name][span] = values
        return MediaPrompt(ids, self._together(ids[None], [media], prepared) if media else None, columns, contents)

    def inputs(self, tokens: Int[Tensor, "batch seq"], media: Sequence[Sequence[PlacedMedium]]) -> MediaInputs:
        """What a batch of windows with these media needs."""
        prepared = [
            self._prepared(MediumContent(one.kind, one.name, "", None, None, None, one.content))
            for window in media
            for one in window
        ]
        return self._together(tokens, media, prepared)

    # --- preparing --------------------------------------------------------------------------------------------

    def _prepared(self, medium: MediumContent) -> _Prepared:
        """Step 1, of one medium."""
        if medium.kind == "image":
            return self._process("image", image_from(medium.content, medium.name))
        return self._process("audio", samples_from(medium.content, medium.name, self._rate))

    def _process(self, kind: str, decoded: Any) -> _Prepared:
        processor, soft = self._processor, self._soft[kind]
        given: dict[str, Any] = {"text": [self._mark(kind)], "return_text_replacement_offsets": True}
        if kind == "image":
            given["images"] = [decoded]
            if "do_pan_and_scan" in getattr(processor, "images_kwargs", {}):  # one image stays one run of tokens
                given["images_kwargs"] = {"do_pan_and_scan": False}
        else:
            self._require("audio", len(decoded) / self._rate)
            given["audio"] = [decoded]
        found = dict(processor(**given, return_tensors="pt"))
        ((replaced,),) = found.pop("text_replacement_offsets")
        n_tokens = int((found.pop("input_ids") == soft).sum())
        if n_tokens == 0:
            raise InvalidInputError("a sound is too short to be heard: it has no soft token.")
        tensors = {
            name: value for name, value in found.items() if name != "attention_mask" and not name.endswith("type_ids")
        }
        if kind == "image":
            places = _boxes(n_tokens, tensors.get("image_position_ids"))
        else:
            places = _spans(n_tokens, processor.audio_ms_per_token / 1000, len(decoded) / self._rate)
        return _Prepared(replaced["replacement"], tensors, places)

    def _encoded(self, document: Document, template: str | None, answer: bool = False) -> MediaTokens:
        """Step 2."""
        try:
            media = tuple(map(read_medium, document.media))
            for one in media:
                self._require(one.kind, one.seconds or 0.0)
            prepared = [self._prepared(one) for one in media]
            written = self._written(document, template, answer)
            return self._tokens(document, written, media, prepared, template is not None)
        except ValueError as error:
            name = document.title or (document.media[0].name if document.media else document.text[:60])
            raise InvalidInputError(f"The document {name!r}: {error}") from error

    def _written(self, document: Document, template: str | None, answer: bool) -> WrittenChat:
        model = self._model
        if template is None:
            return WrittenChat(document.text, (), (), places_in(document.text, document.media))
        marks = {kind: self._mark(kind) for kind in self.kinds}
        return write_chat(model.tokenizer, model.special_token_ids, document.chat, template, answer, marks)

    def _tokens(
        self,
        document: Document,
        written: WrittenChat,
        media: tuple[MediumContent, ...],
        prepared: Sequence[_Prepared],
        is_chat: bool,
    ) -> MediaTokens:
        tokenizer = self._model.tokenizer
        written = _replaced(written, [one.text for one in prepared])
        encoding = tokenizer.backend_tokenizer.encode(written.text, add_special_tokens=False)
        tokens = np.asarray(encoding.ids, np.int32)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        columns = {name: np.full(len(tokens), NO_MEDIUM[name]).astype(dtype) for name, dtype in MEDIA_COLUMNS.items()}
        for number, ((start, stop), one, own) in enumerate(zip(written.media, media, prepared, strict=True)):
            inside = (offsets[:, 1] > start) & (offsets[:, 0] < stop)
            soft = np.flatnonzero(inside & (tokens == self._soft[one.kind]))
            if len(soft) != own.n_tokens or len(soft) != soft[-1] - soft[0] + 1:
                raise InvalidInputError(f"{one.name} is {own.n_tokens} tokens, and {len(soft)} in its text.")
            columns["medium"][inside] = number
            columns["modality"][soft] = MODALITIES.index(one.kind)
            for name, values in own.places.items():
                columns[name][soft] = values
        strays = np.isin(tokens, list(self._soft.values())) & (columns["modality"] == 0)
        if strays.any():
            raise InvalidInputError(
                f"Its text holds {tokenizer.convert_ids_to_tokens(int(tokens[strays][0]))}, which the model reads as "
                "part of an image or a sound. Take it out."
            )
        n_bos = 0
        if is_chat:
            spoken = chat_tokens(tokenizer.bos_token_id, encoding, written, document.chat)
            n_bos = len(tokens) - len(spoken.token_id)
            columns = {name: values[n_bos:] for name, values in columns.items()}
            columns |= {name: getattr(spoken, name) for name in CHAT_COLUMNS}
        return MediaTokens(tokens[n_bos:], columns, media)

    # --- running ----------------------------------------------------------------------------------------------

    def _together(
        self,
        tokens: Int[Tensor, "batch seq"],
        media: Sequence[Sequence[PlacedMedium]],
        prepared: Sequence[_Prepared],
    ) -> MediaInputs:
        """Step 3: the tensors of all media of a batch, as one each."""
        types = torch.zeros_like(tokens, device="cpu")
        for row, window in enumerate(media):
            for one in window:
                types[row, one.position : one.position + one.n_tokens] = TYPE_IDS[one.kind]
        names = dict.fromkeys(name for one in prepared for name in one.tensors)
        joined = {name: _joined([one.tensors[name] for one in prepared if name in one.tensors]) for name in names}
        moved = {
            name: value.to(tokens.device, self._model.dtype if value.is_floating_point() else None)
            for name, value in {**joined, self._types: types}.items()
        }
        return MediaInputs(moved)

    # --- the processor ----------------------------------------------------------------------------------------

    def _mark(self, kind: str) -> str:
        """What a template writes for a medium."""
        return str(self._processor.image_token if kind == "image" else self._processor.audio_token)

    def _soft_token(self, kind: str) -> int:
        config: Any = self._model.config
        return int(config.image_token_id if kind == "image" else config.audio_token_id)

    @property
    def _rate(self) -> int:
        """Samples a second that the model hears."""
        return int(self._processor.feature_extractor.sampling_rate)

    def _markup(self, kind: str) -> int:
        """Tokens around the soft ones."""
        blank = np.full((64, 64, 3), 128, np.uint8) if kind == "image" else np.zeros(self._rate, np.float32)
        soft = self._model.tokenizer.convert_ids_to_tokens(self._soft[kind])
        (markup,) = self._model.encode_documents([self._process(kind, blank).text.replace(soft, "")])
        return len(markup)

    def _template(self) -> str:
        template = getattr(self._processor, "chat_template", None) or own_template(self._model.tokenizer)
        if not template:
            raise InvalidInputError(f"{self._model.name} has no chat template; give a document with media instead.")
        return str(template)

    def _require(self, kind: str, seconds: float) -> None:
        if kind not in self.kinds:
            raise InvalidInputError(f"{self._model.name} takes no {kind}; it takes text and {', '.join(self.kinds)}.")
        if kind == "audio":
            longest = self._processor.audio_seq_length * self._processor.audio_ms_per_token / 1000
            if seconds > longest:
                raise InvalidInputError(
                    f"A sound has {seconds:,.1f} s; {self._model.name} takes {longest:,.1f} s. Cut it into pieces."
                )


def _kinds(model: "LanguageModel", outer: Any) -> tuple[str, ...]:
    """Which media a model has towers for."""
    towers = {"image": "vision_tower", "audio": "audio_tower"}
    kinds = tuple(kind for kind, name in towers.items() if getattr(outer, name, None) is not None)
    if model.config.model_type not in MEDIA_TYPES or not kinds:
        raise InvalidInputError(
            f"{model.name} takes text alone. Images and sounds go into models of type {', '.join(MEDIA_TYPES)} that "
            "have their towers."
        )
    return kinds


def _boxes(n_tokens: int, positions: Tensor | None) -> dict[str, np.ndarray]:
    """Patches of an image's soft tokens, row by row: of a square grid, or of the one that `positions` (1, n_patches, 2)
    makes when it is pooled: the places x and y of what the tower sees."""
    columns = rows = math.isqrt(n_tokens)
    if positions is not None:
        seen = positions[0][(positions[0] >= 0).all(-1)]
        pooled = math.isqrt(len(seen) // n_tokens)
        columns, rows = ((seen.max(0).values + 1) // pooled).tolist()
    if columns * rows != n_tokens:
        raise InvalidInputError(
            f"an image has {n_tokens} soft tokens, which is no grid of {columns} by {rows} patches."
        )
    row, column = np.divmod(np.arange(n_tokens), columns)
    return dict(zip(BOX, (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows), strict=True))


def _spans(n_tokens: int, step: float, seconds: float) -> dict[str, np.ndarray]:
    """Times of a sound's soft tokens, up to its end."""
    edges = np.minimum(np.arange(n_tokens + 1) * step, seconds)
    return dict(zip(SPAN, (edges[:-1], edges[1:]), strict=True))


def _replaced(written: WrittenChat, texts: Sequence[str]) -> WrittenChat:
    """A text with what stands for its media in the place of their marks; everything else moves along."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    edges, shifts = [0], [0]
    place = length = 0
    for (start, stop), text in zip(written.media, texts, strict=True):
        pieces += [written.text[place:start], text]
        length += start - place
        spans.append((length, length + len(text)))
        length += len(text)
        place = stop
        edges.append(stop)
        shifts.append(length - stop)
    pieces.append(written.text[place:])

    def moved(at: int) -> int:
        return at + shifts[int(np.searchsorted(edges, at, "right")) - 1]

    def both(one: Any) -> Any:
        return one._replace(start=moved(one.start), stop=moved(one.stop))

    return WrittenChat(
        "".join(pieces), [both(one) for one in written.words], [both(one) for one in written.turns], spans
    )


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (1, length, …) one below the other; shorter ones get zeros, which the masks among them leave out."""
    longest = max(tensor.shape[1] for tensor in tensors)
    padded = [
        torch.cat([one, one.new_zeros(1, longest - one.shape[1], *one.shape[2:])], dim=1)
        if one.shape[1] < longest
        else one
        for one in tensors
    ]
    return torch.cat(padded)
