"""Measures what token reduction does to answers: paired exact match on the demo model's test set, plan by plan.

Every answer is decoded by `VLM.generate`; the questions of one picture share its tower pass, plans share what they do
alike (see `answering.py`), and a sample of the questions is asked again without that. Finished work lies in --work-dir
by weights, plan and samples: the same command again goes on there, another one uses what both have in common. After a
change of code give another folder. The figures hold for this project's tiny demo model alone.

    python benchmarks/accuracy/accuracy.py --plans sweep --third-party easy_vqa mnist --processes 2 --work-dir
    runs/accuracy \\
        --json benchmarks/results/accuracy.json --svg benchmarks/results/accuracy.svg
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.answering import Answerer
from benchmarks.accuracy.compared_plans import PREFIX, about, compared_plans, left_out
from benchmarks.accuracy.findings import findings, summarise
from benchmarks.accuracy.leads import leads
from benchmarks.accuracy.report import scope_notes, svg_plot, text_table
from benchmarks.accuracy.store import Setting, Unit, keep, kept, unfinished
from benchmarks.accuracy.sweep_plans import BLOCKS, SWEEP, plan_named
from benchmarks.common.machine import write_json
from benchmarks.common.result_files import results
from benchmarks.toy_model.data.testset import THIRD_PARTY, TestSample, load_sample, set_digest
from illava.model_files import require_trained
from illava.plan import ReductionPlan

MODEL = Path(__file__).resolve().parents[2] / "configs" / "demo" / "model"
_CHECKED = 3  # questions of a unit that are asked again, alone

_loaded: dict[str, Answerer] = {}  # one a process


def answer_units(setting: Setting, units: Sequence[Unit], work_dir: Path) -> None:
    """Answers to the same samples under several plans, into ``work_dir``; runs in a worker process.

    A unit's CPU seconds are those of what no unit before it had done for these samples.
    """
    import torch

    torch.set_num_threads(1)
    if setting.model not in _loaded:
        _loaded[setting.model] = Answerer(setting.model)
    answerer = _loaded[setting.model]
    answerer.forget()
    started = time.process_time()
    samples = [load_sample(name) for name in units[0].names(setting)]
    digests = {sample.sample_id: sample.digest() for sample in samples}
    for unit in units:
        found = _answer(answerer, samples, setting.plan(unit.plan, unit.group))
        found |= {"samples": digests, "cpu_s": round(time.process_time() - started, 2)}
        keep(setting, unit, found, work_dir)
        right = [row[3] == row[4] for row in found["answers"]]
        said = f"{unit.plan}, {unit.group} part {unit.part}: {sum(right)}/{len(right)}, {found['cpu_s']} CPU s"
        print(said, file=sys.stderr, flush=True)
        started = time.process_time()


def _answer(answerer: Answerer, own: Sequence[TestSample], reduction: ReductionPlan) -> dict[str, Any]:
    """Answers to samples under one plan; some are asked again, alone."""
    answers = answerer.answer(own, reduction)
    rows = [
        [sample.sample_id, question.task, question.text, question.answer, text]
        for sample, texts in zip(own, answers.texts, strict=True)
        for question, text in zip(sample.questions, texts, strict=True)
    ]
    places = range(len(own))[:: max(1, len(own) // _CHECKED)][:_CHECKED]
    texts = [answers.texts[place][0] for place in places]
    return {
        "answers": rows,
        "num_tokens": [[sample.is_clip, *counts] for sample, counts in zip(own, answers.num_tokens, strict=True)],
        "checked": len(places),
        "disagreed": answerer.disagreements([own[place] for place in places], texts, reduction),
    }


def answer_all(setting: Setting, plans: Sequence[str], work_dir: Path, num_processes: int) -> None:
    """Every unit that does not lie in ``work_dir`` yet; a process does all plans over the same samples."""
    todo = unfinished(setting, plans, work_dir)
    print(f"{len(todo)} units to do, {len({unit.plan for unit in todo})} plans", file=sys.stderr, flush=True)
    tasks = [list(units) for _, units in groupby(todo, key=lambda unit: (unit.group, unit.part))]
    if num_processes == 1:
        for units in tasks:
            answer_units(setting, units, work_dir)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for running in [pool.submit(answer_units, setting, units, work_dir) for units in tasks]:
            running.result()


def collect(setting: Setting, plans: Sequence[str], work_dir: Path) -> dict[str, Any]:
    """The result: per plan its rows against no reduction, the digest of the set, the checks' outcome."""
    parts = kept(setting, plans, work_dir)
    samples = {name: digest for part in parts["none"] for name, digest in part["samples"].items()}
    summaries = summarise({plan: parts[plan] for plan in plans}, setting.blocks)
    distinct = {id(part): part for own in parts.values() for part in own}.values()
    return {
        "benchmark": "accuracy",
        "model": Path(setting.model).name,
        "setting": {**asdict(setting), "model": Path(setting.model).name, "weights": setting.digest()},
        "test_set": set_digest(samples),
        "num_samples": len(samples),
        "num_questions": sum(len(part["answers"]) for part in parts["none"]),
        "asked_again": sum(part["checked"] for part in distinct),
        "answered_otherwise": sum(part["disagreed"] for part in distinct),
        "plans": summaries,
        "findings": findings(parts),
        **({"leads": leads(parts, counted_work())} if any(plan.startswith(PREFIX) for plan in plans) else {}),
        **({"compared": about(), "left_out": left_out()} if set(compared_plans()) <= set(plans) else {}),
    }


def counted_work() -> dict[str, dict[str, float]]:
    """What each plan computes, as `plan_work.py` wrote it; empty where it has not."""
    return {name: ratios for found in results("plan_work") for name, ratios in found["plans"].items()}


def arguments(argv: Iterable[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--plans", nargs="+", default=["none", "illava-small"], help="names, or `sweep` or `compare`")
    parser.add_argument("--blocks", nargs="+", type=int, default=list(BLOCKS), help="of the tower, for METHOD@SHARE")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the test set")
    parser.add_argument("--first-seed", type=int, default=0, help="another set, to look at while designing")
    parser.add_argument("--third-party", nargs="*", choices=tuple(THIRD_PARTY), default=[])
    parser.add_argument("--processes", type=int, default=1, help="of one thread each")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path, help="curves over the share kept: of METHOD@SHARE plans")
    return parser.parse_args(list(argv) if argv is not None else None)


def main(argv: Iterable[str] | None = None) -> None:
    args = arguments(argv)
    require_trained(args.model)
    lists = {"sweep": SWEEP, "compare": tuple(compared_plans())}
    named = [name for given in args.plans for name in lists.get(given, (given,))]
    plans = list(dict.fromkeys(["none", *named]))
    for name in plans:
        plan_named(name, blocks=args.blocks)
    for kind in args.third_party:
        load_sample((kind, 0))  # what is not installed is said now, not after an hour
    setting = Setting(args.model, args.scale, args.first_seed, tuple(args.third_party), tuple(args.blocks))
    answer_all(setting, plans, args.work_dir, args.processes)
    result = collect(setting, plans, args.work_dir)
    print("\n".join([text_table(result["plans"]), *scope_notes(result)]))
    if args.json:
        write_json(args.json, result)
    if args.svg:
        args.svg.write_text(svg_plot(result["plans"]))


if __name__ == "__main__":
    main()
