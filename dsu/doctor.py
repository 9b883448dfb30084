"""Check the installation: libraries, weights, data, folders and device, and suggest next steps. Downloads nothing."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from textwrap import shorten
from typing import Any, Final, Literal

import psutil

from dsu import __version__
from dsu.errors import DsuError

_LIBRARIES: Final = (
    *("torch", "torchvision", "sam2", "timm", "safetensors", "huggingface_hub", "zarr", "numcodecs"),
    *("numpy", "pillow", "pysodmetrics", "pydantic", "matplotlib"),
)

_TOGETHER: Final = "Install torch and torchvision together from the same registry."

_LIST_WIDTH: Final = 100
"""Maximum characters of a list of names in the text; JSON has all names."""


@dataclass(frozen=True)
class Fact:
    """The result of one check.

    Attributes:
        what: the checked item.
        text: the result for people.
        state: `broken` if dsu can't work with it.
        remedy: if the state is not `fine`, one sentence with the way out.
        value: the result for programs; None: `text`.
    """

    what: str
    text: str
    state: Literal["fine", "note", "broken"] = "fine"
    remedy: str | None = None
    value: Any = None


@dataclass(frozen=True)
class Diagnosis:
    """All facts by section, and the next steps, one sentence each, the most urgent first."""

    sections: Mapping[str, tuple[Fact, ...]]
    next_steps: tuple[str, ...]

    @property
    def facts(self) -> list[Fact]:
        """The facts of all sections."""
        return [fact for found in self.sections.values() for fact in found]

    @property
    def working(self) -> bool:
        """Whether nothing is broken."""
        return not any(fact.state == "broken" for fact in self.facts)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values by section and item, and a list of all facts that are not fine."""
        return {
            "working": self.working,
            **{
                section: {fact.what: fact.text if fact.value is None else fact.value for fact in found}
                for section, found in self.sections.items()
            },
            "problems": [
                {"what": fact.what, "state": fact.state, "reason": fact.text, "remedy": fact.remedy}
                for fact in self.facts
                if fact.state != "fine"
            ],
            "next": list(self.next_steps),
        }


def diagnose(
    data_root: Path,
    cache_root: Path,
    on_section: Callable[[str, Sequence[Fact]], None] = lambda name, facts: None,
) -> Diagnosis:
    """Run all checks.

    Args:
        data_root: folder of benchmarks.
        cache_root: folder of stores.
        on_section: called with each finished section. The section `machine` is the last, since it loads torch, which
            takes seconds.
    """
    sections: dict[str, tuple[Fact, ...]] = {}
    libraries_work = True
    for name, check in {
        "libraries": _libraries,
        "weights": _weights,
        "data": lambda: _data(data_root, cache_root),
        "folders": lambda: _folders(cache_root),
        "machine": _machine,
    }.items():
        if libraries_work or name == "folders":
            sections[name] = check()
            on_section(name, sections[name])
        if name == "libraries":
            libraries_work = all(fact.state != "broken" for fact in sections[name])
    return Diagnosis(sections, tuple(_next_steps(sections, data_root)))


def _libraries() -> tuple[Fact, ...]:
    found = [Fact("dsu", __version__), Fact("python", sys.version.split()[0])]
    for name in _LIBRARIES:
        try:
            found.append(Fact(name, version(name)))
        except PackageNotFoundError:
            remedy = f"Install dsu again with pip, which also installs {name}."
            found.append(Fact(name, "not installed", "broken", remedy))
    # Compare torchvision's pinned version instead of importing it, which takes as long as all other checks.
    lacking = {fact.what for fact in found if fact.state == "broken"}
    pinned = requires("torchvision") or () if not {"torch", "torchvision"} & lacking else ()
    pins = (re.match(r"torch\s*\(?\s*==\s*([\d.]+)", wanted) for wanted in pinned)
    built_for = next((pin[1] for pin in pins if pin), None)
    if built_for and built_for != version("torch").partition("+")[0]:
        found.append(Fact("torchvision's torch", f"built for {built_for}, not this one", "broken", _TOGETHER))
    return tuple(found)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _machine() -> tuple[Fact, ...]:
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        return (Fact("import torch", f"fails: {_one_line(error)}", "broken", _TOGETHER),)
    from dsu.runtime import choose_runtime

    try:
        runtime, gpus = choose_runtime(), _gpus()
    except (DsuError, RuntimeError) as error:
        remedy = "Compare with the output of `nvidia-smi`, or work without the GPU: CUDA_VISIBLE_DEVICES= ."
        return (Fact("device", f"can't be used: {_one_line(error).rstrip('.')}", "broken", remedy),)
    threads, limit = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    why = f"OMP_NUM_THREADS={limit}" if limit else "one per core"
    return (
        Fact("device", runtime.describe(), value=str(runtime.device)),
        Fact("precision", runtime.precision),
        *gpus,
        Fact("threads", f"{threads} ({why}; {os.cpu_count()} cores)", value=threads),
        _memory_of_machine(),
    )


