"""Renders h264 clips with reference answers, and manifests of captions and questions in the pipeline's own format.

The clips come from split ``demo``, which nothing is trained or tested on.

    python -m benchmarks.toy_model.data.render_clips --folder configs/demo/clips --count 8
    python -m benchmarks.toy_model.data.render_clips --folder runs/clips --count 70 --kinds motion order
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.toy_model.data.samples import SIZE_PX, Question, Sample
from benchmarks.toy_model.data.videos import make_motion, make_order

RATE_FPS = 24
KINDS = {"motion": make_motion, "order": make_order}
_NUM_FRAMES = 60
_SCALE = 2
_OPTION = re.compile(r" [A-D]\. ")


def demo_sample(kind: str, seed: int) -> Sample:
    """One clip at full frame rate; little grain, since h264 would spend its bytes on it."""
    return KINDS[kind](np.random.default_rng([zlib.crc32(f"demo/{kind}".encode()), seed]), _NUM_FRAMES, noise=0.5)


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


def question_row(uri: str, question: Question) -> dict[str, Any]:
    """A row for `jobs/answer_questions.py`; lettered options stay in the question, as the demo model learnt."""
    options = _OPTION.split(question.text)[1:]
    row: dict[str, Any] = {"uri": uri, "question": question.text, "reference": question.answer}
    row["category"] = question.task.removeprefix("video_").removesuffix("_video")
    if options:
        row["options"] = options
    elif question.answer in ("yes", "no"):
        row["metric"] = "yes_no"
    return row


def choose(sample: Sample, seed: int, count: int) -> list[Question]:
    """The caption, and ``count`` other questions drawn by ``seed``, none twice."""
    caption, others = (
        sample.questions[-1],
        list({question.text: question for question in sample.questions[:-1]}.values()),
    )
    order = np.random.default_rng([6, seed]).permutation(len(others))[:count]
    return [caption, *(others[index] for index in sorted(order))]


def render(
    folder: Path, count: int, first_seed: int, *, kinds: Sequence[str] = ("motion",), num_questions: int = 3
) -> int:
    """Write ``count`` clips, ``manifest.jsonl`` (a caption a clip) and ``questions.jsonl``; how many questions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions, questions = [], []
    for number in range(count):
        seed = first_seed + number
        sample = demo_sample(kinds[number % len(kinds)], seed)
        name = f"clip_{seed:03d}.mp4"
        encode(sample.frames, folder / name)
        caption = sample.questions[-1].answer
        captions.append({"uri": name, "prompt": "Describe the video in one sentence.", "reference": caption})
        questions += [question_row(name, question) for question in choose(sample, seed, num_questions)]
    for file, rows in (("manifest.jsonl", captions), ("questions.jsonl", questions)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=["motion"])
    parser.add_argument("--num-questions", "--asked", type=int, default=3, help="a clip, beside its caption")
    args = parser.parse_args()
    total = render(args.folder, args.count, args.first_seed, kinds=args.kinds, num_questions=args.num_questions)
    print(f"{args.count} clips and {total} questions in {args.folder}")


if __name__ == "__main__":
    main()
