"""Whether one can work here: device, libraries, weights, data, folders, and what to do next. Nothing is downloaded."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import psutil

from dsu import __version__
from dsu.doctor.findings import Finding
from dsu.doctor.next_steps import next_steps
from dsu.errors import DsuError

__all__ = ["Diagnosis", "diagnose"]

_LIBRARIES: Final = (
    *("torch", "torchvision", "sam2", "timm", "safetensors", "huggingface_hub", "zarr", "numcodecs"),
    *("tensorstore", "numpy", "pillow", "pysodmetrics", "pydantic", "matplotlib"),
)

_WIDTH: Final = 100  # letters of a list of names; JSON has all


@dataclass(frozen=True)
class Diagnosis:
    """All findings, by section, and what to do next: one line a step, the most urgent first."""

    sections: Mapping[str, tuple[Finding, ...]]
    next_steps: tuple[str, ...]

    @property
    def working(self) -> bool:
        """Whether nothing is broken."""
        return not any(finding.state == "broken" for found in self.sections.values() for finding in found)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: by section and thing, and the findings that are not fine once more by themselves."""
        return {
            "working": self.working,
            **{
                section: {finding.what: finding.text if finding.value is None else finding.value for finding in found}
                for section, found in self.sections.items()
            },
            "problems": [
                {"what": finding.what, "state": finding.state, "reason": finding.text, "remedy": finding.remedy}
                for found in self.sections.values()
                for finding in found
                if finding.state != "fine"
            ],
            "next": list(self.next_steps),
        }


def diagnose(data_root: Path, cache_root: Path, runs: Path = Path("runs")) -> Diagnosis:
    """Look at everything that work here depends on.

    Args:
        data_root: where benchmarks lie.
        cache_root: where stores lie.
        runs: where run folders lie.
    """
    libraries = _libraries()
    sections = {"libraries": libraries}
    if all(finding.state != "broken" for finding in libraries):
        sections = {
            "machine": _machine(),
            **sections,
            "weights": _weights(),
            "data": _data(data_root, cache_root, runs),
        }
    sections["folders"] = _folders(cache_root)
    return Diagnosis(sections, tuple(next_steps(sections, data_root, runs)))


def _libraries() -> tuple[Finding, ...]:
    found = [Finding("dsu", __version__), Finding("python", sys.version.split()[0])]
    for name in _LIBRARIES:
        try:
            found.append(Finding(name, version(name)))
        except PackageNotFoundError:
            remedy = f"Install dsu anew with pip: it brings {name} along."
            found.append(Finding(name, "not installed", "broken", remedy))
    return (*found, *_unfit(found))


def _unfit(found: list[Finding]) -> list[Finding]:
    """What is installed and does not load: torch, or a torchvision built for another torch (timm needs it).

    torchvision's pin is compared instead of importing it, which takes as long as all the rest.
    """
    if any(finding.what in ("torch", "torchvision") and finding.state != "fine" for finding in found):
        return []
    remedy = "Install torch and torchvision together from one registry."
    try:
        import torch  # noqa: F401 - whether it loads
    except Exception as error:  # whatever a broken installation raises
        return [Finding("import torch", f"fails: {' '.join(str(error).split())[:160]}", "broken", remedy)]
    pins = (re.match(r"torch\s*\(?\s*==\s*([\d.]+)", wanted) for wanted in requires("torchvision") or ())
    built_for = next((pin[1] for pin in pins if pin), None)
    if built_for in (None, version("torch").partition("+")[0]):
        return []
    return [Finding("torchvision's torch", f"built for {built_for}, not this one", "broken", remedy)]


def _machine() -> tuple[Finding, ...]:
    import torch

    from dsu.runtime import choose_runtime

    try:
        runtime, cards = choose_runtime(), _cards()
    except (DsuError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        remedy = "Compare with what `nvidia-smi` says, or work without the card: CUDA_VISIBLE_DEVICES= ."
        return (Finding("device", f"can't be used: {reason}", "broken", remedy),)
    threads = torch.get_num_threads()
    limit = os.environ.get("OMP_NUM_THREADS")
    why = f"OMP_NUM_THREADS={limit}" if limit else "one a core"
    memory = psutil.virtual_memory()
    sizes = {"bytes": memory.total, "free_bytes": memory.available}
    return (
        Finding("device", runtime.describe(), value=str(runtime.device)),
        Finding("precision", runtime.precision),
        *cards,
        Finding("threads", f"{threads} ({why}; {os.cpu_count()} cores)", value=threads),
        Finding("memory", _sizes(memory.total, memory.available), value=sizes),
    )


def _cards() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if not Path("/dev/nvidiactl").exists():
            return []
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        remedy = f"There is an NVIDIA card, but {built} and does not see it: compare with what `nvidia-smi` says."
        return [Finding("card", "there, but not usable", "note", remedy)]
    found = []
    for index in range(torch.cuda.device_count()):
        name, (free, total) = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)
        value = {"name": name, "bytes": total, "free_bytes": free}
        found.append(Finding(f"cuda:{index}", f"{name}, {_sizes(total, free)}", value=value))
    return found


