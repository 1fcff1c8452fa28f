"""Encodings that are captured once and replayed: the ordinary ones, for every plan whose counts are fixed.

A CPU captures as a GPU does (`tests/support/replayed.py`); the CUDA graphs themselves: tests/gpu.
"""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from illava import VLM, load_preprocessor
from illava.errors import ModelLoadError
from illava.families.tower_graphs import CudaCapture, TowerGraphs
from illava.host_copies import FixedCopies, NotFixedError, constant_on, on_device
from illava.plan import EMPTY_PLAN, ReductionPlan
from tests.support.closeness import assert_close
from tests.support.models.cells import family_params
from tests.support.models.families import make_folder
from tests.support.replayed import CpuCapture

CPU = torch.device("cpu")
CAPTURED = ("llava_onevision", "qwen2_vl", "internvl")  # Qwen2.5-VL reads its windows back


def plan_of(kind, **fields):
    steps = [{"stage": "vision_block", "layers": [1], "reducer": {"kind": kind, **fields}}]
    return ReductionPlan.model_validate({"steps": steps})


PLANS = {
    "empty": EMPTY_PLAN,
    "illava": plan_of("illava", keep_ratio=0.6),
    "tome": plan_of("tome", keep_ratio=0.6, proportional_attention=True),
    "ward with sizes": plan_of("ward", keep_ratio=0.5, contrast=1).model_copy(update={"size_bias": True}),
}


@pytest.fixture(scope="module", params=family_params(CAPTURED))
def tiny(request, tmp_path_factory):
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    return VLM.from_pretrained(folder, kv_cache_bytes=1 << 20).family, load_preprocessor(folder)


def video(preprocessor, seed, num_frames=4):
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, 48, 48, 3), dtype=np.uint8)
    return preprocessor.video(list(frames))


def check_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        for field in fields(one):
            own, theirs = getattr(one, field.name), getattr(other, field.name)
            if isinstance(own, torch.Tensor) and own.is_floating_point():
                assert_close(own, theirs)
            elif isinstance(own, torch.Tensor):
                assert torch.equal(own, theirs), field.name
            elif field.name != "deepstack":
                assert own == theirs, field.name


@torch.inference_mode()
@pytest.mark.parametrize("name", PLANS)
def test_a_replay_gives_what_the_encoder_gives_for_other_pixels(tiny, name):
    family, preprocessor = tiny
    graphs, plan = TowerGraphs(family.encoder, CpuCapture()), PLANS[name]
    first, second = video(preprocessor, 1), video(preprocessor, 2)
    expected = [family.encoder.encode([one], plan, trace=False) for one in (first, second, first)]
    found = [graphs.encode([one], plan) for one in (first, second, first)]
    assert graphs.refused == {}
    assert len(graphs._captured) == 1
    for own, theirs in zip(found, expected, strict=True):  # the earlier ones, too: a replay writes over nothing given
        check_same(own, theirs)
    assert not torch.equal(found[0][0].feature_KD, found[1][0].feature_KD)


@torch.inference_mode()
def test_what_the_data_decide_is_not_captured_and_says_so(tiny):
    family, preprocessor = tiny
    graphs, media = TowerGraphs(family.encoder, CpuCapture()), [video(preprocessor, 1)]
    for plan, why in (
        (plan_of("random", keep_ratio=0.5), "'random' draws at random"),
        (plan_of("prumerge"), "the data decide how many tokens 'prumerge' keeps"),
    ):
        assert graphs.encode(media, plan) is None
        assert why in list(graphs.refused.values())[-1]
    cells = replace(media[0], representative=np.arange(family.num_patches(media[0])))
    assert graphs.encode([cells], EMPTY_PLAN) is None
    assert "left cells out" in list(graphs.refused.values())[-1]
    assert not graphs._captured


@torch.inference_mode()
def test_shapes_have_graphs_of_their_own_and_the_oldest_goes(tiny, monkeypatch):
    family, preprocessor = tiny
    monkeypatch.setattr("illava.families.tower_graphs._MAX_GRAPHS", 2)
    graphs = TowerGraphs(family.encoder, CpuCapture())
    for num_frames in (2, 4, 2, 6):
        one = video(preprocessor, 3, num_frames)
        check_same(graphs.encode([one], EMPTY_PLAN), family.encoder.encode([one], EMPTY_PLAN, trace=False))
    assert [key[1][0][1][0] for key in graphs._captured] == [2, 6]


@torch.inference_mode()
def test_a_family_encodes_by_replays_where_it_may(tiny):
    family, preprocessor = tiny
    family.tower_graphs = graphs = TowerGraphs(family.encoder, CpuCapture())
    try:
        one = video(preprocessor, 4)
        found = family.encode([one], PLANS["illava"], trace=False)
        assert len(graphs._captured) == 1
        check_same(found, family.encoder.encode([one], PLANS["illava"], trace=False))
        assert family.encode([one], PLANS["illava"], trace=True)[0].trace  # a trace is read on the way
        assert family.encode([one], plan_of("prumerge"), trace=False)[0].feature_KD.shape[0]
    finally:
        family.tower_graphs = None


def test_they_are_refused_without_cuda():
    with pytest.raises(ModelLoadError, match=r"cannot be captured on cpu.*tower_graphs=False"):
        CudaCapture(CPU)


def test_copies_of_a_captured_run_are_those_of_the_first():
    copies = FixedCopies()

    def run(numbers):
        with copies.run():
            return constant_on((1, 2), CPU), on_device(numbers, CPU)

    first = run([3])
    assert [one is other for one, other in zip(run([3]), first, strict=True)] == [True, True]
    with pytest.raises(NotFixedError, match="copy 2 to the device is not that of the first run"):
        run([4])
    with pytest.raises(NotFixedError, match="1 copies to the device, 2 in the first run"), copies.run():
        constant_on((1, 2), CPU)
    assert constant_on((1, 2), CPU) is constant_on((1, 2), CPU) is not first[0]
