"""Anyres geometry against the functions of transformers, and against numbers worked by hand for the 7B model."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModel,
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from illava.families.llava.geometry import AnyresGeometry


def geometry(tile_px: int, patch_px: int, most: int, max_tiles: int | None) -> AnyresGeometry:
    sides = [tile_px * n for n in range(1, most + 1)]
    return AnyresGeometry(tile_px, patch_px, tuple((h, w) for h in sides for w in sides), max_tiles)


SEVEN_B = geometry(384, 14, 6, 9)
GEOMETRIES = {
    "7b": SEVEN_B,
    "odd": geometry(56, 8, 3, 9),
    "even": geometry(64, 8, 3, 9),
    "tight": geometry(56, 8, 3, 2),
}


def stock_processor(model: AnyresGeometry) -> LlavaOnevisionProcessor:
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in model.pinpoints])
    processor.num_image_tokens = model.grid**2
    processor.vision_aspect_ratio = f"anyres_max_{model.max_tiles}"
    processor.vision_feature_select_strategy = "full"
    processor.image_token, processor.video_token = "i", "v"
    return processor


def stock_pack(model: AnyresGeometry, height: int, width: int, *, newline: bool) -> torch.Tensor:
    """transformers' packing of features that are their own (tile, cell) number."""
    pinpoints = [list(pair) for pair in model.pinpoints]
    vision = SimpleNamespace(image_size=model.tile_px, patch_size=model.patch_px)
    stub = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    num_tiles = image_size_to_num_patches((height, width), pinpoints, model.tile_px)
    number = torch.arange(num_tiles * model.grid**2, dtype=torch.float64).view(num_tiles, -1, 1)
    (packed,), _ = LlavaOnevisionModel.pack_image_features(
        stub,
        [number],
        [(height, width)],
        image_newline=torch.tensor([-1.0], dtype=torch.float64) if newline else None,
        vision_aspect_ratio=f"anyres_max_{model.max_tiles}",
    )
    return packed.squeeze(1)


def sizes(seed: int, count: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    drawn = [(round(2 ** rng.uniform(0, 12)), round(2 ** rng.uniform(0, 12))) for _ in range(count)]
    # at (47, 423) and (369, 820) the 7B model's padding hangs on the rounding to seven digits
    rounding = [(47, 423), (369, 820)]
    return [*drawn, *rounding, (1, 1), (1, 5000), (5000, 1), (384, 384), (1080, 1920), (2480, 3508), (56, 64)]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_tiles_equal_transformers(name):
    model = GEOMETRIES[name]
    pinpoints = [list(pair) for pair in model.pinpoints]
    for height, width in sizes(1, 200):
        assert model.best_resolution(height, width) == select_best_resolution((height, width), pinpoints)
        expected = get_anyres_image_grid_shape((height, width), pinpoints, model.tile_px)
        assert model.tile_grid(height, width) == expected
        assert 1 + expected[0] * expected[1] <= model.most_tiles


@pytest.mark.parametrize("name", GEOMETRIES)
def test_layout_and_counts_equal_transformers(name):
    model = GEOMETRIES[name]
    processor = stock_processor(model)
    resized = 0
    for height, width in sizes(2, 40):
        rows, cols = model.tile_grid(height, width)
        layout = model.image_layout(height, width)
        count = model.num_image_tokens(height, width, num_tiles=1 + rows * cols)
        assert count == processor._get_number_of_features(height, width, model.tile_px, model.tile_px)
        packed = stock_pack(model, height, width, newline=True)
        assert count == packed.shape[0]
        assert layout.num_tokens == count - model.grid**2
        resized += layout.resized is not None
        if layout.resized is None:
            assert torch.equal(packed[model.grid**2 :], joined_cells(model, height, width))
    assert (resized > 0) == (name in {"7b", "tight"})


def joined_cells(model: AnyresGeometry, height: int, width: int) -> torch.Tensor:
    """Which (tile, cell) stands where, written cell by cell from the layout; -1 is a newline."""
    layout, grid = model.image_layout(height, width), model.grid
    tile_cols = layout.cols // grid
    cells = []
    for row in range(layout.top, layout.bottom):
        for col in range(layout.left, layout.right):
            tile = 1 + (row // grid) * tile_cols + col // grid
            cells.append(tile * grid**2 + (row % grid) * grid + col % grid)
        cells.append(-1)
    return torch.tensor(cells, dtype=torch.float64)


def test_video_and_several_images_equal_transformers():
    for model in GEOMETRIES.values():
        processor = stock_processor(model)
        for num_frames in (1, 8, 32):
            clip = {"pixel_values_videos": [torch.zeros(num_frames, 1)]}
            assert model.num_video_tokens(num_frames) == len(processor.replace_video_token(clip, 0))
        pair = {"batch_num_images": [2]}
        assert model.num_image_tokens(100, 50, num_tiles=1) == len(processor.replace_image_token(pair, 0))


def test_7b_numbers_by_hand():
    assert (SEVEN_B.grid, SEVEN_B.pooled, SEVEN_B.most_tiles) == (27, 14, 37)
    # video: 27 x 27 pooled to 14 x 14; the 19 x 19 pseudo-grid to 10 x 10
    assert SEVEN_B.num_video_tokens(32) == 32 * 196 + 1
    assert SEVEN_B.num_video_tokens(32, side=19) == 32 * 100 + 1
    # one tile without padding: 729 + 27 rows of 27 and a newline
    assert SEVEN_B.num_image_tokens(384, 384, num_tiles=2) == 729 + 27 * 28
    assert SEVEN_B.num_image_tokens(384, 384, num_tiles=1) == 730
    # 1920 x 1080: 3 x 5 tiles, 81 x 135 cells, 75 rows of picture; sqrt(75 * 135 / 6561) = 1.242 > 1.1: 60 x 108
    layout = SEVEN_B.image_layout(1080, 1920)
    assert SEVEN_B.tile_grid(1080, 1920) == (3, 5)
    assert (layout.rows, layout.cols, layout.top, layout.bottom, layout.left, layout.right) == (81, 135, 3, 78, 0, 135)
    assert layout.resized == (60, 108)
    assert SEVEN_B.num_image_tokens(1080, 1920, num_tiles=16) == 729 + 60 * 109
    # the same picture in the released pseudo-grid of 19: 57 x 95, int(1080 * 95 / 1920) = 53 rows leave 2 off each
    # end, 53 x 95; sqrt(5035 / 3249) = 1.245: 42 x 76
    layout = SEVEN_B.image_layout(1080, 1920, side=19)
    assert (layout.rows, layout.cols, layout.top, layout.bottom) == (57, 95, 2, 55)
    assert layout.resized == (42, 76)


@pytest.mark.parametrize("canvases", [((384, 768), (768, 384)), ((768, 384), (384, 768))])
def test_the_first_of_equal_canvases_wins_as_in_transformers(canvases):
    model = AnyresGeometry(384, 14, canvases, 9)
    assert model.best_resolution(500, 500) == canvases[0]
    assert select_best_resolution((500, 500), [list(pair) for pair in canvases]) == canvases[0]


def test_no_budget_never_resizes():
    model = geometry(56, 8, 3, None)
    assert model.image_layout(500, 500).resized is None
    assert model.image_layout(500, 500).shape == (21, 21)
