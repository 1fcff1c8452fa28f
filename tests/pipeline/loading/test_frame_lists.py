"""Tests that frames are what the decoder gives, with the file's own times, where packets are not frames.

Hidden frames, fields, chunks of no bytes, recordings that begin within a group of pictures, joined recordings, times
that stand there twice. Every frame is compared with PyAV's plain decoding. About 3 s.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest

from pipeline.config.schema import FpsSampling, KeyframeSampling, MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.decoding.media import DecordRefusedError, load_video
from pipeline.loading.video_index.frame_times import Packet, find_joints, time_frames
from pipeline.loading.video_index.nal import size_mark, stream_orientation
from pipeline.loading.video_index.shown_packets import is_frame_coded, packet_reader, sequence_sets
from tests.support.media.clips import read_frame_number
from tests.support.media.decoded import every_frame
from tests.support.media.stream_writers import (
    DATA,
    begun_late,
    from_data,
    hidden,
    joined,
    moved,
    two_in_one,
    with_pts,
    without_packet,
)
from tests.support.media.video_writers import HEVC, OPEN_264, SLOW_264, VP9, altered, clip, noisy

ALL = MediaConfig(num_frames=200)
NO_B = {**SLOW_264, "bf": "0"}
B = {**SLOW_264, "bf": "2"}
X265 = {"codec": "libx265", "options": HEVC, "keyframe_interval": 8}
MPEG2 = {"codec": "mpeg2video", "fps": 25, "options": {"bf": "2"}, "keyframe_interval": 8}
VP8 = {"codec": "libvpx", "options": VP9["options"]}
FRAGMENTS = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}
TENTHS = tuple(range(20))
AGAIN = "begin anew at frame 20 of 40"
TWICE = "1 of 20 frame times are missing in the file or stand there twice"


class Case(NamedTuple):
    """A file, and what it shows: its times in tenths of a second, the numbers on its frames, and words of the row."""

    write: Callable[[Path], Any]
    tenths: tuple[float, ...]
    numbers: tuple[int, ...] | None = None
    says: str = ""


CASES = {
    "vp8-altref.webm": Case(from_data("vp8_altref.webm"), tuple(n * 0.4 for n in range(100))),
    "vp8-hidden.mkv": Case(altered(clip(**VP8), hidden(7, 0x10)), (*range(7), *range(8, 20))),
    "vp9-hidden.mkv": Case(altered(clip(keyframe_interval=8, **VP9), hidden(8, 0x02)), (*range(8), *range(9, 20))),
    "fields.ts": Case(from_data("fields.ts"), tuple(range(10))),
    "fields.mkv": Case(moved(from_data("fields.ts"), ".ts"), tuple(range(10))),
    "fields.mp4": Case(moved(from_data("fields.ts"), ".ts"), tuple(range(10))),
    "field-pairs.mkv": Case(moved(from_data("fields.ts"), ".ts", change=two_in_one), tuple(range(10))),
    "interlaced.ts": Case(clip(options={**SLOW_264, "flags": "+ildct+ilme"}), TENTHS, TENTHS),
    "dropped.avi": Case(from_data("dropped_frames.avi"), (*range(5), *range(10, 15), *range(20, 30))),
    "dropped-h264.avi": Case(clip(options=NO_B, pts=[*range(5), *range(10, 25)]), (*range(5), *range(10, 25)), TENTHS),
    "b-frames.avi": Case(clip(options={**SLOW_264, "bf": "3"}), TENTHS, TENTHS),
    "mpeg4-b-frames.avi": Case(clip(codec="mpeg4", options={"bf": "2"}), TENTHS, TENTHS),
    "dropped-last.avi": Case(clip(codec="mpeg4", pts=[*range(19), 30]), (*range(19), 30), TENTHS),
    "late.ts": Case(
        altered(noisy(options=B, keyframe_interval=8), begun_late(3)), tuple(range(32)), tuple(range(8, 40))
    ),
    "late-open.ts": Case(altered(noisy(options=OPEN_264), begun_late(3)), tuple(range(34)), tuple(range(6, 40))),
    "late-hevc.ts": Case(altered(noisy(**X265), begun_late(3)), tuple(range(32)), tuple(range(8, 40))),
    "late-mpeg2.ts": Case(
        altered(noisy(**MPEG2), begun_late(3)), tuple(n * 0.4 for n in range(31)), tuple(range(9, 40))
    ),
    "two-joined.ts": Case(from_data("two_joined.ts"), tuple(range(60)), says="begin anew at frame 30 of 60"),
    "three-joined.ts": Case(
        joined(clip(), clip(), clip()), tuple(range(60)), TENTHS * 3, says="anew at frame 20, 40 of 60: joined"
    ),
    "an-hour-later.ts": Case(
        joined(clip(), clip(pts=[36_000 + n for n in TENTHS])), tuple(range(40)), TENTHS * 2, AGAIN
    ),
    "joined-hevc.ts": Case(joined(clip(**X265), clip(**X265)), tuple(range(40)), TENTHS * 2, AGAIN),
    "joined.mkv": Case(joined(clip(), clip()), tuple(range(40)), TENTHS * 2, AGAIN),
    "joined-fragments.mp4": Case(
        joined(clip(**FRAGMENTS), clip(**FRAGMENTS)), tuple(range(28)), (*TENTHS, *range(12, 20)), "frame 20 of 28"
    ),
    "equal-times.mp4": Case(
        moved(clip(options=NO_B), ".mp4", change=with_pts((4, 5))), (0, 1, 2, 3, 5, 5.5, *range(6, 20)), TENTHS, TWICE
    ),
    "equal-times.ts": Case(
        moved(clip(options=NO_B), ".ts", change=with_pts((4, 5))), (0, 1, 2, 3, 5, 5.5, *range(6, 20)), TENTHS, TWICE
    ),
    "equal-at-the-end.mkv": Case(
        moved(clip(options=NO_B), ".mp4", change=with_pts((18, 19))), (*range(18), 19, 20), TENTHS, TWICE
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_of_the_decoder_at_the_files_own_times(tmp_path, name):
    case = CASES[name]
    case.write(tmp_path / name)
    frames = load_video(str(tmp_path / name), ALL, decoder="pyav")
    expected = [pixels for _, pixels in every_frame(tmp_path / name)]
    assert len(frames.frames) == len(expected)
    for one, other in zip(frames.frames, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert frames.timestamps_s == pytest.approx([tenth / 10 for tenth in case.tenths])
    if case.numbers:
        assert tuple(read_frame_number(frame) for frame in frames.frames) == case.numbers
    assert bool(frames.partial) == bool(case.says)
    assert case.says in (frames.partial or "")


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(("mkv", "mp4", "webm"))])
def test_seeking_finds_the_same_frames(tmp_path, name):
    CASES[name].write(tmp_path / name)
    whole = load_video(str(tmp_path / name), ALL, decoder="pyav")
    for num_frames in (1, 3, 7):
        some = load_video(str(tmp_path / name), MediaConfig(num_frames=num_frames), decoder="pyav")
        places = np.linspace(0, len(whole.frames) - 1, num_frames, dtype=int)
        assert some.timestamps_s == tuple(whole.timestamps_s[place] for place in places)
        for place, frame in zip(places, some.frames, strict=True):
            np.testing.assert_array_equal(frame, whole.frames[place])


@pytest.mark.parametrize("name", CASES)
def test_decord_gives_the_same_frames_or_is_refused(tmp_path, name):
    CASES[name].write(tmp_path / name)
    by_pyav = load_video(str(tmp_path / name), ALL, decoder="pyav")
    try:
        by_decord = load_video(str(tmp_path / name), ALL, decoder="decord")
    except (ItemError, DecordRefusedError):
        return
    assert by_decord.timestamps_s == by_pyav.timestamps_s
    for one, other in zip(by_decord.frames, by_pyav.frames, strict=True):
        np.testing.assert_array_equal(one, other)


def test_variable_rate_with_equal_times_keeps_all_others(tmp_path):
    path = Path(__file__).parent / "data" / "vfr_equal_times.mkv"
    frames = load_video(str(path), ALL, decoder="auto")
    own_s = [pts / 1000 for pts, _ in every_frame(path)]
    changed = [n for n, (one, other) in enumerate(zip(frames.timestamps_s, own_s, strict=True)) if one != other]
    assert [own_s[n] for n in changed] == [1.12, 1.56, 2.28]
    assert frames.timestamps_s[-1] == 21.88
    assert "3 of 100 frame times" in frames.partial
    by_time = load_video(str(path), MediaConfig(num_frames=200, frame_sampling=FpsSampling(fps=1)), decoder="auto")
    for second, time_s in enumerate(by_time.timestamps_s):
        assert time_s == max(one for one in frames.timestamps_s if one <= second)
    assert len(by_time.frames) == 22


def test_hidden_frames_move_no_key_frame(tmp_path):
    altered(clip(keyframe_interval=6, **VP8), hidden(4, 0x10))(tmp_path / "v.mkv")
    media = MediaConfig(num_frames=200, frame_sampling=KeyframeSampling())
    frames = load_video(str(tmp_path / "v.mkv"), media, decoder="auto")
    assert [read_frame_number(frame) for frame in frames.frames] == [0, 6, 12, 18]


def test_a_lost_packet_is_no_joint(tmp_path):
    altered(noisy(options=B, keyframe_interval=8), without_packet(5))(tmp_path / "v.ts")
    frames = load_video(str(tmp_path / "v.ts"), ALL, decoder="auto")
    assert "39 of 40 frames are there" in frames.partial
    assert [read_frame_number(frame) for frame in frames.frames] == [0, 1, 2, *range(8, 40)]


def packets(*times):
    return [Packet(pts, dts, n == 0, n == 0, False, False) for n, (pts, dts) in enumerate(times)]


def timed(*times, container="mov"):
    these = packets(*times)
    joints = find_joints(these, container=container, time_base=1)
    return time_frames(these, range(len(these)), container=container, joints=joints, time_base=1, frame_rate=2)


def test_a_missing_time_is_taken_from_its_decoding_time_or_its_neighbour():
    assert timed((2, 0), (None, 1), (4, 2)).times_s == (0, 1, 2)
    assert timed((0, None), (None, None), (2, None)).times_s == (0, 1, 2)
    assert "1 of 3" in timed((2, 0), (None, 1), (4, 2)).repair


def test_no_times_at_all_are_those_of_decoding_or_of_the_rate():
    assert timed((None, 0), (None, 1), (None, 5)).times_s == (0, 1, 5)
    assert timed((None, None), (None, None)).times_s == (0, 0.5)
    with pytest.raises(ItemError, match="neither frame times nor a frame rate"):
        time_frames(
            packets((None, None), (None, None)), [0, 1], container="avi", joints=[], time_base=1, frame_rate=None
        )


def test_an_edit_list_that_repeats_frames_is_no_joint():
    assert timed((0, 0), (1, 1), (2, 0), (3, 1)).repair is None
    assert timed((0, 0), (1, 1), (0, 0), (1, 1)).times_s == (0, 1, 2, 3)


def test_headers_cut_anywhere_raise_nothing(tmp_path):
    clip(options={**SLOW_264, "flags": "+ildct+ilme"})(tmp_path / "v.mp4")
    with av.open(str(tmp_path / "v.mp4")) as file:
        extradata = file.streams.video[0].codec_context.extradata
        packet = next(bytes(one) for one in file.demux(video=0))
    annex_b = next(bytes(one) for one in av.open(io.BytesIO((DATA / "fields.ts").read_bytes())).demux(video=0))
    for end in range(len(extradata)):
        for changed in (extradata[:end], extradata[:end] + b"\0" + extradata[end + 1 :], extradata[:end] + bytes(9)):
            sequence_sets(changed)
            is_frame_coded(changed)
            packet_reader("h264", changed)(packet[:200])
    for codec in ("h264", "vp8", "vp9"):
        for end in range(1, 100):
            packet_reader(codec, None)(annex_b[:end])
            packet_reader(codec, extradata)(packet[:end])
            size_mark(annex_b[:end], codec=codec, extradata=None)
            stream_orientation(annex_b[:end], codec=codec, extradata=None)
