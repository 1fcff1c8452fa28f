"""What token reduction does to answers: exact match on the toy model's frozen test set, plan by plan, paired.

Every answer is decoded by `VLM.generate`; the questions of one picture share its tower pass, plans share what they do
alike (see `answering.py`), and a sample of the questions is asked again without that. Finished work lies in --work-dir:
the same command again goes on there, and more plans may be added. The figures are this project's own toy model's and
stand for nothing else.

    python benchmarks/accuracy.py --plans sweep --third-party easy_vqa mnist --processes 2 --work-dir runs/accuracy \\
        --json benchmarks/results/accuracy.json --svg benchmarks/results/accuracy.svg
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy_findings import findings, summarise
from benchmarks.accuracy_report import scope_notes, svg_plot, text_table
from benchmarks.machine import write_json
from benchmarks.small_model.answering import Answerer
from benchmarks.small_model.compared_plans import about, compared_plans, left_out
from benchmarks.small_model.sweep_plans import BLOCKS, SWEEP, plan_named
from benchmarks.small_model.testset import THIRD_PARTY, TestSample, load_sample, sample_names, set_digest
from illava.model_files import require_trained
from illava.plan import ReductionPlan

MODEL = Path(__file__).resolve().parents[1] / "configs" / "demo" / "model"
_PARTS = 8  # of a plan: what is lost when a process ends
_CHECKED = 3  # questions a part and medium that are asked again, alone


@dataclass(frozen=True, slots=True)
class Setting:
    """What the answers depend on beside the plan; pickled into every process."""

    model: str
    scale: float
    first_seed: int
    third_party: tuple[str, ...]
    blocks: tuple[int, ...]

    def key(self, plan: str) -> dict[str, Any]:
        """What tells one part's answers from those of other weights, another set or another plan of that name."""
        weights = hashlib.sha256((Path(self.model) / "model.safetensors").read_bytes()).hexdigest()[:16]
        plans = repr([plan_named(plan, clip=clip, blocks=self.blocks) for clip in (False, True)])
        chosen = {name: value for name, value in asdict(self).items() if name not in ("model", "blocks")}
        return {"weights": weights, "plan": hashlib.sha256(plans.encode()).hexdigest()[:16], "parts": _PARTS, **chosen}


_loaded: dict[str, Answerer] = {}  # one a process


def answer_part(setting: Setting, plans: Sequence[str], part: int, work_dir: Path) -> None:
    """Plan by plan, answers to every `_PARTS`-th sample, into ``work_dir``; runs in a worker process.

    A plan's CPU seconds are those of what no plan before it had done for the same samples.
    """
    import torch

    torch.set_num_threads(1)
    if setting.model not in _loaded:
        _loaded[setting.model] = Answerer(setting.model)
    answerer = _loaded[setting.model]
    answerer.forget()
    started = time.process_time()
    names = sample_names(scale=setting.scale, first_seed=setting.first_seed, third_party=setting.third_party)
    samples = [load_sample(name) for name in names[part::_PARTS]]
    digests = {sample.sample_id: sample.digest() for sample in samples}
    sides: dict[str, dict[str, Any]] = {}  # what pictures or clips were answered under a plan: several may be equal
    for plan in plans:
        found = []
        for is_clip in (False, True):
            reduction = plan_named(plan, clip=is_clip, blocks=setting.blocks)
            key = f"{is_clip} {reduction!r}"
            if key not in sides:
                own = [sample for sample in samples if sample.is_clip == is_clip]
                sides[key] = _answer_side(answerer, own, reduction)
            found.append(sides[key])
        result = {name: found[0][name] + found[1][name] for name in found[0]}
        cpu_s = round(time.process_time() - started, 2)
        _keep(setting, plan, part, {"samples": digests, **result, "cpu_s": cpu_s}, work_dir)
        started = time.process_time()


def _answer_side(answerer: Answerer, own: Sequence[TestSample], reduction: ReductionPlan) -> dict[str, Any]:
    """Answers to the pictures, or to the clips, of a part; some are asked again, alone."""
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
    """Every part of every plan that does not lie in ``work_dir`` yet; a process does all plans of a part.

    Raises:
        SystemExit: what lies there belongs to other weights, another set or another plan.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    todo = {part: [plan for plan in plans if not _is_done(setting, plan, part, work_dir)] for part in range(_PARTS)}
    todo = {part: own for part, own in todo.items() if own}
    print(f"{sum(map(len, todo.values()))} of {len(plans) * _PARTS} parts to do", file=sys.stderr)
    if num_processes == 1:
        for part, own in todo.items():
            answer_part(setting, own, part, work_dir)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for running in [pool.submit(answer_part, setting, own, part, work_dir) for part, own in todo.items()]:
            running.result()


def _file(work_dir: Path, plan: str, part: int) -> Path:
    return work_dir / f"{plan.replace(':', '_')}.{part}.json"


def _is_done(setting: Setting, plan: str, part: int, work_dir: Path) -> bool:
    path = _file(work_dir, plan, part)
    if not path.exists():
        return False
    found, wanted = json.loads(path.read_text())["key"], json.loads(json.dumps(setting.key(plan)))
    if found != wanted:
        differing = ", ".join(name for name in wanted if found.get(name) != wanted[name])
        raise SystemExit(f"{path} was made with other {differing}; give another --work-dir, or delete this one")
    return True


def _keep(setting: Setting, plan: str, part: int, result: dict[str, Any], work_dir: Path) -> None:
    path = _file(work_dir, plan, part)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"key": setting.key(plan), **result}))
    unfinished.replace(path)
    right = [row[3] == row[4] for row in result["answers"]]
    print(f"{plan} part {part}: {sum(right)}/{len(right)}, {result['cpu_s']} CPU s", file=sys.stderr, flush=True)


def collect(setting: Setting, plans: Sequence[str], work_dir: Path) -> dict[str, Any]:
    """The result: per plan its rows against no reduction, the digest of the set, the checks' outcome."""
    parts = {plan: [json.loads(_file(work_dir, plan, part).read_text()) for part in range(_PARTS)] for plan in plans}
    samples = {name: digest for part in parts["none"] for name, digest in part["samples"].items()}
    summaries = summarise({plan: parts[plan] for plan in plans}, setting.blocks)
    return {
        "benchmark": "accuracy",
        "model": Path(setting.model).name,
        "setting": {**setting.key("none"), "blocks": list(setting.blocks)},
        "test_set": set_digest(samples),
        "num_samples": len(samples),
        "num_questions": sum(len(part["answers"]) for part in parts["none"]),
        "asked_again": sum(part["checked"] for own in parts.values() for part in own),
        "answered_otherwise": sum(part["disagreed"] for own in parts.values() for part in own),
        "plans": summaries,
        "findings": findings(parts),
        **({"compared": about(), "left_out": left_out()} if set(compared_plans()) <= set(plans) else {}),
    }


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
    parser.add_argument("--svg", type=Path)
    return parser.parse_args(list(argv) if argv is not None else None)


def main(argv: Iterable[str] | None = None) -> None:
    args = arguments(argv)
    require_trained(args.model)
    lists = {"sweep": SWEEP, "compare": tuple(compared_plans())}
    named = [name for given in args.plans for name in lists.get(given, (given,))]
    plans = list(dict.fromkeys(["none", *named]))
    for name in plans:
        plan_named(name, blocks=args.blocks)
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
