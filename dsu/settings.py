"""Settings of stage one, training, prediction and serving; defaults are the paper's recipe.

Each field is declared once, with its help text: it is an option of the command line (`dsu_cli.options`), a line of a
settings file (`dsu.settings_file`) and a row of docs/settings.md. Nothing here imports torch, to keep `--help` fast.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo, field_validator

from dsu.choices import BceKind, FeatureDtype, Normalization, Precision, PredictionKind, RegionKind
from dsu.config import Ablation, DSUNetConfig, build_config
from dsu.data.views import ALL_FLIPS, UNFLIPPED, Views
from dsu.errors import UsageError

if TYPE_CHECKING:
    from dsu.data.tiles import Tiling

WHERE: Final = "Paths"
NETWORK: Final = "Network"
_RECIPE: Final = "Recipe (the paper's by default)"
_MONITOR: Final = "Monitoring"
MACHINE: Final = "Machine"

PANELS: Final = ("Options", WHERE, NETWORK, _RECIPE, _MONITOR, MACHINE)
"""Option panels of the help, in order."""


def option(default: Any, help: str, panel: str = PANELS[0], *, metavar: str | None = None, **bounds: Any) -> Any:
    """A field with its help, panel and metavar for the command line; a metavar in brackets means an argument."""
    return Field(default, description=help, json_schema_extra={"panel": panel, "metavar": metavar}, **bounds)


def _split_names(text: object) -> object:
    """Split `V,S1` into names, without duplicates."""
    if isinstance(text, str):
        return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    return text


_Views = Annotated[Views, BeforeValidator(Views.parse), PlainSerializer(str)]
_Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]


WeightsOf = Literal["official"] | Mapping[str, str | Path] | None
"""Encoder weights in Python: the published files, files by `hiera` and `dino`, or None for random weights."""


@dataclass(frozen=True)
class EncoderWeights:
    """The source of a run's encoder weights.

    Attributes:
        hiera, dino: a checkpoint's path, or None for the environment variables DSU_HIERA and DSU_DINO and then
            the Hugging Face hub.
        random: fixed random weights instead of pretrained ones (always for the toy preset): for tests, benchmarks and
            demonstrations of speed, never for results.
        download: whether to download files missing in the hub's cache.
    """

    hiera: Path | None = None
    dino: Path | None = None
    random: bool = False
    download: bool = True

    @classmethod
    def of(cls, encoder_weights: WeightsOf) -> "EncoderWeights":
        """The source that `encoder_weights` names. Raises `UsageError` for any other value."""
        if encoder_weights is None:
            return cls(random=True)
        if encoder_weights == "official":
            return cls()
        if isinstance(encoder_weights, Mapping) and set(encoder_weights) <= {"hiera", "dino"}:
            files = {name: Path(path) for name, path in encoder_weights.items()}
            return cls(files.get("hiera"), files.get("dino"))
        raise UsageError(
            f"encoder_weights can't be {encoder_weights!r}: give 'official', None for random ones, or files by "
            "'hiera' and 'dino'."
        )

    @property
    def from_files(self) -> frozenset[str]:
        """Encoders with weights from a file (by path or variable), which may differ from the published weights."""
        named = {"hiera": self.hiera, "dino": self.dino}
        return frozenset(name for name, path in named.items() if path or os.environ.get(f"DSU_{name.upper()}"))

    def random_of(self, config: DSUNetConfig) -> frozenset[str]:
        """Encoders of a network ("hiera", "dino") with random weights."""
        names = {"hiera": config.hiera.name, "dino": config.dino.name}
        return frozenset(encoder for encoder, name in names.items() if self.random or name == "toy")


def _split_range(text: object) -> object:
    """Split `0,4095` into its two numbers."""
    return tuple(text.split(",")) if isinstance(text, str) else text


_Range = Annotated[tuple[float, float], BeforeValidator(_split_range)]


class Settings(BaseModel):
    """Validated immutable settings; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a boolean for a number, such as `epochs: yes`, which Python would accept as 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"must be a value, not {'yes' if value else 'no'}")
        return value


