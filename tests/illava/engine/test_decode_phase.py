"""Decode steps that are replayed, and queued before the last one is read: no answer differs, and no key is misplaced.

About 6 s.
"""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from illava import VLM, Grammar, Request, SamplingParams, load_preprocessor
from illava.decoder.kv_cache import PagedCache
from illava.engine import engine as scheduler
from illava.engine.config import EngineConfig
from illava.engine.engine import Engine
from illava.errors import ModelLoadError, NumericalError
from illava.plan import EMPTY_PLAN
from tests.support.closeness import no_near_ties
from tests.support.models.families import make_folder
from tests.support.operations import Operations
from tests.support.replayed_steps import replayed_on_cpu

LENGTHS = (7, 3, 12, 5, 1, 9)
LATER = ["internvl", "qwen2_5_vl", "qwen3_vl", "llava_next"]
ON_HOST = {"aten.to.dtype", "aten.view.dtype", "aten.resolve_conj.default", "aten.resolve_neg.default"}
VIEWS = {"aten.slice.Tensor", "aten.select.int", "aten.alias.default", "aten.detach.default"}


@pytest.fixture(scope="module")
def vlm(onevision_folder):
    return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)


@pytest.fixture(scope="module")
def image(onevision_folder):
    pixels = np.random.default_rng(5).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return load_preprocessor(str(onevision_folder)).images([pixels])[0]


@pytest.fixture(scope="module")
def requests(image):
    """Answers that end at different steps, by length; one of them tells log-probabilities."""
    samplings = [SamplingParams(n, logprobs=n == 5) for n in LENGTHS]
    return [
        Request(str(n), (image, "what " * (n + 1)) if n % 2 else ("and " * (n + 1),), sampling)
        for n, sampling in enumerate(samplings)
    ]


def told(generations):
    """All that a generation tells but its times."""
    return {g.request_id: (g.token_ids, g.text, g.finish_reason, g.usage, str(g.error)) for g in generations}


def logprobs(generations):
    return [value for g in sorted(generations, key=lambda g: g.request_id) for value in g.token_logprobs or ()]


def run(vlm, requests, *, every=1, looks_ahead=True, graphs=False, limit=4):
    """Submit a request every few steps; returns generations and steps. Keys lie where their request has blocks."""
    context = replayed_on_cpu() if graphs else nullcontext()
    with context:
        own = VLM(vlm.family, kv_cache_bytes=8 << 20, max_batch_requests=limit, decode_graphs=graphs)
        engine = Engine(
            vlm.family, own.engine.cache, own.engine.config, graphs=own.engine.graphs, looks_ahead=looks_ahead
        )
        cache, phase, done, waiting = engine.cache, engine.decode_phase, [], list(requests)
        last_slots = PagedCache.last_slots

        def checked(self, blocks):
            slot_LB = last_slots(self, blocks)
            for row in range(slot_LB.shape[1]):
                written = (slot_LB[:, row] // self.block_size).tolist()
                if row >= len(phase._batch.states):
                    assert written == [self.num_blocks] * len(written)
                    continue
                own = self._blocks_of[phase._batch.states[row].request_id]
                for layer, block in enumerate(written):
                    assert block in own.table_LW[layer, : own.counts[layer]].tolist()
            return slot_LB

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PagedCache, "last_slots", checked)
            while waiting or engine.has_work:
                for request in waiting[:every]:
                    engine.submit(request)
                del waiting[:every]
                done += engine.step()
                cache.check()
        assert not phase.has_unread
        assert cache.num_free_blocks == cache.num_blocks
    return done, phase.num_steps


@pytest.mark.parametrize("every", [1, 6])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "replayed"])
def test_steps_queued_ahead_change_no_answer(vlm, requests, graphs, every):
    """Rows join and leave at many steps; in a bucket of four rows, some only fill up."""
    with no_near_ties():
        expected, num_steps = run(vlm, requests, every=every, looks_ahead=False)
    found, num_ahead = run(vlm, requests, every=every, graphs=graphs)
    assert told(found) == told(expected)
    assert [g.finish_reason for g in found] == ["length"] * len(requests)
    assert logprobs(found) == pytest.approx(logprobs(expected), abs=1e-4)  # float32 over other batch sizes
    # an end by length is known before the step; who waits for a row that ended joins one step later
    assert num_steps <= num_ahead <= num_steps + (every == 1)


def test_what_the_host_sees_one_step_late_changes_no_answer(vlm, requests, monkeypatch):
    """Stop tokens, texts and loops end an answer whose next token is drawn by then; penalties count on the device."""
    free = SamplingParams(16)
    with no_near_ties():
        (whole,) = vlm.generate([replace(requests[1], sampling=free)])
    monkeypatch.setattr(vlm.family, "stop_token_ids", frozenset({whole.token_ids[6]}))
    text = vlm.family.decode_text(whole.token_ids[2:4])
    samplings = [
        free,
        replace(free, stop=(text,)),
        replace(free, loop_tokens=8, min_new_tokens=12, on_loop="cut"),
        replace(free, presence_penalty=0.7, logprobs=True),
        replace(free, temperature=0.8, top_p=0.9, seed=3),
        replace(free, grammar=Grammar(regex="[a-z ]{1,9}")),
    ]
    asked = [replace(requests[1], request_id=str(n), sampling=own) for n, own in enumerate(samplings)]
    for chosen in (asked[:4], asked):
        with no_near_ties():
            expected, num_steps = run(vlm, chosen, looks_ahead=False)
        for graphs in (False, True):
            found, num_ahead = run(vlm, chosen, graphs=graphs)
            assert told(found) == told(expected)
            assert num_steps <= num_ahead <= num_steps + len(chosen)


