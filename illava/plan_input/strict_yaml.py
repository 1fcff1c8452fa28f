"""Reads YAML text strictly, and names the keys of what pydantic finds wrong in it. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml


class YAMLTextError(ValueError):
    """A text is not YAML, or says one key twice."""


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text. PyYAML lets errors of Python through: of dates, of numbers, of depth.

    Args:
        text: one document.
        where: begins each message, such as ``config my_job.yaml``.

    Raises:
        YAMLTextError: says what is wrong, and what to do.
    """
    try:
        _refuse_double_keys(yaml.compose(text, Loader=yaml.SafeLoader), where)
        return yaml.safe_load(text)
    except YAMLTextError:
        raise
    except yaml.YAMLError as error:
        raise YAMLTextError(f"{where} is not YAML: {error}; put text in quotes") from error
    except RecursionError as error:
        raise YAMLTextError(f"{where} is nested too deep, or holds itself by an alias") from error
    except ValueError as error:
        raise YAMLTextError(f"{where} has a date or number that is none ({error}); put text in quotes") from error


def key_path(location: tuple[int | str, ...], data: Any, *, missing: bool) -> Iterator[str]:
    """Spell a place as the file does: without the tags by which pydantic names a member of a union.

    The last part of a ``missing`` key is none, although the data lack it.
    """
    for depth, part in enumerate(location):
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, dict) and part in data):
            data = data[part]
        elif depth < len(location) - 1 or not missing:
            continue
        yield str(part)


def _refuse_double_keys(node: yaml.Node | None, where: str) -> None:
    """YAML keeps the last of two equal keys without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YAMLTextError(f"{where}, line {line}: a key is a name; this one is a {key.id}")
            if key.value in seen:
                raise YAMLTextError(
                    f"{where}, line {line}: `{key.value}` stands on line {seen[key.value]} already; leave one out"
                )
            seen[str(key.value)] = line
            _refuse_double_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _refuse_double_keys(entry, where)
