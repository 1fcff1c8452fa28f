"""Defines ``sampling.grammar``: what an answer may be. Says where a grammar does not fit the task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from illava.grammar.check import grammar_problem, json_schema_problem
from illava.requests import Grammar
from pipeline.config.base import Section, optional_result_field
from pipeline.config.tasks import TaskConfig
from pipeline.json_schema import schema_problem


def _is_texts(choices: Any) -> str:
    return "texts" if isinstance(choices, list) else "options"


_Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Tag("texts")]
_Options = Annotated[Literal["options"], Tag("options")]


class GrammarConfig(Section):
    """Says what an answer may be, by one of its keys; nothing else is ever drawn. A row whose answer was cut is failed.

    Attributes:
        json_schema: one JSON value of this schema (draft 2020-12, references within itself only), without blanks
            between its parts, and with the properties in the schema's order. Unless ``additionalProperties`` is false a
            model may go on with properties of its own.
        regex: the whole answer matches it. The syntax is that of Rust's regex crate: no look-around, no references
            back; ``\\d`` is a digit of any script.
        choices: one of these texts; or ``options``, which for the task `question` stands for the letters of each row's
            options, and for yes and no under the metrics of that kind. Rows without such options are drawn freely.
    """

    json_schema: dict[str, JsonValue] | None = optional_result_field()
    regex: str | None = optional_result_field(min_length=1)
    choices: Annotated[_Texts | _Options, Discriminator(_is_texts)] | None = optional_result_field()

    @field_validator("json_schema")
    @classmethod
    def _can_be_enforced(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None and (problem := schema_problem(schema) or json_schema_problem(schema)):
            raise ValueError(problem)
        return schema

    @field_validator("regex")
    @classmethod
    def _has_answers(cls, regex: str | None) -> str | None:
        if regex is not None and (problem := grammar_problem(Grammar(regex=regex))):
            raise ValueError(problem.removeprefix("regex: "))
        return regex

    @field_validator("choices")
    @classmethod
    def _can_be_given(cls, choices: list[str] | str | None) -> list[str] | str | None:
        if isinstance(choices, list) and (problem := grammar_problem(Grammar(choices=tuple(choices)))):
            raise ValueError(problem.removeprefix("choices: "))
        return choices

    @model_validator(mode="after")
    def _is_one(self) -> GrammarConfig:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of json_schema, regex and choices; got {' and '.join(given) or 'none'}")
        return self

    def misfit(self, task: TaskConfig) -> str | None:
        """Say why a job's grammar does not fit its task; None if it does."""
        if self.choices == "options" and task.kind != "question":
            return f"sampling.grammar.choices: `options` are those of questions, and task.kind is {task.kind}"
        if task.kind == "document" and task.has_grammar:
            return (
                "sampling.grammar: task.json_schema is enforced, and an answer has one grammar; leave this one out, or "
                "set task.enforce_schema: false"
            )
        return None
