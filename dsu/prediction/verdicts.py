"""Verdicts: how strongly a map responds, where, and whether that is an alarm; and a table of them."""

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dsu.data.images import Box
from dsu.files import atomic_write
from dsu.progress import counted
from dsu.thresholds import DEFAULT_THRESHOLD, level_of

__all__ = ["TABLE_FILES", "VerdictRow", "find_verdict", "read_table", "summary", "table_text", "write_table"]

TABLE_FILES: Final = ("table.csv", "table.json")
"""Next to a record: one row per image of all its sets."""

_MOST_BOXES: Final = 50
"""Maximum number of boxes, for the largest components; noise has thousands."""


@dataclass(frozen=True)
class VerdictRow:
    """One image's row.

    Attributes:
        set: that it belongs to; none for files, and for a folder whose masks have one of their own.
        image: its name, with folders.
        verdict: an alarm where the response reaches the threshold; "no mask" where there is none, see `problem`.
        response: the map's largest value, in [0, 1], never stretched.
        threshold: applied threshold, in [0, 1].
        area: pixels at or above the threshold; None if it was chosen later and the map is stretched.
        share: of the image's pixels, in [0, 1].
        components: how many separate regions these are; pixels that touch at a corner are one region.
        boxes: of the largest 50 of them, the largest first: left, top, right, bottom in pixels of the image.
        seconds: that the image took; of a batch each image has its part.
        file: what was written, as a path below the table's folder.
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
        """The same image's row by another threshold, as far as its response says."""
        assert self.response is not None
        verdict = _verdict(round(255 * self.response), threshold)
        return VerdictRow(self.set, self.image, verdict, self.response, threshold, seconds=self.seconds, file=self.file)


def find_verdict(row: VerdictRow, grey: NDArray[np.uint8], threshold: float) -> VerdictRow:
    """An image's row, filled in by its map (H, W), which is not stretched."""
    from scipy import ndimage  # type: ignore[import-untyped]  # half of what a look at heads would take

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
    """The table as `.json`, a list of objects, or `.csv`, where a box is `left top right bottom`."""
    if ending == ".json":
        return json.dumps([asdict(row) for row in rows], indent=1) + "\n"
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, [field.name for field in fields(VerdictRow)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        boxes = "; ".join(" ".join(map(str, box)) for box in row.boxes or ())
        writer.writerow({**asdict(row), "boxes": boxes})
    return buffer.getvalue()


def write_table(folder: Path, rows: Mapping[str, VerdictRow]) -> None:
    """Write a folder's table in both forms, ordered by file. Raises as `atomic_write`."""
    ordered = [rows[file] for file in sorted(rows)]
    for name in TABLE_FILES:
        atomic_write(folder / name, table_text(ordered, Path(name).suffix).encode("utf-8", "replace"))


def read_table(folder: Path) -> dict[str, VerdictRow]:
    """A folder's rows by their files; none where there is no table, or none as dsu writes them."""
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
