"""Images and masks of every mode, and broken files, generated here."""

import hashlib
import io
import pickle
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.typing import NDArray
from PIL import Image

from dsu.data.images import (
    MAX_PIXELS,
    UnreadableImage,
    file_sha256,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)
COLOURS = np.stack([RAMP, RAMP[::-1], np.full_like(RAMP, 9)], axis=-1)
SPOT = np.zeros((6, 9), np.uint8)
SPOT[2:4, 3:7] = 1


def save(folder: Path, image: Image.Image | NDArray[np.generic], name: str = "x.png", **options: object) -> Path:
    path = folder / name
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(path, **options)
    return path


def paletted(indices: NDArray[np.uint8], *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette([part for colour in colours for part in colour])
    return image


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims more pixels than its data contain."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(64)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


# ---- images ----


@pytest.mark.parametrize(
    "make",
    [
        lambda: Image.fromarray(COLOURS),
        lambda: Image.fromarray(np.dstack([COLOURS, RAMP])),
        lambda: Image.fromarray(COLOURS).quantize(256),
    ],
    ids=["RGB", "RGBA, alpha dropped", "palette"],
)
def test_colour_images_keep_their_colours(tmp_path: Path, make: Callable[[], Image.Image]) -> None:
    image = read_image(save(tmp_path, make()))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), COLOURS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Image.fromarray(RAMP),
        lambda: Image.fromarray(RAMP.astype(np.uint16) * 257),
        lambda: Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(RAMP[::-1].copy())]),
    ],
    ids=["8 bits", "16 bits scaled, not clipped", "alpha dropped"],
)
def test_grey_images_become_grey_rgb(tmp_path: Path, make: Callable[[], Image.Image]) -> None:
    assert np.array_equal(np.asarray(read_image(save(tmp_path, make()))), np.dstack([RAMP] * 3))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_tiffs_are_scaled(tmp_path: Path, dtype: type[np.generic]) -> None:
    deep = RAMP.astype(np.float64) * 257 / (65535 if dtype is np.float32 else 1)
    image = read_image(save(tmp_path, deep.astype(dtype), "x.tif"))
    assert np.array_equal(np.asarray(image)[..., 0], RAMP)


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    image = read_image(save(tmp_path, SPOT.astype(bool)))
    assert np.array_equal(np.asarray(image), np.dstack([SPOT * 255] * 3))


def test_cmyk_is_converted(tmp_path: Path) -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.asarray(read_image(save(tmp_path, red, "x.jpg")))[0, 0].tolist() == pytest.approx([254, 0, 0], abs=3)


def test_a_palette_with_transparency_is_read_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = save(tmp_path, Image.fromarray(COLOURS).quantize(256), transparency=bytes(range(256)))
    assert np.array_equal(np.asarray(read_image(path)), COLOURS)
    assert not recwarn.list


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = save(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(path).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(9))
def test_exif_orientation_is_applied_to_images_and_masks(tmp_path: Path, orientation: int) -> None:
    upright = {0: RAMP, 1: RAMP, 2: RAMP[:, ::-1], 3: RAMP[::-1, ::-1], 4: RAMP[::-1], 5: RAMP.T}
    upright |= {6: np.rot90(RAMP, -1), 7: RAMP[::-1, ::-1].T, 8: np.rot90(RAMP)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, RAMP, exif=exif)
    assert np.array_equal(np.asarray(read_image(path))[..., 0], upright[orientation])
    assert np.array_equal(read_mask(path), upright[orientation])


@pytest.mark.parametrize("size", [(1, 1), (20000, 10)])
def test_extreme_shapes_are_read_and_resized(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path, Image.new("RGB", size, (1, 2, 3)))
    assert read_image(path).size == size
    assert resize_image(read_image(path), 35).tolist() == [[[1, 2, 3]] * 35] * 35


def test_given_bytes_are_used_instead_of_the_file(tmp_path: Path) -> None:
    data = save(tmp_path, RAMP).read_bytes()
    absent = tmp_path / "absent.png"
    assert np.array_equal(np.asarray(read_image(absent, data))[..., 0], RAMP)
    assert np.array_equal(read_mask(absent, data=data), RAMP)


# ---- bad files ----


def whole(format: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 Not Found</html>", "known image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known image format"),
        (whole("JPEG")[:900], "truncated"),
        (whole("PNG")[:900], "truncated"),
        (whole("WEBP")[:900], ""),
        (png_claiming(100_000, 100_000), "pixels"),
        (png_claiming(25_000, 25_000), "pixels"),
        (png_claiming(20, 0), ""),
    ],
    ids=["empty", "html", "eps", "jpeg cut", "png cut", "webp cut", "bomb", "large bomb", "no rows"],
)
@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_undecodable_files_are_named_with_reason_and_remedy(
    tmp_path: Path, read: Callable[[Path], object], data: bytes, reason: str
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match=r"photo\.jpg cannot be read") as caught:
        read(path)
    assert reason in str(caught.value)
    assert "remove it" in str(caught.value)
    assert "BytesIO" not in str(caught.value)


def test_folders_and_absent_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    for path in (tmp_path / "x.png", tmp_path / "absent.png"):
        for read in (read_image, read_mask, file_sha256):
            with pytest.raises(UnreadableImage, match=path.name):
                read(path)


def test_the_error_can_be_pickled() -> None:
    error = UnreadableImage(Path("a.jpg"), "it is empty")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path, again.reason) == (str(error), error.path, error.reason)


