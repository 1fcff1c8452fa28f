"""Compares two runs over one manifest, item by item: paired differences with intervals, McNemar for scores.

Pairs are items that both runs answered; intervals draw media, not questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import RefusedError
from pipeline.evaluation.run_columns import RunColumns, read_run_columns
from pipeline.evaluation.statistics import Interval, McNemar, mcnemar, paired_difference
from pipeline.records import UNANSWERED
from pipeline.runs.run_record import config_diff, recorded_config_fingerprint
from pipeline.storage.uris import printable

MEASURED = (
    "num_vision_tokens_kept",
    "num_decoder_tokens_kept",
    "num_generated_tokens",
    "vision_s",
    "prefill_s",
    "decode_s",
    "latency_s",
    "gpu_s",
    "cost_usd",
)
_COLUMNS = ("item_id", "uris", "status", "text", "score", *MEASURED)


@dataclass(frozen=True, slots=True)
class Difference:
    """Holds one quantity in both runs.

    Attributes:
        name: of the column.
        first_mean, second_mean: over the pairs.
        difference: of ``second - first``, paired.
    """

    name: str
    first_mean: float
    second_mean: float
    difference: Interval

    @property
    def ratio(self) -> float | None:
        """``second / first`` of the means; None where the first is zero."""
        return self.second_mean / self.first_mean if self.first_mean else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Holds two runs side by side.

    Attributes:
        first_uri, second_uri: of the runs.
        num_items: of the manifest both ran over.
        num_pairs: items both answered; all differences are over these.
        failed_first, failed_second: items that only this run, or both, failed.
        num_same_text: pairs whose text is the same to the letter.
        differences: ``score`` first where both runs have scores.
        mcnemar: where all scores are 0 or 1.
        differing_config: key -> (first, second) where the two config fingerprints differ.
    """

    first_uri: str
    second_uri: str
    num_items: int
    num_pairs: int
    failed_first: int
    failed_second: int
    num_same_text: int
    differences: tuple[Difference, ...]
    mcnemar: McNemar | None
    differing_config: dict[str, tuple[Any, Any]]


def compare_runs(first_uri: str, second_uri: str, *, seed: int = 0) -> Comparison:
    """Compare two finished runs; a run with itself differs by exactly zero.

    Args:
        first_uri: the reference, such as the unreduced run.
        second_uri: what it is compared with.
        seed: of the bootstrap.

    Raises:
        RefusedError: different manifests, or a run that is not finished.
    """
    return compare_columns(read_run_columns(first_uri, _COLUMNS), read_run_columns(second_uri, _COLUMNS), seed=seed)


def compare_columns(first: RunColumns, second: RunColumns, *, seed: int = 0) -> Comparison:
    """Compare as `compare_runs` does, over columns that were read before."""
    _refuse_other_items(first, second)
    failed = [
        np.array([status in UNANSWERED for status in run.columns["status"]], dtype=bool) for run in (first, second)
    ]
    pairs = np.flatnonzero(~(failed[0] | failed[1]))
    if not len(pairs):
        raise RefusedError(f"no item was answered by both {first.uri} and {second.uri}; there is nothing to compare")
    media = np.array(first.media, dtype=object)[pairs]
    _, media = np.unique(media.astype(str), return_inverse=True)
    differences, test = [], None
    scores = [_floats(run, "score", pairs) for run in (first, second)]
    scored = np.flatnonzero(np.isfinite(scores[0]) & np.isfinite(scores[1]))
    if len(scored):
        a, b = scores[0][scored], scores[1][scored]
        differences.append(_difference("score", a, b, media[scored], seed))
        if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
            test = mcnemar(a, b)
    for name in MEASURED:
        measured = [_floats(run, name, pairs) for run in (first, second)]
        known = np.flatnonzero(np.isfinite(measured[0]) & np.isfinite(measured[1]))  # null: of an earlier version
        if len(known):
            a, b = (values[known] for values in measured)
            differences.append(_difference(name, a, b, media[known], seed))
    texts = zip(first.columns["text"], second.columns["text"], strict=True)
    same = np.array([a == b for a, b in texts], dtype=bool)[pairs]
    return Comparison(
        first.uri,
        second.uri,
        len(first),
        len(pairs),
        int(failed[0].sum()),
        int(failed[1].sum()),
        int(same.sum()),
        tuple(differences),
        test,
        _differing_config(first, second),
    )


def render_comparison(comparison: Comparison) -> str:
    """Render the table printed by ``python -m pipeline compare``."""
    pairs = comparison.num_pairs
    lines = [
        f"A  {comparison.first_uri}",
        f"B  {comparison.second_uri}",
        f"{pairs:,} of {comparison.num_items:,} items answered by both (A failed {comparison.failed_first}, "
        f"B {comparison.failed_second}); same text in {comparison.num_same_text / pairs:.1%}",
        "",
        f"{'mean of an item':<26}{'A':>12}{'B':>12}{'B - A':>12}  {'95 % interval':<26}{'B / A':>7}",
    ]
    lines += [_line(difference) for difference in comparison.differences]
    if comparison.mcnemar is not None:
        test = comparison.mcnemar
        lines += [
            "",
            f"right only in A: {test.only_first}, only in B: {test.only_second}; McNemar p = {test.p_value:.3g}",
        ]
    if comparison.differing_config:
        lines += ["", "configuration that differs:"]
        lines += [f"  {key}: {_short(a)} -> {_short(b)}" for key, (a, b) in comparison.differing_config.items()]
    return "\n".join(lines)


def _refuse_other_items(first: RunColumns, second: RunColumns) -> None:
    digests = [run.record["manifest_digest"] for run in (first, second)]
    if digests[0] != digests[1]:
        counts = [run.record.get("num_items") for run in (first, second)]
        raise RefusedError(
            f"{first.uri} and {second.uri} ran over different manifests ({counts[0]} items, digest {digests[0][:12]}; "
            f"{counts[1]} items, digest {digests[1][:12]}); run both over the same input to compare them"
        )
    if first.columns["item_id"] != second.columns["item_id"]:
        raise RefusedError(
            f"rows of {first.uri} and {second.uri} are not of the same items, though their manifests are the same; "
            f"see `illava verify {first.uri}`, and the same for the other"
        )


def _floats(run: RunColumns, name: str, pairs: np.ndarray) -> np.ndarray:
    """A column as numbers, NaN for null."""
    return np.array([np.nan if value is None else value for value in run.columns[name]], dtype=np.float64)[pairs]


def _difference(name: str, first: np.ndarray, second: np.ndarray, media: np.ndarray, seed: int) -> Difference:
    interval = paired_difference(first, second, media, seed=seed)
    return Difference(name, float(first.mean()), float(second.mean()), interval)


def _differing_config(first: RunColumns, second: RunColumns) -> dict[str, tuple[Any, Any]]:
    return config_diff(recorded_config_fingerprint(first.record), recorded_config_fingerprint(second.record))


def _line(difference: Difference) -> str:
    interval = difference.difference
    ratio = "" if difference.ratio is None else f"{difference.ratio:.3f}"
    numbers = (difference.first_mean, difference.second_mean, interval.mean)
    between = f"[{interval.low:.4g}, {interval.high:.4g}]"
    return f"{difference.name:<26}" + "".join(f"{n:>12.4g}" for n in numbers) + f"  {between:<26}{ratio:>7}"


def _short(value: Any) -> str:
    return printable(str(value), 60)
