"""Defaults for unnamed data sets, heads and images: they are reported, and never surprising."""

import shutil
from pathlib import Path

import pytest
from house import House
from support import TINY, Dsu, toy_network

from dsu.heads.head_file import save_head
from dsu.settings import EncoderWeights
from dsu.sharing.head_facts import head_facts
from dsu.sharing.published import export_published, import_head


def test_the_default_store_is_reported_and_skips_tiles_and_images_without_masks(
    dsu: Dsu, drawn: Path, tmp_path: Path
) -> None:
    for name in ("whole", "cut"):
        shutil.copytree(drawn / "test", name)
    shutil.copytree(drawn / "test" / "images", tmp_path / "bare" / "images")
    quick = (*TINY, "--features", "V", "--views", "none", "--quiet")
    dsu("cache-features", "whole", *quick)
    train = ("train-head", "--epochs", 1, "--views", "none", "--adapt-last", 0, "--out")
    assert "cached last: whole (" in dsu(*train, "first").output
    dsu("cache-features", "cut", *quick, "--tile", 64, "--overlap", 8)
    dsu("cache-features", "bare", *quick)
    said = dsu(*train, "second").output
    assert "cached last: whole (" in said and "whole: 4 to train on" in said
    passed_over = next(line for line in said.splitlines() if line.startswith("skipped, although newer"))
    assert "in tiles 64-8" in passed_over and "bare (" in passed_over and "without masks" in passed_over
    said = dsu("study", "seeds", "-n", 2, "--epochs", 1, "--views", "none", "--adapt-last", 0, "--dry-run").output
    assert "cached last: whole (" in said
    assert "cached last" not in dsu(*train, "third", "whole").output


def test_features_are_drawn_for_the_newest_run_and_its_images(dsu: Dsu, house: House, tmp_path: Path) -> None:
    shutil.copytree(house.run, tmp_path / "runs" / "one")
    said = dsu("visualize", "features", "--no-tsne", "--count", 2).output
    assert "head: runs/one/head.safetensors, the newest" in said and "features of 2 images" in said
    photo = sorted((house.data / "test" / "images").iterdir())[0]
    said = dsu("visualize", "features", photo, *TINY, "--no-tsne", "--out", "alone.png").output
    assert "the newest" not in said, "a network that is named has no head"
    shutil.rmtree("runs")
    said = dsu("visualize", "features", *TINY, "--no-tsne", "--out", "none.png", exit_code=2).output
    assert "There are no images to show" in said


def test_predictions_are_shown_without_ground_truth(dsu: Dsu, house: House, tmp_path: Path) -> None:
    shutil.copytree(house.data / "test" / "images", "photos/deep")
    dsu("predict", "photos", "--head", house.run, "--out", "masks")
    for more in ([], ["photos"]):
        said = dsu("visualize", "predictions", *more, "--predictions", "masks", "--overwrite").output
        assert "2 images on" in said and "Written: predictions.png" in said
    shutil.copytree(house.run, tmp_path / "runs" / "one")
    shutil.rmtree("runs/one/predictions")
    dsu("predict", "photos", "--head", "runs/one")
    assert "2 images on" in dsu("visualize", "predictions", "--overwrite").output, "the newest need no truth"


def test_an_imported_head_reports_only_known_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch

    torch.save(export_published(toy_network()), tmp_path / "random.pth")
    state, info, notes = import_head(tmp_path / "random.pth", EncoderWeights())
    assert info.random_weights and all("random weights, as --random-weights draws them" in note for note in notes)
    other = export_published(toy_network())
    other["backbone_sam.sam_encoder.patch_embed.proj.bias"] += 1
    torch.save(other, tmp_path / "other.pth")
    state, info, notes = import_head(tmp_path / "other.pth", EncoderWeights())
    assert not info.random_weights and "hiera: NOT the random weights of toy" in notes[0]
    save_head(tmp_path / "head.safetensors", state, info)
    assert all(encoder.source is None for encoder in head_facts(tmp_path / "head.safetensors").encoders)


def test_no_error_suggests_removing_a_folder_in_an_images_place(tmp_path: Path) -> None:
    from dsu.data.images import UnreadableImage, read_image

    with pytest.raises(UnreadableImage, match="it is a folder") as refused:
        read_image(tmp_path)
    assert "remove" not in str(refused.value)
