"""What requests have in common is computed once, and nobody's answer changes for it; long prompts go in by chunks."""

from dataclasses import replace

import numpy as np
import pytest

from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.engine.config import EngineConfig
from illava.engine.engine import Engine
from illava.plan import EMPTY_PLAN
from tests.support.models.llava_next import make_llava_next
from tests.support.models.qwen import make_qwen2_5_vl, make_qwen2_vl, make_qwen3_vl

MANY = 8  # beside which a ninth prompt goes in by chunks
ANSWER = SamplingParams(max_new_tokens=5, min_new_tokens=5)
QUESTIONS = ("What?", "What happens here, and why?", "Where is it?")


def plan_of(*steps):
    return ReductionPlan.model_validate({"steps": list(steps)})


VISION = {"stage": "vision_block", "layers": [3], "reducer": {"kind": "illava", "keep_ratio": 0.6}}
DRAWN = {"stage": "vision_block", "layers": [3], "reducer": {"kind": "random", "keep_ratio": 0.6}}
FRAMES = {"stage": "media", "reducer": {"kind": "fewer_frames", "num_frames": 3}}
CELLS = {"stage": "media", "reducer": {"kind": "pixel_dedup", "threshold": 250}}
DECODER = {"stage": "decoder_layer", "layers": [2], "reducer": {"kind": "illava", "keep_ratio": 0.5, "per": "prompt"}}
PER_FRAME = {"stage": "decoder_input", "reducer": {"kind": "illava", "keep_per_frame": 10}}
ASKED = {**DECODER, "reducer": {**DECODER["reducer"], "score": "released"}}  # by the question's last token


@pytest.fixture(scope="module")
def vlm(onevision_folder):
    return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)


@pytest.fixture(scope="module")
def video(onevision_folder):
    frames = np.random.default_rng(5).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    return load_preprocessor(str(onevision_folder)).video(frames)


def copied(mm_item):
    """The same content, loaded by somebody else."""
    return replace(mm_item, tiles=mm_item.tiles.copy())


def asked_of(mm_item):
    return [Request(str(n), (copied(mm_item), question), ANSWER) for n, question in enumerate(QUESTIONS)]


class Watch:
    """Counts the media the tower is given and the tokens that the layers project."""

    def __init__(self, family, monkeypatch):
        self.media, self.tokens = [], [0] * family.decoder.num_layers
        layers = family.decoder.layers
        encode, project = family.encode, family.decoder.project
        monkeypatch.setattr(
            family, "encode", lambda media, *a, **k: self.media.append(len(media)) or encode(media, *a, **k)
        )

        def counted(layer, hidden, rotary, **into):
            self.tokens[layers.index(layer)] += len(hidden)
            return project(layer, hidden, rotary, **into)

        monkeypatch.setattr(family.decoder, "project", counted)


ALIKE = [
    EMPTY_PLAN,
    plan_of(VISION),
    plan_of(FRAMES),
    plan_of(CELLS, VISION),
    plan_of(VISION, DECODER),  # scored by visual tokens alone: its later layers, too, hold the same of all questions
    plan_of(PER_FRAME, DECODER),
]


@pytest.mark.parametrize("plan", [*ALIKE, plan_of(VISION, ASKED), plan_of(DRAWN)])
def test_questions_on_one_medium_are_answered_as_if_alone(vlm, video, plan, monkeypatch):
    requests = asked_of(video)
    alone = [vlm.generate([request], plan=plan)[0] for request in requests]
    watch = Watch(vlm.family, monkeypatch)
    together = vlm.generate(requests, plan=plan)
    assert [g.error for g in together] == [None] * 3
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert [g.usage for g in together] == [g.usage for g in alone]
    assert watch.media == [3 if plan == plan_of(DRAWN) else 1]  # draws differ by request
    decoded = 3 * (ANSWER.max_new_tokens - 1)
    usage = together[0].usage
    num_visual = {0: usage.num_vision_tokens_kept, -1: usage.num_decoder_tokens_kept}
    for layer, kept in num_visual.items():
        text = sum(g.usage.num_prompt_tokens - g.usage.num_vision_tokens_kept for g in together)
        computed = watch.tokens[layer] - decoded
        if plan in ALIKE:  # of the visual tokens once, and of what stands before them
            assert kept < computed < kept + text
        else:
            assert computed == 3 * kept + text
    vlm.engine.cache.check()
    assert vlm.engine.cache.num_free_blocks == vlm.engine.cache.num_blocks


