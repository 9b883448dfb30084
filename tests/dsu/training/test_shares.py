"""Held-out images: images of the same thing stay in one share, in hold-out, folds, resumed runs and studies."""

import json
from pathlib import Path

import pytest
from own_folder import boxed, photo, write

from dsu.config import build_config
from dsu.data.datasets import Paths
from dsu.data.splitting import SPLITS_FILE
from dsu.data.tiles import Tiling
from dsu.errors import DsuError, UsageError
from dsu.features.extraction import cache_features
from dsu.progress import SILENT
from dsu.settings import EncoderWeights, ExtractionSettings, TrainingSettings
from dsu.study.plan import StudyRequest, open_study
from dsu.training.run_folders import RunRecord
from dsu.training.runs import Run, open_run, prepare_run

SCENES = 12


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve parts with two photographs each (the second darker and cropped); two parts have no defect."""
    pairs = {}
    for scene in range(SCENES):
        mask = boxed(0) if scene < 2 else boxed(255)
        again = photo(scene).point(lambda value: value * 6 // 10).crop((4, 3, 116, 87))
        pairs |= {f"a_{scene:02}.png": (photo(scene), mask), f"b_{scene:02}.png": (again, mask[3:87, 4:116])}
    return write(tmp_path_factory.mktemp("data") / "parts", pairs)


@pytest.fixture(scope="module")
def stored(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of their features, and another of their tiles' features."""
    root = tmp_path_factory.mktemp("features")
    for tiling in (None, Tiling(60, 8)):
        config = build_config("toy", hiera_size=128, dino_size=126)
        settings = ExtractionSettings(features="V", views="none", level_views="none")
        paths = Paths(parts, root)
        cache_features(str(parts), config, settings, EncoderWeights(), paths=paths, tiling=tiling, device="cpu")
    return root


@pytest.fixture
def features(stored: Path) -> Path:
    """The stores, without a recorded split."""
    (stored / "parts" / SPLITS_FILE).unlink(missing_ok=True)
    return stored


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(SILENT, "say", lines.append)
    return lines


def settings_of(parts: Path, **given: object) -> TrainingSettings:
    settings = {"dataset": str(parts), "epochs": 1, "device": "cpu", "sheet_every": 0, "views": "none", "adapt_last": 0}
    return TrainingSettings(**{**settings, **given})


def run(parts: Path, features: Path, **given: object) -> Run:
    return prepare_run(settings_of(parts, **given), paths=Paths(parts, features), weights=EncoderWeights())


def shares_of_scenes(record: RunRecord) -> dict[str, set[str]]:
    """The shares of each scene's images or tiles."""
    found: dict[str, set[str]] = {}
    for name, (share, *_) in record.samples.items():
        found.setdefault(name.partition("@")[0][2:], set()).add(share)
    return found


def held_out(record: RunRecord) -> set[str]:
    return {scene for scene, shares in shares_of_scenes(record).items() if "val" in shares}


@pytest.mark.parametrize("way", [{}, {"end_to_end": True}, {"tile": 60, "overlap": 8}])
def test_images_of_the_same_thing_stay_in_one_share(
    way: dict[str, object], parts: Path, features: Path, said: list[str]
) -> None:
    found = run(parts, features, val_fraction=0.25, test_fraction=0.25, **way)
    shares = shares_of_scenes(found.record)
    assert len(shares) == SCENES and all(len(one) == 1 for one in shares.values())
    assert {frozenset(one) for one in shares.values()} == {frozenset({share}) for share in ("train", "val", "test")}
    assert len(found.record.groups) == SCENES
    assert any("24 images look like others, in 12 groups (such as a_00, b_00)" in line for line in said), said


def test_notes_describe_the_shares(parts: Path, features: Path) -> None:
    notes = run(parts, features, val_fraction=0.5).notes
    lines = {line.partition(": ")[0]: line for line in notes}
    assert lines["train"].startswith("train: 12 images of 6 things, 10 with an object, 2 without; median foreground")
    assert lines["val"].startswith("val: 12 images of 6 things, 10 with an object, 2 without; median foreground")
    assert not any(line.startswith("train:") for line in run(parts, features, val_fraction=0.0, keep="last").notes)


