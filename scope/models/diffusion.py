"""Models that denoise: their hooks, and generation watched from outside.

**DiffusionGemma** (transformers' `diffusion_gemma`) writes canvas after canvas of `canvas_length` tokens. Its *encoder*
reads prompt and finished canvases causally, and hands on keys and values; its *decoder*, the denoiser, reads a canvas
with attention in both directions and to these keys. Both share their weights, but for scalars of the layers and the
denoiser's self-conditioning. For layer l of either (batch 1):

    blocks.l.hook_resid_post, …        (batch, canvas_length, …)   the denoiser, once a step
    hook_embed                         (batch, canvas_length, d_model)   the canvas's embeddings
    hook_self_conditioned              the same, with what the step before predicted; goes into layer 0
    encoder.blocks.l.hook_resid_post   (batch, prompt, …)   the encoder, once a canvas; so for all other names

**LLaDA and Dream** are one stack that reads prompt and canvas together, in both directions, with a mask token where
text is still to come: `blocks.l…` are (batch, prompt + canvas, …).

What is captured is the model's own loop, its sampler and its stopping: DiffusionGemma's `generate`, Dream's
`diffusion_generate`. We look on:

1. The seed is set, and the loop is called for one prompt.
2. Before each pass of the denoiser its canvas is noted; hooks see the pass.
3. What the sampler accepts is noted: DiffusionGemma's says so; where there is a mask token, what is no mask any more.
4. What the loop returns is the final text.

**Filling in the middle.** Where there is a mask token the gap is masks. DiffusionGemma's loop has no place for text
behind a gap; `generate` takes a first canvas and logits processors, though: the suffix stands in the first canvas, and
a processor leaves only the given token possible there, so that the sampler accepts it at every step. The gap and the
suffix must fit into one canvas.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.denoising import Canvas, DenoisedBlock, DenoisingSettings
from activations.spec import StorageDtype
from scope.errors import InvalidInputError
from scope.models.hooks import ENCODER, HookPoint
from scope.models.rows import STORAGE, HostCopy, as_rows, check_windows
from scope.models.taps import Countdown, Handler, attached

if TYPE_CHECKING:
    from scope.models.language_model import LanguageModel

__all__ = ["denoise", "denoising_configuration", "inputs_of", "read_canvas", "require_prompt_hooks"]

NO_SETTINGS = ("transformers_version", "return_dict_in_generate", "disable_compile")
NEVER = -1e4
"""A logit that leaves a token no probability in float32, and survives a division by a temperature in bfloat16."""


def require_prompt_hooks(model: "LanguageModel", points: Mapping[HookPoint, Handler], logits: object) -> None:
    """Refuse an ordinary pass over a text by a model that denoises, but one of its encoder.

    Raises:
        InvalidInputError: it asks for the denoiser's hooks or for next tokens.
    """
    asked = [point.name for point in points if not point.name.startswith(ENCODER)]
    if logits or asked or model.layout.encoder is None:
        what = f"{asked[0]} sees canvases" if asked else "it has no next token"
        also = " Hooks that begin with encoder. read texts." if model.layout.encoder is not None else ""
        raise InvalidInputError(
            f"{model.name} fills in canvases step by step: {what}. Capture them with scope denoise "
            f"(model.denoise, model.read_canvas).{also}"
        )


def denoising_configuration(model: "LanguageModel", settings: DenoisingSettings) -> dict[str, Any]:
    """All that the model's loop goes by, JSON-able: see `activations.denoising.DenoisingModel`."""
    if not model.layout.family.denoises:
        raise InvalidInputError(
            f"{model.name} ({model.config.model_type}) writes token by token; DiffusionGemma and Dream denoise."
        )
    if model.layout.encoder is not None:
        own = {"canvas_length": model.config.canvas_length}
    elif hasattr(model.hf, "diffusion_generate"):
        own = {"mask_token_id": _mask_token(model), **_masked_options(settings)}
    else:
        raise InvalidInputError(
            f"{type(model.hf).__name__} has no generation loop of its own (diffusion_generate), so there is none to "
            "look into; read single canvases with model.read_canvas."
        )
    configuration = _configuration(model, settings)
    described = {} if configuration is None else configuration.to_dict()
    kept = {
        name: value.to_dict() if hasattr(value, "to_dict") else value
        for name, value in described.items()
        if not name.startswith("_") and name not in NO_SETTINGS
    }
    return {**kept, **own}


