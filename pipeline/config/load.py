"""Makes a `JobConfig` of a YAML file and ``--set`` overrides, and says every problem with its dotted path.

Loads neither torch nor ray, so that a typing error is told in well under a second.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from illava.plan_input.strict_yaml import YAMLTextError, key_path, parse_yaml
from pipeline.config.base import choices_of
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError
from pipeline.old_names import KEYS, tell_deprecated, tell_new_name
from pipeline.storage.uris import printable

Schema = TypeVar("Schema", bound=BaseModel)


def load_config(path: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Read and validate a job's configuration; otherwise as `load_as`."""
    return load_as(JobConfig, path, overrides)


def load_as(schema: type[Schema], path: str, overrides: Sequence[str] = ()) -> Schema:
    """Read and validate a configuration.

    Args:
        schema: what the file must be.
        path: of the YAML file.
        overrides: ``a.b=value``; a number as a path segment addresses a list. The value of a key that holds text is
            taken as it stands, but for quotes around the whole of it and for ``null``; any other is read as YAML.
            ``reduction.preset`` or ``reduction.budget`` replaces the file's whole plan, and ``reduction.steps`` a
            preset of the file.

    Raises:
        ConfigError: every problem at once, one a line.
    """
    return _validated(schema, _read(path), overrides, source=path)


def parse_config(data: dict[str, Any], overrides: Sequence[str] = (), *, source: str) -> JobConfig:
    """Validate a job's keys and values; the overrides are put into `data`. Raises as `load_as`."""
    return _validated(JobConfig, data, overrides, source=source)


def parse_as(schema: type[Schema], data: dict[str, Any], *, source: str) -> Schema:
    """Validate keys and values that stand in no file; ``source`` begins the message. Raises as `load_as`."""
    return _validated(schema, data, (), source=source)


def _validated(schema: type[Schema], data: dict[str, Any], overrides: Sequence[str], *, source: str) -> Schema:
    renamed = _rename_keys(data, source)
    _forget_other_plan(data, {key.strip(): value.strip() for key, _, value in (o.partition("=") for o in overrides)})
    for override in overrides:
        todays, old = _todays_override(override, overrides)
        _apply(data, todays, schema)
        renamed |= old | _rename_keys(data, f"--set {printable(override)}")
    for old_key in sorted(renamed):
        tell_new_name(old_key, KEYS[old_key])
    try:
        config = schema.model_validate(data)
    except ValidationError as error:
        lines = [_describe(problem, data, schema) for problem in error.errors(include_url=False)]
        raise ConfigError(f"{source}: {len(lines)} problem{'s' * (len(lines) > 1)}\n  " + "\n  ".join(lines)) from error
    if isinstance(config, JobConfig):
        tell_deprecated(config.reduction)
    return config


def _rename_keys(data: dict[str, Any], where: str) -> set[str]:
    """Put what stands under an earlier version's key under today's; returns the old keys that were found.

    Raises:
        ConfigError: both are there.
    """
    found = set()
    for old, new in KEYS.items():
        section, _, name = old.rpartition(".")
        inside, todays = data.get(section), new.rpartition(".")[2]
        if isinstance(inside, dict) and name in inside:
            if todays in inside:
                raise ConfigError(f"{where}: {old} is the old name of {new}, and both are given; leave {old} out")
            inside[todays] = inside.pop(name)
            found.add(old)
    return found


def _forget_other_plan(data: dict[str, Any], overridden: Mapping[str, str]) -> None:
    """Drop the file's plan where the overrides name another one: a preset is a whole plan, and so is a budget."""
    plan = data.get("reduction")
    has_budget = overridden.get("reduction.budget", "null") not in {"null", "~", ""}
    if isinstance(plan, dict) and ("reduction.preset" in overridden or has_budget):
        plan.clear()
    elif isinstance(plan, dict) and "reduction.steps" in overridden:
        plan.pop("preset", None)


def _todays_override(override: str, overrides: Sequence[str]) -> tuple[str, set[str]]:
    """The override under today's key, and the old key that it was written with.

    Raises:
        ConfigError: another override has today's key.
    """
    key, equals, text = override.partition("=")
    new = KEYS.get(key.strip())
    if new is None:
        return override, set()
    if any(other.partition("=")[0].strip() == new for other in overrides):
        raise ConfigError(f"--set {key.strip()} is the old name of {new}, and both are given; leave the old one out")
    return f"{new}{equals}{text}", {key.strip()}


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path, [str(p) for p in Path(path).parent.glob("*.yaml")], 1)
        hint = f"; did you mean {near[0]}?" if near else "; configs/ has examples"
        raise ConfigError(f"config {path} does not exist{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config {path} cannot be read: {error}; name a YAML file in UTF-8, such as configs/demo.yaml"
        ) from error
    data = _parsed(text, f"config {path}")
    if not isinstance(data, dict):
        got = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(
            f"config {path}: expected sections such as `input:` and `model:`, got {got}; configs/demo.yaml has them all"
        )
    return data


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_yaml(text, where)
    except YAMLTextError as error:
        raise ConfigError(str(error)) from error


