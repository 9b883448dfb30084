"""A synthetic data set for the demo: salient and camouflaged objects on textured backgrounds.

It needs only a seed, so you can try both stages without downloading photographs. About three fifths of the images are
salient (the object has its own colours and texture), the others camouflaged (the object has the background's texture,
rotated, scaled or slightly shifted in tone).

Shapes below: H, W is an image's size in pixels, fields are (H, W) floats, colour images (H, W, 3) floats, all about
0..1.
"""

from dataclasses import dataclass, replace
from math import pi, tau
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from dsu.progress import SILENT, Progress

Field = NDArray[np.floating[Any]]

_SALIENT_SHARE: Final = 0.6
_FAMILIES: Final = ("clouds", "stripes", "checks", "spots")


def draw_dataset(
    folder: Path,
    train: int = 200,
    test: int = 50,
    sizes: tuple[int, int] = (160, 320),
    seed: int = 0,
    progress: Progress = SILENT,
) -> None:
    """Generate a data set in folder/train and folder/test, each with images/*.jpg and masks/*.png of the same names.

    The same arguments give the same pixels; a split's first images do not depend on how many follow.

    Args:
        folder: Output folder; created if missing.
        train: Number of training pairs.
        test: Number of test pairs.
        sizes: Minimum and maximum width and height, in pixels; images are rarely square.
        seed: Seed of all random draws.
        progress: Receives progress.
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
    """Generate one image (H, W, 3) uint8 and its mask (H, W) uint8, 0..255 with soft edges."""
    height, width = (int(side) for side in rng.integers(sizes[0], sizes[1] + 1, 2))
    shape = (height, width)
    salient = rng.random() < _SALIENT_SHARE
    ground = _random_texture(rng)
    material = _contrasting_texture(ground, rng) if salient else _camouflaged_texture(ground, rng)
    picture = _paint(ground, shape, rng)
    mask = np.zeros(shape, np.float32)
    for place in range(int(rng.choice((1, 1, 1, 2, 3)))):
        outline = _outline(shape, rng, share=rng.uniform(0.16, 0.38) / (1 + 0.5 * place))
        picture = picture + (_paint(material, shape, rng) - picture) * outline[..., None]
        mask = np.maximum(mask, outline)
    return _to_bytes(_add_light_and_noise(picture, rng)), _to_bytes(mask)


# ---- textures ----


@dataclass(frozen=True)
class _Texture:
    """A pattern between colours. Scale is in pixels, angle in radians, colours (K, 3) in 0..1, dark to light."""

    family: str
    scale: float
    angle: float
    warp: float
    colours: Field


def _random_texture(rng: Generator) -> _Texture:
    """Three related colours: one drifting hue from dark to light, as on natural surfaces."""
    family, scale = rng.choice(_FAMILIES), rng.uniform(6, 28)
    angle, warp = rng.uniform(0, pi), rng.uniform(0, 1.2)
    steps = np.linspace(-1, 1, 3)[:, None]
    hues = rng.uniform(0, tau) + rng.uniform(-0.7, 0.7) * steps + np.array([0, tau / 3, 2 * tau / 3])
    lightness = rng.uniform(0.3, 0.7) + rng.uniform(0.1, 0.25) * steps
    colours = np.clip(lightness + rng.uniform(0.02, 0.22) * np.cos(hues), 0.02, 0.98)
    return _Texture(family, scale, angle, warp, colours)


def _contrasting_texture(ground: _Texture, rng: Generator) -> _Texture:
    """A texture whose mean colour is far from the background's."""
    return max(
        (_random_texture(rng) for _ in range(6)),
        key=lambda texture: float(np.abs(texture.colours.mean(0) - ground.colours.mean(0)).sum()),
    )


def _camouflaged_texture(ground: _Texture, rng: Generator) -> _Texture:
    """The background's texture, rotated, scaled and shifted in tone just enough to be visible."""
    # Rotation and scaling are hardly visible in patterns without direction.
    least = 0.03 if ground.family in ("stripes", "checks") else 0.07
    tone = rng.choice((-1, 1)) * rng.uniform(least, least + 0.06) + rng.uniform(-0.03, 0.03, 3)
    return replace(
        ground,
        scale=ground.scale * float(rng.choice((0.6, 0.7, 1.4, 1.6))),
        angle=ground.angle + rng.uniform(0.25, 0.75) * pi,
        colours=np.clip(ground.colours + tone, 0, 1),
    )


