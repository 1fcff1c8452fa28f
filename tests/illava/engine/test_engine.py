"""Continuous batching with the tiny real model: composition never changes answers, errors stay with their request."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.decoder.prefill import PrefillRun
from illava.engine.config import EngineConfig
from illava.engine.engine import Engine
from illava.errors import (
    CacheTooSmallError,
    NumericalError,
    PlanError,
    ReductionDidNotFireError,
    RequestError,
)
from illava.plan import EMPTY_PLAN

pytestmark = pytest.mark.numeric

SHORT = SamplingParams(max_new_tokens=6, min_new_tokens=6)


def plan_of(*steps, layout="geometric"):
    return ReductionPlan.model_validate({"layout": layout, "steps": list(steps)})


VISION = {"stage": "vision_block", "layers": [2, 3, 4, 5], "reducer": {"kind": "illava", "num_merged": 6}}
DECODER = {"stage": "decoder_layer", "layers": [2], "reducer": {"kind": "illava", "keep_ratio": 0.5, "per": "prompt"}}
FRAMES = {"stage": "decoder_input", "reducer": {"kind": "illava", "keep_per_frame": 10}}
RELEASED = {**DECODER, "reducer": {**DECODER["reducer"], "score": "released"}}
FULL_PLAN = plan_of(VISION, FRAMES, RELEASED)
IMAGE_PLAN = plan_of(VISION, DECODER)


@pytest.fixture(scope="module")
def vlm(onevision_folder):
    return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)


@pytest.fixture(scope="module")
def media(onevision_folder):
    pre = load_preprocessor(str(onevision_folder))
    rng = np.random.default_rng(11)

    def picture(height=48, width=64):
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    return {
        "video": pre.video([picture() for _ in range(4)]),
        "long video": pre.video([picture() for _ in range(7)]),
        "image": pre.images([picture(70, 150)])[0],
        "pair": pre.images([picture(), picture(60, 40)]),
    }


@pytest.fixture(scope="module")
def requests(media):
    return [
        Request("a", (media["video"], "What happens?"), SHORT),
        Request("b", (media["image"], "What is it?"), SamplingParams(max_new_tokens=3, min_new_tokens=3)),
        Request("c", (*media["pair"], "Compare."), SamplingParams(max_new_tokens=9, min_new_tokens=9)),
        Request("d", (media["long video"], "Then", media["image"], "and?"), SHORT),
        Request("e", ("No picture at all.",), SHORT),
    ]


def tokens_of(generations):
    assert [g.error for g in generations] == [None] * len(generations)
    return {g.request_id: g.token_ids for g in generations}


def drain(engine):
    generations = []
    while engine.has_work:
        generations += engine.step()
    return generations


def only(vlm, request, plan):
    (generation,) = vlm.generate([request], plan=plan)
    return generation


@pytest.mark.parametrize("plan", [EMPTY_PLAN, IMAGE_PLAN, plan_of(VISION, RELEASED, layout="released")])
def test_a_batchs_rows_equal_each_item_alone(vlm, requests, plan):
    together = tokens_of(vlm.generate(requests, plan=plan))
    assert together == {r.request_id: only(vlm, r, plan).token_ids for r in requests}


def test_plans_mix_in_one_running_batch(vlm, requests, media):
    plans = {"a": FULL_PLAN, "b": IMAGE_PLAN, "c": EMPTY_PLAN, "d": IMAGE_PLAN, "e": EMPTY_PLAN}
    for request in requests:
        vlm.submit(request, plan=plans[request.request_id])
    most, generations = 0, []
    while vlm.has_work:
        generations += vlm.step()
        most = max(most, len(vlm.engine._running))
    assert most >= 3
    assert tokens_of(generations) == {r.request_id: only(vlm, r, plans[r.request_id]).token_ids for r in requests}


def test_requests_join_and_leave_a_running_batch(vlm, requests):
    alone = {r.request_id: only(vlm, r, IMAGE_PLAN).token_ids for r in requests}
    generations, waiting, sizes = [], list(requests), []
    while waiting or vlm.has_work:
        if waiting:
            vlm.submit(waiting.pop(), plan=IMAGE_PLAN)
        generations += vlm.step()
        sizes.append(len(vlm.engine._running))
    assert tokens_of(generations) == alone
    assert max(sizes) >= 3
    assert [g.request_id for g in generations] != sorted(alone, reverse=True)  # b left before what came earlier


def test_blocks_are_taken_per_layer_and_all_given_back(vlm, requests):
    cache, num_new = vlm.engine.cache, SHORT.max_new_tokens
    vlm.submit(requests[0], plan=FULL_PLAN)
    vlm.step()
    usage_text = vlm.engine._running[0]
    full, reduced = usage_text.lengths[0], usage_text.lengths[-1]
    assert usage_text.lengths == [full, full, reduced, reduced]
    assert full > reduced
    expected = sum(-(-(n + num_new) // cache.block_size) for n in usage_text.lengths)
    assert cache.num_free_blocks == cache.num_blocks - expected
    cache.check()
    drain(vlm)
    assert cache.num_free_blocks == cache.num_blocks
    cache.check()


def test_a_full_pool_makes_requests_wait_and_an_impossible_one_fail(onevision_folder, vlm, requests):
    block_bytes = 2 * 16 * 2 * 8 * 4
    small = VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=60 * block_bytes)
    done = {g.request_id: g for g in small.generate(requests, errors="return")}
    for request in requests:
        if request.request_id in "bd":
            assert isinstance(done[request.request_id].error, CacheTooSmallError)
            assert "the whole pool has 60" in str(done[request.request_id].error)
        else:
            assert done[request.request_id].token_ids == only(vlm, request, EMPTY_PLAN).token_ids
    small.engine.cache.check()
    assert small.engine.cache.num_free_blocks == 60


def test_budgets_split_groups_without_changing_answers(vlm, requests):
    limits = EngineConfig(max_batch_requests=2, max_vision_patches=60, max_prefill_tokens=50)
    engine = Engine(vlm.family, vlm.engine.cache, limits)
    for request in requests:
        engine.submit(request, IMAGE_PLAN)
    generations = []
    while engine.has_work:
        generations += engine.step()
        assert len(engine._running) + len(engine._encoded) <= 2
    assert tokens_of(generations) == tokens_of(vlm.generate(requests, plan=IMAGE_PLAN))


def test_random_draws_do_not_depend_on_the_batch(vlm, requests):
    hot = [
        replace(r, sampling=SamplingParams(8, temperature=0.9 + n / 5, top_p=0.95, seed=10 + n, min_new_tokens=8))
        for n, r in enumerate(requests)
    ]
    alone = {r.request_id: only(vlm, r, EMPTY_PLAN).token_ids for r in hot}
    assert tokens_of(vlm.generate(hot)) == alone
    assert tokens_of(vlm.generate(hot[::-1])) == alone
    other_seed = replace(hot[0], sampling=replace(hot[0].sampling, seed=77))
    assert only(vlm, other_seed, EMPTY_PLAN).token_ids != alone["a"]
    other_id = replace(hot[0], request_id="z")
    assert only(vlm, other_id, EMPTY_PLAN).token_ids != alone["a"]


def test_a_plan_that_did_not_fire_fails_that_request_alone(vlm, requests):
    plan = plan_of({"stage": "decoder_layer", "layers": [1], "reducer": {"kind": "illava", "keep_per_frame": 9}})
    done = {g.request_id: g for g in vlm.generate(requests, plan=plan, errors="return")}
    assert isinstance(done["b"].error, ReductionDidNotFireError)  # a tiled image is no frame
    assert "removed none of" in str(done["b"].error)
    assert done["b"].finish_reason is None
    for name in "acde":
        assert done[name].error is None
    assert done["a"].token_ids == only(vlm, requests[0], plan).token_ids
    vlm.engine.cache.check()
    assert vlm.engine.cache.num_free_blocks == vlm.engine.cache.num_blocks


def test_logits_that_are_not_finite_fail_that_request_alone(vlm, requests, monkeypatch):
    expected = tokens_of(vlm.generate(requests))
    stock_decode = vlm.family.decoder.decode
    broken_row = [r.request_id for r in requests].index("c")

    def decode(hidden_BD, *rest):
        logits_BV = stock_decode(hidden_BD, *rest)
        ids = [state.request_id for state in vlm.engine._running]
        if len(vlm.engine._running[0].token_ids) == 2 and "c" in ids:
            logits_BV[ids.index("c"), 3] = float("nan")
        return logits_BV

    monkeypatch.setattr(vlm.family.decoder, "decode", decode)
    done = vlm.generate(requests, errors="return")
    assert isinstance(done[broken_row].error, NumericalError)
    assert "'c'" in str(done[broken_row].error)
    assert len(done[broken_row].token_ids) == 2
    for generation in done[:broken_row] + done[broken_row + 1 :]:
        assert generation.token_ids == expected[generation.request_id]
    vlm.engine.cache.check()


def test_a_medium_of_another_model_fails_its_request_alone(vlm, requests, media):
    wrong = replace(media["video"], tiles=np.zeros((4, 20, 20, 3), np.uint8))
    done = vlm.generate([requests[0], Request("wrong", (wrong, "?"), SHORT), requests[2]], errors="return")
    assert isinstance(done[1].error, RequestError)
    assert done[1].usage is None
    assert done[0].token_ids == only(vlm, requests[0], EMPTY_PLAN).token_ids
    assert done[2].error is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("x", ()), "empty"),
        (Request("x", ("  ",)), "empty"),
        (Request("x", ("hi",), SamplingParams(top_p=2.0)), "top_p"),
        (Request("x", ("hi",), SamplingParams(max_new_tokens=40_000)), "32768 positions"),
    ],
)
def test_requests_that_cannot_be_answered_carry_their_error(vlm, requests, request_, message):
    good, bad = vlm.generate([requests[4], request_], errors="return")
    assert good.error is None
    assert isinstance(bad.error, RequestError)
    assert message in str(bad.error)


def test_a_request_that_fails_raises_unless_it_is_asked_to_carry_its_error(vlm, requests, media, monkeypatch):
    bad = Request("bad", ("hi",), SamplingParams(top_p=2.0))
    encoded = []
    encode = vlm.family.encode
    monkeypatch.setattr(vlm.family, "encode", lambda *given, **more: (encoded.append(1), encode(*given, **more))[1])
    with pytest.raises(RequestError, match="top_p") as refused:
        vlm.generate([requests[0], bad, requests[1]])
    assert "raised by request 'bad'; with errors='return'" in refused.value.__notes__[0]
    assert (encoded, vlm.has_work) == ([], False), "what cannot be answered is told before anything is computed"
    with pytest.raises(ReductionDidNotFireError, match="removed none of"):  # met while the others run
        vlm.generate(requests[:4], plan=plan_of(FRAMES))
    assert not vlm.has_work
    vlm.engine.cache.check()
    assert vlm.engine.cache.num_free_blocks == vlm.engine.cache.num_blocks
    with pytest.raises(ValueError, match="errors is 'raise' or 'return', not 'ignore'"):
        vlm.generate([bad], errors="ignore")


def test_ids_in_flight_and_plans_are_checked_at_once(vlm, requests):
    vlm.submit(requests[4])
    with pytest.raises(RequestError, match="in flight"):
        vlm.submit(requests[4])
    with pytest.raises(RuntimeError, match="still running"):
        vlm.generate([requests[0]])
    drain(vlm)
    with pytest.raises(PlanError, match="no preset named"):
        vlm.submit(requests[0], plan="illava-nonsense")
    with pytest.raises(PlanError):
        vlm.submit(requests[0], plan=plan_of({**DECODER, "layers": [9]}))
    assert not vlm.has_work


def test_everything_can_be_dropped_after_an_error(vlm, requests, monkeypatch):
    for request in requests[:3]:
        vlm.submit(request)
    vlm.step()
    vlm.submit(requests[3])
    monkeypatch.setattr(vlm.family, "encode", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        vlm.step()
    with pytest.raises(RuntimeError, match="still running"):
        vlm.generate([requests[4]])
    assert sorted(vlm.cancel_all()) == ["a", "b", "c", "d"]
    assert not vlm.has_work
    vlm.engine.cache.check()
    assert vlm.engine.cache.num_free_blocks == vlm.engine.cache.num_blocks
    with pytest.raises(torch.OutOfMemoryError):
        vlm.generate(requests)
    assert not vlm.has_work
    monkeypatch.undo()
    assert only(vlm, requests[0], EMPTY_PLAN).error is None


def test_stop_tokens_end_an_answer_but_not_before_its_minimum(vlm, requests, monkeypatch):
    free = SamplingParams(max_new_tokens=6)
    first = only(vlm, replace(requests[0], sampling=free), EMPTY_PLAN)
    assert first.finish_reason == "length"
    stop = first.token_ids[2]
    monkeypatch.setattr(vlm.family, "stop_token_ids", frozenset({stop}))
    where = first.token_ids.index(stop)
    stopped = only(vlm, replace(requests[0], sampling=free), EMPTY_PLAN)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == first.token_ids[: where + 1]
    assert stopped.text == vlm.family.decode_text(first.token_ids[:where])
    forced = only(vlm, requests[0], EMPTY_PLAN)
    assert forced.token_ids == first.token_ids
    assert forced.finish_reason in ("stop", "length")


class Clock:
    """Stands still unless moved."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.mark.parametrize("stage", ["vision", "prefill", "decode"])