@pytest.mark.parametrize("plan", [EMPTY_PLAN, plan_of(PER_FRAME, DECODER)])
def test_a_full_batch_does_not_split_the_questions_on_one_medium(vlm, video, plan, monkeypatch):
    """One place becomes free at a time; the waiting questions are encoded together all the same."""
    other = replace(video, tiles=255 - video.tiles)
    watch = Watch(vlm.family, monkeypatch)
    requests = [
        Request(f"{name}{n}", (mm_item, question), ANSWER)
        for name, mm_item in (("a", video), ("b", other))
        for n, question in enumerate(QUESTIONS)
    ]
    alone = [vlm.generate([request], plan=plan)[0].token_ids for request in requests]
    watch.media.clear()
    engine = Engine(vlm.family, vlm.engine.cache, EngineConfig(max_batch_requests=2))
    for request in requests:
        engine.submit(request, plan)
    done, most_running = {}, 0
    while engine.has_work:
        done |= {generation.request_id: generation.token_ids for generation in engine.step()}
        most_running = max(most_running, len(engine._running))
    assert watch.media == [1, 1]
    assert most_running == 2
    assert [done[request.request_id] for request in requests] == alone
    assert vlm.engine.cache.num_free_blocks == vlm.engine.cache.num_blocks


def test_shared_blocks_outlive_the_request_that_made_them(vlm, video):
    first, second, _ = asked_of(video)
    first = replace(first, sampling=SamplingParams(max_new_tokens=3, min_new_tokens=3))
    alone = [vlm.generate([request])[0].token_ids for request in (first, second)]
    cache, done = vlm.engine.cache, {}
    vlm.submit(first)
    vlm.submit(second)
    before = cache.num_blocks
    while vlm.has_work:
        for generation in vlm.step():
            done[generation.request_id] = generation.token_ids
            cache.check()
        before = min(before, cache.num_free_blocks)
    assert [done["0"], done["1"]] == alone
    assert cache.num_free_blocks == cache.num_blocks
    apart = sum(cache.num_blocks_for([len(video.tiles) * 16 + 1 + 30] * 4) for _ in alone)
    assert cache.num_blocks - before < apart


def test_device_seconds_of_a_shared_encoding_are_split(vlm, video, monkeypatch):
    now_s = [0.0]
    engine = Engine(vlm.family, vlm.engine.cache, now=lambda: now_s[0])
    encode = vlm.family.encode
    monkeypatch.setattr(vlm.family, "encode", lambda *a, **k: now_s.append(now_s.pop() + 6.0) or encode(*a, **k))
    for request in asked_of(video):
        engine.submit(request)
    done = []
    while engine.has_work:
        done += engine.step()
    assert [g.timing.device_s for g in done] == pytest.approx([2.0, 2.0, 2.0])
    assert [g.timing.vision_s for g in done] == [6.0] * 3  # each one's own wall time
    assert [g.usage.num_patches for g in done] == [6 * 49] * 3
    assert engine.device_busy_s == 6.0


def test_a_shared_medium_weighs_once_in_the_towers_budget(vlm, video, monkeypatch):
    watch = Watch(vlm.family, monkeypatch)
    engine = Engine(vlm.family, vlm.engine.cache, EngineConfig(max_vision_patches=6 * 49))
    for request in asked_of(video):
        engine.submit(request)
    while engine.has_work:
        engine.step()
    assert watch.media == [1]


