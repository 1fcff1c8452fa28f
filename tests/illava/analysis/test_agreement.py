"""Agreement with the unreduced model against a slow oracle: every step of the answer a prefill of its own."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from illava import VLM, Request, SamplingParams, load_preprocessor, measure_agreement
from illava.analysis.agreement import _engine
from illava.decoder.kv_cache import PagedCache
from illava.decoder.prefill import prefill
from illava.engine.batching import sample_next_token
from illava.engine.config import EngineConfig
from illava.engine.prompt import assemble, pack
from illava.errors import ModelLoadError, RandomWeightsError, RequestError
from illava.model_files import declare_random_weights, require_trained
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.visual_tokens import TokenSpan
from tests.support.models.qwen import make_qwen3_vl

pytestmark = pytest.mark.numeric

# None of these looks at the last prompt token, so the oracle may prefill answer and prompt at once.
PLAN = ReductionPlan.model_validate(
    {
        "steps": [
            {"stage": "vision_block", "layers": [1, 2], "reducer": {"kind": "illava", "num_merged": 5}},
            {"stage": "decoder_layer", "layers": [2], "reducer": {"kind": "uniform_stride", "keep_ratio": 0.4}},
        ]
    }
)
QWEN_PLAN = ReductionPlan.model_validate(
    {"steps": [{"stage": "vision_block", "layers": [1, 3], "reducer": {"kind": "tome", "keep_ratio": 0.7}}]}
)


def requests_of(folder) -> list[Request]:
    preprocessor, rng = load_preprocessor(str(folder)), np.random.default_rng(10)
    pictures = [rng.integers(0, 256, (60, 50 + 20 * n, 3), dtype=np.uint8) for n in range(4)]
    content = [
        (*preprocessor.images(pictures[:1]), "What?"),
        ("First", *preprocessor.images(pictures[1:3]), "then?"),
        (preprocessor.video([pictures[3]] * 4), "What happens here, in some detail?"),
    ]
    return [
        Request(f"r{n}", parts, SamplingParams(max_new_tokens=3 + 2 * n, temperature=0.7))
        for n, parts in enumerate(content)
    ]


@pytest.fixture(scope="module", params=["llava_onevision", "qwen3_vl"])
def tiny(request, onevision_folder, tmp_path_factory):
    if request.param == "llava_onevision":
        return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20), requests_of(onevision_folder), PLAN
    folder = make_qwen3_vl(tmp_path_factory.mktemp("agreement"))
    return VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20), requests_of(folder), QWEN_PLAN


@torch.inference_mode()
def slow_logits(vlm: VLM, request: Request, plan: ReductionPlan, answered: tuple[int, ...]) -> torch.Tensor:
    """Logits [V] behind prompt and ``answered``, in one prefill of one request in a cache of its own."""
    family, decoder = vlm.family, vlm.family.decoder
    prompt = assemble(family, request, family.encode(request.media, plan, trace=False))
    if answered:
        hidden_TD = family.embed(torch.tensor(answered))
        steps = torch.arange(len(answered))
        prompt = replace(
            prompt,
            hidden_TD=torch.cat([prompt.hidden_TD, hidden_TD]),
            position_PT=torch.cat([prompt.position_PT, prompt.next_position_P[:, None] + steps], 1),
            coord_T4=torch.cat([prompt.coord_T4, torch.full((len(answered), 4), -1)]),
            score_T=None,
            token_spans=(*prompt.token_spans, TokenSpan(len(answered))),
            deepstack=tuple(torch.cat([layer, torch.zeros_like(hidden_TD)]) for layer in prompt.deepstack),
        )
    lengths = [prompt.num_tokens] * decoder.num_layers
    cache = PagedCache(
        num_layers=decoder.num_layers,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        num_blocks=sum(-(-n // 16) for n in lengths),
        block_size=16,
        dtype=decoder.dtype,
        device=decoder.device,
    )
    cache.admit("alone", lengths)
    blocks = cache.batch(["alone"], [[0] * decoder.num_layers])
    return prefill(decoder, pack([prompt]), plan, cache, blocks, seeds=[0]).logits_BV[0]


def test_a_batch_equals_the_slow_oracle(tiny) -> None:
    vlm, requests, plan = tiny
    for request, found in zip(requests, measure_agreement(vlm, requests, plan), strict=True):
        assert found.error is None
        answer, same, divergences = (), 0, []
        for _ in range(request.sampling.max_new_tokens):
            p, q = (slow_logits(vlm, request, which, answer).double().numpy() for which in (EMPTY_PLAN, plan))
            p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p, q))
            answer = (*answer, int(p.argmax()))
            same += int(q.argmax() == p.argmax())
            divergences.append(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))
            if answer[-1] in vlm.family.stop_token_ids:
                break
        assert found.reference.token_ids == answer
        assert (found.num_tokens, found.num_same) == (len(answer), same)
        assert found.kl_nats == pytest.approx(np.mean(divergences), rel=1e-3, abs=1e-6)
        assert found.kl_nats > 1e-3, "a plan that changes nothing tests nothing"


def test_nothing_reduced_agrees_wholly_in_batches_of_any_size(tiny) -> None:
    vlm, requests, plan = tiny
    for found in measure_agreement(vlm, requests, EMPTY_PLAN):
        assert found.top1_ratio == 1.0
        assert found.kl_nats == pytest.approx(0.0, abs=1e-6)
    together, alone = (measure_agreement(vlm, requests, plan, max_logit_bytes=most) for most in (1 << 29, 1))
    for one, other in zip(together, alone, strict=True):
        assert one.reference.token_ids == other.reference.token_ids
        assert one.num_same == other.num_same
        assert one.kl_nats == pytest.approx(other.kl_nats, rel=1e-3)  # logits 1e-5 apart move a KL of 1e-3 by so much
    assert vlm.engine.cache.num_free_blocks == vlm.engine.cache.num_blocks


def test_the_reference_is_greedy_and_the_models_own(tiny) -> None:
    vlm, requests, plan = tiny
    greedy = [replace(one, sampling=replace(one.sampling, temperature=0.0)) for one in requests]
    answers = vlm.generate(greedy)
    for found, answer in zip(measure_agreement(vlm, requests, plan), answers, strict=True):
        assert found.reference.token_ids == answer.token_ids


def test_its_engine_has_every_limit_of_the_models_own(tiny) -> None:
    limits = [field.name for field in fields(EngineConfig) if field.name.startswith("max_")]
    given = {name: 5 + number for number, name in enumerate(limits)}
    vlm = VLM(tiny[0].family, kv_cache_bytes=1 << 20, **given)
    assert _engine(vlm, sample_next_token).config == vlm.engine.config == EngineConfig(kv_cache_bytes=1 << 20, **given)


def test_one_request_that_fails_harms_no_other(tiny) -> None:
    vlm, requests, plan = tiny
    too_long = replace(requests[0], request_id="long", sampling=SamplingParams(max_new_tokens=100_000))
    found = measure_agreement(vlm, [too_long, requests[0]], plan)
    assert isinstance(found[0].error, RequestError)
    assert (found[0].num_tokens, found[1].error) == (0, None)
    with pytest.raises(RequestError, match="same id"):
        measure_agreement(vlm, [requests[0]] * 2, plan)


def test_random_weights_are_refused_with_the_reason(tmp_path, onevision_folder) -> None:
    folder = tmp_path / "random"
    folder.mkdir()
    for path in onevision_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    require_trained(str(folder))
    declare_random_weights(folder)
    vlm = VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20)
    with pytest.raises(RandomWeightsError, match="random weights say nothing about quality"):
        measure_agreement(vlm, requests_of(folder), PLAN)
    assert vlm.generate(requests_of(folder)[:1])[0].error is None, "speed may still be measured"
    with pytest.raises(RandomWeightsError, match="random weights say nothing about quality"):
        require_trained(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_onevision"}))
    require_trained(str(folder))
    with pytest.raises(ModelLoadError):
        require_trained(str(tmp_path))
