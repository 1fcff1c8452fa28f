"""Reads and fills prompt templates: ``{column}`` is a column of the manifest, ``{{`` and ``}}`` are braces.

A value is put in as it is, in one pass: braces in a value are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def template_fields(template: str) -> tuple[str, ...]:
    """Return the columns that a template names, each once, in order.

    Raises:
        ValueError: a brace without its partner, or empty braces; says where.
    """
    names: list[str] = []
    for found in _TOKEN.finditer(template):
        if found[0] in {"{", "}"}:
            raise ValueError(
                f"character {found.start() + 1} is a {found[0]!r} alone; write {found[0] * 2!r} for a brace"
            )
        if found[1] is not None:
            names.append(found[1])
        if found[1] is not None and not found[1].strip():
            raise ValueError(
                f"character {found.start() + 1}: {found[0]!r} names no column; write '{{{{}}}}' for braces"
            )
    return tuple(dict.fromkeys(names))


def fill_template(template: str, value_of: Callable[[str], str]) -> str:
    """Return a template's text with the value of each column that it names."""
    return _TOKEN.sub(lambda found: found[0][0] if found[1] is None else value_of(found[1]), template)
