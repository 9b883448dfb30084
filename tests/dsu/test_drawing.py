import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dsu.drawing import sheet, training_curves
from dsu.errors import UsageError
from dsu.pictures import cutout, page_files


def grey(height: int = 30, width: int = 40, level: int = 100) -> NDArray[np.uint8]:
    return np.full((height, width, 3), level, np.uint8)


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as drawn:
        return np.asarray(drawn.convert("RGB"))


def cells(path: Path, columns: int, cell: int = 80, height: int = 60, gap: int = 3) -> list[NDArray[np.uint8]]:
    """The cells of a sheet of one row at 110 dpi, whose title line is 20 pixels high."""
    page = pixels_of(path)
    lefts = [gap + column * (cell + gap) for column in range(columns)]
    return [page[gap + 20 : gap + 20 + height, left : left + cell] for left in lefts]


def test_a_sheet_accepts_files_images_and_arrays_and_shows_their_exact_pixels(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "image.png")
    mask = np.zeros((60, 80), np.uint8)
    mask[10:20, 10:30] = 255
    row = [tmp_path / "image.png", Image.fromarray(mask), mask / 255, mask > 0]
    sheet([row], ["image", "truth", "soft", "hard"], tmp_path / "new" / "sheet.png", cell=80)
    drawn = cells(tmp_path / "new" / "sheet.png", 4)
    assert np.array_equal(drawn[0], picture)
    assert all(np.array_equal(one, np.stack([mask] * 3, axis=-1)) for one in drawn[1:])


def test_rows_have_equal_heights_and_images_keep_their_proportions(tmp_path: Path) -> None:
    rows = [[grey()], [grey(40, 20)], [grey(60, 80)]]
    sheet(rows, ["image"], tmp_path / "sheet.png", cell=80)
    page = pixels_of(tmp_path / "sheet.png")
    assert page.shape[:2] == (3 + 20 + 3 * (60 + 3), 80 + 2 * 3)
    tall = page[23 + 63 : 23 + 63 + 60, 3:83]
    assert (tall == 100).all(axis=2).sum() == 30 * 60


def test_transparent_pixels_show_the_background_colour(tmp_path: Path) -> None:
    clear = cutout(grey(60, 80), np.zeros((60, 80), np.uint8))
    sheet([[clear]], ["clear"], tmp_path / "sheet.png", cell=80)
    [drawn] = cells(tmp_path / "sheet.png", 1)
    assert np.unique(drawn.reshape(-1, 3), axis=0).tolist() == [[228, 230, 233]]


def test_titles_and_labels_that_are_too_long_are_shortened(tmp_path: Path) -> None:
    sheet([[grey()]], ["a title without end " * 20], tmp_path / "sheet.png", labels=["$na_me$" * 90], cell=120)
    page = pixels_of(tmp_path / "sheet.png")
    assert (page[:, :2] == 255).all() and (page[:, -2:] == 255).all()
    assert (page[:20] < 128).any()


def test_a_pdf_contains_its_titles_as_text_and_is_reproducible(tmp_path: Path) -> None:
    for name in ("figure.pdf", "again.pdf"):
        sheet([[grey(), grey()]] * 7, ["Image", "Ours"], tmp_path / name, cell=300, dpi=300)
    content = (tmp_path / "figure.pdf").read_bytes()
    assert len(re.findall(rb"/Type /Page\b", content)) == 1
    assert b"/Type0" in content or b"/TrueType" in content
    assert (tmp_path / "again.pdf").read_bytes() == content


def test_the_files_of_several_pages_are_numbered(tmp_path: Path) -> None:
    names = [file.name for file in page_files(tmp_path / "figure.png", 3)]
    assert names == ["figure.png", "figure-2.png", "figure-3.png"]
    assert page_files(tmp_path / "figure.pdf", 3) == [tmp_path / "figure.pdf"]


def test_a_png_contains_its_resolution(tmp_path: Path) -> None:
    sheet([[grey()]], ["Image"], tmp_path / "figure.png", cell=300, dpi=300)
    with Image.open(tmp_path / "figure.png") as drawn:
        assert round(drawn.info["dpi"][0]) == 300


def test_a_sheet_with_wrong_numbers_of_titles_or_labels_is_refused(tmp_path: Path) -> None:
    for rows in ([], [[grey()]], [[grey(), grey()], [grey()]]):
        with pytest.raises(UsageError, match="2 titles needs 2 images"):
            sheet(rows, ["image", "truth"], tmp_path / "sheet.png")
    with pytest.raises(UsageError, match="2 labels do not match 1 rows"):
        sheet([[grey()]], ["mask"], tmp_path / "sheet.png", labels=["a", "b"])
    for name in ("sheet.jpg", "sheet"):
        with pytest.raises(UsageError, match=r"give a \.png or a \.pdf"):
            page_files(tmp_path / name, 1)


# ---- curves ----


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


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_training_curves(tmp_path: Path, epochs: int) -> None:
    training_curves(history(epochs), tmp_path / "new" / "curves.png")
    with Image.open(tmp_path / "new" / "curves.png") as drawn:
        assert drawn.format == "PNG"
        # There is a panel for validation only if there are values.
        assert drawn.height > 1000 if epochs > 1 else drawn.height < 800


def test_validation_is_drawn_on_the_scale_from_0_to_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fitted scale, a change of 1 % would look like a collapse."""
    limits: list[tuple[float, float]] = []
    save = Figure.savefig

    def saved(self: Figure, *arguments: Any, **options: Any) -> None:
        limits.extend(axes.get_ylim() for axes in self.axes if axes.get_ylabel() == "validation")
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    training_curves(history(4), tmp_path / "curves.png")
    assert limits == [(0, 1)]


def test_training_curves_omit_missing_values(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": float("nan")}, {"epoch": 3, "loss": 1.0}]
    training_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()


def test_a_history_without_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no epoch with a loss"):
        training_curves([], tmp_path / "curves.png")
