"""Compute the features for a figure: Hiera's levels before and after the adapters, and DINOv2's blocks."""

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

MAX_IMAGES: Final = 24
"""Maximum number of images in a figure."""

_ADAPTED_SUFFIX: Final = " adapted"

_RANDOM_REMARKS: Final = {
    "hiera": "random weights: not what pretrained features look like",
    "dino": "random weights: untrained blocks look alike, pretrained ones do not",
}
"""Remarks in a figure about random encoders."""


# ---- images ----


@dataclass(frozen=True)
class ShownImage:
    """One image of a figure, in RGB, and its mask (any size, uint8 0..255) if it has one."""

    name: str
    image: Image.Image
    mask: NDArray[np.uint8] | None


def find_shown(
    sources: Sequence[str], masks: Path | None, count: int, paths: Paths, progress: Progress = SILENT
) -> tuple[list[ShownImage], list[str]]:
    """Read the given images with their masks.

    Args:
        sources: image files; folders of images, or of images and masks; names of benchmarks. If there are test splits,
            only these are used.
        masks: a folder of masks with the same names (paths below a folder, without extension).
        count: maximum number of images per source, evenly spaced, since neighbouring images are often alike.
        paths: the folders of benchmarks.
        progress: receives a message if images are omitted.

    Returns:
        The images; and a sentence for each image that was skipped because it or its mask can't be read.

    Raises:
        UsageError: more than `MAX_IMAGES` images, a source that does not exist or has no images, or a folder of masks
            without a mask of any of these images.
        UnreadableImage: none of the images can be read.
    """
    found: list[Pair] = []
    for source in sources:
        named = [pair for split in find_samples(source, paths) for pair in split.pairs]
        if len(named) > count:
            progress.say(f"{source}: {count} of {len(named):,} images (use --count for more)")
        found += [named[place] for place in np.linspace(0, len(named) - 1, min(count, len(named))).round().astype(int)]
    if len(found) > MAX_IMAGES:
        raise UsageError(f"{len(found)} images make too tall a figure: give {MAX_IMAGES} at most.")
    if masks is not None:
        files = pair_files([pair.name for pair in found], named_images(unwrapped(masks) if masks.is_dir() else masks))
        if not any(files):
            raise UsageError(
                f"{masks} contains no mask named like {found[0].name}: give the folder of their masks with --masks."
            )
        found = [replace(pair, mask=mask) for pair, mask in zip(found, files, strict=True)]
    return _read_images(found)


def find_head(given: str | None, progress: Progress = SILENT) -> str | None:
    """The given head, else the newest run's, which is reported, else None."""
    if given is not None:
        return given
    try:
        head = resolve_head(None)
    except UsageError:
        return None
    progress.say(f"head: {head}, the newest; give a network, such as --preset large, to show only encoders")
    return str(head)


def images_of_head(sources: Sequence[str], head: str | None, paths: Paths) -> tuple[Sequence[str], Paths]:
    """The named sources, else the data set that the head was trained on; and the folders in which to find it.

    Raises `UsageError` if there is neither.
    """
    dataset = {} if sources or head is None else read_head_info(resolve_head(head)).dataset
    if sources or "reference" not in dataset:
        if not sources:
            raise UsageError("There are no images to show: give image files, a folder or a benchmark.")
        return sources, paths
    try:
        source = SourceFolder(**{name: value for name, value in dataset.items() if name != "held_out"})
    except TypeError as error:
        raise UsageError(f"{head} has an invalid record of its training data: give the images to show.") from error
    return [source.reference], replace(
        paths, data_root=Path(source.data_root), images=source.images, masks=source.masks
    )


def _read_images(found: Sequence[Pair]) -> tuple[list[ShownImage], list[str]]:
    """Read images and masks, all masks in one format; also returns why others can't be read."""
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
    return [
        ShownImage(name, image, mask_format.read(mask, image=head) if mask else None)
        for name, image, head, mask, _ in opened
    ], list(map(str, broken))


# ---- features ----


@dataclass(frozen=True)
class FeatureLevel:
    """One level's features of several images.

    Attributes:
        title: the name, and in a second line the shape.
        maps: each image's tokens on their grid, (H, W, C) float32.
        adapted: whether this is the preceding level of its group, after the adapters.
    """

    title: str
    maps: tuple[NDArray[np.float32], ...]
    adapted: bool = False


