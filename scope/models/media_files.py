"""Files of images and sounds as models take them: RGB pixels, and samples of one channel at the model's own rate.

Sounds are PCM WAV files of 8, 16, 24 or 32 bits. Another rate becomes the model's by the discrete Fourier transform:
what lies above half of either rate is dropped, and the rest stays as it is.
"""

import io
import wave
from typing import Any

import numpy as np

from scope.errors import InvalidInputError

__all__ = ["image_from", "samples_from"]


def image_from(content: bytes, name: str) -> Any:
    """A PIL image, RGB, turned as its EXIF says.

    Raises:
        InvalidInputError: the content is no image, or not all of one.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInputError(f"the image {name} cannot be read: {error}") from error


def samples_from(content: bytes, name: str, rate: int) -> np.ndarray:
    """The samples of a sound, float32 in [-1, 1], the mean over its channels.

    Args:
        content: a PCM WAV file.
        name: for messages.
        rate: samples a second that are wanted.

    Raises:
        InvalidInputError: the content is no such file.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            own_rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (wave.Error, EOFError) as error:
        raise InvalidInputError(f"the sound {name} cannot be read: {error}. Sounds are PCM WAV files.") from error
    frames = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, channels, width)
    if width == 1:  # the only one without a sign
        values = frames[..., 0].astype(np.float64) - 128
    else:
        padded = np.zeros((*frames.shape[:2], 4), np.uint8)
        padded[..., 4 - width :] = frames
        values = padded.view("<i4")[..., 0] / 2.0 ** (8 * (4 - width))
    samples: np.ndarray = values.mean(axis=1) / 2.0 ** (8 * width - 1)
    return _resampled(samples, own_rate, rate).astype(np.float32)


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted or not len(samples):
        return samples
    n = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples)[: n // 2 + 1]
    return np.fft.irfft(spectrum, n) * (n / len(samples))
