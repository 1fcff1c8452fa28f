"""The Qwen families with an empty plan against stock transformers: logits, greedy text, mixed batches, positions.

Temporal patches are whole seconds apart here: transformers 5.17 drops fractions, 5.23 and we do not.
"""

import numpy as np
import pytest
import torch

from illava import Request, SamplingParams
from illava.plan import EMPTY_PLAN
from tests.support.closeness import assert_close
from tests.support.models.stock_parity import prefill, prompt_of, stock_tokens

pytestmark = pytest.mark.numeric

NUM_NEW = 8


@pytest.fixture(scope="module")
def requests(pre):
    rng = np.random.default_rng(4)

    def picture(height, width):
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    def video(count, height, width, seconds_per_frame=None):
        times_s = [seconds_per_frame * n for n in range(count)] if seconds_per_frame else ()
        return pre.video([picture(height, width) for _ in range(count)], timestamps_s=times_s)

    sampling = SamplingParams(max_new_tokens=NUM_NEW)
    first, second, third = pre.images([picture(40, 66), picture(90, 30), picture(24, 24)])
    content = {
        "image": (first, "What?"),
        "images with text between": ("A:", first, "then B:", second, third, "Compare."),
        "video": ("See", video(8, 24, 40, 1.5), "what happens?"),
        "long video": (video(19, 16, 16), "?"),
        "image and video": (third, "is in", video(3, 40, 24, 2.0), "?"),
        "text": ("Only words.",),
    }
    return {name: Request(name, parts, sampling) for name, parts in content.items()}


def stock_inputs(vlm, request):
    """What stock transformers takes for this request."""
    media, encoder = request.media, vlm.family.encoder
    slots = [vlm.family.num_vision_tokens(mm_item) for mm_item in media]
    ids = torch.tensor([vlm.family.render(request.content, slots).token_ids])
    config = encoder_tokens(vlm)
    types = (ids == config["image"]).int() + 2 * (ids == config["video"]).int()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        own = [mm_item for mm_item in media if mm_item.kind == kind]
        if own:
            inputs[pixels] = torch.cat([encoder.patches(mm_item) for mm_item in own])
            inputs[grid] = torch.tensor([[g.times, g.rows, g.cols] for g in map(encoder.grid, own)])
    videos = [mm_item for mm_item in media if mm_item.kind == "video"]
    if videos and vlm.family.model_type == "qwen2_5_vl":
        steps_s = [2 * mm_item.timestamps_s[1] if mm_item.timestamps_s else 1.0 for mm_item in videos]
        inputs["second_per_grid_ts"] = torch.tensor(steps_s)
    return inputs


def encoder_tokens(vlm):
    to_id = vlm.family._tokenizer.convert_tokens_to_ids
    return {"image": to_id("<|image_pad|>"), "video": to_id("<|video_pad|>")}


def test_first_logits_equal_stock_one_by_one_and_in_a_mixed_batch(vlm, stock, requests):
    prompts = [prompt_of(vlm, request, EMPTY_PLAN) for request in requests.values()]
    together = prefill(vlm, prompts, EMPTY_PLAN).logits_BV
    for row, request in enumerate(requests.values()):
        with torch.inference_mode():
            expected = stock(**stock_inputs(vlm, request)).logits[0, -1]
        alone = prefill(vlm, [prompts[row]], EMPTY_PLAN).logits_BV[0]
        assert_close(alone, expected)
        assert_close(together[row], expected)


@torch.inference_mode()
def test_greedy_text_equals_generate_alone_and_in_a_mixed_batch(vlm, stock, requests):
    together = vlm.generate(list(requests.values()))
    for generation, request in zip(together, requests.values(), strict=True):
        stock.model.rope_deltas = None  # transformers keeps them from the call before
        tokens = stock_tokens(stock, stock_inputs(vlm, request), NUM_NEW)
        assert generation.error is None
        assert generation.token_ids == tokens, request.request_id
        assert vlm.generate([request])[0].token_ids == tokens


def test_positions_equal_stock_for_every_slot_and_the_next_token(vlm, stock, requests):
    for request in requests.values():
        inputs, prompt = stock_inputs(vlm, request), prompt_of(vlm, request, EMPTY_PLAN)
        if len(inputs) == 3:
            continue
        inputs = {k: v for k, v in inputs.items() if "pixel" not in k}
        theirs, _ = stock.model.get_rope_index(**inputs)
        assert torch.equal(prompt.position_PT, theirs[:, 0])
        assert prompt.next_position_P.tolist() == (theirs[:, 0, -1] + 1).tolist()  # as `generate` goes on


def test_counts_are_those_of_the_prompt(vlm, requests):
    tokens = encoder_tokens(vlm)
    for generation, request in zip(vlm.generate(list(requests.values())), requests.values(), strict=True):
        usage, ids = generation.usage, stock_inputs(vlm, request)["input_ids"]
        num_visual = int(torch.isin(ids, torch.tensor(list(tokens.values()))).sum())
        assert usage.num_vision_tokens == usage.num_vision_tokens_kept == usage.num_decoder_tokens_kept == num_visual
        assert usage.num_patches == 4 * num_visual
        assert usage.num_prompt_tokens == ids.shape[1]
