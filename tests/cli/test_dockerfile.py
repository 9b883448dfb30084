"""The Dockerfile's lines, checked without a Docker daemon."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support import Dsu

from dsu.serving.app import create_app
from dsu.serving.heads import ServedHead
from dsu.settings import ServingSettings

HOUSE = Path(__file__).parents[2]
FILE = HOUSE / ".docker" / "Dockerfile"
PROJECT: dict[str, Any] = tomllib.loads((HOUSE / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """The instructions in order: name and arguments, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", FILE.read_text(), flags=re.M).replace("\\\n", "")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def one(name: str) -> str:
    [found] = [rest for instruction, rest in instructions() if instruction == name]
    return found


def test_instructions_and_their_order() -> None:
    names = [name for name, _ in instructions()]
    assert names == ["FROM", "WORKDIR", *4 * ["COPY"], "RUN", "USER", "EXPOSE", "HEALTHCHECK", "CMD"]
    assert one("WORKDIR").startswith("/")


def test_the_base_image_has_a_supported_python() -> None:
    found = re.fullmatch(r"python:3\.(\d+)-slim", one("FROM"))
    assert found is not None
    assert PROJECT["project"]["requires-python"] == ">=3.11" and int(found[1]) >= 11
    assert f"Programming Language :: Python :: 3.{found[1]}" in PROJECT["project"]["classifiers"]


def test_copied_files_exist_and_suffice_to_install() -> None:
    copies = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    sources = {source: target for *several, target in copies for source in several}
    for source, target in sources.items():
        assert (HOUSE / source).exists()
        assert target == ("./" if (HOUSE / source).is_file() else f"./{source}")
    built = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    wanted = {"pyproject.toml", PROJECT["project"]["readme"], "LICENSE", *(one.split("/")[0] for one in built)}
    assert set(sources) == wanted
    assert (HOUSE / PROJECT["tool"]["hatch"]["version"]["path"]).is_relative_to(HOUSE / "dsu")


def test_installed_extras_exist() -> None:
    torch, own, user = (shlex.split(part) for part in one("RUN").split("&&"))
    assert torch[:2] == own[:2] == ["pip", "install"] and "--no-cache-dir" in torch and "--no-cache-dir" in own
    needed = {re.split(r"[\s><=\[]", one)[0] for one in PROJECT["project"]["dependencies"]}
    assert set(torch[-2:]) == {"torch", "torchvision"} <= needed
    found = re.fullmatch(r"\.\[([\w,]+)\]", own[-1])
    assert found is not None
    assert set(found[1].split(",")) == {"export", "serve"} <= set(PROJECT["project"]["optional-dependencies"])
    assert user[0] == "useradd" and user[-1] == one("USER") != "root"


def test_the_port_and_the_health_check() -> None:
    port = ServingSettings().port
    assert one("EXPOSE") == str(port)
    options, _, command = one("HEALTHCHECK").partition("CMD ")
    assert re.fullmatch(r"--start-period=\d+s ", options)
    program, flag, script = json.loads(command)
    assert (program, flag) == ("python", "-c")
    compile(script, "HEALTHCHECK", "exec")
    [path] = re.findall(rf"http://127\.0\.0\.1:{port}(/\w+)'", script)
    head = ServedHead("head", None, "", "", 0.5)  # type: ignore[arg-type]
    paths = create_app({"head": head}, ServingSettings()).openapi()["paths"]
    assert "get" in paths[path]


def test_the_command_is_valid(dsu: Dsu) -> None:
    program, *words = json.loads(one("CMD"))
    assert program in PROJECT["project"]["scripts"]
    # It fails at the missing head, which is mounted when the container runs.
    said = dsu(*words, "--port", "0", exit_code=2).output
    assert f"There is no head at {words[-1]}" in said
    assert words[words.index("--host") + 1] == "0.0.0.0"  # otherwise it can't be reached from outside the container


@pytest.mark.parametrize("remark", [line for line in FILE.read_text().splitlines() if line.startswith("# docker")])
def test_documented_docker_commands_are_valid(remark: str) -> None:
    words = shlex.split(remark.removeprefix("# ").replace("$PWD", "/here"))
    if words[1] == "build":
        assert words[words.index("-f") + 1] == ".docker/Dockerfile" and words[-1] == "."
    else:
        mounted = words[words.index("-v") + 1].split(":")[1]
        assert json.loads(one("CMD"))[-1].startswith(f"{mounted}/")
        assert words[words.index("-p") + 1].split(":")[1:] == 2 * [one("EXPOSE")]
