"""`dsu demo`: the whole pipeline on a synthetic data set."""

import time
from pathlib import Path
from typing import Annotated

import typer

from dsu.errors import DsuError
from dsu.progress import clock
from dsu.settings import EncoderWeights, TrainingSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, out as console

S_FLOOR = 0.65
"""A trained head reaches this S on the held-out split; an untrained one has about 0.35."""


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for data, features, run and figures.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(help="Number of epochs of stage two.")] = 10,
    train_images: Annotated[int, typer.Option("--train", help="Number of training images to generate.")] = 200,
    test_images: Annotated[int, typer.Option("--test", help="Number of test images to generate.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the data and of training.")] = 0,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Fail if the head has not learned.")] = True,
    quiet: options.Quiet = False,
) -> None:
    """Generate a synthetic data set and run cache-features, train-head, predict and eval on it, with toy encoders.

    Needs no download and takes a few minutes on two cores.
    """
    from dsu.data.synthetic import draw_dataset
    from dsu.training.callbacks import PROGRESS_FILE, SHEETS_FOLDER
    from dsu_cli.cache_features import cache_features
    from dsu_cli.evaluate import evaluate
    from dsu_cli.predict import predict
    from dsu_cli.train_head import train_head

    started = time.perf_counter()
    data, features, run = out / "data", out / "features", out / "run"
    progress = ConsoleProgress(quiet=quiet)

    def step(command: str) -> None:
        console.print(f"\n$ dsu {command}", style="bold", markup=False)

    draw_dataset(data, train=train_images, test=test_images, seed=seed, progress=progress)
    step(f"cache-features {data} --preset toy --features V")
    cache_features(dataset=str(data), cache_root=features, preset="toy", features="V", quiet=quiet)
    untrained = _untrained_head(data, features, out / "untrained", seed)
    step(f"train-head {data} --epochs {epochs}")
    train_head(
        dataset=str(data),
        cache_root=features,
        out=run,
        epochs=epochs,
        seed=seed,
        val_fraction=0.0,
        overwrite=True,
        quiet=quiet,
    )
    step(f"predict --head {run}")
    predict(head=run, cache_root=features, overwrite=True, quiet=quiet)
    predict(head=untrained, cache_root=features, overwrite=True, quiet=True)
    step(f"eval --predictions {run / 'predictions'}")
    evaluate(predictions=[run / "predictions"], quiet=quiet)
    _, before = _metrics(untrained.parent / "predictions")
    name, after = _metrics(run / "predictions")
    sheet = _picture_sheet(data, run / "predictions" / name, out / "sheet.png")
    console.print(
        f"\nuntrained head: S {before['S']:.3f}, MAE {before['MAE']:.3f}\n"
        f"trained head:   S {after['S']:.3f}, MAE {after['MAE']:.3f}   (in {clock(time.perf_counter() - started)})\n"
        f"examples:       {sheet}\n"
        f"learning:       {run / SHEETS_FOLDER / PROGRESS_FILE}\n\n"
        f"Your own images and masks:\n"
        f"  dsu cache-features FOLDER      (--preset large needs a GPU and the pretrained encoders)\n"
        f"  dsu train-head\n  dsu predict\n  dsu eval\n"
        f"A benchmark: dsu cache-features DUTS --data-root DIR",
        markup=False,
    )
    if check and (after["S"] < S_FLOOR or after["MAE"] > before["MAE"] / 2):
        raise DsuError(
            f"The head has not learned: S {after['S']:.3f} must be at least {S_FLOOR}, and MAE {after['MAE']:.3f} at "
            f"most half of {before['MAE']:.3f}; this is a bug in dsu, please report it."
        )


def _untrained_head(data: Path, features: Path, folder: Path, seed: int) -> Path:
    """The untrained head that training starts from, for comparison."""
    from dsu.data.datasets import Paths
    from dsu.heads.head_file import HEAD_FILE, save_head
    from dsu.training.runs import prepare_run

    trainer = prepare_run(
        TrainingSettings(dataset=str(data), seed=seed, val_fraction=0.0),
        paths=Paths(data, features),
        weights=EncoderWeights(),
    ).trainer
    folder.mkdir(parents=True, exist_ok=True)
    save_head(folder / HEAD_FILE, trainer.network.head.state_dict(), trainer.info)
    return folder / HEAD_FILE


def _metrics(predictions: Path) -> tuple[str, dict[str, float]]:
    """The name and the metrics of the only set."""
    from dsu.data.datasets import Paths
    from dsu.evaluation.ground_truth import find_evaluation_sets

    [evaluated] = find_evaluation_sets([], predictions, None, Paths(predictions))
    return evaluated.name, evaluated.evaluate().metrics


def _picture_sheet(data: Path, predictions: Path, path: Path, rows: int = 8) -> Path:
    """Draw image, ground truth and prediction side by side, for some of the held-out images."""
    from dsu.drawing import sheet

    chosen = sorted((data / "test" / "images").iterdir())[:rows]
    sheet(
        [[image, data / "test" / "masks" / f"{image.stem}.png", predictions / f"{image.stem}.png"] for image in chosen],
        ["image", "truth", "prediction"],
        path,
    )
    return path
