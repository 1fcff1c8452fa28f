"""Asks a question about an image, a video or a document, reads the answer out of the text, and scores it.

How answers are read stands in `pipeline.tasks.answers`, scores in `pipeline.tasks.metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from pipeline.config.schema import QuestionConfig
from pipeline.records import MediaItem
from pipeline.tasks.answers import lettered, mme_yes_no, option_letter, references_of, short_answer, yes_no
from pipeline.tasks.base import ParsedAnswer, Task
from pipeline.tasks.metrics import METRICS

UNSCORED = frozenset({"caption", "judge"})  # over the whole run, or by somebody else
KNOWN_METRICS = frozenset({*METRICS, *UNSCORED})
_YES_NO = tuple((word, f" {word}", word.title(), f" {word.title()}", word.upper()) for word in ("yes", "no"))
_READERS = {"yes_no": yes_no, "mme": mme_yes_no}
_MAX_OPTIONS = 8  # letters that count where the options stand in the question


@dataclass(frozen=True, slots=True)
class Question(Task):
    """Asks one question a row: multiple choice where the manifest has ``options``, else open."""

    config: QuestionConfig

    def own_prompt(self, item: MediaItem) -> str:
        asked = item.prompt or ""
        if item.options and self.config.choice_template is not None:
            return _fill(self.config.choice_template, question=asked, options=lettered(item.options))
        if not item.options and self.config.open_template is not None:
            return _fill(self.config.open_template, question=asked)
        return asked

    def choices(self, item: MediaItem) -> tuple[tuple[str, ...], ...]:
        metric = metric_of(self.config.metric, item.fields.get("metric"), item.options)
        if metric == "multiple_choice":
            letters = ascii_uppercase[: len(item.options or ())]
            return tuple((letter, f" {letter}", f"({letter}") for letter in letters)
        return _YES_NO if metric in _READERS else ()

    def parse(self, item: MediaItem, text: str) -> ParsedAnswer:
        metric = metric_of(self.config.metric, item.fields.get("metric"), item.options)
        if metric in UNSCORED:
            return ParsedAnswer()
        if metric == "multiple_choice":
            answer = option_letter(text, item.options or ("",) * _MAX_OPTIONS)
        else:
            answer = _READERS.get(metric, short_answer)(text)
        references = references_of(item.reference)
        if metric == "multiple_choice":
            references = tuple(reference_letter(reference, item.options) or reference for reference in references)
        if not references:
            return ParsedAnswer(answer)
        return ParsedAnswer(answer, 0.0 if answer is None else METRICS[metric](answer, references))


def metric_of(configured: str, of_item: str | None, options: Sequence[str] | None) -> str:
    """Return an item's metric: the configured one; under ``auto`` the manifest's, else by whether there are options."""
    if configured != "auto":
        return configured
    return of_item or ("multiple_choice" if options else "exact_match")


def reference_letter(reference: str, options: Sequence[str] | None) -> str | None:
    """Return the letter a reference means: a letter, or an option's own words; None if neither."""
    plain = reference.strip()
    if len(plain) == 1 and plain.upper() in ascii_uppercase[: len(options or ()) or _MAX_OPTIONS]:
        return plain.upper()
    same = [n for n, option in enumerate(options or ()) if option.strip() == plain]
    return ascii_uppercase[same[0]] if len(same) == 1 else None


def question_problem(
    configured: str, *, prompt: str | None, options: Sequence[str] | None, reference: str | None, metric: str | None
) -> str | None:
    """Say why a manifest's row cannot be asked or scored; None where it can."""
    if not prompt:
        return "no question; add a column `question`"
    if options and not 2 <= len(options) <= len(ascii_uppercase):
        return f"{len(options)} options; there may be 2 to {len(ascii_uppercase)}"
    if metric and metric not in KNOWN_METRICS:
        return f"unknown metric {metric!r} in column `metric`; one of {', '.join(sorted(KNOWN_METRICS))}"
    chosen = metric_of(configured, metric, options)
    for value in references_of(reference):
        if chosen == "multiple_choice" and reference_letter(value, options) is None:
            return f"reference {value!r} is neither an option's letter nor an option"
        if chosen in _READERS and value.strip().lower() not in {"yes", "no"}:
            return f"reference {value!r} is neither yes nor no"
    return None


def _fill(template: str, **parts: str) -> str:
    """In one pass: a question may itself hold braces."""
    return re.sub(r"\{(question|options)\}", lambda place: parts.get(place[1], place[0]), template)
