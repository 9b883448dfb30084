"""Options for few images and rare objects, from the store and end to end: cached augmentations, tiles, balance, frozen
adapters, and starting from another head."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dsu.config import build_config
from dsu.data.datasets import Paths
from dsu.data.decoding import augmentation
from dsu.data.images import file_sha256, read_image, resize_image
from dsu.data.tiles import Tiling
from dsu.data.views import Views, view_index
from dsu.equivalence import check_equivalence
from dsu.errors import DsuError, UsageError
from dsu.features.extraction import cache_features
from dsu.features.stores import find_training_store
from dsu.heads.head_file import HEAD_FILE
from dsu.progress import SILENT
from dsu.settings import EncoderWeights, ExtractionSettings, TrainingSettings
from dsu.training.runs import Run, open_run, prepare_run

CONFIG = build_config("toy", hiera_size=128, dino_size=126)
VIEWS = Views(4, 2)
TILING = Tiling(40, 8)


def cache(data: Path, root: Path, tiling: Tiling | None = None, views: Views = VIEWS) -> None:
    cache_features(
        str(data / "train"),
        CONFIG,
        ExtractionSettings(views=views, level_views=views),
        EncoderWeights(),
        paths=Paths(data, root),
        tiling=tiling,
        device="cpu",
    )


@pytest.fixture(scope="module")
def features(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all features with two cached augmentations, and another of tiles."""
    root = tmp_path_factory.mktemp("features")
    cache(drawn, root)
    cache(drawn, root, TILING, Views(1))
    return root


def settings_of(drawn: Path, **given: object) -> TrainingSettings:
    settings = {"dataset": str(drawn / "train"), "batch_size": 5, "epochs": 2, "device": "cpu", "sheet_every": 0}
    return TrainingSettings(**{**settings, **given})


def run(drawn: Path, features: Path, out: Path, **given: object) -> Run:
    """A prepared run that does not lock its folder."""
    run = prepare_run(settings_of(drawn, **given), paths=Paths(drawn, features), weights=EncoderWeights())
    run.trainer.out = out
    return run


def trained(drawn: Path, features: Path, out: Path, **given: object) -> dict[str, torch.Tensor]:
    with open_run(settings_of(drawn, **given), paths=Paths(drawn, features), weights=EncoderWeights(), out=out) as run:
        run.trainer.run()
    return load_file(out / HEAD_FILE)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("adapt_last", [7, 1, 0])
def test_augmented_views_are_exact_from_every_resume_point(features: Path, drawn: Path, adapt_last: int) -> None:
    settings = TrainingSettings(
        dataset=str(drawn / "train"), batch_size=5, device="cpu", views=VIEWS, adapt_last=adapt_last
    )
    report = check_equivalence(settings, paths=Paths(drawn, features), weights=EncoderWeights(), steps=4)
    assert report.passed and {row.allowance for row in report.rows} == {0.0}


def test_augmentations_are_applied_before_resizing(features: Path, drawn: Path) -> None:
    store = find_training_store(features, str(drawn / "train"))
    split = store.source.find()
    assert split is not None and store.source.tiling is None
    pair = split.pairs[2]
    expected, _ = augmentation(file_sha256(pair.image), 2).apply(
        read_image(pair.image), np.asarray(Image.open(pair.mask))
    )
    row = [store.manifest.row(pair.name)]
    stored = store.reader(["pixels"]).read(row, [view_index("pixels", 8)])["pixels"][0]
    assert np.array_equal(stored, resize_image(expected, 128))


def test_errors_for_missing_views_name_the_command_that_stores_them(features: Path, drawn: Path) -> None:
    with pytest.raises(DsuError, match=r"flips\+3.*cache-features .*--views"):
        run(drawn, features, Path("nowhere"), views="flips+3")


def test_adding_views_computes_only_new_ones(drawn: Path, tmp_path: Path) -> None:
    cache(drawn, tmp_path, views=Views(2))
    [store] = tmp_path.glob("*/*")
    before = {path: path.read_bytes() for path in store.glob("*/c/**/*") if path.is_file()}
    cache(drawn, tmp_path, views=Views(2, 1))
    after = {path: path.read_bytes() for path in store.glob("*/c/**/*") if path.is_file()}
    assert before.items() <= after.items() and len(after) > len(before)


