"""A head's file: what trains and the batch norms' statistics, with all that is needed to load it alone."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from dsu import __version__
from dsu.choices import FeatureDtype, Precision, PredictionKind
from dsu.config import DSUNetConfig
from dsu.data.tiles import Tiling
from dsu.errors import DsuError, UsageError, validation_reasons
from dsu.files import atomic_write
from dsu.hub import fetch, is_hub_name
from dsu_cache import holder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "CONFIG_FILE",
    "HEAD_FILE",
    "IMAGE_DIGITS",
    "LOCK_FILE",
    "STATE_FILE",
    "HeadInfo",
    "head_bytes",
    "head_sha256",
    "image_digits",
    "is_exported",
    "is_finished",
    "living",
    "load_head",
    "precision_of",
    "predictions_folder",
    "read_head_info",
    "resolve_head",
    "save_head",
    "set_threshold",
    "stopped_runs",
]

HEAD_FILE: Final = "head.safetensors"
STATE_FILE: Final = "checkpoint.pt"
"""What a run goes on from; without a head beside it, the run has not come to its end."""
LOCK_FILE: Final = "run.lock"
"""Held by the process that trains the run, and free when that has ended, however it has."""
CONFIG_FILE: Final = "config.json"
"""Beside a head that was exported; no run folder has one."""
FORMAT: Final = 1
_PUBLIC: Final = ("split", "dataset", "kind", "benchmark", "tile", "overlap", "depth")
"""What is told of the data set: not where its images lie, nor what those that were held out are called."""
IMAGE_DIGITS: Final = 12
"""Hexadecimal digits by which an image is known again: enough to tell a hundred million apart."""


class HeadInfo(BaseModel):
    """What stands in the metadata of a head's file.

    Attributes:
        config: of the network that the head belongs to.
        feature_dtype: the type to which frozen features are rounded.
        encoders: digests of the frozen weights it was trained on, `hiera` and `dino`.
        dataset: the training split, and how to find its images again.
        test: names of the training split's samples that were set apart for `dsu eval`.
        trained_on: of each image that was trained on `IMAGE_DIGITS` digits of its SHA-256, all in one text.
        trained_on_pixels: likewise of its decoded pixels, by which a copy in another file is known.
        training: the resolved settings of the run.
        epoch: epochs trained.
        metrics: of the held-out share, if any.
        threshold: by which prediction says what is an alarm and what pictures show, in (0, 1]; None: nobody chose one.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    version: str = __version__
    config: DSUNetConfig
    feature_dtype: FeatureDtype | None = "float16"
    encoders: dict[str, str] = {}
    dataset: dict[str, Any] = {}
    test: list[str] = []
    trained_on: str = Field(default="", repr=False)
    trained_on_pixels: str = Field(default="", repr=False)
    training: dict[str, Any] = {}
    epoch: int = 0
    metrics: dict[str, float] = {}
    threshold: float | None = Field(default=None, gt=0, le=1)

    def was_trained_on(self, *contents: str) -> bool:
        """Whether an image was among those that it was trained on, by SHA-256 of its file or of its pixels."""
        return any(content[:IMAGE_DIGITS] in self._images for content in contents)

    @cached_property
    def _images(self) -> frozenset[str]:
        text, step = self.trained_on + self.trained_on_pixels, IMAGE_DIGITS
        return frozenset(text[start : start + step] for start in range(0, len(text), step))

    @property
    def tiling(self) -> Tiling | None:
        """How the images that it was trained on were cut."""
        noted = [self.dataset.get(field) for field in ("tile", "overlap")]
        return Tiling.of(*noted) if all(type(number) is int for number in noted) else None

    @property
    def depth(self) -> tuple[float, float] | None:
        """What is black and white in images of more than 8 bits, as it was in training."""
        noted = self.dataset.get("depth")
        if isinstance(noted, list) and len(noted) == 2 and all(isinstance(one, int | float) for one in noted):
            return float(noted[0]), float(noted[1])
        return None

    @property
    def public(self) -> "HeadInfo":
        """What of it is for others: without paths of this machine and names of samples."""
        dataset = {key: self.dataset[key] for key in _PUBLIC if key in self.dataset}
        training = {**self.training}
        if isinstance(training.get("init_from"), str):
            training["init_from"] = Path(training["init_from"]).name
        return self.model_copy(update={"dataset": dataset, "test": [], "training": training})

    @property
    def random(self) -> bool:
        """Whether any of its encoders' weights are random ones, as the toy's always are."""
        hiera, dino = self.config.hiera.name, self.config.dino.name
        used = (hiera, dino) if self.config.injections else (hiera,)
        return self.random_weights or "toy" in used

    @property
    def random_weights(self) -> bool:
        """Whether it was trained with --random-weights: then every use of it draws the same ones."""
        return bool(self.training.get("random_weights", False))

    @property
    def known_encoders(self) -> tuple[str, ...]:
        """Those whose weights are the published ones, as far as is known: given as a file they may be anyone's."""
        return () if self.random_weights else tuple(self.training.get("known_encoders", ("hiera", "dino")))

    @property
    def encoder_batch_size(self) -> int | None:
        """How many samples the frozen encoders saw at once in training."""
        size = self.training.get("encoder_batch_size")
        return size if type(size) is int and size > 0 else None

    @property
    def torch_feature_dtype(self) -> "torch.dtype | None":
        """`feature_dtype` as torch's type."""
        from dsu.runtime import torch_type

        return None if self.feature_dtype is None else torch_type(self.feature_dtype)


