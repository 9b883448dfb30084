"""A head's file: what trains and the batch norms' statistics, with all that is needed to load it alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsu import __version__
from dsu.architecture import Architecture
from dsu.errors import DsuError, UsageError, validation_reasons
from dsu.files import write_durably
from dsu.settings import StoredType, torch_type

__all__ = [
    "HEAD_FILE",
    "HeadInfo",
    "load_head",
    "read_head_info",
    "resolve_head",
    "save_head",
]

HEAD_FILE: Final = "head.safetensors"
FORMAT: Final = 1


class HeadInfo(BaseModel):
    """What stands in the metadata of a head's file.

    Attributes:
        architecture: of the network that the head belongs to.
        stored: the type to which the split rounds.
        encoders: digests of the frozen weights it was trained on, `hiera` and `dino`.
        dataset: the training split, and how to find its images again.
        training: the resolved settings of the run.
        epoch: epochs trained.
        metrics: of the held-out share, if any.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    version: str = __version__
    architecture: Architecture
    stored: StoredType | None = "float16"
    encoders: dict[str, str] = {}
    dataset: dict[str, Any] = {}
    training: dict[str, Any] = {}
    epoch: int = 0
    metrics: dict[str, float] = {}

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """`stored` as torch's type."""
        return None if self.stored is None else torch_type(self.stored)


def save_head(path: Path, state: Mapping[str, Tensor], info: HeadInfo) -> None:
    """Write a head so that at no moment a part of a file stands under its name. Raises as `write_durably`."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_durably(path, save(tensors, metadata={"dsu": info.model_dump_json()}))


def load_head(path: Path) -> tuple[dict[str, Tensor], HeadInfo]:
    """The state and the info of a head's file. Raises `DsuError` for a file that is none."""
    from safetensors.torch import load_file

    info = read_head_info(path)
    try:
        return load_file(path), info
    except (SafetensorError, OSError, ValueError) as error:
        raise DsuError(f"The head {path} is damaged ({error}): restore or train it again.") from error


def read_head_info(path: Path) -> HeadInfo:
    """The info alone, without the tensors. Raises `DsuError` for a file that is no head."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise DsuError(f"{path} can't be read as a head ({error}): give a head.safetensors that dsu wrote.") from error
    if "dsu" not in metadata:
        raise DsuError(f"{path} holds tensors but no dsu head: give a head.safetensors that dsu wrote.")
    try:
        content = json.loads(metadata["dsu"])
        if isinstance(content, dict) and content.get("format", FORMAT) > FORMAT:
            raise DsuError(f"The head {path} was written by dsu {content.get('version')}, which is newer: update dsu.")
        return HeadInfo.model_validate(content)
    except (TypeError, RecursionError) as error:
        raise DsuError(f"The head {path} has damaged settings: restore or train it again.") from error
    except ValidationError as error:
        reasons = validation_reasons(error)
        raise DsuError(
            f"The head {path} has settings that do not fit ({reasons}): restore or train it again."
        ) from error
    except ValueError as error:  # no JSON: pydantic's error is one as well, and comes first
        raise DsuError(f"The head {path} has damaged settings: restore or train it again.") from error


def resolve_head(given: Path | None, runs: Path = Path("runs")) -> Path:
    """A head's file from a run folder or a file, or the newest below `runs`. Raises `UsageError` if there is none."""
    if given is not None:
        path = given / HEAD_FILE if given.is_dir() else given
        if not path.is_file():
            raise UsageError(f"There is no head at {given}: give a run folder or a {HEAD_FILE}, or train one first.")
        return path
    found = sorted(runs.glob(f"*/{HEAD_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"There is no trained head below {runs}/: run `dsu train-head`, or give one with --head.")
    return found[-1]
