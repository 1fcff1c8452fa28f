"""Makes long videos for tests quickly: a few encoded groups of pictures, repeated packet by packet."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.support.media.clips import barcode_frame, write_video


def noisy_frames(num_frames: int, *, side: int = 128, value: int = 7) -> list[np.ndarray]:
    """Barcode frames, uint8 [side, side, 3], that no codec can make tiny."""
    noise = np.random.default_rng(0).integers(-20, 20, (num_frames, side, side, 3))
    frames = (barcode_frame(value, index, width=side, height=side) for index in range(num_frames))
    return [np.clip(frame + noise[index], 0, 255).astype(np.uint8) for index, frame in enumerate(frames)]


def write_long_video(
    path: str | Path,
    folder: Path,
    *,
    duration_s: int,
    fps: int = 15,
    side: int = 128,
    faststart: bool = False,
    with_audio: bool = True,
) -> Path:
    """An mp4 of h264 with B-frames, a key frame every 2 s, silence beside it; a cycle of 20 s repeats to the end."""
    options = {"crf": "20", "preset": "fast", "threads": "1", "bf": "2", "x264-params": "scenecut=0"}
    frames = noisy_frames(20 * fps, side=side)
    cycle = write_video(folder / "cycle.mp4", frames, fps=fps, keyframe_interval=2 * fps, options=options)
    return repeat_video(
        cycle, path, cycle_s=20, fps=fps, duration_s=duration_s, faststart=faststart, with_audio=with_audio
    )


def repeat_video(
    cycle: Path,
    path: str | Path,
    *,
    cycle_s: int,
    fps: int,
    duration_s: int,
    faststart: bool = False,
    with_audio: bool = True,
) -> Path:
    """An mp4 in which the packets of a clip of ``cycle_s`` seconds repeat to the end, silence beside them."""
    front = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(cycle)) as source, av.open(str(path), "w", options=front) as target:
        video = target.add_stream_from_template(source.streams.video[0])
        audio = target.add_stream("aac", rate=16000) if with_audio else None
        if audio:
            audio.layout = "mono"
        packets = [packet for packet in source.demux(video=0) if packet.size]
        ticks = int(1 / (packets[0].time_base * fps))
        for start_s in range(0, duration_s, cycle_s):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = packet.pts + start_s * fps * ticks, packet.dts + start_s * fps * ticks
                copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, video
                target.mux(copy)
            if audio:
                for sample in range(start_s * 16000, (start_s + cycle_s) * 16000 - 1024, 1024):
                    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                    frame.sample_rate, frame.pts, frame.time_base = 16000, sample, Fraction(1, 16000)
                    target.mux(audio.encode(frame))
        if audio:
            target.mux(audio.encode(None))
    return Path(path)
