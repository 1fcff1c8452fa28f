"""Makes a `ReductionPlan` of what a caller may give for one: a plan, a preset's name, a mapping, or a YAML file."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from illava.errors import PlanError
from illava.plan import ReductionPlan, deprecations, preset
from illava.plan_input.strict_yaml import YAMLTextError, key_path, parse_yaml
from illava.presets import PRESETS

PlanSource: TypeAlias = ReductionPlan | Mapping[str, Any] | str | os.PathLike[str]

_SUFFIXES = (".yaml", ".yml")


def resolve_plan(source: PlanSource) -> ReductionPlan:
    """Make the plan that is meant; a part of it that the next release no longer has is a `DeprecationWarning`.

    Args:
        source: a plan; the name of a preset; a mapping with the keys of a plan, such as ``{"preset": "illava-video"}``
            or ``{"steps": [...]}``; or the path of a YAML file with these keys. A mapping or file with a section
            ``reduction``, as a job's has, gives that section.

    Raises:
        PlanError: no such preset or file, or keys that make no plan; says every problem.
    """
    plan = _resolved(source)
    for sentence in deprecations(plan):
        warnings.warn(sentence, DeprecationWarning, stacklevel=3)
    return plan


def _resolved(source: PlanSource) -> ReductionPlan:
    if isinstance(source, ReductionPlan):
        return source
    if isinstance(source, Mapping):
        return _validated(dict(source), "plan")
    if isinstance(source, str) and source in PRESETS:
        return preset(source)
    if isinstance(source, os.PathLike) or (isinstance(source, str) and _is_path(source)):
        return _of_file(Path(source))
    if isinstance(source, str):
        near = difflib.get_close_matches(source, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise PlanError(
            f"no preset named {source!r}{hint} the presets are: {', '.join(sorted(PRESETS))}. A plan of your own is a "
            "dict, or the path of a YAML file that ends in .yaml"
        )
    raise PlanError(
        f"plan is a {type(source).__name__}: give the name of a preset, a dict, the path of a YAML file, or a "
        "ReductionPlan; 'none' is the unreduced model"
    )


def _is_path(text: str) -> bool:
    return text.endswith(_SUFFIXES) or "/" in text or Path(text).is_file()


def _of_file(path: Path) -> ReductionPlan:
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), f"plan {path}")
    except FileNotFoundError as error:
        raise PlanError(f"plan {path}: there is no such file (working directory: {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"plan {path} cannot be read: {error}; name a YAML file in UTF-8") from error
    except YAMLTextError as error:
        raise PlanError(str(error)) from error
    if not isinstance(data, dict):
        got = "nothing" if data is None else f"a {type(data).__name__}"
        raise PlanError(f"plan {path}: expected keys such as `preset:` or `steps:`, got {got}")
    if "reduction" not in data and "model" in data:
        raise PlanError(f"plan {path} is a job without a section `reduction`; add one, or give 'none'")
    return _validated(data, f"plan {path}")


def _validated(data: dict[str, Any], where: str) -> ReductionPlan:
    if "reduction" in data:
        data, where = data["reduction"], f"{where}, reduction"
    try:
        return ReductionPlan.model_validate(data)
    except ValidationError as error:
        problems = [_describe(problem, data) for problem in error.errors(include_url=False)]
    raise PlanError(f"{where}: {'; '.join(problems)}")


def _describe(problem: Any, data: Any) -> str:
    path = ".".join(key_path(problem["loc"], data, missing=problem["type"] != "value_error"))
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    if problem["type"] == "missing":
        return f"{path}: missing; this key is required"
    message, given = problem["msg"].removeprefix("Value error, "), problem.get("input")
    shown = "" if isinstance(given, (dict, list)) else f" (got {given!r})"
    return f"{path}: {message}{shown}" if path else message
