"""Tests what the numbers of a picture mean: every depth and photometric meaning of TIFF and PNG that Pillow reads.

The values are ImageMagick's (6.9.11, ``convert FILE -background white -alpha remove -depth 8 rgb:-``), within one. Four
are those of TIFF 6.0 instead, where it errs: fewer than 8 bits whose white is zero (FFmpeg agrees with TIFF 6.0), and
extra samples that are no alpha. Everything else is refused. Below 1 s.
"""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.config.schema import MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.decoding.pictures import load_images, load_picture
from tests.support.media.picture_modes import READ, REFUSED
from tests.support.media.stream_writers import DATA

VALUES = {
    "grey-1.tif": "000000 000000 ffffff ffffff",
    "white-is-zero-1.tif": "ffffff ffffff 000000 000000",
    "grey-2.tif": "000000 555555 aaaaaa ffffff",
    "white-is-zero-2.tif": "ffffff aaaaaa 555555 000000",
    "grey-4.tif": "000000 444444 bbbbbb ffffff",
    "white-is-zero-4.tif": "ffffff bbbbbb 444444 000000",
    "grey-8.tif": "000000 404040 bfbfbf ffffff",
    "white-is-zero-8.tif": "ffffff bfbfbf 404040 000000",
    "grey-12.tif": "000000 404040 bebebe ffffff",
    "grey-16.tif": "000000 404040 bfbfbf ffffff",
    "white-is-zero-16.tif": "ffffff bfbfbf 404040 000000",
    "grey-32.tif": "000000 404040 bfbfbf ffffff",
    "grey-16-big.tif": "000000 404040 bfbfbf ffffff",
    "grey-alpha.tif": "000000 404040 bfbfbf ffffff",
    "grey-unused.tif": "000000 404040 bfbfbf ffffff",
    "rgb-8.tif": "ff0000 00ff80 8080ff ffffff",
    "rgb-16.tif": "ff0000 00ff80 8080ff ffffff",
    "rgb-16-big.tif": "ff0000 00ff80 8080ff ffffff",
    "rgba-8.tif": "ffffff ffffff ffffff ffffff",
    "rgba-16.tif": "ff0000 00ff80 8080ff ffffff",
    "rgba-premultiplied.tif": "ff7f7f bfffbf 090909 ffffff",
    "rgb-unused.tif": "ff0000 00ff80 8080ff ffffff",
    "rgb-two-unused.tif": "ff0000 00ff80 8080ff ffffff",
    "palette-2.tif": "0000ff ff0000 00ff00 808080",
    "palette-4.tif": "0000ff ff0000 00ff00 808080",
    "cmyk-8.tif": "ff0000 00ff00 7f7f7f ffffff",
    "cmyk-16.tif": "ff0000 00ff00 7f7f7f ffffff",
    "ycbcr.tif": "fe0000 00fe02 0000fe fffeff",
    "grey-1.png": "000000 000000 ffffff ffffff",
    "grey-2.png": "000000 555555 aaaaaa ffffff",
    "grey-4.png": "000000 444444 bbbbbb ffffff",
    "grey-8.png": "000000 404040 bfbfbf ffffff",
    "grey-16.png": "000000 404040 bfbfbf ffffff",
    "grey-1-see-through.png": "ffffff ffffff ffffff ffffff",
    "grey-8-see-through.png": "ffffff 404040 bfbfbf ffffff",
    "grey-16-see-through.png": "ffffff 404040 bfbfbf ffffff",
    "grey-alpha-8.png": "000000 404040 bfbfbf ffffff",
    "grey-alpha-16.png": "000000 404040 bfbfbf ffffff",
    "rgb-8.png": "ff0000 00ff80 8080ff ffffff",
    "rgb-16.png": "ff0000 00ff80 8080ff ffffff",
    "rgb-8-see-through.png": "ffffff 00ff80 8080ff ffffff",
    "rgb-16-see-through.png": "ffffff 00ff80 8080ff ffffff",
    "rgba-16.png": "ffffff ffffff ffffff ffffff",
    "palette-2.png": "0000ff ff0000 00ff00 808080",
    "palette-see-through.png": "ffffff ff0000 00ff00 808080",
}
MEDIA = MediaConfig()


