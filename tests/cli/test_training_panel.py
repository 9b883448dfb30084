"""The contents of the training panel during a run; test_visualize tests its looks."""

import io
import re
from collections.abc import Mapping
from pathlib import Path

from house import House
from rich.console import Console

from dsu.data.datasets import Paths
from dsu.settings import EncoderWeights, TrainingSettings
from dsu.training.callbacks import Callback
from dsu.training.epoch_log import EpochLog
from dsu.training.runs import prepare_run
from dsu.training.trainer import Trainer
from dsu_cli.training_panel import CAPTION, TrainingPanel


class Looks(Callback):
    """Renders the panel at every callback, before the panel's own callback."""

    def __init__(self, panel: TrainingPanel) -> None:
        self.panel, self.frames = panel, list[str]()

    def on_step_end(self, trainer: Trainer, log: EpochLog) -> None:
        self.look()

    def on_epoch_end(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        self.look()

    def look(self) -> None:
        shot = io.StringIO()
        Console(file=shot, width=90).print(self.panel.render())
        self.frames.append(shot.getvalue())


def test_progress_never_decreases_or_exceeds_the_total_and_terms_are_explained(house: House, tmp_path: Path) -> None:
    run = prepare_run(
        TrainingSettings(epochs=2, sheet_every=0, val_fraction=0.3, batch_size=2),
        paths=Paths(house.data, house.features),
        weights=EncoderWeights(),
    )
    run.trainer.out = tmp_path
    panel = TrainingPanel(Console(file=io.StringIO(), width=90), run.trainer)
    looks = Looks(panel)
    run.trainer.callbacks += [looks, panel]
    run.trainer.run(panel)
    looks.look()
    done = [int(percent) for frame in looks.frames for percent in re.findall(r"│ run .* (\d+)%", frame)]
    assert len(done) == len(looks.frames) and done == sorted(done) and done[-1] == 100
    assert all(CAPTION.strip() in frame for frame in looks.frames)
