"""Pictures for people: training curves, masks laid over images, cut-outs (sheets of many: `dsu.sheets`).

Everything is drawn off screen, so it works on a machine without a display.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dsu.data.images import read_image, read_mask
from dsu.errors import DsuError, UsageError
from dsu.files import atomic_write, make_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CELL_GROUND", "Picture", "as_rgb", "cutout", "overlay", "training_curves"]

Picture = Image.Image | NDArray[Any] | Path
"""An image: Pillow's, a file, or an array (H, W) or (H, W, 3) of uint8 0..255, floats 0..1 or booleans."""

# Pink is rare in photographs, and dark and light grounds both show it.
_MASK_COLOUR: Final = (255, 32, 140)
_MASK_OPACITY: Final = 0.45

CELL_GROUND: Final = (228, 230, 233)
"""What shows where a picture is transparent or does not fill its cell."""


def overlay(image: Picture, mask: Picture) -> Image.Image:
    """Lay a mask over its image: tinted as strongly as the mask is sure, outlined where it passes half.

    Args:
        image: (H, W, 3) or (H, W).
        mask: (H, W) of the image's own size.

    Returns:
        An RGB image (H, W).

    Raises:
        DsuError: The sizes differ.
    """
    ground, grey = _of_one_size(image, mask)
    colour = Image.new("RGB", ground.size, _MASK_COLOUR)
    tinted = Image.composite(colour, ground, grey.point(lambda value: round(value * _MASK_OPACITY)))
    # A blurred silhouette lies strictly between black and white only along its edge. (A maximum filter would
    # do as well, and takes minutes on photographs of 50 megapixels.)
    line = max(1.0, min(ground.size) / 400)
    silhouette = grey.point(lambda value: 255 if value > 127 else 0)
    edge = silhouette.filter(ImageFilter.BoxBlur(line)).point(lambda value: 255 if 0 < value < 255 else 0)
    return Image.composite(colour, tinted, edge)


def cutout(image: Picture, mask: Picture) -> Image.Image:
    """Cut the object out: the image as RGBA (H, W) with the mask, (H, W) of the same size, as its opacity.

    Raises:
        DsuError: The sizes differ.
    """
    ground, grey = _of_one_size(image, mask)
    ground.putalpha(grey)
    return ground


def training_curves(history: Path | Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a run's history as a PNG: losses, validation figures where there are any, learning rate.

    Args:
        history: A CSV file, or its rows: epoch, lr, loss, loss_D1, loss_D2, loss_D3, and val_loss, val_S,
            val_MAE, val_IoU. A column may be absent, and an entry empty, where nothing was measured.
        path: The file to write; its folder is made.

    Raises:
        UsageError: The file is absent, or there is no epoch in the history.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = _history(history)
    validated = any(_series(rows, key)[0] for key in ("val_S", "val_IoU", "val_MAE"))
    shares = [3.0, 2.0, 0.9] if validated else [3.0, 0.9]
    figure = Figure(figsize=(7.5, 1.2 * sum(shares)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shares), 1, sharex=True, squeeze=False, height_ratios=shares)[:, 0]
    _draw_losses(panels[0], rows)
    if validated:
        _draw_validation(panels[1], rows)
    _draw(panels[-1], rows, {"lr": ("", "#5f6368", "-")})
    panels[-1].set(ylabel="learning rate", xlabel="epoch")
    _from_zero(panels[-1])
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    figure.align_ylabels(panels)
    make_folder(path.parent)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    atomic_write(path, drawn.getvalue())


# D1 is the deepest side output, D3 the finest: the one that becomes the prediction.
_LOSSES: Final = {
    "loss": ("total", "#202124", "-"),
    "loss_D1": ("D1, deepest", "#9ecae1", "-"),
    "loss_D2": ("D2", "#4292c6", "-"),
    "loss_D3": ("D3, finest", "#08519c", "-"),
    "val_loss": ("validation, total", "#d6336c", "--"),
}
_VALIDATION: Final = {
    "val_S": ("S", "#2b8a3e", "-"),
    "val_IoU": ("IoU", "#94c973", "-"),
    "val_MAE": ("MAE", "#e8590c", "-"),
}


def _draw_losses(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    lines = _draw(axes, rows, _LOSSES)
    axes.set(ylabel="loss")
    _from_zero(axes)
    _legend_above(axes, lines)


def _draw_validation(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    """All on the whole scale of 0 to 1: on one that fits the curve, a change of 1 % would look like a plunge."""
    lines = _draw(axes, rows, _VALIDATION)
    axes.set(ylabel="validation", ylim=(0, 1))
    _legend_above(axes, lines)


def _from_zero(axes: "Axes") -> None:
    """Start the scale at 0, with room above the highest point."""
    if axes.has_data():
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)


def _legend_above(axes: "Axes", lines: Sequence[Any]) -> None:
    """Name the lines above their panel, where they cover no curve."""
    axes.legend(handles=lines, ncols=len(lines), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _draw(axes: "Axes", rows: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str, str]]) -> list[Any]:
    """Draw the columns that `styles` names (label, colour, line) and return the lines."""
    axes.grid(visible=True, color="#e8eaed", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    lines = []
    for key, (label, colour, style) in styles.items():
        epochs, values = _series(rows, key)
        # A line alone would hide how few points it joins, and a single one altogether.
        marker = "o" if len(epochs) <= 20 else ""
        if epochs:
            lines += axes.plot(
                epochs, values, style, label=label, color=colour, marker=marker, markersize=3, linewidth=1.6
            )
    return lines


def _history(history: Path | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]]
    if isinstance(history, Path):
        if not history.is_file():
            raise UsageError(f"{history} is not a file: name a run's history (CSV).")
        with history.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = history
    if not _series(rows, "loss")[0]:
        raise UsageError("the history has no epoch with a loss: train for one epoch at least before drawing it.")
    return rows


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """One column's epochs and values, where it has any."""
    filled = [(float(row["epoch"]), float(row[key])) for row in rows if row.get(key) not in (None, "")]
    measured = [point for point in filled if isfinite(point[1])]
    return [epoch for epoch, _ in measured], [value for _, value in measured]


def _of_one_size(image: Picture, mask: Picture) -> tuple[Image.Image, Image.Image]:
    ground = as_rgb(image)
    grey = Image.fromarray(read_mask(mask)) if isinstance(mask, Path) else _pillow(mask).convert("L")
    if ground.size != grey.size:
        raise DsuError(
            f"an image of {ground.width}x{ground.height} pixels has no use for a mask of "
            f"{grey.width}x{grey.height}: resize one to the other's size."
        )
    return ground, grey


def as_rgb(picture: Picture) -> Image.Image:
    """A new RGB image (H, W), the caller's own left as it is; what is transparent shows `CELL_GROUND`.

    Raises:
        UnreadableImage: A file that cannot be read or decoded.
    """
    if isinstance(picture, Path):
        return read_image(picture)
    image = _pillow(picture)
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, CELL_GROUND), image).convert("RGB")


def _pillow(picture: Image.Image | NDArray[Any]) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if picture.dtype == np.uint8:
        return Image.fromarray(picture)
    levels: NDArray[np.float64] = np.clip(picture.astype(np.float64), 0, 1) * 255
    return Image.fromarray(levels.round().astype(np.uint8))