def test_tiles_are_exact(features: Path, drawn: Path) -> None:
    settings = TrainingSettings(
        dataset=str(drawn / "train"), batch_size=5, device="cpu", views="none", tile=40, overlap=8, adapt_last=1
    )
    report = check_equivalence(settings, paths=Paths(drawn, features), weights=EncoderWeights(), steps=4)
    assert report.passed and {row.allowance for row in report.rows} == {0.0}


def test_without_tiling_the_store_of_whole_images_is_used(features: Path, drawn: Path, tmp_path: Path) -> None:
    whole = run(drawn, features, tmp_path / "whole").trainer
    tiles = run(drawn, features, tmp_path / "tiles", tile=40, overlap=8, views="none").trainer
    assert "@" not in whole.main.train.names[0] and "@" in tiles.main.train.names[0]
    assert (tiles.settings.tile, tiles.settings.overlap) == (40, 8) and whole.settings.tile is None
    held = {name.rpartition("@")[0] for name in tiles.info.dataset["held_out"]}
    assert held.isdisjoint({name.rpartition("@")[0] for name in tiles.main.train.names})
    with pytest.raises(UsageError, match="of tiles 50-6"):
        run(drawn, features, tmp_path / "other", tile=50)


def test_balance_draws_the_same_end_to_end_and_needs_both_kinds(features: Path, drawn: Path, tmp_path: Path) -> None:
    tiled = {"tile": 40, "overlap": 8, "views": "none", "balance": True, "adapt_last": 0, "epochs": 1}
    stored, live = (run(drawn, features, tmp_path / str(way), end_to_end=way, **tiled).trainer for way in (False, True))
    assert stored.epoch_batches(3) == live.epoch_batches(3)
    names = [name for batch, _ in stored.epoch_batches(0) for name in batch]
    assert stored.empty
    assert sum(name in stored.empty for name in names) == len(names) // 2
    with pytest.raises(UsageError, match=r"with an object, so nothing can be balanced"):
        run(drawn, features, tmp_path / "whole", balance=True)


def test_frozen_adapters_give_the_same_end_to_end(features: Path, drawn: Path, tmp_path: Path) -> None:
    schedule = {"freeze_adapter_epochs": 1, "epochs": 3, "start_feature": "pixels"}
    stored, live = (trained(drawn, features, tmp_path / str(way), end_to_end=way, **schedule) for way in (False, True))
    assert same(stored, live)


def test_frozen_adapters_do_not_change_and_learn_afterwards(features: Path, drawn: Path, tmp_path: Path) -> None:
    trainer = run(drawn, features, tmp_path / "run", freeze_adapter_epochs=1, epochs=2).trainer
    adapters = trainer.network.head.adapters
    before = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    others = trainer.network.head.sides[0].weight.clone()
    assert trainer.phase.point.block == CONFIG.hiera.depth
    for batch in trainer.epoch_batches(0):
        trainer.step(trainer.phase.train.read(*batch))
    assert same(dict(adapters.state_dict()), before)
    assert not torch.equal(trainer.network.head.sides[0].weight, others)
    # Adapters start as the identity, so that outputs with and without them are equal.
    batch = trainer.epoch_batches(1)[0]
    without = trainer.evaluated(trainer.phase.train, batch[0])
    _, outputs, _ = next(iter(without))
    trainer.epoch = 1
    assert trainer.phase is trainer.main
    _, adapted, _ = next(iter(trainer.evaluated(trainer.main.train, batch[0])))
    for one, other in zip(outputs, adapted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # S1..S4 were rounded to float16
    trainer.network.train()
    trainer.step(trainer.main.train.read(*batch))
    moved = {name for name, tensor in adapters.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if ".up." in name} <= moved


def test_a_run_killed_after_frozen_adapters_resumes_exactly(features: Path, drawn: Path, tmp_path: Path) -> None:
    whole = trained(drawn, features, tmp_path / "whole", freeze_adapter_epochs=1, epochs=2)
    where = {"paths": Paths(drawn, features), "weights": EncoderWeights(), "out": tmp_path / "run"}
    with open_run(settings_of(drawn, freeze_adapter_epochs=1, epochs=2), **where) as first:
        first.trainer._run_epoch(SILENT)
    with open_run(TrainingSettings(device="cpu"), **where, resume=True) as again:
        assert again.trainer.epoch == 1
        again.trainer.run()
    assert same(whole, load_file(tmp_path / "run" / HEAD_FILE))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"freeze_adapter_epochs": 2}, "leaves no epoch of"),
        ({"freeze_adapter_epochs": 1, "adapt_last": 0}, "needs adapters"),
        ({"freeze_adapter_epochs": 1, "init_from": "x"}, "for a trained one"),
        ({"fold": "1/3", "val_fraction": 0.2}, "both define the held-out images"),
        ({"tile": 40, "overlap": 8, "views": "flips+1"}, r"lacks pixels .* --tile 40 --overlap 8 .*` with as many"),
    ],
)
def test_contradicting_settings_are_refused(
    features: Path, drawn: Path, tmp_path: Path, given: dict[str, object], reason: str
) -> None:
    with pytest.raises(DsuError, match=reason):
        run(drawn, features, tmp_path / "run", **given)


