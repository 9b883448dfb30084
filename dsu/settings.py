"""What stage one, training and prediction can be told, with the paper's recipe as the default.

Each field is declared once, with its help: it is an option of the command line (`dsu_cli.options`), a line of
a settings file (`dsu.settings_file`) and a row of docs/settings.md. Nothing here imports torch, so that `--help` is
quick.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo, field_validator

from dsu.choices import BceKind, FeatureDtype, Normalization, Precision, PredictionKind, RegionKind
from dsu.config import Ablation, DSUNetConfig, build_config
from dsu.data.views import ALL_FLIPS, UNFLIPPED, Views

if TYPE_CHECKING:
    from dsu.data.tiles import Tiling

__all__ = [
    "MACHINE",
    "NETWORK",
    "PANELS",
    "WHERE",
    "EncoderWeights",
    "ExtractionSettings",
    "NetworkSettings",
    "PredictionSettings",
    "RuntimeSettings",
    "ServingSettings",
    "Settings",
    "TilingSettings",
    "TrainingSettings",
]

WHERE: Final = "Where things are"
NETWORK: Final = "Network"
_RECIPE: Final = "Recipe (the paper's by default)"
_WATCHING: Final = "Watching it"
MACHINE: Final = "Machine"

PANELS: Final = ("Options", WHERE, NETWORK, _RECIPE, _WATCHING, MACHINE)
"""Under which options stand in the help, in order."""


def option(default: Any, help: str, panel: str = PANELS[0], *, metavar: str | None = None, **bounds: Any) -> Any:
    """A field with what the command line shows of it; a metavar in brackets is that of an argument."""
    return Field(default, description=help, json_schema_extra={"panel": panel, "metavar": metavar}, **bounds)


def _listed(text: object) -> object:
    """`V,S1` taken apart, each name once."""
    if isinstance(text, str):
        return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    return text


_Views = Annotated[Views, BeforeValidator(Views.parse), PlainSerializer(str)]
_Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


@dataclass(frozen=True)
class EncoderWeights:
    """Where a run takes its encoders' weights from.

    Attributes:
        hiera, dino: a checkpoint's path, or None for the environment variables DSU_HIERA and DSU_DINO and then
            the Hugging Face hub.
        random: fixed random weights in place of pretrained ones (the toy preset always has them): for tests,
            benchmarks and demonstrations of speed, never for results.
        download: whether the hub may be asked for what its cache lacks.
    """

    hiera: Path | None = None
    dino: Path | None = None
    random: bool = False
    download: bool = True

    @property
    def from_files(self) -> frozenset[str]:
        """Which encoders' weights are named as files, by path or variable: no one knows them for the published ones."""
        named = {"hiera": self.hiera, "dino": self.dino}
        return frozenset(name for name, path in named.items() if path or os.environ.get(f"DSU_{name.upper()}"))

    def random_of(self, config: DSUNetConfig) -> frozenset[str]:
        """Which of a network's encoders, "hiera" and "dino", have random weights."""
        names = {"hiera": config.hiera.name, "dino": config.dino.name}
        return frozenset(encoder for encoder, name in names.items() if self.random or name == "toy")


def _two_numbers(text: object) -> object:
    """`0,4095` taken apart."""
    return tuple(text.split(",")) if isinstance(text, str) else text


_Range = Annotated[tuple[float, float], BeforeValidator(_two_numbers)]


class Settings(BaseModel):
    """Checked values that nothing changes afterwards; a field that there is not is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """`epochs: yes` is a slip, and Python would take it for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"must be a value, not {'yes' if value else 'no'}")
        return value


class NetworkSettings(Settings):
    """Which encoders, at which input sizes."""

    preset: str | None = option(
        None, "large (the paper), base, small, tiny or toy (default: the store's, else large).", NETWORK
    )
    hiera: str | None = option(None, "Another Hiera: large, base_plus, small, tiny, toy.", NETWORK)
    dino: str | None = option(None, "Another DINOv2: vitl14, vitb14, vits14, toy.", NETWORK)
    hiera_size: int | None = option(None, "Hiera's input in pixels, a multiple of 32.", NETWORK, gt=0)
    dino_size: int | None = option(None, "DINOv2's input in pixels, a multiple of 14.", NETWORK, gt=0)

    def config(self, *, adapt_last: int | None = None, ablation: Ablation = "none") -> DSUNetConfig:
        """The network that is asked for. Raises `UsageError` for an unknown name or an impossible size."""
        return build_config(
            self.preset or "large",
            hiera=self.hiera,
            dino=self.dino,
            hiera_size=self.hiera_size,
            dino_size=self.dino_size,
            adapt_last=adapt_last,
            ablation=ablation,
        )


