"""Our preprocessing against Hugging Face's PIL processor and against the documented formula for video."""

from __future__ import annotations

import json
import pickle
import shutil
import socket

import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from illava import model_files
from illava.errors import ModelLoadError, PreprocessError
from illava.families import load_preprocessor

SIZES = [
    (56, 56),
    (40, 90),
    (90, 40),
    (300, 41),
    (33, 300),
    (7, 5),
    (168, 168),
    (113, 170),
    (480, 640),
    (1, 2),
    (1, 3000),
]


@pytest.fixture(scope="module")
def preprocessor(onevision_folder):
    return load_preprocessor(str(onevision_folder))


@pytest.fixture(scope="module")
def stock(onevision_folder):
    return LlavaOnevisionImageProcessorPil.from_pretrained(onevision_folder)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes plus noise, so that a wrong filter, crop or offset shows."""
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[0:height, 0:width]
    smooth = np.stack([row * 255 / height, col * 255 / width, 127 + 100 * np.sin((row + 2 * col) / 9)], axis=-1)
    return np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)


def normalised(preprocessor, tiles: np.ndarray) -> np.ndarray:
    """The device's formula, [n, 3, H, W] float32."""
    pixels = tiles.astype(np.float32) * np.float32(preprocessor.rescale_factor)
    pixels = (pixels - np.float32(preprocessor.mean)) / np.float32(preprocessor.std)
    return pixels.transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_one_image_equals_stock(preprocessor, stock, height, width):
    frame = picture(height, width)
    (ours,) = preprocessor.images([frame])
    theirs = stock(images=Image.fromarray(frame), return_tensors="np")
    assert ours.kind == "image"
    assert ours.original_size == (height, width) == tuple(theirs["image_sizes"][0])
    assert ours.tiles.dtype == np.uint8
    np.testing.assert_allclose(normalised(preprocessor, ours.tiles), theirs["pixel_values"][0], rtol=0, atol=1e-6)


def test_grey_image_converted_before_equals_stock(preprocessor, stock):
    grey = Image.fromarray(picture(70, 120)).convert("L")
    (ours,) = preprocessor.images([np.asarray(grey.convert("RGB"))])
    theirs = stock(images=grey, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(normalised(preprocessor, ours.tiles), theirs, rtol=0, atol=1e-6)


def test_several_images_equal_stock(preprocessor, stock):
    frames = [picture(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    ours = preprocessor.images(frames)
    theirs = stock(images=[[Image.fromarray(frame) for frame in frames]], return_tensors="np")
    assert theirs["batch_num_images"].tolist() == [len(frames)]
    for mm_item, pixels, size in zip(ours, theirs["pixel_values"], SIZES, strict=True):
        assert (mm_item.kind, mm_item.tiles.shape[0], mm_item.original_size) == ("image", 1, size)
        np.testing.assert_allclose(normalised(preprocessor, mm_item.tiles), pixels, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (56, 56), (90, 41)])
def test_video_equals_bicubic_resize_and_formula(preprocessor, height, width):
    frames = np.stack([picture(height, width, seed) for seed in range(5)])
    ours = preprocessor.video(frames)
    oracle = [np.array(Image.fromarray(frame).resize((56, 56), Image.Resampling.BICUBIC)) for frame in frames]
    expected = (np.stack(oracle) / 255.0 - 0.5) / 0.5
    assert (ours.kind, ours.original_size, ours.nbytes) == ("video", (height, width), 5 * 56 * 56 * 3)
    actual = normalised(preprocessor, ours.tiles).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(preprocessor.video(list(frames)).tiles, ours.tiles)


def test_non_contiguous_frames_are_read_right(preprocessor):
    frame = picture(60, 80)
    mirrored = frame[:, ::-1]
    np.testing.assert_array_equal(
        preprocessor.images([mirrored])[0].tiles, preprocessor.images([np.ascontiguousarray(mirrored)])[0].tiles
    )


def test_max_nbytes_bounds_every_item(preprocessor):
    assert preprocessor.max_nbytes(1) == 10 * 56 * 56 * 3  # base and 3 x 3 tiles
    for height, width in SIZES:
        assert preprocessor.images([picture(height, width)])[0].nbytes <= preprocessor.max_nbytes(1)
    assert preprocessor.video(np.zeros((1, 9, 9, 3), np.uint8)).nbytes <= preprocessor.max_nbytes(1)
    assert preprocessor.video(np.zeros((7, 9, 9, 3), np.uint8)).nbytes == preprocessor.max_nbytes(7)
    several = preprocessor.images([picture(9, 9)] * 3)
    assert sum(mm_item.nbytes for mm_item in several) == preprocessor.max_nbytes(3)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one"),
        ([np.zeros((4, 4, 3), np.float32)], "image 0 is float32; expected a numpy array of uint8"),
        ([[[1, 2, 3]]], "image 0 is list"),
        ([np.zeros((4, 4), np.uint8)], r"image 0 has shape \[4, 4\]"),
        ([np.zeros((4, 4, 4), np.uint8)], r"image 0 has shape \[4, 4, 4\]"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 3), np.uint8)], r"image 1 has shape \[0, 4, 3\]"),
        ([np.zeros((1, 100_000, 3), np.uint8)] * 2, "100000x1 px among several"),
    ],
)
def test_bad_images_are_named(preprocessor, frames, message):
    with pytest.raises(PreprocessError, match=message):
        preprocessor.images(frames)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one"),
        (np.zeros((0, 4, 4, 3), np.uint8), "at least one"),
        (np.zeros((2, 4, 4), np.uint8), r"video frame 0 has shape \[4, 4\]"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "frame 1 is 5x4 px, frame 0 is 4x4 px"),
    ],
)
def test_bad_video_frames_are_named(preprocessor, frames, message):
    with pytest.raises(PreprocessError, match=message):
        preprocessor.video(frames)


