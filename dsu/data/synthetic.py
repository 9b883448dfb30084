"""A drawn data set for the demo: objects that stand out and objects that hide, on textured grounds.

It needs nothing but a seed, so stage one and stage two can be tried without downloading a photograph. About three
fifths of the images are salient (the object has colours and a texture of its own), the others camouflaged (the
object is made of the ground's own texture, turned, scaled or slightly shifted in tone).

Shapes below: H, W is an image's size in pixels, fields are (H, W) floats, pictures (H, W, 3) floats, all about 0..1.
"""

from dataclasses import dataclass, replace
from math import pi, tau
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from dsu.progress import SILENT, Progress

__all__ = ["draw_dataset", "draw_sample"]

Field = NDArray[np.floating[Any]]
Family = Literal["clouds", "stripes", "checks", "spots", "grain", "slope"]

_SALIENT_SHARE: Final = 0.6
# Masks of drawn outlines are drawn this much larger and averaged, for soft edges.
_OVERSAMPLING: Final = 4


def draw_dataset(
    folder: Path,
    train: int = 200,
    test: int = 50,
    sizes: tuple[int, int] = (160, 320),
    seed: int = 0,
    progress: Progress = SILENT,
) -> None:
    """Draw a data set into folder/train and folder/test, each with images/*.jpg and masks/*.png of equal names.

    The same arguments draw the same pixels; a split's first images do not depend on how many follow.

    Args:
        folder: Where to; made if absent.
        train: How many pairs to train on.
        test: How many pairs to test on.
        sizes: Least and greatest width and height, in pixels; images are rarely square.
        seed: Of everything random.
        progress: Who is told.
    """
    with progress.task("drawing", train + test) as task:
        for part, (name, count) in enumerate((("train", train), ("test", test))):
            images, masks = folder / name / "images", folder / name / "masks"
            images.mkdir(parents=True, exist_ok=True)
            masks.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                image, mask = draw_sample(np.random.default_rng((seed, part, index)), sizes)
                Image.fromarray(image).save(images / f"{index:04}.jpg", quality=92)
                Image.fromarray(mask).save(masks / f"{index:04}.png")
                task.advance()


def draw_sample(rng: Generator, sizes: tuple[int, int] = (160, 320)) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one image (H, W, 3) uint8 and its mask (H, W) uint8, 0..255 with soft edges."""
    height, width = (int(side) for side in rng.integers(sizes[0], sizes[1] + 1, 2))
    shape = (height, width)
    salient = rng.random() < _SALIENT_SHARE
    ground = _random_texture(rng)
    picture = _clutter(_paint(ground, shape, rng), ground, rng)
    material = _other_texture(ground, rng) if salient else _disguised(ground, rng)
    mask = np.zeros(shape, np.float32)
    for place in range(int(rng.choice((1, 1, 1, 2, 3)))):
        outline = _outline(shape, rng, share=rng.uniform(0.16, 0.38) / (1 + 0.5 * place))
        if salient and rng.random() < 0.5:
            picture = picture * (1 - 0.5 * _shadow(outline, rng))[..., None]
        surface = _paint(material, shape, rng)
        if salient:
            surface = surface * _relief(outline)[..., None]
        picture = picture + (surface - picture) * outline[..., None]
        mask = np.maximum(mask, outline)
    finished = _photographed(picture, rng)
    return _to_bytes(finished), _to_bytes(mask)


# ---- textures ----


@dataclass(frozen=True)
class _Texture:
    """A pattern between colours. Scale is in pixels, angle in radians, colours (K, 3) in 0..1, dark to light."""

    family: Family
    scale: float
    angle: float
    warp: float
    colours: Field


def _random_texture(rng: Generator) -> _Texture:
    family: Family = rng.choice(get_args(Family))
    return _Texture(family, rng.uniform(6, 28), rng.uniform(0, pi), rng.uniform(0, 1.2), _random_colours(rng))


def _random_colours(rng: Generator) -> Field:
    """Three related colours: one hue that drifts, darker to lighter, as natural surfaces have."""
    hue, drift = rng.uniform(0, tau), rng.uniform(-0.7, 0.7)
    saturation = rng.uniform(0.02, 0.22)
    middle, spread = rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.25)
    hues = hue + drift * np.linspace(-1, 1, 3)[:, None] + np.array([0, tau / 3, 2 * tau / 3])
    lightness = middle + spread * np.linspace(-1, 1, 3)[:, None]
    colours: Field = np.clip(lightness + saturation * np.cos(hues), 0.02, 0.98).astype(np.float32)
    return colours


def _other_texture(ground: _Texture, rng: Generator) -> _Texture:
    """A texture whose mean colour is far from the ground's."""
    return max(
        (_random_texture(rng) for _ in range(6)),
        key=lambda texture: float(np.abs(texture.colours.mean(0) - ground.colours.mean(0)).sum()),
    )


