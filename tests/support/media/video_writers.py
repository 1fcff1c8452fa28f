"""Writes the files of `adversarial_videos`: encoders at their limits, bytes changed after muxing."""

from __future__ import annotations

import struct
import wave
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from tests.support.media.adversarial_media import NUM_FRAMES, VALUE
from tests.support.media.clips import barcode_frame, write_barcode_video, write_video

Write = Callable[[Path], Any]

SLOW_264 = {"crf": "23", "preset": "fast", "threads": "1"}
HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"}
CLOSED_HEVC = {**HEVC, "x265-params": HEVC["x265-params"] + ":open-gop=0"}
AV1 = {"codec": "libsvtav1", "options": {"preset": "12", "crf": "30", "svtav1-params": "lp=1"}}
VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}
FRONT = {"movflags": "+faststart"}
INTRA = {"preset": "fast", "crf": "23", "threads": "1", "x264-params": "intra-refresh=1:keyint=10"}
OPEN_264 = {"preset": "fast", "threads": "1", "x264-params": "open-gop=1:keyint=6:bframes=2"}


def clip(**encoding: Any) -> Write:
    """A barcode video."""
    return lambda path: write_barcode_video(path, VALUE, **{"num_frames": NUM_FRAMES, **encoding})


def noisy(**encoding: Any) -> Write:
    """A barcode video of 40 frames whose frames are so large that a cut loses frames, not only the index."""

    def write(path: Path) -> Any:
        noise = np.random.default_rng(0).integers(-20, 20, (40, 128, 128, 3))
        frames = (barcode_frame(VALUE, number, width=128, height=128) + noise[number] for number in range(40))
        return write_video(path, (np.clip(f, 0, 255).astype(np.uint8) for f in frames), **encoding)

    return write


def altered(write: Write, change: Callable[[bytearray], Any], suffix: str = "") -> Write:
    """What ``write`` writes, its bytes changed in place or replaced by what ``change`` returns."""

    def rewrite(path: Path) -> None:
        whole = path.with_name(f"{path.stem}.whole{suffix or path.suffix}")
        write(whole)
        data = bytearray(whole.read_bytes())
        whole.unlink()
        path.write_bytes(change(data) or data)

    return rewrite


def cut(write: Write, ratio: float, suffix: str = "") -> Write:
    """The first part of it."""
    return altered(write, lambda data: data[: max(1, int(len(data) * ratio))], suffix)


def patch(tag: bytes, offset: int, value: bytes, *, occurrence: int = 0) -> Callable[[bytearray], None]:
    """Overwrite bytes so many places behind a four-letter tag."""

    def change(data: bytearray) -> None:
        place = data.index(tag)
        for _ in range(occurrence):
            place = data.index(tag, place + 1)
        data[place + offset : place + offset + len(value)] = value

    return change


def edits(*entries: tuple[int, int]) -> Callable[[bytearray], bytearray]:
    """Other edits (duration in ms, media time in 1/10240 s) in an MP4 whose index lies behind its data."""

    def change(data: bytearray) -> bytearray:
        place = data.index(b"elst") - 4
        (old_size,) = struct.unpack_from(">I", data, place)
        body = b"".join(struct.pack(">IiI", duration, time, 1 << 16) for duration, time in entries)
        atom = struct.pack(">I4sII", 16 + len(body), b"elst", 0, len(entries)) + body
        for name in (b"moov", b"trak", b"edts"):
            at = data.index(name) - 4
            struct.pack_into(">I", data, at, struct.unpack_from(">I", data, at)[0] + len(atom) - old_size)
        return data[:place] + atom + data[place + old_size :]

    return change


def matrix(a: int, b: int, c: int, d: int) -> Callable[[bytearray], None]:
    """Another display matrix in the track header."""
    words = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return patch(b"tkhd", 44, words)