class TilingSettings(Settings):
    """How large images are cut."""

    tile: int | None = option(None, "Cut images into tiles of this side in pixels, for large images.", gt=0)
    overlap: int | None = option(None, "Pixels that tiles share at least (default: an eighth of --tile).", ge=0)

    @property
    def tiling(self) -> "Tiling | None":
        """How images are cut. Raises `UsageError` for an overlap that does not fit."""
        from dsu.data.tiles import Tiling

        return Tiling.of(self.tile, self.overlap)


class RuntimeSettings(Settings):
    """What computes, and how precisely."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N.", MACHINE)
    precision: Precision = option(
        "auto", "auto is the store's or the head's, else bf16 on a GPU that computes it, else fp32.", MACHINE
    )

    @field_validator("device")
    @classmethod
    def _is_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError(f"must be auto, cpu, cuda or cuda:N, not {value!r}")
        return value


class ExtractionSettings(Settings):
    """What stage one stores, and how."""

    features: _Names = option(
        ("V", "S1", "S2", "S3", "S4"),
        "What to store beside pixels and mask: V, V1, ... (DINOv2's blocks), S1 to S4, B1, ... (tokens entering that "
        "block of Hiera).",
        metavar="NAME,...",
    )
    views: _Views = option(
        ALL_FLIPS, "Views of training images that keep V: none, width, flips, or flips+K with K cached augmentations."
    )
    level_views: _Views = option(UNFLIPPED, "Views that keep Hiera's levels, likewise.")
    feature_dtype: FeatureDtype = option("float16", "The type in which features are stored.")
    encoder_batch_size: int | None = option(
        None,
        "Images that the encoders see at once, part of what features are made of (default: the store's; a new one "
        "takes 8 on a GPU, else 1).",
        gt=0,
        le=4096,
    )
    compressor: Literal["zstd", "blosc"] | None = option(None, "8 to 16 % smaller (default: not compressed).")
    foreground: tuple[int, ...] | None = option(
        None, "Mask value that is foreground; may be given several times (default: recognised)."
    )
    range: _Range | None = option(
        None,
        "Raw values that are black and white in images of more than 8 bits (default: found from all of them).",
        metavar="LOW,HIGH",
    )
    rebuild: bool = option(False, "Compute anew what was made of something else, instead of refusing.")


class PredictionSettings(TilingSettings):
    """How masks are made and written."""

    kind: PredictionKind = option("mask", "An 8-bit mask, the image under a coloured mask, or the object cut out.")
    threshold: float | None = option(
        None,
        "Cut the mask at this value in [0, 1] (default: it stays soft; verdicts and pictures go by the head's own, "
        "else 0.5).",
        ge=0,
        le=1,
    )
    normalize: Normalization | None = option(
        None, "Stretch each mask (default: minmax for benchmarks, as in the paper; none for everything else)."
    )
    tile: int | None = option(
        None, "Cut images into tiles of this side in pixels (default: as in training; 0: whole).", ge=0
    )
    batch_size: int = option(8, "Images, or tiles, at once.", gt=0, le=4096)
    overwrite: bool = option(False, "Write over predictions of another head or other settings.")


class ServingSettings(Settings):
    """What a server takes on, and what it refuses."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.", metavar="ADDRESS")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    batch_size: int = option(8, "Images at once.", gt=0, le=4096)
    queue: int = option(32, "Requests at once, from their first byte to their answer; others get 503.", gt=0)
    max_megabytes: float = option(20, "The largest file that is taken.", gt=0, le=4000)
    max_megapixels: float = option(50, "The largest image that is decoded, and the most of a batch.", gt=0, le=500)
    upload_seconds: float = option(60, "Time in which a request has to arrive.", gt=0)


