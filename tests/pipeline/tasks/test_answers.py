"""Reading letters, yes and no out of text."""

import pytest

from pipeline.tasks.answers import lettered, mme_yes_no, option_letter, references_of, short_answer, yes_no

OPTIONS = ["a red car", "a blue bus", "a car", "nothing"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (B)\n", "B"),
        ("B. a blue bus", "B"),
        ("B: a blue bus", "B"),
        ("**B**", "B"),
        ("[B]", "B"),
        ("A) a red car", "A"),
        ("B) because A is wrong", "B"),
        ("The answer is B.", "B"),
        ("Answer: (C)", "C"),
        ("Option C", "C"),
        ("The best answer is: **C**", "C"),
        ("Not A, the answer is B", "B"),
        ("First I chose A. But then: the correct answer is (D).", "D"),
        ("I think it is D", "D"),
        ("It shows (A) first, yet (C) fits", "C"),
        ("a blue bus", "B"),
        ("It is a blue bus.", "B"),
        ("It looks like a red car", "A"),  # "a car" does not occur whole, "a red car" does
        ("B, since the bus is blue", "B"),
    ],
)
def test_a_letter_is_read(text, letter):
    assert option_letter(text, OPTIONS) == letter


@pytest.mark.parametrize(
    "text", ["", "  ", "E", "None of these", "A man is driving", "Answer: A man", "I do not know", "X-ray"]
)
def test_what_names_no_option_is_none(text):
    assert option_letter(text, OPTIONS) is None


def test_a_capital_word_is_no_letter():
    assert option_letter("Certainly. Dogs are animals", ["cat", "horse", "sheep", "goat"]) is None


def test_a_letter_beyond_the_options_is_none():
    assert option_letter("C", ["yes", "no"]) is None
    assert option_letter("The answer is C", ["yes", "no"]) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("No, it is not", "no"),
        ("Y", "yes"),
        ("n.", "no"),
        ("Yes, no doubt", "yes"),
        ("It is not", None),
        ("maybe", None),
        ("", None),
        ("x", None),
        ("**Yes**", "yes"),
        ("__No__.", "no"),
        ("“Yes”", "yes"),
        ("- (no)", "no"),
        ("`YES`", "yes"),
        ("Answer: No", "no"),
        ("Answer:\n\n**Yes.**", "yes"),
        ("<answer>no</answer>", "no"),
        ("The answer is no, since yes would need a cat.", "no"),
        ("At first the answer is yes, but the final answer would be: No.", "no"),
        ("I would say yes.", "yes"),
        ("There is a dog, so the reply is: no!", "no"),
        ("Yes\n\nThere is no dog.", "yes"),
        ("Not sure", None),
        ("Nobody is there", None),
        ("Nothing of it, yes", "yes"),
        ("Yesterday", None),
        ("None", None),
        ("Yes or no", None),
        ("yes/no", None),
        ("Yes and no.", None),
        ("Yes or no? No.", "no"),
        ("No idea", None),
        ("There is no way to tell.", None),
        ("It says yes here and no there: no", None),
        ("Y.", "yes"),
        ("**N**", "no"),
    ],
)
def test_yes_and_no(text, answer):
    assert yes_no(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes", "yes"), ("n.", "no"), ("Not sure", "no"), ("**Yes**", None), ("Answer: No", None)],
)
def test_yes_and_no_by_mme_s_rule(text, answer):
    assert mme_yes_no(text) == answer


def test_references_are_one_text_or_a_json_array():
    assert references_of(None) == ()
    assert references_of("[a bracket") == ("[a bracket",)
    assert references_of("[1, 2]") == ("[1, 2]",)
    assert references_of('["two", "2"]') == ("two", "2")
    assert references_of("plain") == ("plain",)


def test_small_forms():
    assert short_answer("  two\n words ") == "two words"
    assert lettered(["x", "y"]) == "A. x\nB. y"
