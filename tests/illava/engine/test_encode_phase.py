"""While a group is encoded, the next group's pixels are on their way: which media those are.

That they travel on a stream of their own, and are waited for: tests/benchmarks/test_stand_in_cuda.py.
"""

import numpy as np
import pytest

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.plan import EMPTY_PLAN, ReductionPlan

ONE = SamplingParams(max_new_tokens=1)
DEDUP = ReductionPlan.model_validate({"steps": [{"stage": "media", "reducer": {"kind": "pixel_dedup"}}]})


@pytest.fixture(scope="module")
def vlm(onevision_folder):
    family_patches = 3 * 49  # a picture of three tiles
    return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=4 << 20, max_vision_patches=family_patches)


@pytest.fixture(scope="module")
def pictures(onevision_folder):
    pre, rng = load_preprocessor(str(onevision_folder)), np.random.default_rng(0)
    return [pre.images([rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)])[0] for _ in range(3)]


def test_the_next_group_is_prefetched_while_one_is_encoded(vlm, pictures, monkeypatch):
    events = []
    encode = vlm.family.encode
    monkeypatch.setattr(vlm.family, "prefetch", lambda media: events.append(("ahead", *map(number, media))))
    monkeypatch.setattr(
        vlm.family,
        "encode",
        lambda media, *a, **k: (events.append(("now", *map(number, media))), encode(media, *a, **k))[1],
    )

    def number(mm_item):
        return next(n for n, own in enumerate(pictures) if np.array_equal(own.tiles, mm_item.tiles))

    asked = [(0, EMPTY_PLAN), (1, EMPTY_PLAN), (0, EMPTY_PLAN), (2, DEDUP)]  # the third is a companion of the first
    for n, (picture, plan) in enumerate(asked):
        vlm.submit(Request(str(n), (pictures[picture], "What?"), ONE), plan=plan)
    done = []
    while vlm.has_work:
        done += vlm.step()
    assert [one.error for one in done[:3]] == [None] * 3
    # the last one's pixels may change before they are encoded, so they are not copied
    assert [event for event in events if event[0] == "ahead"] == [("ahead", 1), ("ahead",)]
    assert events[:3] == [("now", 0), ("ahead", 1), ("now", 1)]
