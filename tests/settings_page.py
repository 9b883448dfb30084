"""Generate docs/settings.md from the fields of settings: `python tests/settings_page.py` writes it."""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dsu.settings import (
    PANELS,
    ExtractionSettings,
    NetworkSettings,
    PredictionSettings,
    RuntimeSettings,
    ServingSettings,
    Settings,
    TilingSettings,
    TrainingSettings,
)

PAGE: Final = Path(__file__).parents[1] / "docs" / "settings.md"

_INTRODUCTION: Final = """\
# Settings

Every setting is an option (`--batch-size 4`). For a training run it is also a line of a settings file
(`batch_size: 4`), which `train-head --config mine.yaml` reads; each run keeps such a file as `settings.yaml`. Options
override the file. Switches have two forms: `--balance` and `--no-balance`.

`python tests/settings_page.py` generates this page from `dsu/settings.py`.

## Presets and weights

| preset | Hiera | DINOv2 | input in pixels | needs |
|---|---|---|---|---|
| `large` (the paper, the default) | L | ViT-L/14 | 352, 518 | a GPU with 24 GB |
| `base`, `small`, `tiny` | B+, S, T | ViT-B, S, S | 352, 518 | less |
| `toy` | minimal, random | minimal, random | 192, 266 | any machine; for trying things out |

Any pair works: `--hiera small --dino vitl14 --hiera-size 512`. The weights are the official SAM 2.1 and DINOv2
checkpoints. `dsu` downloads them from the Hugging Face hub into its usual cache, or reads files in Meta's or timm's
format: `--hiera-weights FILE` (`DSU_HIERA`) and `--dino-weights FILE` (`DSU_DINO`). It loads only weights and never
runs code from a checkpoint.
"""

_SECTIONS: Final[dict[str, tuple[type[Settings], ...]]] = {
    "Training: `dsu train-head`, `dsu study` and `dsu check-equivalence`, where they apply": (TrainingSettings,),
    "Stage one: `dsu cache-features`": (ExtractionSettings, TilingSettings, NetworkSettings, RuntimeSettings),
    "Prediction: `dsu predict`": (PredictionSettings, RuntimeSettings),
    "Serving: `dsu serve`": (ServingSettings, RuntimeSettings),
}


def settings_page() -> str:
    """The whole page."""
    return "\n".join([_INTRODUCTION, *(line for title, kinds in _SECTIONS.items() for line in _section(title, kinds))])


def _section(title: str, kinds: tuple[type[Settings], ...]) -> Iterator[str]:
    fields = [one for kind in kinds for one in kind.model_fields.items()]
    yield f"## {title}\n"
    for panel in PANELS:
        rows = [_row(name, field) for name, field in fields if _shown(field)["panel"] == panel]
        if rows:
            yield f"### {panel}\n"
            yield from ("| setting | value | default | what it does |", "|---|---|---|---|", *rows, "")


def _row(name: str, field: FieldInfo) -> str:
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    return f"| `{name}` | {_value(field)} | {shown} | {field.description} |"


def _value(field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(kind))
    words = {bool: "true or false", int: "whole number", float: "number", tuple[int, ...]: "whole numbers"}
    return words.get(kind, "text")  # type: ignore[call-overload,no-any-return]


def _shown(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
