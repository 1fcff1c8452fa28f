"""Log-size bias through whole models of every family: what sizes count, and that batching, caching, chunks and sharing
change nothing with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.decoder.prefill import PrefillRun
from illava.engine.config import EngineConfig
from illava.engine.engine import Engine
from illava.engine.prompt import assemble, pack
from illava.plan import EMPTY_PLAN
from tests.support.closeness import assert_close
from tests.support.models.cells import family_params
from tests.support.models.families import make_folder

pytestmark = pytest.mark.numeric

IN_MAKE_TEST = {"llava_onevision", "qwen2_5_vl"}  # tiled; native resolution with windows
FAMILIES = family_params(in_make_test=IN_MAKE_TEST)
ANSWER = SamplingParams(max_new_tokens=3, min_new_tokens=3)
DECODER = [True, pytest.param(False, marks=pytest.mark.long)]


def plan_of(vlm, *, size_bias=True, decoder=False):
    blocks = getattr(vlm.family.tower, "full_blocks", range(1, vlm.family.num_vision_blocks))
    ward = {"kind": "ward", "keep_ratio": 0.4, "contrast": 1}
    steps = [{"stage": "vision_block", "layers": [next(iter(blocks))], "reducer": ward}]
    if decoder:
        steps.append({"stage": "decoder_input", "reducer": {**ward, "keep_ratio": 0.6}})
    return ReductionPlan.model_validate({"size_bias": size_bias, "steps": steps})


@dataclass
class Tiny:
    vlm: VLM
    requests: list[Request]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory) -> Tiny:
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    vlm, preprocessor = VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), load_preprocessor(folder)
    rng = np.random.default_rng(10)

    def picture(*size):
        return rng.integers(0, 256, (*size, 3), dtype=np.uint8)

    alone, first, second = (preprocessor.images([picture(*size)])[0] for size in ((64, 48), (40, 56), (56, 40)))
    parts = [(alone, "What?"), ("A:", first, "then B:", second, "Compare."), ("Hello there",)]
    if "video" in vlm.family.media_kinds:
        parts.append(("See", preprocessor.video([picture(40, 40) for _ in range(4)]), "what happens?"))
    return Tiny(vlm, [Request(str(n), content, ANSWER) for n, content in enumerate(parts)])


@torch.inference_mode()
def prompt_of(vlm, request, plan):
    media = vlm.family.encode(request.media, plan, trace=False) if request.media else []
    return assemble(vlm.family, request, media)


def test_sizes_say_how_many_tokens_of_the_unreduced_model_each_one_stands_for(tiny):
    for request in tiny.requests[:2]:
        plan, whole = plan_of(tiny.vlm), prompt_of(tiny.vlm, request, EMPTY_PLAN)
        prompt = prompt_of(tiny.vlm, request, plan)
        is_visual_T = prompt.coord_T4[:, 0] >= 0
        assert (prompt.size_T[~is_visual_T] == 1).all()
        assert prompt.size_T.min() == 1
        assert prompt.size_T.max() > 2
        assert prompt.num_tokens < whole.num_tokens
        # A tile's blank border reads as patches, not as tokens: what is merged into a patch of it stands for none.
        missing = whole.num_tokens - prompt.size_T.sum().item()
        assert 0 <= missing <= (0 if tiny.vlm.family.model_type.startswith("qwen") else 0.2 * whole.num_tokens)
        assert prompt_of(tiny.vlm, request, plan_of(tiny.vlm, size_bias=False)).size_T is None


def prefilled(vlm, prompts, plan, *, max_tokens=None, num_new=8):
    """Logits behind prompts of a batch, by one call or in chunks; and the batch's cache."""
    decoder, cache = vlm.family.decoder, vlm.engine.cache
    for row, prompt in enumerate(prompts):
        cache.admit(row, [prompt.num_tokens + num_new] * decoder.num_layers)
    blocks = cache.batch(range(len(prompts)), [[0] * decoder.num_layers] * len(prompts))
    run, done = PrefillRun(decoder, pack(prompts), plan, cache, blocks, seeds=[0] * len(prompts)), None
    while done is None:
        done = run.advance(max_tokens)
    return done, cache


def free(cache, count):
    for row in range(count):
        cache.free(row)


