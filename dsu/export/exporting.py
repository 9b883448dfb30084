"""`dsu export`: a head and its encoders as one checked ONNX file, with a runner next to it.

Lower precision: 8-bit weights for CPUs, 16-bit floats for GPUs. Dynamic quantisation rounds the weights of matrix
products to 8 bits, and their inputs at run time. Static quantisation also rounds convolutions, with ranges from
calibration images. The loss is measured, and part by part if it is too large.
"""

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import onnx
import psutil
import torch
from jinja2 import StrictUndefined, Template
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

from dsu import __version__
from dsu.choices import ExportPrecision
from dsu.encoders.sources import published_source
from dsu.errors import DsuError, UsageError
from dsu.export.graph import (
    EXTERNAL_WEIGHTS_BYTES,
    Agreement,
    Arrays,
    Loss,
    compare,
    images_to_check,
    input_sizes,
    loss_of,
    masks_of,
    quiet_libraries,
    write_graph,
)
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import HeadInfo, head_sha256, load_head
from dsu.network.pretrained import load_network
from dsu.progress import SILENT, Progress
from dsu.runner import FORMAT, Model
from dsu.settings import EncoderWeights

RUNNER_FILE: Final = "dsu_runner.py"
STRAY: Final = ".export."
"""Prefix of temporary folders in which models are built, followed by the process id."""
CALIBRATED: Final = 32
"""Number of images for calibration."""
LIMIT: Final = 1 / 255
"""Largest accepted mean difference of masks after rounding to 8 bits: one grey level."""

_PART: Final = re.compile(r"\bnetwork\.(dino|hiera|head\.\w+)")

Parts = Mapping[str, Sequence[str]]
"""Names of nodes by the part of the network and the operator, such as `dino MatMul`."""


@dataclass(frozen=True)
class Exported:
    """What was written, its accuracy and its speed.

    Attributes:
        files: the written files, the model first.
        agreement: of the float32 model with torch.
        loss: of a lower precision relative to float32; None for float32.
        kept: parts that stay in float at 8 bits.
        threads: number of threads during timing.
    """

    files: tuple[Path, ...]
    agreement: Agreement
    loss: Loss | None
    kept: tuple[str, ...]
    threads: int


