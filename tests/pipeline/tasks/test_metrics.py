"""Every metric against values worked out by hand, or by the reference implementation named in its docstring."""

import pytest

from pipeline.tasks.metrics import (
    METRICS,
    anls,
    exact_match,
    mmmu_open,
    multiple_choice,
    normalise_vqa,
    relaxed_accuracy,
    vqa_accuracy,
)


def test_multiple_choice():
    assert multiple_choice("b", ["B"]) == 1.0
    assert multiple_choice("B", ["A"]) == 0.0


def test_exact_match_ignores_case_punctuation_and_space():
    assert exact_match("The  cat.", ["the cat"]) == 1.0
    assert exact_match("the cats", ["the cat"]) == 0.0
    assert exact_match("cat", ["dog", "Cat!"]) == 1.0
    assert exact_match("T-shirt", ["tshirt"]) == 1.0


@pytest.mark.parametrize(("answer", "reference"), [("-1", "1"), ("3.5", "35"), ("-.5", ".5")])
def test_exact_match_keeps_a_numbers_sign_and_point(answer, reference):
    assert exact_match(answer, [reference]) == 0.0
    assert exact_match(f"{answer}.", [answer]) == 1.0


@pytest.mark.parametrize(
    ("num_agree", "expected"),
    # Leaving one out: an agreeing person is left with one fewer agreeing. With 3 of 10: (3 * 2/3 + 7 * 1) / 10.
    [(0, 0.0), (1, (0 + 9 / 3) / 10), (2, (2 / 3 + 8 * 2 / 3) / 10), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_by_hand(num_agree, expected):
    references = ["yes"] * num_agree + ["no"] * (10 - num_agree)
    assert vqa_accuracy("Yes", references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "normal"),
    # From EvalAIAnswerProcessor.process_digit_article(process_punctuation(text)), lmms-eval 0.7.3.
    [
        ("The two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("3.5 in", "3.5 in"),
        ("U.S.", "us"),
        ("shes", "shes"),
        ("somebody'd", "somebodyd"),
        ("none", "0"),
        ("an\napple", "apple"),
    ],
)
def test_vqa_normalisation_equals_the_reference(text, normal):
    assert normalise_vqa(text) == normal


def test_anls_by_hand():
    assert anls("Hello  World", ["hello world"]) == 1.0
    assert anls("hallo", ["hello"]) == pytest.approx(1 - 1 / 5)
    assert anls("abcd", ["abxy"]) == pytest.approx(0.5)  # exactly at the threshold counts
    assert anls("abc", ["axyz"]) == 0.0  # 1 - 3/4 is below it
    assert anls("42", ["1842", "421"]) == pytest.approx(1 - 1 / 3)  # the better of two
    assert anls("", ["x"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "distance"),
    [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("a\ud800bc", "a\ud801bc", 1), ("naïve 漢字", "naive 漢字", 1)],
)
def test_anls_counts_edits_of_code_points(answer, reference, distance):
    assert anls(answer, [reference]) == 1 - distance / max(len(answer), len(reference))


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("10.5", "10", 1.0),  # exactly 5 %
        ("10.51", "10", 0.0),
        ("12%", "0.12", 1.0),
        ("12", "0.12", 0.0),
        ("-5", "-5.2", 1.0),
        ("Blue", "blue", 1.0),
        ("blue", "red", 0.0),
        ("0", "0", 1.0),
        ("0.0", "0", 0.0),  # a zero is compared as text, as in the source
        ("five", "5", 0.0),
    ],
)
def test_relaxed_accuracy(answer, reference, score):
    assert relaxed_accuracy(answer, [reference]) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    # From eval_open(reference, parse_open_response(answer)), lmms-eval 0.7.3.
    [
        ("The result is 1,200.", "1200", 1.0),
        ("x = 3.14159", "3.14", 1.0),
        ("so the final answer is a cat", "cat", 1.0),
        ("It could be a dog\nThe answer is a cat", "dog", 1.0),
        ("B.\n", "B", 1.0),
        ("it is 7", "8", 0.0),
    ],
)
def test_mmmu_open(answer, reference, score):
    assert mmmu_open(answer, [reference]) == score


def test_every_metric_takes_several_references():
    assert all(metric("b", ["a", "b"]) > 0 for name, metric in METRICS.items() if name != "mmmu_open")
