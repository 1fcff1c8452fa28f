"""Writes videos whose packets are not their frames, or whose times are not in order: remuxed, joined and cut ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
from av.bitstream import BitStreamFilterContext

DATA = Path(__file__).resolve().parents[2] / "pipeline" / "loading" / "data"
TS_BYTES = 188


@dataclass(frozen=True)
class Coded:
    """One packet of a video stream; times in the stream's time base."""

    data: bytes
    pts: int | None
    dts: int | None
    is_keyframe: bool


Change = Callable[[Sequence[Coded]], Sequence[Coded]]


def remux(source: Path, target: Path, *, change: Change = list, bitstream_filter: str | None = None) -> Path:
    """Copy a video's packets into another container, changed or filtered."""
    with av.open(str(source)) as file, av.open(str(target), "w") as copy:
        stream = file.streams.video[0]
        out = copy.add_stream_from_template(stream)
        filtered = BitStreamFilterContext(bitstream_filter, stream, out) if bitstream_filter else None
        packets = [packet for packet in file.demux(stream) if packet.size]
        if filtered:
            packets = [one for packet in packets for one in filtered.filter(packet)]
            packets += filtered.filter(None)
        coded = [Coded(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in packets]
        for one in change(coded):
            packet = av.Packet(one.data)
            packet.pts, packet.dts, packet.time_base = one.pts, one.dts, stream.time_base
            packet.is_keyframe, packet.stream = one.is_keyframe, out
            copy.mux(packet)
    return target


def with_pts(*pairs: tuple[int, int]) -> Change:
    """Give one packet the time of another: (place of the packet, place of the other), in decoding order."""

    def change(coded: Sequence[Coded]) -> list[Coded]:
        changed = list(coded)
        for place, other in pairs:
            changed[place] = replace(coded[place], pts=coded[other].pts)
        return changed

    return change


def two_in_one(coded: Sequence[Coded]) -> list[Coded]:
    """Join every two packets, such as those of two fields, into one."""
    pairs = zip(coded[::2], coded[1::2], strict=True)
    return [replace(first, data=first.data + second.data) for first, second in pairs]


def moved(write: Callable[[Path], Any], suffix: str, **options: Any) -> Callable[[Path], Any]:
    """What ``write`` writes as a file of that suffix, remuxed."""

    def rewrite(path: Path) -> None:
        first = path.with_name(f"{path.stem}.first{suffix}")
        write(first)
        remux(first, path, **options)
        first.unlink()

    return rewrite


def joined(*writes: Callable[[Path], Any], suffix: str = "") -> Callable[[Path], Any]:
    """Several files one after the other, as `cat` joins recordings."""

    def write(path: Path) -> None:
        parts = []
        for part_write in writes:
            part = path.with_name(f"{path.stem}.part{suffix or path.suffix}")
            part_write(part)
            parts.append(part.read_bytes())
            part.unlink()
        path.write_bytes(b"".join(parts))

    return write


def from_data(name: str) -> Callable[[Path], Any]:
    """A file of the data folder."""
    return lambda path: path.write_bytes((DATA / name).read_bytes())


def begun_late(num_frames: int) -> Callable[[bytearray], bytes]:
    """A transport stream without its first frames, as a recorder begins within a programme; its tables stay."""

    def change(data: bytearray) -> bytes:
        packets = [bytes(data[at : at + TS_BYTES]) for at in range(0, len(data), TS_BYTES)]
        video = [place for place, one in enumerate(packets) if _pid(one) == 0x100 and one[1] & 0x40]
        return b"".join(packets[:3] + packets[video[num_frames] :])

    return change


def without_packet(before_frame: int) -> Callable[[bytearray], bytes]:
    """A transport stream that lost the packet before a frame begins."""

    def change(data: bytearray) -> bytes:
        packets = [bytes(data[at : at + TS_BYTES]) for at in range(0, len(data), TS_BYTES)]
        video = [place for place, one in enumerate(packets) if _pid(one) == 0x100]
        begin = [place for place in video if packets[place][1] & 0x40][before_frame]
        del packets[max(place for place in video if place < begin)]
        return b"".join(packets)

    return change


def scrambled(data: bytearray) -> bytes:
    """A transport stream whose pictures are marked as scrambled."""
    for at in range(0, len(data), TS_BYTES):
        if _pid(data[at : at + TS_BYTES]) == 0x100:
            data[at + 3] |= 0x80
    return bytes(data)


def _pid(packet: bytes) -> int:
    return int.from_bytes(packet[1:3]) & 0x1FFF


def hidden(place: int, bit: int) -> Callable[[bytearray], None]:
    """Clear the bit of a packet's first byte that says whether its frame is shown; muxers would join it to the next."""

    def change(data: bytearray) -> None:
        with av.open(io.BytesIO(data)) as file:
            packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
        data[data.index(packets[place])] &= ~bit

    return change


def encrypted_webm(path: Path) -> None:
    """A WebM file whose track names a key (ContentEncryption of the WebM encryption guidelines), of one VP8 frame."""
    key = _element("47E1", b"\x05") + _element("47E2", bytes(range(16)))
    encryption = _element("5033", b"\x01") + _element("5032", b"\x01") + _element("5035", key)
    encodings = _element("6D80", _element("6240", _element("5031", b"\x00") + encryption))
    size = _element("B0", b"\x60") + _element("BA", b"\x60")
    track = b"".join(_element(name, b"\x01") for name in ("D7", "73C5", "83")) + _element("86", b"V_VP8")
    tracks = _element("1654AE6B", _element("AE", track + _element("E0", size) + encodings))
    cluster = _element("1F43B675", _element("E7", b"\x00") + _element("A3", b"\x81\x00\x00\x80" + bytes(99)))
    header = _element("1A45DFA3", _element("4282", b"webm"))
    path.write_bytes(header + _element("18538067", tracks + cluster))


def _element(name: str, body: bytes) -> bytes:
    return bytes.fromhex(name) + b"\x01" + len(body).to_bytes(7) + body
