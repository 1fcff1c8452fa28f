"""The running batch follows the card: what a pool holds of the job's requests, said by a dry run and used by a run."""

import re

import pytest

from illava.engine.config import EngineConfig
from illava.families.model_shape import load_model_shape
from illava.token_counts import VisualShape, expected_counts
from pipeline.config.preflight import preflight
from pipeline.execution.batch_limit import batch_limit, most_request_tokens, pool_tokens, with_batch_limit
from pipeline.planning.dry_run import render_dry_run
from pipeline.runs.run import pending_shards, plan_run
from tests.support.runs.fakes import job_config

STEPS = [
    {"stage": "vision_block", "layers": [2], "reducer": {"kind": "illava", "num_merged": 6}},
    {"stage": "decoder_layer", "layers": [1], "reducer": {"kind": "fastv", "keep_ratio": 0.5}},
    {"stage": "decoder_layer", "layers": [3], "reducer": {"kind": "fastv", "keep_ratio": 0.5}},
]
GB = 10**9


@pytest.fixture
def job(tmp_path, onevision_folder):
    (tmp_path / "0.mp4").write_bytes(b"")

    def make(**model):
        own = {"model_id": str(onevision_folder), "dtype": "bfloat16", "device": "auto", "max_batch_requests": None}
        sections = {"model": own | model, "reduction": {"steps": STEPS}, "runtime": {"gpus_per_actor": "auto"}}
        return job_config(tmp_path / "out", {"uri": str(tmp_path)}, **sections)

    return make


def test_a_requests_tokens_are_the_mean_of_its_layers(job, onevision_folder):
    """4 layers: one before the first step, two behind it, one behind the second."""
    config, shape = job(), load_model_shape(str(onevision_folder))
    media = [VisualShape("video", 1024, 1024, num_frames=config.media.num_frames)]

    def kept(num_steps):
        plan = config.reduction.model_copy(update={"steps": config.reduction.steps[:num_steps]})
        counts = expected_counts(shape.geometry, plan, media, num_vision_blocks=8, num_decoder_layers=4)
        return counts.num_decoder_tokens_kept

    expected = -(-(kept(1) + 2 * kept(2) + kept(3)) // 4)
    assert most_request_tokens(config, [("video", 1)]) == expected + 100 + config.sampling.max_new_tokens
    assert kept(1) > kept(2) > kept(3)


def test_a_pool_decides_between_both_defaults():
    assert [batch_limit(tokens, 1000) for tokens in (0, 31_999, 50_000, 300_000)] == [32, 32, 50, 256]
    assert [EngineConfig().batch_limit(device) for device in ("cpu", "cuda")] == [32, 256]
    assert EngineConfig(max_batch_requests=7).batch_limit("cuda") == 7


def test_a_dry_run_says_the_largest_batch_of_each_card(job):
    found = preflight(job(), "bfloat16")
    tokens = most_request_tokens(job(), [("video", 1)])
    for config, ruled in ((job(), "32 to 256 are run"), (job(max_batch_requests=5), "model.max_batch_requests 5")):
        (line,) = re.findall(r"^ *batch +(.*)$", render_dry_run(config), flags=re.MULTILINE)
        assert line.endswith(f"requests of about {tokens:,} tokens a layer; {ruled}")
        pool = pool_tokens(config, found, found.weights_bytes, 80 * GB)
        assert f"80 GB: {pool // tokens:,}; " in line


@pytest.mark.parametrize(
    ("model", "memory_bytes", "limit"),
    [
        ({"device": "cuda"}, 80 * GB, 256),
        ({"device": "cuda", "kv_cache_bytes": 10_000_000}, 80 * GB, "counted"),
        ({"device": "cuda"}, None, 32),
        ({"device": "cpu"}, 80 * GB, 32),
        ({"device": "cuda", "max_batch_requests": 300}, 80 * GB, 300),
    ],
    ids=["a large pool", "a small one", "memory not known", "CPU", "as configured"],
)
def test_a_run_fills_its_limit_in_where_it_is_placed(job, model, memory_bytes, limit):
    run, found = plan_run(job()), preflight(job(), "bfloat16")
    found = type(found)(found.device, found.dtype, found.weights, found.weights_bytes, None, memory_bytes)
    if limit == "counted":
        limit = 10_000_000 // 256 // most_request_tokens(job(), [("video", 1)])
        assert 32 < limit < 256
    placed = with_batch_limit(job(**model), run, pending_shards(run), found)
    assert placed.model.max_batch_requests == limit
