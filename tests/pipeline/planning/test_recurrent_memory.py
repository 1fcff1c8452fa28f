"""A dry run counts the recurrent states of a hybrid model within its cache, as the engine then makes it. About 2 s."""

import pytest
from PIL import Image

from illava import VLM
from illava.errors import PlanError
from pipeline.errors import ConfigError
from pipeline.planning.dry_run import render_dry_run
from tests.support.models.families import make_folder
from tests.support.runs.fakes import job_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_folder("qwen3_5", tmp_path_factory.mktemp("qwen3_5")))


@pytest.fixture
def job(tmp_path, folder):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "in" / "one.png")

    def make(cache_bytes, **sections):
        model = {"model_id": folder, "dtype": "float32", "kv_cache_bytes": cache_bytes, "max_batch_requests": 8}
        return job_config(tmp_path / "out", {"uri": str(tmp_path / "in")}, model=model, **sections)

    return make


@pytest.mark.parametrize(("cache_bytes", "num_states"), [(1 << 20, 16), (200_000, 11)])
def test_states_are_counted_as_the_engine_makes_them(job, folder, cache_bytes, num_states):
    # 2 layers, each 4 matrices of 12 x 16 and 3 inputs of 2 * 2 * 12 + 4 * 16 channels, in float32
    state_bytes = 2 * 4 * (4 * 12 * 16 + 3 * 112)
    text = render_dry_run(job(cache_bytes))
    assert (
        f"{state_bytes / 1e3:.3g} kB a request for the recurrent states of 2 of 4 layers; room for {num_states}" in text
    )
    cache = VLM.from_pretrained(folder, kv_cache_bytes=cache_bytes, max_batch_requests=8).engine.cache
    assert cache.states.num_states == num_states
    pools = (cache.k_pool_PSGd, cache.v_pool_PSGd)
    held = sum(pool[: cache.num_blocks].nbytes for pool in pools)  # beside one null block, and one null state
    held += sum(pool[:, :num_states].nbytes for pool in (cache.states.conv_LSCW, cache.states.state_LSHkv))
    assert cache_bytes - 2 * pools[0][0].nbytes < held <= cache_bytes


def test_a_pool_without_room_for_a_state_is_refused_before_anything_is_loaded(job):
    with pytest.raises(ConfigError, match="half of it must hold the recurrent state of one request, 8,832 bytes"):
        render_dry_run(job(17_000))


def test_a_plan_scored_by_a_recurrent_layer_is_refused_with_the_layers_that_serve(job):
    step = {"stage": "decoder_layer", "layers": [1], "reducer": {"kind": "fastv", "keep_ratio": 0.5}}
    with pytest.raises(PlanError, match=r"'fastv' at decoder_layer 1 scores .* choose `layers` among 2: .* are 1, 3"):
        render_dry_run(job(1 << 20, reduction={"steps": [step]}))