@torch.inference_mode()
def test_cached_is_recomputed_and_chunked_is_whole(tiny):
    vlm, plan = tiny.vlm, plan_of(tiny.vlm)
    prompts = [prompt_of(vlm, request, plan) for request in tiny.requests]
    whole, cache = prefilled(vlm, prompts, plan)
    lengths = [[layer[row] for layer in whole.lengths_LB] for row in range(len(prompts))]
    num_biased = [
        [0 if prompt.size_T is None else n for n in own] for prompt, own in zip(prompts, lengths, strict=True)
    ]
    blocks = cache.batch(range(len(prompts)), lengths, num_biased)
    position_PB = torch.stack([prompt.next_position_P for prompt in prompts], 1)
    token_B = torch.arange(len(prompts)) + 3
    decoded = vlm.family.decoder.decode(vlm.family.embed(token_B), position_PB, cache, blocks)
    free(cache, len(prompts))
    grown = [replace_end(vlm, prompt, token_id) for prompt, token_id in zip(prompts, token_B, strict=True)]
    recomputed, _ = prefilled(vlm, grown, plan)
    free(cache, len(prompts))
    assert_close(decoded, recomputed.logits_BV)
    chunked, _ = prefilled(vlm, prompts, plan, max_tokens=7)
    free(cache, len(prompts))
    assert_close(chunked.logits_BV, whole.logits_BV)
    plain, _ = prefilled(vlm, prompts, EMPTY_PLAN)
    free(cache, len(prompts))
    differs_B = (plain.logits_BV - whole.logits_BV).abs().amax(1) > 1e-4
    sized_B = [prompt.size_T is not None and bool((prompt.size_T > 1).any()) for prompt in prompts]
    assert differs_B.tolist() == sized_B
    assert sized_B[:3] == [True, True, False]


def replace_end(vlm, prompt, token_id):
    """The prompt with one more text token."""
    last = prompt.token_spans[-1]
    assert last.mm_index < 0
    return replace(
        prompt,
        hidden_TD=torch.cat([prompt.hidden_TD, vlm.family.embed(token_id[None])]),
        position_PT=torch.cat([prompt.position_PT, prompt.next_position_P[:, None]], 1),
        coord_T4=torch.cat([prompt.coord_T4, torch.full((1, 4), -1)]),
        score_T=None,
        token_spans=(*prompt.token_spans[:-1], replace(last, length=last.length + 1)),
        deepstack=tuple(torch.nn.functional.pad(layer_TD, (0, 0, 0, 1)) for layer_TD in prompt.deepstack),
        size_T=None if prompt.size_T is None else torch.nn.functional.pad(prompt.size_T, (0, 1), value=1.0),
    )


@pytest.mark.parametrize("decoder", DECODER)
def test_a_batch_equals_its_requests_alone_also_beside_a_plan_without_the_bias(tiny, decoder):
    """All of them decode in one batch; the bits of a request without biases are those it has alone."""
    vlm, plan = tiny.vlm, plan_of(tiny.vlm, decoder=decoder)
    plain = plan_of(vlm, size_bias=False, decoder=decoder)
    requests = tiny.requests if not decoder else [request for request in tiny.requests if request.media]
    alone = {which: [vlm.generate([own], plan=which)[0] for own in requests] for which in (plan, plain)}
    together = vlm.generate(requests, plan=plan)
    assert [g.error for g in together] == [None] * len(requests)
    assert [g.token_ids for g in together] == [g.token_ids for g in alone[plan]]
    for which, name in ((plan, "biased"), (plain, "plain")):
        for request in requests:
            vlm.submit(replace(request, request_id=f"{name} {request.request_id}"), plan=which)
    done = {}
    while vlm.has_work:
        done |= {generation.request_id: generation.token_ids for generation in vlm.step()}
    for which, name in ((plan, "biased"), (plain, "plain")):
        assert [done[f"{name} {own.request_id}"] for own in requests] == [g.token_ids for g in alone[which]]


@pytest.mark.parametrize("decoder", DECODER)
def test_questions_on_one_medium_share_a_biased_prefix_and_long_prompts_go_in_by_chunks(tiny, decoder, monkeypatch):
    vlm, plan = tiny.vlm, plan_of(tiny.vlm, decoder=decoder)
    mm_item = tiny.requests[0].media[0]
    questions = ("What?", "What happens here, and why?", "Where is it?")
    requests = [Request(str(n), (mm_item, question), ANSWER) for n, question in enumerate(questions)]
    alone = [vlm.generate([request], plan=plan)[0].token_ids for request in requests]
    projected, project = [], vlm.family.decoder.project
    monkeypatch.setattr(
        vlm.family.decoder,
        "project",
        lambda layer, hidden, rotary, **into: projected.append(len(hidden)) or project(layer, hidden, rotary, **into),
    )
    shared = vlm.generate(requests, plan=plan)
    assert [g.token_ids for g in shared] == alone
    computed, kept = sum(projected), shared[0].usage.num_vision_tokens_kept
    projected.clear()
    for request in requests:
        vlm.generate([request], plan=plan)
    assert computed < sum(projected) - kept  # the visual tokens of two questions, in some layers at least
    engine = Engine(vlm.family, vlm.engine.cache, EngineConfig(max_chunk_tokens=16))
    engine.submit(replace(tiny.requests[2], sampling=SamplingParams(max_new_tokens=12, min_new_tokens=12)), plan)
    engine.step()
    for request in requests:
        engine.submit(replace(request, request_id=f"chunked {request.request_id}"), plan)
    done = {}
    while engine.has_work:
        done |= {generation.request_id: generation.token_ids for generation in engine.step()}
    assert [done[f"chunked {request.request_id}"] for request in requests] == alone
    vlm.engine.cache.check()
