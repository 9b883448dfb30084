"""A head's file: trained parameters, batch norm statistics and metadata, sufficient to load it without other files."""

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
    from torch import Tensor

RUNS: Final = Path("runs")
"""The folder that contains run folders."""
HEAD_FILE: Final = "head.safetensors"
STATE_FILE: Final = "checkpoint.pt"
"""The checkpoint for resuming; without a head next to it, the run has not finished."""
RUN_LOCK: Final = "run.lock"
"""Locked by the process that trains the run, and released however that process ends."""
CONFIG_FILE: Final = "config.json"
"""Next to an exported head; run folders have none."""
FORMAT: Final = 1
_PUBLIC: Final = ("split", "dataset", "kind", "benchmark", "tile", "overlap", "depth")
"""Public facts about the data set: no image paths, no names of held-out images."""
IMAGE_DIGITS: Final = 12
"""Hexadecimal digits that identify an image: enough for a hundred million."""


class HeadInfo(BaseModel):
    """The metadata of a head's file.

    Attributes:
        config: the network's.
        feature_dtype: the type to which frozen features are rounded.
        encoders: digests of the frozen weights it was trained on, `hiera` and `dino`.
        dataset: the training split and how to find its images again.
        test: names of the training split's samples set apart for `dsu eval`.
        trained_on: `IMAGE_DIGITS` digits of each training image's SHA-256, joined in one text.
        trained_on_pixels: the same for decoded pixels, to recognise copies in other files.
        training: the resolved settings of the run.
        epoch: epochs trained.
        metrics: on the held-out images, if any.
        threshold: for verdicts, overlays and cutouts, in (0, 1]; None: none was chosen.
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
        """Whether an image was used for training; `contents`: the SHA-256 of its file, of its pixels, or both."""
        return any(content[:IMAGE_DIGITS] in self._images for content in contents)

    @cached_property
    def _images(self) -> frozenset[str]:
        text, step = self.trained_on + self.trained_on_pixels, IMAGE_DIGITS
        return frozenset(text[start : start + step] for start in range(0, len(text), step))

    @property
    def tiling(self) -> Tiling | None:
        """The tiling of the training images; None: none was recorded."""
        noted = [self.dataset.get(field) for field in ("tile", "overlap")]
        return Tiling.of(*noted) if all(type(number) is int for number in noted) else None

    @property
    def depth(self) -> tuple[float, float] | None:
        """The black and white point in training for images with more than 8 bits; None: none was recorded."""
        noted = self.dataset.get("depth")
        if isinstance(noted, list) and len(noted) == 2 and all(isinstance(one, int | float) for one in noted):
            return float(noted[0]), float(noted[1])
        return None

    @property
    def public(self) -> "HeadInfo":
        """A copy with only the public part: no local paths, no sample names."""
        dataset = {key: self.dataset[key] for key in _PUBLIC if key in self.dataset}
        training = {**self.training}
        if isinstance(training.get("init_from"), str):
            training["init_from"] = Path(training["init_from"]).name
        return self.model_copy(update={"dataset": dataset, "test": [], "training": training})

    @property
    def random(self) -> bool:
        """Whether any of its encoders has random weights, as the toy always has."""
        hiera, dino = self.config.hiera.name, self.config.dino.name
        used = (hiera, dino) if self.config.injections else (hiera,)
        return self.random_weights or "toy" in used

    @property
    def random_weights(self) -> bool:
        """Whether it was trained with --random-weights; every later use then draws the same weights."""
        return bool(self.training.get("random_weights", False))

    @property
    def known_encoders(self) -> tuple[str, ...]:
        """The encoders whose weights are known to be the published ones: weights given as a file may be any."""
        return () if self.random_weights else tuple(self.training.get("known_encoders", ("hiera", "dino")))

    @property
    def encoder_batch_size(self) -> int | None:
        """The encoder batch size in training; None: none was recorded."""
        size = self.training.get("encoder_batch_size")
        return size if type(size) is int and size > 0 else None


def image_digits(contents: Iterable[str]) -> str:
    """`HeadInfo.trained_on` or `trained_on_pixels` from the images' SHA-256."""
    return "".join(sorted({content[:IMAGE_DIGITS] for content in contents}))


def save_head(path: Path, state: "Mapping[str, Tensor]", info: HeadInfo) -> None:
    """Write a head atomically. Raises as `atomic_write`."""
    atomic_write(path, head_bytes(state, info))


def head_bytes(state: "Mapping[str, Tensor]", info: HeadInfo) -> bytes:
    """The content of a head's file."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return save(tensors, metadata={"dsu": info.model_dump_json()})


def load_head(path: Path) -> "tuple[dict[str, Tensor], HeadInfo]":
    """The state and the info of a head's file. Raises `DsuError` for any other file."""
    from safetensors.torch import load_file

    info = read_head_info(path)
    try:
        return load_file(path), info
    except (SafetensorError, OSError, ValueError) as error:
        raise DsuError(f"The head {path} is damaged ({error}): restore or train it again.") from error