def _memory_of_machine() -> Fact:
    try:
        memory = psutil.virtual_memory()
    except (OSError, RuntimeError) as error:  # such as a container without /proc
        return Fact("memory", f"not known: {_one_line(error)}")
    return _memory("memory", memory.available, memory.total)


def _gpus() -> list[Fact]:
    import torch

    if not torch.cuda.is_available():
        if not Path("/dev/nvidiactl").exists():
            return []
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        remedy = f"There is an NVIDIA GPU, but {built} and does not see it: compare with the output of `nvidia-smi`."
        return [Fact("GPU", "present, but not usable", "note", remedy)]
    return [
        _memory(f"cuda:{index}", *torch.cuda.mem_get_info(index), name=torch.cuda.get_device_name(index))
        for index in range(torch.cuda.device_count())
    ]


def _memory(what: str, free: int, total: int, **named: str) -> Fact:
    """The memory of the machine, or of a GPU with its `name`, in bytes."""
    text = ", ".join([*named.values(), f"{total / 1e9:.1f} GB, {free / 1e9:.1f} free"])
    return Fact(what, text, value={**named, "bytes": total, "free_bytes": free})


def _weights() -> tuple[Fact, ...]:
    from huggingface_hub import constants

    from dsu.config import PRESETS

    presets = [_preset(name, hiera, dino) for name, (hiera, dino, *_) in PRESETS.items()]
    cache = _writable("hub's cache", Path(constants.HF_HUB_CACHE), "Choose another download folder with HF_HOME.")
    if cache.state == "broken":  # a shared cache may be read-only
        cache = replace(cache, state="note")
    if constants.HF_HUB_OFFLINE:
        asked = "is not used (HF_HUB_OFFLINE)"
    elif any(fact.state == "note" for fact in presets):  # do not wait for the network
        asked = "is used if weights are missing here (not tried)"
    else:
        asked = "is not needed"
    return (
        *presets,
        *map(_named_file, ("DSU_HIERA", "DSU_DINO")),
        Fact("HF_HOME", os.environ.get("HF_HOME") or "not set"),
        cache,
        Fact("hub", asked, value=bool(constants.HF_HUB_OFFLINE)),
    )


def _named_file(variable: str) -> Fact:
    path = os.environ.get(variable)
    if not path or Path(path).is_file():
        return Fact(variable, path or "not set")
    remedy = f"{variable} names {path}, which does not exist: correct it, or unset it to use the hub's cache."
    return Fact(variable, f"{path}: does not exist", "broken", remedy)


def _preset(name: str, hiera: str, dino: str) -> Fact:
    """The local paths of a preset's weights, or where they are published."""
    from dsu.encoders.sources import locate, published_source

    texts, missing = [], []
    value: dict[str, str | None] = {}
    for encoder, shown, source in (
        ("hiera", f"Hiera {hiera}", published_source("hiera", hiera)),
        ("dino", f"DINOv2 {dino}", published_source("dino", dino)),
    ):
        path = locate(source) if source else None
        if source and path and path.is_file():
            value[encoder] = str(path)
            where = f"by {source.variable}" if os.environ.get(source.variable) else "in the hub's cache"
            texts.append(f"{shown} {where}")
        elif source:
            value[encoder] = None
            texts.append(f"{shown} missing")
            missing.append(f"{source.filename} from huggingface.co/{source.repository} ({source.option})")
    if not texts:
        return Fact(name, "random weights, no files needed", value={})
    remedy = f"Preset {name} needs {' and '.join(missing)}." if missing else None
    return Fact(name, ", ".join(texts), "note" if missing else "fine", remedy, value)


