"""Every family x every method on a stand-in for CUDA: no tensor of a wrong device or dtype, and the CPU's own answers.

See `benchmarks.common.stand_in_cuda`: device tensors know where they are and have real twins, host tensors are real. In
float32 the twins do what the CPU does, so the answers are those of the CPU; in bfloat16 packed attention is a reference
of FlashAttention, and an answer is only asked to be there.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.common.stand_in_cuda import StandInCuda
from benchmarks.tables.family_matrix import SETTINGS, plan_of, stages_of
from illava import VLM, SamplingParams, load_preprocessor
from illava.families import load_family
from illava.plan import EMPTY_PLAN
from tests.illava.families.test_family_matrix import requests_of
from tests.support.models.families import MAKERS, make_folder

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=MAKERS)
def folder(request, tmp_path_factory):
    return str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))


def plans(family, dtype):
    """Every method at one stage of its, by turns; in bfloat16 one method at all of them."""
    yield "empty", EMPTY_PLAN
    rows = SETTINGS if dtype == torch.float32 else {"illava": SETTINGS["illava"]}
    for number, (row, setting) in enumerate(rows.items()):
        stages = sorted(set(stages_of(family, setting)) - {"media"})
        for stage in _some(stages, None if len(rows) == 1 else number):
            yield f"{row} at {stage}", plan_of(family, setting, stage)


def _some(stages, number):
    return stages if number is None or not stages else [stages[number % len(stages)]]


def answers(vlm, requests, plan):
    return [(type(done.error), done.token_ids) for done in vlm.generate(requests, plan=plan)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_check_accepts_runs_there(folder, dtype):
    preprocessor = load_preprocessor(folder)
    on_cpu = VLM(load_family(folder, revision=None, dtype=dtype, device="cpu"), kv_cache_bytes=8 << 20)
    requests = [
        replace(request, sampling=SamplingParams(max_new_tokens=2))
        for request in requests_of(preprocessor, video="video" in on_cpu.family.media_kinds).values()
    ]
    model = type(on_cpu.family).model_class.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    expected = {name: answers(on_cpu, requests, plan) for name, plan in plans(on_cpu.family, dtype)}
    with StandInCuda(values=True) as device:
        family = type(on_cpu.family)(device.to_device(model), on_cpu.family._tokenizer, preprocessor)
        vlm = VLM(family, kv_cache_bytes=8 << 20, decode_graphs=False)
        found = {name: answers(vlm, requests, plan) for name, plan in plans(family, dtype)}
    for name, on_host in expected.items():
        if dtype == torch.float32:
            assert found[name] == on_host, name
        assert [error for error, _ in found[name]] == [error for error, _ in on_host], name