def test_init_from_loads_the_heads_weights(features: Path, drawn: Path, tmp_path: Path) -> None:
    head = trained(drawn, features, tmp_path / "first", epochs=1)
    started = run(drawn, features, tmp_path / "second", init_from=str(tmp_path / "first"), seed=5)
    assert same(dict(started.trainer.network.head.state_dict()), head)
    assert any("initial head" in note and "1 epochs" in note for note in started.notes)


def test_init_from_a_head_with_fewer_adapters_keeps_its_predictions(
    features: Path, drawn: Path, tmp_path: Path
) -> None:
    trained(drawn, features, tmp_path / "first", epochs=1, adapt_last=0)
    few = run(drawn, features, tmp_path / "a", init_from=str(tmp_path / "first"), adapt_last=0).trainer
    more = run(drawn, features, tmp_path / "b", init_from=str(tmp_path / "first"), adapt_last=2).trainer
    names = few.main.train.names[:3]
    [(_, first, _)] = few.evaluated(few.main.train, names)
    [(_, second, _)] = more.evaluated(more.main.train, names)
    torch.testing.assert_close(
        first[-1], second[-1], atol=2e-3, rtol=0
    )  # S4 is stored for one, and computed for the other


def test_init_from_a_head_of_another_network_is_refused(features: Path, drawn: Path, tmp_path: Path) -> None:
    trained(drawn, features, tmp_path / "first", epochs=1)
    for given in ({"ablation": "A"}, {"adapt_last": 2}):
        with pytest.raises(UsageError, match=r"belongs to another network .* start from a head of"):
            run(drawn, features, tmp_path / "second", init_from=str(tmp_path / "first"), **given)


def test_folds_hold_out_every_image_once(features: Path, drawn: Path, tmp_path: Path) -> None:
    held = [run(drawn, features, tmp_path / str(part), fold=f"{part}/3").trainer.main.validation for part in (1, 2, 3)]
    names = [name for samples in held if samples is not None for name in samples.names]
    assert len(names) == len(set(names))
    everything = run(drawn, features, tmp_path / "all", val_fraction=0).trainer.main.train.names
    assert sorted(names) == sorted(everything)


def test_validation_iou_is_averaged_over_samples_with_an_object(features: Path, drawn: Path, tmp_path: Path) -> None:
    trainer = run(
        drawn, features, tmp_path / "run", tile=40, overlap=8, views="none", adapt_last=0, val_fraction=0.5
    ).trainer
    samples = trainer.main.validation
    assert samples is not None
    by_hand = []
    for _, outputs, mask in trainer.evaluated(samples, samples.names):
        for logits, truth in zip(outputs[-1][:, 0], mask[:, 0] > 128 / 255, strict=True):
            predicted = logits.sigmoid() > 0.5
            if truth.any():
                by_hand.append(float((predicted & truth).sum() / (predicted | truth).sum()))
    assert 0 < len(by_hand) < len(samples.names)
    assert trainer.validate(samples)["val_IoU"] == pytest.approx(np.mean(by_hand), abs=1e-9)