def _data(data_root: Path, cache_root: Path) -> tuple[Fact, ...]:
    from dsu.data.benchmarks import survey
    from dsu.features.stores import store_folders
    from dsu.heads.head_file import HEAD_FILE, runs_with

    try:
        benchmarks = {state.sought.name: state.pairs for state in survey(data_root) if state.found}
    except OSError as error:
        remedy = f"Make {error.filename or data_root} readable, or give another --data-root (DSU_DATA)."
        return (Fact("data root", f"{data_root} can't be read ({error.strerror or error})", "broken", remedy),)
    listed = ", ".join(f"{name} {pairs:,}" for name, pairs in benchmarks.items()) or "none"
    stores = [f"{folder.parent.name}/{folder.name}" for folder in store_folders(cache_root)]
    heads = sorted(run.name for run in runs_with(HEAD_FILE))
    return (
        Fact("data root", f"{data_root}{'' if data_root.is_dir() else ' (missing)'}", value=str(data_root)),
        Fact("benchmarks", listed, value=benchmarks),
        Fact("stores", shorten(", ".join(stores), _LIST_WIDTH, placeholder=" ...") or "none", value=stores),
        Fact("trained heads", shorten(", ".join(heads), _LIST_WIDTH, placeholder=" ...") or "none", value=heads),
    )


def _folders(cache_root: Path) -> tuple[Fact, ...]:
    from dsu_cache.remote import scratch, url_of

    try:
        temporary = _writable("temporary files", Path(tempfile.gettempdir()), "Choose another folder with TMPDIR.")
    except FileNotFoundError as error:
        remedy = "Free some space, or choose a writable folder with TMPDIR."
        temporary = Fact("temporary files", str(error.strerror or error), "broken", remedy)
    return (
        _writable("cache root", cache_root, "Give another --cache-root (DSU_CACHE).")
        if url_of(cache_root) is None
        else _writable("S3's scratch folder", scratch(), "Choose another folder with DSU_SCRATCH."),
        _writable("working folder", Path.cwd(), "Change to a writable folder, or give --out."),
        temporary,
    )


def _writable(what: str, folder: Path, remedy: str) -> Fact:
    """Whether a folder (or its nearest existing parent) is writable, and its free space."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    value: dict[str, Any] = {"path": str(folder), "writable": False, "free_bytes": None}
    try:
        value["free_bytes"] = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"dsu")
    except OSError as error:
        return Fact(what, f"{folder} can't be written ({error.strerror or error})", "broken", remedy, value)
    made = "" if there == folder.absolute() else ", created when needed"
    free = f"{value['free_bytes'] / 1e9:,.0f} GB free{made}"
    return Fact(what, f"{folder} ({free})", value={**value, "writable": True})


# ---- what to do next ----


def _next_steps(sections: Mapping[str, tuple[Fact, ...]], data_root: Path) -> list[str]:
    """Remedies if anything is broken; otherwise the next of the four commands."""
    by_name = {fact.what: fact for found in sections.values() for fact in found}
    broken = [fact.remedy or fact.text for fact in by_name.values() if fact.state == "broken"]
    if broken:
        return broken
    steps = [fact.remedy for fact in sections["machine"] if fact.remedy]
    if by_name["trained heads"].value:
        return [*steps, *_with_a_head()]
    if by_name["stores"].value:
        return [*steps, "Train from the stored features: `dsu train-head`."]
    large = by_name["large"]
    if large.state != "fine" and by_name["hub"].value:
        steps.append(f"{large.remedy} HF_HUB_OFFLINE forbids downloads: give them by path.")
    elif large.state != "fine":
        steps.append("The first `dsu cache-features` downloads missing weights from the hub.")
    train = [name.removesuffix("-TR") for name in by_name["benchmarks"].value if name.endswith("-TR")]
    where = f" --data-root {data_root}" if train and data_root != Path("data") and "DSU_DATA" not in os.environ else ""
    what = f"{train[0] if train else 'FOLDER'}{where}"
    return [*steps, f"Store features: `dsu cache-features {what}`; or try it all first: `dsu demo`."]


def _with_a_head() -> list[str]:
    """The next step with the newest head, which commands use by default."""
    from dsu.heads.head_file import HEAD_FILE, runs_with

    newest = runs_with(HEAD_FILE)[0]
    predictions = newest / "predictions"
    if (predictions / "metrics.json").exists():
        return [
            f"All four steps are done, {newest} is evaluated: see `dsu eval --report report.html` and `dsu head list`.",
            "Use its head: `dsu predict FOLDER --out masks`; or start with other data: `dsu cache-features "
            "NAME|FOLDER`.",
        ]
    if predictions.is_dir():
        return [f"Evaluate what {newest} predicted: `dsu eval`."]
    return ["Use the newest head: `dsu predict [FOLDER]`, then `dsu eval`."]
