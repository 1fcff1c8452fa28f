"""The tables of answers in docs/benchmarks.md and README, each made of result files alone.

Several toys stand side by side, or one table below the other; the bundled one is the first. Knows nothing of the pages.
"""

from __future__ import annotations

from typing import Any

from benchmarks.accuracy.compared_plans import PREFIX, compared_plans
from benchmarks.accuracy.report import short_table
from benchmarks.accuracy.store import bundled_digest
from benchmarks.common.result_files import results
from benchmarks.tables.speed_tables import device_of

# Of each recommended preset: where the same form of the toy stands in the comparison of methods.
RECOMMENDED = {
    "ward-image-50": "tower, 50%",
    "ward-image-25": "tower, 25%",
    "ward-video-50": "both, 50%",
    "ward-video-25": "both, 25%",
}


def toys(benchmark: str) -> list[dict[str, Any]]:
    """Results of a benchmark that any toy may have, the bundled one's first."""
    return sorted(results(benchmark), key=lambda result: not _is_bundled(result))


def toy_name(result: dict[str, Any]) -> str:
    """What tables call the model of a result."""
    return "bundled model" if _is_bundled(result) else str(result["model"]).replace("_", " ")


def _is_bundled(result: dict[str, Any]) -> bool:
    weights: str = result["setting"]["weights"] if "setting" in result else result["weights"]
    return weights == bundled_digest()


def compares(result: dict[str, Any]) -> bool:
    """Whether an accuracy result is the comparison of all methods."""
    return any(name.startswith(PREFIX) for name in result["plans"])


def accuracy_table() -> str:
    """What the bundled toy's answers keep over a sweep, on the whole frozen set."""
    (result,) = (found for found in toys("accuracy") if not compares(found))
    return short_table(result)


def compared_table() -> str:
    """Every method at equal kept tokens, on the frozen set, toy by toy."""
    found = [result for result in toys("accuracy") if compares(result)]
    if len(found) == 1:
        return short_table(found[0])
    return "\n\n".join(f"**{toy_name(result)}**\n\n{short_table(result)}" for result in found)


def leads_table() -> str:
    """Row by row whether `ward` is best of all methods at equal tokens; toys side by side, one line each."""
    found = [result for result in toys("accuracy") if compares(result)]
    rows = list(dict.fromkeys(row for result in found for entry in result["leads"].values() for row in entry["rows"]))
    lines = [
        f"| tokens go in, left | model | {' | '.join(rows)} | all these questions, against no reduction "
        "| best other, equal tokens | best other, no more work |",
        "|---" * (len(rows) + 5) + "|",
    ]
    for place in dict.fromkeys(place for result in found for place in result["leads"]):
        for result in found:
            entry = result["leads"][place]
            cells = [_lead(entry["rows"].get(row)) for row in rows]
            bounds = [
                _against_none(entry["all"]),
                _beside(entry.get("at_equal_tokens")),
                _beside(entry.get("at_equal_work")),
            ]
            lines.append(f"| {place} | {toy_name(result)} | {' | '.join([*cells, *bounds])} |")
    return "\n".join(lines)


def _lead(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["difference"] >= 0:
        return "best"
    told = _points(row)
    return f"within: {told}" if row["leads"] else f"**behind: {told}** of {row['best']}"


def _against_none(entry: dict[str, Any]) -> str:
    told = _points(entry)
    if "bound" not in entry:
        return told
    return f"{told}; at least {100 * entry['bound']:.0f}: {'yes' if entry['holds'] else '**no**'}"


def _beside(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{_points(entry)} beside {entry['best']}"


def _points(entry: dict[str, Any], sign: int = 1) -> str:
    """A difference in points with its interval; with ``sign`` -1 the other way round."""
    ends = sorted(sign * entry[f"difference_{end}"] for end in ("low", "high"))
    low, high, points = (f"{round(100 * value, 1) + 0.0:+.1f}" for value in (*ends, sign * entry["difference"]))
    return f"{points} [{low}, {high}]"


def agreement_table() -> str:
    """How far each plan departs from the unreduced model, beside what it costs in right answers."""
    found, lost = toys("agreement"), _lost_by_plan()
    if not found:
        return "Not measured yet."
    heads = "".join(f" {toy_name(result)}: top-1 agreement | KL, nats a token |" for result in found)
    lines = [f"| plan | asked about |{heads} points lost, bundled model |", "|---" * (3 + 2 * len(found)) + "|"]
    for name, sides in found[0]["plans"].items():
        for side, first in sides.items():
            cells = []
            for result in found:
                own = result["plans"].get(name, {}).get(side)
                cells += ["", ""] if own is None else [_percent(own["top1_ratio"]), _nats(own["kl_nats"])]
            lines.append(f"| {name} | {side} | {' | '.join(cells)} | {lost.get((side, first['plan']), '')} |")
    return "\n".join(lines)


def _lost_by_plan() -> dict[tuple[str, str], str]:
    """Of plans in the comparison of methods: points of the mean of pictures' or clips' rows, by side and digest."""
    result = next(found for found in toys("accuracy") if compares(found))
    rows = {"pictures": ("scene", "small", "chart", "document"), "clips": ("direction", "video")}
    lost = {}
    for name, pair in compared_plans().items():
        if name in result["plans"]:
            for side, plan in zip(rows, pair, strict=True):
                tasks = [result["plans"][name]["tasks"][row] for row in rows[side]]
                change = sum(task["won"] - task["lost"] for task in tasks)
                lost[side, plan.digest()] = f"{100 * change / sum(task['num_questions'] for task in tasks):+.1f}"
    return lost


def _percent(found: dict[str, float]) -> str:
    return f"{100 * found['mean']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _nats(found: dict[str, float]) -> str:
    return f"{found['mean']:.2g} [{found['low']:.2g}, {found['high']:.2g}]"


def presets_table() -> str:
    """README's first table: what the recommended presets cost in answers and save in work and time."""
    found = [result for result in toys("accuracy") if compares(result)]
    (counted,) = results("preset_work")
    heads = "".join(f" points lost, {toy_name(result)} |" for result in found)
    lines = [
        f"| preset |{heads} best other method at equal tokens, bundled model | at no more counted work "
        "| counted work, 7B shapes: tower, prefill | measured on a CPU, 0.5B shapes |",
        "|---" * (5 + len(found)) + "|",
    ]
    for name, place in RECOMMENDED.items():
        entry, less = found[0]["leads"][place], counted["presets"][name]["times_less"]
        cells = [_points(result["leads"][place]["all"]) for result in found]
        others = [_other(entry["at_equal_tokens"]), _other(entry["at_equal_work"])]
        work = f"{less['tower']:.2f}x, {less['prefill']:.2f}x less"
        lines.append(f"| `{name}` | {' | '.join([*cells, *others, work, _measured(name)])} |")
    return "\n".join(lines)


def _other(entry: dict[str, Any]) -> str:
    """The best other plan, and its difference from ours."""
    return f"{_points(entry, -1)}, {entry['best']}"


def _measured(name: str) -> str:
    for result in results("reduction_speed"):
        if result["setting"]["preset"] == name:
            ratios = result["ratios"]
            return (
                f"{ratios['tower_plan_speedup']:.2f}x, {ratios['prefill_plan_speedup']:.2f}x as fast, "
                f"{device_of(result['machine'])}"
            )
    return "not measured"