def test_time_spent_in_one_stage_appears_there_alone(vlm, requests, stage, monkeypatch):
    clock = Clock()
    engine = Engine(vlm.family, vlm.engine.cache, now=clock)
    target = {
        "vision": (vlm.family, "encode"),
        "prefill": (PrefillRun, "advance"),
        "decode": (engine.decoder, "decode"),
    }
    owner, name = target[stage]
    stock = getattr(owner, name)

    def slow(*args, **options):
        clock.now_s += 2.0
        return stock(*args, **options)

    monkeypatch.setattr(owner, name, slow)
    engine.submit(replace(requests[0], sampling=SamplingParams(4, min_new_tokens=4)))
    clock.now_s += 0.5
    (generation,) = drain(engine)
    spent = {"queue": 0.5, "vision": 0.0, "prefill": 0.0, "decode": 0.0} | {stage: 6.0 if stage == "decode" else 2.0}
    timing = generation.timing
    assert timing.queue_s == pytest.approx(spent["queue"])
    assert (timing.vision_s, timing.prefill_s, timing.decode_s) == (spent["vision"], spent["prefill"], spent["decode"])
    assert timing.device_s == engine.device_busy_s == spent[stage]


def test_states_partition_a_life_and_shares_add_up_to_the_device(vlm, requests):
    ticks = iter(range(10**6))
    engine = Engine(vlm.family, vlm.engine.cache, EngineConfig(max_batch_requests=3), now=lambda: next(ticks) / 8)
    born, ended = {}, {}
    for request in requests:
        engine.submit(request, IMAGE_PLAN)
        born[request.request_id] = next(ticks) / 8 - 1 / 8
    generations = []
    while engine.has_work:
        before = next(ticks) / 8
        for generation in engine.step():
            generations.append(generation)
            ended[generation.request_id] = (before, next(ticks) / 8)
    for generation in generations:
        timing, (earliest, latest) = generation.timing, ended[generation.request_id]
        life_s = timing.queue_s + timing.vision_s + timing.prefill_s + timing.decode_s
        assert earliest < born[generation.request_id] + life_s < latest
        assert min(timing.queue_s, timing.prefill_s, timing.decode_s) > 0
    assert sum(g.timing.device_s for g in generations) == pytest.approx(engine.device_busy_s)


