"""Figures of features and predictions: what is fitted, what is chosen, what is drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import toy_network

from dsu.errors import DsuError, UsageError
from dsu.runtime import choose_runtime
from dsu.visualization.comparison import choose_worst, draw_comparison, find_compared, pick_names
from dsu.visualization.features import choose_blocks, compute_features
from dsu.visualization.figures import draw_features
from dsu.visualization.projections import choose_tokens, mask_of_tokens, plane, principal_colours
from dsu.visualization.shown import Shown, find_shown


def noise(height: int, width: int, channels: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(height, width, channels)).astype(np.float32)


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


def test_components_are_turned_to_agree_with_those_that_they_are_compared_with() -> None:
    [frozen] = principal_colours([noise(6, 6, 4, 1)])
    [turned] = principal_colours([-noise(6, 6, 4, 1)], like=[frozen])
    assert np.abs(turned - frozen).max() < 1e-5


def test_features_of_few_channels_or_one_value_are_drawn_too() -> None:
    assert principal_colours([noise(4, 4, 2)])[0].shape == (4, 4, 3)
    flat = principal_colours([np.ones((4, 4, 6), np.float32)])[0]
    assert np.isfinite(flat).all()


def test_features_that_are_not_finite_are_refused() -> None:
    broken = noise(4, 4, 6)
    broken[0, 0, 0] = np.nan
    with pytest.raises(DsuError, match="not finite"):
        principal_colours([broken])


def test_tsne_is_the_same_every_time_and_separates_what_is_apart() -> None:
    maps = [noise(10, 10, 6, 1), noise(10, 10, 6, 2) + 20]
    chosen = choose_tokens(np.zeros(200, np.bool_), 120, seed=0)
    assert len(set(chosen.tolist())) == 120 and chosen.max() < 200
    placed = plane(maps, chosen, seed=0)
    assert placed.shape == (120, 2) and np.array_equal(placed, plane(maps, chosen, seed=0))
    far = chosen >= 100
    between = np.linalg.norm(placed[far].mean(axis=0) - placed[~far].mean(axis=0))
    assert between > 2 * placed[far].std()


@pytest.mark.parametrize(("objects", "drawn"), [(0, 0), (3, 3), (60, 20), (95, 35), (100, 40)])
def test_small_objects_are_not_lost_among_the_tokens_drawn(objects: int, drawn: int) -> None:
    on_object = np.arange(100) < objects
    chosen = choose_tokens(on_object, 40, seed=1)
    assert len(set(chosen.tolist())) == 40
    assert on_object[chosen].tolist() == [False] * (40 - drawn) + [True] * drawn
    assert np.array_equal(chosen, choose_tokens(on_object, 40, seed=1))


def test_tsne_of_a_handful_of_tokens() -> None:
    assert plane([noise(2, 2, 3)], np.arange(4), seed=0).shape == (4, 2)


def test_a_token_is_on_the_object_that_covers_a_quarter_of_it() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[:20, :26] = 255
    assert mask_of_tokens(mask, noise(2, 3, 1)).tolist() == [[True, True, False], [False, False, False]]


# ---- features ----


def test_levels_before_and_after_adapters_and_blocks_on_their_own_grid() -> None:
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


def test_blocks_are_the_quarters_unless_named() -> None:
    architecture = toy_network().architecture
    assert choose_blocks(architecture, None) == [1, 2, 3, 4]
    assert choose_blocks(architecture, [3, 1, 3]) == [1, 3]
    with pytest.raises(UsageError, match=r"--dino-blocks names block 5, but .* 1 to 4"):
        choose_blocks(architecture, [2, 5])


@pytest.mark.parametrize("name", ["features.png", "features.pdf"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_figure_of_features_is_drawn_the_same_every_time(tmp_path: Path, name: str, masked: bool) -> None:
    torch.set_num_threads(1)
    images = [Image.fromarray(np.full((40, 60, 3), level, np.uint8)) for level in (60, 180)]
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:40] = 255
    shown = [Shown(f"n{index}", image, mask if masked else None) for index, image in enumerate(images)]
    groups = compute_features(toy_network().eval(), choose_runtime("cpu", "fp32"), images, [4])
    [file] = draw_features(shown, groups, tmp_path / name, tokens=40)
    content = file.read_bytes()
    draw_features(shown, groups, tmp_path / name, tokens=40)
    assert file.read_bytes() == content
    if name.endswith("png"):
        with Image.open(file) as drawn:
            assert drawn.width == pytest.approx((5 + masked) * 342, abs=20)


def test_images_are_shown_with_the_masks_that_belong_to_them(drawn: Path, tmp_path: Path) -> None:
    train = drawn / "train"
    shown = find_shown([train], None, 3)
    assert len(shown) == 3 and all(one.mask is not None and one.mask.max() > 0 for one in shown)
    files = [train / "images" / f"{one.name}.jpg" for one in shown]
    assert [one.mask for one in find_shown(files, None, 9)] == [None] * 3
    again = find_shown(files, train / "masks", 9)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(again, shown, strict=True))  # type: ignore[arg-type]
    (tmp_path / "other").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "other" / "unknown.png")
    with pytest.raises(UsageError, match="holds no mask called like"):
        find_shown(files, tmp_path / "other", 9)


# ---- comparisons ----


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Images and masks `a` to `d`; `good` predicts all but d, `bad` all, worse and worse from a to d."""
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


def test_rows_are_what_has_all_pictures(folders: Path) -> None:
    methods = {"Good": folders / "good", "Bad": folders / "bad"}
    rows, lacking = find_compared(folders / "images", folders / "masks", methods)
    assert [row.name for row in rows] == ["a", "b", "c"] and lacking == {"a prediction of Good": 1}
    assert rows[0].predictions == (folders / "good" / "a.png", folders / "bad" / "a.png")
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        find_compared(folders / "images", folders / "masks", {"None": folders / "nowhere"})


def test_the_worst_and_the_named(folders: Path) -> None:
    rows, _ = find_compared(folders / "images", folders / "masks", {"Bad": folders / "bad"})
    for metric in ("S", "MAE", "IoU"):
        worst = choose_worst(rows, 2, metric)
        assert [row.name for row in worst] == ["d", "c"]
        assert worst[0].remark.startswith(f"{metric} 0.")
    assert [row.name for row in pick_names(rows, ["c", "a"])] == ["c", "a"]
    with pytest.raises(UsageError, match="called 'aa'"):
        pick_names(rows, ["aa"])
    with pytest.raises(UsageError, match=r"--by can't be 'mae': give S, .*did you mean 'MAE'"):
        choose_worst(rows, 1, "mae")


def test_a_comparison_is_as_wide_as_a_printed_page(folders: Path) -> None:
    rows, _ = find_compared(folders, folders / "masks", {"Bad": folders / "bad"})
    [file] = draw_comparison(rows, ["Bad"], folders / "figure.png", named=True)
    with Image.open(file) as drawn:
        assert abs(drawn.width - 7.16 * 300) <= 3 and drawn.mode == "RGB"
    many = draw_comparison(rows * 3, ["Bad"], folders / "many.png")
    assert [file.name for file in many] == ["many.png", "many-2.png", "many-3.png"]
    with Image.open(many[0]) as first, Image.open(many[1]) as second:
        assert first.height == second.height <= 9.2 * 300
