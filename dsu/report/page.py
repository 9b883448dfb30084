"""Write an evaluation as one HTML page that works without a network: scores, curves, all images.

Thumbnails are one strip per image with image, ground truth, prediction and errors: one file instead of four means a
quarter of the requests and files; the page shows one panel at a time.

Style, script and template are files next to this module. The script's data is one block of JSON; all names of sets,
runs and images are escaped.
"""

import hashlib
import io
import json
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from importlib.resources import files
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dsu import __version__
from dsu.data.images import UnreadableImage, read_image
from dsu.errors import UsageError
from dsu.evaluation.evaluate import Evaluation, PredictionPair, read_pair
from dsu.evaluation.thresholds import Thresholds
from dsu.files import atomic_write, make_folder
from dsu.metrics.figures import IMAGE_LEVEL, LOWER_IS_BETTER, METRICS, PER_IMAGE, SPOILT, arrow, figure_name, metric_of
from dsu.metrics.paper import TABLES, ablations, published
from dsu.progress import SILENT, Progress, counted, in_threads
from dsu.report.tables import PLACES, Comparison, Line, Results, by_kind, caveats, compare, conventions_of

# Orange and blue of Okabe and Ito's palette: distinct for every kind of colour vision, and by lightness alone.
FALSE_POSITIVE: Final = (230, 159, 0)
FALSE_NEGATIVE: Final = (0, 114, 178)
SUFFIX: Final = ".webp"

_LONGEST: Final = 320
"""Pixels of a panel's longer side: sharp on high-density screens, at about 20 kB per strip."""
_GUTTER: Final = 4

INLINE_PICTURES: Final = 200
"""Maximum number of thumbnails in the page itself; more would load slowly, and go into a folder next to it."""

_PLACES: Final = 6
"""Decimals of single images' scores: all digits of 5,000 images would triple the page's size."""
_OWN_FILE: Final = re.compile(rf"[0-9a-f]{{20}}{re.escape(SUFFIX)}")
_MOST_BINS: Final = 5
"""Maximum bins between the six ticks of a histogram, each interval with the same number of bins."""
_ERROR_RANGES: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Upper limits for histograms of errors, which are close to 0."""

Floats = NDArray[np.float64]
Evaluations = Mapping[str, tuple[int, Evaluation]]
"""The evaluations of one set by run, with the run's number."""
Figure = tuple[str, list[str], "Chart"]
"""A chart with its title and remarks."""


@dataclass(frozen=True)
class Strip:
    """The address of a strip, and the size in pixels of one of its panels.

    Panels are evenly spaced: CSS shows panel k of n at k / (n - 1) of the strip. `complaint` says in a sentence why a
    known image is missing.
    """

    source: str
    width: int
    height: int
    panels: int
    complaint: str = ""


def write_report(
    path: Path, results: Results, thresholds: Mapping[str, Thresholds] | None = None, *, progress: Progress = SILENT
) -> None:
    """Write a page about evaluations; the thumbnails of many images go into a folder next to it.

    With few images, these come first and histograms of scores are folded, because the images say more.

    The page is written last, atomically: if this is interrupted, an earlier page stays as it was, and the thumbnails
    drawn so far are reused next time.

    Args:
        path: The page, `*.html`.
        results: The evaluations of all runs and sets.
        thresholds: Proposed thresholds by run.
        progress: Receives every thumbnail.

    Raises:
        UsageError: `path` does not end in .html.
        DsuError: An image can't be read or a file can't be written.
    """
    check_report_path(path)
    cases = [(found, case) for sets in results.values() for found in sets.values() for case in found.pairs]
    # Browsers use this name for the files of a saved page.
    beside = path.with_name(f"{path.stem}_files")
    folder = beside if len(cases) > INLINE_PICTURES else None
    make_folder(folder or path.parent)
    draw = partial(draw_strip, folder=folder, place=quote(beside.name))
    strips = list(in_threads(draw, cases, "drawing", progress, unit="pictures"))
    for complaint in dict.fromkeys(strip.complaint for strip in strips if strip.complaint):
        progress.say(f"The report lacks an image: {complaint}")
    atomic_write(path, _page(results, strips, thresholds or {}, few=folder is None).encode("utf-8", "replace"))
    _sweep(beside, {Path(strip.source).name for strip in strips} if folder else set())


