"""Defines what every section of a configuration is made of. Each field declares what it affects."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def result_field(default: Any = ..., **constraints: Any) -> Any:
    """Declare a field whose value can change what stands in a row."""
    return Field(default, json_schema_extra={"affects": "rows"}, **constraints)


def runtime_field(default: Any = ..., **constraints: Any) -> Any:
    """Declare a field that only changes how fast, where or at what price rows are made."""
    return Field(default, json_schema_extra={"affects": "execution"}, **constraints)


class Section(BaseModel):
    """Base of all sections: frozen; an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
