"""Defines the section `sampling` of a configuration: how answers are drawn, and what ends them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from illava.engine.loop_detector import MIN_LOOP_TOKENS
from pipeline.config.base import Section, optional_result_field, result_field
from pipeline.config.grammar import GrammarConfig


class SamplingConfig(Section):
    """Says how text is drawn from the model, and when an answer ends; temperature 0 is greedy.

    Attributes:
        max_new_tokens: tokens of an answer, at most.
        temperature: 0 is greedy; else the divisor of the logits.
        top_p: share of the probability that is drawn from.
        top_k: draws from so many of the most probable tokens.
        min_p: draws from tokens at least this share as probable as the most probable one.
        repetition_penalty: divides the positive logits of tokens of the prompt's text and of the answer so far, and
            multiplies the negative ones. Penalties harm tables and JSON, whose signs repeat; ``loop_tokens`` does not.
        presence_penalty: subtracted from the logits of tokens that stand in the answer so far.
        frequency_penalty: subtracted once for each time a token stands in the answer so far.
        stop: texts that end an answer; it is cut before them.
        loop_tokens: an answer whose last so many tokens repeat one period of at most 64 tokens is a loop: it has
            ``finish_reason`` ``loop``. Rows of a table that differ in one cell are none. null looks for no loops. For
            documents take 1024, since pages do repeat empty cells and dotted lines.
        on_loop: ``stop`` ends the answer and keeps its text whole; ``cut`` ends it and cuts the text to the first
            period; ``keep`` lets it go on, and names it a loop if it still is one at ``max_new_tokens``; ``retry`` asks
            once more at temperature 0.2 or the configured one if higher. The second answer stands, whatever it is;
            ``attempts``, counts and seconds cover both.
        grammar: what an answer may be. Penalties act within it. A text of ``stop``, a loop and ``max_new_tokens`` may
            cut an answer, which then is none. null draws freely.
        logprobs: fills the columns ``answer_logprob`` and, for multiple choice and yes or no, ``option_probabilities``.
    """

    max_new_tokens: int = result_field(128, ge=1)
    temperature: float = result_field(0.0, ge=0)
    top_p: float = result_field(1.0, gt=0, le=1)
    top_k: int | None = optional_result_field(ge=1)
    min_p: float | None = optional_result_field(gt=0, le=1)
    repetition_penalty: float | None = optional_result_field(gt=0, allow_inf_nan=False)
    presence_penalty: float | None = optional_result_field(ge=-2, le=2)
    frequency_penalty: float | None = optional_result_field(ge=-2, le=2)
    stop: list[Annotated[str, Field(min_length=1)]] | None = optional_result_field(min_length=1)
    loop_tokens: int | None = optional_result_field(256, ge=MIN_LOOP_TOKENS)
    on_loop: Literal["stop", "cut", "keep", "retry"] = optional_result_field("stop", off="stop")
    grammar: GrammarConfig | None = optional_result_field()
    logprobs: bool = optional_result_field(False, off=False)

    @model_validator(mode="after")
    def _looks_for_loops_to_act_on(self) -> SamplingConfig:
        if self.loop_tokens is None and self.on_loop != "stop":
            raise ValueError(f"on_loop is {self.on_loop}, and loop_tokens null looks for no loops; set loop_tokens")
        return self

    def without_effect(self) -> frozenset[str]:
        """Where no answer is long enough for a loop, what happens to one changes no row."""
        is_off = self.loop_tokens is None or self.loop_tokens > self.max_new_tokens
        return frozenset({"loop_tokens", "on_loop"}) if is_off else frozenset()