def check_report_path(path: Path) -> None:
    """Raise `UsageError` if `path` can't be a page; called before hours of work, not after."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {path} must be a page: give a name that ends in .html.")
    if path.is_dir():
        raise UsageError(f"--report {path} is a folder: give a name for the page in it.")


def _sweep(folder: Path, used: set[str]) -> None:
    """Remove thumbnails of earlier pages that this one does not show; other files stay."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if _OWN_FILE.fullmatch(entry.name) and entry.name not in used:
            entry.unlink(missing_ok=True)
    if not used:
        with suppress(OSError):  # it contains other files
            folder.rmdir()


def _page(results: Results, strips: Iterable[Strip], thresholds: Mapping[str, Thresholds], *, few: bool) -> str:
    text = {name: (files("dsu.report") / f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    sets = list(_sets(results))
    data = json.dumps(_gallery(results, strips), separators=(",", ":"), allow_nan=False)
    return environment.from_string(text["html"]).render(
        runs=", ".join(results),
        several=len(results) > 1,
        few=few,
        sets=sets,
        thresholds=thresholds,
        numbers={run: number for number, run in enumerate(results) if run in thresholds},
        calibration=_calibration(results, thresholds),
        caveats=dict.fromkeys([*caveats(results), *(said for one in sets for said in one["alone"].warnings)]),
        conventions=conventions_of(results),
        made=f"dsu {__version__}, {datetime.now().astimezone().strftime('%d %B %Y, %H:%M')}",
        style=Markup(text["css"]),
        script=Markup(text["js"]),
        # Inside a script element, no `<` may end the element or open a comment.
        data=Markup(data.replace("<", "\\u003c")),
        metric_html=metric_html,
        arrow=arrow,
        METRICS=METRICS,
        IMAGE_LEVEL=IMAGE_LEVEL,
        SPOILT=SPOILT,
        LOWER_IS_BETTER=LOWER_IS_BETTER,
        PRINTED=f"%.{PLACES}f",
    )


def _gallery(results: Results, strips: Iterable[Strip]) -> dict[str, Any]:
    """The script's data: names, scores and thumbnails of all images of every set and run, column by column.

    "empty" lists the indices of images without an object.
    """
    drawn = iter(strips)
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
                "strips": [
                    [strip.source, strip.width, strip.height, strip.panels] for strip in islice(drawn, len(found.pairs))
                ],
            }
            for run, sets in results.items()
            for name, found in sets.items()
        ],
    }


def _scores(found: Evaluation, metric: str) -> list[float | None]:
    values = (float(row[metric]) for row in found.per_image)
    return [round(value, _PLACES) if math.isfinite(value) else None for value in values]


def metric_html(figure: str) -> Markup:
    """A figure's name with its kind as a subscript: F_max is F with the subscript "max"."""
    metric, _ = metric_of(figure)
    letter, _, kind = metric.partition("_")
    if metric not in METRICS or not kind:
        return Markup(letter if metric in METRICS else figure_name(figure))
    return Markup(f"{letter}<sub>{kind}</sub>")


