"""Questions from a manifest to scored rows: the task, the refusals, a whole run, its scores and its judge's file."""

import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.config.load import load_config
from pipeline.config.schema import QuestionConfig
from pipeline.errors import ConfigError, InputError
from pipeline.evaluation.benchmarks.registry import BENCHMARKS
from pipeline.evaluation.compare import compare_runs
from pipeline.evaluation.run_scores import render_scores, score_run
from pipeline.execution.runner import run_job
from pipeline.inputs.build_manifest import build_manifest
from pipeline.records import MediaItem
from pipeline.runs.config_fingerprint import resolve_config_fingerprint
from pipeline.tasks.base import ParsedAnswer
from pipeline.tasks.build import build_task
from pipeline.tasks.metrics import METRICS
from pipeline.tasks.question import UNSCORED
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, read_rows, violations
from tests.support.runs.run_folders import make_config

ROOT = Path(__file__).resolve().parents[3]


def question(prompt="Which?", **fields):
    return MediaItem("id", ("a.mp4",), "video", (1,), ("",), prompt=prompt, **fields)


def test_prompts_are_worded_by_their_templates():
    task = build_task(QuestionConfig())
    assert task.prompt(question(options=("red", "blue"))) == (
        "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    )
    assert task.prompt(question()) == "Which?\nAnswer the question using a single word or phrase."
    as_it_is = build_task(QuestionConfig(choice_template=None, open_template=None))
    assert as_it_is.prompt(question(options=("red", "blue"))) == "Which?"
    assert as_it_is.content(question(), ("medium",)) == ("medium", "Which?")


def test_a_question_with_braces_is_asked_as_it_stands():
    task = build_task(QuestionConfig(open_template="Q: {question}"))
    assert (
        task.prompt(question("What is {question} or {options} or {x}?")) == "Q: What is {question} or {options} or {x}?"
    )


@pytest.mark.parametrize(
    ("item", "text", "expected"),
    [
        (question(options=("red", "blue"), reference="B"), "(B) blue", ParsedAnswer("B", 1.0)),
        (question(options=("red", "blue"), reference="blue"), "It is B", ParsedAnswer("B", 1.0)),
        (question(options=("red", "blue"), reference="A"), "B", ParsedAnswer("B", 0.0)),
        (question(options=("red", "blue"), reference="A"), "neither", ParsedAnswer(None, 0.0)),
        (question(options=("red", "blue")), "B", ParsedAnswer("B", None)),
        (question(reference="a dog"), " A  dog.\n", ParsedAnswer("A dog.", 1.0)),
        (question(reference='["two", "2"]'), "2", ParsedAnswer("2", 1.0)),
        (question(reference="C", fields={"metric": "multiple_choice"}), "C.", ParsedAnswer("C", 1.0)),
        (question(reference="yes", fields={"metric": "yes_no"}), "**Yes**, it is", ParsedAnswer("yes", 1.0)),
        (question(reference="no", fields={"metric": "yes_no"}), "Not sure", ParsedAnswer(None, 0.0)),
        (question(reference="no", fields={"metric": "mme"}), "Not sure", ParsedAnswer("no", 1.0)),
        (question(reference="10", fields={"metric": "relaxed_accuracy"}), "10.4", ParsedAnswer("10.4", 1.0)),
        (question(reference="hello", fields={"metric": "anls"}), "hallo", ParsedAnswer("hallo", 0.8)),
        (question(reference="a long text", fields={"metric": "judge"}), "text", ParsedAnswer()),
    ],
)
def test_answers_are_read_and_scored(item, text, expected):
    assert build_task(QuestionConfig()).parse(item, text) == expected


def test_a_configured_metric_goes_before_the_manifests():
    item = question(reference="10", fields={"metric": "exact_match"})
    assert build_task(QuestionConfig(metric="relaxed_accuracy")).parse(item, "10.4").score == 1.0


def test_the_config_knows_every_metric():
    names = set(QuestionConfig.model_fields["metric"].annotation.__args__)
    assert names == {"auto", *METRICS, *UNSCORED}


def test_a_template_without_its_places_is_refused():
    for key in ("choice_template=What?", "choice_template='{question}'", "open_template='{options}'"):
        with pytest.raises(ConfigError, match="the template lacks"):
            load_config(str(ROOT / "configs" / "answer_questions.yaml"), [f"task.{key}"])


def test_every_field_of_the_task_changes_the_recipe(model_folder):
    tasks = [
        {"kind": "caption", "prompt": "x"},
        {"kind": "question", "prompt": None},
        {"kind": "question", "prompt": None, "metric": "anls"},
        {"kind": "question", "prompt": None, "choice_template": None},
        {"kind": "question", "prompt": None, "open_template": None},
    ]
    base = make_config(model_folder).model_dump(mode="json")
    configs = [type(make_config(model_folder)).model_validate({**base, "task": clean(task)}) for task in tasks]
    assert len({resolve_config_fingerprint(config).digest for config in configs}) == len(tasks)


def clean(task):
    return {key: value for key, value in task.items() if not (key == "prompt" and value is None)}


def write_manifest(folder, rows):
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return {"manifest": str(path)}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": ""}, "no question"),
        ({"question": "q", "options": ["x", "y"], "reference": "z"}, "neither an option's letter nor an option"),
        ({"question": "q", "options": ["x", "y"], "reference": "C"}, "neither an option's letter nor an option"),
        ({"question": "q", "options": ["x"]}, "1 options"),
        ({"question": "q", "metric": "rouge"}, "unknown metric 'rouge'"),
        ({"question": "q", "metric": "yes_no", "reference": "perhaps"}, "neither yes nor no"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused_with_its_line(tmp_path, row, words):
    good = {"uri": "0.mp4", "question": "Is it?", "reference": "yes"}
    source = write_manifest(tmp_path, [good, {"uri": "1.mp4", **row}])
    with pytest.raises(InputError, match=f"line 2: .*{words}"):
        build_manifest(job_config(tmp_path / "out", source, task={"kind": "question"}))


def test_each_wrong_row_is_refused_with_its_own_reason(tmp_path):
    wrong = [("true", "yes_no"), ("Z", "multiple_choice"), ("true", "yes_no")]
    rows = [{"question": "q", "metric": metric, "reference": reference} for reference, metric in wrong]
    many = [{"question": "q", "metric": "yes_no", "reference": f"no {n}"} for n in range(6)]
    source = write_manifest(tmp_path, [{"uri": f"{n}.mp4", **row} for n, row in enumerate(rows + many)])
    with pytest.raises(InputError) as error:
        build_manifest(job_config(tmp_path / "out", source, task={"kind": "question"}))
    assert str(error.value).endswith(
        "lines 1, 3: reference 'true' is neither yes nor no; "
        "line 2: reference 'Z' is neither an option's letter nor an option; "
        + "".join(f"line {n + 4}: reference 'no {n}' is neither yes nor no; " for n in range(3))
        + "and 3 more with other problems"
    )


def test_questions_need_a_manifest(tmp_path):
    with pytest.raises(ConfigError, match=r"input\.manifest: task\.kind question needs a manifest"):
        build_manifest(job_config(tmp_path / "out", {"uri": str(tmp_path)}, task={"kind": "question"}))


def run_questions(tmp_path, name, *, wrong=(), num=24, **options):
    """A run whose model reads barcodes: two questions a medium, the reference is its number but for wrong ones."""
    rows = [
        {
            "id": f"q{n % 2}-{n // 2}",
            "uri": f"{n // 2}.mp4",
            "question": f"Number {n % 2}?",
            "reference": "-1" if n in wrong else str(n // 2),
            "category": ("even", "odd")[n % 2],
        }
        for n in range(num)
    ]
    source = write_manifest(tmp_path, rows)
    config = job_config(tmp_path / name, source, task={"kind": "question", "metric": "exact_match"}, **options)
    worker = partial(fakes.barcode_worker, **({"broken": "11"} if num == 24 else {}))
    summary = run_job(config, worker_factory=worker, loader_factory=fakes.fake_loader)
    return str(tmp_path / name), summary


def test_a_whole_run_is_scored(tmp_path, capsys):
    uri, summary = run_questions(tmp_path, "out", wrong={0, 1, 2})
    assert summary.exit_code == 3  # both questions on medium 11 fail
    assert violations(uri) == []
    rows = {row["item_id"]: row for row in read_rows(uri)}
    assert (rows["q0-5"]["answer"], rows["q0-5"]["score"], rows["q0-5"]["category"]) == ("5", 1.0, "even")
    assert rows["q0-5"]["prompt"] == "Number 0?\nAnswer the question using a single word or phrase."
    assert (rows["q1-0"]["score"], rows["q1-11"]["score"]) == (0.0, None)
    scores = score_run(uri)
    groups = {group.name: group for group in scores.groups}
    assert list(groups) == ["all", "even", "odd"]
    assert groups["all"].interval.mean == pytest.approx(19 / 22)
    assert (groups["all"].interval.num_values, groups["all"].interval.num_clusters) == (22, 11)
    assert (groups["all"].num_failed, groups["all"].mean_with_failures) == (2, pytest.approx(19 / 24))
    assert groups["even"].interval.mean == pytest.approx(9 / 11)
    assert groups["odd"].interval.mean == pytest.approx(10 / 11)
    assert summary.scores == scores
    said = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(said) == ["score"]
    assert (said["score"]["mean"], said["score"]["num_failed"]) == (groups["all"].interval.mean, 2)
    assert {name: one["mean"] for name, one in said["score"]["categories"].items()} == {
        name: groups[name].interval.mean for name in ("even", "odd")
    }
    text = render_scores(scores)
    assert "22 questions on 11 media; 2 failed (0.7917 with them as wrong)" in text
    comparison = compare_runs(uri, uri)
    assert comparison.mcnemar.p_value == 1.0


def test_the_same_command_and_a_retry_write_the_scores_anew(tmp_path, monkeypatch):
    uri, summary = run_questions(tmp_path, "out", num=4)
    scores = tmp_path / "out" / "scores.json"
    written = scores.read_bytes()
    scores.write_text('{"score": {"mean": 0.0}}')  # as an attempt left it that was killed between finish and scores
    assert run_questions(tmp_path, "out", num=4)[1].scores == summary.scores
    assert scores.read_bytes() == written
    assert violations(uri) == []


def test_the_judges_file_of_a_run(tmp_path, capsys):
    rows = [
        {"id": f"mmvet-{n}", "uri": f"{n}.mp4", "question": "?", "question_id": f"v1_{n}", "metric": "judge"}
        | {"benchmark": "mmvet", "reference": "x"}
        for n in range(3)
    ]
    config = job_config(tmp_path / "out", write_manifest(tmp_path, rows), task={"kind": "question"})
    run_job(config, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader)
    output = tmp_path / "judge.json"
    assert main(["export-for-judge", str(tmp_path / "out"), "mmvet", "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == {"v1_0": "0", "v1_1": "1", "v1_2": "2"}
    assert main(["export-for-judge", str(tmp_path / "out"), "ai2d", "--output", str(output)]) == 2


def test_adapt_on_the_command_line(tmp_path, capsys):
    from tests.support.runs.published_video_rows import VIDEO_ROWS

    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v_p1.mp4").write_bytes(b"x")
    (tmp_path / "rows.jsonl").write_text(json.dumps(VIDEO_ROWS["videodc"][0]))
    target = str(tmp_path / "m.jsonl")
    arguments = [str(tmp_path / "rows.jsonl"), "--media", str(tmp_path / "videos"), "--manifest", target]
    assert main(["convert", "videodc", *arguments]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    program, *command = shlex.split(last.removeprefix("next: "))
    assert program == "illava"
    assert command[:3] == ["answer", "--config", "configs/answer_questions.yaml"]
    here = ["model.model_id=configs/demo/model", "model.revision=null", "model.device=cpu", "reduction.preset=none"]
    assert main([*command, "--dry-run", *(word for key in here for word in ("--set", key))]) == 0
    assert "1 item" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["convert", "--list"])
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in BENCHMARKS)
    assert "only the subset carries answers" in listed.lower()
    assert main(["convert", "nothing", *arguments]) == 2
    assert "there are: ai2d" in capsys.readouterr().err


def test_the_shipped_config_is_complete_and_its_comments_are_true():
    path = ROOT / "configs" / "answer_questions.yaml"
    config = load_config(str(path))
    assert config.task == QuestionConfig(choice_template=None, open_template=None)
    text = path.read_text()
    defaults = QuestionConfig()
    for template in (defaults.choice_template, defaults.open_template):
        assert json.dumps(template) in text.replace("#   ", "")


def test_the_job_answers_with_the_bundled_model(tmp_path):
    clips = sorted((ROOT / "configs" / "demo" / "clips").glob("*.mp4"))[:2]
    rows = [
        {"uri": str(clip), "question": asked, "options": ["red", "blue"], "reference": "red"}
        for clip in clips
        for asked in ("Which colour?", "Which colour moves?")
    ]
    source = write_manifest(tmp_path, rows)
    command = [sys.executable, "jobs/answer_questions.py", "--config", "configs/answer_questions.yaml"]
    overrides = {
        "input.uri": str(clips[0].parent),
        "input.manifest": source["manifest"],
        "media.num_frames": 2,
        "model.model_id": "configs/demo/model",
        "model.revision": "null",
        "model.dtype": "float32",
        "model.device": "cpu",
        "model.kv_cache_bytes": 50_000_000,
        "reduction.preset": "none",
        "sampling.max_new_tokens": 4,
        "runtime.executor": "local",
        "runtime.gpus_per_actor": 0,
        "runtime.num_vlm_actors": "{min: 1, max: 1}",
        "output.uri": str(tmp_path / "out"),
    }
    command += [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 questions on 2 media" in done.stdout
    assert all(row["score"] in {0.0, 1.0} for row in read_rows(tmp_path / "out"))
