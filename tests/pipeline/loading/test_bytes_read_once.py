"""Tests that a reader does no work twice: absent bytes are passed over, seeking leads to the wanted key frame itself.

Counted, not timed. About 1 s in `make test`.
"""

from __future__ import annotations

import pytest

from pipeline.config.schema import MediaConfig
from pipeline.loading.decoding import pyav_video
from pipeline.loading.decoding.pyav_scan import scan
from pipeline.loading.video_index.frame_sampling import choose_frames
from pipeline.loading.video_index.nal import units
from tests.support.media.clips import write_video
from tests.support.media.long_videos import noisy_frames


def unit(content: bytes) -> bytes:
    return len(content).to_bytes(4) + content


def test_absent_bytes_hold_no_unit():
    """In a ranged read of a long video nearly all packets are absent; a walk in steps of four bytes took seconds."""
    assert list(units(bytes(1 << 20), 4)) == []
    absent = bytes(1 << 20)
    packet = unit(b"\x65abc") + absent + unit(b"\x41def") + absent
    found = list(units(packet, 4))
    assert [packet[start:end] for start, end in found] == [b"\x65abc", b"\x41def"]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_only_the_wanted_groups_of_pictures_are_decoded(tmp_path, monkeypatch, name):
    """By decoding times, which B-frames put before those of presentation, FFmpeg sought to the group before each."""
    options = {"crf": "23", "preset": "veryfast", "threads": "1", "bf": "3", "x264-params": "scenecut=0"}
    path = str(write_video(tmp_path / name, noisy_frames(96), keyframe_interval=12, options=options))
    media = MediaConfig(num_frames=4)
    clip, packets = scan(path, "mov" if name.endswith("mp4") else "matroska", media)
    wanted = choose_frames(clip.timeline, media.frame_sampling, num_frames=4)
    spans = clip.gop_spans(wanted)
    assert len(spans) == 4
    decoded, decode = [], pyav_video._decode

    def counted(*args, **options):
        for number, frame in decode(*args, **options):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(pyav_video, "_decode", counted)
    frames, _ = pyav_video.read_pyav(path, clip, packets, wanted, media)
    assert sorted(frames) == list(wanted)
    assert len(decoded) == sum(last - key + 1 for key, last in spans)
