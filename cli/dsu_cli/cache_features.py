"""`dsu cache-features`: stage one."""

import re
import shlex
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from dsu.distributed import ALONE, World, connect
from dsu.errors import UsageError
from dsu.progress import counted
from dsu.settings import EncoderWeights, ExtractionSettings, NetworkSettings, RuntimeSettings, TilingSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, bytes_text, fail, key_table, out, table, with_urls

if TYPE_CHECKING:
    from dsu.data.inspection import Inspection
    from dsu.data.pairing import Split
    from dsu.features.extraction import CachePlan

_PATIENCE: Final = timedelta(days=2)
"""How long processes wait for the first, which may scan a million images."""


@options.with_settings(ExtractionSettings, TilingSettings, NetworkSettings, RuntimeSettings)
def cache_features(
    given: Mapping[str, Any],
    dataset: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="A benchmark's name or your own folder.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done and how large it would be, then stop.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/K",
            help="Process only part I of K, such as 3/16; other jobs process the others, at any time, on any machine.",
        ),
    ] = None,
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    images: options.Images = None,
    masks: options.Masks = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    quiet: options.Quiet = False,
) -> None:
    """Stage one: run both frozen encoders once and store their features.

    Run it again at any time: it computes only what is new, changed or missing. Several processes, started by torchrun
    or srun, divide the work.

    In the paper's setting, training reads only `--features V`. Hiera's levels let heads with fewer adapters
    (`train-head --adapt-last N`) start later, if they are stored in all views that training draws.

    For few images, `--views flips+8` stores eight more views of each: rotated, cropped and recoloured. For large
    images, `--tile 1024` stores each tile as a sample.
    """
    with connect(_PATIENCE) as world:  # first, so that only one of several processes reports errors
        if dry_run and not world.is_main:
            return
        from dsu.data.datasets import Paths, find_dataset
        from dsu.data.inspection import unreadable
        from dsu.encoders.sources import check_given
        from dsu.network.resume import check_features, guide_names
        from dsu.settings_file import read_settings

        own = None if part is None else _part(part, world)
        runtime, settings = read_settings(RuntimeSettings, given), read_settings(ExtractionSettings, given)
        config, tiling = read_settings(NetworkSettings, given).config(), read_settings(TilingSettings, given).tiling
        paths = Paths(data_root, cache_root, images, masks)
        check_features(config, settings.features)
        find_dataset(dataset, paths)
        weights, maps = EncoderWeights(hiera_weights, dino_weights, random_weights), set(guide_names(config))
        if not dry_run:
            wanted = set(settings.features)
            check_given(config, weights, hiera=bool(wanted - maps), dino=bool(wanted & maps))
        # Only now, since torch takes seconds: wrong names and settings have been reported.
        from dsu.features.extraction import CachePlan, cache_features

        def announce(plan: CachePlan) -> None:
            """Print what is left out and what will be done, before hours of work."""
            for split in plan.splits:
                for line in unreadable(split.inspection):
                    fail(line)
            if not quiet:
                out.print(_plan_report(plan))
                if any(_holds_empty_masks(split.split, split.inspection) for split in plan.splits):
                    out.print(
                        f"To see why masks have no foreground: `dsu datasets check {shlex.quote(dataset)}`",
                        markup=False,
                    )

        result = cache_features(
            dataset,
            config,
            settings,
            weights,
            paths=paths,
            tiling=tiling,
            device=runtime.device,
            precision=runtime.precision,
            before=announce,
            dry_run=dry_run,
            part=own,
            world=ALONE if dry_run else world,
            progress=ConsoleProgress(quiet=quiet),
        )
    if dry_run:
        out.print("Nothing was encoded: omit --dry-run to do it.", markup=False)
    elif result.left and not quiet:
        others = f"the other parts have {counted(result.left, 'shards')} left to write"
        out.print(f"Part {part} is stored in {cache_root}; {others}.", markup=False)
    elif not quiet:
        skipped = f", {len(result.skipped):,} skipped" if result.skipped else ""
        trainable = any(plan.split.masks for plan in result.splits)
        hint = "Next: `dsu train-head`" if trainable else "Without masks you can predict but not train."
        whole = "; all parts are complete" if part else ""
        out.print(with_urls(f"Stored in {cache_root}{skipped}{whole}. {hint}"), markup=False)
    if result.skipped and world.is_main:  # the others would end it before it has reported that
        raise typer.Exit(1)


def _part(text: str, world: World) -> tuple[int, int]:
    """Parse `3/16`. Raises `UsageError` for anything else, and if there are several processes."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    if found is None or int(found[1]) > int(found[2]):
        raise UsageError(f"--part can't be {text}: give a part and the number of parts, such as 3/16.")
    if world.connected:
        raise UsageError(
            "--part is for jobs that start independently; processes that torchrun or srun starts together divide "
            "the work themselves: omit --part, or start one process."
        )
    return int(found[1]), int(found[2])


def _holds_empty_masks(split: "Split", inspection: "Inspection") -> bool:
    """Whether masks of your own data are read as empty: they may be meant so, or be faint labels."""
    masks = [facts.mask for facts in inspection.facts.values() if facts.mask]
    return not split.benchmark and any(mask.is_empty(inspection.mask_format) for mask in masks)


def _plan_report(plan: "CachePlan") -> RenderableType:
    """What stage one is about to do: device, images, bytes per array, free disk space."""
    shown = table(("split", "images", "to do", "array", "bytes"), {"images", "to do", "bytes"})
    total = 0
    for extraction in plan.splits:
        cells = (extraction.split.name, f"{len(extraction.inspection.facts):,}", f"{extraction.images:,}")
        for name, count in extraction.bytes_by_array.items():
            shown.add_row(*cells, name, bytes_text(count))
            total += count
            cells = ("", "", "")
        if not extraction.todo:
            shown.add_row(*cells, "already stored", "0 B")
        for warning in extraction.drift:
            shown.add_row("", "", "", Text(f"other version: {warning}", style="yellow"), "")
    free = "" if plan.free_bytes is None else f" (free: {bytes_text(plan.free_bytes)})"
    room = f"{bytes_text(total)}{free}"
    return Group(shown, key_table((("device", plan.runtime.describe()), ("to write", room))))