def test_the_limit_allows_a_photograph_of_400_megapixels() -> None:
    assert MAX_PIXELS > 23_200 * 17_400


@settings(max_examples=150)
@given(data=st.data(), format=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP"]))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_raise_another_error(data: st.DataObject, format: str) -> None:
    damaged = bytearray(whole(format))
    changes = st.tuples(st.integers(0, min(200, len(damaged) - 1)), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, min_size=1, max_size=6)):
        damaged[position] = value
    for read in (read_image, read_mask):
        # A damaged header may claim any size: decoding hundreds of megapixels would take minutes.
        with patch("dsu.data.images.MAX_PIXELS", 10_000_000), suppress(UnreadableImage):
            read(Path("damaged"), data=bytes(damaged))


# ---- masks ----


def test_grey_masks_keep_soft_edges(tmp_path: Path) -> None:
    for name, image in {
        "L.png": RAMP,
        "RGB.png": np.dstack([RAMP] * 3),
        "16.png": RAMP.astype(np.uint16) * 257,
        "palette.png": paletted(RAMP, *[(value, value, value) for value in range(256)]),
        "opaque.png": np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 255)]),
    }.items():
        mask = read_mask(save(tmp_path, image, name))
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, RAMP), name


def test_an_inverted_grey_palette_is_read_as_its_grey_levels(tmp_path: Path) -> None:
    path = save(tmp_path, paletted(SPOT, (255, 255, 255), (0, 0, 0)))
    assert np.array_equal(read_mask(path), 255 - 255 * SPOT)


def test_grey_levels_with_jpeg_colour_noise_are_grey(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-7, 8, (*RAMP.shape, 3))
    noisy = (np.dstack([RAMP] * 3) + noise).clip(0, 255).astype(np.uint8)
    assert np.abs(read_mask(save(tmp_path, noisy)).astype(int) - RAMP).max() <= 7


@pytest.mark.parametrize(
    "image",
    [
        paletted(SPOT * 3, (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)),
        paletted(1 - SPOT, (200, 0, 0), (0, 0, 0)),
        paletted(SPOT * 215 + 10, *[(0, 0, 0)] * 11, *[(40, 99, 7)] * 214, (255, 255, 255)),
        np.dstack([SPOT * 200, SPOT * 0, SPOT * 17]),
        np.dstack([SPOT, SPOT * 0, SPOT * 0]),
        np.dstack([SPOT * 0, SPOT * 0, SPOT * 0, SPOT * 255]),
        np.dstack([SPOT * 0 + 255, SPOT * 0 + 255, SPOT * 0 + 255, SPOT * 255]),
        np.dstack([SPOT * 0 + 255, SPOT * 255, SPOT * 255, SPOT * 255]),
    ],
    ids=[
        "indices",
        "a palette in no order",
        "Pillow's own palette",
        "a colour",
        "an id in the red channel",
        "black cut-out",
        "white cut-out",
        "white on transparent red",
    ],
)
def test_colours_and_cutouts_are_foreground(tmp_path: Path, image: Image.Image | NDArray[np.generic]) -> None:
    assert np.array_equal(read_mask(save(tmp_path, image)), SPOT * 255)


def test_colour_masks_saved_as_jpeg_have_a_clean_background(tmp_path: Path) -> None:
    large = np.kron(SPOT, np.ones((32, 32), np.uint8))
    path = save(tmp_path, np.dstack([large * 230, large * 20, large * 20]), "x.jpg", quality=75)
    assert (read_mask(path) != large * 255).mean() < 0.02
    assert read_mask(path)[:40, :40].max() == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_and_given_values_are_foreground(tmp_path: Path, dtype: type[np.generic]) -> None:
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    path = save(tmp_path, values)
    assert np.array_equal(read_mask(path, labels=True), np.where(values > 0, 255, 0))
    assert np.array_equal(read_mask(path, foreground=(2, 5)), [[0, 0, 255], [0, 0, 255]])


def test_given_values_are_indices_for_a_palette_and_colours_for_rgb(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2]], np.uint8)
    colours = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    assert read_mask(save(tmp_path, paletted(indices, *colours)), foreground=(2,)).tolist() == [[0, 0, 255]]
    rgb = save(tmp_path, np.array([colours], np.uint8))
    assert read_mask(rgb, foreground=(0xFF0000,)).tolist() == [[0, 255, 0]]


def test_8_bit_values_in_a_16_bit_file(tmp_path: Path) -> None:
    path = save(tmp_path, RAMP.astype(np.uint16))
    assert np.array_equal(read_mask(path, white=255), RAMP)


# ---- hashing and resizing ----


def test_the_hash_is_of_the_files_bytes(tmp_path: Path) -> None:
    path = save(tmp_path, RAMP)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_resizing_is_pillows_bilinear_and_bicubic() -> None:
    image = Image.fromarray(COLOURS)
    assert np.array_equal(resize_image(image, 5), np.asarray(image.resize((5, 5), Image.Resampling.BILINEAR)))
    bicubic = Image.fromarray(RAMP).resize((5, 5), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_mask(RAMP, 5), np.asarray(bicubic))
    assert resize_image(image, 5).dtype == resize_mask(RAMP, 5).dtype == np.uint8


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 64))
def test_any_shape_becomes_square(width: int, height: int, size: int) -> None:
    assert resize_image(Image.new("RGB", (width, height)), size).shape == (size, size, 3)
    assert resize_mask(np.zeros((height, width), np.uint8), size).shape == (size, size)
