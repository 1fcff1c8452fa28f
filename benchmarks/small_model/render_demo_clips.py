"""Fresh demo clips with their truth: h264 files of moving shapes and a JSONL manifest in the pipeline's own format.

The clips come from split ``demo``, which nothing is trained or tested on. Knows nothing of the model.

    python -m benchmarks.small_model.render_demo_clips --folder configs/demo/clips --count 8
"""

from __future__ import annotations

import argparse
import json
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from benchmarks.small_model.samples import SIZE_PX, Sample
from benchmarks.small_model.videos import make_motion

RATE_FPS = 24
_NUM_FRAMES = 60
_SCALE = 2


def demo_sample(seed: int) -> Sample:
    """One clip at full frame rate; little grain, since h264 would spend its bytes on it."""
    return make_motion(np.random.default_rng([zlib.crc32(b"demo/motion"), seed]), _NUM_FRAMES, noise=0.5)


def encode(frames: np.ndarray, path: Path) -> None:
    """Uint8 [F, 112, 112, 3] -> an MP4 of twice the size."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=RATE_FPS, options={"crf": "26", "preset": "slow", "threads": "1"})
        stream.width = stream.height = SIZE_PX * _SCALE
        stream.pix_fmt = "yuv420p"
        for index, picture in enumerate(frames):
            large = picture.repeat(_SCALE, 0).repeat(_SCALE, 1)
            frame = av.VideoFrame.from_ndarray(large, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, RATE_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def render(folder: Path, count: int, first_seed: int) -> list[dict[str, str]]:
    """Write ``count`` clips and ``manifest.jsonl``; the manifest's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(first_seed, first_seed + count):
        sample = demo_sample(seed)
        truth = sample.questions[-1].answer
        name = f"clip_{seed:03d}.mp4"
        encode(sample.frames, folder / name)
        rows.append({"uri": name, "prompt": "Describe the video in one sentence.", "reference": truth})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    for row in render(args.folder, args.count, args.first_seed):
        size = (args.folder / row["uri"]).stat().st_size
        print(f"{row['uri']}  {size / 1000:.1f} kB  {row['reference']}")


if __name__ == "__main__":
    main()