def test_pickles(preprocessor):
    copy = pickle.loads(pickle.dumps(preprocessor))
    assert copy == preprocessor
    mm_item = copy.video(np.zeros((2, 8, 8, 3), np.uint8))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(mm_item)).tiles, mm_item.tiles)


@pytest.fixture
def files(onevision_folder, tmp_path):
    """The JSON files alone (no weights), free to be spoilt."""
    for path in onevision_folder.glob("*config.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_loads_from_json_files_alone(files, preprocessor):
    assert load_preprocessor(str(files)) == preprocessor


def test_nested_processor_config_wins_as_in_transformers(files):
    nested = json.loads((files / "preprocessor_config.json").read_text()) | {"resample": 2}
    video = json.loads((files / "video_preprocessor_config.json").read_text()) | {"resample": 0}
    edit(files / "processor_config.json", image_processor=nested, video_processor=video)
    loaded = load_preprocessor(str(files))
    assert (loaded.image_resample, loaded.video_resample) == (2, 0)
    assert LlavaOnevisionImageProcessorPil.from_pretrained(files).resample == 2


def test_video_falls_back_to_the_image_processor_as_in_transformers(files, preprocessor):
    (files / "video_preprocessor_config.json").unlink()
    assert load_preprocessor(str(files)) == preprocessor


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"model_type": "bert"}, "'bert' model, which is not supported .*llava_onevision"),
        ("config.json", {"vision_config": ...}, r"config.json has no key 'vision_config'"),
        ("config.json", {"vision_aspect_ratio": "square"}, "vision_aspect_ratio is 'square'"),
        ("config.json", {"image_grid_pinpoints": [[56, 57]]}, "canvas 56x57"),
        ("preprocessor_config.json", {"image_grid_pinpoints": [[56, 56]]}, "differ in 'image_grid_pinpoints'"),
        ("preprocessor_config.json", {"image_mean": ...}, "has no key 'image_mean'"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 56}}, "takes 56x56 px"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop: True"),
        ("video_preprocessor_config.json", {"do_normalize": False}, "do_normalize: False"),
        ("video_preprocessor_config.json", {"image_std": [1, 1, 1]}, "differ in 'image_std'"),
    ],
)
def test_unusable_configuration_is_refused_in_words(files, name, changes, message):
    edit(files / name, **changes)
    with pytest.raises(ModelLoadError, match=message):
        load_preprocessor(str(files))


def test_missing_files_are_named(files, tmp_path):
    (files / "preprocessor_config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no preprocessor_config\.json"):
        load_preprocessor(str(files))
    (files / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        load_preprocessor(str(files))
    (files / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load_preprocessor(str(files))
    with pytest.raises(ModelLoadError, match="no model folder"):
        load_preprocessor(str(tmp_path / "absent"))


@pytest.mark.parametrize(("accepts", "why"), [(True, "Timeout"), (False, "ConnectError")], ids=["silent", "refusing"])
def test_a_hub_that_does_not_answer_is_asked_once_and_a_copy_in_the_cache_serves(monkeypatch, tmp_path, accepts, why):
    """Its client would try again for minutes before it says anything, or reads the cache."""
    monkeypatch.setattr(model_files, "_HUB_S", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if accepts:
            server.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ModelLoadError, match=rf"the hub does not answer \((Read)?{why}"):
            load_preprocessor("nobody/nothing", revision="0" * 40)
        snapshot = tmp_path / "models--nobody--nothing" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{")
        with pytest.raises(ModelLoadError, match="not valid JSON"):
            load_preprocessor("nobody/nothing", revision="0" * 40)


def test_unreachable_hub_id_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="hf download nobody/nothing"):
        load_preprocessor("nobody/nothing", revision="0" * 40)
