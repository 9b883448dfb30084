"""Evaluations of synthetic predictions, for tests of reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from dsu.evaluation.evaluate import Evaluation, PredictionPair, evaluate

__all__ = ["ODD_NAMES", "draw_cases", "draw_evaluation"]

ODD_NAMES: Final = (
    "<script>alert(1)",
    "</script><img src=x onerror=alert(2)>".replace("/", "∕"),
    "<!--",
    "\"quoted\" & 'so'",
    "$title ${style}",
    "日本 ü 100%25#?",
)
"""Possible names of images that contain special characters of HTML, scripts, templates or URLs."""


def draw_cases(
    folder: Path, names: Sequence[str], *, size: tuple[int, int] = (40, 30), seed: int = 0
) -> list[PredictionPair]:
    """Images of `size` (width, height), masks with a box, and maps with the box moved and noise."""
    rng = np.random.default_rng(seed)
    width, height = size
    for part in ("images", "masks", "maps"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    cases = []
    for name in names:
        truth = np.zeros((height, width), np.uint8)
        top, left = rng.integers(1, height // 3), rng.integers(1, width // 3)
        truth[top : top + height // 2, left : left + width // 2] = 255
        shift = int(rng.integers(0, max(2, width // 6)))
        noisy = np.clip(0.7 * np.roll(truth, shift, axis=1) + 60 * rng.random(truth.shape), 0, 255)
        image = rng.integers(0, 120, (height, width, 3)) + (truth[..., None] // 2)
        paths = {part: folder / part / f"{name}.png" for part in ("images", "masks", "maps")}
        for part, pixels in (("images", image), ("masks", truth), ("maps", noisy)):
            Image.fromarray(pixels.astype(np.uint8)).save(paths[part])
        cases.append(PredictionPair(name, paths["maps"], paths["masks"], paths["images"]))
    return cases


def draw_evaluation(
    folder: Path, names: Sequence[str], *, size: tuple[int, int] = (40, 30), seed: int = 0
) -> Evaluation:
    """The evaluation of `draw_cases`, in this process."""
    return evaluate(draw_cases(folder, names, size=size, seed=seed), workers=1)
