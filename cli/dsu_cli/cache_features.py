"""`dsu cache-features`: stage one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsu_cli import options

if TYPE_CHECKING:
    from dsu.data.inspection import Inspection
    from dsu.data.pairing import Split


def cache_features(
    dataset: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="A benchmark's name or a folder of yours.")],
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    images: options.Images = None,
    masks: options.Masks = None,
    foreground: options.Foreground = None,
    features: Annotated[
        str,
        typer.Option(
            help="What to store beside pixels and mask: V, V1, ... (DINOv2's blocks), S1 to S4, B1, ... (tokens "
            "entering that block of Hiera)."
        ),
    ] = "V,S1,S2,S3,S4",
    views: Annotated[
        str,
        typer.Option(help="Views of training images that keep V: none, width, flips, or flips+K with K extra ones."),
    ] = "flips",
    level_views: Annotated[str, typer.Option(help="Views that keep Hiera's levels, likewise.")] = "none",
    tile: options.Tile = None,
    overlap: options.Overlap = None,
    feature_dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    compressor: Annotated[str | None, typer.Option(help="zstd or blosc: 8 to 16 % smaller.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Compute anew what was made of something else.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and how large it is, and stop.")
    ] = False,
    encoder_batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images that the encoders see at once, part of what features are made of (default: the store's; a new "
            "one takes 8 on a GPU, else 1)."
        ),
    ] = None,
    preset: options.Preset = "large",
    hiera: options.Hiera = None,
    dino: options.Dino = None,
    hiera_size: options.HieraSize = None,
    dino_size: options.DinoSize = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    device: options.Device = "auto",
    precision: options.PrecisionOption = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Stage one: run both frozen encoders once and store what they give.

    Run it again at any time: it computes only what is new, changed or missing.

    `--features V` is all that the paper's setting reads in training; Hiera's levels serve figures, heads with fewer
    adapters (`train-head --adapt-last N`) and training without flips.

    For few images, `--views flips+8` keeps eight more views of each, turned, cut out and recoloured; for large ones,
    `--tile 1024` keeps their parts as samples of their own.
    """
    import shlex

    from dsu.config import build_config
    from dsu.data.datasets import unreadable
    from dsu.data.tiles import Tiling
    from dsu.encoders.weights import EncoderWeights
    from dsu.features.extraction import CachePlan, cache_features
    from dsu.features.extraction_plan import ExtractionSettings
    from dsu_cli.console import ConsoleProgress, fail, out
    from dsu_cli.parsing import one_of, views_of
    from dsu_cli.reports import extraction_table

    def announce(plan: CachePlan) -> None:
        """What is left out, and what will be done, before hours of work."""
        for split in plan.splits:
            for line in unreadable(split.inspection):
                fail(line)
        if not quiet:
            out.print(extraction_table(plan))
            if any(_holds_empty_masks(split.split, split.inspection) for split in plan.splits):
                out.print(
                    f"Why masks are without foreground: `dsu datasets check {shlex.quote(dataset)}`", markup=False
                )

    settings = ExtractionSettings(
        features=tuple(dict.fromkeys(name.strip() for name in features.split(",") if name.strip())),
        views=views_of("--views", views),
        level_views=views_of("--level-views", level_views),
        feature_dtype=one_of("--feature-dtype", feature_dtype, ("float16", "float32")),
        compressor=one_of("--compressor", compressor, (None, "zstd", "blosc")),
        encoder_batch_size=None
        if encoder_batch_size is None
        else one_of("--encoder-batch-size", encoder_batch_size, range(1, 4097)),
        foreground=tuple(foreground) if foreground else None,
        rebuild=rebuild,
    )
    result = cache_features(
        dataset,
        build_config(preset or "large", hiera=hiera, dino=dino, hiera_size=hiera_size, dino_size=dino_size),
        settings,
        EncoderWeights(hiera_weights, dino_weights, random_weights),
        data_root=data_root,
        cache_root=cache_root,
        images=images,
        masks=masks,
        tiling=Tiling.of(tile, overlap),
        device=device,
        precision=one_of("--precision", precision, ("auto", "fp32", "bf16")),
        before=announce,
        dry_run=dry_run,
        progress=ConsoleProgress(quiet=quiet),
    )
    if dry_run:
        out.print("Nothing was encoded: leave --dry-run away to do it.", markup=False)
    elif not quiet:
        skipped = f", {len(result.skipped):,} skipped" if result.skipped else ""
        trainable = any(plan.split.masks for plan in result.splits)
        hint = "Next: `dsu train-head`" if trainable else "Without masks: good for predicting, not for training."
        out.print(f"Stored in {cache_root}{skipped}. {hint}", markup=False)
    if result.skipped:
        raise typer.Exit(1)


def _holds_empty_masks(split: "Split", inspection: "Inspection") -> bool:
    """Whether masks of one's own are read as empty, which may be meant, or be faint labels."""
    masks = [facts.mask for facts in inspection.facts.values() if facts.mask]
    return not split.benchmark and any(mask.is_empty(inspection.mask_format) for mask in masks)
