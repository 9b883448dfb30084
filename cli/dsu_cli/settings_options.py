"""Options out of settings: every field becomes one, with its help and panel."""

from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter, Signature, signature
from types import NoneType
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.models import ParameterInfo

from dsu.settings import PANELS, Settings

__all__ = ["Command", "option_of", "with_parameters", "with_settings"]

Command = Callable[..., None]


def with_settings(*kinds: type[Settings], without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command an option for every field of `kinds` beside its own; it takes them together, as `given`.

    One that was not given is None there, so that a settings file decides, or the default.
    """
    fields = {name: field for kind in kinds for name, field in kind.model_fields.items() if name not in without}
    options = [
        Parameter(
            name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[_typed(field) | None, _option(field)]
        )
        for name, field in fields.items()
    ]

    def decorate(command: Command) -> Command:
        _, *own = signature(command).parameters.values()
        names = [one.name for one in own]

        def called(**values: Any) -> None:
            others = {name: values.pop(name) for name in names if name in values}
            command(values, **others)

        return with_parameters(called, sorted([*own, *options], key=_panel), command)

    return decorate


def with_parameters(called: Command, parameters: Sequence[Parameter], like: Callable[..., Any]) -> Command:
    """`called`, as typer sees it: with these parameters, under the name and with the help of `like`."""
    called.__name__, called.__doc__ = like.__name__, like.__doc__
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    by_keyword = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in parameters]
    called.__signature__ = Signature(by_keyword)  # type: ignore[attr-defined]
    return called


def _panel(parameter: Parameter) -> int:
    """Where a parameter stands: panels come in the order of their first options."""
    [shown] = parameter.annotation.__metadata__
    return PANELS.index(shown.rich_help_panel or PANELS[0])


def option_of(kind: type[Settings], name: str) -> ParameterInfo:
    """The option of one field, for a command that has no use for the others."""
    return _option(kind.model_fields[name])


def _option(field: FieldInfo) -> ParameterInfo:
    shown, default = _shown(field), field.default
    listed = ",".join(default) if isinstance(default, tuple) else default
    help = cast(str, field.description)
    if default is not None and default is not False:
        help = f"{help.removesuffix('.')} (default: {listed})."
    metavar = shown["metavar"] or "|".join(_choices(field)) or None
    if shown["positional"]:
        return cast(ParameterInfo, typer.Argument(metavar=metavar, help=help, show_default=False))
    option = typer.Option(metavar=metavar, help=help, show_default=False, rich_help_panel=shown["panel"])
    return cast(ParameterInfo, option)


def _shown(field: FieldInfo) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], field.json_schema_extra)


def _kind(field: FieldInfo) -> Any:
    """The field's type, without None."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(field.annotation) else field.annotation


def _choices(field: FieldInfo) -> tuple[str, ...]:
    return get_args(_kind(field)) if get_origin(_kind(field)) is Literal else ()


def _typed(field: FieldInfo) -> Any:
    """What typer reads: numbers, switches, lists of numbers; everything else is text until the settings take it."""
    kind = _kind(field)
    if kind == tuple[int, ...]:
        return list[int]
    return kind if kind in (bool, int, float) else str
