"""LLaVA-NeXT up to the LLM: pixels and features equal to stock, kept tokens against a slow tower of stock layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from illava.errors import PlanError, PreprocessError, RequestError
from illava.families import load_family, load_preprocessor
from illava.families.model_shape import load_model_shape
from illava.plan import EMPTY_PLAN, ReductionPlan, ReductionStep
from illava.preprocess import VisualInput
from illava.reducers import Reducer
from illava.token_counts import VisualShape, expected_counts
from illava.tokens import prune
from tests.support.closeness import assert_close
from tests.support.models.llava_next import make_llava_next

pytestmark = pytest.mark.numeric

GRID = 6
SIZES = [(60, 60), (60, 150), (150, 60), (40, 300), (96, 96), (300, 17), (500, 700), (1, 3)]
MERGES = {1: 5, 2: 4, 4: 6, 6: 5}  # block: r; 36 patches -> 16, an even square


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_llava_next(tmp_path_factory.mktemp("next"))
    return SimpleNamespace(
        family=load_family(str(folder), dtype=torch.float32, device="cpu"),
        preprocessor=load_preprocessor(str(folder)),
        shape=load_model_shape(str(folder)),
        stock=LlavaNextForConditionalGeneration.from_pretrained(folder).eval(),
        processor=LlavaNextImageProcessorPil.from_pretrained(folder),
    )


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[0:height, 0:width]
    smooth = np.stack([row * 255 / height, col * 255 / width, 127 + 100 * np.sin((row + 2 * col) / 9)], axis=-1)
    return np.clip(smooth + rng.normal(0, 30, smooth.shape), 0, 255).astype(np.uint8)


def merging(layout: str = "geometric", **budget: float) -> ReductionPlan:
    steps = [
        {"stage": "vision_block", "layers": [block], "reducer": {"kind": "illava", "num_merged": r}}
        for block, r in MERGES.items()
    ]
    if budget:
        steps.append({"stage": "decoder_input", "reducer": {"kind": "illava", **budget}})
    return ReductionPlan(layout=layout, steps=steps)


# Equal to stock


@pytest.mark.parametrize("size", SIZES)
def test_pixels_and_features_equal_stock(tiny, size):
    frame = picture(*size)
    (mm_item,) = tiny.preprocessor.images([frame])
    theirs = tiny.processor(images=Image.fromarray(frame), return_tensors="pt")
    assert mm_item.original_size == size == tuple(theirs["image_sizes"][0].tolist())
    assert_close(tiny.family.encoder.pixels([mm_item]), theirs["pixel_values"][0])
    with torch.no_grad():
        expected = tiny.stock.get_image_features(theirs["pixel_values"], theirs["image_sizes"]).pooler_output[0]
    (encoded,) = tiny.family.encode([mm_item], EMPTY_PLAN, trace=False)
    assert_close(encoded.feature_KD, expected)
    assert len(expected) == encoded.num_placeholders == tiny.family.num_vision_tokens(mm_item)
    assert encoded.num_patches == tiny.family.num_patches(mm_item) == len(mm_item.tiles) * GRID**2
    assert mm_item.nbytes <= tiny.preprocessor.max_nbytes(1)


def test_each_of_several_images_is_tiled_and_equals_stock(tiny):
    frames = [picture(60, 150, 1), picture(48, 48, 2), picture(200, 30, 3)]
    media = tiny.preprocessor.images(frames)
    theirs = tiny.processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    with torch.no_grad():
        expected = tiny.stock.get_image_features(theirs["pixel_values"], theirs["image_sizes"]).pooler_output
    for encoded, one in zip(tiny.family.encode(media, EMPTY_PLAN, trace=False), expected, strict=True):
        assert_close(encoded.feature_KD, one)
    assert sum(mm_item.nbytes for mm_item in media) <= tiny.preprocessor.max_nbytes(3)


# Kept tokens against a slow tower


def slow_tower(tiny, mm_item: VisualInput, merges: dict[int, int]):
    """Stock layers, one tile at a time, with the paper's formula written out; CLS is token 0 and takes no part in it.

    Returns projected kept tokens, (tile, row, col) of each, and the attention each received in the last block.
    """
    tower, features, places, scores = tiny.stock.model.vision_tower, [], [], []
    tower = getattr(tower, "vision_model", tower)
    for tile, pixels in enumerate(tiny.family.encoder.pixels([mm_item])):
        x = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
        cells = [(tile, row, col) for row in range(GRID) for col in range(GRID)]
        for index, block in enumerate(tower.encoder.layers[:-1]):
            own, normed = block.self_attn, block.layer_norm1(x)
            q, k, v = (
                p(normed).unflatten(1, (own.num_heads, -1)).transpose(0, 1)
                for p in (own.q_proj, own.k_proj, own.v_proj)
            )
            attention = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
            received = attention.mean((0, 1))[1:]
            x = x + own.out_proj((attention @ v).transpose(0, 1).flatten(1))
            if index in merges:
                r = merges[index]
                lowest = received.argsort()[: r + 1].tolist()
                weights = [2 * (r + 1 - m) / ((r + 1) * (r + 2)) for m in range(r + 1)]
                x[1 + lowest[-1]] = sum(w * x[1 + t] for w, t in zip(weights, lowest, strict=True))
                kept = [n for n in range(len(cells)) if n not in lowest[:-1]]
                x, cells, received = x[[0, *(1 + n for n in kept)]], [cells[n] for n in kept], received[kept]
            x = x + block.mlp(block.layer_norm2(x))
        features.append(tiny.stock.model.multi_modal_projector(x[1:]))
        places += cells
        scores.append(received)
    return torch.cat(features), places, torch.cat(scores)


def true_slots(tiny, size: tuple[int, int]) -> dict[tuple[int, int, int], int]:
    """Slot of every cell that is not padding, by transformers' own cut of a grid of cell numbers; -1: newlines."""
    config = tiny.stock.config
    tile_rows, tile_cols = get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    cells = [
        (1 + row // GRID * tile_cols + col // GRID, row % GRID, col % GRID)
        for row in range(tile_rows * GRID)
        for col in range(tile_cols * GRID)
    ]
    left = unpad_image(torch.arange(len(cells)).view(1, tile_rows * GRID, tile_cols * GRID), size)[0]
    slots = {(0, row, col): row * GRID + col for row in range(GRID) for col in range(GRID)}
    for row, numbers in enumerate(left.tolist()):
        slots |= {cells[n]: GRID**2 + row * (left.shape[1] + 1) + col for col, n in enumerate(numbers)}
        slots[-1, -1, row] = GRID**2 + (row + 1) * (left.shape[1] + 1) - 1
    return slots


@pytest.mark.parametrize("size", [(60, 60), (60, 150), (150, 60), (40, 300)])
@torch.no_grad()
def test_kept_tokens_stand_at_their_true_slots_with_the_values_of_a_slow_tower(tiny, size):
    (mm_item,) = tiny.preprocessor.images([picture(*size)])
    (encoded,) = tiny.family.encode([mm_item], merging(keep_ratio=0.5), trace=True)
    features, places, scores = slow_tower(tiny, mm_item, MERGES)
    assert len(places) == len(mm_item.tiles) * 16
    slots = true_slots(tiny, size)
    newline = tiny.stock.model.image_newline
    expected = {slot: (newline, float("inf")) for place, slot in slots.items() if place[0] == -1}
    for feature, place, score in zip(features, places, scores.tolist(), strict=True):
        if place in slots:  # else a patch of padding
            expected[slots[place]] = (feature, score)
    assert encoded.placeholder_K.tolist() == sorted(expected)
    assert encoded.num_placeholders == len(slots)
    found = torch.stack([expected[slot][0] for slot in sorted(expected)])
    assert_close(encoded.feature_KD, found)
    found = torch.tensor([expected[slot][1] for slot in sorted(expected)])
    assert_close(encoded.score_K, found)
    assert [step.matrix.shape[0] for step in encoded.trace[:-1]] == [
        len(mm_item.tiles) * left for left in (31, 27, 21, 16)
    ]


@torch.no_grad()
def test_released_layout_reads_kept_tokens_as_a_smaller_grid(tiny):
    size = (60, 150)
    (mm_item,) = tiny.preprocessor.images([picture(*size)])
    (encoded,) = tiny.family.encode([mm_item], merging("released"), trace=False)
    features, _, _ = slow_tower(tiny, mm_item, MERGES)
    tiles = features.view(-1, 4, 4, features.shape[1])
    joined = tiles[1:].transpose(0, 1).reshape(4, -1, features.shape[1])  # canvas of one row of tiles
    cut = unpad_image(joined.permute(2, 0, 1), size).permute(1, 2, 0)
    rows = torch.cat([cut, tiny.stock.model.image_newline.expand(len(cut), 1, -1)], 1).flatten(0, 1)
    assert_close(encoded.feature_KD, torch.cat([tiles[0].flatten(0, 1), rows]))


@pytest.mark.parametrize("layout", ["geometric", "released"])
def test_media_encoded_together_equal_each_alone(tiny, layout):
    media = tiny.preprocessor.images([picture(60, 150, 4), picture(90, 30, 5)])
    for encoded, mm_item in zip(tiny.family.encode(media, merging(layout), trace=False), media, strict=True):
        (alone,) = tiny.family.encode([mm_item], merging(layout), trace=False)
        assert_close(encoded.feature_KD, alone.feature_KD)
        assert torch.equal(encoded.placeholder_K, alone.placeholder_K)


class Witness(Reducer):
    """Keeps all but the last two of each segment and notes what it was shown."""

    stages: ClassVar = frozenset({"vision_block", "vision_output"})
    seen: ClassVar[list] = []
    kind: Literal["witness"] = "witness"

    def evidence(self, stage):
        kinds = {"attention_received", "cls_attention"}
        return frozenset(kinds | {"keys"} if stage == "vision_block" else kinds)

    def num_kept(self, num_tokens):
        return num_tokens - 2

    def assign(self, tokens, evidence, stage):
        self.seen.append((tokens, evidence))
        kept, start = [], 0
        for length in tokens.lengths:
            kept += range(start, start + length - 2)
            start += length
        return prune(torch.tensor(kept), tuple(n - 2 for n in tokens.lengths), start)


@torch.no_grad()
def test_no_reducer_sees_cls_but_its_attention_counts(tiny):
    (mm_item,) = tiny.preprocessor.images([picture(60, 150)])
    steps = (
        ReductionStep.model_construct(stage="vision_block", layers=(0,), reducer=Witness()),
        ReductionStep.model_construct(stage="vision_output", layers=(), reducer=Witness()),
    )
    plan = ReductionPlan.model_construct(layout="geometric", steps=steps)
    tiny.family.check(plan)
    Witness.seen.clear()
    tiny.family.encode([mm_item], plan, trace=False)
    (first, evidence), (last, after) = Witness.seen
    num_tiles = len(mm_item.tiles)
    assert first.lengths == (36,) * num_tiles
    assert last.lengths == (34,) * num_tiles
    tower = tiny.stock.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    x = tower.pre_layrnorm(tower.embeddings(tiny.family.encoder.pixels([mm_item])))
    own, normed = tower.encoder.layers[0].self_attn, tower.encoder.layers[0].layer_norm1(x)
    q, k = (p(normed).unflatten(2, (own.num_heads, -1)).transpose(1, 2) for p in (own.q_proj, own.k_proj))
    attention = (q @ k.transpose(2, 3) * own.scale).softmax(-1).mean(1)
    assert_close(evidence.attention_received_T, attention.mean(1)[:, 1:].flatten())
    assert_close(evidence.cls_attention_T, attention[:, 0, 1:].flatten())
    assert_close(evidence.keys_THd, k.transpose(1, 2)[:, 1:].flatten(0, 1))
    assert after.cls_attention_T.shape == after.attention_received_T.shape == (34 * num_tiles,)


@pytest.mark.parametrize(
    ("kind", "stage", "budget"),
    [
        ("visionzip", {"stage": "vision_block", "layers": [5]}, {"keep_ratio": 0.5}),
        ("prumerge", {"stage": "vision_block", "layers": [5]}, {}),
        ("scope", {"stage": "vision_output"}, {"keep_ratio": 0.5}),
    ],
)
def test_published_reducers_take_the_cls_attention_they_were_written_for(tiny, kind, stage, budget):
    reducer = {"kind": kind, "saliency": "cls_attention", **budget}
    plan = ReductionPlan(steps=[{**stage, "reducer": reducer}])
    tiny.family.check(plan)
    (mm_item,) = tiny.preprocessor.images([picture(60, 150)])
    (encoded,) = tiny.family.encode([mm_item], plan, trace=False)
    assert 0 < len(encoded.feature_KD) < encoded.num_placeholders


# Counts and refusals


@pytest.mark.parametrize("plan", [EMPTY_PLAN, merging(), merging("released")])
def test_expected_counts_are_what_is_measured(tiny, plan):
    exact = 0
    for sizes in ([(60, 60)], [(96, 96)], [(60, 150), (48, 96), (500, 700)]):
        media = tiny.preprocessor.images([picture(*size) for size in sizes])
        expected = expected_counts(
            tiny.shape.geometry,
            plan,
            [VisualShape("image", *size) for size in sizes],
            num_vision_blocks=tiny.shape.num_vision_blocks,
            num_decoder_layers=tiny.shape.num_decoder_layers,
        )
        encoded = tiny.family.encode(media, plan, trace=False)
        assert expected.num_patches == sum(one.num_patches for one in encoded)
        assert expected.num_patches_kept == sum(one.num_patches_kept for one in encoded)
        assert expected.num_vision_tokens == sum(tiny.family.num_vision_tokens(one) for one in media)
        measured = sum(len(one.feature_KD) for one in encoded)
        assert measured == expected.num_vision_tokens_kept if expected.exact else measured < expected.num_vision_tokens
        exact += expected.exact
    assert exact == (3 if plan.layout == "released" or not plan.steps else 2)  # one with padding
    assert tiny.shape.num_vision_blocks == tiny.family.num_vision_blocks == 7


def test_videos_are_refused_in_words(tiny):
    with pytest.raises(PreprocessError, match="llava_next reads images only"):
        tiny.preprocessor.video(np.zeros((2, 48, 48, 3), np.uint8))
    with pytest.raises(PlanError, match="reads images only"):
        expected_counts(
            tiny.shape.geometry,
            EMPTY_PLAN,
            [VisualShape("video", 9, 9, 4)],
            num_vision_blocks=7,
            num_decoder_layers=4,
        )
    with pytest.raises(RequestError, match="another model"):
        tiny.family.encode(
            [VisualInput("image", np.zeros((2, 56, 56, 3), np.uint8), (56, 56))], EMPTY_PLAN, trace=False
        )
