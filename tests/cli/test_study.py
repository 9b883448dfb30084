"""`dsu study`: the same results as single commands, from one store."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from kills import Forks
from safetensors.torch import load_file
from stopping import stop_at
from support import TINY, Dsu

from dsu.config import build_config
from dsu.data.datasets import Paths
from dsu.data.views import UNFLIPPED
from dsu.errors import UsageError
from dsu.features.extraction import cache_features
from dsu.settings import EncoderWeights, ExtractionSettings
from dsu.study.parallel import worker_environments

RECIPE = ("--adapt-last", 0, "--views", "none", "--epochs", 2, "--batch-size", 2, "--sheet-every", 0)


@pytest.fixture(scope="module")
def stored(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored features of `tiles` (nine images without a test split, two without an object) and `shapes` (with one)."""
    from PIL import Image

    home = tmp_path_factory.mktemp("stored")
    for kind in ("images", "masks"):
        (home / "tiles" / kind).mkdir(parents=True)
        for path in sorted((drawn / "train" / kind).iterdir())[:9]:
            shutil.copy(path, home / "tiles" / kind)
    for path in sorted((home / "tiles" / "masks").iterdir())[:2]:
        Image.new("L", Image.open(path).size).save(path)
    for folder in (drawn, home / "tiles"):
        cache_features(
            str(folder),
            build_config("toy", hiera_size=128, dino_size=126),
            ExtractionSettings(views=UNFLIPPED),
            EncoderWeights(),
            paths=Paths(home, home / "features"),
            device="cpu",
        )
    return home


@pytest.fixture
def tiles(stored: Path, dsu: Dsu, tmp_path: Path) -> Path:
    """The folder `tiles`, with its stored features in the working folder."""
    shutil.copytree(stored / "features", tmp_path / "features")
    return stored / "tiles"


