"""Tests picture files to frames: every format and mode as upright RGB, and a named error for every other file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.schema import MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.decoding.pictures import load_images
from tests.support.media.clips import write_barcode_video

MEDIA = MediaConfig(num_frames=6)


@pytest.fixture(autouse=True)
def _pillow_limit(monkeypatch):
    """Loading sets Pillow's limit for its process, which is a child's; here it is put back."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def picture(side=32):
    gradient = np.linspace(0, 255, side).astype(np.uint8)
    return np.stack(
        [np.tile(gradient, (side, 1)), np.tile(gradient[:, None], (1, side)), np.full((side, side), 90, np.uint8)], 2
    )


def load(path, media=MEDIA):
    (frame,) = load_images([str(path)], media).frames
    assert frame.dtype == np.uint8
    assert frame.ndim == 3
    assert frame.shape[2] == 3
    return frame


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_formats(tmp_path, suffix):
    Image.fromarray(picture()).save(tmp_path / f"a.{suffix}", lossless=True)
    np.testing.assert_array_equal(load(tmp_path / f"a.{suffix}"), picture())


def test_modes_become_rgb(tmp_path):
    grey = picture()[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    np.testing.assert_array_equal(load(tmp_path / "l.png"), np.repeat(grey[..., None], 3, 2))

    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(load(tmp_path / "16.png"), np.repeat(grey[..., None], 3, 2))

    Image.fromarray(picture()).convert("P").save(tmp_path / "p.png")
    assert abs(load(tmp_path / "p.png").astype(int) - picture()).mean() < 25

    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    red = load(tmp_path / "c.jpg").mean((0, 1))
    assert red[0] > 200
    assert max(red[1:]) < 60


def test_transparency_lies_on_white(tmp_path):
    alpha = np.zeros((32, 32), np.uint8)
    alpha[:16] = 255
    Image.fromarray(np.dstack([picture(), alpha])).save(tmp_path / "a.png")
    frame = load(tmp_path / "a.png")
    np.testing.assert_array_equal(frame[:16], picture()[:16])
    assert (frame[16:] == 255).all()


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(picture()[:16]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load(tmp_path / "a.png"), np.rot90(picture()[:16], -1))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load(tmp_path / "a.gif")[0, 0], [255, 0, 0])


def test_a_set_keeps_its_order_and_names_the_bad_one(tmp_path):
    paths = []
    for shade in (10, 200, 90):
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
        paths.append(str(tmp_path / f"{shade}.png"))
    frames = load_images(paths, MEDIA)
    assert [int(frame[0, 0, 0]) for frame in frames.frames] == [10, 200, 90]
    assert (frames.decoder, frames.timestamps_s, frames.partial) == ("pillow", (), None)
    Path(paths[1]).write_bytes(b"")
    with pytest.raises(ItemError, match="picture 2 of 3") as caught:
        load_images(paths, MEDIA)
    assert caught.value.error_type == "empty_media"


@pytest.mark.parametrize("pixels", [32 * 32 - 1, 32 * 32 // 3])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, pixels):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with pytest.raises(ItemError) as caught:
        load(tmp_path / "a.png", MediaConfig(max_pixels_per_frame=pixels))
    assert caught.value.error_type == "too_large"


def test_broken_and_foreign_pictures_are_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for data, error_type in (
        (whole[: len(whole) // 2], "corrupt_media"),
        (whole[:60], "corrupt_media"),
        (b"not a picture", "unsupported_media"),
        (write_barcode_video(tmp_path / "v.mp4", 1).read_bytes(), "unsupported_media"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_media"),
    ):
        (tmp_path / "b.png").write_bytes(data)
        with pytest.raises(ItemError) as caught:
            load(tmp_path / "b.png")
        assert caught.value.error_type == error_type, data[:10]
