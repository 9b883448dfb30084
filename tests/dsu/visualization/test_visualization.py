"""Figures of features and predictions: projections, choice of images, drawing."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import toy_network

from dsu.data.datasets import Paths
from dsu.data.images import UnreadableImage
from dsu.drawing import DPI, Page, fill_pages
from dsu.errors import DsuError, UsageError
from dsu.pictures import CELL_GROUND
from dsu.progress import SILENT, Task
from dsu.runtime import choose_runtime
from dsu.settings import EncoderWeights
from dsu.visualization.compared import ComparedImage, choose_worst, find_compared, pick_names
from dsu.visualization.comparison import ComparisonFigure
from dsu.visualization.features import (
    FeatureGroup,
    FeatureLevel,
    ShownImage,
    choose_blocks,
    choose_network,
    compute_features,
    find_shown,
    open_network,
)
from dsu.visualization.figures import FeatureFigure, choose_tokens, mask_of_tokens, principal_colours, tsne_positions

FRAME_GREY: Final = (154, 160, 166)


def noise(height: int, width: int, channels: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(height, width, channels)).astype(np.float32)


class Listener:
    """A progress that records messages, and tasks with their number of units."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.phases: dict[str, int] = {}

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def task(self, label: str, total: int, unit: str = "images") -> Iterator[Task]:
        self.phases[label] = total
        with SILENT.task(label, total, unit) as task:
            yield task


# ---- pages ----


@pytest.mark.parametrize(
    ("heights", "pages"),
    [([3, 3, 3], [2, 1]), ([4, 4, 4], [1, 1, 1]), ([9, 1, 1], [1, 2]), ([2, 2, 2, 9, 1], [3, 1, 1]), ([], [])],
)
def test_pages_are_filled_in_order_with_at_least_one_item(heights: list[float], pages: list[int]) -> None:
    filled = fill_pages(range(len(heights)), heights, 6.5)
    assert [len(page) for page in filled] == pages
    assert [item for page in filled for item in page] == list(range(len(heights)))


