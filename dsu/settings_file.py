"""Read settings from options and YAML files, with errors that name the option or the field."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from dsu.errors import UsageError, validation_reasons
from dsu.settings import Settings

S = TypeVar("S", bound=Settings)


def read_settings(kind: type[S], options: Mapping[str, Any], file: Path | None = None) -> S:
    """Read settings from a YAML file, overridden by `options` that are fields of `kind` and not None.

    Raises `UsageError` naming the file and the field, or the option.
    """
    from_file = {} if file is None else _read_yaml(file)
    given = {name: options[name] for name in kind.model_fields if options.get(name) is not None}

    def spell(field: str) -> str:
        return f"--{field.replace('_', '-')}" if field in given else field

    try:
        return kind(**(from_file | given))
    except ValidationError as error:
        of_options = file is None or {item["loc"][0] for item in error.errors()} <= given.keys()
        where = "" if of_options else f"In the settings file {file}, "
        reasons = validation_reasons(error, kind.model_fields, spell)
        raise UsageError(f"{where}{reasons}{'' if reasons.endswith('?') else '.'}") from error


class _Loader(yaml.SafeLoader):
    """Accepts only plain values, and each field once: plain YAML would silently use the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"The settings file {path} can't be read ({error.strerror}): check the path.") from error
    # Deep nesting causes a RecursionError in the parser, and invalid dates a plain ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            f"The settings file {path} is not valid YAML ({_yaml_reason(error)}): write `field: value` lines, such as "
            f"`epochs: 20`."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"The settings file {path} must contain `field: value` lines, such as `epochs: 20`.")
    return content


def _yaml_reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())[:160]