def _configuration(model: "LanguageModel", settings: DenoisingSettings) -> Any:
    """The generation configuration that the loop makes of the model's and of `settings`; None if it has none."""
    prepare = getattr(model.hf, "_prepare_generation_config", None)
    if prepare is None:
        return None
    gemma = model.layout.encoder is not None
    made = prepare(None, **(_gemma_options(settings) if gemma else _masked_options(settings)))
    return made[0] if isinstance(made, tuple) else made  # DiffusionGemma also gives what is not of the configuration


def denoise(
    model: "LanguageModel",
    canvas: Canvas,
    settings: DenoisingSettings,
    seed: int,
    hooks: Sequence[str],
    dtype: StorageDtype,
) -> list[DenoisedBlock]:
    """Generate one text in the model's own loop: see `activations.denoising.DenoisingModel.denoise`.

    Raises:
        InvalidInputError: the model does not denoise, a hook is not the denoiser's, or the canvas does not fit.
    """
    denoising_configuration(model, settings)
    points = {name: model.hook_table[name] for name in hooks}
    for name in points:
        model.hook_shape(name)
        if name.startswith(ENCODER):
            raise InvalidInputError(f"{name} sees the prompt, not canvases; capture it with scope capture.")
    gemma = model.layout.encoder is not None
    inputs = inputs_of(model, canvas, settings)
    watch = _Watch(points, dtype, None if gemma else _mask_token(model))
    cuda = [model.device.index or 0] if model.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(model.lock)
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.manual_seed(seed)
        ordered = sorted(points, key=model.hook_table.rank)
        handlers = {points[name]: watch.handler(name) for name in ordered}
        stack.enter_context(attached(model.hf, handlers, Countdown(0, stop=False)))
        tokens = torch.from_numpy(inputs.astype(np.int64))[None].to(model.device)
        if gemma:
            stack.enter_context(_watched_gemma(model, watch))
            sequence = _generate_gemma(model, tokens, canvas, settings)
        else:
            stack.enter_context(_before(model.hf, "input_ids", watch.read))
            sequence = _generate_masked(model, tokens, settings)
    final = sequence[0].cpu().numpy().astype(np.int32)
    return watch.blocks(final, len(inputs) if gemma else 0, canvas)


@torch.no_grad()
def read_canvas(
    model: "LanguageModel",
    prompt: Int[Tensor, " prompt"],
    canvas: Int[Tensor, " canvas"],
    hooks: Sequence[str],
) -> tuple[dict[str, Tensor], Float[Tensor, "n d_vocab"]]:
    """One pass over one canvas, without self-conditioning: what hooks see, `(canvas, …)` each (`(prompt, …)` of the
    encoder's), and the logits. Where one stack reads both, the canvas is preceded by the prompt in all of these."""
    if not model.layout.family.denoises:
        raise InvalidInputError(f"{model.name} does not denoise; use model.run.")
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Handler:
        def handler(value: Tensor) -> None:
            seen[name] = value[0]

        return handler

    names = {name: model.resolve_hook(name) for name in hooks}
    ordered = sorted({*names.values()}, key=model.hook_table.rank)
    handlers = {model.hook_table[name]: keep(name) for name in ordered}
    prompt, canvas = prompt.to(model.device)[None], canvas.to(model.device)[None]
    with model.lock, attached(model.hf, handlers, Countdown(0, stop=False)):
        if model.layout.encoder is not None:
            logits = model.hf(input_ids=prompt, decoder_input_ids=canvas).logits
        else:
            logits = model.hf(torch.cat([prompt, canvas], dim=1)).logits
    return {name: seen[canonical] for name, canonical in names.items()}, logits[0]


