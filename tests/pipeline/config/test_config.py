"""Configuration files: what is valid loads, every problem is told in words and quickly."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from illava.plan import EMPTY_PLAN, ReductionPlan, preset
from pipeline.config.base import choices_of
from pipeline.config.load import _models_in, load_config
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError
from pipeline.sweep.config import SweepConfig

ROOT = Path(__file__).resolve().parents[3]
BASE = """
input: {uri: s3://bucket/videos/, pattern: "**/*.mp4"}
media: {num_frames: 32, frame_sampling: {kind: uniform}, max_bytes: 8_000_000_000}
model: {model_id: org/model, revision: 0123456789012345678901234567890123456789}
reduction:
  steps:
    - {stage: vision_block, layers: [5, 6], reducer: {kind: illava, num_merged: 92}}
runtime: {num_vlm_actors: {min: 1, max: 8}}
output: {uri: s3://bucket/out/}
"""


@pytest.fixture
def load(tmp_path):
    def write(text=BASE, *overrides):
        path = tmp_path / "job.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return load_config(str(path), overrides)

    return write


def test_a_valid_file_loads(load):
    config = load()
    assert isinstance(config, JobConfig)
    assert (config.media.max_bytes, config.runtime.num_vlm_actors.max) == (8_000_000_000, 8)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("media.num_frames=8", lambda c: c.media.num_frames, 8),
        ("sampling.temperature=0.5", lambda c: c.sampling.temperature, 0.5),
        ("sampling.temperature=1e-1", lambda c: c.sampling.temperature, 0.1),
        ("input.manifest=null", lambda c: c.input.manifest, None),
        ("task.prompt=What? a=b", lambda c: c.task.prompt, "What? a=b"),
        ("reduction.steps.0.reducer.num_merged=80", lambda c: c.reduction.steps[0].reducer.num_merged, 80),
        ("reduction.steps.0.layers=[3, 4]", lambda c: c.reduction.steps[0].layers, (3, 4)),
        ("runtime.num_vlm_actors={min: 2, max: 2}", lambda c: c.runtime.num_vlm_actors.min, 2),
        ("media.frame_sampling.kind=keyframe", lambda c: c.media.frame_sampling.kind, "keyframe"),
        ("prices.gpu_hour_usd=2.5", lambda c: c.prices.gpu_hour_usd, 2.5),
        ("input.uri=/data/run #3/", lambda c: c.input.uri, "/data/run #3/"),
        ("input.pattern=**/*.mp4", lambda c: c.input.pattern, "**/*.mp4"),
        ("input.pattern='**/*.mp4'", lambda c: c.input.pattern, "**/*.mp4"),
        ("input.pattern=[ab]*", lambda c: c.input.pattern, "[ab]*"),
        ("input.exclude_runs=~", lambda c: c.input.exclude_runs, None),
        ("input.exclude_runs=", lambda c: c.input.exclude_runs, None),
        ("task.prompt=Answer: what is it?", lambda c: c.task.prompt, "Answer: what is it?"),
        ("task.prompt={a} & 'b'", lambda c: c.task.prompt, "{a} & 'b'"),
        ("task.prompt='this' or 'that'", lambda c: c.task.prompt, "'this' or 'that'"),
        ("task.prompt=yes", lambda c: c.task.prompt, "yes"),
        ("task.prompt= two\nlines ", lambda c: c.task.prompt, " two\nlines "),
        ("task.prompt=null", lambda c: c.task.prompt, "null"),
        ("name=2026-11-30", lambda c: c.name, "2026-11-30"),
        ("name=12_000", lambda c: c.name, "12_000"),
        ("model.revision=" + "0" * 40, lambda c: c.model.revision, "0" * 40),
        ("media.verify_md5=off", lambda c: c.media.verify_md5, "off"),
        ("media.ranged_reads= off", lambda c: c.media.ranged_reads, "off"),
        ("media={verify_md5: off}", lambda c: c.media.verify_md5, "off"),
        ("output.compression=none", lambda c: c.output.compression, "none"),
        ("runtime.gpus_per_actor=auto", lambda c: c.runtime.gpus_per_actor, "auto"),
        ("runtime.gpus_per_actor=0.5", lambda c: c.runtime.gpus_per_actor, 0.5),
    ],
)
def test_overrides_reach_every_key(load, override, read, expected):
    assert read(load(BASE, override)) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("media.num_frame=8", r"media\.num_frame: unknown key; did you mean media\.num_frames\?"),
        ("num_frames=8", r"num_frames: unknown key; did you mean media\.num_frames\?"),
        ("medai.num_frames=8", r"medai: unknown key; did you mean media\?"),
        ("runtime.num_vlm_actors.min=9", r"runtime\.num_vlm_actors: min is 9 and max is 8: raise max or lower min"),
        ("runtime.num_vlm_actors.mxa=8", r"num_vlm_actors\.mxa: unknown key; did you mean .*num_vlm_actors\.max\?"),
        (
            "reduction.steps.0.reducer.num_mergd=8",
            r"reduction\.steps\.0\.reducer\.num_mergd: unknown key; did you mean .*\.num_merged\?",
        ),
        (
            "media.frame_sampling.fsp=8",
            r"media\.frame_sampling\.fsp: unknown key; (valid here: kind|did you mean .*fps)",
        ),
        ("media.zzzz=8", r"media\.zzzz: unknown key; valid here: decoder, "),
        ("media.num_frames=0", r"media\.num_frames: .*greater than or equal to 1 \(got 0\)"),
        ("media.num_frames=many", r"media\.num_frames: .*integer.*\(got 'many'\)"),
        ("media.frame_sampling.kind=best", r"media\.frame_sampling\.kind: one of 'uniform', 'fps', 'keyframe'"),
        ("model={model_id: null}", r"model\.model_id: .*string \(got None\)"),
        ("output={}", r"output\.uri: missing; this key is required"),
        ("reduction={preset: ilava-video}", r"reduction: no preset named 'ilava-video'; the presets are"),
        ("reduction={preset: illava-video, steps: []}", "give either `preset` or `steps`"),
        ("media", "write it as section.key=value"),
        ("a..b=1", "write it as section.key=value"),
        ("media.num_frames.x=1", r"media\.num_frames is not a section; there is no 'x'"),
        ("reduction.steps.7.layers=[1]", "reduction.steps is a list of 1; there is no '7'"),
        ("media.num_frames=[", r"(?s)the value is not YAML.*put text in quotes"),
        ("seed=2026-13-45", "--set seed=2026-13-45: the value has a date or number that is none"),
        ("seed=" + "[" * 3000, "nested too deep"),
        ("seed=\x1b[31m{", r"\\x1b"),
        ("media.decoder=of", "media.decoder: .*'auto', 'decord' or 'pyav'"),
        ("runtime.max_attempts=on", r"runtime\.max_attempts: .*integer.*\(got 'true'\)"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_path(load, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(BASE, override)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("order", [1, -1])
def test_a_plan_named_in_an_override_replaces_the_one_in_the_file(load, order):
    """A preset is a whole plan, so that ``reduction.preset=none`` is the unreduced model whatever the file has."""
    assert load().reduction.steps
    assert load(BASE, "reduction.preset=none").reduction == EMPTY_PLAN
    mixed = ["reduction.preset=illava-video", "reduction.layout=released"][::order]
    assert load(BASE, *mixed).reduction == preset("illava-video", layout="released")
    head, _, tail = BASE.partition("reduction:")
    with_preset = head + "reduction: {preset: illava-video}\n" + tail[tail.index("runtime:") :]
    assert load(with_preset, "reduction.steps=[]").reduction == EMPTY_PLAN
    budget = ["reduction.budget=auto", "reduction.epsilon=0.2"][::order]
    for text in (BASE, with_preset):
        assert load(text, *budget).reduction == ReductionPlan(budget="auto", epsilon=0.2)
    assert load(BASE, "reduction.budget=null").reduction == load().reduction


def test_a_budget_that_goes_is_logged_with_what_takes_its_place(load, caplog):
    load()
    assert "deprecated" not in caplog.text
    assert load(BASE, "reduction.budget=auto", "reduction.epsilon=0.2").reduction.budget == "auto"
    assert "note: `budget: auto` is deprecated, and the next release no longer has it" in caplog.text
    assert "{preset: ward-document}" in caplog.text


def test_the_unreduced_model_is_to_be_had_as_files_and_pages_advise():
    """By ``reduction.preset=none``: of every shipped configuration; a file with steps of its own has a test above."""
    texts = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "docs").rglob("*.md"), ROOT / "pipeline/lmms_eval_model.py"]
    advising = [path for path in texts if "reduction.preset=none" in path.read_text("utf-8")]
    assert len(advising) >= 4
    jobs = [path for path in (ROOT / "configs").glob("*.yaml") if "\nreduction:" in path.read_text("utf-8")]
    assert {path for path in advising if path.suffix == ".yaml"} <= set(jobs)
    for path in jobs:
        assert load_config(str(path)).reduction != EMPTY_PLAN
        assert load_config(str(path), ["reduction.preset=none"]).reduction == EMPTY_PLAN, path.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input: [", "is not YAML"),
        ("- a\n- b\n", "got a list"),
        ("", "got nothing"),
        ("seed: 1\nname: x\nseed: 2\n", "line 3: `seed` stands on line 1 already"),
        ("media:\n  num_frames: 1\n  num_frames: 2\n", "line 3: `num_frames` stands on line 2"),
        ("x: !!python/object/apply:os.system ['true']", "is not YAML"),
        ("name: 2026-13-45\n", "a date or number that is none .*put text in quotes"),
        ("seed: " + "9" * 5000, "a date or number that is none"),
        ("name: " + "[" * 3000, "nested too deep"),
        ("a: &a [*a]\n", "by an alias"),
        ("? [a]\n: b\n", "line 1: a key is a name; this one is a sequence"),
        ("input: {pattern: **/*.mp4}\n", r"(?s)while scanning an alias.*put text in quotes"),
        ("name: 2026-11-30\n", r"name: .*valid string; put it in quotes \(got datetime"),
        ("name: 12\n", r"name: .*valid string; put it in quotes \(got 12\)"),
    ],
)
def test_a_file_that_is_no_config_is_refused(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_every_problem_is_told_at_once(load):
    with pytest.raises(ConfigError, match=r"4 problems") as caught:
        load("input: {ur: x}\nmodel: {}\nsampling: {top_p: 2}\n")
    assert len(str(caught.value).splitlines()) == 5


def test_a_missing_file_is_named_with_its_neighbour(tmp_path):
    (tmp_path / "caption_videos.yaml").write_text("x: 1")
    with pytest.raises(ConfigError, match=r"does not exist; did you mean .*caption_videos\.yaml"):
        load_config(str(tmp_path / "caption_video.yaml"))


def test_a_wrong_key_is_refused_in_under_a_second_without_torch(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(BASE + "sede: 3\n")
    script = f"""
import resource, sys
from pipeline.config.load import load_config
from pipeline.errors import ConfigError
try:
    load_config({str(path)!r})
except ConfigError as error:
    print(error)
print(sorted({{"torch", "ray", "decord", "pyarrow", "transformers"}} & set(sys.modules)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    *message, loaded, cpu_s = done.stdout.strip().splitlines()
    assert "sede: unknown key; did you mean seed?" in " ".join(message)
    assert loaded == "[]"
    assert float(cpu_s) < 1.0


def _fields(schema, seen):
    """Every field of every section of a schema: (section, name, field), each once."""
    if schema in seen:
        return
    seen.add(schema)
    for name, info in schema.model_fields.items():
        yield schema, name, info
        for inner in _models_in(info.annotation):
            yield from _fields(inner, seen)


FIELDS = [
    *_fields(JobConfig, set()),
    *(
        entry
        for entry in _fields(SweepConfig, set())
        if entry[0] not in {owner for owner, *_ in _fields(JobConfig, set())}
    ),
]


def test_every_number_is_finite():
    """Whatever key of whatever section takes a float: a deadline that is infinite fails every row."""
    taking = [(owner, name) for owner, name, info in FIELDS if float in choices_of(info.annotation)]
    assert len(taking) > 25
    for owner, name in taking:
        for value in (math.inf, -math.inf, math.nan):
            data = {"kind": owner.model_fields["kind"].default} if "kind" in owner.model_fields else {}
            with pytest.raises(ValidationError) as caught:
                owner.model_validate({**data, name: value})
            told = [problem for problem in caught.value.errors() if problem["loc"][:1] == (name,)]
            assert told, (owner, name, value)


def test_every_word_that_yaml_reads_as_a_boolean_is_that_word():
    """``off`` and its like, in every key of every section that takes such a word."""
    taking = [
        (owner, name, word)
        for owner, name, info in FIELDS
        for word in choices_of(info.annotation)
        if isinstance(word, str) and isinstance(yaml.safe_load(word), bool)
    ]
    assert {name for _, name, _ in taking} == {"verify_md5", "ranged_reads"}
    for owner, name, word in taking:
        assert getattr(owner.model_validate(yaml.safe_load(f"{name}: {word}")), name) == word
        with pytest.raises(ValidationError, match=f"{name}\n.*Input should be"):
            owner.model_validate({name: not yaml.safe_load(word)})


@pytest.mark.parametrize("value", ["inf", ".inf", "-.inf", ".nan", "2147484"])
def test_a_deadline_that_never_comes_is_refused_at_the_start(load, value):
    with pytest.raises(ConfigError, match=r"media\.load_timeout_s: .*(finite|than)"):
        load(BASE, f"media.load_timeout_s={value}")
