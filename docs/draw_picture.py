"""Draw docs/images/kept_tokens.png: what the bundled model keeps of a bundled clip.

  python docs/draw_picture.py

`jobs/draw_kept_tokens.py` writes one strip of frames for each step. This script stacks three of them: the input, the
tower's last step and the language model's step.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "kept_tokens.png"
SETTINGS = {
    "input.pattern": "clip_003.mp4",
    "media.num_frames": 4,
    "reduction": "{steps: ["
    "{stage: vision_block, layers: [2, 3, 4, 5], reducer: {kind: illava, num_merged: 24}}, "
    "{stage: decoder_layer, layers: [2], reducer: "
    "{kind: illava, keep_ratio: 0.30, score: causal_normalised, per: prompt}}]}",
}
STEPS = ("input", "tower-block-5", "language-model-before-layer-2")


def main() -> None:
    """Run the job and stack its strips."""
    with TemporaryDirectory() as folder:
        settings = {**SETTINGS, "output.uri": folder}
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        job = [sys.executable, "jobs/draw_kept_tokens.py", "--config", "configs/draw_demo.yaml", "--limit", "1", *sets]
        subprocess.run(job, cwd=ROOT, check=True)
        page = Path(folder, "kept_tokens.html").read_text("utf-8")
        strips = [Image.open(next(Path(folder).glob(f"000-*-{step}.png"))) for step in STEPS]
        width, height = strips[0].size
        canvas = Image.new("RGB", (width, height * len(strips)), "white")
        for row, strip in enumerate(strips):
            canvas.paste(strip, (0, row * height))
        canvas.quantize(128).save(PICTURE, optimize=True)
    print("\n".join(line for line in page.splitlines() if "visual tokens of" in line and "src" not in line))


if __name__ == "__main__":
    main()
