"""Standard behaviour of a command line: help, completion, colours, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from house import House
from support import TINY, Dsu

COMMANDS = (
    "cache-features",
    "train-head",
    "predict",
    "eval",
    "study",
    "head",
    "import-checkpoint",
    "export-checkpoint",
    "doctor",
    "datasets",
    "cache",
    "check-equivalence",
    "bench",
    "demo",
    "visualize",
)

RUN = [sys.executable, "-c", "from dsu_cli.main import run; run()"]


def test_help_names_all_commands_statuses_and_variables(dsu: Dsu) -> None:
    said = dsu("--help").output
    assert [name for name in COMMANDS if f" {name} " not in said] == []
    for words in ("130 stopped by Ctrl-C", "2 wrong usage"):
        assert words in " ".join(said.split())
    for variable in ("DSU_DATA", "DSU_CACHE", "DSU_HIERA", "DSU_DINO", "HF_HOME", "HF_HUB_OFFLINE", "NO_COLOR"):
        assert variable in said, variable


@pytest.mark.parametrize("command", [*COMMANDS, "head info", "head list", "head export", "cache list", "cache verify"])
def test_every_command_has_help(dsu: Dsu, command: str) -> None:
    assert "--help" in dsu(*command.split(), "--help").output


def test_tables_are_readable_in_narrow_terminals(tmp_path: Path) -> None:
    said = subprocess.run(
        [*RUN, "datasets"], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"COLUMNS": "1"}, check=True
    ).stdout
    assert "DUTS-TR" in said


def test_help_explains_the_progress_line(dsu: Dsu) -> None:
    said = dsu("train-head", "--help").output
    assert "data wait" in said and "peak" in said


def test_counts_of_one_are_singular() -> None:
    from dsu.progress import counted

    assert [counted(n, "images") for n in (0, 1, 2064)] == ["0 images", "1 image", "2,064 images"]
    assert counted(1, "MB") == "1 MB"


def test_ages_use_the_largest_unit_that_fits() -> None:
    from dsu_cli.console import age_text

    assert [age_text(s) for s in (-1, 59, 60, 7199, 86399, 86400 * 40)] == [
        "now",
        "now",
        "1 min",
        "1 h",
        "23 h",
        "40 d",
    ]


@pytest.mark.parametrize("quiet", [False, True])
def test_downloads_are_announced_unless_quiet(drawn: Path, tmp_path: Path, quiet: bool) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [*RUN, "cache-features", str(drawn), *(["--quiet"] if quiet else [])]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    lines = done.stderr.splitlines()
    assert [line.startswith("asking 127.0.0.1:9 for sam2.1_hiera_large.pt") for line in lines[:-1]] == [True][quiet:]
    assert lines[-1].startswith("error: The weights of SAM 2.1's Hiera (large) and DINOv2 (vitl14) are not")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([command, "--help"] for command in ("datasets", "train-head", "cache-features"))],
)
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    """Imports dominate the start-up time, so this tests imports instead of seconds, which depend on the machine."""
    heavy = ("torch", "zarr", "numpy", "huggingface_hub", "yaml", "PIL", "scipy", "jinja2", "asyncio")
    probe = f"import sys, atexit; atexit.register(lambda: print([m for m in {heavy} if m in sys.modules]))"
    code = f"{probe}; sys.argv = {['dsu', *arguments]}; from dsu_cli.main import run; run()"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "dsu", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("dsu ")


def test_the_check_of_equivalence_has_no_option_without_effect(dsu: Dsu) -> None:
    said = dsu("check-equivalence", "--help").output
    assert "--batch-size" in said and "--deterministic" in said
    for option in ("--epochs", "--val-fraction", "--test-fraction", "--group", "--compile"):
        assert option not in said, option


def test_switches_have_two_forms(dsu: Dsu) -> None:
    said = dsu("train-head", "--help").output
    for switch in ("balance", "compile", "deterministic", "gradient-checkpointing", "end-to-end"):
        assert f"--{switch} " in said and f"--no-{switch} " in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_installed(shell: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "SHELL": f"/bin/{shell}",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    shown = subprocess.run([*RUN[:2], _as_dsu(), "--show-completion", shell], env=environment, capture_output=True)
    assert shown.returncode == 0 and b"_DSU_COMPLETE" in shown.stdout, shown.stderr
    installed = subprocess.run([*RUN[:2], _as_dsu(), "--install-completion", shell], env=environment)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and b"_DSU_COMPLETE" in path.read_bytes()]
    assert installed.returncode == 0 and written


def test_completion_completes_commands_and_options() -> None:
    for typed, expected in (("dsu da", "datasets"), ("dsu head ex", "export"), ("dsu predict --hea", "--head")):
        environment = {**os.environ, "_DSU_COMPLETE": "complete_bash", "COMP_WORDS": typed}
        environment["COMP_CWORD"] = str(len(typed.split()) - 1)
        found = subprocess.run([*RUN[:2], _as_dsu()], env=environment, capture_output=True, text=True)
        assert expected in found.stdout.split(), (typed, found)


def _as_dsu() -> str:
    """A program called `dsu`, the name that completion depends on."""
    return "import sys; sys.argv[0] = 'dsu'; from dsu_cli.main import run; run()"


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}])
def test_output_without_colours(house: House, variables: dict[str, str]) -> None:
    """In a pipe: no escape codes at all. With NO_COLOR: no colours, even in a terminal."""
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    for arguments in (["cache", "list", "--cache-root", house.features], ["datasets"], ["head", "info", "nowhere"]):
        done = subprocess.run([*RUN, *map(str, arguments)], env={**environment, **variables}, capture_output=True)
        for printed in (done.stdout, done.stderr):
            if variables:
                assert not any(f"\x1b[{code}".encode() in printed for code in ("31", "32", "33", "1;31"))
            else:
                assert b"\x1b" not in printed


@pytest.mark.parametrize("command", ["cache-features", "predict", "datasets"])
def test_ctrl_c_ends_with_a_hint_to_continue(command: str, drawn: Path, house: House, tmp_path: Path) -> None:
    """After an interruption during its work: no traceback, status 130, and the same command finishes."""
    arguments: list[object] = {
        "cache-features": ["cache-features", drawn, *TINY, "--features", "V"],
        "predict": ["predict", drawn / "train" / "images", "--head", house.run, "--out", "masks", "--batch-size", "1"],
        "datasets": ["datasets", "--data-root", drawn.parent, "--overlaps"],
    }[command]
    # The process sends itself SIGINT twice for each image: an impatient user presses Ctrl-C again.
    slow = (
        "import os, signal, time, dsu.data.images as images; real = images.read_image_and_head\n"
        "def read(*a, **k):\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2); os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*a, **k)\n"
        "images.read_image_and_head = read\n"
        "import dsu.data.inspection; dsu.data.inspection.read_image_and_head = read\n"
    )
    if command == "datasets":
        root = tmp_path / "root" / "DUTS" / "DUTS-TR"
        root.mkdir(parents=True)
        for inner in ("images", "masks"):
            (root / inner).symlink_to(drawn / "train" / inner)
        arguments[2] = tmp_path / "root"
    code = [sys.executable, "-c", f"{slow}from dsu_cli.main import run; run()", *map(str, arguments)]
    stopped = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    said = " ".join(stopped.stderr.split())
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in said and "run the same command again" in said
    done = subprocess.run([*RUN, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_from_the_keyboard_ends_the_command(drawn: Path, tmp_path: Path) -> None:
    """SIGINT from another process, after the first line of output."""
    process = subprocess.Popen(
        [*RUN, "cache-features", str(drawn), "--preset", "toy"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "Traceback" not in rest and "run the same command again" in " ".join(rest.split())
