"""Defines a row of the benchmark table: the `Benchmark` record and small readers of published columns.

Names a benchmark only where its wording needs a function of its own. Reads no files.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from pipeline.evaluation.benchmarks.subtitles import subtitle_text
from pipeline.tasks.answers import lettered

Row = Mapping[str, Any]
Aggregate = Literal["mean", "category_mean", "circular", "mme", "caption", "judge"]
LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Describes one benchmark: where its columns hold media, question, options and reference.

    Attributes:
        name: of the benchmark, as `convert` is given it.
        dataset: the published files whose columns these are.
        source: files of lmms-eval that the prompt and the score were read in.
        media_kind: of every item.
        media: cells of a row that hold its media: names without extension for videos.
        prompt: the whole text that is asked.
        reference: accepted answer, several, or None where the set keeps them secret.
        metric: how one answer is scored (`metrics.METRICS`), or ``caption`` / ``judge``: not one by one.
        aggregate: how scores become the published number (`pipeline.evaluation.benchmarks.scores`).
        max_new_tokens: what lmms-eval allows.
        options: for reading the letter, where the row has them apart.
        category: for the breakdown.
        question_id: of the row, given its place.
        keep: further columns that travel along.
        keep_row: whether the row belongs to this part.
        note: what differs or was not verified.
    """

    name: str
    dataset: str
    source: str
    media_kind: Literal["video", "image", "images"]
    media: Callable[[Row], list[Any]]
    prompt: Callable[[Row], str]
    reference: Callable[[Row], str | list[str] | None]
    metric: Callable[[Row], str]
    max_new_tokens: int
    aggregate: Aggregate = "mean"
    options: Callable[[Row], list[str] | None] = lambda row: None
    category: Callable[[Row], str | None] = lambda row: None
    question_id: Callable[[Row, int], Any] = lambda row, place: place
    keep: tuple[str, ...] = ()
    keep_row: Callable[[Row], bool] = lambda row: True
    note: str = ""


def always(value: str) -> Callable[[Row], str]:
    """Read the same value from every row."""
    return lambda row: value


def text_of(name: str) -> Callable[[Row], str | None]:
    """Return a column as text; None where it is absent or empty of a value."""
    return lambda row: None if row.get(name) is None else str(row[name])


def id_in(name: str) -> Callable[[Row, int], Any]:
    """Read the question's id from a column."""
    return lambda row, place: row[name]


def images(*names: str) -> Callable[[Row], list[Any]]:
    """Read one image a column, as far as the row has them."""
    return lambda row: [row[name] for name in names if row.get(name) is not None]


def video(name: str) -> Callable[[Row], list[Any]]:
    """Read the name of a video."""
    return lambda row: [row[name]]


def question(post: str = "") -> Callable[[Row], str]:
    """Word the question and what follows it."""
    return lambda row: f"{row['question']}{post}"


def choices(names: Sequence[str]) -> Callable[[Row], list[str]]:
    """Read options from columns of their own; empty ones and ``N/A`` are no options."""
    return lambda row: [str(row[n]) for n in names if str(row.get(n) or "nan") not in {"nan", "N/A"}]


def listed(name: str) -> Callable[[Row], list[str]]:
    """Read options from one column, as a list."""
    return lambda row: [str(option) for option in row[name]]


def bare(name: str) -> Callable[[Row], list[str]]:
    """Read options that come with their letters: ``A. red`` becomes ``red``."""
    return lambda row: [re.sub(r"^\s*\(?[A-Z][.):]\s*", "", str(option)) for option in row[name]]


def lettered_question(options: Callable[[Row], list[str]], post: str = LETTER) -> Callable[[Row], str]:
    """Word the question, an option a line with its letter, and the instruction."""
    return lambda row: f"{row['question']}\n{lettered(options(row))}{post}"


def letter_at(name: str) -> Callable[[Row], str | None]:
    """Read the letter of an index."""
    return lambda row: None if row.get(name) in (None, "") else ascii_uppercase[int(row[name])]


def answers(name: str) -> Callable[[Row], list[str] | None]:
    """Read several accepted answers."""
    return lambda row: [str(value) for value in row[name]] if row.get(name) is not None else None


# MMBench
_MMBENCH_LETTERS = tuple("ABCDE")


def mmbench_prompt(row: Row) -> str:
    """Word hint, question and options as MMBench does."""
    letters = [letter for letter in _MMBENCH_LETTERS if str(row.get(letter) or "nan") != "nan"]
    options = "\n".join(["There are several options:", *(f"{letter}. {row[letter]}" for letter in letters)])
    hint = "" if str(row.get("hint") or "nan") == "nan" else f"{row['hint']} "
    return f"{hint}{row['question']} {options}\n{LETTER}"


# MMMU
def mmmu_options(row: Row) -> list[str] | None:
    """Read MMMU's options, which its files carry as the text of a Python list; None for open questions."""
    if row["question_type"] != "multiple-choice":
        return None
    options = row["options"]
    return [str(option) for option in (ast.literal_eval(options) if isinstance(options, str) else options)]


def _mmmu_question(row: Row) -> str:
    options = mmmu_options(row)
    return str(row["question"]) if options is None else f"{row['question']}\n{lettered(options)}"


def mmmu_media(row: Row) -> list[Any]:
    """Read the images that question or options mention, in order of their numbers."""
    return [row[f"image_{n}"] for n in sorted(set(re.findall(r"<image (\d+)>", _mmmu_question(row))))]


def mmmu_prompt(row: Row) -> str:
    """Word MMMU's question with the instruction for its type."""
    return f"{_mmmu_question(row)}\n{PHRASE if mmmu_options(row) is None else LETTER}"


def mmmu_reference(row: Row) -> str | list[str] | None:
    """Read a letter, an answer, or several that are accepted."""
    answer = row.get("answer")
    if isinstance(answer, str) and answer.startswith("["):
        answer = ast.literal_eval(answer)
    return [str(value) for value in answer] if isinstance(answer, list) else answer


def nextqa_options(row: Row) -> list[str]:
    """Read the five options of NExT-QA."""
    return [str(row[f"a{n}"]).strip() for n in range(5)]


# Video-MME
_VIDEOMME = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)


def videomme_prompt(row: Row, ending: str) -> str:
    """Word Video-MME's question without subtitles."""
    return "\n".join([_VIDEOMME, str(row["question"]), *map(str, row["options"]), ending])


def videomme_subtitles_prompt(row: Row) -> str:
    """Word Video-MME's question after the subtitles in column ``subtitle``."""
    shown = subtitle_text(row["subtitle"]) if row["subtitle"] else "No subtitles available"
    return f"This video's subtitles are listed below: \n{shown}\n{videomme_prompt(row, 'The best answer is:')}"


def asked_twice(row: Row) -> str:
    """Video-ChatGPT's consistency set asks each thing twice, one wording a row; the other one is the text None."""
    return str(row["question_1"] if row.get("question_1") not in (None, "None") else row["question_2"])
