"""Defines the ``task`` section of a job: what the model is asked.

`pipeline.tasks` says what that means for an item.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator

from illava.grammar.check import json_schema_problem
from pipeline.config.base import Section, optional_result_field, result_field
from pipeline.config.prompt_template import template_fields


class TurnConfig(Section):
    """Shows the model a turn of a conversation before the item's own: what a user asked, and what was answered.

    Attributes:
        user: what was asked.
        assistant: what was answered.
    """

    user: str = result_field(min_length=1)
    assistant: str = result_field(min_length=1)


class RefineConfig(Section):
    """Asks once more about the same media, when the model has answered.

    Attributes:
        prompt: the second turn; the first one and the model's answer to it stand before it.
    """

    prompt: str = result_field(min_length=1)


class AskConfig(Section):
    """Says what surrounds the question that every item is asked, whatever the kind of task.

    Attributes:
        system_prompt: stands before the conversation, where the model's chat template has a place for it; null leaves
            the template's own.
        turns: earlier turns of the conversation, as examples; they hold text alone. The item's media stand in the last
            turn.
        template_args: values of variables of the model's chat template, such as ``enable_thinking``; a name that the
            template does not use is refused.
        prompt_template: what every item is asked, in place of the other prompts: ``{column}`` is the item's value in
            that column of the manifest, ``{{`` a brace. A column that is missing or empty is refused before the run.
        refine: a second turn about the same media, which are neither loaded nor encoded again. Its answer is the row's
            ``text``; the first one goes into ``drafts``.
        candidates: so many answers are drawn of one prompt, which is read once; ``candidates`` has them all, and
            ``text`` the first. Needs ``sampling.temperature`` above 0, and goes without ``refine``.
    """

    _replaced: ClassVar[tuple[str, ...]] = ()  # keys that do nothing beside prompt_template

    system_prompt: str | None = optional_result_field(min_length=1)
    turns: list[TurnConfig] | None = optional_result_field(min_length=1)
    template_args: dict[str, JsonValue] | None = optional_result_field(min_length=1)
    prompt_template: str | None = optional_result_field(min_length=1)
    refine: RefineConfig | None = optional_result_field()
    candidates: int | None = optional_result_field(ge=2, le=64)

    @field_validator("prompt_template")
    @classmethod
    def _can_be_filled(cls, template: str | None) -> str | None:
        if template is not None:
            template_fields(template)
        return template

    @model_validator(mode="after")
    def _asks_one_thing(self) -> AskConfig:
        if self.prompt_template is not None:
            fields = type(self).model_fields
            unread = [name for name in self._replaced if getattr(self, name) != fields[name].default]
            if unread:
                raise ValueError(f"prompt_template replaces {' and '.join(unread)}; leave out one of them")
        if self.refine is not None and self.candidates is not None:
            raise ValueError("refine goes on from one answer, and candidates draws several; leave out one of them")
        return self


class CaptionConfig(AskConfig):
    """Asks for one text per item by one prompt. A manifest's ``prompt`` column overrides it item by item."""

    _replaced: ClassVar[tuple[str, ...]] = ("prompt",)

    kind: Literal["caption"] = result_field("caption")
    prompt: str = result_field("Describe the video in two sentences.", min_length=1)


class QuestionConfig(AskConfig):
    """Asks one question a row of a manifest.

    The manifest's columns are ``question``, ``options``, ``reference``, ``category`` and ``metric``.

    Attributes:
        metric: how an answer is scored against ``reference``; ``auto`` takes the row's column ``metric``, else
            ``multiple_choice`` where it has options and ``exact_match`` where not; ``yes_no`` reads the answer in any
            form, ``mme`` by that benchmark's own rule; ``caption`` and ``judge`` are not scored row by row.
        choice_template: how a question with options is worded, from ``{question}`` and ``{options}``; null asks the
            question as it stands in the manifest.
        open_template: how a question without options is worded, from ``{question}``; null as above.
    """

    _replaced: ClassVar[tuple[str, ...]] = ("choice_template", "open_template")

    kind: Literal["question"] = result_field("question")
    metric: Literal[
        "auto",
        "multiple_choice",
        "yes_no",
        "mme",
        "exact_match",
        "vqa_accuracy",
        "anls",
        "relaxed_accuracy",
        "mmmu_open",
        "caption",
        "judge",
    ] = result_field("auto")
    choice_template: str | None = result_field(
        "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
    )
    open_template: str | None = result_field("{question}\nAnswer the question using a single word or phrase.")

    @field_validator("choice_template", "open_template")
    @classmethod
    def _has_its_places(cls, template: str | None, info: ValidationInfo) -> str | None:
        needed = ("{question}", "{options}") if info.field_name == "choice_template" else ("{question}",)
        if template is not None and (missing := [place for place in needed if place not in template]):
            raise ValueError(f"the template lacks {' and '.join(missing)}")
        return template


class DocumentConfig(AskConfig):
    """Asks about the pages of each document, window by window.

    An item may be a PDF, a TIFF, an image or an image set.

    Attributes:
        prompt: asked of every window of pages. A manifest's ``prompt`` column overrides it item by item.
        output: ``markdown``: the answer as it is; ``json``: one JSON value a window, checked against ``json_schema``.
        json_schema: of one window's answer (draft 2020-12, references within itself only); it is shown to the model
            behind the prompt.
        enforce_schema: answers are drawn by ``json_schema``, so that none but a cut one can be anything else; false
            leaves them to the model and to the check, and takes keywords that cannot be enforced.
        pages_per_request: pages the model sees at once. Windows are cut in page order and asked one after the other.
    """

    _replaced: ClassVar[tuple[str, ...]] = ("prompt",)

    kind: Literal["document"] = result_field("document")
    prompt: str = result_field("Convert this page to markdown. Answer with the markdown alone.", min_length=1)
    output: Literal["markdown", "json"] = result_field("markdown")
    json_schema: dict[str, JsonValue] | None = result_field(None)
    enforce_schema: bool = optional_result_field(True, off=False)
    pages_per_request: int = result_field(1, ge=1)

    @model_validator(mode="after")
    def _has_a_schema_for_json(self) -> DocumentConfig:
        if self.json_schema is None:
            if self.output == "json":
                raise ValueError("output json needs json_schema; {} accepts any JSON")
            return self
        if self.output != "json":
            raise ValueError(f"json_schema checks output json, and output is {self.output}")
        from pipeline.json_schema import schema_problem

        if problem := schema_problem(self.json_schema):
            raise ValueError(f"json_schema: {problem}")
        if self.enforce_schema and (problem := json_schema_problem(self.json_schema)):
            raise ValueError(f"json_schema: {problem}; enforce_schema: false only checks answers against it")
        return self

    @property
    def has_grammar(self) -> bool:
        """Whether answers are drawn by ``json_schema``."""
        return self.json_schema is not None and self.enforce_schema

    def without_effect(self) -> frozenset[str]:
        """Without a schema there is none to enforce."""
        return frozenset() if self.json_schema is not None else frozenset({"enforce_schema"})


TaskConfig = Annotated[CaptionConfig | QuestionConfig | DocumentConfig, Field(discriminator="kind")]
