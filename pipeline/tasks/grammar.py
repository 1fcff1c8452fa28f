"""Says which grammar an item's answer is drawn by, and why an answer that was drawn by one may be none of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from illava.requests import Generation, Grammar
from pipeline.config.schema import GrammarConfig
from pipeline.json_schema import InvalidAnswerError, read_json

_WHY_CUT: dict[str | None, str] = {
    "length": "cut at sampling.max_new_tokens; ",
    "loop": "the answer repeats itself (see sampling.on_loop); ",
}


def grammar_of(
    config: GrammarConfig | None, *, choices: Sequence[Sequence[str]], json_schema: Mapping[str, Any] | None
) -> Grammar | None:
    """Return the grammar of one answer; None where it is drawn freely.

    Args:
        config: of the job.
        choices: of each option of the item, the texts by which an answer may name it, the plainest first.
        json_schema: of the task.
    """
    if json_schema is not None:
        return Grammar(json_schema=json_schema)
    if config is None:
        return None
    if config.choices == "options":
        return Grammar(choices=tuple(texts[0] for texts in choices)) if choices else None
    return Grammar(config.json_schema, config.regex, None if config.choices is None else tuple(config.choices))


def grammar_fault(generation: Generation, config: GrammarConfig | None = None) -> str | None:
    """Say why an answer is none of its grammar; None where it is one, or has no grammar.

    Args:
        generation: the answer.
        config: of the job; its JSON schema is checked once more, by another library.
    """
    if generation.follows_grammar is False:
        return f"{why_cut(generation)}the answer is no whole one of sampling.grammar"
    if config is not None and config.json_schema is not None:
        try:
            read_json(generation.text, config.json_schema)
        except InvalidAnswerError as error:
            return f"{why_cut(generation)}{error}"
    return None


def why_cut(generation: Generation) -> str:
    """Say what cut an answer, to be followed by what is wrong with it; empty where it ended by itself."""
    return _WHY_CUT.get(generation.finish_reason, "")
