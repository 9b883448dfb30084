"""`dsu export`: the whole network as ONNX, checked against torch, with a runner that needs no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from dsu.choices import ExportPrecision
from dsu.errors import check_installed
from dsu.settings import EncoderWeights
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, bytes_text, key_table, out as console

if TYPE_CHECKING:
    from dsu.export.exporting import Exported


def export(
    head: options.Head = None,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.onnx", help="The .onnx file to write.")] = Path(
        "model.onnx"
    ),
    precision: Annotated[
        str,
        typer.Option("--precision", metavar="fp32|int8|fp16", help="int8 is faster on CPUs; fp16 is for CUDA only."),
    ] = "fp32",
    check: Annotated[
        Path | None,
        typer.Option("--check", metavar="FOLDER", help="Folder of images for the check (default: synthetic images)."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FOLDER",
            help="Folder of images for calibration; with it, int8 also quantises convolutions.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", min=0, max=1, help="Threshold at which the runner binarises masks (default: soft masks)."
        ),
    ] = None,
    licence: options.Licence = "apache-2.0",
    overwrite: options.OverwriteExport = False,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a head and its encoders as one ONNX model, which runs without torch.

    The model is written only if it reproduces torch's masks: logits within 0.001 of their standard deviation,
    stretched masks within one grey level. Next to it are written a runner, `dsu_runner.py`, and a page that describes
    the model. `dsu predict --head FILE.onnx` runs it too.
    """
    chosen = options.one_of("--precision", precision, get_args(ExportPrecision))
    options.file_to_write("--out", out)

    from dsu.heads.head_file import resolve_head

    head_file = resolve_head(head)
    check_installed("Exporting", "onnx", "onnxscript", "onnxruntime")
    from dsu.export.exporting import export_model  # with torch, which takes seconds to load

    made = export_model(
        head_file,
        out,
        EncoderWeights(hiera_weights, dino_weights),
        precision=chosen,
        check=check,
        calibrate=calibrate,
        threshold=threshold,
        licence=licence,
        overwrite=overwrite,
        progress=ConsoleProgress(quiet=quiet),
    )
    if not quiet:
        console.print(key_table(_rows(made, chosen, check)))


def _rows(made: "Exported", precision: str, check: Path | None) -> Iterator[tuple[str, str]]:
    right = made.agreement
    for file in made.files:
        yield file.name, bytes_text(file.stat().st_size)
    yield (
        "check",
        f"logits within {right.logits:.1g} of their standard deviation, masks within {right.grey_levels:.2f} grey "
        f"levels of torch's, on {'synthetic images' if check is None else f'images of {check}'} in batches of 1, 2 "
        "and 3",
    )
    speed = f"{right.seconds:.2f} s per image, torch {right.torch_seconds:.2f} s"
    yield "fp32", f"{speed} ({right.seconds / right.torch_seconds:.2f}x), {made.threads} threads"
    if made.loss is not None:
        loss = made.loss
        yield (
            f"{precision} costs",
            f"S {loss.S_before:.4f} to {loss.S:.4f}, MAE {loss.MAE:.4f}, up to {loss.grey_levels:.1f} grey levels, "
            f"against fp32's masks",
        )
        gained = f"{loss.seconds:.2f} s per image, fp32 {loss.float_seconds:.2f} s"
        on = "on this CPU; it is meant for the CUDA provider" if precision == "fp16" else f"{made.threads} threads"
        yield f"{precision} takes", f"{gained} ({loss.seconds / loss.float_seconds:.2f}x), {on}"
    if made.kept:
        yield "kept in float", ", ".join(made.kept)
