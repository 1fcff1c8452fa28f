"""Defines what every section of a configuration is made of. Each field declares what it affects."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_BOOLEAN_WORDS = ({False: "off", True: "on"}, {False: "no", True: "yes"})  # what YAML 1.1 reads as a boolean


def result_field(default: Any = ..., **constraints: Any) -> Any:
    """Declare a field whose value can change what stands in a row."""
    return Field(default, json_schema_extra={"affects": "rows"}, **constraints)


def optional_result_field(default: Any = None, *, off: Any = None, **constraints: Any) -> Any:
    """Declare a field that changes rows where it is set. At ``off`` it does nothing, as before the field came.

    A fingerprint leaves it out there, so that it is that of earlier runs.
    """
    return Field(default, json_schema_extra={"affects": "rows", "off": off}, **constraints)


def runtime_field(default: Any = ..., **constraints: Any) -> Any:
    """Declare a field that only changes how fast, where or at what price rows are made."""
    return Field(default, json_schema_extra={"affects": "execution"}, **constraints)


class Section(BaseModel):
    """Base of all sections: frozen; an unknown key is refused, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_words_for_booleans(cls, data: Any) -> Any:
        """Read YAML's booleans as the words they were written as (``off``), where a key takes such a word."""
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {
            key: _word_for(value, fields[key].annotation) if isinstance(value, bool) and key in fields else value
            for key, value in data.items()
        }

    def without_effect(self) -> frozenset[str]:
        """Name the fields that change no row beside what the others are."""
        return frozenset()


def result_fields(config: Section) -> dict[str, Any]:
    """Map the dotted key of every field that can change a row to its value, as JSON types; what is off is left out."""
    return dict(_walk(config, ""))


def _walk(section: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, info in type(section).model_fields.items():
        value, key, extra = getattr(section, name), f"{prefix}{name}", info.json_schema_extra
        if isinstance(value, Section):
            yield from _walk(value, f"{key}.")
        elif isinstance(extra, dict) and extra["affects"] == "rows" and not _is_off(section, name, extra):
            yield key, section.model_dump(mode="json", include={name})[name]


def _is_off(section: Section, name: str, extra: dict[str, Any]) -> bool:
    return name in section.without_effect() or ("off" in extra and getattr(section, name) == extra["off"])


def choices_of(annotation: Any) -> Iterator[Any]:
    """Yield what a field's type is made of: the members of its unions, and for a `Literal` each of its values."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from choices_of(member)
    elif typing.get_origin(annotation) is Literal:
        yield from typing.get_args(annotation)
    else:
        yield annotation


def _word_for(value: bool, annotation: Any) -> Any:
    choices = list(choices_of(annotation))
    if bool in choices or Any in choices:
        return value
    for words in _BOOLEAN_WORDS:
        if words[value] in choices:
            return words[value]
    return str(value).lower() if int in choices or float in choices else value  # a number would be read as 1 or 0
