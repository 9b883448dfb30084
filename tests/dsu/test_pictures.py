import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dsu.errors import DsuError, UsageError
from dsu.pictures import cutout, overlay, training_curves


def grey_ground(height: int = 30, width: int = 40) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 100, np.uint8)


def box(height: int = 30, width: int = 40) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[10:20, 10:30] = 255
    return mask


def history(epochs: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "lr": 1e-3 / epoch,
            "loss": 2 / epoch,
            "loss_D1": 1.2 / epoch,
            "loss_D2": 1.1 / epoch,
            "loss_D3": 1 / epoch,
            "val_loss": 2.5 / epoch if epoch % 2 == 0 else "",
            "val_S": 0.9 if epoch % 2 == 0 else "",
            "val_MAE": 0.05 if epoch % 2 == 0 else "",
            "val_IoU": 0.8 if epoch % 2 == 0 else "",
        }
        for epoch in range(1, epochs + 1)
    ]


def test_an_overlay_tints_the_object_and_outlines_it() -> None:
    drawn = overlay(grey_ground(), box())
    assert (drawn.mode, drawn.size) == ("RGB", (40, 30))
    pixels = np.asarray(drawn).astype(int)
    inside, edge, outside = pixels[15, 20], pixels[15, 10], pixels[2, 2]
    assert outside.tolist() == [100, 100, 100]
    assert edge.tolist() == [255, 32, 140]
    assert 100 < inside[0] < 255


def test_an_unsure_mask_tints_faintly_and_has_no_outline() -> None:
    pixels = np.asarray(overlay(grey_ground(), box() // 4)).astype(int)
    assert 100 < pixels[15, 10, 0] == pixels[15, 20, 0] < 130


def test_the_callers_image_stays_as_it_is() -> None:
    image = Image.fromarray(grey_ground())
    overlay(image, box())
    cutout(image, box())
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), grey_ground())


def test_a_cutouts_opacity_is_the_mask(tmp_path: Path) -> None:
    Image.fromarray(grey_ground()).save(tmp_path / "image.png")
    Image.fromarray(box()).save(tmp_path / "mask.png")
    for image, mask in ((grey_ground(), box()), (tmp_path / "image.png", tmp_path / "mask.png")):
        drawn = cutout(image, mask)
        assert drawn.mode == "RGBA"
        assert np.array_equal(np.asarray(drawn)[..., 3], box())
        assert np.array_equal(np.asarray(drawn)[..., :3], grey_ground())


@pytest.mark.parametrize("draw", [overlay, cutout])
def test_a_mask_of_another_size_is_refused(draw: Any) -> None:
    with pytest.raises(DsuError, match="40x30 pixels has no use for a mask of 20x10"):
        draw(grey_ground(), box(10, 20))


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_training_curves(tmp_path: Path, epochs: int) -> None:
    training_curves(history(epochs), tmp_path / "new" / "curves.png")
    with Image.open(tmp_path / "new" / "curves.png") as drawn:
        assert drawn.format == "PNG"
        # Validation has a panel of its own once there is any.
        assert drawn.height > 1000 if epochs > 1 else drawn.height < 800


def test_validation_is_drawn_on_the_whole_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a change of 1 % looks like a plunge."""
    limits: list[tuple[float, float]] = []
    save = Figure.savefig

    def saved(self: Figure, *arguments: Any, **options: Any) -> None:
        limits.extend(axes.get_ylim() for axes in self.axes if axes.get_ylabel() == "validation")
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    training_curves(history(4), tmp_path / "curves.png")
    assert limits == [(0, 1)]


def test_training_curves_of_a_file_are_those_of_its_rows(tmp_path: Path) -> None:
    rows = history(4)
    with (tmp_path / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    training_curves(tmp_path / "history.csv", tmp_path / "a.png")
    training_curves(rows, tmp_path / "b.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "b.png")))


def test_training_curves_leave_out_what_is_not_there(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": float("nan")}, {"epoch": 3, "loss": 1.0}]
    training_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


def test_a_history_without_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no epoch with a loss"):
        training_curves([], tmp_path / "curves.png")
    with pytest.raises(UsageError, match=r"absent\.csv is not a file"):
        training_curves(tmp_path / "absent.csv", tmp_path / "curves.png")