def export_model(
    head: Path,
    out: Path,
    weights: EncoderWeights,
    *,
    precision: ExportPrecision = "fp32",
    check: Path | None = None,
    calibrate: Path | None = None,
    threshold: float | None = None,
    licence: str = "apache-2.0",
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Exported:
    """Write a head's whole network as ONNX after checking it against torch, with a runner and a description.

    Args:
        head: the head's file.
        out: the model, whose name ends in .onnx.
        weights: where the encoders' weights are.
        precision: of the model; `fp16` is for GPUs.
        check: a folder of images for the check; None generates some.
        calibrate: a folder of calibration images for 8-bit convolutions; None keeps convolutions in float.
        threshold: at which the runner binarises masks; None keeps them soft.
        licence: of the head, as a hub identifier.
        overwrite: replace an earlier export.
        progress: receives progress.

    An incorrect model is not kept. Raises `UsageError` if a file exists or an argument is invalid, and `DsuError` if
    the model differs from torch or can't be written.
    """
    page = out.with_suffix(".md")
    _check_request(out, page, precision, calibrate, overwrite)
    pictures = images_to_check(check)
    state, info = load_head(head)
    network = load_network(state, info, EncoderWeights(weights.hiera, weights.dino, info.random_weights))
    network.encoder_batch_size = None  # suits a CPU; a GPU's blocks of eight would be padded for one image
    threads = torch.get_num_threads()
    facts = {
        **_facts(info, network.encoder_digests, licence),
        "head_sha256": head_sha256(head),
        "sizes": input_sizes(info.config),
        "threshold": threshold,
        "precision": precision,
    }
    make_folder(out.parent)
    _remove_strays(out.parent)
    with tempfile.TemporaryDirectory(prefix=f"{STRAY}{os.getpid()}.", dir=out.parent) as folder:
        made = Path(folder) / out.name
        progress.say(f"tracing the network ({info.config.encoders_name}) and writing {out}")
        write_graph(network, made)
        _write_metadata(made, facts, info)
        progress.say("checking it against torch")
        floating = Model(made, "cpu", threads)
        given = floating.inputs(pictures)
        agreement = compare(network, floating, given)
        if agreement.fault:
            raise DsuError(f"{out} is not written, since {agreement.fault}: this is a bug in dsu, please report it.")
        loss, kept = None, list[str]()
        if precision != "fp32":
            lower = Path(folder) / "lower" / out.name
            lower.parent.mkdir()
            progress.say(f"converting it to {precision} and measuring the loss")
            if precision == "int8":
                found = images_to_check(calibrate, CALIBRATED) if calibrate else []
                calibration = [floating.inputs([picture]) for picture in found]
                loss, kept = _quantize(made, lower, floating, given, calibration, threads)
            else:
                _halve(made, lower)
                loss = loss_of(Model(lower, "cpu", threads), floating, given)
            made = lower
        _write_metadata(made, facts | {"check": asdict(agreement), "loss": loss and asdict(loss), "kept": kept}, info)
        runner = out.parent / RUNNER_FILE
        atomic_write(runner, (files("dsu") / "runner.py").read_bytes())
        atomic_write(page, _page(out, facts, agreement, loss).encode())
        # The model last: if it exists, everything else does too.
        written = [_move(one, out.parent) for one in sorted(made.parent.glob(f"{out.name}*"), reverse=True)]
    return Exported((*reversed(written), runner, page), agreement, loss, tuple(kept), threads)


def _remove_strays(folder: Path) -> None:
    """Remove remains of killed exports."""
    for stray in folder.glob(f"{STRAY}*"):
        if not psutil.pid_exists(int(stray.name.split(".")[2])):
            shutil.rmtree(stray, ignore_errors=True)


def _check_request(out: Path, page: Path, precision: ExportPrecision, calibrate: Path | None, overwrite: bool) -> None:
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out} must end in .onnx.")
    if calibrate is not None and precision != "int8":
        raise UsageError(f"--calibrate is for --precision int8, not {precision}: give both, or omit it.")
    for file in (out, page):
        if file.exists() and not (overwrite and file.is_file()):
            raise UsageError(f"{file} already exists: give another --out, or --overwrite for an earlier export.")


def _facts(info: HeadInfo, digests: dict[str, str], licence: str) -> dict[str, Any]:
    """The facts that the runner and readers of the metadata need."""
    names = {"hiera": info.config.hiera.name, "dino": info.config.dino.name}
    encoders = {}
    for encoder, digest in digests.items():
        source = published_source(encoder, names[encoder]) if encoder in info.known_encoders else None
        encoders[encoder] = {
            "name": names[encoder],
            "repository": source and source.repository,
            "licence": source and source.licence,
            "sha256": digest,
        }
    tiling = info.tiling
    return {
        "format": FORMAT,
        "version": __version__,
        "preprocessing": "RGB uint8, each image resized to both sides bilinearly with antialiasing (Pillow); the model "
        "itself applies mean and standard deviation",
        "output": "logits; a sigmoid gives the mask, after they are resized bilinearly to the image's size",
        "tiling": tiling and [tiling.size, tiling.overlap],
        "depth": info.depth,
        "licence": licence,
        "encoders": encoders,
    }


def _write_metadata(path: Path, facts: dict[str, Any], info: HeadInfo) -> None:
    """Store facts in a model's metadata, and external weights in its file, unless they are too large."""
    data = path.with_name(f"{path.name}.data")
    inside = data.exists() and data.stat().st_size <= EXTERNAL_WEIGHTS_BYTES
    model = onnx.load(path, load_external_data=inside)
    onnx.helper.set_model_props(model, {"dsu": info.public.model_dump_json(), "dsu_export": json.dumps(facts)})
    path.write_bytes(model.SerializeToString())
    if inside:
        data.unlink()