def _paint(texture: _Texture, shape: tuple[int, int], rng: Generator) -> Field:
    """Draw a texture with a random phase: (H, W, 3)."""
    pattern = np.clip(_pattern(texture, shape, rng), 0, 1)
    steps = np.linspace(0, 1, len(texture.colours))
    channels = [np.interp(pattern, steps, texture.colours[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _pattern(texture: _Texture, shape: tuple[int, int], rng: Generator) -> Field:
    """Values of about 0..1."""
    if texture.family == "clouds":
        octaves = [_noise(shape, 4 * texture.scale / 2**octave, rng) / 2**octave for octave in range(4)]
        return np.asarray(1.6 * (np.sum(octaves, axis=0) / 1.875 - 0.5) + 0.5)
    if texture.family == "spots":
        return np.asarray(0.5 + 0.4 * np.tanh(9 * (_noise(shape, texture.scale, rng) - 0.55)))
    y, x = _grid(shape)
    # Along and across the texture's direction, bent by noise.
    bend = 3 * texture.warp * texture.scale * (_noise(shape, 4 * texture.scale, rng) - 0.5)
    along = x * np.cos(texture.angle) + y * np.sin(texture.angle) + bend
    across = y * np.cos(texture.angle) - x * np.sin(texture.angle) + bend
    frequency, phase = tau / (1.5 * texture.scale), rng.uniform(0, tau)
    waves = np.sin(frequency * along + phase)
    if texture.family == "checks":
        waves = np.tanh(4 * waves * np.sin(frequency * across + phase))
    return np.asarray(0.5 + 0.4 * waves + 0.25 * (_noise(shape, 3, rng) - 0.5))


def _noise(shape: tuple[int, int], scale: float, rng: Generator) -> Field:
    """Smooth noise in 0..1: random values every `scale` pixels, bicubic between."""
    height, width = (int(side / max(scale, 1.0)) + 3 for side in shape)
    values = Image.fromarray(rng.random((height, width), np.float32))
    return np.asarray(values.resize(shape[::-1], Image.Resampling.BICUBIC))


def _grid(shape: tuple[int, int]) -> tuple[Field, Field]:
    """Pixel coordinates y, x from the image's middle."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return y - shape[0] / 2, x - shape[1] / 2


# ---- objects, and the whole image ----


def _outline(shape: tuple[int, int], rng: Generator, share: float) -> Field:
    """Draw an object's silhouette, 0..1 with soft edges; `share` is its radius in image sides.

    It is an ellipse, an ellipse with a radius that varies with direction, or one eroded by noise.
    """
    radius = share * min(shape)
    y, x = (values - rng.uniform(-0.25, 0.25) * side for values, side in zip(_grid(shape), shape, strict=True))
    angle, stretch = rng.uniform(0, pi), rng.uniform(0.55, 1)
    along, across = x * np.cos(angle) + y * np.sin(angle), (y * np.cos(angle) - x * np.sin(angle)) / stretch
    distance, direction = np.hypot(along, across), np.arctan2(across, along)
    swing = rng.choice((0.0, 1.0, 1.0))
    waves = sum(rng.uniform(0, 0.35 / order) * np.cos(order * direction + rng.uniform(0, tau)) for order in range(2, 7))
    gnawed = rng.choice((0.0, 0.0, 0.7)) * radius * (_noise(shape, radius / 2.5, rng) - 0.5)
    inside = radius * (1 + swing * waves) + gnawed - distance
    steepness = np.hypot(*np.gradient(inside))
    return np.asarray(np.clip(inside / np.maximum(steepness, 0.5) + 0.5, 0, 1), np.float32)


def _add_light_and_noise(picture: Field, rng: Generator) -> Field:
    """Light the image from one side, tint it, and add sensor noise."""
    y, x = _grid((picture.shape[0], picture.shape[1]))
    angle, strength = rng.uniform(0, tau), rng.uniform(0, 0.5)
    light = 1 + strength * (x * np.cos(angle) + y * np.sin(angle)) / max(picture.shape)
    noise = rng.uniform(0.005, 0.025) * rng.standard_normal(picture.shape, np.float32)
    return np.asarray(picture * light[..., None] * (1 + rng.uniform(-0.08, 0.08, 3)) + noise)


def _to_bytes(values: Field) -> NDArray[np.uint8]:
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
