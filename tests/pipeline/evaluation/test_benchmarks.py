"""Published columns to manifest columns, files to a manifest that the pipeline reads, answers to a judge's file."""

import base64
import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.evaluation.benchmarks.convert import read_rows, write_manifest
from pipeline.evaluation.benchmarks.judges import JUDGES, judge_file
from pipeline.evaluation.benchmarks.registry import BENCHMARKS, convert_rows, group_by_medium
from pipeline.evaluation.benchmarks.scores import category_mean, circular_accuracy, mme_scores
from pipeline.evaluation.benchmarks.subtitles import subtitle_text
from pipeline.inputs.build_manifest import build_manifest
from pipeline.tasks.metrics import METRICS
from tests.support.runs.published_image_rows import IMAGE_ROWS, JPG, PHRASE, PNG
from tests.support.runs.published_video_rows import VIDEO_ROWS
from tests.support.runs.run_folders import make_config

PUBLISHED = IMAGE_ROWS | VIDEO_ROWS


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_published_row_becomes_these_columns(name):
    row, expected = PUBLISHED[name]
    (item,) = convert_rows(name, [row])
    assert item.columns == {"item_id": f"{name}-000000", "benchmark": name, **expected}


def test_the_table_is_whole():
    assert PUBLISHED.keys() == BENCHMARKS.keys()
    for name, table in BENCHMARKS.items():
        assert table.name == name
        assert table.source
        assert table.metric(PUBLISHED[name][0]) in {*METRICS, "caption", "judge"}


def test_an_open_question_of_mmmu():
    row = {
        "id": "test_Math_1",
        "question": "x in <image 1>?",
        "options": "[]",
        "question_type": "open",
        "answer": "['5', 'five']",
        "image_1": PNG,
    }
    (item,) = convert_rows("mmmu", [row])
    assert item.columns["prompt"] == f"x in <image 1>?\n{PHRASE}"
    assert item.columns["reference"] == '["5", "five"]'
    assert item.columns["metric"] == "mmmu_open"
    assert "options" not in item.columns


def test_rows_of_another_part_are_left_out():
    rows = [PUBLISHED["seedbench_image"][0], PUBLISHED["seedbench_video"][0]]
    assert [item.columns["item_id"] for item in convert_rows("seedbench_video", rows)] == ["seedbench_video-000001"]


def test_equal_images_get_one_name():
    row = PUBLISHED["chartqa"][0]
    first, second = convert_rows("chartqa", [row, {**row, "question": "Another?"}])
    assert first.columns["uris"] == second.columns["uris"]
    assert list(first.embedded.values()) == [PNG["bytes"]]


