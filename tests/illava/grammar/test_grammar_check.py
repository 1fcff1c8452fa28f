"""Grammars that no answer can be drawn by: refused with the place in a schema; and those that look like them."""

import json
import re
import subprocess
import sys

import pytest

from illava.grammar.check import grammar_problem
from illava.requests import Grammar

OBJECT = {"type": "object", "required": ["a"]}
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
REFUSED = {
    "none": (Grammar(), "give one of json_schema, regex and choices; got none"),
    "two": (Grammar(regex="a", choices=("a",)), "got regex and choices"),
    "no JSON": (Grammar(json_schema="{"), "json_schema: not JSON"),
    "no object": (Grammar(json_schema="true"), r"json_schema: \$: a schema is an object"),
    "keyword": (Grammar(json_schema={"not": {}}), r"json_schema: \$: Unimplemented keys: \[\"not\"\]"),
    "keyword within": (
        Grammar(json_schema={"properties": {"a": {"items": {"uniqueItems": True}}, "b": {}}}),
        r"\$\.properties\.a\.items: Unimplemented keys: \[\"uniqueItems\"\]",
    ),
    "keyword in a definition": (
        Grammar(json_schema={"$ref": "#/$defs/x", "$defs": {"x": {"anyOf": [{}, {"contains": {}}]}}}),
        r"\$\.\$defs\.x\.anyOf\.1: Unimplemented",
    ),
    "pattern": (Grammar(json_schema={"prefixItems": [{}, {"pattern": "(?=a)"}]}), r"\$\.prefixItems\.1: look-around"),
    "format": (
        Grammar(json_schema={"properties": {"a": {"format": "no"}}}),
        r"\$\.properties\.a: Unknown format",
    ),
    "bounds": (
        Grammar(json_schema=OBJECT | {"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}}),
        r"\$\.properties\.a: .*minimum \(5\)",
    ),
    "types": (Grammar(json_schema={"allOf": [{"type": "string"}, {"type": "null"}]}), r"\$: Unsatisfiable"),
    "empty pattern": (Grammar(json_schema={"type": "string", "pattern": r"[^\s\S]"}), r"\$: Unsatisfiable"),
    "itself for ever": (
        Grammar(json_schema={"$ref": "#/$defs/node", "$defs": {"node": NODE | {"required": ["next"]}}}),
        r"\$: each value must hold another one",
    ),
    "itself in a list": (
        Grammar(json_schema={"type": "array", "minItems": 1, "items": {"$ref": "#"}}),
        r"\$: each value must hold another one",
    ),
    "regex": (Grammar(regex="(a"), "regex: unclosed group"),
    "boundary": (Grammar(regex=r"\ba"), "regex: lookarounds not supported"),
    "reference back": (Grammar(regex=r"(a)\1"), "regex: backreferences are not supported"),
    "empty language": (Grammar(regex=r"a[^\s\S]"), "regex: no answer is possible"),
    "half a pair": (Grammar(regex="\ud800"), "regex: .*surrogates not allowed"),
    "no choices": (Grammar(choices=()), "choices: give texts"),
    "empty choice": (Grammar(choices=("a", "")), "choices: give texts"),
}
TAKEN = {
    "any": Grammar(json_schema={}),
    "text": Grammar(json_schema='{"type": "string"}'),
    "an optional part that cannot be": Grammar(json_schema={"type": "object", "properties": {"a": False}}),
    "itself, or nothing": Grammar(json_schema={"$ref": "#/$defs/node", "$defs": {"node": NODE}}),
    "itself, or null": Grammar(
        json_schema=OBJECT | {"properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}
    ),
    "itself by an escaped name": Grammar(
        json_schema={"$ref": "#/$defs/a~1b~0c", "$defs": {"a/b~c": {"type": ["array", "null"], "items": {"$ref": "#"}}}}
    ),
    "annotations": Grammar(json_schema={"type": "string", "title": "x", "examples": [1], "x-mine": True}),
    "a part of an alternative": Grammar(regex=r"a[^\s\S]|b"),
    "anchors": Grammar(regex="^a/b$"),
    "signs": Grammar(choices=('a "q" \\', "new\nline", "é 😀", "/x/", "%json", "a|b", "{}")),
}


@pytest.mark.parametrize(("grammar", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_answer_is_refused_with_its_place(grammar, message):
    assert re.search(message, grammar_problem(grammar) or "it was taken")


@pytest.mark.parametrize("grammar", TAKEN.values(), ids=TAKEN)
def test_what_has_an_answer_is_taken(grammar):
    assert grammar_problem(grammar) is None


def test_a_mapping_is_a_schemas_text_and_grammars_are_compared_by_it():
    schema = {"type": "object", "properties": {"ä": {"type": "string"}}}
    assert Grammar(json_schema=schema) == Grammar(json_schema=json.dumps(schema, ensure_ascii=False))
    assert len({Grammar(choices=("a",)), Grammar(choices=["a"]), Grammar(regex="a")}) == 2


def test_a_check_loads_no_torch():
    code = (
        "import sys; from illava.requests import Grammar; import illava.grammar.check as check\n"
        "assert 'llguidance' not in sys.modules; check.grammar_problem(Grammar(regex='a'))\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