def test_logits_that_are_not_finite_end_their_request_alone(vlm, requests, monkeypatch):
    expected, _ = run(vlm, requests, every=6, limit=6, looks_ahead=False)
    decode, seen = vlm.family.decoder.decode, []

    def broken(*given):
        logits_BV = decode(*given)
        seen.append(1)
        logits_BV[2 if len(seen) == 2 else slice(0, 0), 3] = float("inf")  # the third row's third token
        return logits_BV

    monkeypatch.setattr(vlm.family.decoder, "decode", broken)
    found, _ = run(vlm, requests, every=6, limit=6)
    by_id = {g.request_id: g for g in found}
    assert isinstance(by_id["2"].error, NumericalError)
    assert "logits of token 2" in str(by_id["2"].error)
    assert {name: one for name, one in told(found).items() if name != "2"} == {
        name: one for name, one in told(expected).items() if name != "2"
    }


def test_a_greedy_batch_asks_for_nothing_outside_its_step_but_the_copy_of_its_tokens(vlm, requests):
    """Before: 10 operations for the draw, one that puts the tokens back, one wait for the device, and the copy."""
    with replayed_on_cpu():
        own = VLM(vlm.family, kv_cache_bytes=8 << 20, max_batch_requests=4, decode_graphs=True)
        engine = Engine(vlm.family, own.engine.cache, own.engine.config, graphs=own.engine.graphs, looks_ahead=True)
        for request in requests[:2]:
            engine.submit(replace(request, sampling=SamplingParams(20, min_new_tokens=20, logprobs=True)))
        engine.step()
        graphs = engine.graphs
        graphs._replay = dict.fromkeys(graphs._replay, lambda: None)  # a graph's own operations are not asked for
        batch = engine.decode_phase._batch
        step = replace(batch, step=graphs.load(graphs._static.rows(2))[1])
        engine.decode_phase._batch = step
        with Operations() as found, torch.inference_mode():
            engine.decode_phase.advance(engine._running)
        engine.cancel_all()
    asked = [name for name in found.names if name not in VIEWS | ON_HOST]
    assert asked == ["aten.to.dtype_layout"]


@pytest.mark.parametrize(("share", "num_steps"), [(0.0, 29), (7 / 8, 17)], ids=["before", "now"])
def test_a_batch_is_filled_before_it_decodes(vlm, image, monkeypatch, share, num_steps):
    """Eight prompts of two chunks each, 16 tokens; the least that any order takes is 15 steps."""
    monkeypatch.setattr(scheduler, "_MANY_DECODE", share)
    limits = EngineConfig(max_vision_patches=1, max_prefill_tokens=1, max_chunk_tokens=100)
    engine = Engine(vlm.family, vlm.engine.cache, limits)
    for n in range(8):
        sampling = SamplingParams(16, min_new_tokens=16)
        engine.submit(Request(str(n), (f"{n} " * 8, image, "and what " * 4), sampling))  # nothing to share
    while engine.has_work:
        assert all(100 < g.usage.num_prompt_tokens <= 200 for g in engine.step())
    assert engine.decode_phase.num_steps == num_steps


def test_answers_of_one_token_are_told_as_they_are_drawn(vlm, requests):
    """None of them decodes, so few always do: without another end to it one step would answer all that wait."""
    limits = EngineConfig(max_vision_patches=1, max_prefill_tokens=1)
    engine = Engine(vlm.family, vlm.engine.cache, limits)
    for n in range(4):
        engine.submit(replace(requests[0], request_id=str(n), sampling=SamplingParams(1)))
    assert [len(engine.step()) for _ in range(4)] == [1] * 4


def test_every_bucket_is_captured_at_the_start_and_memory_that_runs_out_is_told(vlm, monkeypatch):
    with replayed_on_cpu():
        own = VLM(vlm.family, kv_cache_bytes=1 << 20, max_batch_requests=20, decode_graphs=True)
        assert sorted(own.engine.graphs._replay) == [(n, False) for n in (1, 2, 4, 8, 16, 20)]

        def full(*given):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        from illava.decoder import cuda_graphs

        monkeypatch.setattr(cuda_graphs._Recorder, "record", full)
        with pytest.raises(
            ModelLoadError, match=r"up to 20 requests .* pool of 0\.00\d+ GB: lower kv_cache_bytes or max"
        ):
            VLM(vlm.family, kv_cache_bytes=1 << 20, max_batch_requests=20, decode_graphs=True)


@pytest.mark.parametrize(
    "name",
    ["llava_onevision", "qwen2_vl", "qwen3_5", *(pytest.param(one, marks=pytest.mark.long) for one in LATER)],
)
def test_a_decoder_knows_its_position_axes_before_any_prompt(name, tmp_path):
    own = VLM.from_pretrained(str(make_folder(name, tmp_path)), kv_cache_bytes=1 << 20)
    own.submit(Request("a", ("Hello.",), SamplingParams(3, min_new_tokens=3)), plan=EMPTY_PLAN)
    own.step()
    (state,) = own.engine._running
    assert len(state.next_position_P) == own.family.decoder.num_position_axes
    own.cancel_all()
