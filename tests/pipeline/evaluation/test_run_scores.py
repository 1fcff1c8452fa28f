"""Scores over a run's rows: published numbers of each benchmark, captions, unread answers, and runs without any."""

from pathlib import Path

import pytest

from pipeline.evaluation.run_columns import RunColumns
from pipeline.evaluation.run_scores import render_scores, score_columns, scores_dict

ROOT = Path(__file__).resolve().parents[3]


def columns(**changes):
    count = len(changes["score"])
    values = {
        "uris": [[f"{n}.png"] for n in range(count)],
        "status": ["ok"] * count,
        "question_id": [str(n) for n in range(count)],
        "category": [None] * count,
        "text": ["text"] * count,
        "answer": ["x"] * count,
        "reference": ["x"] * count,
        "fields": [{}] * count,
    }
    return RunColumns("run", {}, {**values, **changes})


def test_published_numbers_of_several_benchmarks_in_one_run():
    mme, star = {"benchmark": "mme"}, {"benchmark": "mmstar"}
    scores = score_columns(
        columns(
            score=[1.0, 1.0, 1.0, 0.0, 1.0],
            fields=[mme, mme, star, star, star],
            category=["color", "color", "math", "math", "logic"],
            question_id=["a", "a", "1", "2", "3"],
        )
    )
    assert scores.published == {"mme": {"perception": 200.0, "cognition": 0}, "mmstar": {"category_mean": 0.75}}
    assert [group.name for group in scores.groups] == ["all", "mme / color", "mmstar / logic", "mmstar / math"]


def test_a_published_number_that_cannot_be_is_explained():
    half = score_columns(columns(score=[1.0], fields=[{"benchmark": "mme"}], category=["color"]))
    assert half.published == {}
    assert "two questions an image" in half.unpublished["mme"]
    assert "mme as published: none, MME needs two questions" in render_scores(half)


def test_captions_are_scored_over_the_run():
    scores = score_columns(
        columns(
            score=[None, None],
            fields=[{"benchmark": "nocaps"}] * 2,
            text=["a red cat sits here", "two dogs run fast today"],
            reference=['["a red cat sits here", "a cat"]', '["two dogs run fast today"]'],
        )
    )
    assert scores.groups == ()
    assert scores.published["nocaps"]["BLEU-4"] == pytest.approx(1.0)
    assert scores.published["nocaps"]["CIDEr"] > 7


def test_unread_answers_are_counted():
    scores = score_columns(columns(score=[0.0, 1.0, None], answer=[None, "A", None]))
    assert scores.num_unread == 1
    assert "in 1 texts no answer could be read" in render_scores(scores)


def test_a_category_whose_items_all_failed_stands_with_its_failures():
    scores = score_columns(
        columns(
            score=[1.0, None, None, None, None],
            status=["ok", "failed", "failed", "failed", "failed"],
            category=["good", "gone", "gone", "caption", "open"],
            fields=[{}, {}, {}, {"metric": "caption"}, {}],
            reference=["x", "x", "x", "x", None],
        )
    )
    said = scores_dict(scores)["score"]["categories"]
    assert list(said) == ["gone", "good"], "captions and questions without a reference would have no score either"
    empty = {"mean": None, "low": None, "high": None, "num_values": 0, "num_media": 0}
    assert said["gone"] == empty | {"num_failed": 2, "mean_with_failures": 0}
    lines = render_scores(scores).splitlines()
    assert " ".join(lines[2].split()) == "gone - 0 questions on 0 media; 2 failed (0.0000 with them as wrong)"


def test_a_run_without_scores_says_so():
    assert "no row has a reference" in render_scores(score_columns(columns(score=[None])))