def _sets(results: Results) -> Iterator[dict[str, Any]]:
    """The template's data for each set."""
    for alone, beside, variants in zip(*(compare(results, rows) for rows in (None, published, ablations)), strict=True):
        # Numbers over all runs, so that a run has the same line style in every set.
        evaluated = {
            run: (number, sets[alone.name]) for number, (run, sets) in enumerate(results.items()) if alone.name in sets
        }
        counts = by_kind((run, counted(found.images, "images")) for run, (_, found) in evaluated.items())
        yield {
            "name": alone.name,
            "facts": ", ".join(
                said if len(counts) == 1 else f"{said} ({', '.join(runs)})" for said, runs in counts.items()
            ),
            "alone": alone,
            "beside": beside,
            "tables": [(_title(one, ablation=one is variants), one) for one in (beside, variants) if one.printed],
            "notes": " ".join(dict.fromkeys([*beside.notes(), *variants.notes()])),
            "numbers": {run: number for run, (number, _) in evaluated.items()},
            "curves": _curves(evaluated),
            "responses": _responses([line for line in beside.lines if line.without_object]),
            "distributions": _distributions(evaluated),
        }


def _title(comparison: Comparison, *, ablation: bool) -> str:
    numbers = [table.number for table in TABLES if table.ablation is ablation and comparison.name in table.sets]
    return f"Next to the paper’s{' ablations,' if ablation else ''} Table {' '.join(numbers)}"


def _remarks(of_runs: Mapping[str, str]) -> list[str]:
    """The remarks on all runs; equal ones once."""
    several = len({*of_runs.values()}) > 1
    return list(dict.fromkeys(f"{run}: {remark}" if several else remark for run, remark in of_runs.items()))


def _curves(evaluated: Evaluations) -> list[Figure]:
    thresholds = np.arange(255, -1, -1, dtype=np.float64)
    precision_recall = line_chart(
        {number: (found.curves["recall"], found.curves["precision"]) for number, found in evaluated.values()},
        Axis("recall", 0, 1),
        Axis("precision", 0, 1),
        "Precision over recall, averaged over images",
    )
    f_measure = line_chart(
        {number: (thresholds, found.curves["F"]) for number, found in evaluated.values()},
        Axis("threshold (grey level)", 0, 255, places=0),
        Axis("F (beta² 0.3)", 0, 1),
        "F over the threshold, averaged over images",
    )
    greatest = {
        run: f"maximum {found.metrics['F_max']:.3f} at {255 - int(found.curves['F'].argmax())}"
        for run, (_, found) in evaluated.items()
    }
    return [
        ("Precision over recall", ["256 thresholds"], precision_recall),
        ("F over the threshold", _remarks(greatest), f_measure),
    ]


def _distributions(evaluated: Evaluations) -> Iterator[Figure]:
    for metric in PER_IMAGE:
        scores = {
            run: np.array([row[metric] for row in found.per_image], float) for run, (_, found) in evaluated.items()
        }
        greatest = max(float(values.max()) for values in scores.values())
        high = next((end for end in _ERROR_RANGES if end >= greatest), 1.0) if metric in LOWER_IS_BETTER else 1.0
        plain = metric.replace("_", " ")
        numbered = {evaluated[run][0]: values for run, values in scores.items()}
        centres = {run: f"mean {v.mean():.3f}, median {np.median(v):.3f}" for run, v in scores.items()}
        yield metric_html(metric), _remarks(centres), histogram(numbered, plain, high, f"Number of images by {plain}")


def _responses(lines: Sequence[Line]) -> list[Figure]:
    """For each run evaluated on images without an object: the responses of images with (0) and without one (1)."""
    drawings: list[Figure] = []
    for line in lines:
        assert line.evaluation is not None  # a run's
        level = line.evaluation.image_level
        responses, empty = np.array(level.responses), np.array(level.empty)
        kinds = {kind: values for kind, values in enumerate((responses[~empty], responses[empty])) if values.size}
        summary = "Number of images with and without an object by response"
        title = f"Responses of {line.label}" if len(lines) > 1 else "Responses"
        drawings.append((title, [], histogram(kinds, "response", 1.0, summary)))
    return drawings


