"""The whole model with an empty plan against stock transformers: logits, greedy text, mixed batches."""

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.plan import EMPTY_PLAN
from tests.support.closeness import assert_close
from tests.support.models.stock_parity import prefill, prompt_of, stock_tokens

pytestmark = pytest.mark.numeric

NUM_NEW = 12


@pytest.fixture(scope="module")
def vlm(onevision_folder):
    return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)


@pytest.fixture(scope="module")
def stock(onevision_folder):
    return LlavaOnevisionForConditionalGeneration.from_pretrained(onevision_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def requests(onevision_folder):
    pre = load_preprocessor(str(onevision_folder))
    rng = np.random.default_rng(2)

    def picture(height, width):
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    sampling = SamplingParams(max_new_tokens=NUM_NEW)
    content = {
        "image": (*pre.images([picture(70, 150)]), "What is this?"),
        "tall image": ("Look:", *pre.images([picture(200, 60)]), "Colour?"),
        "images": (*pre.images([picture(50, 60), picture(90, 40), picture(64, 64)]), "Compare them."),
        "video": (pre.video([picture(48, 64) for _ in range(5)]), "What happens?"),
        "short video": (pre.video([picture(30, 64) for _ in range(2)]), "And here, in a longer question?"),
    }
    return {name: Request(name, parts, sampling) for name, parts in content.items()}


def stock_inputs(vlm, request):
    """What `LlavaOnevisionForConditionalGeneration` takes for this request."""
    media = request.media
    encoded = vlm.family.encode(media, EMPTY_PLAN, trace=False)
    token_ids = vlm.family.render(request.content, [mm_item.num_placeholders for mm_item in encoded]).token_ids
    inputs = {"input_ids": torch.tensor([token_ids]), "attention_mask": torch.ones(1, len(token_ids), dtype=torch.long)}
    pixels = [vlm.family.encoder.pixels([mm_item]) for mm_item in media]
    if media[0].kind == "video":
        return inputs | {"pixel_values_videos": pixels[0][None]}
    inputs["image_sizes"] = torch.tensor([mm_item.original_size for mm_item in media])
    inputs["batch_num_images"] = torch.tensor([len(media)])
    return inputs | {"pixel_values": torch.stack(pixels)}


@torch.inference_mode()
def stock_logits(vlm, stock, request):
    return stock(**stock_inputs(vlm, request)).logits[0, -1]


def test_first_logits_equal_stock_one_by_one_and_in_a_mixed_batch(vlm, stock, requests):
    prompts = [prompt_of(vlm, request, EMPTY_PLAN) for request in requests.values()]
    together = prefill(vlm, prompts, EMPTY_PLAN).logits_BV
    for row, request in enumerate(requests.values()):
        expected = stock_logits(vlm, stock, request)
        alone = prefill(vlm, [prompts[row]], EMPTY_PLAN).logits_BV[0]
        assert_close(alone, expected)
        assert_close(together[row], expected)


def test_greedy_text_equals_generate_alone_and_in_a_mixed_batch(vlm, stock, requests):
    together = vlm.generate(list(requests.values()))
    for generation, request in zip(together, requests.values(), strict=True):
        tokens = stock_tokens(stock, stock_inputs(vlm, request), NUM_NEW)
        assert generation.request_id == request.request_id
        assert generation.token_ids == tokens
        assert vlm.generate([request])[0].token_ids == tokens


def test_counts_are_those_of_the_prompt(vlm, requests):
    for generation, request in zip(vlm.generate(list(requests.values())), requests.values(), strict=True):
        usage = generation.usage
        inputs = stock_inputs(vlm, request)
        token = f"<{request.media[0].kind}>"
        num_visual = (inputs["input_ids"] == vlm.family._tokenizer.convert_tokens_to_ids(token)).sum().item()
        assert usage.num_vision_tokens == usage.num_vision_tokens_kept == usage.num_decoder_tokens_kept == num_visual
        assert usage.num_prompt_tokens == inputs["input_ids"].shape[1]
        assert usage.num_generated_tokens == len(generation.token_ids)
