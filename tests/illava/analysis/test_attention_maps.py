"""The probe that is handed in: told of every layer over whole prompts, and nobody else is."""

from __future__ import annotations

import numpy as np
import pytest

from illava import VLM, EngineConfig, Request, SamplingParams, load_preprocessor
from illava.analysis.attention_maps import attention_maps
from illava.engine.engine import Engine
from illava.plan import EMPTY_PLAN

PARAMS = SamplingParams(max_new_tokens=48, min_new_tokens=48)


@pytest.fixture(scope="module")
def tiny(onevision_folder) -> tuple[VLM, tuple[Request, Request]]:
    folder = str(onevision_folder)
    frames = [np.random.default_rng(n).integers(0, 256, (40, 40, 3), dtype=np.uint8) for n in range(3)]
    video = load_preprocessor(folder).video(frames)
    first, second = (Request(name, (video, f"What is {name}?"), PARAMS) for name in ("this", "that"))
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), (first, second)


def test_a_probe_is_told_of_whole_prompts_where_another_running_one_begins_alike(tiny) -> None:
    """The second request joins while the first decodes: without a probe its beginning would be shared, not computed."""
    vlm, (first, second) = tiny
    told = []

    def probe(stage, layer, score_T, /) -> None:
        told.append((stage, layer, len(score_T)))

    engine = Engine(vlm.family, vlm.engine.cache, EngineConfig(max_chunk_tokens=7), probe=probe)
    decoder_layers = list(range(vlm.family.decoder.num_layers - 1))
    blocks, ends = list(range(vlm.family.num_vision_blocks)), []
    for request in (first, second):
        engine.submit(request, EMPTY_PLAN)
        told.clear()
        for _ in range(40):
            ends += engine.step()
            if [layer for stage, layer, _ in told if stage == "decoder_layer"] == decoder_layers:
                break
        else:
            raise AssertionError("the decoder's layers were not told, each once")
        (length,) = {count for stage, _, count in told if stage == "decoder_layer"}
        assert length == vlm.family.num_vision_tokens(first.content[0])
        assert [layer for stage, layer, _ in told if stage == "vision_block"] == blocks
    assert not ends, "the first one was still running"
    while engine.has_work:
        ends += engine.step()
    plain = {one.request_id: one.token_ids for one in vlm.generate([first, second])}
    assert {one.request_id: one.token_ids for one in ends} == plain, "a probe changes no answer"


def test_the_models_own_engine_is_not_watched_and_must_be_idle(tiny) -> None:
    vlm, (first, second) = tiny
    _, maps = attention_maps(vlm, first)
    assert {one.stage for one in maps} == {"vision_block", "decoder_layer"}
    assert vlm.engine.cache.num_free_blocks == vlm.engine.cache.num_blocks
    vlm.submit(second)
    with pytest.raises(RuntimeError, match="still running"):
        attention_maps(vlm, first)
    vlm.cancel_all()
