"""Options out of settings: every field becomes one, with its help and panel."""

from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter, Signature, signature
from types import NoneType
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.models import ParameterInfo

from dsu.settings import PANELS, Settings

__all__ = ["option_of", "with_parameters", "with_settings"]


def with_settings(
    *kinds: type[Settings], without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of `kinds` beside its own; it takes them together, as `given`.

    One that was not given is None there, so that a settings file decides, or the default.
    """
    fields = {name: field for kind in kinds for name, field in kind.model_fields.items() if name not in without}
    options = [
        Parameter(
            name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[_read(field) | None, option_of(field)]
        )
        for name, field in fields.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = signature(command).parameters.values()

        def called(**values: Any) -> None:
            others = {one.name: values.pop(one.name) for one in own if one.name in values}
            command(values, **others)

        return with_parameters(called, sorted([*own, *options], key=_panel), command)

    return decorate


def with_parameters(
    called: Callable[..., None], parameters: Sequence[Parameter], like: Callable[..., Any]
) -> Callable[..., None]:
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


def option_of(field: FieldInfo) -> ParameterInfo:
    """How the command line shows a field."""
    shown, default, help = cast(Mapping[str, Any], field.json_schema_extra), field.default, field.description or ""
    if default is not None and default is not False:
        listed = ",".join(default) if isinstance(default, tuple) else default
        help = f"{help.removesuffix('.')} (default: {listed})."
    kind, metavar = _kind(field), shown["metavar"]
    if metavar and metavar.startswith("["):
        return cast(ParameterInfo, typer.Argument(metavar=metavar, help=help, show_default=False))
    metavar = "|".join(get_args(kind)) if get_origin(kind) is Literal else metavar
    option = typer.Option(metavar=metavar, help=help, show_default=False, rich_help_panel=shown["panel"])
    return cast(ParameterInfo, option)


def _kind(field: FieldInfo) -> Any:
    """The field's type, without None."""
    kinds = get_args(field.annotation)
    return kinds[0] if NoneType in kinds else field.annotation


def _read(field: FieldInfo) -> Any:
    """What typer reads: numbers, switches, lists of numbers; everything else is text until the settings take it."""
    kind = _kind(field)
    return kind if kind in (bool, int, float) else list[int] if kind == tuple[int, ...] else str
