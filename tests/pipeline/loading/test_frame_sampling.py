"""Tests the choice of frames: equal to the reference's linspace, exact for variable rates, no frame twice."""

import numpy as np
import pytest

from pipeline.config.schema import FpsSampling, KeyframeSampling, UniformSampling
from pipeline.loading.video_index.frame_sampling import Timeline, choose_frames, spread


def timeline(num_frames, rate_fps=10.0, keyframe_interval=12):
    return Timeline(tuple(i / rate_fps for i in range(num_frames)), tuple(range(0, num_frames, keyframe_interval)))


@pytest.mark.parametrize("num_frames", [1, 2, 8, 32, 33])
def test_uniform_is_the_references_linspace(num_frames):
    for available in range(num_frames, 700, 7):
        expected = np.linspace(0, available - 1, num_frames, dtype=int).tolist()
        chosen = choose_frames(timeline(available), UniformSampling(), num_frames=num_frames)
        assert list(chosen) == expected
        assert len(set(chosen)) == num_frames


@pytest.mark.parametrize("sampling", [UniformSampling(), FpsSampling(fps=100), KeyframeSampling()])
def test_a_short_clip_gives_fewer_frames_and_none_twice(sampling):
    short = timeline(3, keyframe_interval=1)
    assert choose_frames(short, sampling, num_frames=8) == (0, 1, 2)


def test_uniform_goes_from_the_first_frame_to_the_last():
    assert spread(100, 5) == (0, 24, 49, 74, 99)
    assert spread(100, 1) == (0,)
    assert spread(0, 4) == ()


def test_fps_takes_the_frame_shown_at_each_tick():
    assert choose_frames(timeline(30), FpsSampling(fps=2), num_frames=32) == (0, 5, 10, 15, 20, 25)
    # 0.1 + 0.2 style last bits: the frame due exactly at a tick is the one that is shown
    assert choose_frames(timeline(31, rate_fps=30), FpsSampling(fps=10), num_frames=32) == tuple(range(0, 31, 3))


def test_fps_is_true_to_the_clock_where_the_rate_varies():
    clip = Timeline((0.0, 0.1, 0.2, 0.3, 5.0, 9.0), (0,))
    assert choose_frames(clip, FpsSampling(fps=1), num_frames=32) == (0, 3, 4, 5)


def test_fps_and_keyframes_are_thinned_evenly():
    assert choose_frames(timeline(100), FpsSampling(fps=1), num_frames=3) == (0, 40, 90)
    assert choose_frames(timeline(100), KeyframeSampling(), num_frames=3) == (0, 48, 96)


def test_no_key_frames_give_no_frames():
    assert choose_frames(Timeline((0.0, 1.0), ()), KeyframeSampling(), num_frames=3) == ()