def _page(out: Path, facts: dict[str, Any], agreement: Agreement, loss: Loss | None) -> str:
    text = (files("dsu.export") / "page.md.jinja").read_text("utf-8")
    page = Template(text, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return str(
        page.render(
            model=out.name, runner=RUNNER_FILE, facts=facts, agreement=agreement, loss=loss, data=f"{out.name}.data"
        )
    )


def _move(file: Path, folder: Path) -> Path:
    """Flush a file and move it to its place."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
    return file.replace(folder / file.name)


# ---- lower precision ----


def _halve(source: Path, target: Path) -> None:
    """Write a float32 model in float16, its output still float32: for the CUDA provider."""
    with quiet_libraries():
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=True)
        onnx.save(
            model,
            target,
            save_as_external_data=model.ByteSize() > EXTERNAL_WEIGHTS_BYTES,
            location=f"{target.name}.data",
        )


def _quantize(
    source: Path, target: Path, floating: Model, given: Arrays, calibration: Sequence[Arrays], threads: int
) -> tuple[Loss, list[str]]:
    """Write a float32 model in 8 bits; returns the loss, and the parts that stay in float.

    Args:
        source, target: the files.
        floating: the float32 model.
        given: images for measuring the loss.
        calibration: calibration images for convolutions, one by one; empty: convolutions stay in float.
        threads: number of threads for measuring.
    """
    parts = _parts(source, ("MatMul", "Conv") if calibration else ("MatMul",))
    masks = masks_of(floating, given)

    def attempt(chosen: Parts) -> float:
        _write_8_bits(source, target, chosen, calibration)
        return float(np.abs(masks_of(Model(target, "cpu", threads), given) - masks).mean())

    chosen = parts
    if attempt(parts) > LIMIT:
        alone = {name: attempt({name: nodes}) for name, nodes in parts.items()}
        spent = np.cumsum(sorted(alone.values()))
        cheap = sorted(alone, key=alone.__getitem__)[: int((spent <= LIMIT).sum())]
        chosen = {name: parts[name] for name in cheap}
        _write_8_bits(source, target, chosen, calibration)
    return loss_of(Model(target, "cpu", threads), floating, given), sorted(parts.keys() - chosen.keys())


def _parts(source: Path, operators: Sequence[str]) -> Parts:
    model = onnx.load(source, load_external_data=False)
    constant = {one.name for one in model.graph.initializer}
    parts = defaultdict(list)
    for node in model.graph.node:
        if node.op_type in operators and node.input[1] in constant:
            # The part of the network is in the module's name, which torch records in the metadata.
            noted = _PART.findall("/".join(entry.value for entry in node.metadata_props))
            parts[f"{noted[-1] if noted else 'network'} {node.op_type}"].append(node.name)
    return dict(parts)


def _write_8_bits(source: Path, target: Path, parts: Parts, calibration: Sequence[Arrays]) -> None:
    products, convolutions = (
        [node for name, nodes in parts.items() if name.endswith(operator) for node in nodes]
        for operator in ("MatMul", "Conv")
    )
    beside = source.with_name(f"{source.name}.data").exists()  # the result may still be too large for one file
    with quiet_libraries(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = source  # each step keeps the model's file name, since it refers to external weights by name
        if products:
            made = Path(tempfile.mkdtemp(dir=folder), source.name)
            quantize_dynamic(
                source,
                made,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=products,
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=beside,
                extra_options={"MatMulConstBOnly": True},
            )
        if convolutions:
            before, made = made, Path(tempfile.mkdtemp(dir=folder), source.name)
            quantize_static(
                before,
                made,
                SimpleNamespace(get_next=partial(next, iter(calibration), None)),  # images one by one, then None
                QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_quantize=convolutions,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=beside,
                calibration_cache_path=target.with_name("ranges.json"),  # from the first attempt, on all of them
            )
        for file in target.parent.glob(f"{target.name}*"):
            file.unlink()
        for file in made.parent.glob(f"{source.name}*"):
            shutil.copyfile(file, target.with_name(file.name))
