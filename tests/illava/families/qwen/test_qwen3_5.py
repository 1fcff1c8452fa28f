"""What is Qwen3.5's own: recurrent layers, whose states go on from chunk to chunk, are shared, counted and freed.

About 8 s of `make test`. Parity with stock transformers: test_qwen_parity.py. Sums in other orders (a chunk of the rule
begins elsewhere) moved logits by up to 1.3e-6 of their scale here, well within `closeness.FLOAT32`.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.integrations import hub_kernels

from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.decoder import gated_delta
from illava.decoder.decode import StaticInputs, StepInputs
from illava.decoder.hybrid_cache import make_cache
from illava.decoder.prefill import PrefillRun
from illava.engine.batching import sample_next_token
from illava.engine.config import EngineConfig
from illava.engine.engine import Engine
from illava.engine.prompt import pack
from illava.errors import ILLaVAError, ModelLoadError, PlanError
from illava.families.model_shape import check_plan, load_model_shape
from illava.plan import EMPTY_PLAN
from tests.support.closeness import assert_close
from tests.support.models.families import make_folder, stock_class
from tests.support.models.qwen3_5 import make_qwen3_5
from tests.support.models.stock_parity import prefill, prompt_of

pytestmark = pytest.mark.numeric

ANSWER = SamplingParams(max_new_tokens=4, min_new_tokens=4, logprobs=True)
QUESTIONS = ("What?", "What happens here, and why?", "Where is it?")
NUM_LAYERS = 4


def plan_of(stage, layers=(), **reducer):
    step = {"stage": stage, "reducer": reducer} | ({"layers": layers} if layers else {})
    return ReductionPlan.model_validate({"steps": [step]})


MERGED = plan_of("decoder_layer", [2], kind="illava", keep_ratio=0.5, per="prompt")  # scored by layer 1, which attends
DRAWN = plan_of("decoder_layer", [1, 3], kind="random", keep_ratio=0.6, per="prompt")  # 1: behind a recurrent layer
ASKED = plan_of("decoder_layer", [3], kind="pyramiddrop", keep_ratio=0.5)  # scored by layer 3 itself
PLANS = {"whole": EMPTY_PLAN, "merged": MERGED, "drawn": DRAWN, "asked": ASKED}
EACH_PLAN = [name if name == "merged" else pytest.param(name, marks=pytest.mark.long) for name in PLANS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder("qwen3_5", tmp_path_factory.mktemp("qwen3_5")))


@pytest.fixture(scope="module")
def vlm(folder):
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20)


@pytest.fixture(scope="module")
def requests(folder):
    pre, rng = load_preprocessor(folder), np.random.default_rng(6)
    video = pre.video([rng.integers(0, 256, (24, 40, 3), dtype=np.uint8) for _ in range(6)])
    (image,) = pre.images([rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)])
    asked = [Request(f"video {n}", (video, question), ANSWER) for n, question in enumerate(QUESTIONS)]
    return [*asked, Request("image", ("Look:", image, "Describe it."), ANSWER)]


def begun(vlm, prompts, plan):
    """A prefill of these prompts that has not begun; the caller frees its rows."""
    for row, prompt in enumerate(prompts):
        vlm.engine.cache.admit(row, [prompt.num_tokens] * NUM_LAYERS)
    blocks = vlm.engine.cache.batch(range(len(prompts)), [[0] * NUM_LAYERS] * len(prompts))
    return PrefillRun(vlm.family.decoder, pack(prompts), plan, vlm.engine.cache, blocks, seeds=[0] * len(prompts))


def assert_same_answers(got, expected):
    """The same tokens, at the same probabilities: a wrong state may leave a greedy token what it is."""
    assert [generation.token_ids for generation in got] == [generation.token_ids for generation in expected]
    for one, other in zip(got, expected, strict=True):
        assert_close(one.token_logprobs, other.token_logprobs)


def all_free(cache):
    cache.check()
    return (cache.num_free_blocks, cache.states.num_free) == (cache.num_blocks, cache.states.num_states)


@pytest.mark.parametrize("name", EACH_PLAN)
def test_a_batch_equals_its_prompts_alone_and_chunks_equal_the_whole(vlm, requests, name, monkeypatch):
    plan = PLANS[name]
    prompts = [prompt_of(vlm, request, plan) for request in requests]
    alone = [prefill(vlm, [prompt], plan) for prompt in prompts]
    together = prefill(vlm, prompts, plan)
    run, done, num_calls = begun(vlm, prompts, plan), None, 0
    while done is None:
        done, num_calls = run.advance(37), num_calls + 1
    for row in range(len(prompts)):
        vlm.engine.cache.free(row)
    assert num_calls > 8
    monkeypatch.setattr(gated_delta, "_CALL_TOKENS", 16)  # a long prompt takes several calls
    in_calls = prefill(vlm, prompts, plan)
    for row, own in enumerate(alone):
        for other in (together, done, in_calls):
            assert_close(other.logits_BV[row], own.logits_BV[0])
            assert [lengths[row] for lengths in other.lengths_LB] == [lengths[0] for lengths in own.lengths_LB]
    assert all_free(vlm.engine.cache)


@torch.inference_mode()
@pytest.mark.parametrize("name", EACH_PLAN[1:])
def test_layers_above_a_reduction_see_the_merged_sequence(vlm, folder, requests, name):
    """The oracle: Hugging Face's layers one by one, and tokens mixed by hand as the trace says."""
    stock = stock_class("qwen3_5").from_pretrained(folder, dtype=torch.float32).eval()
    prompt = prompt_of(vlm, requests[1], EMPTY_PLAN)
    done = prefill(vlm, [prompt], PLANS[name], traced=[0])
    model, hidden = stock.model.language_model, prompt.hidden_TD
    places, positions = [tuple(place) for place in prompt.coord_T4.tolist()], prompt.position_PT
    for n, layer in enumerate(model.layers):
        for step in (step for step in done.traces[0] if step.layer == n):
            visual = torch.tensor([place[0] >= 0 for place in places])
            mixed = iter(step.matrix.to_dense() @ hidden[visual])
            left = {tuple(place) for place in step.coords.tolist()}
            alive = [i for i, place in enumerate(places) if place[0] < 0 or place in left]
            assert len(alive) < len(places)
            hidden = torch.stack([next(mixed) if places[i][0] >= 0 else hidden[i] for i in alive])
            positions, places = positions[:, alive], [places[i] for i in alive]
        rotary = model.rotary_emb(hidden[None], positions[:, None])
        hidden = layer(hidden[None], position_embeddings=rotary, attention_mask=None)[0]
    assert_close(done.logits_BV[0], stock.lm_head(model.norm(hidden[-1])))


