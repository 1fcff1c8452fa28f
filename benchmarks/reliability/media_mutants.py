"""Makes broken media by seed: a seed fixes the original file and how its bytes are changed.

The installed encoders make the originals: with other versions of them, a seed gives another mutant.
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.support.media import adversarial_documents, adversarial_pictures, video_writers

_VIDEO_FRONT = {"options": video_writers.SLOW_264, "container_options": video_writers.FRONT}
_WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.mp4": video_writers.clip(**_VIDEO_FRONT),
    "b.mp4": video_writers.clip(container_options={"movflags": "frag_keyframe+empty_moov"}),
    "c.mp4": video_writers.clip(codec="mpeg4"),
    "a.mkv": video_writers.clip(codec="libx265", options=video_writers.CLOSED_HEVC),
    "a.webm": video_writers.clip(**video_writers.VP9),
    "b.webm": video_writers.clip(**video_writers.AV1),
    "a.ts": video_writers.clip(),
    "a.avi": video_writers.clip(codec="mpeg4"),
    "a.png": adversarial_pictures.saved(),
    "a.jpg": adversarial_pictures.oriented(6),
    "a.webp": adversarial_pictures.animated,
    "a.gif": adversarial_pictures.animated,
    "a.tiff": adversarial_pictures.saved(compression="tiff_adobe_deflate"),
    "a.pdf": lambda path: path.write_bytes(adversarial_documents.pdf(3)),
}
_EDGES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


@cache
def originals() -> dict[str, bytes]:
    """Return name -> content of a whole file."""
    with tempfile.TemporaryDirectory() as folder:
        for name, write in _WRITERS.items():
            write(Path(folder, name))
        return {name: Path(folder, name).read_bytes() for name in _WRITERS}


def mutant(seed: int) -> tuple[str, bytes]:
    """Return the extension and the bytes of one seed's file."""
    draws = random.Random(f"mutant {seed}")
    name = draws.choice(sorted(_WRITERS))
    data = bytearray(originals()[name])
    for _ in range(draws.choice((1, 1, 2, 4, 16))):
        draws.choice(_MUTATIONS)(data, draws)
    return Path(name).suffix, bytes(data)


def _place(data: bytearray, draws: random.Random) -> int:
    """Draw a position; half of the draws lie in the first or last 2,000 bytes, where headers and indices are."""
    near = min(len(data), 2000)
    return draws.choice(
        (draws.randrange(len(data) + 1), draws.randrange(near + 1), len(data) - draws.randrange(near + 1))
    )


def _flip_bits(data: bytearray, draws: random.Random) -> None:
    for _ in range(draws.choice((1, 8, 64))):
        if data:
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)


def _write_edge(data: bytearray, draws: random.Random) -> None:
    """Write a number at the edge of its range, in either byte order, over four or two bytes."""
    place, edge = _place(data, draws), draws.choice(_EDGES)
    word = struct.pack(draws.choice("<>") + "I", edge)[: draws.choice((2, 4))]
    data[place : place + len(word)] = word


def _write_noise(data: bytearray, draws: random.Random) -> None:
    place, noise = _place(data, draws), draws.randbytes(draws.choice((1, 16, 400, 4000)))
    data[place : place + len(noise)] = noise


def _insert_noise(data: bytearray, draws: random.Random) -> None:
    place = _place(data, draws)
    data[place:place] = draws.randbytes(draws.choice((1, 7, 188, 1000)))


def _delete(data: bytearray, draws: random.Random) -> None:
    place = _place(data, draws)
    del data[place : place + draws.choice((1, 4, 188, 2000))]


def _repeat(data: bytearray, draws: random.Random) -> None:
    place, length = _place(data, draws), draws.choice((4, 64, 1000))
    data[place:place] = data[place : place + length] * draws.choice((1, 1, 50))


def _blank(data: bytearray, draws: random.Random) -> None:
    place, length = _place(data, draws), draws.choice((4, 200, 5000))
    data[place : place + length] = bytes(len(data[place : place + length]))


def _cut(data: bytearray, draws: random.Random) -> None:
    del data[_place(data, draws) :]


def _splice(data: bytearray, draws: random.Random) -> None:
    """Replace a part of this original by a part of another one."""
    other = originals()[draws.choice(sorted(_WRITERS))]
    start, place = draws.randrange(len(other)), _place(data, draws)
    data[place : place + 1000] = other[start : start + draws.choice((16, 1000, 5000))]


_MUTATIONS = (
    _flip_bits,
    _write_edge,
    _write_edge,
    _write_noise,
    _insert_noise,
    _delete,
    _repeat,
    _blank,
    _cut,
    _splice,
)