class _Watch:
    """What is seen of a loop, canvas by canvas and step by step."""

    def __init__(self, points: Mapping[str, HookPoint], dtype: StorageDtype, mask: int | None) -> None:
        self.points, self.storage, self.mask = points, STORAGE[dtype], mask
        self.canvases: list[list[np.ndarray]] = []
        self.accepted: list[list[np.ndarray]] = []
        self.values: list[list[HostCopy]] = []
        self._step: dict[str, Tensor] = {}

    def new_canvas(self) -> None:
        for kept in (self.canvases, self.accepted, self.values):
            kept.append([])

    def read(self, canvas: Tensor) -> None:
        """The denoiser is about to read a canvas."""
        self._end_step()
        if not self.canvases:
            self.new_canvas()
        self.canvases[-1].append(canvas[0].cpu().numpy().astype(np.int32))

    def accept(self, accepted: Tensor) -> None:
        self.accepted[-1].append(accepted[0].cpu().numpy())

    def handler(self, name: str) -> Handler:
        def handler(value: Tensor) -> None:
            rows, norms = as_rows(value.expand(1, *value.shape[1:])[0], self.storage)
            # A copy: the loop may write into what it passed on.
            self._step[name], self._step[f"norm/{name}"] = rows.clone(), norms

        return handler

    def _end_step(self) -> None:
        if self._step:
            self.values[-1].append(HostCopy(self._step))
            self._step = {}

    def blocks(self, final: np.ndarray, n_prompt: int, canvas: Canvas) -> list[DenoisedBlock]:
        self._end_step()
        blocks, offset = [], n_prompt
        for number, canvases in enumerate(self.canvases):
            tokens = np.stack(canvases)
            length = tokens.shape[1]
            own = final[offset : offset + length]
            if self.mask is None:
                accepted, given = np.stack(self.accepted[number]), np.zeros(length, bool)
                if number == 0 and len(canvas.suffix):
                    given[canvas.gap : canvas.gap + len(canvas.suffix)] = True
            else:
                given = tokens[0] != self.mask
                accepted = np.concatenate([tokens[1:], own[None]]) != self.mask
            steps = [copy.wait() for copy in self.values[number]]
            values = {name: np.concatenate([step[name] for step in steps]) for name in (steps[0] if steps else ())}
            blocks.append(DenoisedBlock(number, offset, tokens, accepted, given, own, values))
            offset += length
        return blocks


@contextmanager
def _before(module: Any, argument: str, look: Callable[[Tensor], None]) -> Iterator[None]:
    """Look at an argument of a module before each of its passes."""
    names = list(inspect.signature(module.forward).parameters)

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(kwargs[argument] if argument in kwargs else args[names.index(argument)])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watched_gemma(model: "LanguageModel", watch: _Watch) -> Iterator[None]:
    hf, encoder = model.hf, model.hf.get_submodule("model.encoder")
    prepare = hf._prepare_sampler

    def prepare_watched(*args: Any, **kwargs: Any) -> Any:
        sampler = prepare(*args, **kwargs)
        accept = sampler.accept_canvas

        def accept_canvas(*args: Any, **kwargs: Any) -> Tensor:
            canvas = accept(*args, **kwargs)
            watch.accept(sampler.accepted_token_mask)
            return canvas

        sampler.accept_canvas = accept_canvas
        return sampler

    def on_encoder(module: Any, args: Any) -> None:
        watch._end_step()
        watch.new_canvas()

    handle = encoder.register_forward_pre_hook(on_encoder)
    hf._prepare_sampler = prepare_watched
    try:
        with _before(hf.get_submodule(model.layout.backbone), "decoder_input_ids", watch.read):
            yield
    finally:
        del hf._prepare_sampler
        handle.remove()