@pytest.mark.parametrize("name", EACH_PLAN[:2])
def test_a_shared_prefix_is_computed_once_and_changes_no_answer(vlm, requests, name, monkeypatch):
    """Three questions begin from one snapshot of the video; the image shares nothing."""
    plan, states = PLANS[name], vlm.engine.cache.states
    alone = [vlm.generate([request], plan=plan)[0] for request in requests]
    lengths, first, run = [], vlm.family.decoder.recurrent[0], vlm.family.decoder.recurrent[0].run
    monkeypatch.setattr(first, "run", lambda x_TD, *rest: lengths.append(len(x_TD)) or run(x_TD, *rest))
    for request in requests:
        vlm.submit(request, plan=plan)
    done, least_free = {}, states.num_free
    while vlm.has_work:
        done |= {generation.request_id: generation for generation in vlm.step()}
        vlm.engine.cache.check()
        least_free = min(least_free, states.num_free)
    assert [done[request.request_id].error for request in requests] == [None] * 4
    assert_same_answers([done[request.request_id] for request in requests], alone)
    usage = [done[request.request_id].usage for request in requests]
    in_full = sum(one.num_prompt_tokens for one in usage)
    video = usage[0].num_vision_tokens_kept
    assert sum(lengths) <= in_full - 2 * video
    assert states.num_states - least_free == 5  # four requests, and one snapshot that three of them share
    assert all_free(vlm.engine.cache)


