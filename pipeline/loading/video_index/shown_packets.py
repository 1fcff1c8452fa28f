"""Tells by their headers which packets of a stream show a frame: VP8 and VP9 have hidden frames, h264 may have fields.

A frame of field-coded h264 is two pictures, each of which may have a packet of its own; the frame has the time of the
first. Elsewhere every packet shows a frame. Where that does not hold, the decoder finds out
(`pyav_video.list_frames`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.loading.video_index.nal import length_size, unescaped, unit_type, units

_SLICES, _SPS, _PPS = frozenset({1, 2, 5}), 7, 8
_HEADER_BYTES = 64  # of a slice: its header is shorter
_WITH_CHROMA = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244})  # profiles
_SHOWS = Callable[[bytes], bool]


def packet_reader(codec: str, extradata: bytes | None) -> _SHOWS | None:
    """Return a function that takes a stream's packets in order and says whether each shows a frame.

    None where every packet of the codec does.
    """
    if codec == "vp8":
        return _vp8_shows
    if codec == "vp9":
        return _vp9_shows
    return FieldReader(extradata).shows if codec == "h264" else None


def is_frame_coded(extradata: bytes | None) -> bool:
    """Whether the extradata of an h264 stream alone tells that it has no fields."""
    reader = FieldReader(extradata)
    return bool(reader.sequences) and not reader.may_have_fields


def sequence_sets(extradata: bytes | None) -> list[bytes]:
    """Return the sequence parameter sets of h264's extradata."""
    return [unit.rstrip(b"\0") for unit in _parameter_sets(extradata or b"") if unit[0] & 0x1F == _SPS]


def _vp8_shows(packet: bytes) -> bool:
    """Source: RFC 6386, 9.1: bit 4 of the frame tag is show_frame."""
    return bool(packet[0] >> 4 & 1)


def _vp9_shows(packet: bytes) -> bool:
    """Source: VP9 bitstream specification, 6.2 and annex B: a superframe always shows a frame."""
    if packet[-1] >> 5 == 0b110:
        return True
    bits = _Bits(packet[:2])
    bits.read(2)
    if bits.read(1) + 2 * bits.read(1) == 3:
        bits.read(1)
    if bits.read(1):  # show_existing_frame
        return True
    bits.read(1)
    return bool(bits.read(1))


class _Sequence(NamedTuple):
    has_planes: bool
    num_frame_bits: int
    may_have_fields: bool


@dataclass(slots=True)
class _Field:
    frame_num: int
    is_bottom: bool


class FieldReader:
    """Pairs the fields of an h264 stream as FFmpeg's decoder does: neighbours of opposite parity and one number.

    Source: ITU-T H.264, 7.3.2.1.1, 7.3.2.2 and 7.3.3; FFmpeg@n8.0:libavcodec/h264_slice.c, h264_field_start.
    """

    def __init__(self, extradata: bytes | None) -> None:
        self.sequences: dict[int, _Sequence] = {}
        self._sequence_of: dict[int, int] = {}
        self._first: _Field | None = None
        self._num_length_bytes = length_size("h264", extradata)
        for unit in _parameter_sets(extradata or b""):
            self._keep(unit)

    @property
    def may_have_fields(self) -> bool:
        """Whether a sequence so far may have fields."""
        return any(sequence.may_have_fields for sequence in self.sequences.values())

    def shows(self, packet: bytes) -> bool:
        """Whether a packet begins a frame: it is no second field."""
        fields: list[_Field] = []
        for start, end in units(packet, self._num_length_bytes):
            kind = unit_type(packet, start, "h264")
            if kind in {_SPS, _PPS}:
                self._keep(packet[start:end])
            elif kind in _SLICES:
                if not self.may_have_fields:
                    return True
                field = self._field(packet[start : start + _HEADER_BYTES])
                if field is None:
                    self._first = None
                    return True
                fields.append(field)
        if len({field.is_bottom for field in fields}) != 1:
            self._first = None
            return True
        field, first = fields[0], self._first
        is_second = first is not None and (first.is_bottom, first.frame_num) == (not field.is_bottom, field.frame_num)
        self._first = None if is_second else field
        return not is_second

    def _keep(self, unit: bytes) -> None:
        try:
            bits = _Bits(unescaped(unit[1:]))
            if unit[0] & 0x1F == _SPS:
                number, sequence = _read_sequence(bits)
                self.sequences[number] = sequence
            else:
                number = bits.golomb()
                self._sequence_of[number] = bits.golomb()
        except (IndexError, ValueError):  # the decoder refuses a damaged set, too
            return

    def _field(self, unit: bytes) -> _Field | None:
        """Return which field a slice belongs to; None where it belongs to a frame."""
        bits = _Bits(unescaped(unit[1:]))
        try:
            bits.golomb()
            bits.golomb()
            sequence = self.sequences.get(self._sequence_of.get(bits.golomb(), -1))
            if sequence is None or not sequence.may_have_fields:
                return None
            bits.read(2 if sequence.has_planes else 0)
            frame_num = bits.read(sequence.num_frame_bits)
            return _Field(frame_num, bool(bits.read(1))) if bits.read(1) else None
        except (IndexError, ValueError):
            return None


def _parameter_sets(extradata: bytes) -> Iterator[bytes]:
    """Yield the sets of avcC, or of Annex B."""
    if not extradata or extradata[0] != 1:
        yield from (extradata[start:].partition(b"\0\0\1")[0] for start, _ in units(extradata, 0))
        return
    place = 5
    for mask in (0x1F, 0xFF):
        count = extradata[place] & mask if place < len(extradata) else 0
        place += 1
        for _ in range(count):
            start = place + 2
            place = start + int.from_bytes(extradata[place:start])
            if start < min(place, len(extradata)):
                yield extradata[start:place]


def _read_sequence(bits: _Bits) -> tuple[int, _Sequence]:
    profile = bits.read(8)
    bits.read(16)
    number, has_planes = bits.golomb(), False
    if profile in _WITH_CHROMA:
        chroma = bits.golomb()
        has_planes = chroma == 3 and bool(bits.read(1))
        bits.golomb()
        bits.golomb()
        bits.read(1)
        if bits.read(1):
            for place in range(12 if chroma == 3 else 8):
                if bits.read(1):
                    _skip_scaling_list(bits, 16 if place < 6 else 64)
    num_frame_bits = bits.golomb() + 4
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.read(1)
        bits.golomb()
        bits.golomb()
        for _ in range(min(bits.golomb(), 255)):
            bits.golomb()
    bits.golomb()
    bits.read(1)
    bits.golomb()
    bits.golomb()
    return number, _Sequence(has_planes, num_frame_bits, not bits.read(1))


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.golomb()
            delta = (code + 1) // 2 if code % 2 else -(code // 2)
            following = (last + delta) % 256
        last = following or last


class _Bits:
    """Reads bits from the first on."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def read(self, count: int) -> int:
        """Return so many bits. Raises `IndexError` behind the end."""
        value = 0
        for place in range(self._place, self._place + count):
            value = value << 1 | (self._data[place >> 3] >> (7 - (place & 7)) & 1)
        self._place += count
        return value

    def golomb(self) -> int:
        """Return an unsigned Exp-Golomb code. Raises `ValueError` for one that no header has."""
        num_zeros = 0
        while not self.read(1):
            num_zeros += 1
            if num_zeros > 32:
                raise ValueError("a code of more than 32 bits")
        return (1 << num_zeros) - 1 + self.read(num_zeros)
