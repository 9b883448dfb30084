"""Features made visible: principal components as colours, t-SNE as a plane (the paper's Figures 1 and 2).

Both are scikit-learn's. What is fitted is fitted over the tokens of all images together, so that a colour or a place
means the same in every image.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.errors import DsuError

__all__ = ["choose_tokens", "mask_of_tokens", "plane", "principal_colours"]

Map = NDArray[np.float32]
"""One image's tokens on their grid, (H, W, C)."""

_SPREAD: Final = (1, 99)
"""Percentiles that become the darkest and brightest of a colour: single odd tokens must not dim all others."""
_PERPLEXITY: Final = 30.0
_COMPONENTS: Final = 50
"""t-SNE is given so many principal components, as its authors advise: noise goes, distances stay."""


def principal_colours(
    maps: Sequence[Map], like: Sequence[NDArray[np.float32]] | None = None
) -> list[NDArray[np.float32]]:
    """The first three principal components of one kind of features as red, green and blue.

    Args:
        maps: An image each, (H, W, C) of one C; fitted over all of them together.
        like: Colours of the same tokens of other features, to compare with: a component's sign is chance, so each is
            turned to where it agrees with these.

    Returns:
        (H, W, 3) in [0, 1] for each.

    Raises:
        DsuError: A value is not finite.
    """
    from sklearn.decomposition import PCA  # type: ignore[import-untyped]

    tokens = _tokens(maps)
    count = min(3, *tokens.shape)
    # An exact solver, whose signs scikit-learn fixes: the same tokens have the same colours every time.
    with np.errstate(invalid="ignore"):  # of shares of a variance of zero, which no one asks for
        found = PCA(count, svd_solver="covariance_eigh").fit_transform(tokens)
    low, high = np.percentile(found, _SPREAD, axis=0)
    colours = np.full((len(tokens), 3), 0.5, np.float32)
    colours[:, :count] = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    if like is not None:
        others = np.concatenate([one.reshape(-1, 3) for one in like])
        against = ((colours - colours.mean(axis=0)) * (others - others.mean(axis=0))).sum(axis=0) < 0
        colours = np.where(against, 1 - colours, colours)
    ends = np.cumsum([one.shape[0] * one.shape[1] for one in maps])[:-1]
    return [part.reshape(*one.shape[:2], 3) for part, one in zip(np.split(colours, ends), maps, strict=True)]


def choose_tokens(on_object: NDArray[np.bool_], most: int, seed: int) -> NDArray[np.intp]:
    """Draw tokens for t-SNE: small objects would be lost among the rest, so up to half are of objects, if they have it.

    Args:
        on_object: Which of all maps' tokens, one map after another, lie on an object, (N,).
        most: How many to draw.
        seed: Of the draw.

    Returns:
        Numbers of tokens, (`most`,) or fewer, those of objects last: drawn last, they lie on top.
    """
    order = np.random.default_rng(seed).permutation(len(on_object))
    objects, others = order[on_object[order]], order[~on_object[order]]
    kept = min(len(objects), max(most // 2, most - len(others)))
    return np.concatenate([others[: most - kept], objects[:kept]])


def plane(maps: Sequence[Map], chosen: NDArray[np.intp], seed: int) -> NDArray[np.float32]:
    """t-SNE: places in the plane at which tokens that are near in the features are near.

    Args:
        maps: As in `principal_colours`.
        chosen: Numbers of the tokens to place, (N,), four at least; see `choose_tokens`.
        seed: Of t-SNE.

    Returns:
        (N, 2), in `chosen`'s order. Axes and scale mean nothing.

    Raises:
        DsuError: A value is not finite.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE  # type: ignore[import-untyped]
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    tokens = _tokens(maps)[chosen]
    count = min(_COMPONENTS, *tokens.shape)
    reduced = PCA(count, svd_solver="covariance_eigh").fit_transform(tokens)
    perplexity = min(_PERPLEXITY, (len(tokens) - 1) / 3)
    # Of several threads, which adds up first is chance, and t-SNE is chaotic: the picture would differ every time.
    with threadpool_limits(1):
        placed = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
    return np.asarray(placed, np.float32)


def mask_of_tokens(mask: NDArray[np.uint8], one: Map) -> NDArray[np.bool_]:
    """Which tokens of a map (H, W, C) lie on the object of a mask (any size, uint8 0..255): (H, W).

    A quarter of a token is enough: small defects cover no token of the deep levels by half.
    """
    height, width = one.shape[:2]
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BOX)) >= 64


def _tokens(maps: Sequence[Map]) -> NDArray[np.float64]:
    """(N, C), all maps one after another."""
    tokens = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps]).astype(np.float64)
    if not np.isfinite(tokens).all():
        raise DsuError("The features are not finite and can't be drawn: try --precision fp32.")
    return tokens