def test_a_snapshot_outlives_the_request_that_made_it(vlm, requests):
    first, second, third, _ = requests
    first = replace(first, sampling=replace(ANSWER, max_new_tokens=3, min_new_tokens=3))
    second = replace(second, sampling=replace(ANSWER, max_new_tokens=9, min_new_tokens=9))
    alone = [vlm.generate([request])[0] for request in (first, second, third)]
    engine, done, late = Engine(vlm.family, vlm.engine.cache), {}, False
    engine.submit(first)
    engine.submit(second)
    while engine.has_work:
        done |= {generation.request_id: generation for generation in engine.step()}
        if first.request_id in done and engine._running and not late:
            engine.submit(third)  # its donor is the second, which began from the first one's snapshot
            late = True
            assert engine.step() == []
            assert engine._running[-1].num_computed > 0
    assert_same_answers([done[request.request_id] for request in (first, second, third)], alone)
    assert all_free(vlm.engine.cache)


def test_cancelling_frees_states_wherever_their_requests_are(vlm, requests):
    engine = Engine(vlm.family, vlm.engine.cache, EngineConfig(max_chunk_tokens=8))
    for n in range(8):  # beside so many a ninth prompt goes in by chunks
        sampling = SamplingParams(max_new_tokens=30, min_new_tokens=30)
        engine.submit(replace(requests[n % 2], request_id=f"talking {n}", sampling=sampling))
    engine.step()
    engine.submit(requests[3])
    engine.step()
    assert engine._encoded  # the image is under way by chunks
    assert not all_free(vlm.engine.cache)
    assert len(engine.cancel_all()) == 9
    assert all_free(vlm.engine.cache)
    assert vlm.generate([requests[0]])[0].error is None


def test_requests_wait_for_a_free_state_and_are_all_answered(folder, vlm, requests):
    """A pool with two states: one snapshot at most, and never a third request inside."""
    state_bytes = load_model_shape(folder).hybrid.state_shape.num_bytes(4)
    cache = make_cache(vlm.family.decoder, pool_bytes=1 << 20, block_size=4, max_requests=1)
    assert cache.states.num_states == 2
    assert cache.states.conv_LSCW[:, :1].nbytes + cache.states.state_LSHkv[:, :1].nbytes == state_bytes
    block_bytes = cache.k_pool_PSGd[0].nbytes + cache.v_pool_PSGd[0].nbytes
    assert cache.num_blocks == ((1 << 20) - 2 * state_bytes) // block_bytes
    together = Engine(vlm.family, cache).generate(requests[1:])
    assert_same_answers(together, [vlm.generate([request])[0] for request in requests[1:]])
    assert all_free(cache)
    with pytest.raises(ModelLoadError, match="a request a recurrent state of"):
        VLM.from_pretrained(folder, kv_cache_bytes=state_bytes)


def test_a_request_that_begins_again_begins_with_an_empty_state(vlm, requests):
    """A failure of a group makes each request run alone: what the group left in the states must not stay."""
    calls = []

    def draw(logits_BV, sampling, group):
        calls.append(len(group))
        if len(calls) <= 2:
            raise ILLaVAError("the whole group fails, twice")
        return sample_next_token(logits_BV, sampling, group)

    alone = [vlm.generate([request])[0] for request in requests[2:]]
    engine = Engine(vlm.family, vlm.engine.cache, draw=draw)
    done = engine.generate(requests[2:])
    assert calls[:4] == [2, 2, 1, 1]
    assert_same_answers(done, alone)