def test_counts_are_what_hooks_measured(vlm, requests):
    seen = {}

    def count(name):
        def hook(module, args):
            seen.setdefault(name, args[0].shape[0])

        return hook

    layers = vlm.family.decoder.layers
    handles = [layers[n].self_attn.k_proj.register_forward_pre_hook(count(n)) for n in (0, 3)]
    generation = only(vlm, requests[0], FULL_PLAN)
    for handle in handles:
        handle.remove()
    usage = generation.usage
    num_text = usage.num_prompt_tokens - usage.num_vision_tokens_kept
    assert usage.num_prompt_tokens == seen[0]
    assert usage.num_decoder_tokens_kept == seen[3] - num_text
    assert usage.num_patches == 4 * 49
    assert usage.num_vision_tokens == 4 * 16 + 1
    assert usage.num_vision_tokens_kept == 4 * 10 + 1
    assert usage.num_decoder_tokens_kept == round(41 * 0.5)


def test_a_trace_leads_from_patches_to_kept_tokens(vlm, requests):
    traced = replace(requests[3], trace=True)
    plan = plan_of(VISION, DECODER)
    generation, other = vlm.generate([traced, requests[0]], plan=plan)
    assert other.trace is None
    assert generation.token_ids == only(vlm, requests[3], plan).token_ids
    trace = generation.trace
    assert [step.stage for step in trace.steps] == ["vision_block"] * 4 + ["layout", "decoder_layer"]
    assert trace.patch_coords.shape[0] == generation.usage.num_patches
    assert set(trace.patch_coords[:, 0].tolist()) == {0, 1}
    assert trace.steps[-2].matrix.shape[0] == generation.usage.num_vision_tokens_kept
    matrix = trace.matrix().to_dense()
    assert tuple(matrix.shape) == (generation.usage.num_decoder_tokens_kept, generation.usage.num_patches)
    place = trace.steps[-1].coords
    assert place.shape[0] == matrix.shape[0]
    plain = matrix.sum(1)[(place[:, 2] >= 0)]
    assert ((plain - 1).abs() < 1e-5).float().mean() > 0.9  # a mixture that holds a newline weighs less than 1