def image_digits(contents: Iterable[str]) -> str:
    """`HeadInfo.trained_on` or `trained_on_pixels` of some images, from their SHA-256."""
    return "".join(sorted({content[:IMAGE_DIGITS] for content in contents}))


def save_head(path: Path, state: "Mapping[str, Tensor]", info: HeadInfo) -> None:
    """Write a head so that at no moment a part of a file stands under its name. Raises as `atomic_write`."""
    atomic_write(path, head_bytes(state, info))


def head_bytes(state: "Mapping[str, Tensor]", info: HeadInfo) -> bytes:
    """What a head's file holds."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return save(tensors, metadata={"dsu": info.model_dump_json()})


def load_head(path: Path) -> "tuple[dict[str, Tensor], HeadInfo]":
    """The state and the info of a head's file. Raises `DsuError` for a file that is none."""
    from safetensors.torch import load_file

    info = read_head_info(path)
    try:
        return load_file(path), info
    except (SafetensorError, OSError, ValueError) as error:
        raise DsuError(f"The head {path} is damaged ({error}): restore or train it again.") from error


def head_sha256(path: Path) -> str:
    """By what a head is known: the SHA-256 of its tensors, whatever else its file says of them.

    Of an exported model that of its file. Raises `DsuError` for a file that is no head.
    """
    try:
        content = path.read_bytes()
        if is_exported(path):
            return hashlib.sha256(content).hexdigest()
        end = 8 + int.from_bytes(content[:8], "little")
        tensors = {name: about for name, about in json.loads(content[8:end]).items() if name != "__metadata__"}
    except (OSError, ValueError, AttributeError) as error:
        raise DsuError(f"{path} can't be read as a head ({error}): give a head.safetensors that dsu wrote.") from error
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode() + content[end:]).hexdigest()


def set_threshold(path: Path, threshold: float | None) -> None:
    """Store a head's threshold with it. It stays as new as it was, and what was predicted with it stays valid.

    Raises `DsuError` as `load_head` and `atomic_write`.
    """
    state, info = load_head(path)
    written = path.stat()
    save_head(path, state, info.model_copy(update={"threshold": threshold}))
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))


def read_head_info(path: Path) -> HeadInfo:
    """The info alone, without the tensors. Raises `DsuError` for a file that is no head."""
    try:
        path.open("rb").close()  # safetensors says of any file that it can't open that there is none
        with safe_open(path, framework="numpy") as file:
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