def test_a_picture_is_drawn_pixel_by_pixel_in_the_centre_of_its_cell() -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)
    page = Page(1, 0.5)
    page.picture(Image.fromarray(drawn), 0.1, 0.1, 0.4, 90 / DPI)
    page.finish().canvas.draw()
    pixels = np.asarray(page.figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
    left = 30 + (120 - 60) // 2
    assert np.array_equal(pixels[30:120, left : left + 60], drawn)
    pixels[30:120, left : left + 60] = FRAME_GREY
    assert (pixels[28:122, left - 2 : left + 62] == FRAME_GREY).all(), "the frame is around the picture"
    pixels[28:122, left - 2 : left + 62] = 255
    assert (pixels == 255).all()


def test_a_line_that_is_too_long_is_shortened_in_its_middle() -> None:
    page = Page(2, 1)
    page.write("short", 0.1, 0.5, 8, room=1.5)
    page.write("beginning " * 9 + "end", 0.1, 0.8, 8, room=1.5)
    short, long = page.figure.texts
    assert short.get_text() == "short" and short.get_fontsize() == 8
    assert "…" in long.get_text() and long.get_text().endswith("end") and long.get_fontsize() == 5
    assert long.get_window_extent().width <= 1.5 * DPI


# ---- projections ----


def test_colours_are_principal_components_fitted_over_all_images() -> None:
    first, second = noise(8, 9, 5, 1), noise(6, 6, 5, 2)
    colours = principal_colours([first, second])
    assert [one.shape for one in colours] == [(8, 9, 3), (6, 6, 3)]
    assert all(one.min() >= 0 and one.max() <= 1 for one in colours)
    tokens = np.concatenate([first.reshape(-1, 5), second.reshape(-1, 5)]).astype(np.float64)
    tokens -= tokens.mean(axis=0)
    direction = np.linalg.svd(tokens, full_matrices=False)[2][0]
    red = np.concatenate([one[..., 0].ravel() for one in colours])
    inside = (red > 0) & (red < 1)
    assert abs(np.corrcoef(red[inside], (tokens @ direction)[inside])[0, 1]) > 0.999999


def test_the_same_token_has_the_same_colour_in_every_image() -> None:
    first, second = noise(5, 5, 7, 1), noise(5, 5, 7, 2)
    second[3, 2] = first[1, 4]
    a, b = principal_colours([first, second])
    assert np.array_equal(a[1, 4], b[3, 2])


def test_components_are_flipped_to_agree_with_the_given_colours() -> None:
    [frozen] = principal_colours([noise(6, 6, 4, 1)])
    [flipped] = principal_colours([-noise(6, 6, 4, 1)], like=[frozen])
    assert np.abs(flipped - frozen).max() < 1e-5


def test_features_with_few_channels_or_one_value_can_be_drawn() -> None:
    assert principal_colours([noise(4, 4, 2)])[0].shape == (4, 4, 3)
    flat = principal_colours([np.ones((4, 4, 6), np.float32)])[0]
    assert np.isfinite(flat).all()


def test_features_that_are_not_finite_are_refused() -> None:
    broken = noise(4, 4, 6)
    broken[0, 0, 0] = np.nan
    with pytest.raises(DsuError, match="not finite"):
        principal_colours([broken])


def test_tsne_is_reproducible_and_separates_clusters() -> None:
    maps = [noise(10, 10, 6, 1), noise(10, 10, 6, 2) + 20]
    chosen = choose_tokens(np.zeros(200, np.bool_), 120, seed=0)
    assert len(set(chosen.tolist())) == 120 and chosen.max() < 200
    placed = tsne_positions(maps, chosen, seed=0)
    assert placed.shape == (120, 2) and np.array_equal(placed, tsne_positions(maps, chosen, seed=0))
    far = chosen >= 100
    between = np.linalg.norm(placed[far].mean(axis=0) - placed[~far].mean(axis=0))
    assert between > 2 * placed[far].std()


@pytest.mark.parametrize(("objects", "drawn"), [(0, 0), (3, 3), (60, 20), (95, 35), (100, 40)])
def test_tokens_of_small_objects_are_among_the_chosen(objects: int, drawn: int) -> None:
    on_object = np.arange(100) < objects
    chosen = choose_tokens(on_object, 40, seed=1)
    assert len(set(chosen.tolist())) == 40
    assert on_object[chosen].tolist() == [False] * (40 - drawn) + [True] * drawn
    assert np.array_equal(chosen, choose_tokens(on_object, 40, seed=1))


def test_tsne_of_a_handful_of_tokens() -> None:
    assert tsne_positions([noise(2, 2, 3)], np.arange(4), seed=0).shape == (4, 2)


def test_a_token_is_on_the_object_if_a_quarter_of_it_is_covered() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[:20, :26] = 255
    assert mask_of_tokens(mask, noise(2, 3, 1)).tolist() == [[True, True, False], [False, False, False]]


# ---- features ----


def test_features_are_levels_before_and_after_adapters_and_blocks_on_their_own_grid() -> None:
    network = toy_network().eval()
    runtime = choose_runtime("cpu", "fp32")
    images = [Image.fromarray(np.random.default_rng(index).integers(0, 256, (50, 70, 3), np.uint8)) for index in (0, 1)]
    hiera, dino = compute_features(network, runtime, images, [2, 4], adapted=True)
    assert [level.title.partition("\n")[0] for level in hiera.levels] == [
        name for level in (1, 2, 3, 4) for name in (f"S{level}", f"S{level} adapted")
    ]
    assert [level.maps[1].shape for level in hiera.levels[::2]] == [
        (32, 32, 16),
        (16, 16, 32),
        (8, 8, 64),
        (4, 4, 128),
    ]
    assert [level.maps[0].shape for level in dino.levels] == [(9, 9, 48)] * 2
    assert not np.array_equal(hiera.levels[0].maps[0], hiera.levels[1].maps[0])
    frozen, _ = compute_features(network, runtime, images[1:], [4])
    assert [level.title.partition("\n")[0] for level in frozen.levels] == ["S1", "S2", "S3", "S4"]
    assert np.array_equal(frozen.levels[3].maps[0], hiera.levels[6].maps[1])


def test_default_blocks_are_at_the_quarters_of_the_depth() -> None:
    config = toy_network().config
    assert choose_blocks(config, None) == [1, 2, 3, 4]
    assert choose_blocks(config, [3, 1, 3]) == [1, 3]
    with pytest.raises(UsageError, match=r"--dino-blocks contains block 5, but .* 1 to 4"):
        choose_blocks(config, [2, 5])


def test_encoders_with_random_weights_get_a_remark() -> None:
    asked = {"preset": "toy", "hiera": None, "hiera_size": 128, "dino_size": 126}
    config, weights = choose_network(None, EncoderWeights(), asked)
    network = open_network(None, config, weights)
    assert weights.random_of(config) == {"hiera", "dino"}
    image = Image.new("RGB", (40, 40))
    runtime = choose_runtime("cpu", "fp32")
    hiera, dino = compute_features(network, runtime, [image], [4], random=["dino"])
    assert hiera.remark == "" and "random weights" in dino.remark
    page = FeatureFigure([ShownImage("a", image, None)], [hiera, dino], tokens=None)
    [drawn] = [page._page(blocks, iter([]), SILENT) for blocks in page.pages()]  # type: ignore[arg-type]
    assert sum("random weights" in text.get_text() for text in drawn.texts) == 1


@pytest.mark.parametrize("name", ["features.png", "features.pdf"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_figure_of_features_is_reproducible(tmp_path: Path, name: str, masked: bool) -> None:
    torch.set_num_threads(1)
    images = [Image.fromarray(np.full((40, 60, 3), level, np.uint8)) for level in (60, 180)]
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:40] = 255
    shown = [ShownImage(f"n{index}", image, mask if masked else None) for index, image in enumerate(images)]
    groups = compute_features(toy_network().eval(), choose_runtime("cpu", "fp32"), images, [4])
    figure = FeatureFigure(shown, groups, tokens=40)
    [file] = figure.draw(tmp_path / name)
    content = file.read_bytes()
    figure.draw(tmp_path / name)
    assert file.read_bytes() == content
    if name.endswith("png"):
        with Image.open(file) as drawn:
            assert drawn.width == pytest.approx((5 + masked) * 342, abs=20)


def levels(count: int, *, adapted: bool = False) -> tuple[FeatureLevel, ...]:
    return tuple(
        FeatureLevel(f"L{index}\n6×6×4", (noise(6, 6, 4, index),), adapted and index % 2 == 1) for index in range(count)
    )


def test_more_than_four_levels_continue_below_and_pages_have_the_height_of_a_printed_page(tmp_path: Path) -> None:
    image = ShownImage("a", Image.new("RGB", (60, 40)), None)
    groups = [FeatureGroup("Hiera", levels(8, adapted=True)), FeatureGroup("DINOv2", levels(4))]
    figure = FeatureFigure([image], groups, tokens=None)
    assert [[len(block.levels) for block in page] for page in figure.pages()] == [[4, 4, 4]]
    tall = FeatureFigure([image] * 5, groups, tokens=None)
    assert [[block.title for block in page] for page in tall.pages()] == [["Hiera", "Hiera"], ["DINOv2"]]
    [file] = figure.draw(tmp_path / "all.png")
    with Image.open(file) as drawn:
        assert drawn.width == pytest.approx(5 * 342, abs=20) and drawn.height <= 9.2 * 300


def test_tsne_is_a_separate_task_and_can_be_omitted(tmp_path: Path) -> None:
    image = ShownImage("a", Image.new("RGB", (60, 40)), None)
    groups = [FeatureGroup("Hiera", levels(2))]
    heights = []
    for tokens, phases in ((20, {"computing t-SNE": 2, "drawing": 2}), (None, {"drawing": 2})):
        heard = Listener()
        [file] = FeatureFigure([image], groups, tokens=tokens).draw(tmp_path / "figure.png", heard)
        assert heard.phases == phases
        with Image.open(file) as drawn:
            heights.append(drawn.height)
    assert heights[0] - heights[1] == pytest.approx(1.1 * DPI, abs=2)


def test_images_are_shown_with_their_masks(drawn: Path, tmp_path: Path) -> None:
    train = drawn / "train"
    shown, _ = find_shown([str(train)], None, 3, paths=Paths(tmp_path))
    assert len(shown) == 3 and all(one.mask is not None and one.mask.max() > 0 for one in shown)
    files = [str(train / "images" / f"{one.name}.jpg") for one in shown]
    assert [one.mask for one in find_shown(files, None, 9, paths=Paths(tmp_path))[0]] == [None] * 3
    again, _ = find_shown(files, train / "masks", 9, paths=Paths(tmp_path))
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(again, shown, strict=True))  # type: ignore[arg-type]
    (tmp_path / "other").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "other" / "unknown.png")
    with pytest.raises(UsageError, match="contains no mask named like"):
        find_shown(files, tmp_path / "other", 9, paths=Paths(tmp_path))


