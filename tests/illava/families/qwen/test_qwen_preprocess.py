"""Native resolution: sizes and patches against Hugging Face's PIL processor; videos against the documented formula."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from illava.errors import ModelLoadError, PreprocessError
from illava.families import load_family, load_preprocessor
from illava.families.model_shape import load_model_shape
from illava.plan import EMPTY_PLAN
from illava.token_counts import VisualShape, expected_counts
from tests.support.models.qwen import IMAGE_PIXELS, PATCH_PX, VIDEO_PIXELS, make_qwen2_vl

SIZES = [(40, 66), (8, 8), (300, 41), (33, 300), (64, 64), (5, 3), (480, 640), (20, 2000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"), depth=1, num_layers=1)


@pytest.fixture(scope="module")
def preprocessor(folder):
    return load_preprocessor(str(folder))


@pytest.fixture(scope="module")
def encoder(folder):
    return load_family(str(folder), dtype=torch.float32, device="cpu").encoder


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[0:height, 0:width]
    smooth = np.stack([row * 255 / height, col * 255 / width, 127 + 100 * np.sin((row + 2 * col) / 9)], axis=-1)
    return np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def stock(pixels):
    least, most = pixels
    return Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most, patch_size=PATCH_PX)


@pytest.mark.parametrize("size", SIZES)
def test_image_patches_equal_stock(preprocessor, encoder, size):
    (mm_item,) = preprocessor.images([picture(*size)])
    theirs = stock(IMAGE_PIXELS)([picture(*size)], return_tensors="pt")
    grid = encoder.grid(mm_item)
    assert theirs["image_grid_thw"].tolist() == [[grid.times, grid.rows, grid.cols]]
    assert torch.equal(encoder.patches(mm_item), theirs["pixel_values"])  # entry by entry: nothing is summed
    assert mm_item.original_size == size
    assert mm_item.nbytes <= preprocessor.max_nbytes(1)


@pytest.mark.parametrize(("size", "count"), [((24, 40), 4), ((100, 70), 5), ((7, 9), 1)])
def test_video_patches_are_those_of_pairs_of_frames(preprocessor, encoder, size, count):
    """A temporal patch holds two frames; the last is repeated. Stock gives a still image's frame twice: take one."""
    frames = [picture(*size, seed=n) for n in range(count)]
    mm_item = preprocessor.video(frames, timestamps_s=range(count))
    single, shape = [], (-1, 3, 2, PATCH_PX, PATCH_PX)
    for frame in [*frames, frames[-1]][: count + count % 2]:
        out = stock(VIDEO_PIXELS)([frame], return_tensors="pt")
        single.append(out["pixel_values"].view(shape)[:, :, 0])
    expected = [torch.stack(pair, 2) for pair in zip(single[::2], single[1::2], strict=True)]
    grid = encoder.grid(mm_item)
    assert [grid.times, grid.rows, grid.cols] == [len(expected), *out["image_grid_thw"][0, 1:].tolist()]
    assert torch.equal(encoder.patches(mm_item).view(shape), torch.cat(expected))
    assert mm_item.timestamps_s == tuple(range(count))
    assert mm_item.nbytes <= preprocessor.max_nbytes(count)


def test_pictures_no_model_takes_are_refused(preprocessor):
    with pytest.raises(PreprocessError, match="200 times"):
        preprocessor.images([picture(1, 300)])
    with pytest.raises(PreprocessError, match="frame 1 is 9x8"):
        preprocessor.video([picture(8, 8), picture(8, 9)])
    with pytest.raises(PreprocessError, match="3 timestamps"):
        preprocessor.video([picture(8, 8)], timestamps_s=[1, 2, 3])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("preprocessor_config.json", {"patch_size": 5}, "patch_size 5"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
        ("video_preprocessor_config.json", {"cap_pixels_per_frame": True}, "cap_pixels_per_frame"),
        ("video_preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
    ],
)
def test_settings_that_are_not_done_are_refused(folder, tmp_path, name, change, words):
    copy = shutil.copytree(folder, tmp_path / "model")
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(content | change))
    with pytest.raises(ModelLoadError, match=words):
        load_preprocessor(str(copy))


def test_published_files_say_little(folder, tmp_path):
    """Qwen2-VL's repository has one processor file, of seven keys; the video processor reads it, too."""
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "video_preprocessor_config.json").unlink()
    published = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": PATCH_PX, "temporal_patch_size": 2}
    (copy / "preprocessor_config.json").write_text(json.dumps(published | {"merge_size": 2}))
    preprocessor = load_preprocessor(str(copy))
    assert preprocessor.geometry.video_pixels == preprocessor.geometry.image_pixels
    assert preprocessor.mean == (0.48145466, 0.4578275, 0.40821073)
    (mm_item,) = preprocessor.images([picture(60, 70)])
    resized = Image.fromarray(picture(60, 70)).resize((72, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(mm_item.tiles[0], np.asarray(resized))


def test_counts_before_loading_equal_the_grids(folder, preprocessor, encoder):
    shape = load_model_shape(str(folder))
    image, video = preprocessor.images([picture(40, 66)])[0], preprocessor.video([picture(50, 30)] * 5)
    media = [VisualShape("image", 40, 66), VisualShape("video", 50, 30, num_frames=5)]
    counts = expected_counts(shape.geometry, EMPTY_PLAN, media, num_vision_blocks=1, num_decoder_layers=1)
    grids = [encoder.grid(image), encoder.grid(video)]
    assert counts.exact
    assert counts.num_patches == sum(grid.num_patches for grid in grids)
    assert counts.num_vision_tokens == counts.num_decoder_tokens_kept == sum(grid.num_groups for grid in grids)