def resolve_head(given: str | Path | None, runs: Path = Path("runs"), revision: str | None = None) -> Path:
    """A head's file.

    Args:
        given: a run folder, an exported folder, a head's file, an exported model, or OWNER/NAME on the Hugging Face
            hub, which a path that is here goes before; None takes the newest head below `runs`.
        runs: where run folders lie.
        revision: branch, tag or commit of a repository on the hub.

    Raises `UsageError` where there is none, and as `dsu.hub.fetch`.
    """
    if revision is not None and (given is None or not is_hub_name(given)):
        raise UsageError(
            f"--revision is for heads on the Hugging Face hub, and {given or 'the newest run'} is none: leave it away, "
            f"or give OWNER/NAME."
        )
    if given is None:
        found = sorted(_runs_with(HEAD_FILE, runs), key=lambda run: (run / HEAD_FILE).stat().st_mtime)
        if not found:
            unfinished = sorted(_runs_with(STATE_FILE, runs), key=lambda run: (run / STATE_FILE).stat().st_mtime)
            why = _unfinished(unfinished[-1]) if unfinished else "run `dsu train-head`"
            raise UsageError(f"There is no trained head below {runs}/: {why}, or give one with --head.")
        return found[-1] / HEAD_FILE
    if is_hub_name(given):
        return fetch(str(given), HEAD_FILE, revision)
    path = Path(given) / HEAD_FILE if Path(given).is_dir() else Path(given)
    if not path.is_file() and (path.parent / STATE_FILE).exists():
        raise UsageError(f"The run {path.parent} has no result yet: {_unfinished(path.parent)}.")
    if not path.is_file():
        raise UsageError(
            f"There is no head at {given}: give a run folder, an exported folder, a {HEAD_FILE} or OWNER/NAME on the "
            f"Hugging Face hub, or train one first."
        )
    return path


def _unfinished(run: Path) -> str:
    trained_by = living(run)
    if trained_by is not None:
        return f"it is being trained by {trained_by}, wait until it ends"
    return f"its training was stopped, go on with it by `dsu train-head --resume --out {run}`"


def precision_of(info: HeadInfo, head: Path) -> Precision:
    """The precision of training, `auto` where it was not noted. Raises `UsageError` for one that there is not."""
    trained = info.training.get("precision", "auto")
    for precision in get_args(Precision):
        if trained == precision:
            return precision  # type: ignore[no-any-return]
    raise UsageError(f"The precision in {head} can't be {trained!r}: train the head again.")


def is_exported(head: Path) -> bool:
    """Whether a head's file is a model that `dsu export` wrote, by the ending of its name."""
    return head.suffix == ".onnx"


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its last epoch: only then its result is written."""
    return (folder / HEAD_FILE).exists()


def living(folder: Path) -> str | None:
    """Who is training a run (process, host, since when, command); None if no one is."""
    return holder(folder / LOCK_FILE)


def stopped_runs(runs: Path = Path("runs")) -> list[Path]:
    """Runs with a checkpoint and no result that no one is training, the one stopped last first."""
    found = [run for run in _runs_with(STATE_FILE, runs) if not is_finished(run) and living(run) is None]
    return sorted(found, key=lambda run: (run / STATE_FILE).stat().st_mtime, reverse=True)


def _runs_with(name: str, runs: Path) -> list[Path]:
    """Run folders that hold a file; old runs that were set aside lie deeper."""
    return [path.parent for path in runs.glob(f"*/{name}")]


def predictions_folder(
    given: str | Path | None, head: Path, kind: PredictionKind = "mask", runs: Path = Path("runs")
) -> Path:
    """Where predictions go if nobody says: into the head's run folder, pictures apart from masks.

    Those of a head that was exported or comes from the hub go into a folder of its name below `runs`: what is to be
    published, or lies in the hub's cache, is left as it is.
    """
    run = head.parent
    if given is not None and is_hub_name(given):
        run = runs / str(given).replace("/", "--")
    elif (run / CONFIG_FILE).exists():
        run = runs / run.resolve().name
    return run / ("predictions" if kind == "mask" else f"{kind}s")
