"""Changes to run folders and their files: nothing is lost, and no run is silently mistaken for another."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from house import House, stage_one
from own_folder import boxed, photo, plain, write
from safetensors import safe_open
from safetensors.torch import load_file
from stopping import stop_at
from support import Dsu

QUICK: Final = ("--views", "1", "--sheet-every", "0", "--quiet")
"""Options of the fastest training."""


def stopped(dsu: Dsu, monkeypatch: pytest.MonkeyPatch, step: int, *command: object) -> None:
    """Interrupt a training before its `step`-th step."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        dsu(*command, exit_code=130)


def same_weights(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def info(run: Path) -> dict[str, Any]:
    with safe_open(run / "head.safetensors", "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["dsu"])
    return found


# ---- folders ----


def test_a_backup_next_to_a_run_is_never_removed(dsu: Dsu, house: House, tmp_path: Path) -> None:
    """A user's copy may have the same name as dsu's own backup."""
    mine = house.copied(tmp_path)
    shutil.copytree(mine.run, tmp_path / "run.previous")
    dsu(*mine.train("--out", mine.run, "--overwrite", *QUICK))
    dsu(*mine.train("--out", "other", *QUICK))
    assert (tmp_path / "run.previous" / "head.safetensors").exists()


def test_a_run_in_a_mounted_folder_can_be_replaced(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be renamed out of a mounted folder, or out of one whose parent is read-only."""
    run, rename = house.copied(tmp_path).run, os.replace

    def replace(source: Any, target: Any, **more: Any) -> None:
        if (run in Path(source).parents) != (run in Path(target).parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        rename(source, target, **more)

    monkeypatch.setattr(os, "replace", replace)
    dsu(*house.train("--out", run, "--overwrite", *QUICK))


@pytest.mark.parametrize(
    "name", ["settings.yaml", "metrics.csv", "curves.png", "best.safetensors", "sheets/epoch_0009.png"]
)
def test_other_files_in_the_folder_are_not_replaced(dsu: Dsu, house: House, tmp_path: Path, name: str) -> None:
    (tmp_path / "work" / name).parent.mkdir(parents=True)
    (tmp_path / "work" / name).write_text("epochs: 1\n")
    said = dsu(*house.train("--out", "work", *QUICK), exit_code=2).output
    assert name.split("/")[0] in said and "--out" in said
    assert (tmp_path / "work" / name).read_text() == "epochs: 1\n"


def test_an_exported_head_is_not_replaced(dsu: Dsu, house: House, tmp_path: Path) -> None:
    """Its model card would describe another head."""
    dsu("head", "export", house.run, "-o", "shared")
    before = (tmp_path / "shared" / "head.safetensors").read_bytes()
    dsu(*house.train("--out", "shared", "--overwrite", *QUICK), exit_code=2)
    assert (tmp_path / "shared" / "head.safetensors").read_bytes() == before


# ---- files of a run ----


@pytest.mark.parametrize("name", ["checkpoint.pt", "settings.yaml", "run.json"])
def test_parts_of_another_run_are_refused(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for run, more in (("one", ("--lr", "0.01", "--val-fraction", "0.2")), ("two", ("--val-fraction", "0.4"))):
        train = house.train("--epochs", "2", "--batch-size", "4", *more, "--out", run, *QUICK)
        stopped(dsu, monkeypatch, 1, *train)
    shutil.copy(tmp_path / "one" / name, tmp_path / "two" / name)
    said = dsu("train-head", "--resume", "--out", "two", "--cache-root", house.features, exit_code=None)
    assert said.exit_code, said.output
    assert "checkpoint" in said.output or "share" in said.output
    assert not (tmp_path / "two" / "head.safetensors").exists()


def test_a_setting_edited_in_the_run_folder_is_refused(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(dsu, monkeypatch, 1, *house.train("--epochs", "3", "--out", "run", *QUICK))
    file = tmp_path / "run" / "settings.yaml"
    file.write_text(file.read_text().replace("epochs: 3", "epochs: 2"))
    said = dsu("train-head", "--resume", "--out", "run", "--cache-root", house.features, exit_code=1).output
    assert "settings.yaml" in said


def test_another_mask_format_is_detected(dsu: Dsu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same mask files, with another value as foreground."""
    data = write(tmp_path / "labels", {f"{n}.png": (photo(n), boxed(1, 2)) for n in range(4)})
    dsu(*stage_one(data, "--foreground", "1", "--quiet"))
    stopped(dsu, monkeypatch, 1, "train-head", "--epochs", "2", "--out", "run", *QUICK)
    dsu(*stage_one(data, "--foreground", "2", "--rebuild", "--quiet"))
    said = dsu("train-head", "--resume", "--out", "run", "--quiet", exit_code=2).output
    assert "foreground" in said


@pytest.mark.parametrize("how", ["gone", "of another run"])
def test_best_weights_of_another_run_are_refused(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from dsu.training.trainer import Trainer

    scores = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(Trainer, "validate", lambda *_: {"val_loss": 1.0, "val_S": next(scores), "val_MAE": 0.1})
    stopped(dsu, monkeypatch, 2, *house.train("--epochs", "3", "--out", "run", *QUICK))
    best = tmp_path / "run" / "best.safetensors"
    best.unlink()
    if how != "gone":
        shutil.copy(house.run / "best.safetensors", best)
    said = dsu("train-head", "--resume", "--out", "run", "--cache-root", house.features, "--quiet", exit_code=1).output
    assert "best.safetensors" in said and "epoch 1" in said


def test_a_deleted_checkpoint_is_detected(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(dsu, monkeypatch, 1, *house.train("--epochs", "2", "--out", "run", *QUICK))
    (tmp_path / "run" / "checkpoint.pt").unlink()
    last = (tmp_path / "run" / "last.safetensors").read_bytes()
    dsu("train-head", "--resume", "--out", "run", "--cache-root", house.features, exit_code=1)
    dsu(*house.train("--epochs", "2", "--out", "run", *QUICK), exit_code=2)
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == last


# ---- an initial head ----


def test_the_initial_head_is_not_needed_to_resume(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = house.train("--epochs", "2", "--val-fraction", "0", "--init-from", "first", *QUICK)
    shutil.copytree(house.run, tmp_path / "first")
    dsu(*train, "--out", "whole")
    stopped(dsu, monkeypatch, 1, *train, "--out", "run")
    shutil.rmtree(tmp_path / "first")
    dsu("train-head", "--resume", "--out", "run", "--cache-root", house.features, "--quiet")
    assert same_weights(tmp_path / "run" / "head.safetensors", tmp_path / "whole" / "head.safetensors")


def test_held_out_images_do_not_change_with_the_initial_heads_file(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The initial head was trained on some of the held-out images; before resuming, another head replaces it."""
    train = house.train("--epochs", "2", "--val-fraction", "0.8", "--init-from", "first", *QUICK)
    dsu(*house.train("--out", "first", "--val-fraction", "0.6", *QUICK))
    dsu(*house.train("--out", "other", "--val-fraction", "0.8", *QUICK))
    said = " ".join(dsu(*(word for word in train if word != "--quiet"), "--out", "probe").output.split())
    assert "validation images that the initial head was trained on" in said
    stopped(dsu, monkeypatch, 1, *train, "--out", "run")
    shutil.rmtree(tmp_path / "first")
    shutil.copytree(tmp_path / "other", tmp_path / "first")
    dsu("train-head", "--resume", "--out", "run", "--cache-root", house.features, "--quiet")
    assert info(tmp_path / "run")["dataset"]["held_out"] == info(tmp_path / "probe")["dataset"]["held_out"]


def test_a_run_is_not_replaced_by_a_run_that_starts_from_it(dsu: Dsu, house: House, tmp_path: Path) -> None:
    run = house.copied(tmp_path).run
    said = dsu(*house.train("--init-from", run, "--out", run, "--overwrite", *QUICK), exit_code=2).output
    assert "--init-from" in said and (run / "head.safetensors").exists()


# ---- very few images ----


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_requested_share_is_never_empty_silently(dsu: Dsu, tmp_path: Path, count: int) -> None:
    data = write(tmp_path / "few", plain(count))
    dsu(*stage_one(data, "--quiet"))
    asked = ("train-head", "--epochs", "1", *QUICK)
    for run, more in (("val", ("--val-fraction", "0.1")), ("test", ("--test-fraction", "0.1"))):
        found = dsu(*asked, *more, "--out", run, exit_code=None)
        if found.exit_code == 0:
            held_out = info(tmp_path / run)
            assert held_out["dataset"]["held_out"] if run == "val" else held_out["test"]
        else:
            assert "few" in found.output and found.exit_code == 2, found.output
    said = dsu("train-head", "--epochs", "1", "--views", "1", "--sheet-every", "0", "--out", "usual").output
    assert ("too few images to hold any out" in said) == (count == 1)
    dsu(*asked, "--val-fraction", "0", "--out", "all")


def test_images_without_any_object(dsu: Dsu, tmp_path: Path) -> None:
    data = write(tmp_path / "empty", {f"{n}.png": (photo(n), boxed()) for n in range(5)})
    dsu(*stage_one(data, "--quiet"))
    dsu("train-head", "--epochs", "1", "--out", "run", "--views", "1")
    dsu("predict", "--head", "run")
    dsu("eval", "--predictions", "run/predictions")
    dsu("study", "folds", data, "-k", "2", "--epochs", "1", *QUICK)


# ---- held-out images ----


@pytest.mark.parametrize("content", ["", "[]", "{", "3", '{"train 0.8, val 0.2": {"SHA": ["val"]}}', "\x00", "FOLDER"])
def test_a_damaged_splits_file_is_named(dsu: Dsu, house: House, tmp_path: Path, content: str) -> None:
    mine = house.copied(tmp_path)
    train = mine.train("--val-fraction", "0.2", *QUICK)
    dsu(*train, "--out", "first")
    file = mine.features / "shapes-TR" / "splits.json"
    sha = next(iter(next(iter(json.loads(file.read_text()).values()))))
    file.unlink()
    file.mkdir() if content == "FOLDER" else file.write_text(content.replace("SHA", sha))
    said = dsu(*train, "--out", "second", exit_code=1).output
    assert "splits.json" in said and said.count("error:") == 1


def test_shares_remain_after_removing_the_store(dsu: Dsu, tmp_path: Path) -> None:
    data = write(tmp_path / "photos", plain(6))
    train = ("train-head", "--val-fraction", "0.3", "--test-fraction", "0.2", "--epochs", "1", *QUICK)
    dsu(*stage_one(data, "--quiet"))
    dsu(*train, "--out", "first")
    dsu("cache", "remove", "photos", "--yes")
    write(data, plain(6, start=6))
    dsu(*stage_one(data, "--quiet"))
    dsu(*train, "--out", "second")
    first, second = info(tmp_path / "first"), info(tmp_path / "second")
    assert set(first["test"]) <= set(second["test"])
    assert set(first["dataset"]["held_out"]) <= set(second["dataset"]["held_out"])


def test_an_unknown_share_in_the_splits_file_is_named(dsu: Dsu, house: House, tmp_path: Path) -> None:
    """As after an edit by hand: images must not be split again silently."""
    mine = house.copied(tmp_path)
    train = mine.train("--val-fraction", "0.2", *QUICK)
    dsu(*train, "--out", "first")
    file = mine.features / "shapes-TR" / "splits.json"
    file.write_text(file.read_text().replace('"val"', '"validation"'))
    said = dsu(*train, "--out", "second", exit_code=1).output
    assert "'validation'" in said and "train, val" in said


def test_a_study_does_not_mix_mask_formats(dsu: Dsu, tmp_path: Path) -> None:
    data = write(tmp_path / "labels", {f"{n}.png": (photo(n), boxed(1, 2)) for n in range(4)})
    study = ("study", "seeds", data, "--epochs", "1", *QUICK)
    dsu(*stage_one(data, "--foreground", "1", "--quiet"))
    dsu(*study, "-n", "2")
    dsu(*stage_one(data, "--foreground", "2", "--rebuild", "--quiet"))
    assert "other images, masks or encoders" in dsu(*study, "-n", "3", exit_code=2).output


def test_a_study_reports_only_its_own_runs(dsu: Dsu, house: House, tmp_path: Path) -> None:
    """Even if heads, results and tables are lost or exchanged."""
    first, second = tmp_path / "study" / "seed-0", tmp_path / "study" / "seed-1"
    study = ("study", "seeds", house.data, "--cache-root", house.features, "--epochs", "1", "--out", "study", *QUICK)
    dsu(*study, "-n", "2")
    told = (tmp_path / "study" / "study.csv").read_bytes()
    own = {name: (second / name).read_bytes() for name in ("head.safetensors", "evaluation.json", "metrics.csv")}

    for name in ("head.safetensors", "evaluation.json"):
        shutil.copy(first / name, second / name)
    assert "seed 0, not 1" in dsu(*study, "-n", "2", exit_code=2).output

    for name in ("head.safetensors", "evaluation.json"):
        (second / name).unlink()
    for content in (None, b"epoch;seconds\n1;2,5\n", b"\xff\x00"):
        (second / "metrics.csv").unlink() if content is None else (second / "metrics.csv").write_bytes(content)
        (second / "head.safetensors").write_bytes(own["head.safetensors"])
        said = dsu(*study, "-n", "2", exit_code=1).output
        assert "seed-1/metrics.csv" in said and "--resume" in said
    dsu("train-head", "--resume", "--out", second, "--cache-root", house.features, "--quiet")
    dsu(*study, "-n", "2")
    assert (second / "metrics.csv").read_bytes() == own["metrics.csv"]
    assert (tmp_path / "study" / "study.csv").read_bytes() == told


def test_a_study_detects_changed_images_without_its_record(dsu: Dsu, house: House, drawn: Path, tmp_path: Path) -> None:
    data = tmp_path / "shapes"
    shutil.copytree(house.data, data)
    study = ("study", "seeds", data, "--epochs", "1", "--out", "study", *QUICK)
    dsu(*stage_one(data, "--quiet"))
    dsu(*study, "-n", "2")
    (tmp_path / "study" / "study.json").unlink()
    for inner in ("images", "masks"):
        path = sorted((drawn / "test" / inner).iterdir())[3]
        shutil.copy(path, data / "test" / inner)
    assert "other images" in dsu(*study, "-n", "3", exit_code=2).output


# ---- folders that change while a run trains ----


@pytest.mark.parametrize("how", ["renamed", "unlocked"])
def test_a_run_does_not_write_to_a_folder_that_it_has_lost(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its folder is renamed and another run takes the name; or its lock is deleted and another run takes the folder."""
    from dsu.training.trainer import Trainer

    run, original, seen = tmp_path / "run", Trainer.step, list[bytes]()

    def step(self: Trainer, batch: Any) -> torch.Tensor:
        if not seen and self.epoch == 1:
            seen.append(b"")
            if how == "renamed":
                run.rename(tmp_path / "mine")
                dsu(*house.train("--seed", "7", "--out", run, *QUICK))
            else:
                (run / "run.lock").unlink()
                dsu("train-head", "--resume", "--out", run, "--cache-root", house.features, "--quiet")
            seen[0] = (run / "checkpoint.pt").read_bytes()
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", step)
    result = dsu(*house.train("--epochs", "2", "--out", run, *QUICK), exit_code=None)
    assert result.exit_code == 1, result.output
    assert "run.lock" in result.output
    assert (run / "checkpoint.pt").read_bytes() == seen[0]


def test_an_unreadable_run_does_not_disturb_other_commands(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's run in a shared folder."""
    other, open_file = tmp_path / "runs" / "other" / "run.lock", os.open
    shutil.copytree(house.run, other.parent)
    (other.parent / "head.safetensors").unlink()
    other.touch()

    def opened(path: Any, *more: Any, **options: Any) -> int:
        if Path(path) == Path("runs/other/run.lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, *more, **options)

    monkeypatch.setattr(os, "open", opened)
    dsu(*house.train(*QUICK))


# ---- settings ----


def test_a_runs_settings_file_reproduces_the_run(dsu: Dsu, house: House, tmp_path: Path) -> None:
    dsu(*house.train("--val-fraction", "0.3", "--out", "first", *QUICK))
    again = ("train-head", "--config", "first/settings.yaml", "--cache-root", house.features, "--out", "second")
    dsu(*again, "--quiet")
    assert same_weights(tmp_path / "first" / "head.safetensors", tmp_path / "second" / "head.safetensors")


def test_a_copied_run_resumes_in_its_new_folder(
    dsu: Dsu, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = house.train("--epochs", "2", *QUICK)
    dsu(*train, "--out", "whole")
    stopped(dsu, monkeypatch, 1, *train, "--out", "run")
    shutil.copytree("run", "copy [1] of run")
    Path("link").symlink_to("copy [1] of run", target_is_directory=True)
    dsu("train-head", "--resume", "--out", "link", "--cache-root", house.features, "--quiet")
    assert same_weights(Path("copy [1] of run/head.safetensors"), Path("whole/head.safetensors"))
    assert not Path("run/head.safetensors").exists()
