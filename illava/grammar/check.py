"""Says why no answer can be drawn by a grammar, and in which part of a JSON Schema. Loads llguidance, never torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from illava.requests import Grammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

# A weak model would fill its answer with the blanks that JSON allows between its parts.
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_flexible": False}
# Keywords whose value is a schema, or holds several.
_ONE = ("items", "additionalProperties", "not", "contains", "if", "then", "else", "propertyNames")
_MANY = ("properties", "patternProperties", "$defs", "dependentSchemas", "prefixItems", "anyOf", "oneOf", "allOf")


def grammar_problem(grammar: Grammar) -> str | None:
    """Say why a grammar cannot be used; None if it can."""
    given = [name for name in ("json_schema", "regex", "choices") if getattr(grammar, name) is not None]
    if len(given) != 1:
        return f"give one of json_schema, regex and choices; got {' and '.join(given) or 'none'}"
    if grammar.choices is not None and not (grammar.choices and all(grammar.choices)):
        return "choices: give texts that are not empty, one at least"
    if grammar.json_schema is not None:
        try:
            schema = json.loads(str(grammar.json_schema))
        except ValueError as error:
            return f"json_schema: not JSON: {error}"
        problem = json_schema_problem(schema)
    else:
        problem = _why_not(grammar)
    return None if problem is None else f"{given[0]}: {problem}"


def json_schema_problem(schema: Any) -> str | None:
    """Say where in a JSON Schema lies what keeps an answer from being drawn by it; None if nothing does."""
    if not isinstance(schema, dict):
        return "$: a schema is an object; {} allows any JSON"
    why = _why_not(Grammar(json_schema=schema))
    if why is not None:
        path, why = _place(schema, schema, why)
        return f"${path}: {why}"
    if not _ends(schema, schema, frozenset()):
        return "$: each value must hold another one, so no answer ever ends; let a property be absent or null"
    return None


def grammar_text(grammar: Grammar) -> str:
    """Return a grammar as llguidance reads it.

    Raises:
        ValueError: text that cannot be passed on, such as half of a surrogate pair.
    """
    from llguidance import LLMatcher

    if grammar.json_schema is not None:
        return LLMatcher.grammar_from_json_schema(str(grammar.json_schema), _JSON_OPTIONS)
    if grammar.regex is not None:
        return LLMatcher.grammar_from_regex(grammar.regex)
    texts = (json.dumps(text, ensure_ascii=False) for text in grammar.choices or ())
    return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")


@lru_cache(maxsize=1)
def _bytes() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _why_not(grammar: Grammar) -> str | None:
    """What llguidance says of a grammar that it does not support, or that has no answer."""
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(_bytes(), grammar_text(grammar), log_level=0)
    except ValueError as error:
        return str(error)
    if not matcher.is_error():
        matcher.compute_bitmask()  # a language without a word shows with the first mask
    if not matcher.is_error():
        return None
    first, *lines = matcher.get_error().splitlines()
    if first.startswith("NoExtension"):
        return "no answer is possible"
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return reasons[0] if reasons else first.rpartition("(in regex): ")[2].strip()


def _place(schema: dict[str, Any], root: dict[str, Any], why: str) -> tuple[str, str]:
    """The path to the innermost part of a schema that is refused alone, too, and why it is."""
    needed = re.search(r"required property '(.+)' is unsatisfiable", why)
    for path, part in _parts(schema):
        own = _why_not(Grammar(json_schema={"$defs": root.get("$defs", {})} | part)) if isinstance(part, dict) else None
        if own is not None and (own == why or (needed and path == f".properties.{needed[1]}")):
            deeper, reason = _place(part, root, own)
            return path + deeper, reason
    return "", why


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in _ONE:
        if key in schema:
            yield f".{key}", schema[key]
    for key in _MANY:
        many = schema.get(key, {})
        for name, part in many.items() if isinstance(many, dict) else enumerate(many):
            yield f".{key}.{name}", part


def _ends(schema: Any, root: dict[str, Any], within: frozenset[str]) -> bool:
    """Whether a schema has a value that does not hold a value of ``within``, references that are being followed."""
    if not isinstance(schema, dict):
        return schema is not False
    reference = schema.get("$ref")
    if reference in within:
        return False
    if reference is not None and not _ends(_named(root, reference), root, within | {reference}):
        return False
    if not all(_ends(part, root, within) for part in schema.get("allOf", ())):
        return False
    for key in ("anyOf", "oneOf"):
        if key in schema and not any(_ends(part, root, within) for part in schema[key]):
            return False
    kinds = schema.get("type", "any")
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if kinds - {"object", "array"} or "enum" in schema or "const" in schema:
        return True
    of_object = [schema.get("properties", {}).get(name) for name in schema.get("required", ())]
    of_array = [*schema.get("prefixItems", ()), schema.get("items")]
    of_array = of_array[: schema.get("minItems", 0)]
    needed = {"object": of_object, "array": of_array}
    return any(all(_ends(part, root, within) for part in needed[kind]) for kind in kinds)


def _named(root: dict[str, Any], reference: str) -> Any:
    """What a pointer into the schema names; what is named otherwise has an end, for all that is known."""
    place: Any = root
    if not reference.startswith("#"):
        return None
    for name in reference[1:].split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        place = place.get(key) if isinstance(place, dict) else place[int(key)] if key.isdigit() else None
    return place
