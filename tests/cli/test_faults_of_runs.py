"""Regression tests for faults of runs, each with the right behaviour."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from house import House
from kills import Forks
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stopping import stop_at
from support import TINY, Dsu

DSU: Final = Path(sys.executable).with_name("dsu")
"""The command's script, for tests that need a separate process."""

QUICK: Final = ("--views", "1", "--sheet-every", "0", "--quiet")
"""Options of the fastest training."""

STAGE_ONE: Final = (*TINY, "--features", "V", "--views", "1", "--quiet")


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs commands in separate processes, all in one working folder."""
    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture
def photos(drawn: Path, tmp_path: Path) -> Path:
    """Six own images and masks, with names that are easy to find in an output."""
    return draw(tmp_path / "photos", drawn, range(6))


def draw(folder: Path, drawn: Path, which: range) -> Path:
    """Copy some synthetic images and masks into a folder, which may have others already."""
    for inner in ("images", "masks"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
        paths = sorted((drawn / "train" / inner).iterdir())
        for index in which:
            shutil.copy(paths[index], folder / inner / f"photo-{index:02}{paths[index].suffix}")
    return folder


def same_weights(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until another process has made a condition true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def finite(values: Any) -> bool:
    """Whether every tensor in a saved state is finite."""
    if isinstance(values, torch.Tensor):
        return bool(torch.isfinite(values).all())
    if isinstance(values, dict):
        return all(map(finite, values.values()))
    return all(map(finite, values)) if isinstance(values, list | tuple) else True


# ---- a run is locked while it trains ----


@dataclass(frozen=True)
class Living:
    """A run, and the process that trains it."""

    run: Path
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def living(house: House, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    """A run with a suspended process, so that it does not finish."""
    home = tmp_path_factory.mktemp("living")
    run = home / "runs" / "living"
    more = ("--epochs", "3", "--batch-size", "1", "--checkpoint-steps", "1", "--out", run, *QUICK)
    process = subprocess.Popen([DSU, *map(str, house.train(*more))], cwd=home, text=True)
    until(lambda: (run / "checkpoint.pt").exists())
    process.send_signal(signal.SIGSTOP)
    yield Living(run, process)
    process.kill()
    process.wait(30)


def test_a_running_training_is_not_listed_as_interrupted(
    dsu: Dsu, house: House, living: Living, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert living.process.poll() is None and not (living.run / "head.safetensors").exists()
    monkeypatch.chdir(living.run.parent.parent)
    for command in (["predict", house.data / "test" / "images"], house.train("--views", "1", "--sheet-every", "0")):
        said = dsu(*command, exit_code=None).output
        assert "stopped" not in said and "interrupted" not in said, said


def test_a_running_training_can_not_be_resumed(dsu: Dsu, house: House, living: Living) -> None:
    assert living.process.poll() is None and not (living.run / "head.safetensors").exists()
    resume = ("train-head", "--resume", "--out", living.run, "--cache-root", house.features, "--quiet")
    try:
        result = dsu(*resume, exit_code=None)
        assert result.exit_code != 0, result.output
        assert str(living.process.pid) in result.output
        assert not (living.run / "head.safetensors").exists()
    finally:
        (living.run / "head.safetensors").unlink(missing_ok=True)


def test_runs_that_start_at_the_same_time_have_separate_folders(
    house: House, forks: Forks, dsu: Dsu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run starts and ends just before the first one creates its folder."""
    monkeypatch.chdir(forks.folder)
    make, others = os.mkdir, list[int]()

    def mkdir(path: Any, *more: Any, **options: Any) -> None:
        if not others and Path(path).parent.name == "runs":
            others.append(-1)
            others[0] = forks.run(house.train("--seed", "1", *QUICK)).status
        make(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    first = dsu(*house.train(*QUICK), exit_code=None)
    assert others, "the first run made no folder"
    done = [first.exit_code, *others].count(0)
    assert done > 0 and len(list(Path("runs").glob("*/head.safetensors"))) == done


# ---- a run that is started again ----


@pytest.mark.parametrize("old", ["finished", "stopped"])
def test_a_replaced_run_is_not_resumed_as_the_new_one(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str
) -> None:
    run = house.copied(tmp_path).run
    if old == "stopped":
        (run / "head.safetensors").unlink()
    anew = house.train("--lr", "0.01", *QUICK)
    with monkeypatch.context() as patch:
        stop_at(patch, 0)
        dsu(*anew, "--out", run, "--overwrite", exit_code=130)
    resumed = dsu("train-head", "--resume", "--out", run, "--cache-root", house.features, "--quiet", exit_code=None)
    if resumed.exit_code == 0:
        dsu(*anew, "--out", "undisturbed")
        assert same_weights(run / "head.safetensors", tmp_path / "undisturbed" / "head.safetensors")


def test_a_replaced_run_is_kept_until_the_new_one_has_finished(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = house.copied(tmp_path).run
    previous, old = run / "previous", (run / "head.safetensors").read_bytes()
    anew = house.train("--lr", "0.01", "--out", run, "--overwrite", *QUICK)
    with monkeypatch.context() as patch:
        stop_at(patch, 0)
        dsu(*anew, exit_code=130)
    assert (previous / "head.safetensors").read_bytes() == old
    dsu(*anew)
    assert not previous.exists() and (run / "head.safetensors").read_bytes() != old


# ---- a run's training data ----


@pytest.mark.parametrize("change", ["added", "changed"])
def test_a_run_is_not_resumed_with_other_samples(
    dsu: Dsu, photos: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    dsu("cache-features", photos, *STAGE_ONE)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        dsu("train-head", "--fold", "1/3", "--epochs", "2", "--out", "run", *QUICK, exit_code=130)
    if change == "added":
        draw(photos, drawn, range(6, 10))
    else:
        image = photos / "images" / "photo-03.jpg"
        ImageOps.invert(Image.open(image)).save(image)
    dsu("cache-features", photos, *STAGE_ONE)
    before = (Path("run") / "checkpoint.pt").read_bytes()
    result = dsu("train-head", "--resume", "--out", "run", "--quiet", exit_code=None)
    assert result.exit_code != 0, result.output
    assert (Path("run") / "checkpoint.pt").read_bytes() == before


def test_a_run_is_not_resumed_with_other_encoders(dsu: Dsu, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    dino = timm.create_model("vit_small_patch14_dinov2", pretrained=False).state_dict()
    save_file(dino, "one.safetensors")
    save_file(dino | {"norm.bias": dino["norm.bias"] + 1}, "other.safetensors")
    sizes = ("--hiera", "toy", "--dino", "vits14", "--hiera-size", "128", "--dino-size", "126")
    cache = ("cache-features", photos, *sizes, "--features", "V", "--views", "1", "--quiet")
    dsu(*cache, "--dino-weights", "one.safetensors")
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        dsu("train-head", "--fold", "1/3", "--epochs", "2", "--out", "run", *QUICK, exit_code=130)
    dsu(*cache, "--dino-weights", "other.safetensors", "--rebuild")
    result = dsu("train-head", "--resume", "--out", "run", "--quiet", exit_code=None)
    assert result.exit_code != 0, result.output
    assert "dino" in result.output.lower()


def held_out(dsu: Dsu, run: str) -> set[str]:
    """The samples held out by a run: those that `dsu predict` takes by default."""
    dsu("predict", "--head", run, "--out", f"{run}-masks", "--quiet")
    return {path.stem for path in Path(f"{run}-masks").rglob("photo-*.png")}


def test_new_images_do_not_move_old_ones_to_another_fold(dsu: Dsu, photos: Path, drawn: Path) -> None:
    old = {path.stem for path in (photos / "images").iterdir()}
    shares = []
    for run in ("before", "after"):
        dsu("cache-features", photos, *STAGE_ONE)
        dsu("train-head", "--fold", "1/3", "--epochs", "1", "--out", run, *QUICK)
        shares.append(held_out(dsu, run) & old)
        draw(photos, drawn, range(6, 10))
    assert len(shares[0]) == 2 and shares[0] == shares[1]


def test_images_that_a_head_was_trained_on_are_not_held_out_silently(dsu: Dsu, photos: Path) -> None:
    dsu("cache-features", photos, *STAGE_ONE)
    dsu("train-head", "--fold", "1/3", "--epochs", "1", "--out", "first", *QUICK)
    trained_on = {path.stem for path in (photos / "images").iterdir()} - held_out(dsu, "first")
    second = ("train-head", "--fold", "2/3", "--epochs", "1", "--out", "second", "--views", "1", "--sheet-every", "0")
    said = dsu(*second, "--init-from", "first", exit_code=None).output
    assert any(name in said for name in trained_on), said


def test_all_runs_of_a_study_are_evaluated_on_the_same_images(
    dsu: Dsu, house: House, drawn: Path, tmp_path: Path
) -> None:
    data = tmp_path / "shapes"
    shutil.copytree(house.data, data)
    study = ("study", "seeds", data, "--epochs", "1", "--out", "study", *QUICK)
    dsu("cache-features", data, *STAGE_ONE)
    dsu(*study, "-n", "2")
    for inner in ("images", "masks"):
        for path in sorted((drawn / "test" / inner).iterdir())[2:4]:
            shutil.copy(path, data / "test" / inner)
    dsu("cache-features", data, *STAGE_ONE)
    if dsu(*study, "-n", "3", exit_code=None).exit_code == 0:
        with Path("study/per_image.csv").open(newline="") as file:
            evaluated = Counter(row["member"] for row in csv.DictReader(file))
        assert len(evaluated) == 3 and len(set(evaluated.values())) == 1, evaluated


# ---- states that are not finite ----

DIVERGING: Final = ("--lr", "1e25", *QUICK)
"""After one step, the weights are finite, but the outputs are not."""

OVERFLOWING: Final = (*DIVERGING, "--weight-decay", "1e20")
"""After one step, the weights are not finite either."""


def test_a_state_that_is_not_finite_is_not_saved(dsu: Dsu, house: House, tmp_path: Path) -> None:
    steps = ("--batch-size", "2", "--checkpoint-steps", "1", "--val-fraction", "0")
    dsu(*house.train("--out", "run", *OVERFLOWING, *steps), exit_code=1)
    for path in tmp_path.glob("run/*.pt"):
        assert finite(torch.load(path, weights_only=True)["head"]), path
    for path in tmp_path.glob("run/*.safetensors"):
        assert finite(load_file(path)), path


def test_a_state_that_is_not_finite_is_not_validated(dsu: Dsu, house: House, tmp_path: Path) -> None:
    said = dsu(*house.train("--val-fraction", "0.3", "--out", "run", *DIVERGING), exit_code=1).output
    assert "error:" in said and "finite" in said
    assert not (tmp_path / "run" / "head.safetensors").exists()


@pytest.mark.parametrize("recipe", [DIVERGING, OVERFLOWING], ids=["outputs", "weights"])
def test_a_state_that_is_not_finite_is_not_a_result(
    dsu: Dsu, house: House, tmp_path: Path, recipe: tuple[str, ...]
) -> None:
    result = dsu(*house.train("--val-fraction", "0", "--out", "run", *recipe), exit_code=None)
    assert result.exit_code == 1, result.output
    assert "finite" in result.output and not (tmp_path / "run" / "head.safetensors").exists()


def test_balance_without_empty_training_images_is_refused(dsu: Dsu, photos: Path) -> None:
    """There is one empty image: whenever it is held out, nothing can be balanced, which is an error."""
    mask = photos / "masks" / "photo-02.png"
    Image.fromarray(np.zeros(np.asarray(Image.open(mask)).shape, np.uint8)).save(mask)
    dsu("cache-features", photos, *STAGE_ONE)
    refused = []
    for fold in ("1/3", "2/3", "3/3"):
        command = ("train-head", "--fold", fold, "--balance", "--epochs", "1", "--out", f"run-{fold[0]}", *QUICK)
        result = dsu(*command, exit_code=None)
        if result.exit_code != 0:
            refused.append(fold)
            assert "balance" in result.output and not Path(f"run-{fold[0]}/head.safetensors").exists()
    assert len(refused) == 1


# ---- two commands in one folder ----


@pytest.fixture(scope="module")
def benchmarks(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a few images of three benchmarks."""
    root = tmp_path_factory.mktemp("benchmarks")
    images, masks = (sorted((drawn / "train" / inner).iterdir()) for inner in ("images", "masks"))
    for name in ("ECSSD", "CHAMELEON", "HKU-IS"):
        for inner, paths in (("images", images), ("masks", masks)):
            (root / name / inner).mkdir(parents=True)
            for path in paths[:2]:
                shutil.copy(path, root / name / inner)
    return root


def test_two_simultaneous_predictions_into_one_folder_are_both_kept(
    dsu: Dsu, house: House, benchmarks: Path, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second prediction starts and ends while the first writes its first mask for ECSSD."""
    options = ("--data-root", benchmarks, "--out", tmp_path / "masks")
    rename, others = os.replace, list[int]()

    def replace(source: Any, target: Any, *more: Any, **of: Any) -> None:
        if not others and Path(target).suffix == ".png":
            others.append(-1)
            others[0] = forks.run(house.predict("HKU-IS", *options)).status
        rename(source, target, *more, **of)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        dsu(*house.predict("ECSSD", "CHAMELEON", *options, "--batch-size", "1"))
    assert others, "the first command renamed no mask"
    if others != [0]:  # the folder was locked: it is free now
        dsu(*house.predict("HKU-IS", *options))
    # The head was trained on these images.
    evaluate = ("eval", "--predictions", "masks", "--data-root", benchmarks, "--format", "json", "--all", "--quiet")
    evaluated = dsu(*evaluate).stdout
    assert set(json.loads(evaluated)) == {"ECSSD", "CHAMELEON", "HKU-IS"}
    for name in ("ECSSD", "CHAMELEON", "HKU-IS"):
        said = dsu(*house.predict(name, *options), exit_code=None).output
        assert said.count("error:") == 0 and re.search(r"\b0 written\b", said), said


def test_temporary_files_of_a_writer_on_another_host_are_kept(
    dsu: Dsu, house: House, benchmarks: Path, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer in a container or on another host: no local process has its process id.

    A second command writes into the same folder while the first one's temporary file is not renamed yet.
    """
    options = ("--data-root", benchmarks, "--out", tmp_path / "masks", "--quiet")
    rename, others = os.replace, list[int]()

    def replace(source: Any, target: Any, *more: Any, **of: Any) -> None:
        if not others and tmp_path / "masks" in Path(target).parents:
            others.append(-1)
            others[0] = forks.run(house.predict("HKU-IS", *options)).status
        rename(source, target, *more, **of)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 17)  # above Linux's maximum
    said = dsu(*house.predict("CHAMELEON", *options), exit_code=None)
    assert others, "the first command renamed nothing"
    assert said.exit_code == 0, said.output
    assert len(list((tmp_path / "masks" / "CHAMELEON").glob("*.png"))) == 2


# ---- order of files per epoch ----


def test_the_best_weights_are_never_newer_than_the_checkpoint(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a kill leaves only some of an epoch's files: the state is checked after each file."""
    run, rename, seen = tmp_path / "run", os.replace, list[tuple[int, int]]()

    def replace(source: Any, target: Any, *more: Any, **of: Any) -> None:
        rename(source, target, *more, **of)
        if (run / "best.safetensors").exists():
            with safe_open(run / "best.safetensors", "pt") as file:
                best = json.loads(file.metadata()["dsu"])["epoch"]
            state = run / "checkpoint.pt"
            seen.append((best, torch.load(state, weights_only=True)["epoch"] if state.exists() else 0))

    monkeypatch.setattr(os, "replace", replace)
    dsu(*house.train("--val-fraction", "0.3", "--keep", "best", "--epochs", "2", "--out", run, *QUICK))
    assert seen and all(best <= kept for best, kept in seen), seen
