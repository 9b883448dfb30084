"""`dsu train-head`: stage two."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsu_cli import options

if TYPE_CHECKING:
    from dsu.training.trainer import Trainer

_RECIPE = "Recipe (the paper's by default)"
_WATCHING = "Watching it"


def train_head(
    dataset: Annotated[
        str | None, typer.Argument(metavar="[NAME|FOLDER]", help="Default: what was cached last.", show_default=False)
    ] = None,
    data_root: options.DataRoot = Path("data"),
    cache_root: options.CacheRoot = Path("features"),
    images: options.Images = None,
    masks: options.Masks = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The run's folder (default: a new one below runs/).")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Settings in YAML; options override it.")] = None,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Compute everything from the images, same data and order.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")] = False,
    tile: options.Tile = None,
    overlap: options.Overlap = None,
    adapt_last: options.AdaptLast = None,
    ablation: Annotated[
        str | None, typer.Option(help="A, B or C of the paper's Tables VII and VIII.", rich_help_panel="Network")
    ] = None,
    start_feature: Annotated[
        str | None,
        typer.Option("--start-feature", help="Stored point to start from (default: the latest that can serve)."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Default 50.", rich_help_panel=_RECIPE)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default 8.", rich_help_panel=_RECIPE)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, default 0.001.", rich_help_panel=_RECIPE)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default 0.0005.", rich_help_panel=_RECIPE)] = None,
    views: Annotated[
        str | None,
        typer.Option(
            help="Views drawn: flips (default), width, none, or flips+K with K stored extra ones.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    balance: Annotated[
        bool,
        typer.Option(
            "--balance", help="Draw images with and without an object equally often.", rich_help_panel=_RECIPE
        ),
    ] = False,
    region: Annotated[
        str | None,
        typer.Option(help="Region term of the loss: iou (default) or tversky.", rich_help_panel=_RECIPE),
    ] = None,
    tversky_beta: Annotated[
        float | None,
        typer.Option(
            help="A miss's weight in tversky, default 0.7; a false alarm has the rest.", rich_help_panel=_RECIPE
        ),
    ] = None,
    bce: Annotated[
        str | None, typer.Option(help="plain (default), weighted or focal.", rich_help_panel=_RECIPE)
    ] = None,
    focal_gamma: Annotated[float | None, typer.Option(help="Of focal, default 2.", rich_help_panel=_RECIPE)] = None,
    freeze_adapter_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs at the start without adapters, from Hiera's stored levels.", rich_help_panel=_RECIPE),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(metavar="PATH|OWNER/NAME", help="Start from another head.", rich_help_panel=_RECIPE),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default 0.", rich_help_panel=_RECIPE)] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share held out to validate on (default: 0 for benchmarks, 0.1 else).", rich_help_panel=_RECIPE
        ),
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(metavar="I/K", help="Hold out part I of K instead, as 2/5.", rich_help_panel=_RECIPE),
    ] = None,
    val_every: Annotated[
        int | None, typer.Option(help="Epochs between validations, default 1.", rich_help_panel=_RECIPE)
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="The result: last (default for benchmarks) or best.", rich_help_panel=_RECIPE),
    ] = None,
    checkpoint_steps: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints (default: after every epoch).", rich_help_panel=_RECIPE),
    ] = None,
    sheet_every: Annotated[
        int | None,
        typer.Option(
            help="Epochs between sheets of the same images as the head learns (default 5; 0: none).",
            rich_help_panel=_WATCHING,
        ),
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(
            help="Note figures with tensorboard, wandb or another tracker of accelerate's.", rich_help_panel=_WATCHING
        ),
    ] = None,
    preset: options.Preset = None,
    hiera: options.Hiera = None,
    dino: options.Dino = None,
    hiera_size: options.HieraSize = None,
    dino_size: options.DinoSize = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    random_weights: options.RandomWeights = False,
    device: Annotated[
        str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel="Machine")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Default: the store's.", rich_help_panel="Machine")
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Keep no activations of adapted blocks: less memory.",
            rich_help_panel="Machine",
        ),
    ] = False,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="torch.compile: minutes at the start, for long runs.", rich_help_panel="Machine"
        ),
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="On a GPU, the same weights from the same run, more slowly.",
            rich_help_panel="Machine",
        ),
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Stage two: train the head (adapters, fusion, decoder) from the store.

    Writes a run folder: `head.safetensors` (the result), `last` and `best`, `settings.yaml`, `metrics.csv`,
    `curves.png`, `sheets/` (the same images every few epochs) and the checkpoint that `--resume` goes on from.
    """
    given = dict(locals())
    from dsu.encoders.weights import EncoderWeights
    from dsu.training.runs import open_run
    from dsu_cli.console import ConsoleProgress, Stopped, err, key_table
    from dsu_cli.console import out as console
    from dsu_cli.parsing import settings_from
    from dsu_cli.training_panel import TrainingPanel

    progress = ConsoleProgress(quiet=quiet)
    settings = settings_from(config, given)
    run = open_run(
        settings,
        data_root=data_root,
        cache_root=cache_root,
        weights=EncoderWeights(hiera_weights, dino_weights, random_weights),
        out=out,
        images=images,
        masks=masks,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    trainer = run.trainer
    held_out = 0 if trainer.main.validation is None else len(trainer.main.validation.names)
    if not quiet:
        facts = [("data", f"{run.source.split}: {len(trainer.main.train.names):,} to train on, {held_out:,} held out")]
        facts += [(note.partition(": ")[0], note.partition(": ")[2]) for note in run.notes]
        console.print(key_table([*facts, ("run folder", str(trainer.out))]))
    try:
        if err.is_terminal and not quiet:
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


def _how_to_go_on(trainer: "Trainer") -> str:
    """Where a run was stopped, and what to type: the same command again would refuse its folder, or start anew."""
    import shlex

    resume = f"go on with `dsu train-head --resume --out {shlex.quote(str(trainer.out))}`."
    if trainer.settings.checkpoint_steps and trainer.step_in_epoch >= trainer.settings.checkpoint_steps:
        return f"Stopped within epoch {trainer.epoch + 1}: {resume}"
    if trainer.epoch:
        return f"Stopped after epoch {trainer.epoch}: {resume}"
    return "Stopped within the first epoch, of which nothing is kept: run the same command again to start anew."


def _summary(trainer: "Trainer") -> list[tuple[str, str]]:
    """What was reached, and which state is the result."""
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
    kept = "the best validated state" if trainer.keep_best else "the last state"
    return [
        *rows,
        ("result", f"{trainer.out / 'head.safetensors'} ({kept})"),
        ("curves", str(trainer.out / CURVES_FILE)),
        *([("sheets", str(progress))] if (progress := trainer.out / SHEETS_FOLDER / PROGRESS_FILE).exists() else []),
    ]
