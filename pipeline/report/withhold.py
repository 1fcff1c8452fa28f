"""Leaves out of a report's figures and pictures what ``--without`` names, before anything is rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from pipeline.inspection.withheld import LEFT_OUT, columns_without, config_without
from pipeline.records import ResultRow
from pipeline.report.figures import RunFigures
from pipeline.report.picture import Picture


def withhold(figures: RunFigures, leave_out: frozenset[str]) -> RunFigures:
    """Return figures whose rows and configuration no longer hold what is left out; counts stay."""
    if not leave_out:
        return figures
    changed = {one.name: _withheld(getattr(figures, one.name), leave_out) for one in fields(figures)}
    record = dict(figures.record)
    record["config"] = config_without(record.get("config") or {}, leave_out)
    record.pop("recipe", None)  # the same words key by key, of which a report shows the digest alone
    return replace(figures, **changed | {"record": record})


def withhold_pictures(pictures: Sequence[Sequence[Picture]], leave_out: frozenset[str]) -> list[list[Picture]]:
    """Return pictures without the reasons that name files, where addresses are left out."""
    if "uri" not in leave_out:
        return [list(some) for some in pictures]
    return [[replace(one, reason=LEFT_OUT) if one.reason else one for one in some] for some in pictures]


def _withheld(value: Any, leave_out: frozenset[str]) -> Any:
    """Follow tuples, lists and mappings to the rows in them."""
    if isinstance(value, ResultRow):
        return _row(value, leave_out)
    if isinstance(value, tuple | list):
        return type(value)(_withheld(one, leave_out) for one in value)
    if isinstance(value, dict):
        return {key: _withheld(one, leave_out) for key, one in value.items()}
    return value


def _row(row: ResultRow, leave_out: frozenset[str]) -> ResultRow:
    gone = columns_without(leave_out)
    empty: dict[str, Any] = {"uri": LEFT_OUT, "prompt": LEFT_OUT, "uris": (), "fields": {}, "frame_timestamps_s": ()}
    changed: dict[str, Any] = {name: empty.get(name) for name in gone}
    if "error_message" in gone and row.pages:
        changed["pages"] = tuple({**page, "error_message": None} for page in row.pages)
    return replace(row, **changed)
