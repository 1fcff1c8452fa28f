"""LLaVA-NeXT as a whole: stock's logits and greedy text, mixed batches, decoders; cached decode, text, positions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlavaNextForConditionalGeneration

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.engine.prompt import assemble
from illava.families.model_shape import load_model_shape
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.token_counts import VisualShape, expected_counts
from tests.support.closeness import assert_close
from tests.support.models.llava_next import IN_ORDER, MISTRAL, VICUNA, make_llava_next
from tests.support.models.stock_parity import longer, prefill, prompt_of, stock_tokens

pytestmark = pytest.mark.numeric

NUM_NEW = 8
# 36 patches a tile -> 24; before layer 2, 70 % of the prompt's visual tokens, scored among themselves
PLAN = ReductionPlan.model_validate(
    {
        "steps": [
            {"stage": "vision_block", "layers": [1, 2, 4], "reducer": {"kind": "illava", "num_merged": 4}},
            {
                "stage": "decoder_layer",
                "layers": [2],
                "reducer": {"kind": "illava", "keep_ratio": 0.7, "score": "paper", "per": "prompt"},
            },
        ]
    }
)


@pytest.fixture(
    scope="module", params=[("llama", IN_ORDER), ("mistral", MISTRAL), ("qwen2", VICUNA)], ids=lambda p: p[0]
)
def tiny(request, tmp_path_factory):
    decoder, template = request.param
    folder = make_llava_next(tmp_path_factory.mktemp(decoder), decoder=decoder, template=template)
    return SimpleNamespace(
        decoder=decoder,
        vlm=VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20),
        stock=LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(),
        shape=load_model_shape(str(folder)),
        requests=requests(load_preprocessor(str(folder))),
    )


def requests(preprocessor) -> list[Request]:
    rng = np.random.default_rng(2)

    def picture(height, width):
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    (wide,), (tall,) = preprocessor.images([picture(70, 150)]), preprocessor.images([picture(200, 60)])
    first, second, third = preprocessor.images([picture(50, 60), picture(90, 40), picture(64, 64)])
    content = {
        "image": (wide, "What is this?"),
        "text first": ("Look:", tall, "Colour?"),
        "several": ("First ", first, " then ", second, " and ", third, "Compare them."),
        "side by side": (first, second, "Same?"),
    }
    sampling = SamplingParams(max_new_tokens=NUM_NEW)
    return [Request(name, parts, sampling) for name, parts in content.items()]


def stock_inputs(vlm, request):
    """What `LlavaNextForConditionalGeneration` takes for this request; missing tiles are black, as in stock."""
    media = request.media
    encoded = vlm.family.encode(media, EMPTY_PLAN, trace=False)
    token_ids = vlm.family.render(request.content, [mm_item.num_placeholders for mm_item in encoded]).token_ids
    pixels = [vlm.family.encoder.pixels([mm_item]) for mm_item in media]
    most = max(map(len, pixels))
    pixels = [torch.cat([tiles, tiles.new_zeros(most - len(tiles), *tiles.shape[1:])]) for tiles in pixels]
    return {
        "input_ids": torch.tensor([token_ids]),
        "attention_mask": torch.ones(1, len(token_ids), dtype=torch.long),
        "pixel_values": torch.stack(pixels),
        "image_sizes": torch.tensor([mm_item.original_size for mm_item in media]),
    }


@torch.inference_mode()
def test_logits_and_greedy_text_equal_stock_alone_and_in_a_mixed_batch(tiny):
    vlm, stock = tiny.vlm, tiny.stock
    prompts = [prompt_of(vlm, request, EMPTY_PLAN) for request in tiny.requests]
    together = prefill(vlm, prompts, EMPTY_PLAN).logits_BV
    answers = vlm.generate(tiny.requests)
    for row, request in enumerate(tiny.requests):
        inputs = stock_inputs(vlm, request)
        expected = stock(**inputs).logits[0, -1]
        assert_close(prefill(vlm, [prompts[row]], EMPTY_PLAN).logits_BV[0], expected)
        assert_close(together[row], expected)
        tokens = stock_tokens(stock, inputs, NUM_NEW)
        assert answers[row].token_ids == tokens
        assert vlm.generate([request])[0].token_ids == tokens


@torch.inference_mode()
def test_under_a_plan_a_batch_equals_its_items_alone_and_counts_hold(tiny):
    vlm = tiny.vlm
    prompts = [prompt_of(vlm, request, PLAN) for request in tiny.requests]
    together, answers = prefill(vlm, prompts, PLAN).logits_BV, vlm.generate(tiny.requests, plan=PLAN)
    for row, request in enumerate(tiny.requests):
        assert_close(together[row], prefill(vlm, [prompts[row]], PLAN).logits_BV[0])
        (alone,) = vlm.generate([request], plan=PLAN)
        assert answers[row].token_ids == alone.token_ids
        assert answers[row].usage == alone.usage
        expected = expected_counts(
            tiny.shape.geometry,
            PLAN,
            [VisualShape("image", *mm_item.original_size) for mm_item in request.media],
            num_vision_blocks=tiny.shape.num_vision_blocks,
            num_decoder_layers=tiny.shape.num_decoder_layers,
        )
        usage = alone.usage
        assert (usage.num_patches, usage.num_vision_tokens) == (expected.num_patches, expected.num_vision_tokens)
        assert usage.num_vision_tokens_kept <= expected.num_vision_tokens_kept < usage.num_vision_tokens
        assert usage.num_decoder_tokens_kept == round(0.7 * usage.num_vision_tokens_kept)


@torch.inference_mode()
def test_cached_decode_equals_a_prefill_of_everything_so_far(tiny):
    """The paper's score looks at visual tokens alone, so text behind them does not change what is merged."""
    vlm = tiny.vlm
    for request, answer in zip(tiny.requests, vlm.generate(tiny.requests, plan=PLAN), strict=True):
        prompt = prompt_of(vlm, request, PLAN)
        assert len(answer.token_ids) > 1
        for token in answer.token_ids:
            assert int(prefill(vlm, [prompt], PLAN).logits_BV[0].argmax()) == token
            prompt = longer(vlm, prompt, token)


