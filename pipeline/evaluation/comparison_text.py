"""Says a comparison of two runs in words (`render_comparison`) and as JSON (`comparison_json`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pipeline.evaluation.compare import Comparison, Difference, FlippedItem
from pipeline.storage.uris import printable

_NUM_FLIPPED = 10  # of each kind, in words
_ONE_LINE = 100
_COUNTS = ("num_items", "num_pairs", "failed_first", "failed_second", "num_erased", "num_same_text")


def render_comparison(comparison: Comparison) -> str:
    """Render what ``illava compare`` prints."""
    pairs = comparison.num_pairs
    erased = f"; {comparison.num_erased:,} erased" if comparison.num_erased else ""
    lines = [
        f"A  {comparison.first_uri}",
        f"B  {comparison.second_uri}",
        f"{pairs:,} of {comparison.num_items:,} items answered by both (A failed {comparison.failed_first}, "
        f"B {comparison.failed_second}{erased}); same text in {comparison.num_same_text / pairs:.1%}",
        "",
        _head("mean of an item"),
    ]
    lines += [_line(difference) for difference in comparison.differences]
    if comparison.mcnemar is not None:
        test = comparison.mcnemar
        lines += [
            "",
            f"right only in A: {test.only_first}, only in B: {test.only_second}; McNemar p = {test.p_value:.3g}",
        ]
    if comparison.categories:
        lines += ["", _head("score by category") + "    pairs  only A  only B"]
        for one in comparison.categories:
            counts = f"{one.score.difference.num_values:>9,}{one.only_first:>8,}{one.only_second:>8,}"
            lines.append(f"{_line(one.score)}{counts}")
    for title, lost in (("right in A, wrong in B", True), ("wrong in A, right in B", False)):
        items = [one for one in comparison.flipped if one.is_lost is lost]
        if items:
            lines += ["", f"{title}: {len(items):,}"]
            lines += [line for one in items[:_NUM_FLIPPED] for line in _flip_lines(one)]
            more = len(items) - _NUM_FLIPPED
            lines += [f"  ... {more:,} more; --json lists all, --report FILE.html draws them"] * (more > 0)
    if comparison.differing_config:
        lines += ["", "configuration that differs (A -> B):", *differing_lines(comparison)]
    return "\n".join(lines)


def differing_lines(comparison: Comparison) -> list[str]:
    """Say the configuration's values that differ, whole, each under the key at which it differs."""
    return [
        line
        for key, (a, b) in comparison.differing_config.items()
        for name, *sides in _leaves(key, a, b)
        for line in _sides(name, *sides)
    ]


def comparison_json(comparison: Comparison) -> str:
    """Render the comparison as one JSON object, all flipped items included."""
    test = comparison.mcnemar
    found = {
        "first": comparison.first_uri,
        "second": comparison.second_uri,
        **{name: getattr(comparison, name) for name in _COUNTS},
        "differences": {one.name: _numbers(one) for one in comparison.differences},
        "mcnemar": None if test is None else asdict(test),
        "categories": {
            one.score.name: _numbers(one.score) | {"only_first": one.only_first, "only_second": one.only_second}
            for one in comparison.categories
        },
        "flipped": [asdict(one) for one in comparison.flipped],
        "differing_config": {key: list(sides) for key, sides in comparison.differing_config.items()},
    }
    return json.dumps(found, ensure_ascii=False, indent=2, default=str)


def _numbers(one: Difference) -> dict[str, Any]:
    interval = one.difference
    return {
        "first_mean": one.first_mean,
        "second_mean": one.second_mean,
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "ratio": one.ratio,
        "num_values": interval.num_values,
        "num_media": interval.num_clusters,
    }


def _head(title: str) -> str:
    return f"{title:<26}{'A':>12}{'B':>12}{'B - A':>12}  {'95 % interval':<26}{'B / A':>7}"


def _line(difference: Difference) -> str:
    interval = difference.difference
    ratio = "" if difference.ratio is None else f"{difference.ratio:.3f}"
    numbers = (difference.first_mean, difference.second_mean, interval.mean)
    between = f"[{interval.low:.4g}, {interval.high:.4g}]"
    name = printable(difference.name, 25)
    return f"{name:<26}" + "".join(f"{n:>12.4g}" for n in numbers) + f"  {between:<26}{ratio:>7}"


def _flip_lines(one: FlippedItem) -> list[str]:
    said = [
        "nothing readable" if answer is None and not text.strip() else printable(answer or text.strip(), 300)
        for answer, text in zip(one.answers, one.texts, strict=True)
    ]
    name = printable(one.uris[0].rpartition("/")[2] if one.uris else one.item_id, 60)
    category = f"[{one.category}] " if one.category else ""
    question = printable(" ".join((one.question or "").split()), 120)
    sides = zip(("reference", "A", "B"), (printable(one.reference or "", 300), *said), strict=True)
    parts, head = [f"{side}: {text}" for side, text in sides], f"  {name}: {category}{question}"
    if sum(map(len, parts)) <= _ONE_LINE:
        return [f"{head} | {' | '.join(parts)}"]
    return [head, *(f"    {part}" for part in parts)]


def _leaves(name: str, first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    """Descend to where two values differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            if first.get(key) != second.get(key):
                yield from _leaves(f"{name}.{key}", first.get(key), second.get(key))
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for place, (a, b) in enumerate(zip(first, second, strict=True)):
            if a != b:
                yield from _leaves(f"{name}.{place}", a, b)
    else:
        yield name, first, second


def _sides(name: str, first: Any, second: Any) -> list[str]:
    a, b = _said(first), _said(second)
    if len(a) == len(b) == 1 and len(name) + len(a[0]) + len(b[0]) <= _ONE_LINE:
        return [f"  {name}: {a[0]} -> {b[0]}"]
    return [f"  {name}:", *(f"    A  {line}" for line in a), *(f"    B  {line}" for line in b)]


def _said(value: Any) -> list[str]:
    """Spell a value out whole: a line for each entry of a list of sections."""
    if isinstance(value, list | tuple) and value and all(isinstance(one, dict) for one in value):
        return [_said(one)[0] for one in value]
    if isinstance(value, dict | list | tuple):
        return [json.dumps(_without_nulls(value), ensure_ascii=False, default=str)]
    return [str(value)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list | tuple) else value