class TrainingSettings(NetworkSettings, TilingSettings, RuntimeSettings):
    """A run's settings (paper, Section IV.C): AdamW, cosine schedule stepped once an epoch, flips."""

    dataset: str | None = option(
        None, "A benchmark's name or a folder of yours (default: what was cached last).", metavar="[NAME|FOLDER]"
    )
    end_to_end: bool = option(False, "Compute everything from the images, same data and order.")
    start_feature: str | None = option(None, "Stored feature to start from (default: the latest that can serve).")
    feature_dtype: FeatureDtype | None = option(
        None, "Type to which features are rounded (default: the store's, else float16)."
    )
    encoder_batch_size: int | None = option(
        None,
        "Images that the frozen encoders see at once (default: the store's, else 8 on a GPU and 1 on a CPU).",
        gt=0,
        le=4096,
    )

    adapt_last: int | None = option(
        None, "How many of Hiera's blocks, from the end, carry adapters (default: all, the paper).", NETWORK, ge=0
    )
    ablation: Ablation = option("none", "A, B or C of the paper's Tables VII and VIII.", NETWORK)

    epochs: int = option(50, "Times that each image is drawn.", _RECIPE, gt=0)
    batch_size: int = option(8, "Images in a training step.", _RECIPE, gt=0)
    lr: float = option(1e-3, "Learning rate at the start.", _RECIPE, gt=0)
    lr_min: float = option(1e-7, "Learning rate at the end of its cosine.", _RECIPE, ge=0)
    weight_decay: float = option(5e-4, "AdamW's weight decay.", _RECIPE, ge=0)
    views: _Views = option(
        ALL_FLIPS, "Views drawn: flips, width, none, or flips+K with K cached augmentations that are stored.", _RECIPE
    )
    balance: bool = option(False, "Draw images with and without an object equally often.", _RECIPE)
    region: RegionKind = option("iou", "Region term of the loss; tversky is for rare foreground.", _RECIPE)
    tversky_beta: float = option(
        0.7, "A miss's weight in the Tversky index; a false alarm has the rest of 1.", _RECIPE, gt=0, lt=1
    )
    bce: BceKind = option("plain", "Cross-entropy term of the loss.", _RECIPE)
    focal_gamma: float = option(2.0, "Exponent of a focal BCE.", _RECIPE, ge=1)
    freeze_adapter_epochs: int = option(
        0, "Epochs at the start without adapters, from Hiera's stored levels.", _RECIPE, ge=0
    )
    init_from: str | None = option(None, "Start from another head.", _RECIPE, metavar="PATH|OWNER/NAME")
    seed: int = option(0, "Of the head and of what is drawn.", _RECIPE, ge=0, lt=2**63)
    val_fraction: float | None = option(
        None, "Share held out to validate on (default: 0 for a benchmark, else 0.1).", _RECIPE, ge=0, lt=1
    )
    test_fraction: float = option(
        0.0, "Share set apart that training never looks at, for dsu eval to judge by.", _RECIPE, ge=0, lt=1
    )
    fold: str | None = option(None, "Hold out part I of K instead, as 2/5.", _RECIPE, metavar="I/K")
    group: str | None = option(
        None,
        "What stays on one side when samples are held out (patient, part, video): what a regular expression finds in "
        "names, or lines `image,group` of a file (default: images that look alike, .+: none).",
        _RECIPE,
        metavar="REGEX|FILE.csv",
    )
    val_every: int = option(1, "Epochs between validations.", _RECIPE, gt=0)
    keep: Literal["last", "best"] | None = option(
        None, "Which state is the result (default: last for a benchmark, else best).", _RECIPE
    )
    checkpoint_steps: int | None = option(
        None, "Steps between checkpoints that a stopped run goes on from (default: after every epoch).", _RECIPE, gt=0
    )

    sheet_every: int = option(
        5, "Epochs between sheets of the same images as the head learns (0: none).", _WATCHING, ge=0
    )
    track: Literal["tensorboard", "wandb"] | None = option(None, "Follow the figures there too.", _WATCHING)

    gradient_checkpointing: bool = option(
        False, "Run adapted blocks again in the backward pass: less memory, slower.", MACHINE
    )
    compile: bool | None = option(
        None, "torch.compile the adapted blocks (default: on a GPU where it saves more time than it takes).", MACHINE
    )
    deterministic: bool = option(False, "On a GPU, the same weights from the same run, more slowly.", MACHINE)

    @field_validator("fold")
    @classmethod
    def _is_fold(cls, value: str | None) -> str | None:
        found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", value or "1/2")
        if found is None or int(found[1]) > int(found[2]) or int(found[2]) < 2:
            raise ValueError(f"must be a part of at least two, such as 2/5, not {value!r}")
        return value