def record(study: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((study / "study.json").read_text())
    return found


def figures(study: Path) -> dict[str, Any]:
    """All results, without times."""
    return {member["name"]: member["sets"] for member in record(study)["members"]}


def rows(study: Path) -> list[dict[str, str]]:
    with (study / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_heads(first: Path, second: Path) -> bool:
    one, other = (load_file(run / "head.safetensors") for run in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_folds_equal_single_commands_and_evaluate_every_image_once(dsu: Dsu, tiles: Path) -> None:
    said = dsu("study", "folds", tiles, "-k", 3, *RECIPE, "--out", "study").output
    for words in ("fold-1", "mean", "sd", "all images", "false alarms", "with an object", "3 runs"):
        assert words in said
    dsu("train-head", tiles, "--fold", "2/3", *RECIPE, "--out", "typed")
    dsu("predict", "--head", "typed")
    dsu("eval", "--predictions", "typed/predictions")
    study = Path("study")
    assert same_heads(study / "fold-2", Path("typed"))
    for name in ("metrics.json", "metrics.csv"):
        assert (study / "fold-2/predictions" / name).read_text() == (Path("typed/predictions") / name).read_text()
    names = [path.stem for path in sorted((tiles / "images").iterdir())]
    assert sorted(row["name"] for row in rows(study)) == names
    empties = Counter(row["member"] for row in rows(study) if row["empty"] == "True")
    assert set(empties.values()) == {1}, "two images without an object are in two folds"
    assert {"study.md", "study.csv", "study.png", "settings.yaml"} <= {path.name for path in study.iterdir()}


def test_folds_do_not_use_the_test_split(dsu: Dsu, tiles: Path, drawn: Path) -> None:
    dsu("study", "folds", drawn, "-k", 2, *RECIPE, "--epochs", 1, "--out", "study", "--quiet")
    names = sorted(row["name"] for row in rows(Path("study")))
    assert names == [path.stem for path in sorted((drawn / "train" / "images").iterdir())]


def test_seeds_differ_only_in_their_seed_and_are_evaluated_on_the_test_split(
    dsu: Dsu, tiles: Path, drawn: Path
) -> None:
    command = ("study", "seeds", drawn, *RECIPE, "--epochs", 1, "--out", "study", "--quiet", "-n")
    dsu(*command, 2)
    dsu("train-head", drawn, *RECIPE, "--epochs", 1, "--seed", 1, "--out", "typed", "--quiet")
    dsu("predict", "--head", "typed", "--quiet")
    dsu("eval", "--predictions", "typed/predictions", "--quiet")
    assert same_heads(Path("study/seed-1"), Path("typed"))
    assert not same_heads(Path("study/seed-1"), Path("study/seed-0"))
    typed = json.loads(Path("typed/predictions/metrics.json").read_text())["shapes-TE"]
    found = figures(Path("study"))["seed-1"]["shapes-TE"]
    assert {name: typed[name] for name in found["figures"] if name in typed} == {
        name: value for name, value in found["figures"].items() if name in typed
    }
    settings = [yaml.safe_load(Path(f"study/seed-{seed}/settings.yaml").read_text()) for seed in (0, 1)]
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {"seed"}
    before = Path("study/seed-0/head.safetensors").stat().st_mtime_ns
    dsu(*command, 3)
    assert list(figures(Path("study"))) == ["seed-0", "seed-1", "seed-2"]
    assert Path("study/seed-0/head.safetensors").stat().st_mtime_ns == before


def test_without_a_test_split_all_runs_are_evaluated_on_the_same_images(dsu: Dsu, tiles: Path) -> None:
    dsu("study", "seeds", tiles, "-n", 2, *RECIPE, "--epochs", 1, "--val-fraction", 0.3, "--out", "study", "--quiet")
    evaluated = [{row["name"] for row in rows(Path("study")) if row["member"] == f"seed-{seed}"} for seed in (0, 1)]
    assert evaluated[0] == evaluated[1] != set()
    kept = [yaml.safe_load(Path(f"study/seed-{seed}/settings.yaml").read_text())["keep"] for seed in (0, 1)]
    assert kept == ["last", "last"], "the held-out images must not select the weights"


@pytest.fixture
def whole(dsu: Dsu, tiles: Path) -> dict[str, Any]:
    dsu("study", "folds", tiles, "-k", 2, *RECIPE, "--out", "whole", "--quiet")
    return figures(Path("whole"))


def test_an_interrupted_study_resumes_with_the_same_result(
    dsu: Dsu, tiles: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs have two steps in the first run and three in the second; each is stopped in its second epoch."""
    command = ("study", "folds", tiles, "-k", 2, *RECIPE, "--out", "study")
    for stop in (3, 6):
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            said = " ".join(dsu(*command, exit_code=130).output.split())
            assert "run the same command again" in said, said
    states = dsu(*command, "--dry-run").output
    assert "fold-1 done fold-2 started: 1 of 2 epochs" in " ".join(states.split())
    trained = Path("study/fold-1/head.safetensors").stat().st_mtime_ns
    said = dsu(*command).output
    assert "fold-1: done already, skipped" in said
    assert Path("study/fold-1/head.safetensors").stat().st_mtime_ns == trained
    assert figures(Path("study")) == whole
    assert all(same_heads(Path("study") / fold, Path("whole") / fold) for fold in ("fold-1", "fold-2"))


def test_finished_runs_are_skipped(
    dsu: Dsu, tiles: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 0)
    before = {path: path.stat().st_mtime_ns for path in Path("whole").glob("fold-*/**/*") if path.is_file()}
    dsu("study", "folds", tiles, "-k", 2, *RECIPE, "--out", "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Without its result, a run is evaluated again, but not trained.
    Path("whole/fold-1/evaluation.json").unlink()
    dsu("study", "folds", tiles, "-k", 2, *RECIPE, "--out", "whole")
    assert figures(Path("whole")) == whole


@pytest.mark.slow
def test_a_study_killed_at_random_writes_resumes_with_the_same_result(
    dsu: Dsu, tiles: Path, whole: dict[str, Any]
) -> None:
    command = ("study", "folds", tiles, "-k", 2, *RECIPE, "--quiet", "--out")
    with Forks(Path.cwd()) as forks:
        writes = forks.run([*command, "counted"]).writes
        for share in (0.1, 0.3, 0.5, 0.7, 0.95):
            assert forks.run([*command, "study"], at_write=max(1, int(share * writes) // 3)).killed or share > 0.5
        done = forks.run([*command, "study"])
    assert done.status == 0, done.said
    assert figures(Path("study")) == whole


def test_parallel_runs_give_the_same_results(dsu: Dsu, tiles: Path, whole: dict[str, Any]) -> None:
    """The first run's folder can't be created, and the other run finishes; the same command then trains the first."""
    command = ("study", "folds", tiles, "-k", 2, *RECIPE, "--out", "study")
    Path("study").mkdir()
    Path("study/fold-1").write_text("in the way")
    said = dsu(*command, "--parallel", 2, exit_code=1).output
    assert "1 of 2 runs failed (fold-1: " in said and "a file has that name" in said
    assert figures(Path("study")) == {"fold-2": whole["fold-2"]}
    assert "other version" not in said, "what is frozen computes with the store's number of threads"
    Path("study/fold-1").unlink()
    trained = Path("study/fold-2/head.safetensors").stat().st_mtime_ns
    said = dsu(*command, "--parallel", 2).output
    assert "fold-2: done already, skipped" in said and "fold-1: done" in said
    assert Path("study/fold-2/head.safetensors").stat().st_mtime_ns == trained
    assert figures(Path("study")) == whole
    assert all(same_heads(Path("study") / fold, Path("whole") / fold) for fold in ("fold-1", "fold-2"))


def test_other_runs_continue_after_one_is_killed_and_ctrl_c_ends_all(dsu: Dsu, tiles: Path) -> None:
    recipe = [str(word) for word in (*RECIPE, "--epochs", 2000, "--parallel", 2, "--out", "study")]
    house = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (house, house / "cache", house / "cli")))
    process = subprocess.Popen(
        [sys.executable, "-m", "dsu", "study", "seeds", str(tiles), "-n", "3", "--val-fraction", "0.3", *recipe],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def wait_for(*seeds: int) -> None:
        deadline = time.monotonic() + 200
        while not all(Path(f"study/seed-{seed}/checkpoint.pt").exists() for seed in seeds):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

    wait_for(0, 1)
    [one, other] = (
        child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
    )
    one.kill()
    wait_for(2)
    assert other.is_running() and process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130, said
    assert "failed; the others continue" in said and "run the same command again" in said
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_parallel_runs_have_their_own_threads_or_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    assert worker_environments(2, "auto") == [{"OMP_NUM_THREADS": "4"}] * 2
    assert worker_environments(12, "cpu")[0] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in worker_environments(2, "auto")] == ["3", "5"]
    for count, device in ((3, "auto"), (2, "cuda:0")):
        with pytest.raises(UsageError, match=f"--parallel {count} needs a GPU for each"):
            worker_environments(count, device)


def test_other_settings_and_runs_in_the_folder_are_refused(dsu: Dsu, tiles: Path, whole: dict[str, Any]) -> None:
    base = ("study", "folds", tiles, *RECIPE, "--out", "whole")
    before = record(Path("whole"))
    for more, words in (
        (("-k", 2, "--epochs", 3), ("epochs 2 -> 3", "another --out")),
        (("-k", 2, "--lr", 0.01), ("lr 0.001 -> 0.01",)),
        (("-k", 3), ("fold-1", "fold 1/2 -> 1/3")),
        (("-k", 99), ("too few images for 99 folds",)),
    ):
        said = dsu(*base, *more, exit_code=2).output
        assert all(word in said for word in words), said
    assert "contains other runs (fold-1)" in dsu("study", "seeds", tiles, *RECIPE, "--out", "whole", exit_code=2).output
    Path("best.yaml").write_text("keep: best\n")
    said = dsu("study", "folds", tiles, "--config", "best.yaml", exit_code=2).output
    assert "keep: best" in said and "used for evaluation" in said
    assert "numbers from 0 to 7" in dsu("study", "depth", tiles, "--depths", "0,8", exit_code=2).output
    assert "no held-out images" in dsu("study", "seeds", tiles, "--val-fraction", 0, exit_code=2).output
    assert record(Path("whole")) == before


def test_changed_images_are_detected(dsu: Dsu, stored: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(stored / "tiles", mine)
    dsu("cache-features", mine, *TINY, "--views", "none", "--quiet")
    command = ("study", "folds", mine, "-k", 2, *RECIPE, "--epochs", 1, "--out", "study", "--quiet")
    dsu(*command)
    path = sorted((mine / "masks").iterdir())[-1]
    shutil.copy(sorted((mine / "masks").iterdir())[0], path)
    shutil.copy(sorted((mine / "images").iterdir())[0], mine / "images" / f"{path.stem}.jpg")
    dsu("cache-features", mine, *TINY, "--views", "none", "--quiet")
    assert "started with other images, masks or encoders of mine" in dsu(*command, exit_code=2).output


def test_dry_run_lists_the_remaining_work_and_writes_nothing(dsu: Dsu, tiles: Path) -> None:
    said = dsu("study", "folds", tiles, "-k", 3, *RECIPE, "--dry-run").output
    assert said.count("to do") == 3 and "studies/tiles-" in said
    assert not Path("studies").exists()


def test_depth_reports_scores_time_and_disk(dsu: Dsu, tiles: Path) -> None:
    recipe = (*RECIPE[2:], "--epochs", 1, "--val-fraction", 0.3)
    said = dsu("study", "depth", tiles, "--depths", "0,1,all", *recipe, "--out", "study").output
    for words in ("s/epoch", "s/step", "MB/image", "store", "depth-0", "depth-1", "depth-7"):
        assert words in said
    assert "depth-0 mean" not in said, "one run of each has no spread"
    members = {member["name"]: member for member in record(Path("study"))["members"]}
    assert {name: set(member["reads"]) for name, member in members.items()} == {
        "depth-0": {"S1", "S2", "S3", "S4", "V"},
        "depth-1": {"S1", "S2", "S3", "V"},
        "depth-7": {"pixels", "V"},
    }
    for member in members.values():
        assert member["store_bytes"] == 9 * member["image_bytes"], "one view of nine images"
        steps = -(-member["train_images"] // 2)
        assert member["seconds_per_epoch"] == pytest.approx(member["seconds_per_step"] * steps)


def test_ablations_without_stored_features_are_left_out(dsu: Dsu, tiles: Path, drawn: Path) -> None:
    command = ("study", "ablations", drawn, *RECIPE, "--epochs", 1, "--out", "study")
    said = dsu(*command, exit_code=1).output
    assert "ablation-none" in said and "ablation-A" in said
    [line] = [line for line in said.splitlines() if line.startswith("ablation-B is left out")]
    assert "ablation-C is left out, since the store lacks V4" in said
    assert list(figures(Path("study"))) == ["ablation-none", "ablation-A"]
    dsu(*line.split("`")[1].split()[1:], "--quiet")
    said = dsu(*command).output
    assert "left out" not in said and said.count("done already") == 2
    assert list(figures(Path("study"))) == ["ablation-none", "ablation-A", "ablation-B", "ablation-C"]


def test_several_seeds_per_ablation_have_a_mean(dsu: Dsu, tiles: Path, drawn: Path) -> None:
    said = dsu("study", "ablations", drawn, "-n", 2, *RECIPE, "--epochs", 1, "--out", "study", exit_code=1).output
    assert "ablation-A-seed-1" in said and "ablation-A mean" in said and "ablation-none sd" in said
    groups = record(Path("study"))["sets"]["shapes-TE"]["groups"]
    assert {group: found["S"]["count"] for group, found in groups.items()} == {"ablation-none": 2, "ablation-A": 2}
    settings = [
        yaml.safe_load(Path(f"study/{name}/settings.yaml").read_text()) for name in ("ablation-A", "ablation-A-seed-1")
    ]
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {"seed"}


@pytest.mark.parametrize("kind", ["folds", "seeds", "depth", "ablations"])
def test_options_are_those_of_train_head(dsu: Dsu, kind: str) -> None:
    said = dsu("study", kind, "--help").output
    shared = ("--epochs", "--batch-size", "--lr", "--views", "--balance", "--region", "--bce", "--tile", "--preset")
    assert [option for option in shared if option not in said] == []
    sets_itself = {"folds": "--val-fraction", "seeds": "--seed ", "depth": "--adapt-last", "ablations": "--ablation "}
    assert sets_itself[kind] not in said
    assert "--resume " not in said and "--overwrite" not in said
