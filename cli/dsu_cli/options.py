"""Command options: settings fields as options, options that several commands share, and checks."""

from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.models import ParameterInfo

from dsu import files
from dsu.errors import UsageError, did_you_mean
from dsu.files import make_folder
from dsu.settings import MACHINE, NETWORK, PANELS, WHERE, Settings

T = TypeVar("T")


def _cache_root(given: str | Path) -> Path:
    """The folder of the stores; for `s3://bucket/path` its local mirror, after bringing it up to date."""
    if not str(given).startswith("s3:/"):
        return Path(given)
    from dsu_cache import mirror_folder

    return mirror_folder(given)


DataRoot = Annotated[
    Path, typer.Option("--data-root", envvar="DSU_DATA", help="Benchmark folder.", rich_help_panel=WHERE)
]
CacheRoot = Annotated[
    Path,
    typer.Option(
        "--cache-root",
        envvar="DSU_CACHE",
        help="Store folder, or s3://BUCKET/PATH.",
        parser=_cache_root,
        metavar="PATH",
        rich_help_panel=WHERE,
    ),
]
Images = Annotated[
    str | None,
    typer.Option(
        "--images", help="Image subfolder of your own folder, if it is not found automatically.", rich_help_panel=WHERE
    ),
]
Masks = Annotated[
    str | None,
    typer.Option(
        "--masks", help="Mask subfolder of your own folder, if it is not found automatically.", rich_help_panel=WHERE
    ),
]
Config = Annotated[Path | None, typer.Option("--config", help="Settings in YAML; options override it.")]
HieraWeights = Annotated[
    Path | None,
    typer.Option(
        "--hiera-weights", envvar="DSU_HIERA", help="SAM 2.1 checkpoint (else from the hub).", rich_help_panel=NETWORK
    ),
]
DinoWeights = Annotated[
    Path | None,
    typer.Option(
        "--dino-weights", envvar="DSU_DINO", help="DINOv2 checkpoint (else from the hub).", rich_help_panel=NETWORK
    ),
]
RandomWeights = Annotated[
    bool,
    typer.Option(
        "--random-weights", help="Use random encoders, to try things out; scores mean nothing.", rich_help_panel=NETWORK
    ),
]
Head = Annotated[
    Path | None,
    typer.Argument(
        metavar="HEAD|RUN",
        help="A run folder, head.safetensors or OWNER/NAME on the hub (default: the newest run).",
        show_default=False,
    ),
]
Licence = Annotated[str, typer.Option("--license", metavar="ID", help="Licence of the head, as a hub identifier.")]
OverwriteExport = Annotated[bool, typer.Option("--overwrite", help="Overwrite an earlier export.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Hide progress and notes.", rich_help_panel=MACHINE)]


# ---- options from settings ----


def with_settings(
    *kinds: type[Settings], without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of `kinds`, in addition to its own; the command receives them as `given`.

    An option that was not given is None, so that the settings file or the default applies.
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
    """`called` as typer sees it: with these parameters, and the name and help of `like`."""
    called.__name__, called.__doc__ = like.__name__, like.__doc__
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    by_keyword = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in parameters]
    called.__signature__ = Signature(by_keyword)  # type: ignore[attr-defined]
    return called


def _panel(parameter: Parameter) -> int:
    """A parameter's sort key: panels are in the order of their first options."""
    [shown] = parameter.annotation.__metadata__
    return PANELS.index(shown.rich_help_panel or PANELS[0])


def option_of(field: FieldInfo) -> ParameterInfo:
    """A field as a command-line option."""
    shown, default, help = cast(Mapping[str, Any], field.json_schema_extra), field.default, field.description or ""
    if default is not None and default is not False:
        listed = ",".join(default) if isinstance(default, tuple) else default
        help = f"{help.removesuffix('.')} (default: {listed})."
    kind, metavar = _kind(field), shown["metavar"]
    if metavar and metavar.startswith("["):
        return cast(ParameterInfo, typer.Argument(metavar=metavar.strip("[]"), help=help, show_default=False))
    metavar = "|".join(get_args(kind)) if get_origin(kind) is Literal else metavar
    option = typer.Option(metavar=metavar, help=help, show_default=False, rich_help_panel=shown["panel"])
    return cast(ParameterInfo, option)


def _kind(field: FieldInfo) -> Any:
    """The field's type, without None."""
    kinds = get_args(field.annotation)
    return kinds[0] if NoneType in kinds else field.annotation


def _read(field: FieldInfo) -> Any:
    """The type that typer parses: numbers, switches, lists of numbers; the settings parse all other text."""
    kind = _kind(field)
    return kind if kind in (bool, int, float) else list[int] if kind == tuple[int, ...] else str


# ---- checks ----


def one_of(option: str, value: object, allowed: Collection[T]) -> T:
    """`value`, if it is among `allowed`. Raises `UsageError` naming the option and the choices."""
    for item in allowed:
        if item == value:
            return item
    if isinstance(allowed, range):
        choices = f"a number from {allowed[0]} to {allowed[-1]}"
    else:
        named = [str(item) for item in allowed if item is not None]
        choices = f"{', '.join(named)}{did_you_mean(str(value), named)}"
    raise UsageError(f"{option} can't be {value}: give {choices}{'' if choices.endswith('?') else '.'}")


def new_file(option: str, path: Path, *, overwrite: bool) -> Path:
    """`path`, if it does not exist or may be overwritten. Raises `UsageError` naming the option."""
    if path.exists() and not (overwrite and path.is_file()):
        raise UsageError(f"{path} already exists: give another {option}, or --overwrite for a file.")
    return path


def names_of(option: str, text: str | None, known: Collection[str]) -> list[str] | None:
    """Names separated by commas, each among `known` and once; None for None. Raises `UsageError` naming the option."""
    if text is None:
        return None
    return list(dict.fromkeys(one_of(option, name.strip(), known) for name in text.split(",")))


def file_to_write(option: str, path: Path | None) -> None:
    """Check that a file can be written: in an existing folder, or in a new one whose parent exists.

    More than one missing folder is taken for a typo. Raises `UsageError` naming the option, and `DsuError` if a file is
    in a folder's place.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder: give a name for the file in it.")
    if path.parent.exists():
        make_folder(path.parent)
    elif not path.parent.parent.is_dir():
        raise UsageError(f"{option} can't be {path}: there is no folder {path.parent}; create it, or correct the path.")


def write_json(path: Path | None, value: object) -> None:
    """Write one JSON document to a file, in a new folder if necessary; without a path, do nothing.

    Raises `DsuError` naming the file or the folder.
    """
    if path is not None:
        make_folder(path.parent)
        files.write_json(path, value)
