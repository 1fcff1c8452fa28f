"""Chooses the frames of a clip that the model sees: pure arithmetic on frame times."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.config.schema import FrameSampling

_TIME_EPSILON_S = 1e-6  # a frame due at exactly a grid time counts as shown, whatever the last bits of the times


@dataclass(frozen=True, slots=True)
class Timeline:
    """Lists every frame of a clip, in display order.

    Attributes:
        timestamps_s: when each frame appears, ascending, the first at 0; exact for variable frame rates too.
        keyframes: indices of the frames that need no other frame.
    """

    timestamps_s: tuple[float, ...]
    keyframes: tuple[int, ...]


def choose_frames(timeline: Timeline, sampling: FrameSampling, *, num_frames: int) -> tuple[int, ...]:
    """Return the indices of the frames to load: ascending, each once, at most ``num_frames``.

    A clip with fewer frames gives all of them: no frame is repeated.

    - ``uniform``: evenly spaced by frame number from the first frame to the last (`spread`).
    - ``fps``: the frame shown at 0, 1/fps, 2/fps, ... seconds, until the last frame appears; then `spread`.
    - ``keyframe``: the key frames; then `spread`. Empty where the container marks none.
    """
    if sampling.kind == "uniform":
        candidates: tuple[int, ...] = tuple(range(len(timeline.timestamps_s)))
    elif sampling.kind == "fps":
        candidates = _at_rate(timeline.timestamps_s, sampling.fps)
    else:
        candidates = timeline.keyframes
    return tuple(candidates[place] for place in spread(len(candidates), num_frames))


def spread(num_available: int, num_wanted: int) -> tuple[int, ...]:
    """Return ``min(num_available, num_wanted)`` different indices from first to last, evenly spaced, rounded down.

    Source: ``np.linspace(0, num_available - 1, num_wanted, dtype=int)`` of LLaVA-NeXT's video loading, called as it
    stands there so that the same frames are chosen; only its repetitions on short clips are left out.
    """
    if num_available <= num_wanted:
        return tuple(range(num_available))
    return tuple(np.linspace(0, num_available - 1, num_wanted, dtype=int).tolist())


def _at_rate(timestamps_s: tuple[float, ...], rate_fps: float) -> tuple[int, ...]:
    if not timestamps_s:
        return ()
    num_ticks = int((timestamps_s[-1] + _TIME_EPSILON_S) * rate_fps) + 1
    shown = (bisect_right(timestamps_s, tick / rate_fps + _TIME_EPSILON_S) - 1 for tick in range(num_ticks))
    return tuple(dict.fromkeys(shown))
