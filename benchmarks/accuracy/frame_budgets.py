"""Asks the demo model about clips of fewer frames: evenly spread ones, and those where the file spends its bytes.

python benchmarks/accuracy/frame_budgets.py --json benchmarks/results/frame_budgets.json

Clips are rendered to h264 and read as a job reads them, since frames in memory have no packets; their seeds are of no
other set. In half of them things happen from the first frame to the last, as in the frozen set; in the other half all
happens in a third of the clip, and nothing moves before and after. Both sides of a pair keep as many frames.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.common.machine import write_json  # noqa: E402
from benchmarks.toy_model.data.render_clips import encode  # noqa: E402
from benchmarks.toy_model.data.samples import Sample  # noqa: E402
from benchmarks.toy_model.data.videos import make_motion, make_order  # noqa: E402
from illava import VLM, ReductionPlan, Request, SamplingParams, VisualInput  # noqa: E402
from pipeline.evaluation.statistics import mean_interval, paired_difference  # noqa: E402
from pipeline.own_files.media_reader import MediaReader  # noqa: E402

MODEL = ROOT / "configs" / "demo" / "model"
NUM_FRAMES, KEPT = 8, (4, 2)
_CLIP_FRAMES, _BURST_FRAMES = 60, 20
_MAKERS = {"motion": make_motion, "order": make_order}

Clips = Sequence[tuple[Sample, VisualInput]]


def sample(kind: str, number: int, *, burst: bool) -> Sample:
    """One clip at full frame rate."""
    rng = np.random.default_rng([zlib.crc32(f"frame_budgets/{kind}/{burst}".encode()), number])
    if not burst:
        return _MAKERS[kind](rng, _CLIP_FRAMES, noise=0.5)
    made, still = _MAKERS[kind](rng, _BURST_FRAMES, noise=0.5), _CLIP_FRAMES - _BURST_FRAMES
    before = int(rng.integers(still // 8, still * 7 // 8))
    parts = (made.frames[:1].repeat(before, 0), made.frames, made.frames[-1:].repeat(still - before, 0))
    return replace(made, frames=np.concatenate(parts))


def read(kind: str, count: int, folder: Path, *, burst: bool) -> Clips:
    """Render the clips and read them again, with the sizes of their packets."""
    clips = []
    with MediaReader(str(MODEL), num_frames=NUM_FRAMES) as reader:
        for number in range(count):
            made = sample(kind, number, burst=burst)
            encode(made.frames, path := folder / f"{kind}-{burst}-{number}.mp4")
            (video,) = reader.read(path)
            clips.append((made, video))
    return clips


def answers(vlm: VLM, clips: Clips, plan: ReductionPlan) -> tuple[list[float], list[str]]:
    """Whether each question but captions was answered right, and its clip."""
    requests, wanted, names = [], [], []
    for number, (made, video) in enumerate(clips):
        questions = {one.text: one for one in made.questions if not one.task.startswith("caption")}
        for place, question in enumerate(questions.values()):
            requests.append(Request(f"{number}/{place}", (video, question.text), SamplingParams(max_new_tokens=8)))
            wanted.append(question.answer)
            names.append(str(number))
    found = vlm.generate(requests, plan=plan)
    return [float(one.text.strip() == answer) for one, answer in zip(found, wanted, strict=True)], names


def plan_of(num_frames: int, by: str | None) -> ReductionPlan:
    reducer = {"kind": "fewer_frames", "num_frames": num_frames, "by": by}
    return ReductionPlan.model_validate({"steps": [{"stage": "media", "reducer": reducer}]})


def compare(ask: Any) -> dict[str, Any]:
    """Each plan's share of right answers, and what packets change against evenly spread frames."""
    whole, names = ask(plan=ReductionPlan())
    found: dict[str, Any] = {"num_questions": len(whole), "all_frames": asdict(mean_interval(whole, names))}
    for count in KEPT:
        evenly, by_packets = (ask(plan=plan_of(count, by))[0] for by in (None, "packets"))
        found[f"{count}_frames"] = {
            "evenly": asdict(mean_interval(evenly, names)),
            "packets": asdict(mean_interval(by_packets, names)),
            "difference": asdict(paired_difference(evenly, by_packets, names)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--clips", type=int, default=24, help="of each kind")
    args = parser.parse_args()
    vlm, results = VLM.from_pretrained(str(MODEL), dtype="float32", device="cpu", kv_cache_bytes=256 << 20), {}
    with TemporaryDirectory() as name:
        for burst in (False, True):
            for kind in _MAKERS:
                clips = read(kind, args.clips, Path(name), burst=burst)
                results[f"{kind}, {'burst' if burst else 'throughout'}"] = compare(partial(answers, vlm, clips))
                print(kind, burst, results[f"{kind}, {'burst' if burst else 'throughout'}"], flush=True)
    setting = {"num_frames": NUM_FRAMES, "num_clips": args.clips}
    write_json(args.json, {"benchmark": "frame_budgets", "setting": setting, "results": results})


if __name__ == "__main__":
    main()
