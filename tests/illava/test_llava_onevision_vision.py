"""The LLaVA-OneVision family up to the LLM: features equal to stock, layouts against slow oracles, traces, prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from illava.errors import PlanError
from illava.families import load_family
from illava.families.base import EncodedMedium
from illava.geometry import fill_gaps
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.preprocess import VisualInput, load_preprocessor

GRID = 7
# (height, width): square, wide, tall, very wide (unpadded to less than a tile), exactly the largest canvas
SIZES = [(100, 100), (60, 150), (150, 60), (40, 300), (168, 168)]


@pytest.fixture(scope="module")
def stock(onevision_folder):
    return LlavaOnevisionForConditionalGeneration.from_pretrained(onevision_folder).eval()


@pytest.fixture(scope="module")
def stock_processor(onevision_folder):
    return LlavaOnevisionImageProcessorPil.from_pretrained(onevision_folder)


@pytest.fixture(scope="module")
def family(onevision_folder):
    return load_family(str(onevision_folder), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def preprocessor(onevision_folder):
    return load_preprocessor(str(onevision_folder))


@pytest.fixture(scope="module")
def tight(tmp_path_factory):
    """A model whose budget of one tile makes every larger image go through the resize."""
    from models import make_onevision

    folder = make_onevision(tmp_path_factory.mktemp("tight"), max_tiles=1)
    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
    return stock, load_family(str(folder), dtype=torch.float32, device="cpu"), load_preprocessor(str(folder))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[0:height, 0:width]
    smooth = np.stack([row * 255 / height, col * 255 / width, 127 + 100 * np.sin((row + 2 * col) / 9)], axis=-1)
    return np.clip(smooth + rng.normal(0, 30, smooth.shape), 0, 255).astype(np.uint8)


def clip(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.stack([picture(60, 90, seed * 100 + n) for n in range(num_frames)])


def plan(layout: str = "geometric", *, num_merged: int = 6, budget: dict | None = None) -> ReductionPlan:
    """49 patches, four cuts of 6 leave 25 = 5 x 5."""
    steps = [{"stage": "vision_block", "layers": [2, 3, 4, 5], "reducer": {"kind": "illava", "num_merged": num_merged}}]
    if budget is not None:
        steps.append({"stage": "decoder_input", "reducer": {"kind": "illava", **budget}})
    return ReductionPlan(layout=layout, steps=steps)


def encode_one(family, medium: VisualInput, plan: ReductionPlan, *, trace: bool = False) -> EncodedMedium:
    (encoded,) = family.encode([medium], plan, trace=trace)
    _check_contract(encoded)
    return encoded


def _check_contract(encoded: EncodedMedium) -> None:
    num_kept = encoded.feature_KD.shape[0]
    assert encoded.slot_K.shape == (num_kept,)
    assert encoded.place_K3.shape == (num_kept, 3)
    assert torch.equal(encoded.slot_K, encoded.slot_K.unique())
    assert int(encoded.slot_K[-1]) < encoded.num_slots
    assert sum(count for _, count in encoded.frame_counts) == num_kept


def tower_survivors(family, medium: VisualInput, plan: ReductionPlan) -> tuple[torch.Tensor, list[list], dict]:
    """Oracle: projected survivors, the place of each by tile, and the survivor that every cell went into.

    Reads the trace's tower matrices only: a cell belongs to the row that its weight ends up in.
    """
    encoded = encode_one(family, medium, plan, trace=True)
    matrix = torch.eye(encoded.num_patches)
    for step in encoded.trace[:-1]:
        matrix = step.matrix.to_dense() @ matrix
    assert encoded.trace[-1].stage == "layout"
    place = encoded.trace[-2].place[:, 1:].tolist()
    owner = {}
    for cell, (_, tile, row, col) in enumerate(encoded.patch_place_P4.tolist()):
        (rows,) = matrix[:, cell].nonzero(as_tuple=True)
        assert len(rows) == 1
        owner[tile, row, col] = int(rows[0])
    return matrix, place, owner


def projected(family, medium: VisualInput, plan: ReductionPlan) -> torch.Tensor:
    """Survivors at LLM width in packed order, before any layout."""
    seen = []
    hook = family._projector.register_forward_hook(lambda module, args, out: seen.append(out))
    family.encode([medium], plan, trace=False)
    hook.remove()
    return seen[0]


# The empty plan is the stock model


@pytest.mark.parametrize("size", SIZES)
def test_an_image_without_a_plan_equals_stock(family, preprocessor, stock, stock_processor, size):
    frame = picture(*size)
    (medium,) = preprocessor.images([frame])
    inputs = stock_processor(images=Image.fromarray(frame), return_tensors="pt")
    with torch.no_grad():
        theirs = stock.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs.get("batch_num_images")
        ).pooler_output[0]
    encoded = encode_one(family, medium, EMPTY_PLAN)
    torch.testing.assert_close(encoded.feature_KD, theirs, atol=1e-5, rtol=1e-5)
    assert encoded.feature_KD.shape[0] == encoded.num_slots == family.num_vision_tokens(medium)
    assert encoded.num_patches == family.num_patches(medium) == len(medium.tiles) * GRID**2
    assert encoded.slot_K.tolist() == list(range(encoded.num_slots))


@pytest.mark.parametrize("size", SIZES)
def test_an_image_over_the_budget_equals_stock(tight, size):
    stock, family, preprocessor = tight
    (medium,) = preprocessor.images([picture(*size)])
    pixels = torch.from_numpy(medium.tiles).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        theirs = stock.get_image_features(((pixels - 0.5) / 0.5)[None], torch.tensor([size])).pooler_output[0]
    encoded = encode_one(family, medium, EMPTY_PLAN)
    torch.testing.assert_close(encoded.feature_KD, theirs, atol=1e-5, rtol=1e-5)
    assert encoded.feature_KD.shape[0] == family.num_vision_tokens(medium)


def test_several_images_without_a_plan_equal_stock(family, preprocessor, stock, stock_processor):
    frames = [picture(80, 120, seed=1), picture(56, 56, seed=2), picture(200, 30, seed=3)]
    media = preprocessor.images(frames)
    inputs = stock_processor(images=[[Image.fromarray(frame) for frame in frames]], return_tensors="pt")
    with torch.no_grad():
        theirs = stock.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], batch_num_images=torch.tensor([3])
        ).pooler_output
    for encoded, expected, medium in zip(family.encode(media, EMPTY_PLAN, trace=False), theirs, media, strict=True):
        torch.testing.assert_close(encoded.feature_KD, expected, atol=1e-5, rtol=1e-5)
        assert encoded.frame_counts == ((0, 49), (-1, 1))
        assert encoded.feature_KD.shape[0] == family.num_vision_tokens(medium) == 50


def test_a_video_without_a_plan_equals_stock(family, preprocessor, stock):
    medium = preprocessor.video(clip(3))
    pixels = torch.from_numpy(medium.tiles).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        theirs = stock.get_video_features(((pixels - 0.5) / 0.5)[None]).pooler_output[0]
    encoded = encode_one(family, medium, EMPTY_PLAN)
    # the newline is part of this return value in newer transformers only (5.23: yes, 5.17: no)
    torch.testing.assert_close(encoded.feature_KD[:-1], theirs[: 3 * 16], atol=1e-5, rtol=1e-5)
    assert torch.equal(encoded.feature_KD[-1], stock.model.image_newline)
    assert encoded.frame_counts == ((0, 16), (1, 16), (2, 16), (-1, 1))
    assert encoded.feature_KD.shape[0] == family.num_vision_tokens(medium) == 3 * 16 + 1


@pytest.mark.parametrize("which", [EMPTY_PLAN, plan("geometric"), plan("released")])
def test_media_encoded_together_equal_each_alone(family, preprocessor, which):
    media = [
        *preprocessor.images([picture(60, 150)]),
        preprocessor.video(clip(2)),
        *preprocessor.images([picture(90, 90)]),
    ]
    for encoded, medium in zip(family.encode(media, which, trace=False), media, strict=True):
        alone = encode_one(family, medium, which)
        torch.testing.assert_close(encoded.feature_KD, alone.feature_KD, atol=1e-5, rtol=1e-5)
        assert torch.equal(encoded.slot_K, alone.slot_K)


# The released layout


def test_released_video_pools_the_pseudo_image(family, preprocessor):
    medium, which = preprocessor.video(clip(2)), plan("released")
    encoded = encode_one(family, medium, which)
    survivors = projected(family, medium, which).view(2, 5, 5, -1)
    pooled = interpolate(survivors.permute(0, 3, 1, 2), size=(3, 3), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoded.feature_KD[:-1], pooled.flatten(0, 1))
    assert encoded.frame_counts == ((0, 9), (1, 9), (-1, 1))
    assert encoded.slot_K.tolist() == list(range(19))
    assert encoded.num_slots == 19


def test_released_image_is_stocks_packing_at_the_pseudo_side(family, preprocessor, stock):
    size = (60, 150)
    (medium,), which = preprocessor.images([picture(*size)]), plan("released")
    encoded = encode_one(family, medium, which)
    survivors = projected(family, medium, which)
    rows, cols = family.geometry.tile_grid(*size)
    joined = survivors[25:].view(rows, cols, 5, 5, -1).permute(0, 2, 1, 3, 4).reshape(rows * 5, cols * 5, -1)
    new_height = int(round(size[0] * (cols * 5 / size[1]), 7))
    padding = (rows * 5 - new_height) // 2
    joined = joined[padding : rows * 5 - padding]
    newline = stock.model.image_newline.detach().expand(joined.shape[0], 1, -1)
    expected = torch.cat([survivors[:25], torch.cat([joined, newline], 1).flatten(0, 1)])
    torch.testing.assert_close(encoded.feature_KD, expected)
    assert encoded.num_slots == len(expected)


# The geometric layout


def test_geometric_video_pools_the_restored_grid(family, preprocessor):
    medium, which = preprocessor.video(clip(3)), plan("geometric")
    encoded = encode_one(family, medium, which)
    _, _, owner = tower_survivors(family, medium, which)
    survivors = projected(family, medium, which)
    assert survivors.shape[0] == 3 * 25
    for frame in range(3):
        cells = [owner[frame, row, col] for row in range(GRID) for col in range(GRID)]
        restored = survivors[cells].view(GRID, GRID, -1)
        pooled = interpolate(restored.permute(2, 0, 1)[None], size=(4, 4), mode="bilinear")[0].flatten(1).T
        torch.testing.assert_close(encoded.feature_KD[frame * 16 : (frame + 1) * 16], pooled)
    assert encoded.frame_counts == ((0, 16), (1, 16), (2, 16), (-1, 1))
    assert encoded.slot_K.tolist() == list(range(49))
    assert encoded.place_K3[:16].tolist() == [[0, row, col] for row in range(4) for col in range(4)]
    assert encoded.place_K3[-1].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("size", SIZES)
def test_geometric_image_keeps_survivors_at_their_true_slots(family, preprocessor, stock, size):
    (medium,), which = preprocessor.images([picture(*size)]), plan("geometric")
    encoded = encode_one(family, medium, which)
    _, places, _ = tower_survivors(family, medium, which)
    survivors = projected(family, medium, which)
    layout = family.geometry.image_layout(*size)
    assert layout.resized is None
    _, tile_cols = family.geometry.tile_grid(*size)
    width = layout.right - layout.left
    expected: dict[int, torch.Tensor] = {}
    for token, (tile, row, col) in enumerate(places):
        if tile == 0:
            expected[row * GRID + col] = survivors[token]
            continue
        true_row = (tile - 1) // tile_cols * GRID + row - layout.top
        true_col = (tile - 1) % tile_cols * GRID + col - layout.left
        if 0 <= true_row < layout.bottom - layout.top and 0 <= true_col < width:
            expected[GRID**2 + true_row * (width + 1) + true_col] = survivors[token]
    for row in range(layout.bottom - layout.top):
        expected[GRID**2 + row * (width + 1) + width] = stock.model.image_newline.detach()
    assert encoded.slot_K.tolist() == sorted(expected)
    torch.testing.assert_close(encoded.feature_KD, torch.stack([expected[slot] for slot in sorted(expected)]))
    assert encoded.num_slots == family.num_vision_tokens(medium)
    _check_image_places(encoded, width)


def _check_image_places(encoded: EncodedMedium, width: int) -> None:
    for slot, (part, row, col) in zip(encoded.slot_K.tolist(), encoded.place_K3.tolist(), strict=True):
        if slot < GRID**2:
            assert (part, row, col) == (0, slot // GRID, slot % GRID)
        elif (slot - GRID**2) % (width + 1) == width:
            assert (part, row, col) == (1, -1, -1)
        else:
            assert (part, *divmod(slot - GRID**2, width + 1)) == (part, row, col)
            assert part == 1


@pytest.mark.parametrize("size", [(100, 100), (60, 150), (168, 160)])
def test_geometric_image_over_the_budget_keeps_the_resized_cells_with_survivors(tight, size):
    stock, family, preprocessor = tight
    (medium,), which = preprocessor.images([picture(*size)]), plan("geometric")
    encoded = encode_one(family, medium, which)
    _, places, owner = tower_survivors(family, medium, which)
    survivors = projected(family, medium, which)
    layout = family.geometry.image_layout(*size)
    tile_rows, tile_cols = family.geometry.tile_grid(*size)
    grid = torch.stack(
        [
            torch.stack(
                [
                    survivors[owner[1 + row // GRID * tile_cols + col // GRID, row % GRID, col % GRID]]
                    for col in range(tile_cols * GRID)
                ]
            )
            for row in range(tile_rows * GRID)
        ]
    )[layout.top : layout.bottom, layout.left : layout.right]
    height, width = grid.shape[:2]
    rows, cols = layout.resized
    resized = interpolate(grid.permute(2, 0, 1)[None], size=(rows, cols), mode="bilinear")[0].permute(1, 2, 0)
    expected = {row * GRID + col: survivors[token] for token, (tile, row, col) in enumerate(places) if tile == 0}
    for tile, row, col in (place for place in places if place[0] > 0):
        true_row = (tile - 1) // tile_cols * GRID + row - layout.top
        true_col = (tile - 1) % tile_cols * GRID + col - layout.left
        if 0 <= true_row < height and 0 <= true_col < width:
            to_row, to_col = math.floor((true_row + 0.5) * rows / height), math.floor((true_col + 0.5) * cols / width)
            expected[GRID**2 + to_row * (cols + 1) + to_col] = resized[to_row, to_col]
    for row in range(rows):
        expected[GRID**2 + row * (cols + 1) + cols] = stock.model.image_newline.detach()
    assert encoded.slot_K.tolist() == sorted(expected)
    torch.testing.assert_close(encoded.feature_KD, torch.stack([expected[slot] for slot in sorted(expected)]))
    assert encoded.num_slots == family.num_vision_tokens(medium)


def test_geometric_single_tile_keeps_true_slots(family, preprocessor):
    media, which = preprocessor.images([picture(70, 70), picture(80, 50, seed=4)]), plan("geometric")
    for encoded, medium in zip(family.encode(media, which, trace=False), media, strict=True):
        _, places, _ = tower_survivors(family, medium, which)
        assert encoded.slot_K.tolist() == [row * GRID + col for _, row, col in places] + [49]
        assert encoded.frame_counts == ((0, 25), (-1, 1))
        assert encoded.num_slots == 50


# Scores for decoder_input


@pytest.mark.parametrize("layout", ["geometric", "released"])
def test_scores_follow_the_layout_and_never_offer_a_separator(family, preprocessor, monkeypatch, layout):
    from illava import vision

    seen = []
    real = vision.attention_received

    def spy(*args, **kwargs):
        seen.append(real(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(vision, "attention_received", spy)
    medium, which = preprocessor.video(clip(2)), plan(layout, budget={"keep_ratio": 0.5})
    encoded = encode_one(family, medium, which)
    assert len(seen) == 5  # four merges and the last block
    last = seen[-1]
    assert last.shape == (50,)
    torch.testing.assert_close(last.view(2, 25).sum(1), torch.ones(2))
    assert encoded.score_K.dtype == torch.float32
    assert math.isinf(encoded.score_K[-1])
    assert encoded.score_K[:-1].isfinite().all()
    if layout == "released":
        grid = last.view(2, 1, 5, 5)
    else:
        _, _, owner = tower_survivors(family, medium, which)
        cells = [owner[f, r, c] for f in range(2) for r in range(GRID) for c in range(GRID)]
        grid = last[cells].view(2, 1, GRID, GRID)
    side = math.ceil(grid.shape[-1] / 2)
    torch.testing.assert_close(encoded.score_K[:-1], interpolate(grid, size=(side, side), mode="bilinear").flatten())


def test_scores_are_computed_only_when_asked_for(family, preprocessor):
    (medium,) = preprocessor.images([picture(60, 60)])
    assert encode_one(family, medium, plan()).score_K is None
    asked = ReductionPlan(steps=[{"stage": "decoder_input", "reducer": {"kind": "illava", "keep_ratio": 0.5}}])
    encoded = encode_one(family, medium, asked)
    separators = encoded.place_K3[:, 1] < 0
    assert torch.equal(encoded.score_K.isinf(), separators)
    assert encoded.feature_KD.shape[0] == encoded.num_slots


def test_vision_output_reduces_by_the_last_blocks_attention(family, preprocessor):
    medium = preprocessor.video(clip(2))
    steps = [
        {"stage": "vision_block", "layers": [7], "reducer": {"kind": "illava", "num_merged": 9}},
        {"stage": "vision_output", "reducer": {"kind": "illava", "num_merged": 4}},
    ]
    encoded = encode_one(family, medium, ReductionPlan(layout="released", steps=steps), trace=True)
    assert [(step.stage, step.layer, step.matrix.shape[0]) for step in encoded.trace] == [
        ("vision_block", 7, 80),
        ("vision_output", None, 72),
        ("layout", None, 19),
    ]


# Traces


@pytest.mark.parametrize("layout", ["geometric", "released"])
@pytest.mark.parametrize("kind", ["image", "over budget", "several", "video"])
def test_the_trace_tells_what_every_token_is_made_of(family, preprocessor, tight, layout, kind):
    if kind == "over budget":
        _, family, preprocessor = tight
    media = {
        "image": lambda: preprocessor.images([picture(60, 150)]),
        "over budget": lambda: preprocessor.images([picture(100, 150)]),
        "several": lambda: preprocessor.images([picture(60, 60), picture(60, 80)]),
        "video": lambda: [preprocessor.video(clip(2)), preprocessor.video(clip(3))],
    }[kind]()
    which = plan(layout)
    for encoded, medium in zip(family.encode(media, which, trace=True), media, strict=True):
        assert [(step.stage, step.layer) for step in encoded.trace] == [
            *(("vision_block", block) for block in (2, 3, 4, 5)),
            ("layout", None),
        ]
        size, into_tower = encoded.num_patches, torch.eye(encoded.num_patches)
        for step in encoded.trace:
            assert step.matrix.shape[1] == size
            assert step.place.shape == (step.matrix.shape[0], 4)
            size = step.matrix.shape[0]
        for step in encoded.trace[:-1]:
            torch.testing.assert_close(step.matrix.to_dense().sum(1), torch.ones(step.matrix.shape[0]))
            into_tower = step.matrix.to_dense() @ into_tower
        # in the tower every patch ends in exactly one survivor, which stands at a place of its own content
        assert ((into_tower > 0).sum(0) == 1).all()
        layout_step = encoded.trace[-1]
        separators = layout_step.place[:, 2] < 0
        sums = layout_step.matrix.to_dense().sum(1)
        torch.testing.assert_close(sums, (~separators).float())
        assert torch.equal(layout_step.place[:, 1:], encoded.place_K3)
        # the matrix applied to the projected survivors gives the features
        mixed = layout_step.matrix.to_dense() @ projected(family, medium, which)
        torch.testing.assert_close(mixed[~separators], encoded.feature_KD[~separators], atol=1e-5, rtol=1e-4)
        assert encoded.patch_place_P4.shape == (encoded.num_patches, 4)


def test_without_a_trace_none_is_recorded(family, preprocessor):
    encoded = encode_one(family, preprocessor.video(clip(1)), plan())
    assert encoded.trace == ()
    assert encoded.patch_place_P4 is None


# Other reducers: pruned cells have no merge target, and counts may differ from tile to tile


def test_geometric_video_gives_pruned_cells_to_a_neighbour(family, preprocessor):
    steps = [{"stage": "vision_block", "layers": [6], "reducer": {"kind": "uniform_stride", "keep_ratio": 0.5}}]
    medium, which = preprocessor.video(clip(2)), ReductionPlan(steps=steps)
    family.check(which)
    encoded = encode_one(family, medium, which, trace=True)
    survivors = projected(family, medium, which)
    grid = torch.full((2, GRID, GRID), -1)
    for token, (_, frame, row, col) in enumerate(encoded.trace[0].place.tolist()):
        grid[frame, row, col] = token
    owner = fill_gaps(grid)
    assert (grid < 0).any()
    restored = survivors[owner].permute(0, 3, 1, 2)
    pooled = interpolate(restored, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(encoded.feature_KD[:-1], pooled)


@pytest.mark.parametrize("layout", ["geometric", "released"])
def test_counts_that_differ_between_tiles(family, preprocessor, layout):
    steps = [
        {"stage": "vision_block", "layers": [3], "reducer": {"kind": "prumerge", "saliency": "attention_received"}}
    ]
    which = ReductionPlan(layout=layout, steps=steps)
    if layout == "released":
        with pytest.raises(PlanError, match="depends on the picture"):
            family.check(which)
        return
    family.check(which)
    media = [preprocessor.images([picture(60, 150)])[0], preprocessor.video(clip(3))]
    together = family.encode(media, which, trace=True)
    assert len({int(n) for n in torch.bincount(together[0].trace[0].place[:, 1])}) > 1
    for encoded, medium in zip(together, media, strict=True):
        alone = encode_one(family, medium, which)
        torch.testing.assert_close(encoded.feature_KD, alone.feature_KD, atol=1e-5, rtol=1e-5)
        assert torch.equal(encoded.slot_K, alone.slot_K)
