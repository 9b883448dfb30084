"""Features of images to look at: Hiera's levels before and after the adapters, and DINOv2's blocks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsu.config import LEVELS, DSUNetConfig, build_config
from dsu.data.datasets import Paths, SourceFolder, find_samples
from dsu.data.images import UnreadableImage, read_image_and_head
from dsu.data.masks import choose_mask_format, examine_mask
from dsu.data.pairing import Pair, named_images, pair_files, unwrapped
from dsu.encoders.sources import check_given
from dsu.errors import UsageError
from dsu.heads.head_file import load_head, read_head_info, resolve_head
from dsu.progress import SILENT, Progress
from dsu.settings import EncoderWeights

if TYPE_CHECKING:
    from dsu.network.network import DSUNet
    from dsu.runtime import Runtime

__all__ = [
    "MOST",
    "FeatureGroup",
    "FeatureLevel",
    "Shown",
    "choose_blocks",
    "choose_network",
    "compute_features",
    "find_head",
    "find_shown",
    "images_of_head",
    "open_network",
]

MOST: Final = 24
"""Images of one figure."""

_ADAPTED: Final = " adapted"

_RANDOM: Final = {
    "hiera": "random weights: not what pretrained features look like",
    "dino": "random weights: untrained blocks look alike, pretrained ones do not",
}
"""What a figure says of random encoders."""


# ---- which images ----


@dataclass(frozen=True)
class Shown:
    """One image of a figure: RGB, and its mask (any size, uint8 0..255) where it has one."""

    name: str
    image: Image.Image
    mask: NDArray[np.uint8] | None


def find_shown(
    sources: Sequence[str], masks: Path | None, count: int, paths: Paths, progress: Progress = SILENT
) -> tuple[list[Shown], list[str]]:
    """Read the images that a user means, with their masks.

    Args:
        sources: Image files; folders of images, or of images and masks; benchmarks by name. Where there are test
            splits, these are meant.
        masks: A folder of masks of the same names (paths below a folder, without ending).
        count: How many images of each folder are taken, evenly spread: neighbours are often alike.
        paths: Where benchmarks lie.
        progress: Who is told of images left out.

    Returns:
        The images; and a sentence for each that was skipped, since it or its mask cannot be read.

    Raises:
        UsageError: More than `MOST` images, a source that is absent or has none, or a folder of masks that has none
            of these images.
        UnreadableImage: None of the images can be read.
    """
    found: list[Pair] = []
    for source in sources:
        named = [pair for split in find_samples(source, paths) for pair in split.pairs]
        if len(named) > count:
            progress.say(f"{source}: {count} of {len(named):,} images (--count shows more)")
        places = np.linspace(0, len(named) - 1, min(count, len(named))).round().astype(int)
        found += [named[place] for place in places]
    if len(found) > MOST:
        raise UsageError(f"{len(found)} images make too tall a figure: give {MOST} at most.")
    if masks is not None:
        files = pair_files([pair.name for pair in found], named_images(unwrapped(masks) if masks.is_dir() else masks))
        if not any(files):
            raise UsageError(
                f"{masks} holds no mask called like {found[0].name}: give --masks the folder of their masks."
            )
        found = [replace(pair, mask=mask) for pair, mask in zip(found, files, strict=True)]
    return _read(found)


def find_head(given: str | None, progress: Progress = SILENT) -> str | None:
    """The head that is meant: the one given, else the newest run's, which is said, else none.

    Raises `UsageError` as `resolve_head` where one is given.
    """
    if given is not None:
        return given
    try:
        head = resolve_head(None)
    except UsageError:
        return None
    progress.say(f"head: {head}, the newest; name a network, such as --preset large, for encoders alone")
    return str(head)


def images_of_head(sources: Sequence[str], head: str | None, paths: Paths) -> tuple[Sequence[str], Paths]:
    """The images that are meant: those named, else what the head was trained on, and where to look for them.

    Raises `UsageError` where there are neither.
    """
    dataset = {} if sources or head is None else read_head_info(resolve_head(head)).dataset
    if sources or "reference" not in dataset:
        if not sources:
            raise UsageError("Nothing says which images to show: name image files, a folder or a benchmark.")
        return sources, paths
    noted = {name: value for name, value in dataset.items() if name != "held_out"}
    try:
        source = SourceFolder(**noted)
    except TypeError as error:
        raise UsageError(f"{head} does not say rightly what it was trained on: name the images to show.") from error
    return [source.reference], replace(
        paths, data_root=Path(source.data_root), images=source.images, masks=source.masks
    )


def _read(found: Sequence[Pair]) -> tuple[list[Shown], list[str]]:
    """Images and masks, these read by one rule; and why others cannot be."""
    opened, broken = [], []
    for pair in found:
        try:
            facts = examine_mask(pair.mask) if pair.mask else None
            opened.append((pair.name, *read_image_and_head(pair.image), pair.mask, facts))
        except UnreadableImage as error:
            broken.append(error)
    if broken and not opened:
        raise broken[0]
    mask_format = choose_mask_format([facts for *_, facts in opened if facts is not None])
    shown = [
        Shown(name, image, mask_format.read(mask, image=head) if mask else None)
        for name, image, head, mask, _ in opened
    ]
    return shown, list(map(str, broken))


# ---- their features ----


@dataclass(frozen=True)
class FeatureLevel:
    """One kind of features of several images.

    Attributes:
        title: a name, and in a second line the shape.
        maps: each image's tokens on their grid, (H, W, C) float32.
        adapted: whether this is the level before it in its group, after the adapters.
    """

    title: str
    maps: tuple[NDArray[np.float32], ...]
    adapted: bool = False


@dataclass(frozen=True)
class FeatureGroup:
    """The levels of one encoder, as they stand side by side.

    Attributes:
        title: the encoder's name.
        levels: from the first to the last, each before and (where asked for) after the adapters.
        remark: what a reader of the figure must know.
    """

    title: str
    levels: tuple[FeatureLevel, ...]
    remark: str = ""


def choose_blocks(config: DSUNetConfig, asked: Sequence[int] | None) -> list[int]:
    """The DINOv2 blocks to look at, counted from 1; None takes those at the quarters (6, 12, 18, 24 of ViT-L).

    Raises `UsageError` for a block that there is not.
    """
    depth = config.dino.depth
    if asked is None:
        return sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)})
    outside = [block for block in asked if not 1 <= block <= depth]
    if outside or not asked:
        named = f"block {outside[0]}" if outside else "none"
        raise UsageError(
            f"--dino-blocks names {named}, but this DINOv2 has the blocks 1 to {depth}: name some of these."
        )
    return sorted(set(asked))


def choose_network(
    head: str | None, weights: EncoderWeights, encoders: Mapping[str, Any]
) -> tuple[DSUNetConfig, EncoderWeights]:
    """The network to look into, and where its encoders' weights come from.

    Args:
        head: a run folder or a head's file; None: the encoders alone.
        weights: where the encoders' weights come from.
        encoders: `preset`, `hiera`, ... as of `build_config`, those not asked for being None; a head says them
            itself.

    Raises `UsageError` where a head and encoders are both named, `DsuError` where no file is where weights are named.
    """
    asked = {name: value for name, value in encoders.items() if value is not None}
    if head is not None and asked:
        option = next(iter(asked)).replace("_", "-")
        raise UsageError(f"A head has its own encoders, which --{option} would change: leave it or --head away.")
    if head is None:
        config = build_config(asked.pop("preset", "large"), **asked)
    else:
        info = read_head_info(resolve_head(head))
        config, weights = info.config, replace(weights, random=weights.random or info.random_weights)
    check_given(config, weights, hiera=True, dino=True)
    return config, weights


def open_network(head: str | None, config: DSUNetConfig, weights: EncoderWeights) -> "DSUNet":
    """What `choose_network` chose, in evaluation mode with both encoders; without a head, its own is nobody's.

    Raises `DsuError` where it can't be loaded.
    """
    from dsu.encoders.weights import load_encoders
    from dsu.network.network import DSUNet
    from dsu.network.pretrained import load_network

    if head is None:
        hiera, dino, _ = load_encoders(config, weights, hiera=True, dino=True)
        return DSUNet(config, hiera, dino).eval()
    state, info = load_head(resolve_head(head))
    network = load_network(state, info, weights)
    if network.dino is None:  # the paper's ablation A
        network.dino = load_encoders(config, weights, hiera=False, dino=True)[1]
    return network


def compute_features(
    network: "DSUNet",
    runtime: "Runtime",
    images: Sequence[Image.Image],
    blocks: Sequence[int],
    *,
    adapted: bool = False,
    random: Collection[str] = (),
    progress: Progress = SILENT,
) -> list[FeatureGroup]:
    """Every Hiera level, and the given DINOv2 blocks on their own grid (through the final norm).

    Args:
        network: in evaluation mode on the runtime's device, with both encoders.
        runtime: device and precision.
        images: RGB, of any sizes; each is run alone.
        blocks: of DINOv2, counted from 1.
        adapted: whether every level is also taken after the head's adapters, beside the frozen one.
        random: encoders of random weights, "hiera" or "dino": their groups say so.
        progress: who is told.

    Returns:
        Hiera's group (S1 to S4, or S1, S1 adapted, ...) and DINOv2's.
    """
    import torch

    from dsu.data.decoding import ImageProcessor

    config = network.config
    processor = ImageProcessor(config)
    names = [f"S{level}" for level in LEVELS]
    maps = [f"V{block}" for block in blocks]
    found: dict[str, list[NDArray[np.float32]]] = {}
    with progress.task("computing features", len(images)) as task:
        for image in images:
            inputs = {name: pixels.to(runtime.device) for name, pixels in processor([image]).items()}
            with torch.no_grad(), runtime.autocast():
                computed = network.encode(inputs["pixel_values"], inputs["guide_values"], [*names, *maps])
                if adapted:
                    after = network.forward_intermediates(**inputs)
                    computed |= {name + _ADAPTED: after[name].permute(0, 2, 3, 1) for name in names}
            for name, tensor in computed.items():
                found.setdefault(name, []).append(tensor[0].float().cpu().numpy())
            task.advance()
    levels = [wanted for name in names for wanted in ([name, name + _ADAPTED] if adapted else [name])]
    return [
        FeatureGroup(
            f"SAM 2 Hiera ({config.hiera.name})",
            tuple(_level(name, found[name]) for name in levels),
            _RANDOM["hiera"] if "hiera" in random else "",
        ),
        FeatureGroup(
            f"DINOv2 ({config.dino.name})",
            tuple(_level(f"block {name[1:]}", found[name]) for name in maps),
            _RANDOM["dino"] if "dino" in random else "",
        ),
    ]


def _level(name: str, maps: Sequence[NDArray[np.float32]]) -> FeatureLevel:
    height, width, channels = maps[0].shape
    return FeatureLevel(f"{name}\n{height}×{width}×{channels}", tuple(maps), name.endswith(_ADAPTED))
