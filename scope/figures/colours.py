"""Perceptually even colour mixing, in OKLab (Björn Ottosson, "A perceptual color space for image processing", 2020).

Hex strings in, hex strings out; no dependencies.
"""

__all__ = ["contrast", "mix", "ramp"]

_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
_FROM_LAB = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
_FROM_LMS = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)

Triple = tuple[float, float, float]


def _times(matrix: tuple[Triple, ...], vector: Triple) -> Triple:
    first, second, third = (sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)
    return first, second, third


def _linear(colour: str) -> Triple:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return red, green, blue


def _hex(linear: Triple) -> str:
    def channel(value: float) -> int:
        value = min(1.0, max(0.0, value))
        encoded = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
        return round(encoded * 255)

    return "#" + "".join(f"{channel(value):02x}" for value in linear)


def _lab(colour: str) -> Triple:
    long, medium, short = _times(_TO_LMS, _linear(colour))
    return _times(_TO_LAB, (long ** (1 / 3), medium ** (1 / 3), short ** (1 / 3)))


def mix(low: str, high: str, share: float) -> str:
    """The colour `share` of the way from `low` to `high` (both `#rrggbb`), along a straight line in OKLab."""
    share = min(1.0, max(0.0, share))
    first, second = _lab(low), _lab(high)
    lightness, a, b = (x + (y - x) * share for x, y in zip(first, second, strict=True))
    long, medium, short = _times(_FROM_LAB, (lightness, a, b))
    return _hex(_times(_FROM_LMS, (long**3, medium**3, short**3)))


def ramp(*stops: str, n: int = 9) -> list[tuple[float, str]]:
    """A Plotly colour scale of `n` points through evenly spaced stops."""
    scale = []
    for index in range(n):
        place = index / (n - 1) * (len(stops) - 1)
        left = min(int(place), len(stops) - 2)
        scale.append((index / (n - 1), mix(stops[left], stops[left + 1], place - left)))
    return scale


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.1 between two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        red, green, blue = _linear(colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)