def test_an_image_as_base64():
    text = base64.b64encode(b"\xff\xd8\xff" + bytes(300)).decode()
    (item,) = convert_rows("chartqa", [{**PUBLISHED["chartqa"][0], "image": text}])
    (name,) = item.columns["uris"]
    assert name.endswith(".jpg")
    assert len(item.embedded[name]) == 303


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": ...}, "no column 'question'"),
        ({"image": {"bytes": b"not an image", "path": None}}, "unknown format"),
        ({"image": None}, "no medium"),
        ({"answer": "77"}, "index out of range"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(change, words):
    row = {key: value for key, value in {**PUBLISHED["ai2d"][0], **change}.items() if value is not ...}
    with pytest.raises(InputError, match=f"benchmark ai2d, row 1: .*{words}"):
        list(convert_rows("ai2d", [PUBLISHED["ai2d"][0], row]))


def test_an_unknown_benchmark_is_refused_with_all_names():
    with pytest.raises(InputError, match="no converter for benchmark 'ai3d'; there are: ai2d"):
        list(convert_rows("ai3d", []))


def test_questions_of_a_medium_are_put_together():
    row = PUBLISHED["videodc"][0]
    rows = [{**row, "video_name": name, "question": str(n)} for n, name in enumerate("abacb")]
    items = group_by_medium(convert_rows("videodc", rows))
    assert [(item.columns["uris"][0], item.columns["prompt"]) for item in items] == [
        ("a", "0"),
        ("a", "2"),
        ("b", "1"),
        ("b", "4"),
        ("c", "3"),
    ]


def test_a_parquet_file_with_images_becomes_a_manifest(tmp_path, model_folder):
    rows = [{**PUBLISHED["docvqa"][0], "questionId": str(n), "image": image} for n, image in enumerate([PNG, JPG, PNG])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "docvqa.parquet")
    media, manifest = str(tmp_path / "media"), str(tmp_path / "docvqa.jsonl")
    written = write_manifest("docvqa", str(tmp_path / "docvqa.parquet"), media_uri=media, manifest_uri=manifest)
    assert (written.num_items, written.num_media, written.num_images) == (3, 2, 2)
    items = build_manifest(make_config(model_folder, input={"uri": media, "manifest": manifest})).items
    assert [item.question_id for item in items] == ["0", "2", "1"]
    assert items[0].reference == '["1/8/93", "Jan 8"]'
    assert items[0].fields == {"metric": "anls", "benchmark": "docvqa"}
    with open(items[0].uris[0], "rb") as file:
        assert file.read() == PNG["bytes"]


def test_videos_are_found_by_name_whatever_their_extension(tmp_path, model_folder):
    media = tmp_path / "videos"
    (media / "deep").mkdir(parents=True)
    (media / "deep" / "v_1QIUV7WYKXg.mkv").write_bytes(b"x")
    (tmp_path / "rows.json").write_text(json.dumps([PUBLISHED["activitynetqa"][0]]))
    manifest = str(tmp_path / "m.jsonl")
    write_manifest("activitynetqa", str(tmp_path / "rows.json"), media_uri=str(media), manifest_uri=manifest)
    (item,) = build_manifest(make_config(model_folder, input={"uri": str(media), "manifest": manifest})).items
    assert item.uris == (str(media / "deep" / "v_1QIUV7WYKXg.mkv"),)
    assert item.prompt == "Is the man outside? Answer the question using a single word or phrase."


def test_missing_videos_are_refused(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "rows.jsonl").write_text(json.dumps(PUBLISHED["videodc"][0]))
    with pytest.raises(InputError, match=r"1 of 1 media are not below .*'v_p1'"):
        write_manifest(
            "videodc",
            str(tmp_path / "rows.jsonl"),
            media_uri=str(tmp_path / "videos"),
            manifest_uri=str(tmp_path / "m.jsonl"),
        )


def test_subtitles_come_from_their_files(tmp_path):
    media = tmp_path / "videos"
    media.mkdir()
    for name in ("one", "two"):
        (media / f"{name}.mp4").write_bytes(b"x")
    (media / "one.srt").write_text(PUBLISHED["videomme_subtitles"][0]["subtitle"])
    rows = [{**PUBLISHED["videomme"][0], "videoID": name} for name in ("one", "two")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    convert = partial(
        write_manifest,
        "videomme_subtitles",
        str(tmp_path / "rows.jsonl"),
        media_uri=str(media),
        subtitles_uri=str(media),
    )
    convert(manifest_uri=str(tmp_path / "m.jsonl"))
    first, second = (row["prompt"].split("\n") for row in read_rows(str(tmp_path / "m.jsonl")))
    assert first[1:3] == ["hello there", "bye"]
    assert second[1] == "No subtitles available"
    (media / "two.srt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"two\.srt is not UTF-8"):
        convert(manifest_uri=str(tmp_path / "n.jsonl"))


def test_subtitles_at_times():
    srt = PUBLISHED["videomme_subtitles"][0]["subtitle"]
    assert subtitle_text(srt, times_s=[0.0, 61.0]) == "bye"
    assert subtitle_text(srt, times_s=[2.5]) == ""  # a cue ends before its last instant


def test_a_table_separated_by_tabs(tmp_path):
    (tmp_path / "rows.tsv").write_text("index\tquestion\n1\tWhat?\n", encoding="utf-8")
    assert list(read_rows(str(tmp_path / "rows.tsv"))) == [{"index": "1", "question": "What?"}]


def result_row(name, text, **fields):
    """A result row of this benchmark's published row, with the columns a judge's file needs."""
    (item,) = convert_rows(name, [{**PUBLISHED[name][0], **fields}])
    columns = dict(item.columns)
    row = {key: columns.pop(key, None) for key in ("question_id", "prompt", "reference")}
    return {**row, "text": text, "fields": columns}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mmvet", {"v1_0": "said"}),
        ("videochatgpt", [{"video_name": "v_p1", "Q": "What is happening?", "A": "A man sails.", "pred": "said"}]),
        ("activitynetqa", [{"video_name": "1QIUV7WYKXg", "Q": "is the man outside", "A": "yes", "pred": "said"}]),
        (
            "videodc",
            [{"video_name": "v_p1", "question": "Please describe.", "answer": "A long text.", "pred": "said"}],
        ),
    ],
)
def test_a_judges_file(name, expected):
    assert judge_file(name, [result_row(name, "said")]) == expected


def test_the_two_wordings_of_a_question_are_judged_together():
    second = result_row("videochatgpt_consistency", "two")
    first = result_row("videochatgpt_consistency", "one", question_1="What sport?", question_2="None")
    expected = {"Q1": "What sport?", "Q2": "Which?", "A": "Sailing", "pred1": "one", "pred2": "two"}
    assert judge_file("videochatgpt_consistency", [second, first]) == [{"video_name": "v_p1", **expected}]
    with pytest.raises(InputError, match="0 questions in the first wording, 1 in the second"):
        judge_file("videochatgpt_consistency", [second])


def test_a_judges_file_of_another_benchmark_is_refused():
    with pytest.raises(InputError, match="no row of benchmark 'mmvet'"):
        judge_file("mmvet", [result_row("videodc", "x")])
    with pytest.raises(InputError, match="no judge's format"):
        judge_file("ai2d", [])
    assert JUDGES.keys() <= BENCHMARKS.keys()


def test_category_mean_by_hand():
    assert category_mean([1, 0, 0, 1], ["a", "a", "a", "b"]) == pytest.approx((1 / 3 + 1) / 2)


def test_circular_accuracy_by_hand():
    # Question 1 is right in both rotations, question 2 only in one.
    assert circular_accuracy([1, 1, 1, 0], [1, 1_000_001, 2, 2_000_002]) == 0.5


def test_mme_by_hand():
    # Colour: one image with both right, one with one right: accuracy 75, accuracy+ 50. Code: none right.
    scores = mme_scores(
        [1, 1, 1, 0, 0, 0],
        ["color"] * 4 + ["code_reasoning"] * 2,
        ["x", "x", "y", "y", "z", "z"],
    )
    assert scores == {"color": 125.0, "code_reasoning": 0.0, "perception": 125.0, "cognition": 0.0}
    with pytest.raises(ValueError, match="two questions an image"):
        mme_scores([1], ["color"], ["x"])


def test_a_missing_value_of_a_published_file_is_null_and_depth_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"hint": NaN, "question": "q"}')
    assert list(read_rows(str(tmp_path / "rows.jsonl"))) == [{"hint": None, "question": "q"}]
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"rows\.json cannot be read"):
        list(read_rows(str(tmp_path / "rows.json")))
