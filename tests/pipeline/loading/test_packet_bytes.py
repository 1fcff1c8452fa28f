"""Tests what the sizes of a video's packets say of its frames, and the frames that `fewer_frames` keeps by them.

The same numbers by ranges, by decord and by PyAV are compared in `test_ranged_reads.py`. About 4 s in `make test`.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from illava import VLM, ReductionPlan, Request, SamplingParams
from illava.errors import RequestError
from illava.families import load_preprocessor
from illava.reducers import FewerFrames
from pipeline import read_media
from pipeline.config.schema import MediaConfig
from pipeline.loading.decoding.media import load_video
from pipeline.loading.video_index.clip import Source, describe_clip
from pipeline.loading.video_index.frame_times import Packet
from pipeline.loading.video_index.packet_bytes import packet_bytes
from tests.support.media.clips import write_video

FPS, NUM_FRAMES, BURST = 10, 96, range(38, 54)
H264 = {"crf": "23", "preset": "veryfast", "threads": "1", "bf": "3"}
X265 = "log-level=none:pools=1:frame-threads=1:open-gop=0"
CODECS = {
    "h264": {"codec": "libx264", "options": H264},
    "h264 without B-frames": {"codec": "libx264", "options": {**H264, "bf": "0"}},
    "hevc": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": X265}},
    "vp9": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "lag-in-frames": "0"}},
}


def burst() -> list[np.ndarray]:
    """A textured wall; a textured square crosses it in `BURST`, and nothing moves before or after."""
    rng = np.random.default_rng(1)
    wall = rng.integers(40, 220, (24, 24, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    square = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    frames = []
    for number in range(NUM_FRAMES):
        frame = wall.copy()
        if number in BURST:
            left = 8 * (number - BURST.start)
            frame[60:120, left : left + 60] = square
        frames.append(frame)
    return frames


@pytest.fixture(scope="module")
def frames():
    return burst()


@pytest.mark.parametrize("name", CODECS)
def test_frames_of_a_burst_are_kept(tmp_path, frames, name):
    """Every second of the still clip begins with a key frame, ten times as large as what a frame of the burst takes."""
    path = write_video(tmp_path / "v.mp4", frames, fps=FPS, keyframe_interval=10, **CODECS[name])
    found = load_video(str(path), MediaConfig(num_frames=24), decoder="auto")
    numbers = [round(time_s * FPS) for time_s in found.timestamps_s]
    inside = [place for place, number in enumerate(numbers) if number in BURST]
    assert len(inside) == 4
    assert len(found.packet_bytes) == 24
    outside = [size for place, size in enumerate(found.packet_bytes) if place and place - inside[0] not in range(-1, 6)]
    assert min(found.packet_bytes[place] for place in inside) > 3 * max(outside)
    kept = FewerFrames(num_frames=8, by="packets")._chosen(found.packet_bytes)
    assert set(inside) < set(kept)
    assert len(kept) == 8
    evenly = FewerFrames(num_frames=8)._chosen([1] * 24)
    assert not set(inside) <= set(evenly)


def test_the_key_frame_of_a_cut_counts_and_those_that_were_due_do_not(tmp_path):
    rng = np.random.default_rng(2)
    walls = [rng.integers(40, 220, (24, 24, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(2)]
    frames = [walls[number >= 25] for number in range(60)]  # key frames are due at 0, 20, 45; at 25 the scene changes
    path = write_video(tmp_path / "v.mp4", frames, fps=FPS, keyframe_interval=20, options={**H264, "keyint_min": "1"})
    found = load_video(str(path), MediaConfig(num_frames=12), decoder="auto")
    numbers = [round(time_s * FPS) for time_s in found.timestamps_s]
    around = [place for place, number in enumerate(numbers) if abs(number - 25) <= 3]
    largest = max(range(12), key=found.packet_bytes.__getitem__)
    assert largest in around
    assert found.packet_bytes[largest] > 10 * max(
        size for place, size in enumerate(found.packet_bytes) if place not in around
    )


def described(packets):
    source = Source("mov", "h264", Fraction(1, FPS), num_declared=len(packets))
    return describe_clip(packets, source, end_s=len(packets) / FPS)


def coded(*pictures: tuple[int, str, int]) -> list[Packet]:
    """Packets in the file's order from (place in display order, I or P or B, bytes)."""
    return [
        Packet(
            shown,
            place,
            kind == "I",
            kind == "I",
            False,
            False,
            is_indexed_keyframe=kind == "I",
            position=100 * place,
            num_bytes=size,
        )
        for place, (shown, kind, size) in enumerate(pictures)
    ]


def test_pictures_between_two_others_share_their_bytes_and_a_key_frame_is_as_its_neighbours():
    packets = coded((0, "I", 900), (3, "P", 70), (1, "B", 10), (2, "B", 10), (4, "I", 900), (7, "P", 40), (5, "B", 10))
    packets += coded(*[(0, "", 0)] * 7, (6, "B", 10), (8, "I", 900), (9, "P", 2), (10, "P", 4))[7:]
    clip = described(packets)
    every = packet_bytes(packets, clip, range(11))
    changes = (30, 30, 30, 25, 20, 20, 20, 11, 2, 4)
    assert every == (20, *changes)  # the median of the others
    assert packet_bytes(packets, clip, (2, 4, 8)) == (63, sum(changes[2:4]), sum(changes[4:8]))
    assert packet_bytes(packets, clip, (5,)) == (20,)
    assert packet_bytes(packets, clip, ()) == ()


def test_sizes_that_do_not_tell_what_changes_are_none():
    packets = coded(*((place, "I", 900 + place) for place in range(6)))
    assert packet_bytes(packets, described(packets), range(6)) == ()


def test_the_model_gets_them_from_the_file_and_refuses_frames_without(tmp_path, frames, onevision_folder):
    """Through the decoder's process and a video's temporal pairs there are none here: `test_media_phase.py`."""
    path = write_video(tmp_path / "v.mp4", frames, fps=FPS, keyframe_interval=10, options=H264)
    moving = write_video(tmp_path / "v.mkv", frames[:12], fps=FPS, codec="mjpeg", options={}, pix_fmt="yuvj420p")
    plan = ReductionPlan.model_validate(
        {"steps": [{"stage": "media", "reducer": {"kind": "fewer_frames", "num_frames": 4, "by": "packets"}}]}
    )
    vlm = VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)
    preprocessor = load_preprocessor(str(onevision_folder))
    (video,) = read_media(path, vlm, num_frames=12)
    few = preprocessor.with_frames(video, FewerFrames(num_frames=4, by="packets")._chosen(video.packet_bytes))
    assert len(few.packet_bytes) == len(few.tiles) == 4
    sampling = SamplingParams(max_new_tokens=2)
    (reduced,) = vlm.generate([Request("r", (video, "What?"), sampling)], plan=plan)
    (plain,) = vlm.generate([Request("r", (few, "What?"), sampling)])
    assert reduced.token_ids == plain.token_ids
    assert reduced.usage.num_patches == plain.usage.num_patches
    (intra,) = read_media(moving, vlm, num_frames=8)
    for unknown in (preprocessor.video(frames[:8]), intra):
        with pytest.raises(
            RequestError, match=r"'fewer_frames' at media: how many bytes .* is not known.*leave `by` out"
        ):
            vlm.generate([Request("r", (unknown, "What?"), sampling)], plan=plan)
