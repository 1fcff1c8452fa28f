"""`EngineConfig`: keywords of `VLM` by name, a wrong one named, a limit that lets nothing run refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from illava import VLM, EngineConfig, vlm
from illava.engine.engine import Engine


@pytest.fixture(scope="module")
def family(onevision_folder):
    return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=1 << 20).family


@pytest.mark.parametrize("make", ["init", "from_pretrained"])
def test_options_by_name_win_over_a_config_and_all_reach_the_engine(make, family, onevision_folder):
    options = {"max_batch_requests": 3, "block_size": 8, "decode_graphs": False}
    config = EngineConfig(kv_cache_bytes=1 << 20, max_batch_requests=7, max_chunk_tokens=9)
    if make == "init":
        engine = VLM(family, config, **options).engine
    else:
        engine = VLM.from_pretrained(str(onevision_folder), engine_config=config, **options).engine
    assert engine.config == EngineConfig(kv_cache_bytes=1 << 20, max_chunk_tokens=9, **options)
    assert (engine.cache.block_size, engine.cache.k_pool_PSGd.shape[1], engine.graphs) == (8, 8, None)
    assert engine.cache.num_blocks == (1 << 20) // (2 * 8 * 4 * family.decoder.num_kv_heads * family.decoder.head_dim)


@pytest.mark.parametrize("make", [VLM, VLM.from_pretrained])
def test_an_unknown_option_is_named_with_the_nearest_before_anything_is_loaded(make):
    with pytest.raises(TypeError, match=r"'kv_cache_byte', did you mean 'kv_cache_bytes'\? .* block_size"):
        make("no such folder", kv_cache_byte=1)
    with pytest.raises(TypeError, match=r"'zzz'\. The options are kv_cache_bytes, "):
        make("no such folder", zzz=1)


@pytest.mark.parametrize(
    "name", ["max_batch_requests", "block_size", "max_vision_patches", "max_prefill_tokens", "max_chunk_tokens"]
)
def test_a_limit_under_which_nothing_runs_is_refused(name, family):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        VLM(family, **{name: 0})
    assert Engine(family, VLM(family, kv_cache_bytes=1 << 20).engine.cache).config == EngineConfig()


@pytest.mark.parametrize("make", ["init", "from_pretrained"])
def test_the_old_name_of_block_size_works_for_this_release_and_names_the_new_one(make, family, onevision_folder):
    call, source = {"init": (VLM, family), "from_pretrained": (VLM.from_pretrained, str(onevision_folder))}[make]
    with pytest.warns(DeprecationWarning, match="'page_size' is now called 'block_size'") as warned:
        vlm = call(source, kv_cache_bytes=1 << 20, page_size=8)
    assert [warning.filename for warning in warned] == [__file__], "one warning, at the line that says page_size"
    assert (vlm.engine.config.block_size, vlm.engine.cache.block_size) == (8, 8)
    with pytest.raises(TypeError, match="given twice"):
        VLM(family, page_size=8, block_size=8)


def test_a_share_of_a_gpu_bounds_the_pool_by_what_this_process_may_hold(monkeypatch):
    """Of two actors on one GPU the second had 60 % of what the first had left."""
    memory = {"free": 100, "own": 10}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 200))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory["own"])
    size = partial(vlm._default_cache_bytes, torch.device("cuda", 0))
    assert size(1.0) == 60  # what is free bounds
    assert size(0.5) == int(0.6 * 90)  # the share does: half of 200 without its own 10
    memory["free"] = 195
    assert size(0.5) == int(0.6 * 90)  # however little the other holds by now
    memory["own"] = 150
    assert size(0.5) == 0


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"gpu_share must lie in \(0, 1\]"):
        EngineConfig(gpu_share=share)
