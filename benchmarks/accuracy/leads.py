"""Says row by row whether `ward` answers best of all methods at equal kept tokens, and at equal counted work.

Works on the parts that `accuracy.py` keeps, on what `plan_work.py` counted, and on the names of plans in
configs/compare_methods.yaml alone: ``METHOD@SHARE`` cuts in the tower (or, where its authors put it, later), ``...,
clips`` before the language model, ``A and B..., clips`` in both. Of the last two only answers about clips count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy.compared_plans import PREFIX
from benchmarks.accuracy.findings import Comparison, Parts, compare_plans, right_ratio, rows_of
from benchmarks.toy_model.data.mixture import CLIPS

OURS = "ward"
ROWS = ("scene", "small", "chart", "document", "direction", "video", "easy_vqa", "caption")
CLIP_ROWS = ("direction", "video", "caption")
SHARES = ("50%", "25%", "12%")
# Where tokens go: our row's name, the rows in which plans of that place differ at all, and the media whose work counts.
PLACES = {
    "tower": ("{ours}@{share}", ROWS, "pictures"),
    "before the language model": ("{ours}@{share}, clips", CLIP_ROWS, "clips"),
    "both": ("{ours} and {ours}@{share}, clips", CLIP_ROWS, "clips"),
}
LEAST_DIFFERENCE = {"50%": -0.01, "25%": -0.02}  # what the mean of all questions may lose, at its interval's lower end
RECOMMENDED = "pictures in the tower, clips in both"
_EQUAL_WORK = 1.01

Work = Mapping[str, Mapping[str, float]]


def leads(parts: Parts, work: Work) -> dict[str, Any]:
    """By place and share; what was not run is left out.

    ``rows`` has for each row the best other plan of this place and share, our difference from it with its paired 95 %
    interval, and ``leads``: we are not below it, or the interval holds 0. ``all`` is every question of these rows
    against no reduction, with the bound for the interval's lower end where there is one, and whether it ``holds``.
    ``at_equal_tokens`` is the same over all these questions together, and ``at_equal_work`` beside the best of all
    plans that compute no more than ours of the medium named in `PLACES`, over the questions about that one.
    `RECOMMENDED` is what the shipped presets do: pictures cut in the tower, and clips in both places.

    Args:
        parts: answers by plan.
        work: of `plan_work`, by plan and side; empty where nothing was counted.
    """
    found: dict[str, Any] = {}
    about = {side: _about(parts, clips=side == "clips") for side in ("pictures", "clips")}
    for place, (ours, rows, side) in PLACES.items():
        asked = about["clips"] if side == "clips" else parts
        for share in SHARES:
            own = PREFIX + ours.format(ours=OURS, share=share)
            others = [name for name in parts if name.startswith(PREFIX) and not _is_ours(name)]
            rivals = [name for name in others if _place_of(name) == (place, share)]
            if own in parts and rivals:
                entry = _of_place(asked, own, rivals, rows)
                if side == "pictures" and share in LEAST_DIFFERENCE:  # of the others not all questions are asked
                    entry["all"] |= _held(entry["all"], LEAST_DIFFERENCE[share])
                if own in work:
                    limit = _EQUAL_WORK * work[own][side]
                    as_cheap = [name for name in others if name in work and work[name][side] <= limit]
                    entry |= {"work": work[own][side], "at_equal_work": _beside(about[side], own, as_cheap, rows)}
                found[f"{place}, {share}"] = entry
    return found | _recommended(about)


def _recommended(about: Mapping[str, Parts]) -> dict[str, Any]:
    """What all questions lose when pictures and clips each go the recommended way; by share."""
    found: dict[str, Any] = {}
    for share, bound in LEAST_DIFFERENCE.items():
        tower, both = (PREFIX + PLACES[place][0].format(ours=OURS, share=share) for place in ("tower", "both"))
        if {tower, both} <= set(about["clips"]):
            mixed = {
                "none": about["pictures"]["none"] + about["clips"]["none"],
                "ours": about["pictures"][tower] + about["clips"][both],
            }
            rows = [row for row in ROWS if row in rows_of(mixed["none"])]
            whole = compare_plans(mixed, "none", "ours", rows).as_dict()
            found[f"{RECOMMENDED}, {share}"] = {"rows": {}, "all": whole | _held(whole, bound)}
    return found


def _of_place(parts: Parts, own: str, rivals: Sequence[str], rows: Sequence[str]) -> dict[str, Any]:
    asked = [row for row in rows if row in rows_of(parts["none"])]
    by_row = {row: _beside(parts, own, rivals, [row]) for row in asked}
    return {
        "plan": own.removeprefix(PREFIX),
        "rows": by_row,
        "leads_everywhere": all(row["leads"] for row in by_row.values()),
        "all": compare_plans(parts, "none", own, asked).as_dict(),
        "at_equal_tokens": _beside(parts, own, rivals, asked),
    }


def _beside(parts: Parts, own: str, others: Sequence[str], rows: Sequence[str]) -> dict[str, Any] | None:
    """Us beside the best of others, the first of equal ones, over the questions of these rows; None without others."""
    if not others:
        return None
    rows = [row for row in rows if row in rows_of(parts["none"])]
    best = max(others, key=lambda name: right_ratio(parts, name, rows))
    change = compare_plans(parts, best, own, rows)
    return {
        "others": len(others),
        "best": best.removeprefix(PREFIX),
        **_margin(change),
        "leads": change.difference_high >= 0,
    }


def _held(whole: Mapping[str, float], bound: float) -> dict[str, Any]:
    return {"bound": bound, "holds": whole["difference_low"] >= bound}


def _about(parts: Parts, *, clips: bool) -> Parts:
    """The answers about clips, or about pictures, alone."""
    return {
        name: [{"answers": [row for row in part["answers"] if _is_clip(row[0]) == clips]} for part in own]
        for name, own in parts.items()
    }


def _is_clip(sample_id: str) -> bool:
    return sample_id.partition("/")[0] in CLIPS


def _margin(change: Comparison) -> dict[str, float]:
    return {name: value for name, value in change.as_dict().items() if name.startswith("difference")}


def _place_of(name: str) -> tuple[str, str] | None:
    """Where a compared plan cuts, and the share it keeps; None for a plan whose data decide, or of another layout."""
    head, _, end = name.removeprefix(PREFIX).rpartition("@")
    share, _, about = end.partition(", ")
    if not name.startswith(PREFIX) or share not in SHARES or about not in ("", "clips"):
        return None
    if not about:
        return "tower", share
    return ("both" if " and " in head else "before the language model"), share


def _is_ours(name: str) -> bool:
    return name.removeprefix(PREFIX).startswith(OURS)
