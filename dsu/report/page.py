"""One HTML page of an evaluation, which opens from disk without any network: figures, curves, all images.

Its style, script and frame are the files beside this module. What scripts need is one block of JSON; names of sets,
runs and images are escaped wherever they stand, so an image may be called anything.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final
from urllib.parse import quote

from dsu import __version__
from dsu.errors import UsageError
from dsu.evaluation.evaluate import Evaluation
from dsu.files import atomic_write, make_folder
from dsu.metrics.figures import LOWER_IS_BETTER, PER_IMAGE
from dsu.progress import SILENT, Progress
from dsu.report.comparison import Results
from dsu.report.markup import metric_html
from dsu.report.pictures import SUFFIX, Strip, draw_strips
from dsu.report.sections import overview, set_navigation, set_sections

__all__ = ["INLINE_PICTURES", "check_report_path", "pictures_folder", "write_report"]

INLINE_PICTURES: Final = 200
"""Up to so many cases are in the page itself; beyond, a browser would take long to read it, and they lie beside it."""

_PLACES: Final = 6
"""Decimals of single images' scores in the page: the full figures of 5,000 images would triple it."""
_OWN_FILE: Final = re.compile(rf"[0-9a-f]{{20}}{re.escape(SUFFIX)}")


def write_report(path: Path, results: Results, *, progress: Progress = SILENT) -> None:
    """Write a page of what was judged; with many images, their pictures go into a folder beside it.

    The page is written last and at once, over an earlier one: who stops this keeps that one whole, and drawing goes on
    from there the next time.

    Args:
        path: The page, `*.html`.
        results: Of every run what each set scored.
        progress: Told of every picture.

    Raises:
        UsageError: `path` is no name for a page.
        DsuError: A picture that can't be read or a file that can't be written.
    """
    check_report_path(path)
    total = sum(len(found.cases) for sets in results.values() for found in sets.values())
    make_folder(path.parent)
    beside = pictures_folder(path)
    folder = beside if total > INLINE_PICTURES else None
    if folder is not None:
        make_folder(folder)
    strips: dict[tuple[str, str], list[Strip]] = {}
    with progress.task("drawing", total, "pictures") as task:
        for run, sets in results.items():
            for name, found in sets.items():
                strips[run, name] = draw_strips(found, folder, quote(beside.name), task)
    for complaint in dict.fromkeys(strip.complaint for drawn in strips.values() for strip in drawn if strip.complaint):
        progress.say(f"The report lacks an image: {complaint}")
    atomic_write(path, _page(results, strips).encode("utf-8", "replace"))
    _sweep(beside, {Path(strip.source).name for drawn in strips.values() for strip in drawn} if folder else set())


def check_report_path(path: Path) -> None:
    """Raise `UsageError` unless a page can be called so: it is asked before hours of work, not after."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {path} must be a page: give a name that ends in .html.")
    if path.is_dir():
        raise UsageError(f"--report {path} is a folder: give a name for the page in it.")


def pictures_folder(path: Path) -> Path:
    """Where the pictures of a page with many images are, as browsers call what they save with a page."""
    return path.with_name(f"{path.stem}_files")


def _page(results: Results, strips: Mapping[tuple[str, str], Sequence[Strip]]) -> str:
    runs = ", ".join(results)
    made = datetime.now().astimezone().strftime("%d %B %Y, %H:%M")
    room = files("dsu.report")
    text = {name: (room / f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    # One pass, so that nothing that is put in is taken for a place to put something else.
    return Template(text["html"]).substitute(
        title=escape(f"Evaluation of {runs}"),
        runs=escape(runs),
        made=escape(f"dsu {__version__}, {made}"),
        navigation=set_navigation(results),
        overview=overview(results),
        sections=set_sections(results),
        style=text["css"],
        script=text["js"],
        data=_json(_gallery(results, strips)),
    )


def _gallery(results: Results, strips: Mapping[tuple[str, str], Sequence[Strip]]) -> dict[str, Any]:
    """What the script shows: of every set and run names, scores and pictures of all images, column by column.

    Images without an object are named by their places.
    """
    return {
        "metrics": [
            {"key": metric, "html": metric_html(metric), "lower": metric in LOWER_IS_BETTER} for metric in PER_IMAGE
        ],
        "groups": [
            {
                "set": name,
                "run": run,
                "names": [row["name"] for row in found.per_image],
                "empty": [index for index, row in enumerate(found.per_image) if row["empty"]],
                "scores": {metric: _scores(found, metric) for metric in PER_IMAGE},
                "strips": [[strip.source, strip.width, strip.height, strip.panels] for strip in strips[run, name]],
            }
            for run, sets in results.items()
            for name, found in sets.items()
        ],
    }


def _scores(found: Evaluation, metric: str) -> list[float | None]:
    values = [float(row[metric]) for row in found.per_image]
    return [round(value, _PLACES) if math.isfinite(value) else None for value in values]


def _json(data: dict[str, Any]) -> str:
    """JSON that can stand inside a script element: no `<` in it ends the element or opens a comment."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sweep(folder: Path, used: set[str]) -> None:
    """Remove pictures of earlier pages that this one no longer shows; whatever else lies there is left alone."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if _OWN_FILE.fullmatch(entry.name) and entry.name not in used:
            entry.unlink(missing_ok=True)
    if not used:
        with suppress(OSError):  # something else lies there
            folder.rmdir()
