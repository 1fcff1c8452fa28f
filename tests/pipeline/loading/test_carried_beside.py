"""Tests that nothing a file carries beside its pictures fails or changes them, and that both decoders show one side up.

Side data without a name in PyAV, an orientation in the stream, other streams, chapters; files that hold no picture, or
only encrypted ones. About 3 s.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.config.schema import KeyframeSampling, MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.decoding.media import load_video
from pipeline.loading.video_index.nal import stream_orientation
from tests.support.media.clips import read_frame_number
from tests.support.media.stream_writers import DATA, encrypted_webm, joined, moved, scrambled
from tests.support.media.video_writers import CLOSED_HEVC, HEVC, altered, clip, timestamped

ALL = MediaConfig(num_frames=200)
IN_STREAM = "h264_metadata=display_orientation=insert:{}"
KEY = "00112233445566778899aabbccddeeff"
CENC = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": KEY, "encryption_kid": KEY}
WIDE = clip(width=128, keyframe_interval=5)


def turned(how: str, suffix: str = ".mp4", write=WIDE):
    return moved(write, suffix, bitstream_filter=IN_STREAM.format(how))


def test_side_data_without_a_name_is_passed_over():
    frames = load_video(str(DATA / "mjpeg_exif.mov"), ALL, decoder="auto")
    assert (len(frames.frames), frames.partial) == (12, None)
    assert frames.timestamps_s == pytest.approx([n / 4 for n in range(12)])


@pytest.mark.parametrize(
    ("name", "how", "undo"),
    [
        ("right.mp4", "rotate=90", lambda frame: np.rot90(frame, -1)),
        ("right.mkv", "rotate=90", lambda frame: np.rot90(frame, -1)),
        ("right.ts", "rotate=90", lambda frame: np.rot90(frame, -1)),
        ("over.mp4", "rotate=180", lambda frame: np.rot90(frame, 2)),
        ("mirrored.mp4", "flip=horizontal", np.fliplr),
        ("flipped.mkv", "flip=vertical", np.flipud),
    ],
)
def test_an_orientation_in_the_stream_stands_for_every_frame(tmp_path, name, how, undo):
    turned(how, ".ts" if name.endswith("ts") else ".mp4")(tmp_path / name)
    for media in (ALL, MediaConfig(num_frames=3), MediaConfig(num_frames=2, frame_sampling=KeyframeSampling())):
        frames = load_video(str(tmp_path / name), media, decoder="auto")
        numbers = [read_frame_number(undo(frame)) for frame in frames.frames]
        assert numbers == [round(time_s * 10) for time_s in frames.timestamps_s]
    with pytest.raises(ItemError, match="ignores an orientation" if name[-2:] != "ts" else "in mpegts"):
        load_video(str(tmp_path / name), ALL, decoder="decord")


def test_the_phone_clip_stands_upright():
    frames = load_video(str(DATA / "sei_turn.mp4"), ALL, decoder="auto")
    assert [frame.shape for frame in frames.frames] == [(128, 64, 3)] * 10


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("parts", [("", "rotate=90"), ("rotate=90", "rotate=180")], ids=str)
def test_a_turn_midway_is_refused_in_the_same_words_by_both(tmp_path, parts, decoder):
    writes = [turned(how, ".ts") if how else clip(width=128) for how in parts]
    joined(*writes)(tmp_path / "v.ts")
    with pytest.raises(ItemError, match="the stream turns its picture midway") as caught:
        load_video(str(tmp_path / "v.ts"), ALL, decoder=decoder)
    assert caught.value.error_type == "unsupported_media"


@pytest.mark.parametrize("escaped", [False, True])
def test_the_message_is_found_in_both_codecs_framings(escaped):
    body = b"\x00\x00\x03\x00" if escaped else b"\x12\x34\x56\x78"
    message = b"\x05\x02ab" + bytes([47, 3 if escaped else 4]) + body + b"\x80"
    wanted = b"\x00\x00\x00" if escaped else body
    for codec, header, slice_ in (("h264", b"\x06", b"\x65"), ("hevc", b"\x4e\x01", b"\x26\x01")):
        unit = header + message
        framed = b"\x00\x00\x01" + unit + b"\x00\x00\x01" + slice_
        assert stream_orientation(framed, codec=codec, extradata=None) == wanted
        after = b"\x00\x00\x01" + slice_ + b"\x00\x00\x01" + unit
        assert stream_orientation(after, codec=codec, extradata=None) is None
    avcc = b"\x01\x64\x00\x0a\xff" + bytes(3)
    packet = len(b"\x06" + message).to_bytes(4) + b"\x06" + message
    assert stream_orientation(packet, codec="h264", extradata=avcc) == wanted
    assert stream_orientation(packet, codec="vp9", extradata=None) is None


def among_others(suffix: str):
    """A video with a stream of data or an attachment before it, chapters, and a title that is no UTF-8."""

    def write(path: Path) -> None:
        first = path.with_name(f"first{suffix}")
        clip()(first)
        with av.open(str(first)) as source, av.open(str(path), "w") as target:
            if suffix == ".mkv":
                target.add_attachment("font.ttf", "font/ttf", b"\x00\x01\x00\x00")
            out = target.add_stream_from_template(source.streams.video[0])
            if suffix == ".ts":
                target.add_data_stream("bin_data")
            target.metadata["title"] = "TITLE"
            chapter = {"id": 1, "start": 0, "end": 500, "time_base": Fraction(1, 1000), "metadata": {"title": "TITLE"}}
            target.set_chapters([chapter])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = out
                    target.mux(packet)
        path.write_bytes(path.read_bytes().replace(b"TITLE", b"\xff\xfe\xfd\x80\x81"))

    return write


@pytest.mark.parametrize("name", ["v.mkv", "v.mov", "v.ts"])
def test_other_streams_chapters_and_names_change_nothing(tmp_path, name):
    among_others(name[1:])(tmp_path / name)
    frames = load_video(str(tmp_path / name), ALL, decoder="pyav")
    assert [read_frame_number(frame) for frame in frames.frames] == list(range(20))
    assert frames.partial is None


# ---- what is no video ----


def test_a_file_of_data_says_so(tmp_path):
    data = (DATA / "subtitles_only.mp4").read_bytes().replace(b"tx3g", b"wvtt")
    (tmp_path / "v.mp4").write_bytes(data)
    with pytest.raises(ItemError, match="no video stream, but only: data") as caught:
        load_video(str(tmp_path / "v.mp4"), ALL, decoder="auto")
    assert caught.value.error_type == "no_video_stream"


@pytest.mark.parametrize("name", ["subtitles_only.mkv", "subtitles_only.mp4"])
def test_a_file_of_subtitles_says_so(name):
    with pytest.raises(ItemError, match="no video stream, but only: subtitle") as caught:
        load_video(str(DATA / name), ALL, decoder="auto")
    assert caught.value.error_type == "no_video_stream"


def without_tables(data: bytearray) -> bytes:
    """An encrypted file that does not say what of each frame is encrypted."""
    return data.replace(b"senc", b"free").replace(b"saiz", b"free").replace(b"saio", b"free")


def short_table(data: bytearray) -> None:
    """An encrypted file whose table says more than it holds."""
    place = data.index(b"senc")
    data[place + 8 : place + 12] = b"\0\xff\xff\xff"


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    "write",
    [
        clip(container_options=CENC),
        clip(codec="libx265", options=HEVC, container_options=CENC),
        altered(clip(container_options=CENC), without_tables),
        altered(clip(container_options={**CENC, "movflags": "frag_keyframe+empty_moov"}), short_table),
        altered(clip(), lambda data: data.replace(b"avc1", b"drmi")),
        altered(clip(), scrambled, ".ts"),
        altered(altered(clip(), scrambled, ".ts"), timestamped, ".ts"),
        encrypted_webm,
    ],
    ids=[
        "cenc",
        "cenc hevc",
        "cenc without its tables",
        "cenc that cannot be opened",
        "fairplay",
        "scrambled",
        "scrambled m2ts",
        "webm",
    ],
)
def test_encrypted_video_has_a_type_of_its_own(tmp_path, write, decoder):
    write(tmp_path / "v.mp4")
    with pytest.raises(ItemError, match="encrypted") as caught:
        load_video(str(tmp_path / "v.mp4"), ALL, decoder=decoder)
    assert caught.value.error_type == "encrypted_video"


@pytest.mark.parametrize(
    "codec", [{}, {"codec": "libx265", "options": CLOSED_HEVC}, {"codec": "libvpx"}, {"codec": "libvpx-vp9"}]
)
def test_decord_scales_no_frames_of_other_sizes(tmp_path, codec):
    suffix = ".mkv" if "vp" in codec.get("codec", "") else ".ts"  # which has the sides with every key frame
    parts = [tmp_path / f"{side}{suffix}" for side in (96, 128)]
    for part, side in zip(parts, (96, 128), strict=True):
        clip(width=side, height=side, num_frames=10, **codec)(part)
    with (
        av.open(str(parts[0])) as first,
        av.open(str(parts[1])) as second,
        av.open(str(tmp_path / "v.mkv"), "w") as both,
    ):
        out = both.add_stream_from_template(first.streams.video[0])
        for place, source in enumerate((first, second)):
            for packet in source.demux(video=0):
                if packet.size:
                    later = int(2 * place / packet.time_base)
                    packet.pts, packet.dts = (
                        packet.pts + later,
                        (packet.pts if packet.dts is None else packet.dts) + later,
                    )
                    packet.stream = out
                    both.mux(packet)
    with pytest.raises(ItemError, match="it scales frames that change their size"):
        load_video(str(tmp_path / "v.mkv"), ALL, decoder="decord")
