"""`dsu export`: the whole network as ONNX, checked against torch, with a runner that needs no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from dsu.choices import ExportPrecision
from dsu.errors import check_installed
from dsu.settings import EncoderWeights
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, bytes_text, key_table
from dsu_cli.console import out as console

if TYPE_CHECKING:
    from dsu.export.exporting import Exported


def export(
    head: Annotated[
        Path | None,
        typer.Argument(
            metavar="HEAD|RUN",
            help="A run folder, head.safetensors or OWNER/NAME on the hub (default: the newest run).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.onnx", help="The model to write.")] = Path(
        "model.onnx"
    ),
    precision: Annotated[
        str,
        typer.Option(
            "--precision", metavar="fp32|int8|fp16", help="int8 is faster on processors; fp16 is for CUDA alone."
        ),
    ] = "fp32",
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FOLDER", help="Images to check it on (default: drawn ones).")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", metavar="FOLDER", help="Images by which int8 rounds convolutions, too."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=0, max=1, help="Where the runner cuts masks (default: they stay soft)."),
    ] = None,
    licence: options.Licence = "apache-2.0",
    overwrite: options.OverwriteExport = False,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a head and its encoders as one ONNX model, which runs without torch.

    It is written only if it gives torch's masks: logits within 0.001 of their deviation, stretched masks within a grey
    level. Beside it come a runner, `dsu_runner.py`, and a page about it; `dsu predict --head FILE.onnx` runs it too.
    """
    chosen = options.one_of("--precision", precision, get_args(ExportPrecision))
    options.file_to_write("--out", out)

    from dsu.heads.head_file import resolve_head

    head_file = resolve_head(head)
    check_installed("Exporting", "onnx", "onnxscript", "onnxruntime")
    from dsu.export.exporting import export_model  # with torch, which takes seconds to come

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
        f"logits within {right.logits:.1g} of their deviation, masks within {right.grey_levels:.2f} grey levels of "
        f"torch's, on {'drawn images' if check is None else f'images of {check}'} in batches of 1, 2 and 3",
    )
    speed = f"{right.seconds:.2f} s an image, torch {right.torch_seconds:.2f} s"
    yield "fp32", f"{speed} ({right.seconds / right.torch_seconds:.2f}x), {made.threads} threads"
    if made.loss is not None:
        loss = made.loss
        yield (
            f"{precision} costs",
            f"S {loss.S_before:.4f} to {loss.S:.4f}, MAE {loss.MAE:.4f}, up to {loss.grey_levels:.1f} grey levels, "
            f"against fp32's masks",
        )
        gained = f"{loss.seconds:.2f} s an image, fp32 {loss.float_seconds:.2f} s"
        on = "on this processor; it is for the CUDA provider" if precision == "fp16" else f"{made.threads} threads"
        yield f"{precision} takes", f"{gained} ({loss.seconds / loss.float_seconds:.2f}x), {on}"
    if made.kept:
        yield "left in float", ", ".join(made.kept)