def _sizes(total: int, free: int) -> str:
    return f"{total / 1e9:.1f} GB, {free / 1e9:.1f} free"


def _weights() -> tuple[Finding, ...]:
    from huggingface_hub import constants

    from dsu.config import PRESETS

    presets = [_preset(name, hiera, dino) for name, (hiera, dino, *_) in PRESETS.items()]
    found = [*presets]
    for variable in ("DSU_HIERA", "DSU_DINO"):
        path = os.environ.get(variable)
        if path and not Path(path).is_file():
            remedy = f"{variable} names {path}, where there is no file: mend it, or unset it to use the hub's cache."
            found.append(Finding(variable, f"{path}: no file is there", "broken", remedy))
        else:
            found.append(Finding(variable, path or "not set"))
    found.append(Finding("HF_HOME", os.environ.get("HF_HOME") or "not set"))
    cache = _writable(
        "hub's cache", Path(constants.HF_HUB_CACHE), "Name another folder for what is fetched by HF_HOME."
    )
    # One that is shared may well be read alone.
    found.append(replace(cache, state="note") if cache.state == "broken" else cache)
    found.append(_hub(bool(constants.HF_HUB_OFFLINE), any(finding.state == "note" for finding in presets)))
    return tuple(found)


def _hub(offline: bool, lacking: bool) -> Finding:
    """Whether the hub would be asked for encoders. It is not tried: a doctor answers at once."""
    if offline:
        return Finding("hub", "is not asked (HF_HUB_OFFLINE)", value=True)
    text = "is asked when weights are wanted that are not here (not tried)" if lacking else "need not be asked"
    return Finding("hub", text, value=False)


def _preset(name: str, hiera: str, dino: str) -> Finding:
    """Whether a preset's weights are at hand, and where."""
    from dsu.encoders.weights import locate, published_source

    texts, missing, value = [], [], {}
    for encoder, shown, source in (
        ("hiera", f"Hiera {hiera}", published_source("hiera", hiera)),
        ("dino", f"DINOv2 {dino}", published_source("dino", dino)),
    ):
        if source is None:
            continue
        path = locate(source)
        at_hand = path is not None and path.is_file()
        value[encoder] = str(path) if at_hand else None
        if at_hand:
            where = f"by {source.variable}" if os.environ.get(source.variable) else "in the hub's cache"
            texts.append(f"{shown} {where}")
        else:
            texts.append(f"{shown} not here")
            missing.append(f"{source.filename} from huggingface.co/{source.repository} ({source.option})")
    if not texts:
        return Finding(name, "random weights, none are needed", value={})
    remedy = f"Preset {name} wants {' and '.join(missing)}." if missing else None
    return Finding(name, ", ".join(texts), "note" if missing else "fine", remedy, value)


def _data(data_root: Path, cache_root: Path, runs: Path) -> tuple[Finding, ...]:
    from dsu.data.benchmarks import survey
    from dsu.features.stores import store_folders

    try:
        benchmarks = {state.sought.name: state.pairs for state in survey(data_root) if state.found}
    except OSError as error:
        remedy = f"Make {error.filename or data_root} readable, or give another --data-root (DSU_DATA)."
        return (Finding("data root", f"{data_root} can't be read ({error.strerror or error})", "broken", remedy),)
    listed = ", ".join(f"{name} {pairs:,}" for name, pairs in benchmarks.items()) or "none"
    stores = [f"{folder.parent.name}/{folder.name}" for folder in store_folders(cache_root)]
    heads = sorted(path.parent.name for path in runs.glob("*/head.safetensors"))
    return (
        Finding("data root", f"{data_root}{'' if data_root.is_dir() else ' (not there)'}", value=str(data_root)),
        Finding("benchmarks", listed, value=benchmarks),
        Finding("stores", shorten(", ".join(stores), _WIDTH, placeholder=" ...") or "none", value=stores),
        Finding("trained heads", shorten(", ".join(heads), _WIDTH, placeholder=" ...") or "none", value=heads),
    )


def _folders(cache_root: Path) -> tuple[Finding, ...]:
    found = [_writable("cache root", cache_root, "Give another --cache-root (DSU_CACHE).")]
    found.append(_writable("working folder", Path.cwd(), "Change to a folder that you may write, or give --out."))
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        remedy = "Free some space, or name a folder that you may write with TMPDIR."
        return (*found, Finding("temporary files", str(error.strerror or error), "broken", remedy))
    return (*found, _writable("temporary files", temporary, "Name another folder with TMPDIR."))


def _writable(what: str, folder: Path, remedy: str) -> Finding:
    """Whether a folder, or the nearest one above it that is there, can be written into, and how much is free."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    value: dict[str, Any] = {"path": str(folder), "writable": False, "free_bytes": None}
    try:
        value["free_bytes"] = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"dsu")
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding(what, f"{folder} can't be written ({reason})", "broken", remedy, value)
    made = "" if there == folder.absolute() else ", made when needed"
    free = f"{value['free_bytes'] / 1e9:,.0f} GB free{made}"
    return Finding(what, f"{folder} ({free})", value={**value, "writable": True})