def _disguised(ground: _Texture, rng: Generator) -> _Texture:
    """The ground's own texture, turned, scaled and shifted in tone just enough to be seen."""
    # Turning and scaling hardly show in patterns without direction.
    least = 0.03 if ground.family in ("stripes", "checks") else 0.07
    tone = rng.choice((-1, 1)) * rng.uniform(least, least + 0.06) + rng.uniform(-0.03, 0.03, 3)
    return replace(
        ground,
        scale=ground.scale * float(rng.choice((0.6, 0.7, 1.4, 1.6))),
        angle=ground.angle + rng.uniform(0.25, 0.75) * pi,
        colours=np.clip(ground.colours + tone, 0, 1).astype(np.float32),
    )


def _paint(texture: _Texture, shape: tuple[int, int], rng: Generator) -> Field:
    """Draw a texture with a phase of its own: (H, W, 3)."""
    pattern = np.clip(_pattern(texture, shape, rng), 0, 1)
    steps = np.linspace(0, 1, len(texture.colours))
    channels = [np.interp(pattern, steps, texture.colours[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _pattern(texture: _Texture, shape: tuple[int, int], rng: Generator) -> Field:
    """Values of about 0..1."""
    y, x = _grid(shape)
    along = x * np.cos(texture.angle) + y * np.sin(texture.angle)
    across = y * np.cos(texture.angle) - x * np.sin(texture.angle)
    bend = texture.warp * texture.scale * (_noise(shape, 4 * texture.scale, rng) - 0.5)
    frequency, phase = tau / (1.5 * texture.scale), rng.uniform(0, tau)
    rough = 0.25 * (_noise(shape, 3, rng) - 0.5)
    pattern: Field
    match texture.family:
        case "stripes":
            pattern = 0.5 + 0.4 * np.sin(frequency * (along + 3 * bend) + phase) + rough
        case "checks":
            waves = np.sin(frequency * (along + bend) + phase) * np.sin(frequency * (across + bend) + phase)
            pattern = 0.5 + 0.4 * np.tanh(4 * waves) + rough
        case "spots":
            pattern = 0.5 + 0.4 * np.tanh(9 * (_noise(shape, texture.scale, rng) - 0.55)) + rough
        case "grain":
            pattern = 0.6 * _noise(shape, texture.scale / 4, rng) + 0.4 * _noise(shape, 3 * texture.scale, rng)
        case "slope":
            pattern = 0.5 + 0.8 * along / max(shape) * np.cos(phase) + 0.3 * (_noise(shape, texture.scale, rng) - 0.5)
        case "clouds":
            octaves = [_noise(shape, 4 * texture.scale / 2**octave, rng) / 2**octave for octave in range(4)]
            pattern = 1.6 * (sum(octaves[1:], octaves[0]) / 1.875 - 0.5) + 0.5
    return pattern


def _noise(shape: tuple[int, int], scale: float, rng: Generator) -> Field:
    """Smooth noise in 0..1: random values every `scale` pixels, bicubic between."""
    height, width = (int(side / max(scale, 1.0)) + 3 for side in shape)
    values = Image.fromarray(rng.random((height, width), np.float32))
    return np.asarray(values.resize(shape[::-1], Image.Resampling.BICUBIC))


def _grid(shape: tuple[int, int]) -> tuple[Field, Field]:
    """Pixel coordinates y, x from the image's middle."""
    height, width = shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return y - height / 2, x - width / 2


# ---- objects ----


def _outline(shape: tuple[int, int], rng: Generator, share: float) -> Field:
    """Draw an object's silhouette, 0..1 with soft edges; `share` is its radius in image sides."""
    radius = share * min(shape)
    middle = [rng.uniform(0.25, 0.75) * side for side in shape]
    if rng.random() < 0.3:
        return _polygon(shape, middle, radius, rng)
    y, x = _grid(shape)
    y, x = y + shape[0] / 2 - middle[0], x + shape[1] / 2 - middle[1]
    angle, stretch = rng.uniform(0, pi), rng.uniform(0.55, 1)
    along, across = x * np.cos(angle) + y * np.sin(angle), (y * np.cos(angle) - x * np.sin(angle)) / stretch
    distance, direction = np.hypot(along, across), np.arctan2(across, along)
    # An ellipse, or one whose radius swings with the direction, or one that noise gnaws at.
    swing = rng.choice((0.0, 1.0, 1.0))
    waves = sum(rng.uniform(0, 0.35 / order) * np.cos(order * direction + rng.uniform(0, tau)) for order in range(2, 7))
    gnawed = rng.choice((0.0, 0.0, 0.7)) * radius * (_noise(shape, radius / 2.5, rng) - 0.5)
    inside = radius * (1 + swing * waves) + gnawed - distance
    steepness = np.hypot(*np.gradient(inside))
    outline: Field = np.clip(inside / np.maximum(steepness, 0.5) + 0.5, 0, 1).astype(np.float32)
    return outline


def _polygon(shape: tuple[int, int], middle: list[float], radius: float, rng: Generator) -> Field:
    corners = int(rng.integers(3, 9))
    directions = np.sort(tau * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners) + rng.uniform(0, tau)
    radii = radius * rng.uniform(0.65, 1.2, corners)
    points = np.stack([middle[1] + radii * np.cos(directions), middle[0] + radii * np.sin(directions)], axis=-1)
    large = Image.new("L", (shape[1] * _OVERSAMPLING, shape[0] * _OVERSAMPLING))
    ImageDraw.Draw(large).polygon([tuple(point) for point in points * _OVERSAMPLING], fill=255)
    return _from_bytes(large.resize(shape[::-1], Image.Resampling.BOX))


def _blurred(field: Field, radius: float) -> Field:
    image = Image.fromarray(_to_bytes(field)).filter(ImageFilter.BoxBlur(radius))
    return _from_bytes(image.filter(ImageFilter.BoxBlur(radius)))


def _shadow(outline: Field, rng: Generator) -> Field:
    down, right = (int(shift) for shift in rng.integers(3, 12, 2))
    moved = np.zeros_like(outline)
    moved[down:, right:] = outline[:-down, :-right]
    return _blurred(moved, 5)


def _relief(outline: Field) -> Field:
    """Shade an object as if it were round: darker towards its edge."""
    return 0.75 + 0.3 * _blurred(outline, 0.06 * min(outline.shape))


# ---- the rest of the picture ----


def _clutter(picture: Field, ground: _Texture, rng: Generator) -> Field:
    """Strew small shapes and lines in the ground's colours, which are no objects."""
    canvas = Image.fromarray(_to_bytes(picture))
    pen = ImageDraw.Draw(canvas)
    width, height = canvas.size
    for _ in range(int(rng.integers(0, 18))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        colour = tuple(_to_bytes(rng.choice(ground.colours) + rng.uniform(-0.15, 0.15, 3)).tolist())
        if rng.random() < 0.5:
            length, angle = rng.uniform(15, 60), rng.uniform(0, tau)
            end = (x + length * np.cos(angle), y + length * np.sin(angle))
            pen.line(((x, y), end), fill=colour, width=int(rng.integers(1, 4)))
        else:
            rx, ry = rng.uniform(2, 7, 2)
            pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)
    return _from_bytes(canvas.filter(ImageFilter.GaussianBlur(0.6)))


def _photographed(picture: Field, rng: Generator) -> Field:
    """Light it from a side, darken its corners, tint it, and add a sensor's noise."""
    y, x = _grid(picture.shape[:2])
    angle, strength = rng.uniform(0, tau), rng.uniform(0, 0.5)
    side = (x * np.cos(angle) + y * np.sin(angle)) / max(picture.shape)
    vignette = rng.uniform(0, 0.35) * (x**2 + y**2) / (np.square(picture.shape[:2]).sum() / 4)
    light = 1 + strength * side - vignette
    cast = 1 + rng.uniform(-0.08, 0.08, 3)
    noise = rng.uniform(0.005, 0.025) * rng.standard_normal(picture.shape, np.float32)
    return np.asarray(picture * light[..., None] * cast + noise)


def _to_bytes(values: Field) -> NDArray[np.uint8]:
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def _from_bytes(image: Image.Image) -> Field:
    return np.asarray(image, np.float32) / np.float32(255)