class NetworkSettings(Settings):
    """The encoders and their input sizes."""

    preset: str | None = option(
        None, "large (the paper), base, small, tiny or toy (default: the store's, or large).", NETWORK
    )
    hiera: str | None = option(None, "Replace Hiera: large, base_plus, small, tiny, toy.", NETWORK)
    dino: str | None = option(None, "Replace DINOv2: vitl14, vitb14, vits14, toy.", NETWORK)
    hiera_size: int | None = option(None, "Hiera's input size in pixels, a multiple of 32.", NETWORK, gt=0)
    dino_size: int | None = option(None, "DINOv2's input size in pixels, a multiple of 14.", NETWORK, gt=0)

    def config(self, *, adapt_last: int | None = None, ablation: Ablation = "none") -> DSUNetConfig:
        """The requested network. Raises `UsageError` for an unknown name or an impossible size."""
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
    """Tiles of large images."""

    tile: int | None = option(None, "Cut large images into tiles with this side, in pixels.", gt=0)
    overlap: int | None = option(None, "Minimum overlap of tiles in pixels (default: an eighth of --tile).", ge=0)

    @property
    def tiling(self) -> "Tiling | None":
        """The tiling. Raises `UsageError` for an invalid overlap."""
        from dsu.data.tiles import Tiling

        return Tiling.of(self.tile, self.overlap)


class RuntimeSettings(Settings):
    """Device and precision."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N.", MACHINE)
    precision: Precision = option(
        "auto",
        "auto uses the store's or the head's precision; otherwise bf16 on a GPU that supports it, else fp32.",
        MACHINE,
    )

    @field_validator("device")
    @classmethod
    def _is_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError(f"must be auto, cpu, cuda or cuda:N, not {value!r}")
        return value


class ExtractionSettings(Settings):
    """Settings of stage one."""

    features: _Names = option(
        ("V", "S1", "S2", "S3", "S4"),
        "Features to store besides pixels and mask: V, V1, ... (DINOv2's blocks), S1 to S4, B1, ... (tokens "
        "entering that "
        "block of Hiera).",
        metavar="NAME,...",
    )
    views: _Views = option(
        ALL_FLIPS,
        "Views of training images for which to store V: none, width, flips, or flips+K with K cached augmentations.",
    )
    level_views: _Views = option(UNFLIPPED, "Views for which to store Hiera's levels, likewise.")
    feature_dtype: FeatureDtype = option("float16", "Data type of stored features.")
    encoder_batch_size: int | None = option(
        None,
        "Batch size of the encoders, which affects the features' last bits (default: the store's; for a new store 8 "
        "on a GPU, else 1).",
        gt=0,
        le=4096,
    )
    compressor: Literal["zstd", "blosc"] | None = option(
        None, "Compress the store, 8 to 16 % smaller (default: not compressed)."
    )
    foreground: tuple[int, ...] | None = option(
        None, "Mask value that is foreground; may be given several times (default: detected)."
    )
    range: _Range | None = option(
        None,
        "Raw black and white values in images with more than 8 bits (default: found from all training images).",
        metavar="LOW,HIGH",
    )
    rebuild: bool = option(False, "Recompute features made with other weights or settings, instead of refusing.")


class PredictionSettings(TilingSettings):
    """Settings of prediction."""

    kind: PredictionKind = option(
        "mask", "An 8-bit mask, an overlay (the image with the mask in colour), or a cutout of the object."
    )
    threshold: float | None = option(
        None,
        "Binarise masks at this value in [0, 1] (default: soft masks; verdicts, overlays and cutouts use the head's "
        "threshold, or 0.5).",
        ge=0,
        le=1,
    )
    normalize: Normalization | None = option(
        None,
        "Stretch each mask to full range (default: minmax for benchmarks, as in the paper; none for everything else).",
    )
    tile: int | None = option(
        None, "Cut images into tiles with this side, in pixels (default: as in training; 0: whole images).", ge=0
    )
    batch_size: int = option(8, "Images or tiles per batch.", gt=0, le=4096)
    overwrite: bool = option(False, "Replace predictions of another head or other settings.")


class ServingSettings(Settings):
    """Settings of the server: its address, and limits on requests."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 accepts other machines.", metavar="ADDRESS")
    port: int = option(8000, "Port to listen on; 0 chooses a free one.", ge=0, le=65535)
    batch_size: int = option(8, "Maximum number of images per batch.", gt=0, le=4096)
    queue: int = option(32, "Maximum number of requests in progress; others get 503.", gt=0)
    max_megabytes: float = option(20, "Maximum size of a file in MB.", gt=0, le=4000)
    max_megapixels: float = option(50, "Maximum size of an image, and of a batch, in megapixels.", gt=0, le=500)
    upload_seconds: float = option(60, "Maximum time for a request to arrive, in seconds.", gt=0)


