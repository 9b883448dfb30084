"""docs/settings.md, made of the settings' fields: `python tests/settings_page.py` writes it."""

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
    Settings,
    TilingSettings,
    TrainingSettings,
)

PAGE: Final = Path(__file__).parents[1] / "docs" / "settings.md"

_INTRODUCTION: Final = """\
# Settings

Every setting is an option, `--batch-size 4`, and of a training run also a line of a settings file, `batch_size: 4`
(`train-head --config mine.yaml`; a run's own `settings.yaml` shows all). An option that is given goes over the file,
and one that is not leaves what the file says. Switches have two forms: `--balance` and `--no-balance`.

This page is made of the fields in `dsu/settings.py`: `python tests/settings_page.py` writes it anew.
"""

_SECTIONS: Final[dict[str, tuple[type[Settings], ...]]] = {
    "Training: `dsu train-head`, and as far as they vary there `dsu check-equivalence` and `dsu study`": (
        TrainingSettings,
    ),
    "Stage one: `dsu cache-features`": (ExtractionSettings, TilingSettings, NetworkSettings, RuntimeSettings),
    "Prediction: `dsu predict`": (PredictionSettings, RuntimeSettings),
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
