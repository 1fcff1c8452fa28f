"""Makes videos for tests: frames that carry their own numbers, and files that are hard to read or broken.

A barcode frame is a 6 x 6 grid of black and white cells that survives h264 and a resize down to 56 px: 20 bits of
value, 12 bits of frame number, 4 bits of checksum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

GRID = 6
VALUE_BITS, FRAME_BITS, CHECK_BITS = 20, 12, 4


def _checksum(payload: int) -> int:
    total = 5
    while payload:
        total, payload = total * 3 + payload % 16, payload // 16
    return total % 16


def barcode_frame(value: int, frame_number: int = 0, *, width: int = 96, height: int = 96) -> np.ndarray:
    """uint8 [height, width, 3]."""
    if not 0 <= value < 1 << VALUE_BITS or not 0 <= frame_number < 1 << FRAME_BITS:
        raise ValueError(f"value {value} or frame number {frame_number} does not fit the barcode")
    payload = value << FRAME_BITS | frame_number
    code = payload << CHECK_BITS | _checksum(payload)
    bits = np.array([code >> bit & 1 for bit in range(GRID * GRID)], dtype=np.uint8).reshape(GRID, GRID)
    rows, cols = np.arange(height) * GRID // height, np.arange(width) * GRID // width
    luma = 24 + 208 * bits[rows[:, None], cols[None, :]]
    return np.repeat(luma[..., None], 3, axis=2).astype(np.uint8)


def _read(frame: np.ndarray) -> int:
    frame = np.asarray(frame)
    if frame.ndim == 3 and frame.shape[0] == 3 and frame.shape[2] != 3:
        frame = frame.transpose(1, 2, 0)
    luma = frame.astype(np.float64).mean(axis=2)
    height, width = luma.shape
    code = 0
    for bit in range(GRID * GRID):
        row, col = divmod(bit, GRID)
        top, left = (row + 0.3) * height / GRID, (col + 0.3) * width / GRID
        cell = luma[round(top) : round(top + 0.4 * height / GRID), round(left) : round(left + 0.4 * width / GRID)]
        code |= int(cell.mean() > 128) << bit
    payload = code >> CHECK_BITS
    if _checksum(payload) != code & (1 << CHECK_BITS) - 1:
        raise ValueError("no barcode in this frame: its checksum is wrong")
    return payload


def read_barcode(frame: np.ndarray) -> int:
    """The value in a uint8 frame, [H, W, 3] or [3, H, W], H and W >= 56. Raises ValueError where there is none."""
    return _read(frame) >> FRAME_BITS


def read_frame_number(frame: np.ndarray) -> int:
    """Which frame of its video this is."""
    return _read(frame) & (1 << FRAME_BITS) - 1


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    fps: int = 10,
    codec: str = "libx264",
    pts: Sequence[int] | None = None,
    rotation: int = 0,
    keyframe_interval: int = 12,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode uint8 [H, W, 3] frames; ``pts`` counts in 1/fps, for variable frame rates."""
    defaults = {
        "libx264": {"crf": "18", "preset": "ultrafast", "threads": "1"},
        "libsvtav1": {"preset": "12", "crf": "30"},
    }
    options = options or defaults.get(codec, {})
    if codec == "libsvtav1":  # its threads, dozens by default, once waited for each other for ever
        options = {"svtav1-params": "lp=1", **options}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.pix_fmt, stream.codec_context.gop_size = pix_fmt, keyframe_interval
        stream.codec_context.time_base = Fraction(1, fps)
        for index, picture in enumerate(frames):
            if index == 0:
                stream.height, stream.width = picture.shape[:2]
                if rotation:
                    stream.set_display_rotation(rotation)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = (pts[index] if pts else index), Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def write_barcode_video(
    path: str | Path, value: int, *, num_frames: int = 20, width: int = 96, height: int = 96, **encoding: object
) -> Path:
    """A video whose every frame carries ``value`` and its own number; ``encoding`` goes to `write_video`."""
    frames = (barcode_frame(value, index, width=width, height=height) for index in range(num_frames))
    return write_video(path, frames, **encoding)


def write_audio_only(path: str | Path, *, duration_s: float = 1.0) -> Path:
    """An MP4 with one AAC stream and no picture."""
    rate = 16000
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate)
        stream.layout = "mono"
        for start in range(0, int(duration_s * rate), 1024):
            tone = np.sin(np.arange(start, start + 1024) / 20).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def write_truncated(path: str | Path, whole: str | Path, *, keep_ratio: float = 0.5) -> Path:
    """The first part of a file: of an MP4 with its index in front, all frames are declared and some are missing."""
    data = Path(whole).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * keep_ratio)])
    return Path(path)