class TrainingSettings(NetworkSettings, TilingSettings, RuntimeSettings):
    """A run's settings (paper, Section IV.C): AdamW, a cosine schedule with one step per epoch, and flips."""

    dataset: str | None = option(
        None, "A benchmark's name or your own folder (default: what was cached last).", metavar="[NAME|FOLDER]"
    )
    end_to_end: bool = option(
        False, "Train from the images instead of the store, with the same data in the same order."
    )
    start_feature: str | None = option(None, "Stored feature to start from (default: the latest possible).")
    feature_dtype: FeatureDtype | None = option(
        None, "Data type that features are rounded to (default: the store's, or float16)."
    )
    encoder_batch_size: int | None = option(
        None,
        "Batch size of the frozen encoders (default: the store's, or 8 on a GPU and 1 on a CPU).",
        gt=0,
        le=4096,
    )

    adapt_last: int | None = option(
        None, "Number of Hiera's last blocks with adapters (default: all, as in the paper).", NETWORK, ge=0
    )
    ablation: Ablation = option("none", "Ablation A, B or C of the paper's Tables VII and VIII.", NETWORK)

    epochs: int = option(50, "Number of epochs.", _RECIPE, gt=0)
    batch_size: int = option(8, "Images per training step.", _RECIPE, gt=0)
    lr: float = option(1e-3, "Initial learning rate.", _RECIPE, gt=0)
    lr_min: float = option(1e-7, "Final learning rate of the cosine schedule.", _RECIPE, ge=0)
    weight_decay: float = option(5e-4, "AdamW's weight decay.", _RECIPE, ge=0)
    views: _Views = option(
        ALL_FLIPS, "Views to draw: flips, width, none, or flips+K with K stored cached augmentations.", _RECIPE
    )
    balance: bool = option(False, "Draw images with and without an object equally often.", _RECIPE)
    region: RegionKind = option("iou", "Region term of the loss; tversky is for rare foreground.", _RECIPE)
    tversky_beta: float = option(
        0.7, "Weight of misses in the Tversky index; false alarms get the rest (1 - beta).", _RECIPE, gt=0, lt=1
    )
    bce: BceKind = option("plain", "Cross-entropy term of the loss.", _RECIPE)
    focal_gamma: float = option(2.0, "Exponent of the focal BCE.", _RECIPE, ge=1)
    freeze_adapter_epochs: int = option(
        0, "Initial epochs without adapters, from Hiera's stored levels.", _RECIPE, ge=0
    )
    init_from: str | None = option(None, "Start from another head.", _RECIPE, metavar="PATH|OWNER/NAME")
    seed: int = option(0, "Seed of the head's initial weights and of all random draws.", _RECIPE, ge=0, lt=2**63)
    val_fraction: float | None = option(
        None, "Fraction of images held out for validation (default: 0 for a benchmark, else 0.1).", _RECIPE, ge=0, lt=1
    )
    test_fraction: float = option(
        0.0, "Fraction of images set apart for dsu eval, never seen in training.", _RECIPE, ge=0, lt=1
    )
    fold: str | None = option(None, "Hold out fold I of K instead, such as 2/5.", _RECIPE, metavar="I/K")
    group: str | None = option(
        None,
        "Groups that must stay in one split (patient, part, video): a regular expression on names, or a CSV file "
        "with lines `image,group` (default: images that look alike; .+: no groups).",
        _RECIPE,
        metavar="REGEX|FILE.csv",
    )
    val_every: int = option(1, "Epochs between validations.", _RECIPE, gt=0)
    keep: Literal["last", "best"] | None = option(
        None, "Which weights are the result (default: last for a benchmark or a fold, else best).", _RECIPE
    )
    checkpoint_steps: int | None = option(
        None,
        "Steps between checkpoints, from which an interrupted run resumes (default: after every epoch).",
        _RECIPE,
        gt=0,
    )

    sheet_every: int = option(5, "Epochs between sheets of predictions on the same images (0: none).", _MONITOR, ge=0)
    track: Literal["tensorboard", "wandb"] | None = option(None, "Also log the run there.", _MONITOR)

    gradient_checkpointing: bool = option(
        False, "Recompute adapted blocks in the backward pass: less memory, slower.", MACHINE
    )
    compile: bool | None = option(
        None, "Compile the adapted blocks with torch.compile (default: on a GPU, if it saves time overall).", MACHINE
    )
    deterministic: bool = option(
        False, "Use deterministic algorithms: on a GPU, the same run gives the same weights, more slowly.", MACHINE
    )

    @field_validator("fold")
    @classmethod
    def _is_fold(cls, value: str | None) -> str | None:
        found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", value or "1/2")
        if found is None or int(found[1]) > int(found[2]) or int(found[2]) < 2:
            raise ValueError(f"must be a fold of at least two, such as 2/5, not {value!r}")
        return value
