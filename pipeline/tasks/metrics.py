"""Scores one answer against its references, 0 to 1, each metric with its source. Pure functions of text.

`pipeline.tasks.answers` reads the answer out of a text. What is computed over a whole run stands in
`pipeline.evaluation.benchmarks.scores`; CIDEr and BLEU in `pipeline.evaluation.caption_metrics`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence

from rapidfuzz.distance import Levenshtein


def multiple_choice(answer: str, references: Sequence[str]) -> float:
    """Score 1 where the letter is the reference's letter, in any case."""
    return float(any(answer.strip().upper() == reference.strip().upper() for reference in references))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Score 1 where answer and a reference are the same but for case, punctuation and white space.

    Source: ``exact_match`` of lmms-eval ``lmms_eval/api/metrics.py`` (0.7.3) with ``ignore_case`` and
        ``ignore_punctuation``; here white space is also collapsed, and a number keeps its sign and its decimal point
        (there ``-1`` equals ``1`` and ``3.5`` equals ``35``).
    """
    return float(any(_plain(answer) == _plain(reference) for reference in references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Score agreement with ten people's answers: the mean over leaving one out of min(1, others who agree / 3).

    Answer and references are normalised: punctuation, articles, number words, contractions.

    Source: Antol et al. 2015 (arXiv 1505.00468), github.com/GT-Vision-Lab/VQA
        ``PythonEvaluationTools/vqaEvaluation/vqaEval.py``; the normalisation as lmms-eval's
        ``lmms_eval/tasks/vqav2/utils.py`` applies it, to the references always (the first script leaves ten equal
        references as they are).
    """
    mine = normalise_vqa(answer)
    agree = [normalise_vqa(reference) == mine for reference in references]
    total = sum(agree)
    return sum(min(1.0, (total - own) / 3) for own in agree) / len(agree)


def anls(answer: str, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """Score the normalised Levenshtein similarity to the nearest reference; 0 below the threshold.

    Case and runs of white space do not count.

    Source: Biten et al. 2019 (arXiv 1905.13648), equation 1; lmms-eval ``lmms_eval/api/metrics.py`` (0.7.3)
        ``anls``, which divides by the length before white space is collapsed, this after.
    """
    mine = " ".join(answer.lower().split())
    best = 0.0
    for reference in references:
        theirs = " ".join(reference.lower().split())
        best = max(best, Levenshtein.normalized_similarity(mine, theirs))
    return best if best >= threshold else 0.0


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """Score 1 where a number is within 5 % of the reference, or a text the same but for case.

    ``12%`` is 0.12. A reference of zero is compared as text, since no number is within 5 % of it.

    Source: Masry et al. 2022 (arXiv 2203.10244), section 5.1; lmms-eval ``relaxed_correctness`` in
        ``lmms_eval/tasks/chartqa/utils.py`` (0.7.3).
    """
    return float(any(_relaxed(answer, reference) for reference in references))


def mmmu_open(answer: str, references: Sequence[str]) -> float:
    """Score 1 where a reference is found in what the answer comes to: its conclusions and the numbers in them.

    Numbers are compared after rounding to two places; a text reference must occur in a conclusion.

    Source: MMMU ``eval/eval_utils.py`` (``parse_open_response``, ``eval_open``) as in lmms-eval
        ``lmms_eval/tasks/mmmu/utils.py`` (0.7.3).
    """
    wanted = [value for reference in references for value in _number_or_text(reference)]
    for found in _conclusions(answer):
        if isinstance(found, float):
            if found in wanted:
                return 1.0
        elif any(isinstance(value, str) and value in found for value in wanted):
            return 1.0
    return 0.0


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "multiple_choice": multiple_choice,
    "yes_no": multiple_choice,
    "mme": multiple_choice,
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "mmmu_open": mmmu_open,
}


# Of `normalise_vqa`.
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_VQA_ARTICLES = frozenset({"a", "an", "the"})
# Contractions by what they become. With one apostrophe the word without it is mapped; with two, the word that lacks
# one of them. Words such as "shes" and "its" are not in the official list.
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
_CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()},
    **{word.replace("'", "", 1): word for word in _TWO_APOSTROPHES.split()},
    **{"".join(word.rsplit("'", 1)): word for word in _TWO_APOSTROPHES.split()},
    **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"),
    **dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"),
    "somebody'd": "somebodyd",
}


def normalise_vqa(text: str) -> str:
    """Normalise: lower case, no punctuation and articles, number words as digits, contractions with apostrophe.

    Source: github.com/GT-Vision-Lab/VQA ``PythonEvaluationTools/vqaEvaluation/vqaEval.py`` and, with straight
        apostrophes and two more marks of punctuation, the EvalAI server's version (facebookresearch/mmf
        ``EvalAIAnswerProcessor``, as in lmms-eval 0.7.3 ``lmms_eval/tasks/_task_utils/vqa_eval_metric.py``), which this
        one equals.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    commas = re.search(r"(?<=\d),+(?=\d)", text) is not None
    for mark in _VQA_PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or commas else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = [_VQA_NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _VQA_ARTICLES)


_NUMBER_MARK = r"(?<!\w)-(?=\.?\d)|\.(?=\d)"
_PUNCTUATION = re.compile(rf"(?!{_NUMBER_MARK})[{re.escape(string.punctuation)}]")


def _plain(text: str) -> str:
    return " ".join(_PUNCTUATION.sub("", text.lower()).split())


def _relaxed(answer: str, reference: str) -> bool:
    mine, theirs = _number(answer), _number(reference)
    if mine is not None and theirs:
        return abs(mine - theirs) <= 0.05 * abs(theirs)
    return answer.strip().lower() == reference.strip().lower()


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


_CONCLUDE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with thousands separators
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def _conclusions(text: str) -> list[float | str]:
    """What each line comes to: its shortest end after a word such as "is"; with every number in it."""
    text = text.strip().strip(".").lower()
    sentences = text.split("\n")  # the source also splits before capitals, of which lower case has none
    keys = []
    for place, sentence in enumerate(sentences):
        marks = (*_CONCLUDE, "=") if place == len(sentences) - 1 else _CONCLUDE
        shortest = ""
        for end in (sentence.split(mark)[-1].strip() for mark in marks if mark in sentence):
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in {":", ",", ".", "!", "?", ";", "'"}:
            keys.append(shortest)
    keys = keys or [text]
    numbers = [number for key in keys for pattern in _NUMBERS for number in pattern.findall(key)]
    return [value for key in (*keys, *numbers) for value in _number_or_text(key)]


def _number_or_text(text: str) -> list[float | str]:
    """A number rounded to two places, else lower case; one letter gets a space, so that it matches no word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