def write_ten_hours(path: Path) -> None:
    """36,000 frames, one a second: 90 frames encoded once, their packets repeated."""
    short = path.with_name("short.mp4")
    write_barcode_video(short, VALUE, num_frames=90, fps=1, keyframe_interval=30, width=64, height=64)
    with av.open(str(short)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        coded = [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in packets]
        for round_number in range(400):
            for data, pts, dts, is_keyframe in coded:
                packet = av.Packet(data)
                shift = round_number * 90 * int(1 / stream.time_base)
                packet.pts, packet.dts, packet.time_base = pts + shift, dts + shift, stream.time_base
                packet.is_keyframe, packet.stream = is_keyframe, copy
                target.mux(packet)
    short.unlink()


def _streams(path: Path, add: Callable[[Any], Iterable[tuple[Any, np.ndarray, int]]]) -> None:
    with av.open(str(path), "w") as container:
        for stream, picture, number in add(container):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        for stream in container.streams.video:
            container.mux(stream.encode())


def _video_stream(container: Any, width: int, height: int) -> Any:
    stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "threads": "1"})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.time_base = Fraction(1, 10)
    return stream


def write_two_videos(path: Path) -> None:
    """A small second picture beside the main one."""

    def add(container: Any) -> Iterable[tuple[Any, np.ndarray, int]]:
        small, main = _video_stream(container, 64, 64), _video_stream(container, 96, 96)
        for number in range(NUM_FRAMES):
            yield small, barcode_frame(1, number, width=64, height=64), number
            yield main, barcode_frame(VALUE, number), number

    _streams(path, add)


def write_sound_first(path: Path) -> None:
    """Two seconds of sound as the first stream, then the picture."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        sound.layout = "mono"
        picture = _video_stream(container, 96, 96)
        for start in range(0, 32000, 1024):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 16000, start
            container.mux(sound.encode(tone))
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(barcode_frame(VALUE, number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(picture.encode(frame))
        container.mux(sound.encode())
        container.mux(picture.encode())


def write_cover_only(path: Path) -> None:
    """Sound with a cover picture: the picture is no video."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        sound.layout = "mono"
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 96
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(barcode_frame(VALUE), format="rgb24")))
        for start in range(0, 16000, 1024):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 16000, start
            container.mux(sound.encode(tone))
        container.mux(sound.encode())
        container.mux(cover.encode())


def write_two_sizes(path: Path) -> None:
    """A transport stream whose picture changes its size midway."""
    parts = []
    for place, side in enumerate((96, 128)):
        part = path.with_name(f"part{place}.ts")
        frames = range(NUM_FRAMES // 2)
        write_barcode_video(
            part, VALUE, num_frames=10, width=side, height=side, pts=[place * 10 + number for number in frames]
        )
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))


def timestamped(data: bytearray) -> bytes:
    """A transport stream in packets of 192 bytes, as cameras write it."""
    return b"".join(struct.pack(">I", at) + data[at : at + 188] for at in range(0, len(data), 188))


def write_wav(path: Path) -> None:
    """Sound."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))


def damage(data: bytearray) -> None:
    """Noise over a part of the coded frames."""
    middle = len(data) // 2
    data[middle : middle + 6000] = np.random.default_rng(1).bytes(6000)


def blank_media(data: bytearray) -> None:
    """All coded frames overwritten by zeros; the index stays."""
    at = data.index(b"mdat")
    (size,) = struct.unpack_from(">I", data, at - 4)
    data[at + 4 : at + size - 4] = bytes(size - 8)


def write_sizes_in_one_track(path: Path) -> None:
    """The same in Matroska, whose header says only the first size."""
    whole = path.with_suffix(".ts")
    write_two_sizes(whole)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = copy
                target.mux(packet)
    whole.unlink()


def write_under_a_pattern(path: Path) -> None:
    """A video whose name is a pattern for one of FFmpeg's demuxers, and a picture that fits the pattern."""
    clip()(path.with_suffix(".mp4"))
    path.with_suffix(".mp4").rename(path)
    path.with_name("pattern000.png").write_bytes(b"\x89PNG\r\n\x1a\n")


def huge_frames(data: bytearray) -> None:
    """JPEG frames that say they have 65,500 x 65,500 pixels."""
    place = -1
    while (place := data.find(b"\xff\xc0", place + 1)) >= 0:
        data[place + 5 : place + 9] = struct.pack(">HH", 65500, 65500)
