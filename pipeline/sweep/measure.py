"""Measures one point of a sweep: answers, agreement, tokens, seconds and memory of one plan on one loaded model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.requests import Generation, Request, SamplingParams
from pipeline.evaluation.statistics import mean_interval, paired_difference
from pipeline.records import LoadedItem
from pipeline.sweep.config import SpeedConfig, SweepConfig
from pipeline.tasks.asking import request_of
from pipeline.tasks.base import Task
from pipeline.tasks.build import build_task
from pipeline.tasks.sampling import sampling_params

if TYPE_CHECKING:
    from illava import VLM, Agreement

_COUNTS = ("num_patches", "num_vision_tokens", "num_vision_tokens_kept", "num_decoder_tokens_kept")
_STATES = ("vision_s", "prefill_s", "decode_s")


def build_requests(config: SweepConfig, loaded: Sequence[LoadedItem]) -> list[Request]:
    """Build what the model is asked about each item, in order."""
    task, sampling = build_task(config.task), config.sampling
    return [
        request_of(
            config.task,
            one.item.item_id,
            task.content(one.item, one.media),
            sampling_params(sampling, seed=config.seed, choices=task.choices(one.item)),
        )
        for one in loaded
    ]


def measure_point(
    vlm: VLM, config: SweepConfig, loaded: Sequence[LoadedItem], requests: Sequence[Request], plan: ReductionPlan
) -> dict[str, Any]:
    """Measure the fields of a `SweepRow`.

    Raises:
        PlanError: the plan makes no sense for this model.
        RandomWeightsError: quality is asked of a model that declares random weights.
    """
    from illava.analysis.peak_memory import PeakMemory

    began_s = time.perf_counter()
    with PeakMemory(vlm.family.decoder.device) as memory:
        answers = vlm.generate(requests, plan=plan, errors="return")
    wall_s = time.perf_counter() - began_s
    found: dict[str, Any] = {
        "num_failed": sum(answer.error is not None for answer in answers),
        "items_per_s": len(requests) / wall_s,
        "peak_memory_bytes": memory.num_bytes,
        **_tokens(answers),
        **_seconds(vlm, requests, plan, config.speed),
    }
    if not config.quality:
        return found
    from illava import measure_agreement

    agreements = measure_agreement(vlm, requests, plan)
    references = [one.reference for one in agreements]
    return found | _agreement(loaded, agreements) | _accuracy(build_task(config.task), loaded, references, answers)


def _tokens(answers: Sequence[Generation]) -> dict[str, float]:
    usages = [answer.usage for answer in answers if answer.error is None and answer.usage is not None]
    if not usages:
        return {}
    means = {name: statistics.fmean(getattr(usage, name) for usage in usages) for name in _COUNTS}
    whole = means["num_vision_tokens"]
    return means | ({"kept_ratio": means["num_decoder_tokens_kept"] / whole} if whole else {})


def _agreement(loaded: Sequence[LoadedItem], agreements: Sequence[Agreement]) -> dict[str, float]:
    pairs = zip(loaded, agreements, strict=True)
    agreed = [(one.item.uris[0], agreement) for one, agreement in pairs if agreement.error is None]
    if not agreed:
        return {}
    top1 = mean_interval([one.top1_ratio for _, one in agreed], [uri for uri, _ in agreed])
    return {
        "agreement_top1": top1.mean,
        "agreement_top1_low": top1.low,
        "agreement_top1_high": top1.high,
        "agreement_kl_nats": statistics.fmean(one.kl_nats for _, one in agreed),
    }


def _accuracy(
    task: Task, loaded: Sequence[LoadedItem], before: Sequence[Generation], after: Sequence[Generation]
) -> dict[str, Any]:
    """Of the items that have references, beside the unreduced model's answers to them."""
    scored = [place for place, one in enumerate(loaded) if task.parse(one.item, "").score is not None]
    if not scored:
        return {}
    media = [loaded[place].item.uris[0] for place in scored]
    first, second = ([_score(task, loaded[place], side[place]) for place in scored] for side in (before, after))
    mean, change = mean_interval(second, media), paired_difference(first, second, media)
    found = {"accuracy": mean.mean, "accuracy_low": mean.low, "accuracy_high": mean.high, "scores": second}
    return found | {"difference": change.mean, "difference_low": change.low, "difference_high": change.high}


def _score(task: Task, loaded: LoadedItem, answer: Generation) -> float:
    return 0.0 if answer.error is not None else task.parse(loaded.item, answer.text).score or 0.0


def _seconds(vlm: VLM, requests: Sequence[Request], plan: ReductionPlan, speed: SpeedConfig) -> dict[str, float]:
    """Seconds by component of single requests: the unreduced model and the plan in turn, the first round dropped."""
    forced = SamplingParams(max_new_tokens=speed.num_new_tokens, min_new_tokens=speed.num_new_tokens)
    taken: dict[str, list[float]] = {f"{side}{state}": [] for side in ("whole_", "") for state in _STATES}
    ends: list[tuple[float, float]] = []
    for request in (replace(request, sampling=forced) for request in requests[: speed.num_items]):
        rounds: dict[str, list[float]] = {name: [] for name in taken}
        for _ in range(speed.rounds + 1):
            for side, which in (("whole_", EMPTY_PLAN), ("", plan)):
                (done,) = vlm.generate([request], plan=which, errors="return")
                if done.error is None:
                    for state in _STATES:
                        rounds[f"{side}{state}"].append(getattr(done.timing, state))
        if all(len(values) > 1 for values in rounds.values()):
            for name, values in rounds.items():
                taken[name].append(statistics.median(values[1:]))
            totals = [sum(states) for states in zip(*(rounds[state][1:] for state in _STATES), strict=True)]
            ends.append((min(totals), max(totals)))
    found = {name: statistics.fmean(values) for name, values in taken.items() if values}
    if ends:
        found["request_s_low"], found["request_s_high"] = (statistics.fmean(end) for end in zip(*ends, strict=True))
    return found