def _gemma_options(settings: DenoisingSettings) -> dict[str, Any]:
    wanted = {"max_new_tokens": settings.max_new_tokens, "max_denoising_steps": settings.max_steps}
    return {name: value for name, value in wanted.items() if value is not None}


def inputs_of(model: "LanguageModel", canvas: Canvas, settings: DenoisingSettings) -> np.ndarray:
    """The tokens that the model's loop is called with, int32 `(n,)`.

    Raises:
        InvalidInputError: there are none, or with those to be generated they are more than the model can fill in.
    """
    configuration = _configuration(model, settings)
    n_new = getattr(configuration, "max_new_tokens", None) or settings.max_new_tokens or 1
    if model.layout.encoder is None:
        masks = np.full(canvas.gap, _mask_token(model), np.int32)
        inputs = np.concatenate([canvas.prefix, masks, canvas.suffix])
        _require_room(model, inputs, n_new)
        return inputs
    length = model.config.canvas_length
    if canvas.gap + len(canvas.suffix) > length:
        raise InvalidInputError(
            f"The gap of {canvas.gap} tokens and the suffix of {len(canvas.suffix)} take more than a canvas of "
            f"{length}; shorten them."
        )
    if not len(canvas.prefix):
        raise InvalidInputError("The prompt is empty, and the tokenizer has no BOS; give some text.")
    _require_room(model, canvas.prefix, length * -(-n_new // length))
    return canvas.prefix


def _require_room(model: "LanguageModel", tokens: np.ndarray, n_new: int) -> None:
    if len(tokens) + n_new > model.max_context_size:
        raise InvalidInputError(
            f"The prompt has {len(tokens):,} tokens, and {n_new:,} are to be generated: {model.name} has room for "
            f"{model.max_context_size:,}. Shorten the prompt, or give fewer new tokens."
        )
    check_windows([tokens], 1, model.max_context_size, model.d_vocab)


def _generate_gemma(model: "LanguageModel", tokens: Tensor, canvas: Canvas, settings: DenoisingSettings) -> Tensor:
    options: dict[str, Any] = {**_gemma_options(settings), "disable_compile": True}
    if len(canvas.suffix):
        first = torch.randint(
            0, model.config.text_config.vocab_size, (1, model.config.canvas_length), device=model.device
        )
        suffix = torch.from_numpy(canvas.suffix.astype(np.int64)).to(model.device)
        first[0, canvas.gap : canvas.gap + len(suffix)] = suffix

        def only_the_suffix(input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] > tokens.shape[1]:  # a later canvas
                return scores
            place = torch.arange(canvas.gap, canvas.gap + len(suffix), device=scores.device)
            scores = scores.clone()
            scores[:, place] = NEVER
            scores[:, place, suffix] = 0.0
            return scores

        from transformers import LogitsProcessorList

        options |= {"decoder_input_ids": first, "logits_processor": LogitsProcessorList([only_the_suffix])}
    return model.hf.generate(tokens, return_dict_in_generate=True, **options).sequences


def _mask_token(model: "LanguageModel") -> int:
    mask = getattr(model.config, "mask_token_id", None)
    mask = model.tokenizer.mask_token_id if mask is None else mask
    if mask is None:
        raise InvalidInputError(f"Neither the configuration nor the tokenizer of {model.name} names a mask token.")
    return int(mask)


def _masked_options(settings: DenoisingSettings) -> dict[str, Any]:
    wanted = {"max_new_tokens": settings.max_new_tokens, "steps": settings.max_steps}
    return {name: value for name, value in wanted.items() if value is not None}


def _generate_masked(model: "LanguageModel", tokens: Tensor, settings: DenoisingSettings) -> Tensor:
    made = model.hf.diffusion_generate(tokens, **_masked_options(settings))
    return made if isinstance(made, Tensor) else made.sequences
