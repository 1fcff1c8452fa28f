"""Limits of the pictures' sizes mean what the processors of transformers mean. Takes 5 s.

Video processors need torchvision, so the arithmetic of their ``resize`` is taken out of their files.
"""

from __future__ import annotations

import ast
import json
import math
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.image_utils import SizeDict
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from illava import VLM, PixelLimits, Request, SamplingParams, load_preprocessor
from illava.errors import ModelLoadError
from illava.families import FAMILIES
from illava.families.model_shape import load_model_shape
from illava.families.qwen.geometry import NativeGeometry, PixelRange
from tests.support.models.families import MAKERS, make_folder

TILED = ("llava_next", "llava_onevision")


class _Base:
    def resize(self, image, size, resample):
        return size.height, size.width


def stock_resize(model_type: str, class_name: str):
    """``resize`` of a stock video processor as a function of frames and sizes, with its module's `smart_resize`."""
    path = Path(find_spec("transformers").origin).parent / "models" / model_type / f"video_processing_{model_type}.py"
    tree = ast.parse(path.read_text())
    parts = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own = parts[class_name]
    own.bases, own.decorator_list, own.keywords = [ast.Name("_Base", ast.Load())], [], []
    own.body = [node for node in own.body if isinstance(node, ast.FunctionDef) and node.name == "resize"]
    module = ast.fix_missing_locations(ast.Module([parts["smart_resize"], own], type_ignores=[]))
    names = {"math": math, "SizeDict": SizeDict, "_Base": _Base}
    exec(compile(module, str(path), "exec", annotations.compiler_flag), names)

    def resized(frames, height, width, *, factor, least, most, max_video_tokens):
        processor = names[class_name]()
        processor.max_video_tokens = max_video_tokens
        return processor.resize(
            torch.empty(1, frames, 3, height, width, device="meta"),
            SizeDict(shortest_edge=least, longest_edge=most),
            None,
            factor=factor,
            temporal_factor=2,
            cap_pixels_per_frame=True,
        )

    return resized


def sizes(count: int) -> list[tuple[int, int, int]]:
    """Frames, height and width, from thumbnails to 4K, of any shape that is taken."""
    rng, found = random.Random(6), []
    while len(found) < count:
        frames, height, width = (round(2 ** rng.uniform(low, high)) for low, high in ((1, 9), (4, 12), (4, 12)))
        if max(height, width) / min(height, width) < 100:
            found.append((frames, height, width))
    return found


def native(budget: str, patch_px: int, video: PixelRange) -> NativeGeometry:
    return NativeGeometry(patch_px, 2, 2, PixelRange(56**2, 1280 * 28**2), video, budget)


def test_a_frame_s_share_of_a_video_is_stock_s_where_frames_have_the_budget() -> None:
    stock, factor = stock_resize("qwen2_vl", "Qwen2VLVideoProcessor"), 28
    model = native("frame", 14, PixelRange(128 * 28**2, 768 * 28**2))
    told = set()
    for tokens, most, least in ((9_000, 400_000, 100_352), (600, 602_112, 3_136), (50, 60_000, 50_000)):
        total = int(tokens * factor * factor * 0.9)
        ours = model.within(PixelLimits(max_pixels=most, min_pixels=least, total_pixels=total))
        for frames, height, width in sizes(150):
            theirs = stock(frames, height, width, factor=factor, least=least, most=most, max_video_tokens=tokens)
            assert ours.video_size(frames, height, width) == theirs, (frames, height, width)
            told.add(theirs == model.video_size(frames, height, width))
            assert frames * theirs[0] * theirs[1] * 3 <= ours.max_pixels(frames) * 3
    assert told == {True, False}


def test_a_frame_s_share_of_a_video_is_stock_s_where_the_clip_has_the_budget() -> None:
    stock, factor = stock_resize("qwen3_vl", "Qwen3VLVideoProcessor"), 32
    model = native("clip", 16, PixelRange(4096, 25_165_824))
    for tokens, total in ((768, 12_582_912), (100, 4_000_000), (5, 12_582_912)):
        ours = model.within(PixelLimits(max_pixels=tokens * factor**2, total_pixels=total))
        for frames, height, width in sizes(150):
            theirs = stock(frames, height, width, factor=factor, least=4096, most=2 * total, max_video_tokens=tokens)
            assert ours.video_size(frames, height, width) == theirs, (frames, height, width)
            assert frames * theirs[0] * theirs[1] <= ours.max_pixels(frames)


def test_a_clip_s_frames_are_as_large_as_each_must_be() -> None:
    """Of a family whose own processor bounds whole clips, min_pixels is of a frame, too."""
    model = native("clip", 16, PixelRange(4096, 25_165_824)).within(PixelLimits(min_pixels=65_536))
    for frames in (2, 8, 64):
        height, width = model.video_size(frames, 64, 64)
        assert height * width >= 65_536
    crowded = native("clip", 16, PixelRange(4096, 100_000)).within(PixelLimits(min_pixels=65_536))
    assert math.prod(crowded.video_size(64, 512, 512)) >= 65_536 * 0.8  # a floor, as in qwen-vl-utils


