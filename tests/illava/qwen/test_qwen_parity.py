"""The Qwen families with an empty plan against stock transformers: logits, greedy text, mixed batches, positions.

Temporal patches are whole seconds apart here: transformers 5.17 drops fractions, 5.23 and we do not.
"""

import numpy as np
import pytest
import torch

from illava import Request, SamplingParams
from illava.plan import EMPTY_PLAN
from illava.prompt import assemble, media_of, pack

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
    media, encoder = media_of(request), vlm.family.encoder
    slots = [vlm.family.num_vision_tokens(medium) for medium in media]
    ids = torch.tensor([vlm.family.render(request.content, slots).token_ids])
    config = encoder_tokens(vlm)
    types = (ids == config["image"]).int() + 2 * (ids == config["video"]).int()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        own = [medium for medium in media if medium.kind == kind]
        if own:
            inputs[pixels] = torch.cat([encoder.patches(medium) for medium in own])
            inputs[grid] = torch.tensor([[g.times, g.rows, g.cols] for g in map(encoder.grid, own)])
    videos = [medium for medium in media if medium.kind == "video"]
    if videos and vlm.family.model_type == "qwen2_5_vl":
        steps_s = [2 * medium.timestamps_s[1] if medium.timestamps_s else 1.0 for medium in videos]
        inputs["second_per_grid_ts"] = torch.tensor(steps_s)
    return inputs


def encoder_tokens(vlm):
    to_id = vlm.family._tokenizer.convert_tokens_to_ids
    return {"image": to_id("<|image_pad|>"), "video": to_id("<|video_pad|>")}


@torch.inference_mode()
def prompts_of(vlm, requests):
    return [
        assemble(vlm.family, request, vlm.family.encode(media_of(request), EMPTY_PLAN, trace=False))
        for request in requests
    ]


@torch.inference_mode()
def prefill_logits(vlm, requests):
    prompts = prompts_of(vlm, requests)
    cache, num_layers = vlm.engine.cache, vlm.family.decoder.num_layers
    for row, prompt in enumerate(prompts):
        cache.admit(row, [prompt.num_tokens] * num_layers)
    pages = cache.batch(range(len(prompts)), [[0] * num_layers] * len(prompts))
    logits = vlm.family.decoder.prefill(pack(prompts), EMPTY_PLAN, cache, pages, seeds=[0] * len(prompts)).logits_BV
    for row in range(len(prompts)):
        cache.free(row)
    return logits


def test_first_logits_equal_stock_one_by_one_and_in_a_mixed_batch(vlm, stock, requests):
    together = prefill_logits(vlm, list(requests.values()))
    for row, request in enumerate(requests.values()):
        with torch.inference_mode():
            expected = stock(**stock_inputs(vlm, request)).logits[0, -1]
        torch.testing.assert_close(prefill_logits(vlm, [request])[0], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(together[row], expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_greedy_text_equals_generate_alone_and_in_a_mixed_batch(vlm, stock, requests):
    together = vlm.generate(list(requests.values()))
    for generation, request in zip(together, requests.values(), strict=True):
        stock.model.rope_deltas = None  # transformers keeps them from the call before
        inputs = stock_inputs(vlm, request)
        out = stock.generate(
            **inputs, max_new_tokens=NUM_NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        best_two = torch.cat(out.logits).topk(2, -1).values
        assert (best_two[:, 0] - best_two[:, 1]).min() > 1e-3, "this fixture has a near-tie: choose another"
        tokens = tuple(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        assert generation.error is None
        assert generation.token_ids == tokens, request.request_id
        assert vlm.generate([request])[0].token_ids == tokens


def test_positions_equal_stock_for_every_slot_and_the_next_token(vlm, stock, requests):
    for request, prompt in zip(requests.values(), prompts_of(vlm, requests.values()), strict=True):
        inputs = stock_inputs(vlm, request)
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
