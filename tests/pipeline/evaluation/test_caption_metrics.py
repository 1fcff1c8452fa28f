"""CIDEr and BLEU equal pycocoevalcap 1.2 on the same words; the numbers below came from its scorers."""

import pytest

from pipeline.evaluation.caption_metrics import bleu, cider, words_of

CAPTIONS = ["a man rides a horse on the beach", "two dogs play with a red ball", "a plate of food on a table"]
REFERENCES = [
    ["a man riding a horse along the beach", "a person rides a brown horse on the sand", "man on horse"],
    ["two dogs are playing with a ball", "dogs chase a red ball in the grass"],
    ["a white plate with pizza on it", "food on a plate", "a plate of food sits on a wooden table"],
]


def test_cider_equals_pycocoevalcap():
    assert cider(CAPTIONS, REFERENCES) == pytest.approx([2.18122268, 2.44419503, 3.0360569], abs=1e-8)


def test_bleu_equals_pycocoevalcap():
    expected = (0.9545454544586777, 0.8680947624562579, 0.6175347925023486, 0.36686834056501727)
    assert bleu(CAPTIONS, REFERENCES) == pytest.approx(expected, abs=1e-12)


def test_a_caption_that_is_its_reference_scores_ten():
    assert cider(["red green blue cyan", "one two three four"], [["red green blue cyan"], ["x y z w"]])[0] == 10.0


@pytest.mark.parametrize(
    ("caption", "words"),
    # As Stanford's PTB tokenizer (CoreNLP 3.4.1, lower case, punctuation left out) gives them.
    [
        ("A man in a blue shirt, cleaning a window.", "a man in a blue shirt cleaning a window"),
        ("It's a 3.5-inch man's T-shirt, isn't it?", "it 's a 3.5-inch man 's t-shirt is n't it"),
        ("a dog can't catch it; it runs away!", "a dog ca n't catch it it runs away"),
        ("cones for $2.50 -- and/or 1,000 more at 10:30", "cones for $ 2.50 and/or 1,000 more at 10:30"),
        ('The sign says "STOP"', "the sign says stop"),
    ],
)
def test_words(caption, words):
    assert words_of(caption) == tuple(words.split())


def test_a_caption_without_reference_is_refused():
    with pytest.raises(ValueError, match="caption 1 has no reference"):
        cider(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="2 captions, but 1"):
        bleu(["a", "b"], [["a"]])
