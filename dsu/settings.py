"""What a training run can be told, with the paper's recipe as the default, and settings files."""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from dsu.config import Ablation, BceKind, RegionKind
from dsu.data.tiles import Tiling
from dsu.data.views import Views
from dsu.errors import UsageError, validation_reasons
from dsu.runtime import Precision

__all__ = ["FeatureDtype", "TrainingSettings", "read_settings", "torch_type"]

_SWITCHES = ("balance", "compile", "deterministic", "end_to_end", "gradient_checkpointing")

_SWITCHES = ("balance", "compile", "deterministic", "end_to_end", "gradient_checkpointing")

FeatureDtype = Literal["float16", "float32"]
"""The type to which whatever crosses the split is rounded."""


def torch_type(feature_dtype: FeatureDtype) -> torch.dtype:
    """`float16` or `float32` as torch's type."""
    return {"float16": torch.float16, "float32": torch.float32}[feature_dtype]


class TrainingSettings(BaseModel):
    """A run's settings (paper, Section IV.C): AdamW, cosine schedule stepped once an epoch, flips."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dataset: str | None = None
    """A benchmark's name or a folder; None: the training set cached last."""
    preset: str | None = None
    """None: the preset of the store."""
    hiera: str | None = None
    dino: str | None = None
    hiera_size: int | None = Field(default=None, gt=0)
    dino_size: int | None = Field(default=None, gt=0)
    tile: int | None = Field(default=None, gt=0)
    """Side of the tiles that images are cut into; None: what is stored."""
    overlap: int | None = Field(default=None, ge=0)
    """Pixels that tiles share at least; None: an eighth of their side."""
    adapt_last: int | None = Field(default=None, ge=0)
    """None: adapters in front of all of Hiera's blocks, as in the paper."""
    ablation: Ablation = "none"

    epochs: int = Field(default=50, gt=0)
    batch_size: int = Field(default=8, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    lr_min: float = Field(default=1e-7, ge=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    region: RegionKind = "iou"
    """The loss's region term: the paper's `iou`, or `tversky` for rare foreground."""
    tversky_beta: float = Field(default=0.7, gt=0, lt=1)
    """What a miss weighs in the Tversky index; a false alarm weighs the rest of 1."""
    bce: BceKind = "plain"
    focal_gamma: float = Field(default=2.0, ge=1)
    """Of a `focal` BCE."""
    balance: bool = False
    """Draw images with and without an object equally often."""
    freeze_adapter_epochs: int = Field(default=0, ge=0)
    """Epochs at the start that train fusion and decoder without adapters, which then enter as the identity."""
    init_from: str | None = None
    """A head to start from."""
    views: Annotated[Views, BeforeValidator(Views.parse), PlainSerializer(str)] = Views()
    """`flips` of both axes, of the `width`, `none`; with cached augmentations that are kept: `flips+K`."""
    seed: int = Field(default=0, ge=0, lt=2**63)

    val_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Share of the training set held out; None: 0 for a benchmark, 0.1 for one's own data."""
    fold: str | None = None
    """`2/5` holds out the second of five parts, instead of a fraction."""
    val_every: int = Field(default=1, gt=0)
    """Epochs between validations."""
    keep: Literal["last", "best"] | None = None
    """Which state is the result; None: the last for a benchmark, the best for one's own data."""
    checkpoint_steps: int | None = Field(default=None, gt=0)
    """Optimiser steps between checkpoints, from which `--resume` goes on; None: they are made after every epoch."""
    gradient_checkpointing: bool = False
    """Run adapted blocks again in the backward pass instead of keeping their activations: less memory, slower."""
    compile: bool = False
    """Run Hiera's blocks through torch.compile: minutes at the start, for long runs on a GPU."""
    sheet_every: int = Field(default=5, ge=0)
    """Epochs between two sheets of the same images with the predictions of then; 0: none."""
    track: str | None = None
    """A tracker by the name that accelerate knows it by, such as `tensorboard`."""

    end_to_end: bool = False
    feature_dtype: FeatureDtype | None = None
    """None: the store's type (float16 where there is no store)."""
    start_feature: str | None = None
    """The point to resume from; None: the latest that the store can serve."""
    encoder_batch_size: int | None = Field(default=None, gt=0, le=4096)
    """Samples that the frozen encoders see at once; None: the store's, or what suits the device."""
    deterministic: bool = False
    """Use torch's deterministic algorithms: on a GPU the same run gives the same weights, more slowly."""
    device: str = "auto"
    precision: Precision = "auto"

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """`epochs: yes` is a slip, and Python would take it for 1."""
        if isinstance(value, bool) and info.field_name not in _SWITCHES:
            raise ValueError(f"must be a value, not {'yes' if value else 'no'}")
        return value

    @field_validator("fold")
    @classmethod
    def _is_fold(cls, value: str | None) -> str | None:
        found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", value or "1/2")
        if found is None or int(found[1]) > int(found[2]) or int(found[2]) < 2:
            raise ValueError(f"must be a part of at least two, such as 2/5, not {value!r}")
        return value

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut. Raises `UsageError` for an overlap that does not fit."""
        return Tiling.of(self.tile, self.overlap)


def read_settings(path: Path | None, overrides: Mapping[str, Any]) -> TrainingSettings:
    """Settings out of a YAML file with `overrides` on top (those that are not None).

    Raises `UsageError` naming the file and the field, or the option.
    """
    from_file = {} if path is None else _read_yaml(path)
    options = {name: value for name, value in overrides.items() if value is not None}

    def spell(field: str) -> str:
        return f"--{field.replace('_', '-')}" if field in options else field

    try:
        return TrainingSettings(**(from_file | options))
    except ValidationError as error:
        of_options = path is None or {item["loc"][0] for item in error.errors()} <= options.keys()
        where = "" if of_options else f"In the settings file {path}, "
        reasons = validation_reasons(error, TrainingSettings.model_fields, spell)
        raise UsageError(f"{where}{reasons}{'' if reasons.endswith('?') else '.'}") from error


class _Loader(yaml.SafeLoader):
    """Plain values only, and no field twice: YAML's own would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"The settings file {path} can't be read ({error.strerror}): check the path.") from error
    # Nesting without end exhausts the parser, dates that there are not are plain ValueErrors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            f"The settings file {path} is no valid YAML ({_yaml_reason(error)}): write `field: value` lines, such as "
            f"`epochs: 20`."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"The settings file {path} must hold `field: value` lines, such as `epochs: 20`.")
    return content


def _yaml_reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())[:160]