@pytest.mark.parametrize("limits", [PixelLimits(max_pixels=1024), PixelLimits(512, 512), PixelLimits(min_pixels=1500)])
def test_images_of_a_native_family_are_stock_s(tmp_path, limits) -> None:
    folder = make_folder("qwen2_vl", tmp_path)
    least, most = limits.min_pixels or 192, limits.max_pixels or 4096
    stock = Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most, patch_size=4)
    ours = load_preprocessor(str(folder), pixel_limits=limits)
    for height, width in ((48, 40), (300, 41), (8, 8), (90, 200)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        grid = stock([pixels], return_tensors="pt")["image_grid_thw"][0].tolist()
        assert ours.images([pixels])[0].tiles.shape[1:3] == (grid[1] * 4, grid[2] * 4)


@pytest.mark.parametrize("model_type", TILED)
@pytest.mark.parametrize("max_tiles", [2, 3])
def test_tiles_are_those_of_a_model_with_fewer_canvases(tmp_path, model_type, max_tiles) -> None:
    """Stock's pictures, and answers of a folder whose files name these canvases alone."""
    folder = make_folder(model_type, tmp_path / "whole")
    limits = PixelLimits(max_tiles=max_tiles)
    preprocessor = load_preprocessor(str(folder), pixel_limits=limits)
    canvases = [list(size) for size in preprocessor.geometry.pinpoints]
    fewer = tmp_path / "fewer"
    shutil.copytree(folder, fewer)
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((fewer / name).read_text())
        assert len(canvases) < len(content["image_grid_pinpoints"])
        (fewer / name).write_text(json.dumps(content | {"image_grid_pinpoints": canvases}))
    pixels = np.random.default_rng(3).integers(0, 256, (150, 170, 3), dtype=np.uint8)
    stock = {"llava_next": LlavaNextImageProcessorPil, "llava_onevision": LlavaOnevisionImageProcessorPil}[model_type]
    theirs = stock.from_pretrained(fewer)([pixels], return_tensors="np", do_rescale=False, do_normalize=False)
    (picture,) = preprocessor.images([pixels])
    assert len(picture.tiles) <= 1 + max_tiles
    assert np.array_equal(picture.tiles.transpose(0, 3, 1, 2), theirs["pixel_values"][0].astype(np.uint8))
    answers = []
    for path, given in ((folder, limits), (fewer, PixelLimits())):
        vlm = VLM.from_pretrained(str(path), kv_cache_bytes=8 << 20, pixel_limits=given)
        asked = Request("a", (picture, "What?"), SamplingParams(max_new_tokens=4, min_new_tokens=4))
        answers.append(vlm.generate([asked])[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].usage == answers[1].usage
    assert answers[0].usage.num_patches == len(picture.tiles) * preprocessor.geometry.grid**2


def test_what_a_family_does_not_have_is_refused_and_told(tmp_path) -> None:
    for model_type in MAKERS:
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        for name in ("max_pixels", "min_pixels", "total_pixels", "max_tiles"):
            if name in FAMILIES[model_type].pixel_limits:
                continue
            words = f"{name} has no meaning for a {model_type} model, which reads"
            with pytest.raises(ModelLoadError, match=words):
                load_preprocessor(str(folder), pixel_limits=PixelLimits(**{name: 4}))
            with pytest.raises(ModelLoadError, match=words):
                load_model_shape(str(folder), pixel_limits=PixelLimits(**{name: 4}))


def test_limits_that_no_picture_can_keep_are_refused(tmp_path) -> None:
    tiles, groups = (make_folder(name, tmp_path / name) for name in ("llava_next", "qwen2_5_vl"))
    with pytest.raises(ModelLoadError, match=r"max_tiles is 1, and this model cuts an image into 2 tiles at least"):
        load_preprocessor(str(tiles), pixel_limits=PixelLimits(max_tiles=1))
    with pytest.raises(ModelLoadError, match="max_pixels is 100, and this model's images have min_pixels 192"):
        load_preprocessor(str(groups), pixel_limits=PixelLimits(max_pixels=100))
    with pytest.raises(ModelLoadError, match="min_pixels is 9000, and this model's images have max_pixels 4096"):
        load_preprocessor(str(groups), pixel_limits=PixelLimits(min_pixels=9000))


def test_a_model_without_limits_reads_what_it_read_before() -> None:
    plain = native("clip", 16, PixelRange(4096, 25_165_824))
    for frames, height, width in sizes(60):
        assert plain.video_pixels_of(frames) == plain.video_pixels
        assert plain.within(PixelLimits()).video_size(frames, height, width) == plain.video_size(frames, height, width)
