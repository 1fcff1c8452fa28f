"""Reads JSON out of a model's text and checks it against a JSON Schema (draft 2020-12).

Nothing is fetched: a schema may refer to its own parts only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

_FENCED = re.compile(r"^```(?:json)?[ \t]*\n(.*)\n```$", re.DOTALL | re.IGNORECASE)


class InvalidAnswerError(ValueError):
    """Says why a text is not the JSON that was asked for."""


def schema_problem(schema: dict[str, Any]) -> str | None:
    """Say why a schema cannot be used; None if it can."""
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"
    root: Any = DRAFT202012.create_resource(schema)
    resolver = Registry().with_resource("", root).resolver()
    for reference in _references(schema):
        if not reference.startswith("#"):
            return f"reference {reference!r} leads out of the schema; copy what it names into $defs"
        try:
            resolver.lookup(reference)
        except Unresolvable:
            return f"reference {reference!r} names nothing in the schema"
    return None


def read_json(text: str, schema: dict[str, Any]) -> str:
    """Return the JSON value in a text, as it is checked and written in one line.

    Args:
        text: JSON, alone or in one fenced block.
        schema: must have no `schema_problem`.

    Raises:
        InvalidAnswerError: no JSON, or not of this schema.
    """
    fenced = _FENCED.match(text.strip())
    try:
        value = json.loads(fenced.group(1) if fenced else text)
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()  # a lone surrogate is JSON to Python, but no text that could be stored
        error = next(_validator(json.dumps(schema)).iter_errors(value), None)
    except (ValueError, OverflowError, RecursionError) as problem:  # a number may be too large to be checked
        raise InvalidAnswerError(f"not JSON: {problem}") from problem
    if error is not None:
        raise InvalidAnswerError(f"{error.json_path}: {error.message}")
    return written


@lru_cache(maxsize=8)
def _validator(schema_text: str) -> Draft202012Validator:
    from jsonschema import Draft202012Validator
    from referencing import Registry

    return Draft202012Validator(json.loads(schema_text), registry=Registry())


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in {"$ref", "$dynamicRef"} and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(node, list):
        for entry in node:
            yield from _references(entry)
