"""The parts that the readers' capacity is measured with: a model that keeps its rate, and clips that want decoding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from benchmarks.throughput import null_model
from benchmarks.throughput.null_model import PacedVLM
from benchmarks.throughput.reader_capacity import SIZE_PX, street
from illava import Request


def test_a_paced_model_answers_one_request_after_another_at_its_rate(monkeypatch):
    slept = []
    monkeypatch.setattr(null_model.time, "sleep", slept.append)
    vlm = PacedVLM(items_per_h=7200)
    vlm.step()
    for name in "abc":
        vlm.submit(Request(name, ("What?",)))
    answered = [vlm.step() for _ in range(3)]
    assert [[one.request_id for one in step] for step in answered] == [["a"], ["b"], ["c"]]
    assert (slept, vlm.device_busy_s, vlm.has_work) == ([0.0, 0.5, 0.5, 0.5], 1.5, False)


def test_the_clip_is_of_its_size_and_every_frame_differs():
    frames = list(street(3))
    assert [(frame.shape, frame.dtype) for frame in frames] == [((*SIZE_PX[::-1], 3), np.uint8)] * 3
    for one, other in pairwise(frames):
        assert np.abs(one.astype(int) - other).mean() > 1
