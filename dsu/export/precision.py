"""Lower precision: weights of 8 bits for processors, floats of 16 bits for GPUs.

Dynamic quantisation rounds the matrix products' weights to 8 bits and their inputs as they come. Static quantisation
rounds convolutions as well, in ranges found on images. What it costs is measured, part by part if it is too much.
"""

import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from dsu.export.graph import BESIDE, Arrays, Loss, loss_of, masks_of, silence
from dsu.export.runner import Model

if TYPE_CHECKING:
    import onnx

__all__ = ["halve", "quantize"]

LIMIT: Final = 1 / 255
"""Of the mean difference of masks that may come of rounding to 8 bits: a grey level."""

_PART: Final = re.compile(r"\bnetwork\.(dino|hiera|head\.\w+)")

Parts = Mapping[str, Sequence[str]]
"""Names of nodes by the part of the network and the operator, such as `dino MatMul`."""


def halve(source: Path, target: Path) -> None:
    """Write a float32 model in float16, its output still float32: for the CUDA provider."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with silence():
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True, disable_shape_infer=True)
        big = model.ByteSize() > BESIDE
        onnx.save(model, target, save_as_external_data=big, location=f"{target.name}.data")


def quantize(
    source: Path, target: Path, floating: Model, given: Arrays, calibration: Sequence[Arrays], threads: int
) -> tuple[Loss, list[str]]:
    """Write a float32 model in 8 bits; what it loses, and which parts stay in float.

    Args:
        source, target: the files.
        floating: the float32 model.
        given: images to measure on.
        calibration: images one by one, in whose ranges convolutions are rounded; none: they stay in float.
        threads: that compute while it is measured.
    """
    parts = _parts(source, ("MatMul", "Conv") if calibration else ("MatMul",))
    masks = masks_of(floating, given)

    def attempt(chosen: Parts) -> float:
        _quantize(source, target, chosen, calibration)
        return float(np.abs(masks_of(Model(target, "cpu", threads), given) - masks).mean())

    chosen = parts
    if attempt(parts) > LIMIT:
        alone = {name: attempt({name: nodes}) for name, nodes in parts.items()}
        spent = np.cumsum(sorted(alone.values()))
        cheap = sorted(alone, key=alone.__getitem__)[: int((spent <= LIMIT).sum())]
        chosen = {name: parts[name] for name in cheap}
        _quantize(source, target, chosen, calibration)
    return loss_of(Model(target, "cpu", threads), floating, given), sorted(parts.keys() - chosen.keys())


def _parts(source: Path, operators: Sequence[str]) -> Parts:
    import onnx

    model = onnx.load(source, load_external_data=False)
    constant = {one.name for one in model.graph.initializer}
    parts = defaultdict(list)
    for node in model.graph.node:
        if node.op_type in operators and node.input[1] in constant:
            parts[f"{_part_of(node)} {node.op_type}"].append(node.name)
    return dict(parts)


def _part_of(node: "onnx.NodeProto") -> str:
    """Which part of the network a node is of, from the module that torch notes."""
    noted = "/".join(entry.value for entry in node.metadata_props)
    found = _PART.findall(noted)
    return found[-1] if found else "network"


def _quantize(source: Path, target: Path, parts: Parts, calibration: Sequence[Arrays]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    products, convolutions = (
        [node for name, nodes in parts.items() if name.endswith(operator) for node in nodes]
        for operator in ("MatMul", "Conv")
    )
    beside = source.with_name(f"{source.name}.data").exists()  # what is made may still be too large for one file
    with silence(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = source
        if products:
            made = _step(folder, "products", source)
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
            before, made = made, _step(folder, "convolutions", source)
            quantize_static(
                before,
                made,
                _Reader(calibration),
                QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_quantize=convolutions,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=beside,
                calibration_cache_path=target.with_name("ranges.json"),  # found in the first attempt, on all of them
            )
        for file in target.parent.glob(f"{target.name}*"):
            file.unlink()
        for file in made.parent.glob(f"{source.name}*"):
            shutil.copyfile(file, target.with_name(file.name))


def _step(folder: str, name: str, source: Path) -> Path:
    """Where a step writes: under the model's own name, which weights beside it are found by."""
    path = Path(folder) / name
    path.mkdir()
    return path / source.name


class _Reader:
    """Images one by one, as onnxruntime's calibration asks for them."""

    def __init__(self, images: Sequence[Arrays]) -> None:
        self._left: Iterator[dict[str, NDArray[np.uint8]]] = iter(images)

    def get_next(self) -> Any:
        """The next image by input; None after the last."""
        return next(self._left, None)
