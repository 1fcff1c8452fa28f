"""Defines what every section of a configuration is made of. Each field declares what it affects."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


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
    """Base of all sections: frozen; an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