def _apply(data: dict[str, Any], override: str, schema: type[BaseModel]) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"--set {printable(override)}: write it as section.key=value")
    types = _types_at([*parents, last], schema)
    if types and all(_is_text(kind) for kind in types):
        value = _given_text(text if str in types else text.strip(), nullable=type(None) in types)
    else:
        value = _parsed(text, f"--set {printable(override)}: the value")
    place: Any = data
    for done, name in enumerate(parents):
        if isinstance(place, dict) and place.get(name) is None:
            place[name] = {}
        place = _entry(place, name, override, ".".join(parents[:done]))
    if isinstance(place, dict):
        place[last] = value
    else:
        _entry(place, last, override, ".".join(parents))
        place[int(last)] = value


def _types_at(path: Sequence[str], schema: type[BaseModel]) -> list[Any]:
    """What the key at a path may be, over all members of the unions on the way; empty where no section has it."""
    models: list[type[BaseModel]] = [schema]
    for part in path[:-1]:  # one that names no field is the place in a list, or the key of a mapping
        inner = [m for model in models if part in model.model_fields for m in _models_at(model, part)]
        models = inner or models
    fields = [model.model_fields[path[-1]] for model in models if path[-1] in model.model_fields]
    return [kind for field in fields for kind in choices_of(field.annotation)]


def _models_at(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    return _models_in(model.model_fields[name].annotation)


def _is_text(kind: Any) -> bool:
    return kind is str or kind is type(None) or isinstance(kind, str)


def _given_text(text: str, *, nullable: bool) -> str | None:
    """The text of an override as it stands, or what stands within quotes around the whole of it."""
    plain = text.strip()
    if nullable and plain in {"", "~", "null"}:
        return None
    if len(plain) >= 2 and plain[0] == plain[-1] and plain[0] in "'\"":
        try:
            node = yaml.compose(plain, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return text  # such as '"this" or "that"'
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
    return text


def _entry(place: Any, name: str, override: str, where: str) -> Any:
    if isinstance(place, dict):
        return place[name]
    if isinstance(place, list) and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    kind = f"a list of {len(place)}" if isinstance(place, list) else "not a section"
    raise ConfigError(
        f"--set {printable(override)}: {where} is {kind}; there is no {name!r} in it. "
        "docs/configuration.md lists all keys"
    )


def _describe(problem: Any, data: dict[str, Any], schema: type[BaseModel]) -> str:
    location, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
    path = ".".join(key_path(location, data, missing=problem["type"] != "value_error")) or "the whole file"
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown key{_suggestion(path, location, schema)}"
    if problem["type"] == "missing":
        return f"{path}: missing; this key is required"
    if problem["type"] == "union_tag_invalid":
        expected = problem["ctx"]["expected_tags"]
        found = problem["ctx"].get("tag")
        return f"{path}.{problem['ctx']['discriminator'].strip(chr(39))}: one of {expected} (got {found!r})"
    given = problem.get("input")
    if problem["type"] == "string_pattern_mismatch" and path == "model.revision":
        message = "the 40 hex digits of a commit on the hub: a branch or a tag may move"
    if problem["type"] == "string_type" and isinstance(given, (bool, int, float, date)):
        message += "; put it in quotes"
    shown = "" if isinstance(given, (dict, list)) else f" (got {printable(repr(given), 80)})"
    return f"{path}: {message}{shown}"


def _suggestion(path: str, location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    parent, _, key = path.rpartition(".")
    siblings = _keys_at(location[:-1], schema)
    near = difflib.get_close_matches(key, siblings, 1)
    if near:
        return f"; did you mean {f'{parent}.' * bool(parent)}{near[0]}?"
    everywhere = dict(sorted(_all_keys(schema, ""), key=lambda named: -named[1].count(".")))  # the shallowest stays
    elsewhere = difflib.get_close_matches(key, everywhere, 1, 0.75)
    if elsewhere:
        return f"; did you mean {everywhere[elsewhere[0]]}?"
    return f"; valid here: {', '.join(siblings)}"


def _keys_at(location: tuple[int | str, ...], schema: type[BaseModel]) -> list[str]:
    models: list[type[BaseModel]] = [schema]
    for part in location:
        named = [model for model in models if part in model.model_fields]
        if named:
            models = [m for model in named for m in _models_in(model.model_fields[str(part)].annotation)]
        elif isinstance(part, str):  # the tag of a union's member
            models = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models_in(inner)]


def _all_keys(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, info in model.model_fields.items():
        yield name, f"{prefix}{name}"
        for inner in _models_in(info.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")