def test_unreadable_files_are_skipped_and_named(drawn: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(drawn / "train", mine)
    images, masks = (sorted((mine / inner).iterdir()) for inner in ("images", "masks"))
    for path in (images[0], masks[1]):
        path.write_bytes(b"rubbish")
    shown, broken = find_shown([str(mine)], None, 24, paths=Paths(tmp_path))
    assert [one.name for one in shown] == [path.stem for path in images[2:]]
    assert [str(path) in line for path, line in zip((images[0], masks[1]), broken, strict=True)] == [True, True]
    with pytest.raises(UnreadableImage, match=images[0].name):
        find_shown([str(images[0])], None, 24, paths=Paths(tmp_path))


def test_a_benchmarks_name_selects_the_images_of_its_test_split(published: Path) -> None:
    heard = Listener()
    shown, _ = find_shown(["duts"], None, 2, paths=Paths(published), progress=heard)
    assert [one.name for one in shown] == ["a", "c"] and all(one.mask is not None for one in shown)
    assert heard.said == ["duts: 2 of 3 images (use --count for more)"]
    assert [one.name for one in find_shown(["DUTS-TR"], None, 9, paths=Paths(published))[0]] == ["t"]
    with pytest.raises(UsageError, match=r"neither a folder .* nor a known benchmark"):
        find_shown(["nothing"], None, 2, paths=Paths(published))
    with pytest.raises(UsageError, match=r"nothing\.jpg does not exist"):
        find_shown(["nothing.jpg"], None, 2, paths=Paths(published))


# ---- comparisons ----


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Images and masks `a` to `d`; `good` predicts all except d, `bad` predicts all, increasingly worse from a to d."""
    for folder in ("images", "masks", "good", "bad"):
        (tmp_path / folder).mkdir()
    for index, name in enumerate("abcd"):
        truth = np.zeros((30, 40), np.uint8)
        truth[10:20, 10:30] = 255
        Image.fromarray(np.full((30, 40, 3), 50 * index, np.uint8)).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(truth).save(tmp_path / "masks" / f"{name}.png")
        shifted = np.roll(truth, 3 * index, axis=1)
        Image.fromarray(shifted).save(tmp_path / "bad" / f"{name}.png")
        if name != "d":
            Image.fromarray(truth).save(tmp_path / "good" / f"{name}.png")
    return tmp_path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """DUTS with its published folders: `t` for training, `a` to `c` for testing. Also maps of a and b in one folder."""
    for split, names in (("TR", "t"), ("TE", "abc")):
        images, masks = (tmp_path / "DUTS" / f"DUTS-{split}" / f"DUTS-{split}-{kind}" for kind in ("Image", "Mask"))
        images.mkdir(parents=True)
        masks.mkdir()
        for name in names:
            Image.new("RGB", (30, 40)).save(images / f"{name}.jpg")
            Image.fromarray(np.eye(40, 30, dtype=np.uint8) * 255).save(masks / f"{name}.png")
    (tmp_path / "maps").mkdir()
    for name in "ab":
        Image.new("L", (30, 40)).save(tmp_path / "maps" / f"{name}.png")
    return tmp_path


def test_rows_are_the_images_with_all_predictions(folders: Path) -> None:
    methods = {"Good": folders / "good", "Bad": folders / "bad"}
    places = {"paths": Paths(folders / "data"), "truth": folders / "masks"}
    rows, lacking = find_compared(str(folders / "images"), methods, **places)
    assert [row.name for row in rows] == ["a", "b", "c"] and lacking == {"a prediction of Good": 1}
    assert rows[0].predictions == (folders / "good" / "a.png", folders / "bad" / "a.png")
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        find_compared(str(folders / "images"), {"None": folders / "nowhere"}, **places)
    with pytest.raises(UsageError, match=r"--truth .* needs a folder of images"):
        find_compared(None, methods, **places)
    with pytest.raises(UsageError, match="do not record which images were predicted"):
        find_compared(None, methods, paths=Paths(folders))


def test_ground_truth_is_found_in_a_folder_with_masks_only(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    for kind in ("images", "masks"):
        (folders / kind).rename(tmp_path / "tiles" / kind)
    rows, _ = find_compared(str(tmp_path / "tiles"), {"Bad": folders / "bad"}, paths=Paths(tmp_path / "data"))
    assert [row.truth for row in rows] == [tmp_path / "tiles" / "masks" / f"{name}.png" for name in "abcd"]
    rows, _ = find_compared(str(tmp_path / "tiles" / "images"), {"Bad": folders / "bad"}, paths=Paths(tmp_path))
    assert [(row.name, row.truth) for row in rows] == [(name, None) for name in "abcd"]
    assert ComparisonFigure(rows, ["Bad"]).titles == ["Image", "Bad"]
    with pytest.raises(UsageError, match="--worst needs ground truth, and there is none"):
        choose_worst(rows, 1, "S")


def test_maps_of_a_benchmark_may_be_in_a_folder_or_in_its_subfolder_of_the_sets_name(published: Path) -> None:
    (published / "run" / "DUTS-TE").mkdir(parents=True)
    Image.new("L", (30, 40)).save(published / "run" / "DUTS-TE" / "b.png")
    methods = {"Theirs": published / "maps", "Ours": published / "run"}
    rows, lacking = find_compared("DUTS", methods, paths=Paths(published))
    [row] = rows
    assert row.name == "b" and row.image.name == "b.jpg" and row.truth is not None and row.truth.name == "b.png"
    assert row.predictions == (published / "maps" / "b.png", published / "run" / "DUTS-TE" / "b.png")
    assert lacking == {"a prediction of Theirs": 1, "a prediction of Ours": 2}


def test_images_and_ground_truth_are_found_by_the_record_of_predictions(published: Path) -> None:
    run = published / "run"
    (run / "DUTS-TE").mkdir(parents=True)
    for name in "ac":
        Image.new("L", (30, 40)).save(run / "DUTS-TE" / f"{name}.png")
    source = {"split": "DUTS-TE", "dataset": "DUTS", "kind": "test", "benchmark": True, "reference": "DUTS"}
    how = {"source": {**source, "data_root": str(published), "images": None, "masks": None}, "names": list("abc")}
    (run / "predictions.json").write_text(json.dumps({"kind": "mask", "sets": {"DUTS-TE": how}}))
    elsewhere = published / "nothing-here"
    for asked in (None, "DUTS-TE", "DUTS"):
        rows, lacking = find_compared(asked, {"Ours": run}, paths=Paths(elsewhere))
        assert [row.name for row in rows] == ["a", "c"] and lacking == {"a prediction of Ours": 1}
        assert [row.truth and row.truth.stem for row in rows] == ["a", "c"]
    with pytest.raises(UsageError, match="has no set 'tiles'"):
        find_compared("tiles", {"Ours": run}, paths=Paths(elsewhere))


def test_the_worst_rows_and_named_rows_are_selected(folders: Path) -> None:
    rows = compared(folders)
    for metric in ("S", "MAE", "IoU"):
        worst = choose_worst(rows, 2, metric)
        assert [row.name for row in worst] == ["d", "c"]
        assert worst[0].remark.startswith(f"{metric} 0.")
    assert [row.name for row in pick_names(rows, ["c", "a"])] == ["c", "a"]
    with pytest.raises(UsageError, match="called 'aa'"):
        pick_names(rows, ["aa"])
    with pytest.raises(UsageError, match=r"--by can't be 'mae': give S, .*did you mean 'MAE'"):
        choose_worst(rows, 1, "mae")


def compared(folders: Path) -> list[ComparedImage]:
    rows, _ = find_compared(str(folders), {"Bad": folders / "bad"}, paths=Paths(folders), truth=folders / "masks")
    return rows


@pytest.mark.parametrize(
    ("methods", "width", "inches"), [(1, None, 3.5), (2, None, 4.65), (6, None, 7.16), (1, 7.16, 7.16), (3, 2.0, 2.0)]
)
def test_a_figures_width_depends_on_its_columns_unless_given(
    folders: Path, methods: int, width: float | None, inches: float
) -> None:
    rows = [replace(row, predictions=row.predictions * methods) for row in compared(folders)]
    figure = ComparisonFigure(rows, [f"M{index}" for index in range(methods)], named=True, width=width)
    with Image.open(figure.draw(folders / "figure.png")[0]) as drawn:
        assert abs(drawn.width - inches * 300) <= 10 and drawn.mode == "RGB"


def test_a_page_has_the_requested_number_of_rows(folders: Path) -> None:
    rows = compared(folders) * 5
    figures = [ComparisonFigure(rows, ["Bad"], per_page=count) for count in (6, 20)]
    assert [[len(page) for page in figure.pages()] for figure in figures] == [[6, 6, 6, 2], [20]]
    with Image.open(figures[1].draw(folders / "long.png")[0]) as drawn:
        assert drawn.height > 9.2 * 300


def test_a_page_of_a_comparison_has_the_height_of_a_printed_page(folders: Path) -> None:
    rows = compared(folders)
    comparison = ComparisonFigure(rows * 3, ["Bad"], width=7.16)
    heard = Listener()
    many = comparison.draw(folders / "many.png", heard)
    assert [file.name for file in many] == ["many.png", "many-2.png", "many-3.png"] and heard.phases == {"drawing": 12}
    assert [len(page) for page in comparison.pages()] == [5, 5, 2]
    with Image.open(many[0]) as first, Image.open(many[1]) as second, Image.open(many[2]) as last:
        assert first.height == second.height <= 9.2 * 300
        assert last.height < first.height / 2
    assert [file.name for file in comparison.draw(folders / "many.pdf")] == ["many.pdf"]


@pytest.mark.parametrize(
    ("names", "height", "width"),
    [
        (["tall", "wide", "wide"], 1, 0.5),  # a portrait among landscapes is no higher than a square
        (["tall", "tall", "wide"], 1.5, 0.75),
    ],
)
def test_portraits_are_narrower_than_their_column(
    tmp_path: Path, names: list[str], height: float, width: float
) -> None:
    Image.new("RGB", (100, 200), "red").save(tmp_path / "tall.png")
    Image.new("RGB", (400, 100), "blue").save(tmp_path / "wide.png")
    rows = [ComparedImage(name, file, None, (file,) * 3) for name in names for file in [tmp_path / f"{name}.png"]]
    [file] = ComparisonFigure(rows, ["A", "B", "C"]).draw(tmp_path / "figure.png")
    pixels = np.asarray(Image.open(file)).astype(int)
    cell = (pixels.shape[1] - 5 * 7.5) / 4
    red, blue = ((pixels == colour).all(axis=2) for colour in ((255, 0, 0), (0, 0, 255)))
    for drawn, name, down, across in ((red, "tall", height, width), (blue, "wide", 0.25, 1)):
        assert drawn.any(axis=1).sum() == pytest.approx(names.count(name) * down * cell, abs=4)
        assert drawn.any(axis=0).sum() == pytest.approx(4 * across * cell, abs=6)
    rest = pixels[~(red | blue | (pixels == FRAME_GREY).all(axis=2))]
    assert not (rest == CELL_GROUND).all(axis=1).any() and (rest == 255).all(axis=1).mean() > 0.98


def test_a_note_is_below_the_rows_and_adds_to_the_height(folders: Path) -> None:
    rows = compared(folders)
    plain, noted = (ComparisonFigure(rows, ["Bad"], note=note) for note in ("", "Bad: random encoders"))
    heights = []
    for index, one in enumerate((plain, noted)):
        with Image.open(one.draw(folders / f"note{index}.png")[0]) as drawn:
            heights.append(drawn.height)
    assert heights[1] - heights[0] == pytest.approx(0.15 * DPI, abs=1)