@torch.inference_mode()
def test_text_between_images_survives_in_order_and_nothing_moves(tiny):
    vlm, request = tiny.vlm, tiny.requests[2]
    encoded = vlm.family.encode(request.media, PLAN, trace=False)
    rendered = vlm.family.render(request.content, [mm_item.num_placeholders for mm_item in encoded])
    prompt = assemble(vlm.family, request, encoded)
    expected, is_visual = [], [False] * len(rendered.token_ids)
    for mm_item, (start, length) in zip(encoded, rendered.spans, strict=True):
        expected += [start + slot for slot in mm_item.placeholder_K.tolist()]
        is_visual[start : start + length] = [True] * length
    text = [n for n, visual in enumerate(is_visual) if not visual]
    assert prompt.position_PT[0].tolist() == sorted(expected + text)
    words_TD = vlm.family.embed(torch.tensor([rendered.token_ids[n] for n in text]))
    assert torch.equal(prompt.hidden_TD[prompt.coord_T4[:, 0] < 0], words_TD)
    assert [span.mm_index for span in prompt.token_spans] == [-1, 0, -1, 1, -1, 2, -1]
    # of the three templates only the first keeps the order given; the others put all images first, a line each
    assert (
        vlm.family.decode_text([rendered.token_ids[n] for n in text])
        == {
            "llama": "user\nFirst  then  and Compare them.assistant\n",
            "mistral": "[INST] \n\n\nFirst  then  and Compare them. [/INST]",
            "qwen2": "USER: \n\n\nFirst   then   and  Compare them. ASSISTANT:",
        }[tiny.decoder]
    )
