"""A head, its network and its exported model."""

from dataclasses import dataclass
from pathlib import Path

from dsu.export.exporting import Exported
from dsu.network.network import DSUNet

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """A head, its network, and the result of `export_model`."""

    head: Path
    network: DSUNet
    made: Exported

    @property
    def model(self) -> Path:
        return self.made.files[0]
