"""Renders the demo's sample clips: eight small real h264 MP4 files, each one coloured shape on its own path.

Drawn with numpy, encoded with PyAV; knows nothing of the pipeline. The clips are kept in the repository, so this runs
only to change them: ``python benchmarks/render_clips.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLIPS = Path(__file__).resolve().parent.parent / "configs" / "demo" / "clips"
SIZE_PX = 224
RATE_FPS = 24
EDGE = 2.0 / SIZE_PX  # width of the soft edge, in units of half a picture

Array = np.ndarray
Colour = tuple[int, int, int]


def circle(x: Array, y: Array) -> Array:
    """Signed distance of every pixel to a unit shape's edge, negative inside; so in all shapes below."""
    return np.hypot(x, y) - 1


def square(x: Array, y: Array) -> Array:
    return np.maximum(abs(x), abs(y)) - 0.9


def diamond(x: Array, y: Array) -> Array:
    return (abs(x) + abs(y) - 1.15) / np.sqrt(2)


def triangle(x: Array, y: Array) -> Array:
    return np.maximum(y - 0.6, (abs(x) * np.sqrt(3) - y) / 2 - 0.6)


def ring(x: Array, y: Array) -> Array:
    return abs(np.hypot(x, y) - 0.75) - 0.27


def cross(x: Array, y: Array) -> Array:
    return np.minimum(np.maximum(abs(x) - 0.33, abs(y) - 1), np.maximum(abs(x) - 1, abs(y) - 0.33))


def star(x: Array, y: Array) -> Array:
    angle = np.arctan2(x, -y)
    return np.hypot(x, y) - (0.75 + 0.3 * np.cos(5 * angle))


def bar(x: Array, y: Array) -> Array:
    return np.maximum(abs(x) - 1.2, abs(y) - 0.35)


# Paths: progress in [0, 1] -> centre (x, y) in [-1, 1], x to the right and y down; scale; turn in radians.
Path4 = tuple[float, float, float, float]
MOTIONS: dict[str, Callable[[float], Path4]] = {
    "moves_right": lambda t: (-0.65 + 1.3 * t, 0.0, 0.28, 0.0),
    "moves_left": lambda t: (0.65 - 1.3 * t, 0.1, 0.28, 0.0),
    "rises": lambda t: (-0.2, 0.65 - 1.3 * t, 0.28, 0.0),
    "falls": lambda t: (0.25, -0.65 + 1.3 * t, 0.28, 0.0),
    "grows": lambda t: (0.0, 0.0, 0.12 + 0.5 * t, 0.0),
    "turns": lambda t: (0.0, 0.0, 0.42, np.pi * t),
    "circles": lambda t: (0.5 * np.cos(2 * np.pi * t), 0.5 * np.sin(2 * np.pi * t), 0.25, 0.0),
    "bounces": lambda t: (-0.6 + 1.2 * t, 0.55 - 1.0 * abs(np.sin(3 * np.pi * t)), 0.25, 0.0),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip: what moves how, on which ground, for how long."""

    name: str
    shape: Callable[[Array, Array], Array]
    colour: Colour
    motion: str
    ground: Colour
    duration_s: float


SCENES = (
    Scene("red_circle_moves_right", circle, (214, 48, 49), "moves_right", (228, 230, 235), 3.0),
    Scene("blue_square_rises", square, (34, 85, 204), "rises", (240, 232, 214), 2.5),
    Scene("green_triangle_falls", triangle, (32, 150, 72), "falls", (222, 228, 240), 2.5),
    Scene("yellow_star_turns", star, (245, 205, 40), "turns", (44, 52, 72), 4.0),
    Scene("purple_ring_grows", ring, (130, 60, 180), "grows", (226, 236, 226), 3.0),
    Scene("orange_diamond_moves_left", diamond, (240, 130, 30), "moves_left", (40, 60, 60), 2.0),
    Scene("cyan_cross_circles", cross, (40, 190, 210), "circles", (60, 40, 56), 4.0),
    Scene("pink_bar_bounces", bar, (240, 110, 170), "bounces", (36, 40, 48), 3.5),
)


def frames(scene: Scene) -> Iterator[Array]:
    """uint8 [SIZE_PX, SIZE_PX, 3], one a frame."""
    axis = (np.arange(SIZE_PX) + 0.5) / SIZE_PX * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    shade = (1.0 - 0.12 * (y + 1) / 2)[..., None]  # a soft gradient, so that the ground is not one flat value
    ground = np.array(scene.ground) * shade
    num_frames = round(scene.duration_s * RATE_FPS)
    for index in range(num_frames):
        centre_x, centre_y, scale, turn = MOTIONS[scene.motion](index / (num_frames - 1))
        u, v = (x - centre_x) / scale, (y - centre_y) / scale
        u, v = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
        cover = np.clip(0.5 - scene.shape(u, v) * scale / EDGE, 0, 1)[..., None]
        yield np.rint(ground * (1 - cover) + np.array(scene.colour) * cover).astype(np.uint8)


def render(scene: Scene, folder: Path) -> Path:
    """One clip as ``folder/<name>.mp4``, the same bytes every time for one version of x264."""
    path = folder / f"{scene.name}.mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=RATE_FPS, options={"crf": "26", "preset": "slow", "threads": "1"})
        stream.width = stream.height = SIZE_PX
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = RATE_FPS
        for index, picture in enumerate(frames(scene)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, RATE_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=CLIPS)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for scene in SCENES:
        path = render(scene, folder)
        print(f"{path}  {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
