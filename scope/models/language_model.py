"""`LanguageModel`: a Hugging Face model whose inside can be read and changed, under TransformerLens's hook names.

Two ways in over the same weights. The fast path (`scope.models.taps`) puts plain forward hooks on the modules; the
bridge (`scope.models.bridge`) is TransformerLens's own view, booted on first use. `run` takes the fast path where
it can and the bridge where only that can see what was asked for.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations.chats import Chat, ChatTokens
from activations.denoising import Canvas, DenoisedBlock, DenoisingSettings
from activations.documents import Document
from activations.media import MediaTokens, PlacedMedium
from activations.source import ModelIdentity
from activations.spec import StorageDtype
from activations.text import TextSource
from scope.errors import InvalidInputError
from scope.models import diffusion, identity, loading, losses
from scope.models.architectures import Layout, find_layout
from scope.models.chats import encode_chats, own_template
from scope.models.compiled import CompiledLayers
from scope.models.dictionaries import Saes
from scope.models.edits import EditFunction, Standing, resolve_edits
from scope.models.generation import Generation, NewToken, collect, stream
from scope.models.hooks import HookKind, HookPoint, HookTable, build_hook_table
from scope.models.media import MediaInputs, MediaPrompt, MediaReader
from scope.models.parameters import ParameterCount, count_parameters
from scope.models.placement import EmbeddingPlace
from scope.models.ragged import can_run_ragged
from scope.models.rows import HostCopy, check_windows, collect_rows
from scope.models.run import RunResult, SpliceMode, run
from scope.models.taps import Handler, tapped
from scope.models.tokens import TokenReader, TokenText, prompt_ids, special_ids

if TYPE_CHECKING:
    from scope.models.live import LiveActivations

__all__ = ["LanguageModel"]

CPU_BATCH_SIZE = 1024
CUDA_BATCH_SIZE = 36_864
"""A row group of 32,768 rows, and what its first windows have in the group before, in one go."""


class LanguageModel:
    """A causal language model. Make one with `LanguageModel.load`."""

    def __init__(
        self, hf: Any, files: loading.ModelFiles, compile: bool = False, trust_remote_code: bool = False
    ) -> None:
        self.hf = hf
        """The Hugging Face model; its weights are frozen."""
        self.files = files
        self.trust_remote_code = trust_remote_code
        self.layout: Layout = find_layout(hf)
        self.hook_table: HookTable = build_hook_table(self.layout)
        self.lock = threading.RLock()
        """Held during every pass: hooks of one pass must not fire in another."""
        self.standing = Standing()
        """The edits in force, by thread: see `intervene`."""
        layers = {self.layout.layer(i): hf.get_submodule(self.layout.layer(i)) for i in range(self.layout.n_layers)}
        self.compiled_layers = CompiledLayers(layers) if compile else None
        """What `forward_rows` runs in the layers' place, where the model was loaded with `compile`."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        attention: Literal["sdpa", "eager"] | None = None,
        compile: bool = False,
        allow_download: bool = False,
        embeddings: EmbeddingPlace = "device",
        trust_remote_code: bool = False,
    ) -> "LanguageModel":
        """Load a model.

        Args:
            name: a Hugging Face id, a local folder, a .gguf file, or `gemma-3-270m` (extra `demo`).
            revision: branch, tag or commit of a model from the hub.
            device: where it runs; CUDA where there is one.
            dtype: in which it computes; "auto" is bfloat16 where the hardware has it, else float32.
            attention: "sdpa" is fast and the default where the architecture has it (Gemma 2 has not); "eager" equals
                TransformerLens to the last digits.
            compile: run captures through `torch.compile`, which pays on a GPU after some seconds of compiling;
                activations then differ in their last digits, so that a store remembers it (`compute_dtype`). A layer
                with a hook inside, and everything but capture, runs uncompiled.
            allow_download: get what is not on this machine from the Hugging Face hub.
            embeddings: "host" keeps lookup tables in the host's memory and the rest on the device, with equal outputs:
                per-layer embeddings, and the main one where it is not the unembedding too.
            trust_remote_code: run Python code that comes with a model whose class transformers does not have (LLaDA,
                Dream).

        Raises:
            UnknownNameError: there is no such model here; near misses are suggested.
            InvalidInputError: what is there is no model that can be loaded.
            MissingDependencyError: the package that carries the model is not installed.
        """
        target = loading.pick_device(device)
        compute = loading.pick_dtype(dtype, target)
        files = loading.find_model(name, revision, allow_download, trust_remote_code)
        hf = loading.load_causal_lm(files, target, compute, attention, embeddings, trust_remote_code)
        return cls(hf, files, compile, trust_remote_code)

    # What it is

    @property
    def name(self) -> str:
        """The name to show."""
        return self.files.name

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.hf.config

    @property
    def device(self) -> torch.device:
        return self.W_U.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.W_U.dtype

    @property
    def n_layers(self) -> int:
        return self.layout.n_layers

    @property
    def d_model(self) -> int:
        return self.layout.d_model

    @property
    def d_vocab(self) -> int:
        return self.layout.d_vocab

    @property
    def max_context_size(self) -> int:
        """The longest window that the model takes, in tokens."""
        return self.layout.max_context_size

    @property
    def default_batch_size(self) -> int:
        """Tokens at once, padding included, that the model runs fastest on its device: few on a CPU, so that what a
        layer makes stays in its caches."""
        return CUDA_BATCH_SIZE if self.device.type == "cuda" else CPU_BATCH_SIZE

    @cached_property
    def pads(self) -> bool:
        """Whether windows that run together in a capture are padded to the longest of them."""
        return not can_run_ragged(self)

    @cached_property
    def identity(self) -> ModelIdentity:
        """What stores and SAEs remember of the model. Hashes are computed on first use and cached on disk."""
        return identity.identify(self)

    def parameter_count(self) -> ParameterCount:
        """Parameters in all, active per token, in lookup tables and experts, and where they lie."""
        return count_parameters(self)

    def info(self) -> dict[str, Any]:
        """The model's name, sizes, hashes and hooks, JSON-able."""
        return identity.describe(self)

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name!r}, {self.n_layers} layers, d_model {self.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    def _repr_html_(self) -> str:
        from scope.models.display import model_html

        return model_html(self)

    # Tokens

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, read on first use (Gemma's takes three seconds)."""
        from transformers import AutoTokenizer

        with loading.quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                self.files.folder, local_files_only=True, trust_remote_code=self.trust_remote_code
            )
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise InvalidInputError(
                f"The tokenizer of {self.name}, {type(tokenizer).__name__}, is written in Python; expected one of the "
                "library tokenizers. Name the class of the same vocabulary that is one in tokenizer_config.json "
                "(tokenizer_class, without auto_map)."
            )
        return tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """The token that starts every window; None where the tokenizer has none."""
        return self.tokenizer.bos_token_id

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens, BOS included."""
        return special_ids(self.tokenizer)

    def tokenize(self, text: str, prepend_bos: bool = True) -> Int[Tensor, " seq"]:
        """Token ids of a text, on the CPU. BOS is put in front where the tokenizer has one, and never twice."""
        (ids,) = self.encode_documents([text])
        bos = self.bos_token_id
        if prepend_bos and bos is not None and not (len(ids) and ids[0] == bos):
            ids = np.concatenate([[bos], ids])
        return torch.from_numpy(ids.astype(np.int64))

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32) of each text, without BOS or other added special tokens."""
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own way to write chats, a Jinja template; None where it has none."""
        return own_template(self.tokenizer)

    def encode_chats(self, chats: Sequence[Chat], template: str, answer: bool = False) -> list[ChatTokens]:
        """Token ids, roles and kinds of chats as a template writes them, without BOS; `answer` adds the markup that the
        assistant's next turn begins with. See `scope.models.chats`."""
        return encode_chats(self.tokenizer, self.special_token_ids, chats, template, answer)

    # Images and sounds

    @cached_property
    def media(self) -> MediaReader:
        """The model's processor: how images and sounds become tokens.

        Raises:
            InvalidInputError: the model takes text alone, or its folder has no processor.
        """
        return MediaReader(self)

    def processor_hash(self) -> str:
        """Digest (hex) of how media are prepared for the model."""
        return self.media.fingerprint

    def max_medium_tokens(self, kind: str, seconds: float) -> int:
        """See `activations.source.MediaModel`."""
        return self.media.max_tokens(kind, seconds)

    def encode_media(self, documents: Sequence[Document], template: str | None) -> list[MediaTokens]:
        """See `activations.source.MediaModel`."""
        return self.media.encode(documents, template)

    def media_prompt(self, prompt: "str | Sequence[Any] | Document") -> MediaPrompt:
        """A prompt with images or sounds, for `run`: chat messages whose contents have parts such as
        `{"type": "image", "path": …}`, or a document with its media.

        Raises:
            InvalidInputError: the model takes no such media, or one cannot be read.
        """
        return self.media.prompt(prompt)

    @cached_property
    def _reader(self) -> TokenReader:
        return TokenReader(self.tokenizer, self.special_token_ids, self.d_vocab)

    def token_strings(self, ids: Sequence[int] | Int[Tensor, " seq"]) -> list[TokenText]:
        """What each token of a text reads; a token that is a part of a character shows the character and its share."""
        return self._reader.token_strings([int(token) for token in ids])

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """As `vocabulary_strings`, under the name that capture knows (`activations.source.HookedModel`)."""
        return self.vocabulary_strings(ids)

    def vocabulary_strings(self, ids: Sequence[int] | Int[Tensor, " n"]) -> list[str]:
        """What each token reads by itself."""
        return self._reader.vocabulary_strings([int(token) for token in ids])

    def bos_mask(self, tokens: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """Where the BOS token that starts a window stands."""
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        if self.bos_token_id is not None:
            mask[:, 0] = tokens[:, 0] == self.bos_token_id
        return mask

    def prompt_tokens(
        self, prompt: str | Sequence[Any] | Int[Tensor, " seq"], chat_template: str | None = None
    ) -> Int[Tensor, " seq"]:
        """Token ids of a prompt, on the model's device: a text gets BOS, chat messages go through a chat template,
        token ids are taken as they are.

        Args:
            prompt: a text, messages (`{"role": …, "content": …}`), or token ids.
            chat_template: what writes messages, a Jinja template as `activations.capture` takes it; None for the
                tokenizer's own.

        Raises:
            InvalidInputError: the prompt is empty, longer than the context, or of another kind; there is no template,
                or it fails, or one is given and the prompt is no chat.
            OutOfRangeError: a token id that the vocabulary does not have.
        """
        if isinstance(prompt, MediaPrompt):
            raise InvalidInputError("A prompt with images or sounds goes through model.run; this takes text alone.")
        return prompt_ids(self, prompt, chat_template).to(self.device)

    # Hooks

    def hook_names(self, kind: HookKind | None = None) -> HookTable:
        """All places that can be read and changed, with their shapes, in model order."""
        return self.hook_table.select(kind)

    def known_hooks(self) -> tuple[str, ...]:
        """Names of all hooks, aliases among them."""
        return self.hook_table.all_names

    def resolve_hook(self, name: str) -> str:
        """The name that a hook goes by; raises `UnknownNameError` with near misses."""
        return self.hook_table[name].name

    def hook_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one token's activation at a hook: `(640,)` for a residual, `(n_heads, d_head)` for z.

        Raises:
            UnknownNameError: there is no such hook.
            InvalidInputError: the hook has no row per token, or only the bridge can see it.
        """
        return self._fast_point(name)[1]

    def _fast_point(self, name: str) -> tuple[HookPoint, tuple[int, ...]]:
        point = self.hook_table[name]
        if point.path != "fast" or point.row_shape is None:
            raise InvalidInputError(
                f"{point.name} can only be seen through the bridge, which is too slow for capture; use model.run."
            )
        return point, point.row_shape

    # Forward passes

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        handlers: Mapping[HookPoint, Handler],
        logits: bool | Literal["last"],
        cache: Any = None,
        media: MediaInputs | None = None,
        positions: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch n d_vocab"] | None:
        """One pass with a handler at each hook point: the common ground of `run`, `cross_entropy` and capture.

        Args:
            tokens: token ids; shorter windows are padded on the right.
            handlers: what to do at which hook points, in model order.
            logits: whether to compute the logits of all positions, of the last one, or none; without them the pass
                ends after the last handler.
            cache: transformers' cache of the tokens before these, which these are added to; None for whole windows.
            media: what the towers get, where there are images or sounds among the tokens.
            positions: where each token stands in its text; None to count from the first, or from the cache's end.
        """
        if not logits and not handlers:
            return None
        if self.layout.family.denoises:
            diffusion.require_prompt_hooks(self, handlers, logits)
        if any(point.path == "bridge" for point in handlers):
            from scope.models.bridge import bridge_forward

            return bridge_forward(self, tokens, handlers, logits, media)
        output = None
        with self.lock, tapped(self.hf, handlers, stop=not logits):
            hidden = self.hidden_states(tokens, cache, media, positions)
            if logits or any(point.name == "hook_unembed" for point in handlers):
                output = losses.unembed(self, hidden[:, -1:] if logits == "last" else hidden)
        return output if logits else None

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch seq"],
        cache: Any = None,
        media: MediaInputs | None = None,
        positions: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """The output of the final norm, of a model that denoises its encoder's; `cache`, `media`, `positions` as for
        `forward`.

        Raises:
            InvalidInputError: an intervention is in force that the caller does not take part in.
        """
        self.standing.require_taken_in()
        if media is not None:
            return media.run(self, tokens)
        backbone = self.hf.get_submodule((self.layout.encoder or self.layout).backbone)
        placed = {} if positions is None else {"position_ids": positions}
        return backbone(
            input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **placed
        ).last_hidden_state

    def forward_rows(
        self,
        windows: Sequence[np.ndarray],
        hooks: Sequence[str],
        dtype: StorageDtype,
        batch_size: int,
        media: Sequence[Sequence[PlacedMedium]] | None = None,
    ) -> HostCopy:
        """Run windows and keep what the hooks see, as rows of real tokens: see `activations.source.HookedModel` and,
        for `media`, `MediaModel`."""
        with torch.inference_mode():
            return HostCopy(self.device_rows(windows, hooks, dtype, batch_size, media))

    def device_rows(
        self,
        windows: Sequence[np.ndarray],
        hooks: Sequence[str],
        dtype: StorageDtype,
        batch_size: int,
        media: Sequence[Sequence[PlacedMedium]] | None = None,
    ) -> dict[str, Tensor]:
        """As `forward_rows`, but what the hooks see stays on the model's device: per hook the rows, in the storage
        dtype, and per `norm/<hook>` their norms."""
        points = {name: self._fast_point(name) for name in hooks}
        check_windows(windows, 1, self.max_context_size, self.d_vocab)
        in_order = sorted(points, key=self.hook_table.rank)

        pads = self.pads or (media is not None and any(media))

        def forward(
            indices: Sequence[int],
            tokens: Tensor,
            keep: Mapping[str, Callable[[Tensor], None]],
            positions: Tensor | None,
        ) -> None:
            own = None if media is None else [media[index] for index in indices]
            inputs = None if own is None or not any(own) else self.media.inputs(tokens, own)
            handlers = {points[name][0]: keep[name] for name in in_order}
            self.forward(tokens, handlers, logits=False, media=inputs, positions=positions)

        hooked = [point.site.module for point, _ in points.values() if point.site is not None]
        layers = self.compiled_layers.in_place(hooked) if self.compiled_layers is not None else nullcontext()
        with self.lock, layers, torch.inference_mode():
            shapes = {name: shape for name, (_, shape) in points.items()}
            return collect_rows(windows, shapes, dtype, batch_size, self.device, forward, pads)

    def source(self, text: TextSource, hooks: str | Sequence[str], **settings: Any) -> "LiveActivations":
        """What hooks see on a text, computed as it is consumed: a source to train from without a store on disk.

        Args:
            text: where documents come from.
            hooks: names of the hooks.
            settings: see `scope.models.live.LiveActivations`: windows, dtype, device and more.
        """
        from scope.models.live import LiveActivations

        return LiveActivations(self, text, [hooks] if isinstance(hooks, str) else hooks, **settings)

    def run(
        self,
        prompt: str | Sequence[Any] | Int[Tensor, " seq"] | MediaPrompt,
        hooks: Sequence[str] = (),
        saes: Saes = (),
        splice: SpliceMode | Literal[False] | None = None,
        edits: Mapping[str, EditFunction] | None = None,
        grad: bool = False,
        logits: bool | Literal["last"] = True,
        chat_template: str | None = None,
    ) -> RunResult:
        """Run one prompt.

        Args:
            prompt: a text (BOS is put in front), chat messages, token ids, or what `media_prompt` makes of images and
                sounds.
            hooks: where to record activations.
            saes: SAEs whose features are wanted: one, several, or several by name.
            splice: put the SAEs' reconstructions in the place of what they read: "without_error", or "with_error",
                which adds what the SAE misses back in, so that values stay as they are while gradients and edits go
                through the features. The BOS token passes through unreconstructed: SAEs are not trained on it.
            edits: functions that change the activation at a hook; see `scope.interventions` for ready-made ones.
            grad: keep the graph: activations and features that are returned get a `.grad` by `backward`.
            logits: whether to compute logits; "last" for those after the last token alone.
            chat_template: what writes chat messages, as for `prompt_tokens`.

        Raises:
            UnknownNameError, OutOfRangeError, MismatchError, InvalidInputError: before anything is computed.
        """
        media = prompt.inputs if isinstance(prompt, MediaPrompt) else None
        tokens = prompt.tokens if isinstance(prompt, MediaPrompt) else self.prompt_tokens(prompt, chat_template)
        edits = self.standing.with_these(self.hook_table, edits)
        with self.standing.taken_in():
            return run(self, tokens, hooks, saes, splice, edits, grad, logits, media)

    @contextmanager
    def intervene(self, edits: Mapping[str, EditFunction]) -> Iterator["LanguageModel"]:
        """Have edits in force within a `with` block, for this thread: in `run`, `generate`, `stream` and
        `cross_entropy`, before those that these are given. Blocks nest, the outer one's edits come first. Whatever
        else runs the model, such as a capture, is refused there.

        Args:
            edits: as for `run`; a declared set of interventions becomes edits by `spec.resolve(model, saes)`.

        Raises:
            UnknownNameError, InvalidInputError: an edit that no text could be run with.
        """
        resolve_edits(self.hook_table, edits, self.max_context_size)
        with self.standing.hold(edits):
            yield self

    def generate(
        self,
        prompt: str | Sequence[Any] | Int[Tensor, " seq"],
        max_new_tokens: int = 20,
        edits: Mapping[str, EditFunction] | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        cache: bool = True,
        chat_template: str | None = None,
    ) -> Generation:
        """Let the model go on from a prompt, with edits in force at every step.

        Args:
            prompt: as for `run`.
            max_new_tokens: how many tokens to add, at most; an end-of-text token ends the text.
            edits: as for `run`. Positions may lie in the text that is yet to be written.
            temperature: 0 takes the likeliest token, 1 samples as the model says.
            seed: of the sampling.
            cache: keep keys and values from step to step, where every edit works token by token (all of
                `scope.interventions` do). The text is the same without, and each step runs all of it again.
            chat_template: what writes chat messages, as for `prompt_tokens`.

        Raises:
            UnknownNameError, OutOfRangeError, MismatchError, InvalidInputError: before anything is computed.
        """
        tokens = self.prompt_tokens(prompt, chat_template)
        return collect(self, tokens, self.stream(tokens, max_new_tokens, edits, temperature, seed, cache))

    def stream(
        self,
        prompt: str | Sequence[Any] | Int[Tensor, " seq"],
        max_new_tokens: int = 20,
        edits: Mapping[str, EditFunction] | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        cache: bool = True,
        chat_template: str | None = None,
    ) -> Iterator[NewToken]:
        """As `generate`, token by token: what can be wrong is raised at once, the model runs as tokens are asked for.
        The edits in force are those of the moment of the call."""
        edits = self.standing.with_these(self.hook_table, edits)
        tokens = self.prompt_tokens(prompt, chat_template)
        return stream(self, tokens, max_new_tokens, edits, temperature, seed, cache)

    # Denoising

    def denoising_configuration(self, settings: DenoisingSettings) -> dict[str, Any]:
        """All that the model's denoising loop goes by; see `activations.denoising.DenoisingModel`."""
        return diffusion.denoising_configuration(self, settings)

    def require_canvas(self, canvas: Canvas, settings: DenoisingSettings) -> None:
        """Raise `InvalidInputError` if the model cannot fill this in."""
        diffusion.inputs_of(self, canvas, settings)

    def denoise(
        self, canvas: Canvas, settings: DenoisingSettings, seed: int, hooks: Sequence[str], dtype: StorageDtype
    ) -> list[DenoisedBlock]:
        """Fill in a canvas in the model's own loop, and keep what hooks see at each step; see
        `scope.models.diffusion`."""
        return diffusion.denoise(self, canvas, settings, seed, hooks, dtype)

    def read_canvas(
        self, prompt: Int[Tensor, " prompt"], canvas: Int[Tensor, " canvas"], hooks: Sequence[str] = ()
    ) -> tuple[dict[str, Tensor], Float[Tensor, "n d_vocab"]]:
        """One pass of a model that denoises over one canvas: what hooks see, and logits; see
        `scope.models.diffusion`."""
        return diffusion.read_canvas(self, prompt, canvas, hooks)

    # Unembedding

    @property
    def W_U(self) -> Float[Tensor, "d_vocab d_model"]:  # noqa: N802  the field's name
        """The unembedding matrix."""
        return self.hf.get_submodule(self.layout.head).weight

    @property
    def final_norm_gain(self) -> Float[Tensor, " d_model"]:
        """What the final norm multiplies each dimension by (1 + weight, for Gemma)."""
        return losses.final_norm_gain(self)

    def logit_effects(self, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """How directions in the last residual stream push each token's logit; see `scope.models.losses`."""
        return losses.logit_effects(self, directions)

    def cross_entropy(
        self,
        windows: Sequence[np.ndarray],
        edits: Mapping[str, EditFunction] | None = None,
        batch_size: int = 2048,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> list[Float[np.ndarray, " n"]]:
        """Next-token loss in nats at each position of each window; see `scope.models.losses`."""
        if self.layout.family.denoises:
            diffusion.require_prompt_hooks(self, {}, True)
        edits = self.standing.with_these(self.hook_table, edits)
        with self.standing.taken_in():
            return losses.cross_entropy(self, windows, edits, batch_size, progress)

    # TransformerLens

    @cached_property
    def bridge(self) -> Any:
        """A `TransformerBridge` over the same weights, in a module tree of its own: the way out to everything that
        TransformerLens can do. Booted on first use; hold `model.lock` where several threads use it.

        Raises:
            MissingDependencyError: transformer_lens is not installed (extra `bridge`).
        """
        from scope.models.bridge import boot_bridge

        if self.layout.family.denoises:
            raise InvalidInputError(f"{self.name} has no bridge here: it denoises. model.read_canvas sees its hooks.")
        with self.lock:
            return boot_bridge(self)
