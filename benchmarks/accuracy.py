"""What token reduction does to answers: exact match on the toy model's frozen test set, plan by plan, paired.

Every prediction goes through `VLM.generate`. The figures are this project's own toy model's and stand for nothing else.

    python benchmarks/accuracy.py --plans none illava-small random@0.25 --json OUT.json --svg OUT.svg
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy_report import svg_plot, text_table
from benchmarks.machine import write_json
from benchmarks.small_model.paired import compare
from benchmarks.small_model.sweep_plans import plan_named
from benchmarks.small_model.testset import HEADLINES, FrozenItem, easy_vqa_items, frozen_items, headline
from illava import VLM, Preprocessor, Request, SamplingParams, load_preprocessor

MODEL = Path(__file__).resolve().parents[1] / "configs" / "demo" / "model"
_CHUNK = 64
_DEFAULT_PLANS = ("none", "illava-small", "illava-small:released")


def answer(
    vlm: VLM, preprocessor: Preprocessor, items: Sequence[FrozenItem], name: str
) -> tuple[list[str], dict[str, float]]:
    """Texts in order, and the share of visual tokens that entered the LLM, of pictures and of clips."""
    texts = [""] * len(items)
    shares: dict[str, float] = {}
    for is_clip in (False, True):
        places = [index for index, item in enumerate(items) if (item.sample.medium == "video") == is_clip]
        entered = whole = 0
        for start in range(0, len(places), _CHUNK):
            chunk = places[start : start + _CHUNK]
            requests = [_request(preprocessor, index, items[index]) for index in chunk]
            for index, done in zip(chunk, vlm.generate(requests, plan=plan_named(name, clip=is_clip)), strict=True):
                if done.error is not None:
                    raise done.error
                texts[index] = done.text
                whole += done.usage.num_vision_tokens
                entered += done.usage.num_vision_tokens_kept
        if places:
            shares["clip_kept_ratio" if is_clip else "kept_ratio"] = round(entered / whole, 4)
    return texts, shares


def _request(preprocessor: Preprocessor, number: int, item: FrozenItem) -> Request:
    sample = item.sample
    media = (preprocessor.video(sample.frames),) if sample.medium == "video" else preprocessor.images(sample.frames)
    limit = 64 if item.question.task.startswith("caption") else 8
    return Request(str(number), (*media, item.question.text), SamplingParams(max_new_tokens=limit))


def measure(vlm: VLM, preprocessor: Preprocessor, items: Sequence[FrozenItem], plans: Sequence[str]) -> dict[str, Any]:
    """Per plan: kept share, seconds, and per row the comparison with no reduction."""
    rows = [headline(item.question.task) for item in items]
    ids = [item.sample_id for item in items]
    reference: list[bool] = []
    result: dict[str, Any] = {}
    for name in ["none", *(plan for plan in plans if plan != "none")]:
        started = time.perf_counter()
        texts, kept = answer(vlm, preprocessor, items, name)
        right = [text.strip() == item.question.answer for text, item in zip(texts, items, strict=True)]
        reference = reference or right
        result[name] = {
            **kept,
            "seconds": round(time.perf_counter() - started, 1),
            "tasks": {row: _compare_row(row, rows, ids, reference, right) for row in HEADLINES if row in rows},
        }
        print(f"{name}: done in {result[name]['seconds']} s", file=sys.stderr, flush=True)
    return result


def _compare_row(row: str, rows: list[str], ids: list[str], before: list[bool], after: list[bool]) -> dict[str, float]:
    here = [index for index, name in enumerate(rows) if name == row]
    return compare([ids[i] for i in here], [before[i] for i in here], [after[i] for i in here]).as_dict()


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--plans", nargs="+", default=list(_DEFAULT_PLANS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the test set")
    parser.add_argument("--first-seed", type=int, default=0, help="look at other seeds while designing")
    parser.add_argument("--easy-vqa", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args(list(argv) if argv is not None else None)
    torch.set_num_threads(args.threads)
    for name in args.plans:
        plan_named(name)
    items = list(frozen_items(scale=args.scale, first_seed=args.first_seed))
    if args.easy_vqa:
        items += easy_vqa_items(scale=args.scale)
    vlm = VLM.from_pretrained(args.model, dtype="float32", device="cpu", max_batch_requests=_CHUNK)
    plans = measure(vlm, load_preprocessor(args.model), items, args.plans)
    print(text_table(plans))
    if args.json:
        write_json(
            args.json,
            {"benchmark": "accuracy", "model": Path(args.model).name, "num_questions": len(items), "plans": plans},
        )
    if args.svg:
        args.svg.write_text(svg_plot(plans))


if __name__ == "__main__":
    main()
