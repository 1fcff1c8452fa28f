"""The LLaVA-OneVision family up to the LLM, without a plan: features equal to stock's; media together as alone."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from illava.families.llava import towers as encoder_blocks
from illava.plan import EMPTY_PLAN
from tests.support.closeness import assert_close
from tests.support.models.onevision_tower import GRID, SIZES, clip, encode_one, picture, plan

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def stock_processor(onevision_folder):
    return LlavaOnevisionImageProcessorPil.from_pretrained(onevision_folder)


@pytest.mark.parametrize("size", SIZES)
def test_an_image_without_a_plan_equals_stock(family, preprocessor, stock, stock_processor, size):
    frame = picture(*size)
    (mm_item,) = preprocessor.images([frame])
    inputs = stock_processor(images=Image.fromarray(frame), return_tensors="pt")
    with torch.no_grad():
        theirs = stock.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs.get("batch_num_images")
        ).pooler_output[0]
    encoded = encode_one(family, mm_item, EMPTY_PLAN)
    assert_close(encoded.feature_KD, theirs)
    assert encoded.feature_KD.shape[0] == encoded.num_placeholders == family.num_vision_tokens(mm_item)
    assert encoded.num_patches == family.num_patches(mm_item) == len(mm_item.tiles) * GRID**2
    assert encoded.placeholder_K.tolist() == list(range(encoded.num_placeholders))


@pytest.mark.parametrize("size", SIZES)
def test_an_image_over_the_budget_equals_stock(tight, size):
    stock, family, preprocessor = tight
    (mm_item,) = preprocessor.images([picture(*size)])
    pixels = torch.from_numpy(mm_item.tiles).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        theirs = stock.get_image_features(((pixels - 0.5) / 0.5)[None], torch.tensor([size])).pooler_output[0]
    encoded = encode_one(family, mm_item, EMPTY_PLAN)
    assert_close(encoded.feature_KD, theirs)
    assert encoded.feature_KD.shape[0] == family.num_vision_tokens(mm_item)


def test_several_images_without_a_plan_equal_stock(family, preprocessor, stock, stock_processor):
    frames = [picture(80, 120, seed=1), picture(56, 56, seed=2), picture(200, 30, seed=3)]
    media = preprocessor.images(frames)
    inputs = stock_processor(images=[[Image.fromarray(frame) for frame in frames]], return_tensors="pt")
    with torch.no_grad():
        theirs = stock.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], batch_num_images=torch.tensor([3])
        ).pooler_output
    for encoded, expected, mm_item in zip(family.encode(media, EMPTY_PLAN, trace=False), theirs, media, strict=True):
        assert_close(encoded.feature_KD, expected)
        assert encoded.frame_counts == ((0, 49), (-1, 1))
        assert encoded.feature_KD.shape[0] == family.num_vision_tokens(mm_item) == 50


@pytest.mark.parametrize("rows", [1024, 100], ids=["frames together", "frames two and one"])
def test_a_video_without_a_plan_equals_stock(family, preprocessor, stock, monkeypatch, rows):
    monkeypatch.setattr(encoder_blocks, "_CPU_ROWS", rows)
    mm_item = preprocessor.video(clip(3))
    pixels = torch.from_numpy(mm_item.tiles).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        theirs = stock.get_video_features(((pixels - 0.5) / 0.5)[None]).pooler_output[0]
    encoded = encode_one(family, mm_item, EMPTY_PLAN)
    # the newline is part of this return value in newer transformers only (5.23: yes, 5.17: no)
    assert_close(encoded.feature_KD[:-1], theirs[: 3 * 16])
    assert torch.equal(encoded.feature_KD[-1], stock.model.image_newline)
    assert encoded.frame_counts == ((0, 16), (1, 16), (2, 16), (-1, 1))
    assert encoded.feature_KD.shape[0] == family.num_vision_tokens(mm_item) == 3 * 16 + 1


@pytest.mark.parametrize("which", [EMPTY_PLAN, plan("geometric"), plan("released")])
def test_media_encoded_together_equal_each_alone(family, preprocessor, which):
    media = [
        *preprocessor.images([picture(60, 150)]),
        preprocessor.video(clip(2)),
        *preprocessor.images([picture(90, 90)]),
    ]
    for encoded, mm_item in zip(family.encode(media, which, trace=False), media, strict=True):
        alone = encode_one(family, mm_item, which)
        assert_close(encoded.feature_KD, alone.feature_KD)
        assert torch.equal(encoded.placeholder_K, alone.placeholder_K)