def head_sha256(path: Path) -> str:
    """A head's identity: the SHA-256 of its tensors, without its metadata.

    For an exported model, the SHA-256 of its file. Raises `DsuError` for any other file.
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
    """Store a threshold with a head; the file's time does not change, and existing predictions stay valid.

    Raises `DsuError` as `load_head` and `atomic_write`.
    """
    state, info = load_head(path)
    written = path.stat()
    save_head(path, state, info.model_copy(update={"threshold": threshold}))
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))


def read_head_info(path: Path) -> HeadInfo:
    """The info without the tensors. Raises `DsuError` for any other file."""
    try:
        path.open("rb").close()  # safetensors reports every file that it can't open as missing
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise DsuError(f"{path} can't be read as a head ({error}): give a head.safetensors that dsu wrote.") from error
    if "dsu" not in metadata:
        raise DsuError(f"{path} contains tensors but no dsu head: give a head.safetensors that dsu wrote.")
    try:
        content = json.loads(metadata["dsu"])
        if isinstance(content, dict) and content.get("format", FORMAT) > FORMAT:
            raise DsuError(f"The head {path} was written by a newer dsu, {content.get('version')}: update dsu.")
        return HeadInfo.model_validate(content)
    except ValidationError as error:  # a ValueError too, so it comes first
        raise DsuError(
            f"The head {path} has settings that do not fit ({validation_reasons(error)}): restore or train it again."
        ) from error
    except (TypeError, ValueError, RecursionError) as error:  # not JSON
        raise DsuError(f"The head {path} has damaged settings: restore or train it again.") from error


def resolve_head(given: str | Path | None, revision: str | None = None) -> Path:
    """A head's file.

    Args:
        given: a run folder, an exported folder, a head's file, an exported model, or OWNER/NAME on the Hugging Face hub
            (a local path takes precedence); None: the newest head below `RUNS`.
        revision: branch, tag or commit of a repository on the hub.

    Raises `UsageError` if there is none, and as `dsu.hub.fetch`.
    """
    if revision is not None and (given is None or not is_hub_name(given)):
        raise UsageError(
            f"--revision needs a head on the Hugging Face hub, not {given or 'the newest run'}: omit it, or give "
            "OWNER/NAME."
        )
    if given is None:
        found = runs_with(HEAD_FILE)
        if not found:
            why = next(map(_unfinished_advice, runs_with(STATE_FILE)), "run `dsu train-head`")
            raise UsageError(f"There is no trained head below {RUNS}/: {why}, or give a head with --head.")
        return found[0] / HEAD_FILE
    if is_hub_name(given):
        return fetch(str(given), HEAD_FILE, revision)
    path = Path(given) / HEAD_FILE if Path(given).is_dir() else Path(given)
    if not path.is_file() and (path.parent / STATE_FILE).exists():
        raise UsageError(f"The run {path.parent} has no result yet: {_unfinished_advice(path.parent)}.")
    if not path.is_file():
        raise UsageError(
            f"There is no head at {given}: give a run folder, an exported folder, a {HEAD_FILE} or OWNER/NAME on the "
            f"Hugging Face hub, or train one first."
        )
    return path


def _unfinished_advice(run: Path) -> str:
    trained_by = _training_process(run)
    if trained_by is not None:
        return f"it is being trained by {trained_by}, wait until it ends"
    return f"its training was interrupted, resume it with `dsu train-head --resume --out {run}`"


def precision_of(info: HeadInfo, head: Path, asked: Precision) -> Precision:
    """The precision `asked` for; instead of `auto` that of training, if it was recorded.

    Raises `UsageError` if the record is no known precision.
    """
    if asked != "auto":
        return asked
    trained = info.training.get("precision", "auto")
    if trained not in get_args(Precision):
        raise UsageError(f"The precision in {head} can't be {trained!r}: train the head again.")
    return trained  # type: ignore[no-any-return]


def is_exported(head: Path) -> bool:
    """Whether a head's file is an exported model, by its extension."""
    return head.suffix == ".onnx"


def is_finished(folder: Path) -> bool:
    """Whether a run has finished its last epoch and written its result."""
    return (folder / HEAD_FILE).exists()


def _training_process(folder: Path) -> str | None:
    """Who is training a run (process, host, start, command); None if nobody is."""
    return holder(folder / RUN_LOCK)


def stopped_runs() -> list[Path]:
    """Interrupted runs (a checkpoint, no result, nobody training), newest first."""
    return [run for run in runs_with(STATE_FILE) if not is_finished(run) and _training_process(run) is None]


def runs_with(name: str) -> list[Path]:
    """Run folders that contain the file `name`, such as `predictions/table.csv`, newest first, without replaced runs,
    which are kept inside them."""
    found = sorted(RUNS.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    return [path.parents[name.count("/")] for path in reversed(found)]


def predictions_folder(given: str | Path | None, head: Path, kind: PredictionKind = "mask") -> Path:
    """The default prediction folder: in the head's run folder, one for each kind of prediction.

    For an exported head or one from the hub, a folder of its name below `RUNS`, so that nothing is written into the
    exported folder or the hub's cache.
    """
    run = head.parent
    if given is not None and is_hub_name(given):
        run = RUNS / str(given).replace("/", "--")
    elif (run / CONFIG_FILE).exists():
        run = RUNS / run.resolve().name
    return run / ("predictions" if kind == "mask" else f"{kind}s")