@pytest.fixture(autouse=True)
def _pillow_limit(monkeypatch):
    """Loading sets Pillow's limit for its process, which is a child's; here it is put back."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize("name", READ)
def test_the_numbers_mean_what_the_file_says(tmp_path, name):
    (tmp_path / name).write_bytes(READ[name])
    (frame,) = load_images([str(tmp_path / name)], MEDIA).frames
    expected = np.frombuffer(bytes.fromhex(VALUES[name]), np.uint8).reshape(1, 4, 3)
    assert np.abs(frame.astype(int) - expected).max() <= 1, frame.tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_defined_white_is_refused(tmp_path, name):
    data, says = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ItemError, match=says) as caught:
        load_images([str(tmp_path / name)], MEDIA)
    assert caught.value.error_type == "unsupported_media"


def test_twelve_bits_of_grey_reach_white():
    grey = load_picture(str(DATA / "grey12.tif"), 10_000).pixels
    assert np.abs(grey[0, :8, 0].astype(int) - [0x00, 0x08, 0x10, 0x18, 0x20, 0x29, 0x31, 0x39]).max() <= 1
    assert (grey.min(), grey.max()) == (0, 255)


# ---- beside the picture, and less than all of it ----


def gradient(side=64):
    across = np.linspace(0, 255, side).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 60, (side, side, 3), np.uint8)
    colours = [np.tile(across, (side, 1)), np.tile(across[:, None], (1, side)), np.full((side, side), 9)]
    return (np.dstack(colours) // 2 + noise).astype(np.uint8)


BROKEN_EXIF = (b"II\x2a\0\xff\xff\xff\xff", b"XXXXXXXX", b"MM\0\x2a\0\0\0\0", b"MM\0\x2a\0\0\0\x08" + b"\xff" * 20)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", BROKEN_EXIF, ids=range(4))
def test_broken_exif_turns_nothing(tmp_path, suffix, exif):
    Image.fromarray(gradient()[:40]).save(
        tmp_path / f"a.{suffix}", exif=exif if suffix != "jpg" else b"Exif\0\0" + exif
    )
    picture = load_picture(str(tmp_path / f"a.{suffix}"), 10_000)
    assert (picture.pixels.shape, picture.partial) == ((40, 64, 3), None)


def test_good_exif_whose_other_tags_are_odd_turns_the_picture(tmp_path):
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x8298, 2, 4000, 9_999_999)
    exif = b"Exif\0\0MM\0\x2a\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4)
    Image.fromarray(gradient()[:40]).save(tmp_path / "a.jpg", exif=exif)
    assert load_picture(str(tmp_path / "a.jpg"), 10_000).pixels.shape == (64, 40, 3)


CUT = [("jpg", {"quality": 90}), ("png", {}), ("bmp", {}), ("tiff", {}), ("gif", {})]


@pytest.mark.parametrize(("suffix", "options"), CUT)
def test_most_of_a_picture_is_partial_and_half_of_it_is_not(tmp_path, suffix, options):
    picture = Image.fromarray(gradient())
    picture.save(tmp_path / f"a.{suffix}", **options)
    whole = load_picture(str(tmp_path / f"a.{suffix}"), 10_000)
    data = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"most.{suffix}").write_bytes(data[: int(len(data) * 0.93)])
    (tmp_path / f"half.{suffix}").write_bytes(data[: int(len(data) * 0.5)])
    frames = load_images([str(tmp_path / f"{name}.{suffix}") for name in ("a", "most")], MEDIA)
    assert re.match("picture 2 of 2: the picture is cut short: about (9.|100)% of its rows", frames.partial)
    most = frames.frames[1]
    same = (most == whole.pixels).all(axis=(1, 2))
    assert same.mean() >= 0.7
    with pytest.raises(ItemError, match=r"cut short: about [345]\d%"):
        load_picture(str(tmp_path / f"half.{suffix}"), 10_000)
    assert whole.partial is None