@torch.inference_mode()
def test_fixed_tensors_of_a_captured_step_carry_states_and_padding_touches_none(vlm, requests):
    """What a CUDA graph replays: the same step over fixed tensors, three rows in a bucket of four."""
    decoder, cache = vlm.family.decoder, vlm.engine.cache
    prompts = [prompt_of(vlm, request, EMPTY_PLAN) for request in requests[1:]]
    first = begun(vlm, prompts, EMPTY_PLAN).advance()
    lengths = [[n] * NUM_LAYERS for n in first.lengths_LB[0]]
    for row in range(3):
        cache.free(row)
        cache.admit(row, [n + 4 for n in lengths[row]])
    logits = []
    for fixed in (False, True):
        blocks = cache.batch(range(3), [[0] * NUM_LAYERS] * 3)
        PrefillRun(decoder, pack(prompts), EMPTY_PLAN, cache, blocks, seeds=[0] * 3).advance()
        inputs = StepInputs(
            cache.batch(range(3), lengths),
            torch.stack([prompt.next_position_P for prompt in prompts], 1),
            torch.tensor([5, 6, 7]),
        )
        if fixed:
            static = StaticInputs(decoder, cache, max_batch=8, num_axes=3)
            static.load(inputs)
            inputs = static.rows(4)
            others = set(range(cache.states.num_states)) - set(cache.states.rows(range(3)).slots)
            before = cache.states.state_LSHkv[:, sorted(others)].clone()
        blocks = with_host_lengths(inputs.blocks, lengths)
        for _ in range(2):
            logits.append(decoder.decode(vlm.family.embed(inputs.token_B), inputs.position_PB, cache, blocks))
    assert torch.equal(before, cache.states.state_LSHkv[:, sorted(others)])
    for eager, replayed in zip(logits[:2], logits[2:], strict=True):
        assert_close(replayed[:3], eager)
    for row in range(3):
        cache.free(row)


def with_host_lengths(blocks, lengths):
    """The torch reference reads lengths on the host, which fixed tensors do not have; the kernel reads the device's."""
    if len(blocks.host_lengths[0]):
        return blocks
    known = [[*(n[0] for n in lengths), 1]] * len(blocks.host_lengths)
    return replace(blocks, host_lengths=[list(own) for own in known], host_starts=[[-1] * 4 for _ in known])


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            plan_of("decoder_layer", [2, 3], kind="fastv", keep_ratio=0.5),
            r"'fastv' at decoder_layer 3 scores tokens by the attention of the layer before, .*among 2: .* are 1, 3",
        ),
        (
            plan_of("decoder_layer", [2], kind="pyramiddrop", keep_ratio=0.5),
            r"'pyramiddrop' at decoder_layer 2 scores .* of the layer itself, .*among 1, 3: .* are 1, 3",
        ),
    ],
)
def test_a_step_scored_by_a_recurrent_layer_is_refused_with_the_layers_that_serve(vlm, folder, plan, said):
    with pytest.raises(PlanError, match=said):
        vlm.family.check(plan)
    with pytest.raises(PlanError, match=said):
        check_plan(plan, folder)


def test_a_cpu_is_not_told_to_install_kernels_of_a_gpu(vlm, requests, caplog):
    hub_kernels.logger.warning_once.cache_clear()
    assert vlm.generate([requests[3]])[0].error is None
    assert "falling back" not in caplog.text


def test_the_files_say_what_the_loaded_layers_are(vlm, folder):
    hybrid, decoder = load_model_shape(folder).hybrid, vlm.family.decoder
    assert hybrid.attention_layers == decoder.kv_layers == (1, 3)
    assert hybrid.state_shape == decoder.state_shape


def test_a_decoder_that_ends_in_a_recurrent_layer_is_refused(tmp_path):
    folder = make_qwen3_5(tmp_path, depth=1, num_layers=3)
    with pytest.raises(ModelLoadError, match="last layer is recurrent"):
        VLM.from_pretrained(str(folder))
