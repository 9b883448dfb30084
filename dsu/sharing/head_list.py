"""Which trained heads there are, what each was trained on and how good it is."""

from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from dsu.errors import DsuError, UsageError
from dsu.heads.head_file import HEAD_FILE, read_head_info

__all__ = ["ListedHead", "find_heads"]


@dataclass(frozen=True)
class ListedHead:
    """A trained head in one line. Of one that can't be read only path, time and damage are known.

    Attributes:
        path: of its run folder.
        written: when it was.
        damage: why it can't be read, a sentence.
        data: the training split; None for a head of a published checkpoint.
        preset: of its network.
        adapt_last, depth: how many of Hiera's blocks have adapters, and how many there are.
        epoch, epochs: after which epoch of how many it was taken; of a published checkpoint the latter is None.
        tiled: whether it was trained, and so validated, on tiles of images.
        held_out: its metrics on the images (or tiles) held out; nothing where none were.
    """

    path: Path
    written: datetime
    damage: str | None = None
    data: str | None = None
    preset: str | None = None
    adapt_last: int = 0
    depth: int = 0
    epoch: int = 0
    epochs: int | None = None
    tiled: bool = False
    held_out: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"path": str(self.path), "written": self.written.isoformat(timespec="seconds")}


def find_heads(folder: Path) -> list[ListedHead]:
    """All heads below a folder, the newest first; damaged ones are among them.

    Raises `UsageError` where there is no such folder; a `runs` that no run has made yet is merely empty.
    """
    if not folder.is_dir() and folder != Path("runs"):
        raise UsageError(f"There is no folder {folder}: give one that holds run folders.")
    return sorted((_listed(file) for file in folder.rglob(HEAD_FILE)), key=lambda head: head.written, reverse=True)


def _listed(file: Path) -> ListedHead:
    written = datetime.fromtimestamp(file.stat().st_mtime).astimezone()
    try:
        info = read_head_info(file)
    except DsuError as error:
        return ListedHead(file.parent, written, str(error))
    split, epochs = info.dataset.get("split"), info.training.get("epochs")
    return ListedHead(
        path=file.parent,
        written=written,
        data=split if isinstance(split, str) else None,
        preset=info.config.preset,
        adapt_last=info.config.adapt_last,
        depth=info.config.hiera.depth,
        epoch=info.epoch,
        epochs=epochs if isinstance(epochs, int) else None,
        tiled=info.tiling is not None,
        held_out={name.removeprefix("val_"): figure for name, figure in info.metrics.items()},
    )
