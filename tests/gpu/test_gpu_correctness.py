"""Where CUDA is: the checks that `benchmarks/speed/gpu_all.py` begins with, one test each part."""

from functools import partial

import pytest
import torch

from benchmarks.speed.gpu_correctness import (
    FULL,
    HALF,
    attention_checks,
    draw_checks,
    layer_checks,
    model_checks,
    paged_checks,
    score_checks,
)
from tests.support.models.families import MAKERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
GPU = torch.device("cuda", 0)
PARTS = {
    "packed attention": partial(attention_checks, GPU),
    "operations of a layer": partial(layer_checks, GPU),
    "greedy draw": partial(draw_checks, GPU),
    **{f"paged attention, {dtype}": partial(paged_checks, GPU, dtype, bound) for dtype, bound in (HALF, FULL)},
    **{f"scores, {dtype}": partial(score_checks, GPU, dtype) for dtype, _ in (HALF, FULL)},
    **{f"models of {family}": partial(model_checks, GPU, family) for family in MAKERS},
}


@pytest.mark.parametrize("part", PARTS)
def test_every_check_holds(part):
    assert [str(check) for check in PARTS[part]() if not check.holds] == []
