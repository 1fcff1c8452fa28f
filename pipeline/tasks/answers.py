"""Reads what a model's text answers: an option letter, yes or no, a short answer.

An answer that cannot be read is None and counts as wrong; it is never drawn by chance, as some official scripts do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from string import ascii_uppercase

_PHRASE = re.compile(
    r"(?:answer|option|choice|choose|select|pick)(?:\s+(?:is|would be|should be))?\s*[:=]?\s*"
    r"(?:option|choice|letter)?\s*[\"'*(\[]*([A-Z])(?![A-Za-z'])",
    re.IGNORECASE,
)
_START = re.compile(r"^[\s\"'*(\[]*([A-Z])(?:$|[.):,;\]*\"'](?![a-z])|\s*\n)")
_BRACKET = re.compile(r"[(\[]([A-Z])[)\]]")
_END = re.compile(r"(?:^|[^A-Za-z'])([A-Z])[\s.)\]*\"'!]*$")
_ALONE = re.compile(r"(?<![A-Za-z'])([A-Z])(?![A-Za-z'])")
_YES_NO = frozenset({"yes", "no"})
_YES_NO_PHRASE = re.compile(r"\banswer\b(?:\s+(?:is|would be|should be))?\W{0,8}(yes|no)\b")
_NO_ANSWER = re.compile(
    r"\b(?:yes\W{1,4}(?:or|and)\W{1,4}no|no\W{1,4}(?:or|and)\W{1,4}yes|yes\W{0,2}/\W{0,2}no)\b"
    r"|\bno (?:idea|clue|opinion|information|way (?:to|of))\b"
)
_WORD = re.compile(r"[^\W_]+")
_EDGES = " \t\r\n.,!?;:'\"*"


def option_letter(text: str, options: Sequence[str]) -> str | None:
    """Read the letter of the option that a text names, or None.

    Tried in this order: a letter that stands first (``B``, ``(B)``, ``B. a cat``); the last letter after words such as
    "the answer is"; a text that is one option's words; the last bracketed letter; a letter at the end; the only option
    whose words occur; the only letter that stands alone. "A" and "I" followed by a word are English, not an option.

    Args:
        text: what the model wrote.
        options: in order; the first is ``A``.

    Source: the forms are those of lmms-eval ``lmms_eval/tasks/_task_utils/mcq_extract.py`` (0.7.3) and of MMMU
        ``eval/eval_utils.py``; both end in a guess (any capital of the text; a random option), this one in None.
    """
    letters = ascii_uppercase[: len(options)]
    stripped = text.strip()
    if len(stripped.strip(_EDGES + "()[]")) == 1:
        letter = stripped.strip(_EDGES + "()[]").upper()
        return letter if letter in letters else None
    for found in (
        _first(_START, stripped, letters),
        _last_phrase(stripped, letters),
        _same_words(stripped, options),
        _last(_BRACKET, stripped, letters),
        _first(_END, stripped, letters),
        _only_words(stripped, options),
        _only_alone(stripped, letters),
    ):
        if found is not None:
            return found
    return None


def yes_no(text: str) -> str | None:
    """Read ``yes``, ``no`` or None, in any case and whatever marks stand around.

    Tried in this order: a text that is one letter (``Y``); the last yes or no behind the word "answer" ("the answer is
    **no**"); the first word; the last word, where the other of the two does not occur ("I would say yes."). "Yes or no"
    repeats the question, and "no idea" and "not sure" answer nothing: none of them is read.
    """
    plain = _NO_ANSWER.sub(" ", text.lower())
    words = _WORD.findall(plain)
    if len(words) == 1 and len(words[0]) == 1:
        return {"y": "yes", "n": "no"}.get(words[0])
    if concluded := _YES_NO_PHRASE.findall(plain):
        return concluded[-1]
    first, last = (words[0], words[-1]) if words else ("", "")
    if first in _YES_NO:
        return first
    return last if last in _YES_NO and len(_YES_NO.intersection(words)) == 1 else None


def mme_yes_no(text: str) -> str | None:
    """Read ``yes``, ``no`` or None by MME's own rule, by which "Not sure" is a no and "**Yes**" is not read.

    Source: as in lmms-eval ``lmms_eval/tasks/mme/utils.py`` ``parse_pred_ans``: the whole text, one letter, or "yes" /
        "no" within the first four characters. Full stops are left out before.
    """
    answer = text.lower().strip().replace(".", "")
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer)
    return next((word for word in ("yes", "no") if word in answer[:4]), None)


def short_answer(text: str) -> str:
    """Put the text on one line, without outer white space; what else is normalised belongs to the metric."""
    return " ".join(text.split())


def references_of(reference: str | None) -> tuple[str, ...]:
    """Read the accepted answers of a manifest's ``reference`` column: a JSON array of texts, else the text itself."""
    if reference is None:
        return ()
    if reference.startswith("["):
        try:
            values = json.loads(reference)
        except (ValueError, RecursionError):
            return (reference,)
        if values and isinstance(values, list) and all(isinstance(value, str) for value in values):
            return tuple(values)
    return (reference,)


def lettered(options: Sequence[str]) -> str:
    """Write one option a line: ``A. first``."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))


def _first(pattern: re.Pattern[str], text: str, letters: str) -> str | None:
    match = pattern.search(text)
    return match.group(1) if match and match.group(1) in letters else None


def _last(pattern: re.Pattern[str], text: str, letters: str) -> str | None:
    found = [letter for letter in pattern.findall(text) if letter in letters]
    return found[-1] if found else None


def _last_phrase(text: str, letters: str) -> str | None:
    """Words before the letter may be in any case, the letter is a capital; "the answer is A man" names none."""
    found = [
        match.group(1)
        for match in _PHRASE.finditer(text)
        if match.group(1) in letters and not re.match(r"\s+[a-z]", text[match.end() :])
    ]
    return found[-1] if found else None


def _same_words(text: str, options: Sequence[str]) -> str | None:
    plain = text.strip(_EDGES).casefold()
    same = [n for n, option in enumerate(options) if option.strip(_EDGES).casefold() == plain]
    return ascii_uppercase[same[0]] if len(same) == 1 else None


def _only_words(text: str, options: Sequence[str]) -> str | None:
    """The only option whose words occur whole; an option inside a longer one that also occurs does not count."""
    plain = text.casefold()
    words = [option.strip(_EDGES).casefold() for option in options]
    found = [n for n, word in enumerate(words) if word and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", plain)]
    found = [n for n in found if not any(m != n and words[n] in words[m] for m in found)]
    return ascii_uppercase[found[0]] if len(found) == 1 else None


def _only_alone(text: str, letters: str) -> str | None:
    alone = {
        match.group(1)
        for match in _ALONE.finditer(text)
        if match.group(1) in letters and not (match.group(1) in "AI" and re.match(r"\s+\w", text[match.end() :]))
    }
    return alone.pop() if len(alone) == 1 else None
