"""Verdicts: the strength and position of a map's response, and whether it raises an alarm; and tables of them."""

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dsu.data.images import Box
from dsu.files import atomic_write
from dsu.progress import counted
from dsu.thresholds import DEFAULT_THRESHOLD, level_of

TABLE_FILES: Final = ("table.csv", "table.json")
"""The tables next to a record: one row per image of all its sets."""

_MOST_BOXES: Final = 50
"""Maximum number of boxes, for the largest components; noise has thousands."""


@dataclass(frozen=True)
class VerdictRow:
    """One image's row.

    Attributes:
        set: its set; empty for single files and mirrored folders.
        image: its name, with folders.
        verdict: an alarm if the response reaches the threshold; "no mask" if there is none, see `problem`.
        response: the map's largest value, in [0, 1], never normalised.
        threshold: applied threshold, in [0, 1].
        area: number of pixels at or above the threshold; None if it was chosen later and the map is normalised.
        share: `area` as a share of the image's pixels, in [0, 1].
        components: number of separate regions; pixels that touch at a corner belong to one region.
        boxes: of the 50 largest components, largest first: left, top, right, bottom in pixels of the image.
        seconds: spent on the image; for a batch, an equal part of its time.
        file: the output file, relative to the table's folder.
        problem: why there is no mask, in one sentence.
    """

    set: str
    image: str
    verdict: Literal["alarm", "clear", "no mask"]
    response: float | None = None
    threshold: float | None = None
    area: int | None = None
    share: float | None = None
    components: int | None = None
    boxes: list[Box] | None = None
    seconds: float | None = None
    file: str = ""
    problem: str = ""

    def at(self, threshold: float) -> "VerdictRow":
        """The image's row at another threshold, with what its response alone determines."""
        assert self.response is not None
        verdict = _verdict(round(255 * self.response), threshold)
        return VerdictRow(self.set, self.image, verdict, self.response, threshold, seconds=self.seconds, file=self.file)


def find_verdict(row: VerdictRow, grey: NDArray[np.uint8], threshold: float) -> VerdictRow:
    """An image's row with the verdict on its map (H, W), which must not be normalised."""
    from scipy import ndimage  # type: ignore[import-untyped]  # slow to load, and commands about heads don't need it

    above = grey >= level_of(threshold)
    labels, count = ndimage.label(above, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    places = ndimage.find_objects(labels)
    largest = np.argsort(-areas, kind="stable")[:_MOST_BOXES]
    boxes = [(across.start, down.start, across.stop, down.stop) for down, across in (places[at] for at in largest)]
    area, most = int(areas.sum()), int(grey.max())
    return replace(
        row,
        verdict=_verdict(most, threshold),
        response=round(most / 255, 4),
        threshold=threshold,
        area=area,
        share=round(area / grey.size, 6),
        components=count,
        boxes=boxes,
    )


def _verdict(most: int, threshold: float) -> Literal["alarm", "clear"]:
    return "alarm" if most >= level_of(threshold) else "clear"


def summary(rows: Collection[VerdictRow]) -> str:
    """Number of images by verdict: `4 alarms, 5 clear at threshold 0.5`; empty without rows."""
    counts = Counter(row.verdict for row in rows)
    if not counts:
        return ""
    at = "".join(sorted({f" at threshold {row.threshold:g}" for row in rows if row.threshold is not None}))
    without = f", {counts['no mask']:,} without a mask" if counts["no mask"] else ""
    return f"{counted(counts['alarm'], 'alarms')}, {counts['clear']:,} clear{at}{without}"


def table_text(rows: Iterable[VerdictRow], ending: str) -> str:
    """The table as `.json`, a list of objects, one per line, or `.csv`, where a box is `left top right bottom`."""
    if ending == ".json":
        return "[\n" + ",\n".join(json.dumps(vars(row)) for row in rows) + "\n]\n"
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, [field.name for field in fields(VerdictRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        boxes = "; ".join(" ".join(map(str, box)) for box in row.boxes or ())
        writer.writerow({**vars(row), "boxes": boxes})
    return buffer.getvalue()


def write_table(folder: Path, rows: Mapping[str, VerdictRow]) -> None:
    """Write a folder's table in both forms, ordered by file. Raises as `atomic_write`."""
    ordered = [rows[file] for file in sorted(rows)]
    for name in TABLE_FILES:
        atomic_write(folder / name, table_text(ordered, Path(name).suffix).encode("utf-8", "replace"))


def read_table(folder: Path) -> dict[str, VerdictRow]:
    """A folder's rows by output file; empty if there is no valid table."""
    try:
        found: list[dict[str, Any]] = json.loads((folder / TABLE_FILES[1]).read_text())
        rows = [VerdictRow(**{**row, "boxes": row["boxes"] and [tuple(box) for box in row["boxes"]]}) for row in found]
        if not all(isinstance(row.file, str) and isinstance(row.response, float | int | None) for row in rows):
            return {}
        return {row.file: row for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def threshold_of(predictions: Path) -> float:
    """The alarm threshold of the predictions in a folder; 0.5 if it is not recorded."""
    noted = (row.threshold for row in read_table(predictions).values() if row.threshold is not None)
    return next(noted, DEFAULT_THRESHOLD)
