"""LLaVA-OneVision's layouts of kept tokens, released and geometric, against slow oracles."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import interpolate

from illava.plan import ReductionPlan
from illava.reduction.grid_representatives import fill_gaps
from illava.visual_tokens import EncodedVisual
from tests.support.closeness import assert_close
from tests.support.models.onevision_tower import (
    GRID,
    SIZES,
    clip,
    encode_one,
    picture,
    plan,
    projected,
    tower_kept_tokens,
)

pytestmark = pytest.mark.numeric

# The released layout


def test_released_video_pools_the_pseudo_image(family, preprocessor):
    mm_item, which = preprocessor.video(clip(2)), plan("released")
    encoded = encode_one(family, mm_item, which)
    kept_tokens = projected(family, mm_item, which).view(2, 5, 5, -1)
    pooled = interpolate(kept_tokens.permute(0, 3, 1, 2), size=(3, 3), mode="bilinear").flatten(2).transpose(1, 2)
    assert_close(encoded.feature_KD[:-1], pooled.flatten(0, 1))
    assert encoded.frame_counts == ((0, 9), (1, 9), (-1, 1))
    assert encoded.placeholder_K.tolist() == list(range(19))
    assert encoded.num_placeholders == 19


def test_released_image_is_stocks_packing_at_the_pseudo_side(family, preprocessor, stock):
    size = (60, 150)
    (mm_item,), which = preprocessor.images([picture(*size)]), plan("released")
    encoded = encode_one(family, mm_item, which)
    kept_tokens = projected(family, mm_item, which)
    rows, cols = family.geometry.tile_grid(*size)
    joined = kept_tokens[25:].view(rows, cols, 5, 5, -1).permute(0, 2, 1, 3, 4).reshape(rows * 5, cols * 5, -1)
    new_height = int(round(size[0] * (cols * 5 / size[1]), 7))
    padding = (rows * 5 - new_height) // 2
    joined = joined[padding : rows * 5 - padding]
    newline = stock.model.image_newline.detach().expand(joined.shape[0], 1, -1)
    expected = torch.cat([kept_tokens[:25], torch.cat([joined, newline], 1).flatten(0, 1)])
    assert_close(encoded.feature_KD, expected)
    assert encoded.num_placeholders == len(expected)


# The geometric layout


def test_geometric_video_pools_the_restored_grid(family, preprocessor):
    mm_item, which = preprocessor.video(clip(3)), plan("geometric")
    encoded = encode_one(family, mm_item, which)
    _, _, representative = tower_kept_tokens(family, mm_item, which)
    kept_tokens = projected(family, mm_item, which)
    assert kept_tokens.shape[0] == 3 * 25
    for frame in range(3):
        cells = [representative[frame, row, col] for row in range(GRID) for col in range(GRID)]
        restored = kept_tokens[cells].view(GRID, GRID, -1)
        pooled = interpolate(restored.permute(2, 0, 1)[None], size=(4, 4), mode="bilinear")[0].flatten(1).T
        assert_close(encoded.feature_KD[frame * 16 : (frame + 1) * 16], pooled)
    assert encoded.frame_counts == ((0, 16), (1, 16), (2, 16), (-1, 1))
    assert encoded.placeholder_K.tolist() == list(range(49))
    assert encoded.coord_K3[:16].tolist() == [[0, row, col] for row in range(4) for col in range(4)]
    assert encoded.coord_K3[-1].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("size", SIZES)
def test_geometric_image_keeps_kept_tokens_at_their_true_slots(family, preprocessor, stock, size):
    (mm_item,), which = preprocessor.images([picture(*size)]), plan("geometric")
    encoded = encode_one(family, mm_item, which)
    _, places, _ = tower_kept_tokens(family, mm_item, which)
    kept_tokens = projected(family, mm_item, which)
    layout = family.geometry.image_layout(*size)
    assert layout.resized is None
    _, tile_cols = family.geometry.tile_grid(*size)
    width = layout.right - layout.left
    expected: dict[int, torch.Tensor] = {}
    for token, (tile, row, col) in enumerate(places):
        if tile == 0:
            expected[row * GRID + col] = kept_tokens[token]
            continue
        true_row = (tile - 1) // tile_cols * GRID + row - layout.top
        true_col = (tile - 1) % tile_cols * GRID + col - layout.left
        if 0 <= true_row < layout.bottom - layout.top and 0 <= true_col < width:
            expected[GRID**2 + true_row * (width + 1) + true_col] = kept_tokens[token]
    for row in range(layout.bottom - layout.top):
        expected[GRID**2 + row * (width + 1) + width] = stock.model.image_newline.detach()
    assert encoded.placeholder_K.tolist() == sorted(expected)
    assert_close(encoded.feature_KD, torch.stack([expected[slot] for slot in sorted(expected)]))
    assert encoded.num_placeholders == family.num_vision_tokens(mm_item)
    _check_image_places(encoded, width)


def _check_image_places(encoded: EncodedVisual, width: int) -> None:
    for slot, (part, row, col) in zip(encoded.placeholder_K.tolist(), encoded.coord_K3.tolist(), strict=True):
        if slot < GRID**2:
            assert (part, row, col) == (0, slot // GRID, slot % GRID)
        elif (slot - GRID**2) % (width + 1) == width:
            assert (part, row, col) == (1, -1, -1)
        else:
            assert (part, *divmod(slot - GRID**2, width + 1)) == (part, row, col)
            assert part == 1


@pytest.mark.parametrize("size", [(100, 100), (60, 150), (168, 160)])
def test_geometric_image_over_the_budget_keeps_the_resized_cells_with_kept_tokens(tight, size):
    stock, family, preprocessor = tight
    (mm_item,), which = preprocessor.images([picture(*size)]), plan("geometric")
    encoded = encode_one(family, mm_item, which)
    _, places, representative = tower_kept_tokens(family, mm_item, which)
    kept_tokens = projected(family, mm_item, which)
    layout = family.geometry.image_layout(*size)
    tile_rows, tile_cols = family.geometry.tile_grid(*size)
    grid = torch.stack(
        [
            torch.stack(
                [
                    kept_tokens[representative[1 + row // GRID * tile_cols + col // GRID, row % GRID, col % GRID]]
                    for col in range(tile_cols * GRID)
                ]
            )
            for row in range(tile_rows * GRID)
        ]
    )[layout.top : layout.bottom, layout.left : layout.right]
    height, width = grid.shape[:2]
    rows, cols = layout.resized
    resized = interpolate(grid.permute(2, 0, 1)[None], size=(rows, cols), mode="bilinear")[0].permute(1, 2, 0)
    expected = {row * GRID + col: kept_tokens[token] for token, (tile, row, col) in enumerate(places) if tile == 0}
    for tile, row, col in (place for place in places if place[0] > 0):
        true_row = (tile - 1) // tile_cols * GRID + row - layout.top
        true_col = (tile - 1) % tile_cols * GRID + col - layout.left
        if 0 <= true_row < height and 0 <= true_col < width:
            to_row, to_col = math.floor((true_row + 0.5) * rows / height), math.floor((true_col + 0.5) * cols / width)
            expected[GRID**2 + to_row * (cols + 1) + to_col] = resized[to_row, to_col]
    for row in range(rows):
        expected[GRID**2 + row * (cols + 1) + cols] = stock.model.image_newline.detach()
    assert encoded.placeholder_K.tolist() == sorted(expected)
    assert_close(encoded.feature_KD, torch.stack([expected[slot] for slot in sorted(expected)]))
    assert encoded.num_placeholders == family.num_vision_tokens(mm_item)


def test_geometric_single_tile_keeps_true_slots(family, preprocessor):
    media, which = preprocessor.images([picture(70, 70), picture(80, 50, seed=4)]), plan("geometric")
    for encoded, mm_item in zip(family.encode(media, which, trace=False), media, strict=True):
        _, places, _ = tower_kept_tokens(family, mm_item, which)
        assert encoded.placeholder_K.tolist() == [row * GRID + col for _, row, col in places] + [49]
        assert encoded.frame_counts == ((0, 25), (-1, 1))
        assert encoded.num_placeholders == 50


# Pruned cells have no merge target


def test_geometric_video_gives_pruned_cells_to_a_neighbour(family, preprocessor):
    steps = [{"stage": "vision_block", "layers": [6], "reducer": {"kind": "uniform_stride", "keep_ratio": 0.5}}]
    mm_item, which = preprocessor.video(clip(2)), ReductionPlan(steps=steps)
    family.check(which)
    encoded = encode_one(family, mm_item, which, trace=True)
    kept_tokens = projected(family, mm_item, which)
    grid = torch.full((2, GRID, GRID), -1)
    for token, (_, frame, row, col) in enumerate(encoded.trace[0].coords.tolist()):
        grid[frame, row, col] = token
    representative = fill_gaps(grid)
    assert (grid < 0).any()
    restored = kept_tokens[representative].permute(0, 3, 1, 2)
    pooled = interpolate(restored, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2).flatten(0, 1)
    assert_close(encoded.feature_KD[:-1], pooled)
