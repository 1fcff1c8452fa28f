"""Measures how far plans depart from the unreduced toy: top-1 agreement along its answers, and KL, with intervals.

No label is needed, so this says what `accuracy.py` cannot: how far an answer has moved that is still right. Both read
the unreduced model's own answers (`illava.analysis.agreement`) to questions about drawn pictures and clips, on seeds
that no table of accuracy uses. Plans: every preset that fits the model, and rows of configs/compare_methods.yaml. The
tokens of one picture's answers are drawn together. About 4 CPU-minutes a model.

    python benchmarks/accuracy/agreement.py --json benchmarks/results/agreement.json
    python benchmarks/accuracy/agreement.py --model benchmarks/toy_model/model_without_taught_attention \\
        --json benchmarks/results/agreement_untaught.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.answering import Answerer
from benchmarks.accuracy.compared_plans import PREFIX, compared_plans
from benchmarks.accuracy.store import weights_digest
from benchmarks.common.machine import write_json
from benchmarks.toy_model.data.mixture import CLIPS
from benchmarks.toy_model.data.testset import TestSample, load_sample
from illava.analysis.agreement import Agreement
from illava.errors import PlanError
from illava.model_files import require_trained
from illava.plan import ReductionPlan, preset
from illava.presets import PRESETS
from pipeline.evaluation.statistics import mean_interval

MODEL = Path(__file__).resolve().parents[2] / "configs" / "demo" / "model"
FIRST_SEED = 40_000  # the frozen set begins at 0, looks while designing at 7,000 and 100,000
SAMPLES = {"scene": 40, "chart": 24, "table": 24, "lines": 6, "pair": 6, "motion": 20, "order": 8}
METHODS = ("ward", "illava", "divprune")
SIDES = ("pictures", "clips")


def measured_plans(family: Any) -> Iterator[tuple[str, str, ReductionPlan]]:
    """(name, side, plan): presets that fit the model, then rows of the comparison by `METHODS`; each plan once a side.

    Presets for videos are asked about clips, the others about pictures.
    """
    seen: set[tuple[str, str]] = set()
    for name, side, plan in [*_presets(family), *_rows()]:
        if plan.steps and (side, plan.digest()) not in seen:
            seen.add((side, plan.digest()))
            yield name, side, plan


def _presets(family: Any) -> Iterator[tuple[str, str, ReductionPlan]]:
    for name in PRESETS:
        plan = preset(name)
        try:
            family.check(plan)
        except PlanError:
            continue  # made for deeper models, or more patches
        yield name, SIDES["video" in name], plan


def _rows() -> Iterator[tuple[str, str, ReductionPlan]]:
    for name, pair in compared_plans().items():
        kind = name.removeprefix(PREFIX).partition("@")[0]
        if all(part in (*METHODS, "pooling", "evs") for part in kind.split(" and ")) and kind.startswith(METHODS):
            yield from ((name.removeprefix(PREFIX), side, plan) for side, plan in zip(SIDES, pair, strict=True))


def described(samples: Sequence[TestSample], found: Sequence[Agreement]) -> dict[str, Any]:
    """Shares over all tokens of the answers, with 95 % intervals; a sample's tokens are drawn together.

    Args:
        samples: in order.
        found: question by question of each.

    Raises:
        Exception: what ended a request.
    """
    for one in found:
        if one.error is not None:
            raise one.error
    of_question = [sample.sample_id for sample in samples for _ in sample.questions]
    counts = [one.num_tokens for one in found]
    clusters = np.repeat(of_question, counts)
    same = np.concatenate([np.arange(one.num_tokens) < one.num_same for one in found])
    kl_nats = np.repeat([one.kl_nats for one in found], counts)
    return {
        "top1_ratio": _interval(same.astype(float), clusters),
        "kl_nats": _interval(kl_nats, clusters),
        "num_tokens": len(clusters),
        "num_questions": len(found),
        "num_samples": len(samples),
    }


def _interval(values: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    found = asdict(mean_interval(values, clusters))
    return {name: round(found[name], 6) for name in ("mean", "low", "high")}


def measure(model: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Every plan's agreement, pictures and clips apart.

    Args:
        model: a Hugging Face folder.
        sizes: samples of each kind.
    """
    answerer = Answerer(model)
    samples: dict[str, list[TestSample]] = {side: [] for side in SIDES}
    for kind, size in sizes.items():
        samples[SIDES[kind in CLIPS]] += [load_sample((kind, FIRST_SEED + n)) for n in range(size)]
    plans: dict[str, Any] = {}
    for name, side, plan in measured_plans(answerer.plain.family):
        started = time.process_time()
        found = described(samples[side], answerer.agreement(samples[side], plan))
        plans.setdefault(name, {})[side] = {"plan": plan.digest(), **found}
        said = f"{name}, {side}: top-1 {found['top1_ratio']['mean']:.4f}, KL {found['kl_nats']['mean']:.4g}"
        print(f"{said}, {time.process_time() - started:.1f} CPU s", file=sys.stderr, flush=True)
    return plans


def main(argv: Iterable[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(list(argv) if argv is not None else None)
    require_trained(args.model)
    sizes = {kind: max(1, round(size * args.scale)) for kind, size in SAMPLES.items()}
    result = {
        "benchmark": "agreement",
        "model": Path(args.model).name,
        "weights": weights_digest(args.model),
        "samples": sizes,
        "first_seed": FIRST_SEED,
        "plans": measure(args.model, sizes),
    }
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