def _calibration(results: Results, thresholds: Mapping[str, Thresholds]) -> list[Figure]:
    """How often images with similar responses have an object, for each run with a calibration."""
    lines, remarks = {}, {}
    for number, run in enumerate(results):
        if run in thresholds and thresholds[run].calibration:
            low, high, images, some = np.array(thresholds[run].calibration, np.float64).T
            lines[number] = (low + high) / 2, some / images
            remarks[run] = f"{thresholds[run].validation}: " + ", ".join(": ".join(one) for one in thresholds[run].bins)
    share = Axis("images with an object", 0, 1)
    drawing = line_chart(lines, Axis("response", 0, 1), share, "Fraction of images with an object by response")
    return [("Calibration", _remarks(remarks), drawing)] if lines else []


# ---- charts ----


@dataclass(frozen=True)
class Axis:
    """An axis with its title and range; tick labels have `places` decimals."""

    title: str
    low: float
    high: float
    steps: int = 5
    places: int = 1

    def ticks(self) -> list[tuple[float, str]]:
        """Tick values and their labels."""
        return [(value, f"{value:,.{self.places}f}") for value in np.linspace(self.low, self.high, self.steps + 1)]

    def share(self, value: ArrayLike) -> Floats:
        """A value's position on the axis, from 0 to 1."""
        return (np.asarray(value, np.float64) - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Chart:
    """A chart of `width` x `height` SVG units.

    Attributes:
        width, height: in SVG units, like all positions here.
        x, y: the axes.
        summary: the text for screen readers.
        bars: whether shapes are filled areas, not lines.
        shapes: each shape's points in SVG syntax, by the number of its line style.
    """

    width: int
    height: int
    x: Axis
    y: Axis
    summary: str
    bars: bool = False
    shapes: dict[int, str] = field(default_factory=dict)

    # Space for the tick labels and the axes' titles.
    left: ClassVar = 46
    top: ClassVar = 10

    @property
    def right(self) -> int:
        """The plot's right edge."""
        return self.width - 12

    @property
    def bottom(self) -> int:
        """The plot's lower edge."""
        return self.height - 42

    def across(self, x: ArrayLike) -> Floats:
        """Horizontal positions of values."""
        return self.left + self.x.share(x) * (self.right - self.left)

    def down(self, y: ArrayLike) -> Floats:
        """Vertical positions of values."""
        return self.bottom - self.y.share(y) * (self.bottom - self.top)

    def add(self, number: int, xs: ArrayLike, ys: ArrayLike) -> None:
        """Add a shape in the line style of that number, without repeated points."""
        places = (f"{x:.1f},{y:.1f}" for x, y in zip(self.across(xs), self.down(ys), strict=True))
        self.shapes[number] = " ".join(place for place, _ in groupby(places))


def line_chart(lines: Mapping[int, tuple[Floats, Floats]], x: Axis, y: Axis, summary: str) -> Chart:
    """A chart of lines, each in the style of its number."""
    chart = Chart(400, 280, x, y, summary)
    for number, (xs, ys) in lines.items():
        chart.add(number, xs, ys)
    return chart


def histogram(scores: Mapping[int, Floats], title: str, high: float, summary: str) -> Chart:
    """A histogram of scores over 0..`high`, with higher ones in the last bin, in the line styles of `line_chart`."""
    # Rice's rule (twice the cube root), rounded to a multiple of five, so that bins end at ticks.
    bins = 5 * min(max(round(2 * math.cbrt(max(values.size for values in scores.values())) / 5), 1), _MOST_BINS)
    edges = np.linspace(0, high, bins + 1)
    counts = {number: np.histogram(np.clip(values, 0, high), edges)[0] for number, values in scores.items()}
    greatest = max(found.max() for found in counts.values())
    # Limits whose halves, the middle ticks, are whole numbers.
    ends = (step * 10**power for power in count() for step in (2, 4, 6, 10))
    images = Axis("images", 0, next(end for end in ends if end >= greatest), steps=2, places=0)
    chart = Chart(300, 190, Axis(title, 0, high, places=1 if high >= 0.5 else 2), images, summary, bars=True)
    for number, found in counts.items():
        chart.add(number, np.repeat(edges, 2), np.concatenate(([0], np.repeat(found, 2), [0])))
    return chart


# ---- thumbnails ----


def draw_strip(evaluated: tuple[Evaluation, PredictionPair], folder: Path | None, place: str) -> Strip:
    """Draw the strip of an image.

    Files are named by their content's hash, so an earlier page still finds its own, and existing files are reused.

    Args:
        evaluated: The evaluation of a set, and one of its pairs.
        folder: Where to write the file; None embeds it in the page as a data URI.
        place: The folder's address relative to the page.

    Raises:
        DsuError: A file can't be read or written.
    """
    found, case = evaluated
    image, complaint = None, ""
    try:
        image = None if case.image is None else read_image(case.image)
    except UnreadableImage as error:
        case, complaint = replace(case, image=None), str(error)
    prediction, truth = read_pair(case, found.mask_format, resize=True)
    panels = draw_panels(truth, prediction, image, normalize=found.normalize)
    # Repeat every panel's edge, so that scaling does not mix it with its neighbour.
    padded = [np.pad(np.asarray(panel), ((0, 0), (_GUTTER, _GUTTER), (0, 0)), mode="edge") for panel in panels]
    encoded = io.BytesIO()
    # The default method, 4 of 6, takes more than twice as long for 4 % smaller files.
    Image.fromarray(np.hstack(padded)[:, _GUTTER:-_GUTTER]).save(encoded, "WEBP", quality=80, method=2)
    content = encoded.getvalue()
    if folder is None:
        source = f"data:image/webp;base64,{b64encode(content).decode()}"
    else:
        name = hashlib.sha256(content).hexdigest()[:20] + SUFFIX
        source = f"{place}/{name}"
        if not (folder / name).exists():
            atomic_write(folder / name, content)
    return Strip(source, *panels[0].size, len(panels), complaint)


def draw_panels(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8], image: Image.Image | None, *, normalize: bool
) -> list[Image.Image]:
    """Draw the image (if there is one), ground truth, prediction and errors as RGB thumbnails of one size.

    Errors are those that IoU and Dice count: a map above 0.5 against foreground above 128. They are found at full size,
    so thin ones fade in the thumbnail instead of vanishing. Correct pixels keep the image's grey values.

    Args:
        truth: Ground truth (H, W).
        prediction: The map (H, W), 0..255.
        image: The segmented image, of any size.
        normalize: Whether to min-max normalise the map, as its evaluation did; a constant map stays as it is.
    """
    low, high = int(prediction.min()), int(prediction.max())
    level = (prediction - float(low)) / (high - low) if normalize and low < high else prediction / 255
    wanted, given = truth > 128, level > 0.5
    height, width = truth.shape
    scale = min(1.0, _LONGEST / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = None if image is None else image.resize(size, Image.Resampling.BICUBIC)
    grey = Image.new("RGB", size, (128, 128, 128)) if small is None else small.convert("L").convert("RGB")
    # Dim the background, to tell true positives from true negatives.
    errors = Image.composite(grey, grey.point(lambda value: value // 3), _shrunk(wanted, size))
    for wrong, colour in ((given & ~wanted, FALSE_POSITIVE), (wanted & ~given, FALSE_NEGATIVE)):
        errors.paste(colour, mask=_shrunk(wrong, size))
    shown = Image.fromarray((level * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BOX)
    panels = [_shrunk(wanted, size).convert("RGB"), shown.convert("RGB"), errors]
    return panels if small is None else [small, *panels]


def _shrunk(region: NDArray[np.bool_], size: tuple[int, int]) -> Image.Image:
    """A region's coverage of each small pixel, 0..255."""
    return Image.fromarray(region.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
