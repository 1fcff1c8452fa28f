"""Computes CIDEr-D and BLEU of captions against several references each, over a whole set.

Own code, because no light and well-kept library has both: pycocoevalcap (last release 2020) is a 104 MB wheel that
needs Java for its tokenizer, aac-metrics needs Java too, sacrebleu has no CIDEr. The numbers equal pycocoevalcap's on
the same words (`tests/pipeline/evaluation/test_caption_metrics.py`).

What differs is how captions become words: pycocoevalcap asks Stanford's PTB tokenizer; here text is lower-cased and
split at white space and punctuation, and "it's" becomes "it 's". Both give the same words on plain captions; known
differences are abbreviations ("u.s." there, "u.s" here), brackets (words of their own there) and "cannot" ("can not").
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

Grams = Counter[tuple[str, ...]]
_INSIDE = r"(?:[-./&]\w+|(?<=\d)[,:]\d+)"  # what may stand within a word: t-shirt, 3.5, and/or, 10:30
_WORD = re.compile(rf"n't\b|'(?:s|re|ve|d|ll|m)\b|\w+{_INSIDE}*(?=n't\b)|\w+{_INSIDE}*|[%$#&@+*/=<>]")


def words_of(caption: str) -> tuple[str, ...]:
    """Split into lower-case words, punctuation left out: ``it's a cat.`` is ``it 's a cat``."""
    return tuple(_WORD.findall(caption.lower()))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; the mean is the score that papers give (times 100 / 10 there: 1.2 is "120").

    A set of one caption scores 0: inverse document frequencies come from the references of the whole set.

    Args:
        captions: one for each medium.
        references: the accepted captions of each medium.

    Raises:
        ValueError: a caption without references, or the lengths differ.

    Source: Vedantam et al. 2015 (arXiv 1411.5726); pycocoevalcap 1.2 ``cider/cider_scorer.py`` (n = 4, sigma = 6,
        counts clipped, Gaussian penalty on the difference of lengths).
    """
    _check(captions, references)
    grams = [[_grams(words_of(reference)) for reference in several] for several in references]
    in_media: Counter[tuple[str, ...]] = Counter()
    for several in grams:
        in_media.update({gram for counts in several for gram in counts})
    log_num_media = math.log(len(captions)) if captions else 0.0
    idf = {gram: log_num_media - math.log(count) for gram, count in in_media.items()}
    scores = []
    for caption, several in zip(captions, grams, strict=True):
        mine = _weigh(_grams(words_of(caption)), idf, log_num_media)
        total = sum(_similarity(mine, _weigh(counts, idf, log_num_media)) for counts in several)
        scores.append(10.0 * total / len(several))
    return scores


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of the whole set, 0 to 1, against the reference of nearest length.

    Raises:
        ValueError: a caption without references, or the lengths differ.

    Source: Papineni et al. 2002; pycocoevalcap 1.2 ``bleu/bleu_scorer.py`` (option "closest"), with its small
        constants in place of a zero.
    """
    _check(captions, references)
    length, nearest = 0, 0
    right, tried = [0] * 4, [0] * 4
    for caption, several in zip(captions, references, strict=True):
        words, others = words_of(caption), [words_of(reference) for reference in several]
        length += len(words)
        nearest += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        most: Grams = Counter()
        for other in others:
            most |= _grams(other)
        for gram, count in (_grams(words) & most).items():
            right[len(gram) - 1] += count
        for n in range(4):
            tried[n] += max(0, len(words) - n)
    tiny, small = 1e-15, 1e-9
    short = (length + tiny) / (nearest + small)
    penalty = math.exp(1 - 1 / short) if short < 1 else 1.0
    product, scores = 1.0, []
    for n in range(4):
        product *= (right[n] + tiny) / (tried[n] + small)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores[0], scores[1], scores[2], scores[3]


def _check(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions, but {len(references)} sets of references")
    if empty := [n for n, several in enumerate(references) if not several]:
        raise ValueError(f"caption {empty[0]} has no reference")


def _grams(words: tuple[str, ...]) -> Grams:
    return Counter(words[n : n + size] for size in (1, 2, 3, 4) for n in range(len(words) - size + 1))


def _weigh(counts: Grams, idf: dict[tuple[str, ...], float], unseen: float) -> tuple[list[dict], list[float], int]:
    """Weights and norm for each n, and the length that CIDEr-D takes: the number of bigrams."""
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(4)]
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * idf.get(gram, unseen)
    norms = [math.sqrt(sum(value * value for value in of_n.values())) for of_n in weights]
    return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)


def _similarity(mine: tuple, theirs: tuple) -> float:
    """The mean over n of the clipped cosine, times the penalty on the difference of lengths."""
    (weights, norms, length), (other_weights, other_norms, other_length) = mine, theirs
    total = 0.0
    for of_n, norm, other_of_n, other_norm in zip(weights, norms, other_weights, other_norms, strict=True):
        product = sum(min(of_n[gram], other_of_n[gram]) * other_of_n[gram] for gram in of_n.keys() & other_of_n.keys())
        total += product / (norm * other_norm) if norm and other_norm else product
    return total / 4 * math.exp(-((length - other_length) ** 2) / (2 * 6.0**2))
