"""`dsu train-head`: stage two."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsu.settings import EncoderWeights, TrainingSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, Stopped, err, key_table, out as console

if TYPE_CHECKING:
    from dsu.training.runs import Run
    from dsu.training.trainer import Trainer


@options.with_settings(TrainingSettings)
def train_head(
    given: Mapping[str, Any],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The run folder (default: a new one below runs/).")
    ] = None,
    config: options.Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again in a folder that already contains a run.")
    ] = False,
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    images: options.Images = None,
    masks: options.Masks = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    quiet: options.Quiet = False,
) -> None:
    """Stage two: train the head (adapters, fusion, decoder) from the store.

    Writes a run folder: `head.safetensors` (the result), `last` and `best`, `settings.yaml`, `metrics.csv`,
    `curves.png`, `sheets/` (the same images every few epochs) and the checkpoint for `--resume`.
    """
    from dsu.data.datasets import Paths
    from dsu.distributed import connect
    from dsu.settings_file import read_settings

    progress = ConsoleProgress(quiet=quiet)
    with ExitStack() as held:
        held.enter_context(connect())  # first, so that only one process reports errors
        settings = read_settings(TrainingSettings, given, config)
        from dsu.training.runs import open_run

        opened = open_run(
            settings,
            paths=Paths(data_root, cache_root, images, masks),
            weights=EncoderWeights(hiera_weights, dino_weights, random_weights),
            out=out,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
        run = held.enter_context(opened)
        trainer = run.trainer
        if not quiet:
            console.print(key_table(_facts(run)))
        try:
            if err.is_terminal and not quiet:
                from dsu_cli.training_panel import TrainingPanel

                panel = TrainingPanel(err, trainer)
                trainer.callbacks.append(panel)
                with panel.shown():
                    trainer.run(panel)
            else:
                trainer.run(progress)
        except KeyboardInterrupt:
            raise Stopped(_how_to_go_on(trainer)) from None
    if not quiet:
        console.print(key_table(_summary(trainer)))
        console.print("Next: `dsu predict`", markup=False)


def _facts(run: "Run") -> list[tuple[str, str]]:
    """What is known before the first step."""
    phase = run.trainer.main
    held_out = 0 if phase.validation is None else len(phase.validation.names)
    return [
        ("data", f"{run.source.split}: {len(phase.train.names):,} to train on, {held_out:,} held out"),
        *((label, text) for label, _, text in (note.partition(": ") for note in run.notes)),
        ("run folder", str(run.trainer.out)),
    ]


def _how_to_go_on(trainer: "Trainer") -> str:
    """Where a run stopped and how to resume it: the same command would refuse its folder or start again."""
    import shlex

    resume = f"resume with `dsu train-head --resume --out {shlex.quote(str(trainer.out))}`."
    if trainer.settings.checkpoint_steps and trainer.step_in_epoch >= trainer.settings.checkpoint_steps:
        return f"Stopped during epoch {trainer.epoch + 1}: {resume}"
    if trainer.epoch:
        return f"Stopped after epoch {trainer.epoch}: {resume}"
    return "Stopped during the first epoch, before the first checkpoint: run the same command again to start over."


def _summary(trainer: "Trainer") -> list[tuple[str, str]]:
    """The scores, and which weights are the result."""
    from dsu.training.callbacks import CURVES_FILE, PROGRESS_FILE, SHEETS_FOLDER

    last = trainer.history[-1]
    rows = [("loss", f"{last['loss']:.4f} after epoch {int(last['epoch'])}")]
    if trainer.best_epoch is not None:
        best = trainer.history[trainer.best_epoch - 1]
        for label, row in (("best", best), ("last", last)):
            if "val_S" in row:
                figures = f"S {row['val_S']:.4f}  MAE {row['val_MAE']:.4f}  IoU {row['val_IoU']:.4f}"
                rows.append(
                    (
                        f"{label} by S, held out" if label == "best" else f"{label}, held out",
                        f"{figures}  epoch {int(row['epoch'])}",
                    )
                )
        size = trainer.network.config.hiera_size
        own = f"measured at the network's input size, {size} x {size} px; `dsu eval` uses the images' own size"
        rows.append(("", f"{own}, so its scores differ"))
        if not best["val_IoU"]:
            rows.append(
                ("", "IoU counts pixels above 0.5, but no pixel is above it: `dsu eval` proposes lower thresholds")
            )
    kept = "the best weights on validation" if trainer.keep_best and trainer.best_epoch else "the last weights"
    return [
        *rows,
        ("result", f"{trainer.out / 'head.safetensors'} ({kept})"),
        ("curves", str(trainer.out / CURVES_FILE)),
        *([("sheets", str(progress))] if (progress := trainer.out / SHEETS_FOLDER / PROGRESS_FILE).exists() else []),
    ]
