"""Tests every kind of mp4 and mov: at most 1.1 times the fewest bytes that hold the frames, or the whole object.

The frames must always be those of the whole file. The fewest bytes are worked out here by other means: the index, and
for each wanted frame the packets from its key frame to itself, as PyAV lists them. About 8 s in `make test`.
"""

import struct
from itertools import pairwise

import av
import numpy as np
import pytest

from pipeline.config.schema import MediaConfig
from pipeline.loading.decoding.media import load_video
from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError
from tests.support.media.clips import write_video
from tests.support.media.long_videos import noisy_frames, write_long_video
from tests.support.media.ranged_copies import assert_same, ranged
from tests.support.media.video_writers import altered, edits

NUM_FRAMES, SIDE = 150, 160
H264 = {"crf": "20", "preset": "veryfast", "threads": "1", "bf": "0"}
B_FRAMES = {**H264, "bf": "3"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"}
CLOSED_X265 = {**X265, "x265-params": X265["x265-params"] + ":open-gop=0"}
FRONT = {"movflags": "+faststart"}
BY_RANGES = None


def video(interval, options=B_FRAMES, *, num_frames=NUM_FRAMES, **encoding):
    def write(path, frames):
        return write_video(path, frames[:num_frames], keyframe_interval=interval, options=options, **encoding)

    return write


def with_edits(write, *entries):
    """The same with other edits (duration in ms, media time in 1/10240 s)."""

    def rewrite(path, frames):
        altered(lambda whole: write(whole, frames), edits(*entries))(path)
        return path

    return rewrite


def beside_sound(**options):
    """Sound between the pictures, a key frame every two seconds of 15 fps."""

    def write(path, _):
        return write_long_video(path, path.parent, duration_s=20, side=SIDE, **options)

    return write


# name -> (suffix, writer, frames asked for, why the whole object is read instead). Of the last, all bytes are read.
FILES = {
    "short groups": ("mp4", video(5), 8, BY_RANGES),
    "short groups, index in front": ("mp4", video(5, container_options=FRONT), 8, BY_RANGES),
    "long groups": ("mp4", video(50), 2, BY_RANGES),
    "long groups, index in front": ("mp4", video(50, container_options=FRONT), 2, BY_RANGES),
    "long groups, most of them needed": ("mp4", video(50), 8, "most of its bytes"),
    "one group": ("mp4", video(NUM_FRAMES), 8, "most of its bytes"),
    "key frames alone": ("mp4", video(1), 8, BY_RANGES),
    "no b-frames": ("mp4", video(5, H264), 8, BY_RANGES),
    "hevc": ("mp4", video(5, CLOSED_X265, codec="libx265"), 8, BY_RANGES),
    "hevc, open groups": ("mp4", video(5, X265, codec="libx265"), 8, BY_RANGES),
    "mov": ("mov", video(5), 8, BY_RANGES),
    "mov, mpeg4": ("mov", video(5, {"b": "4000000"}, codec="mpeg4"), 8, BY_RANGES),
    "variable rate": ("mp4", video(5, pts=[n + n * n // 9 for n in range(NUM_FRAMES)]), 8, BY_RANGES),
    "turned": ("mp4", video(5, rotation=90), 8, BY_RANGES),
    "sound between": ("mp4", beside_sound(), 8, BY_RANGES),
    "sound between, index in front": ("mp4", beside_sound(faststart=True), 8, BY_RANGES),
    "one frame": ("mp4", video(1, num_frames=1), 8, "most of its bytes"),
    "one of two frames": ("mp4", video(2, num_frames=2), 1, BY_RANGES),
    "an edit that begins later": ("mp4", with_edits(video(5, H264), (1000, -1), (15000, 0)), 8, BY_RANGES),
    "an edit that cuts frames": ("mp4", with_edits(video(5, H264), (12000, 20480)), 8, "edit list"),
    "two edits": ("mp4", with_edits(video(5, H264), (2000, 0), (2000, 40960)), 8, "edit list"),
    "fragmented": ("mp4", video(5, container_options={"movflags": "frag_keyframe+empty_moov"}), 8, "fragmented"),
}


@pytest.fixture(scope="module")
def frames():
    return noisy_frames(NUM_FRAMES, side=SIDE)


def boxes(data):
    """(kind, start, end) of the outermost ones."""
    place = 0
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        size = {0: len(data) - place, 1: int.from_bytes(data[place + 8 : place + 16])}.get(size, size)
        yield kind, place, place + size
        place += size


def fewest_bytes(path, num_frames):
    """Headers of the outermost boxes, the index, and the packets from key frames to wanted frames."""
    needed = np.zeros(path.stat().st_size, bool)
    for kind, start, end in boxes(path.read_bytes()):
        needed[start : end if kind in {b"ftyp", b"moov"} else start + 8] = True
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    shown = sorted(packet.pts for packet in packets)
    for number in np.linspace(0, len(shown) - 1, min(num_frames, len(shown)), dtype=int):
        last = next(place for place, packet in enumerate(packets) if packet.pts == shown[number])
        before = [place for place, packet in enumerate(packets[: last + 1]) if packet.is_keyframe]
        first = max(place for place in before if packets[place].pts <= shown[number])
        for packet in packets[first : last + 1]:
            if packet.pts >= packets[first].pts:
                needed[packet.pos : packet.pos + packet.size] = True
    return int(needed.sum())


@pytest.mark.parametrize("name", FILES)
def test_few_bytes_or_the_whole_and_the_same_frames(tmp_path, frames, name):
    suffix, write, num_frames, why_whole = FILES[name]
    path, media = write(tmp_path / f"v.{suffix}", frames), MediaConfig(num_frames=num_frames)
    if why_whole:
        with pytest.raises(RangeReadUnsafeError, match=why_whole):
            ranged(path, media)
        return
    found, copy = ranged(path, media)
    for decoder in ("auto", "pyav"):
        assert_same(found, load_video(str(path), media, decoder=decoder))
    assert len(found.frames) == num_frames
    smallest = fewest_bytes(path, num_frames)
    assert smallest < 0.6 * copy.size
    assert copy.num_bytes <= 1.1 * smallest, (copy.num_bytes, smallest, copy.size)
    assert all(0 <= start < end < after for (start, end), (after, _) in pairwise(copy.present))