def test_media_that_differ_in_one_pixel_are_not_the_same(vlm, video, monkeypatch):
    other = copied(video)
    other.tiles[3, 5, 5, 1] ^= 255  # no sampled row or column
    requests = [Request("one", (video, "What?"), ANSWER), Request("other", (other, "What?"), ANSWER)]
    watch = Watch(vlm.family, monkeypatch)
    vlm.generate(requests)
    assert watch.media == [2]


@pytest.mark.parametrize("make", [make_llava_next, make_qwen2_vl, make_qwen2_5_vl, make_qwen3_vl])
def test_every_family_shares_and_chunks_without_changing_an_answer(make, tmp_path, monkeypatch):
    folder = str(make(tmp_path))
    vlm = VLM.from_pretrained(folder, kv_cache_bytes=8 << 20)
    picture = np.random.default_rng(3).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    (image,) = load_preprocessor(folder).images([picture])
    requests = asked_of(image)
    for plan in (EMPTY_PLAN, plan_of(DECODER)):
        alone = [vlm.generate([request], plan=plan)[0].token_ids for request in requests]
        with monkeypatch.context() as patch:
            watch = Watch(vlm.family, patch)
            engine = Engine(vlm.family, vlm.engine.cache, EngineConfig(max_chunk_tokens=7))
            for request in requests:
                engine.submit(request, plan)
            done = {}
            while engine.has_work:
                done |= {g.request_id: g.token_ids for g in engine.step()}
        assert [done[r.request_id] for r in requests] == alone
        assert watch.media == [1]


@pytest.mark.parametrize("plan", [EMPTY_PLAN, plan_of(VISION, DECODER)])
def test_a_long_prompt_goes_in_by_chunks_while_others_decode(vlm, video, plan):
    long = SamplingParams(max_new_tokens=40, min_new_tokens=40)
    talking = [Request(f"talking {n}", ("Tell me everything.",), long) for n in range(MANY)]
    late = Request("late", (video, "What happens?"), ANSWER)
    alone = {r.request_id: vlm.generate([r], plan=plan)[0].token_ids for r in (*talking, late)}
    engine = Engine(vlm.family, vlm.engine.cache, EngineConfig(max_chunk_tokens=16))
    for request in talking:
        engine.submit(request, plan)
    done = engine.step()
    engine.submit(late, plan)
    told = []
    while engine.has_work:
        done += engine.step()
        told.append((len(engine._encoded), sum(len(state.token_ids) for state in engine._running[:1])))
    waiting = [tokens for encoded, tokens in told if encoded]
    assert len(waiting) >= 4  # steps in which the long prompt was under way
    assert waiting == list(range(waiting[0], waiting[0] + len(waiting)))  # and the other drew a token in each
    assert {g.request_id: g.token_ids for g in done} == alone
    prefill = next(g.timing for g in done if g.request_id == "late")
    assert prefill.queue_s > 0


def test_what_is_under_way_by_chunks_can_be_dropped(vlm, video):
    engine = Engine(vlm.family, vlm.engine.cache, EngineConfig(max_chunk_tokens=16))
    for n in range(MANY):
        engine.submit(Request(f"talking {n}", ("Tell me.",), SamplingParams(max_new_tokens=40, min_new_tokens=40)))
    engine.step()
    engine.submit(Request("late", (video, "What?"), ANSWER))
    engine.step()
    assert len(engine._encoded) == 1
    assert sorted(engine.cancel_all()) == ["late", *(f"talking {n}" for n in range(MANY))]
    assert not engine.has_work
    vlm.engine.cache.check()
    assert vlm.engine.cache.num_free_blocks == vlm.engine.cache.num_blocks
    engine.submit(Request("late", (video, "What?"), ANSWER))
    while engine.has_work:
        engine.step()