@dataclass(frozen=True)
class FeatureGroup:
    """The levels of one encoder, in the order of their columns.

    Attributes:
        title: the encoder's name.
        levels: from first to last, each before and (if requested) after the adapters.
        remark: a warning for the figure's readers; empty for none.
    """

    title: str
    levels: tuple[FeatureLevel, ...]
    remark: str = ""


def choose_blocks(config: DSUNetConfig, asked: Sequence[int] | None) -> list[int]:
    """The DINOv2 blocks to show, counted from 1; None: those at the quarters of the depth (6, 12, 18, 24 of ViT-L).

    Raises `UsageError` for a block that does not exist.
    """
    depth = config.dino.depth
    if asked is None:
        return sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)})
    outside = [block for block in asked if not 1 <= block <= depth]
    if outside or not asked:
        named = f"block {outside[0]}" if outside else "none"
        raise UsageError(
            f"--dino-blocks contains {named}, but this DINOv2 has blocks 1 to {depth}: give some of these."
        )
    return sorted(set(asked))


def choose_network(
    head: str | None, weights: EncoderWeights, encoders: Mapping[str, Any]
) -> tuple[DSUNetConfig, EncoderWeights]:
    """The network whose features are shown, and the source of its encoders' weights.

    Args:
        head: a run folder or a head's file; None: only the encoders.
        weights: the source of the encoders' weights.
        encoders: `preset`, `hiera`, ... as in `build_config`, None for each that is not given; a head determines them
            itself.

    Raises `UsageError` if both a head and encoders are given, and `DsuError` if a given file of weights does not exist.
    """
    asked = {name: value for name, value in encoders.items() if value is not None}
    if head is not None and asked:
        option = next(iter(asked)).replace("_", "-")
        raise UsageError(f"A head has its own encoders, which --{option} would change: omit --{option} or --head.")
    if head is None:
        config = build_config(asked.pop("preset", "large"), **asked)
    else:
        info = read_head_info(resolve_head(head))
        config, weights = info.config, replace(weights, random=weights.random or info.random_weights)
    check_given(config, weights, hiera=True, dino=True)
    return config, weights


def open_network(head: str | None, config: DSUNetConfig, weights: EncoderWeights) -> "DSUNet":
    """Load the network chosen by `choose_network`, in evaluation mode with both encoders; without `head`, the network's
    head is untrained.

    Raises `DsuError` if it can't be loaded.
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
    """Compute every Hiera level, and the given DINOv2 blocks on their own grid (through the final norm).

    Args:
        network: in evaluation mode on the runtime's device, with both encoders.
        runtime: device and precision.
        images: RGB, of any sizes; each is processed separately.
        blocks: DINOv2's blocks, counted from 1.
        adapted: whether to include every level after the head's adapters, too, next to the frozen one.
        random: the encoders with random weights, "hiera" or "dino": their groups get a remark.
        progress: advances by every image.

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
                    computed |= {name + _ADAPTED_SUFFIX: after[name].permute(0, 2, 3, 1) for name in names}
            for name, tensor in computed.items():
                found.setdefault(name, []).append(tensor[0].float().cpu().numpy())
            task.advance()
    levels = [wanted for name in names for wanted in ([name, name + _ADAPTED_SUFFIX] if adapted else [name])]
    return [
        FeatureGroup(
            f"SAM 2 Hiera ({config.hiera.name})",
            tuple(_level(name, found[name]) for name in levels),
            _RANDOM_REMARKS["hiera"] if "hiera" in random else "",
        ),
        FeatureGroup(
            f"DINOv2 ({config.dino.name})",
            tuple(_level(f"block {name[1:]}", found[name]) for name in maps),
            _RANDOM_REMARKS["dino"] if "dino" in random else "",
        ),
    ]


def _level(name: str, maps: Sequence[NDArray[np.float32]]) -> FeatureLevel:
    height, width, channels = maps[0].shape
    return FeatureLevel(f"{name}\n{height}×{width}×{channels}", tuple(maps), name.endswith(_ADAPTED_SUFFIX))