def test_folds_keep_groups_together_and_hold_each_out_once(parts: Path, features: Path) -> None:
    held = [held_out(run(parts, features, fold=f"{part}/3").record) for part in (1, 2, 3)]
    assert sorted(scene for scenes in held for scene in scenes) == [f"{scene:02}" for scene in range(SCENES)]
    study = open_study(
        StudyRequest("folds", 3),
        settings_of(parts),
        paths=Paths(parts, features),
        weights=EncoderWeights(),
        out=parts / "none",
    )
    assert len(study.members) == 3
    with pytest.raises(UsageError, match="too few images for 13 folds"):
        open_study(
            StudyRequest("folds", 13), settings_of(parts, group=r"_(\d+)"), paths=Paths(parts, features),
            weights=EncoderWeights(), out=parts / "none",
        )  # fmt: skip


def test_named_groups_override_similarity(parts: Path, features: Path, tmp_path: Path) -> None:
    by_pattern = run(parts, features, val_fraction=0.25, group=r"_(\d)").record
    tens = [
        {share for scene, one in shares_of_scenes(by_pattern).items() if scene[0] == ten for share in one}
        for ten in "01"
    ]
    assert tens == [{"train"}, {"val"}] and [len(group) for group in by_pattern.groups] == [20, 4]
    file = tmp_path / "pairs.csv"
    file.write_text("".join(f"{kind}_{scene:02}.png,{scene // 2}\n" for scene in range(SCENES) for kind in "ab"))
    by_file = held_out(run(parts, features, val_fraction=0.25, group=str(file)).record)
    assert by_file and all({scene, f"{int(scene) ^ 1:02}"} <= by_file for scene in by_file)
    alone = run(parts, features, val_fraction=0.25, group=".+").record
    assert not alone.groups and any(len(one) == 2 for one in shares_of_scenes(alone).values())


def test_a_resumed_run_keeps_its_shares_and_groups(parts: Path, features: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "pairs.csv", tmp_path / "run"
    file.write_text("".join(f"{kind}_{scene:02},{scene}\n" for scene in range(SCENES) for kind in "ab"))
    given = {"val_fraction": 0.25, "group": str(file), "epochs": 2}
    paths = Paths(parts, features)
    with open_run(settings_of(parts, **given), paths=paths, weights=EncoderWeights(), out=out) as first:
        record = RunRecord.read(out)
        assert len(record.groups) == SCENES and "group" in first.trainer.settings.model_fields_set
    file.unlink()
    (features / "parts" / SPLITS_FILE).unlink()
    with open_run(TrainingSettings(), paths=paths, weights=EncoderWeights(), out=out, resume=True) as second:
        assert RunRecord.read(out) == record and second.trainer.settings.group == str(file)
    with (
        pytest.raises(UsageError, match=r"other settings \(group"),
        open_run(TrainingSettings(group="x"), paths=paths, weights=EncoderWeights(), out=out, resume=True),
    ):
        pass
    plain = json.loads((out / "run.json").read_text())
    del plain["groups"]  # as in runs from before groups existed
    (out / "run.json").write_text(json.dumps(plain))
    assert RunRecord.read(out).groups == () and RunRecord.read(out).samples == record.samples


def test_groups_split_by_an_earlier_run_give_a_warning_or_an_error_if_named(
    parts: Path, features: Path, tmp_path: Path, said: list[str]
) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("".join(f"{kind}_{scene:02},{kind}{scene}\n" for scene in range(SCENES) for kind in "ab"))
    run(parts, features, val_fraction=0.25, group=str(file))
    file.write_text("".join(f"{kind}_{scene:02},{scene}\n" for scene in range(SCENES) for kind in "ab"))
    with pytest.raises(DsuError, match=rf"are in several splits.*{SPLITS_FILE}.*again"):
        run(parts, features, val_fraction=0.25, group=str(file))
    splits = features / "parts" / SPLITS_FILE
    torn = {key.partition("; group")[0]: shares for key, shares in json.loads(splits.read_text()).items()}
    splits.write_text(json.dumps(torn))
    run(parts, features, val_fraction=0.25)
    assert any("are in several splits" in line and "may be too good" in line for line in said)
