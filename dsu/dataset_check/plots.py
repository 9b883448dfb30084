"""A check's histograms: share of foreground, mask values, sizes."""

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dsu.data.images import FEW_VALUES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dsu.dataset_check import DatasetCheck

__all__ = ["draw_shares", "draw_sizes", "draw_values"]

_COLOURS: Final = ("#08519c", "#e8590c", "#2b8a3e", "#9c36b5", "#5f6368")
_FAINT: Final = "#5f6368"
_LEAST: Final = 1e-4
"""Share of foreground from which the scale begins; what has less stands at its beginning."""


def draw_shares(axes: "Axes", found: "DatasetCheck") -> None:
    """How many masks have how much foreground, on a logarithmic scale; those without any are left out."""
    from matplotlib.ticker import MaxNLocator

    _dress(axes, "foreground of a mask, % of its pixels", "masks")
    bins = (np.logspace(np.log10(_LEAST), 0, 25) * 100).tolist()
    for check, colour in zip(found.splits, _cycle(found), strict=True):
        shares = [100 * max(one.foreground.share, _LEAST) for one in check.masked if one.foreground.share > 0]
        axes.hist(shares, bins=bins, label=check.name, **_bars(colour))
    if not any(one.foreground.share > 0 for check in found.splits for one in check.masked):
        _say_none(axes)
        return
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set(xscale="log", xlim=(bins[0], 100), xticks=[0.01, 0.1, 1, 10, 100])
    axes.set_xticklabels(["0.01", "0.1", "1", "10", "100"])
    if len(found.splits) > 1:
        axes.legend(fontsize=6, frameon=False, loc="upper left", handlelength=1)


def draw_values(axes: "Axes", found: "DatasetCheck") -> None:
    """Which raw values the masks hold, by their share of all pixels, on a logarithmic scale."""
    _dress(axes, "raw value in the masks", "% of pixels")
    values = sorted({value for check in found.splits for value in check.values})
    if not values:
        _say_none(axes)
        return
    few = len(values) <= FEW_VALUES
    places = {value: index if few else value for index, value in enumerate(values)}
    least = 100.0
    for check, colour in zip(found.splits, _cycle(found), strict=True):
        shares = {places[value]: 100 * pixels / check.values.total() for value, pixels in check.values.items()}
        least = min(least, *shares.values()) if shares else least
        axes.bar(list(shares), list(shares.values()), width=0.8 if few else 1.0, **_bars(colour))
    axes.set(yscale="log", ylim=(least / 3, 130))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if few:
        coloured = any(facts.kind == "colours" for check in found.splits for facts in check.masks)
        step = -(-len(values) // 8)
        shown = values[::step]
        axes.set_xticks([places[value] for value in shown])
        axes.set_xticklabels([f"#{value:06X}" if coloured else str(value) for value in shown])


def draw_sizes(axes: "Axes", found: "DatasetCheck") -> None:
    """Width and height of every image, the network's input among them."""
    _dress(axes, "width, pixels", "height, pixels")
    for check, colour in zip(found.splits, _cycle(found), strict=True):
        sizes = np.array([sample.size for sample in check.samples]).reshape(-1, 2)
        axes.scatter(sizes[:, 0], sizes[:, 1], s=7, color=colour, alpha=0.35, linewidths=0, rasterized=True)
    axes.plot([found.side], [found.side], "s", markersize=6, color="black", fillstyle="none", markeredgewidth=1)
    lengths = [length for check in found.splits for sample in check.samples for length in sample.size]
    _scale_lengths(axes, min(lengths, default=found.side), max(lengths, default=found.side))
    beyond = found.side > max(lengths, default=0) / 2
    place, side = ((-5, -8), "right") if beyond else ((5, -8), "left")
    axes.annotate("network", (found.side, found.side), place, textcoords="offset points", fontsize=6, ha=side)


def _say_none(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "none", ha="center", va="center", color=_FAINT, fontsize=8, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def _scale_lengths(axes: "Axes", least: int, most: int) -> None:
    """Logarithmic where lengths are of different orders, with as many labels as there is room for."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if most > 8 * least:
        axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(
            LogLocator(subs=(1.0,) if most > 200 * least else (1.0, 2.0, 5.0)) if most > 8 * least else MaxNLocator(5)
        )
        axis.set_minor_formatter(lambda value, _: "")
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _cycle(found: "DatasetCheck") -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(len(found.splits))]


def _bars(colour: str) -> dict[str, Any]:
    return {"color": colour, "alpha": 0.6}


def _dress(axes: "Axes", across: str, up: str) -> None:
    axes.grid(visible=True, color="#e8eaed", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=6, length=2, which="both")
    axes.set_xlabel(across, fontsize=7)
    axes.set_ylabel(up, fontsize=7)
