"""Tests updates of libraries: which orphan which runs, how the plan says so, and what ``--accept`` takes.

Takes 3 s of the five minutes.
"""

from __future__ import annotations

import json

import pytest

from pipeline.cli import run_cli
from pipeline.errors import ConfigError, RefusedError
from pipeline.inspection.verify import verify_run
from pipeline.planning.dry_run import _labelled
from pipeline.runs import config_fingerprint
from pipeline.runs.accepted import read_accepted
from pipeline.runs.config_fingerprint import concerning, resolve_config_fingerprint
from pipeline.runs.earlier_runs import say_earlier_runs
from pipeline.runs.retry import begin_retry
from pipeline.runs.run import open_planned as opened
from pipeline.runs.run import open_run, pending_shards, plan_run
from pipeline.runs.run_folder import is_finished
from pipeline.storage import storage
from tests.support.runs.run_folders import complete, put_media

OLD = {"torch": "2.13.0", "transformers": "5.23.0", "decord": "0.6.0", "av": "18.1.0", "pillow": "13.0.0"}


@pytest.fixture
def installed(monkeypatch):
    """A machine on which these packages are installed; to be updated by ``installed(name=version)``."""
    versions = dict(OLD, pypdfium2="5.15.2")
    monkeypatch.setattr(config_fingerprint, "_version", lambda name: versions[name])
    monkeypatch.setattr(config_fingerprint, "resize_digest", lambda: versions.get("resize", "alike"))
    return versions.update


@pytest.fixture
def night(config, root):
    """A maker of the runs of one dataset: the night's number, and what else its job says."""
    dataset = storage.join(root, "captions")

    def job(number, **changes):
        output = {"uri": storage.join(dataset, f"night-{number}"), "items_per_shard": 2}
        return config(input={"uri": storage.join(root, "in"), "exclude_runs": dataset}, output=output, **changes)

    return job


def put(root, *names):
    for name in names:
        storage.write_atomic(storage.join(root, "in", name), name.encode())


@pytest.mark.parametrize(
    ("kind", "package", "counts"),
    [
        ("video", "av", True),
        ("video", "pillow", False),
        ("video", "pillow_resize", True),
        ("video", "pypdfium2", False),
        ("image", "pillow", True),
        ("image", "decord", False),
        ("images", "av", False),
        ("document", "pypdfium2", True),
        ("document", "pillow", True),
        ("document", "decord", False),
        *(
            (kind, name, True)
            for kind in ("video", "image", "images", "document")
            for name in ("torch", "transformers")
        ),
    ],
)
def test_a_package_counts_for_the_media_that_it_touches(config, kind, package, counts):
    fields = resolve_config_fingerprint(config()).fields
    assert f"versions.{package}" in fields
    assert (f"versions.{package}" in concerning(fields, {kind})) == counts


def test_an_update_that_changes_no_pixel_of_a_video_orphans_no_video(night, root, installed):
    put(root, "a.mp4", "b.mp4", "c.jpg", "d.pdf")
    first = open_run(night(1))
    complete(first)
    installed(pillow="12.3.0", pypdfium2="6.0.0")
    run = plan_run(night(2))
    assert sorted(item.uris[0][-5:] for item in run.manifest.items) == ["c.jpg", "d.pdf"]
    [passed] = run.earlier.passed_over
    assert [str(one) for one in passed.differences] == [
        'versions.pillow "13.0.0" -> "12.3.0"',
        'versions.pypdfium2 "5.15.2" -> "6.0.0"',
    ]
    assert passed.num_rows == 2
    installed(resize="otherwise")
    assert len(plan_run(night(2)).manifest) == 4


def test_a_record_of_before_goes_by_pillows_release(night, root, installed):
    put(root, "a.mp4")
    complete(open_run(night(1)))
    uri = storage.join(root, "captions", "night-1", "run.json")
    record = json.loads(storage.read(uri))
    del record["recipe"]["versions.pillow_resize"]
    storage.write_atomic(
        uri, json.dumps(record | {"recipe": record["recipe"] | {"versions.pillow": "13.0.0"}}).encode()
    )
    assert len(plan_run(night(2)).manifest) == 0
    installed(pillow="12.3.0")
    assert len(plan_run(night(2)).manifest) == 1


def test_the_plan_says_how_many_runs_are_passed_over_and_why(night, root, installed):
    put(root, "a.mp4")
    for number in (1, 2):
        complete(open_run(night(number)))
        put(root, f"b{number}.mp4")
    installed(torch="2.14.0")
    run = plan_run(night(3))
    assert (len(run.manifest), run.earlier.num_runs, len(run.earlier.passed_over)) == (3, 2, 2)
    said = "\n".join(_labelled("earlier runs", say_earlier_runs(run.earlier)))
    assert "2 runs, 2 passed over" in said
    assert 'passed over: versions.torch "2.13.0" -> "2.14.0" (2 runs)' in said
    assert "--accept versions.torch" in said


def test_an_accepted_update_is_recorded_and_holds_for_the_nights_after(night, root, installed):
    put(root, "a.mp4", "b.mp4")
    complete(open_run(night(1)))
    installed(torch="2.14.0")
    put(root, "c.mp4")
    second = opened(plan_run(night(2), accept=["versions.torch"]))
    assert [item.uris[0][-5:] for item in second.manifest.items] == ["c.mp4"]
    assert [str(one) for one in read_accepted(second.uri)] == ['versions.torch "2.13.0" -> "2.14.0"']
    assert len(open_run(night(2)).manifest) == 1, (
        "its own folder remembers, so the same command resumes without the flag"
    )
    complete(second)
    assert json.loads(storage.read(storage.join(second.uri, "_RUN.json")))["accepted"][0]["key"] == "versions.torch"
    third = plan_run(night(3))
    assert (len(third.manifest), third.manifest.num_done, third.earlier.passed_over) == (0, 3, ())
    installed(torch="2.15.0")
    assert len(plan_run(night(3)).manifest) == 3, "another update is another difference"


def test_an_unfinished_run_is_finished_after_an_update(config, root, installed):
    put_media(storage.join(root, "in"), 10)
    job = config(input={"uri": storage.join(root, "in")}, output={"uri": storage.join(root, "out")})
    complete(open_run(job), shards=[0])
    installed(av="19.0.0", pillow="12.3.0")
    said = r'versions\.av: "18\.1\.0" there, "19\.0\.0" here\nTo go on.*--accept versions\.av,'
    with pytest.raises(RefusedError, match=said):
        open_run(job)
    with pytest.raises(ConfigError, match=r"did you mean versions\.av"):
        plan_run(job, accept=["versions.avv"])
    run = opened(plan_run(job, accept=["versions.av"]))
    assert (run.resumed, pending_shards(run)) == (True, [1, 2])
    complete(opened(plan_run(job)), shards=[1, 2])
    assert is_finished(run.uri)
    assert verify_run(run.uri) == []
    with pytest.raises(RefusedError, match="holds another run"):
        plan_run(job.model_copy(update={"seed": 1}), accept=["versions.av"])
    assert begin_retry(run.uri).attempt == 2, "what is accepted stays accepted"


def test_a_retry_accepts_too(config, root, installed):
    put_media(storage.join(root, "in"), 10)
    job = config(input={"uri": storage.join(root, "in")}, output={"uri": storage.join(root, "out")})
    complete(open_run(job))
    installed(torch="3")
    with pytest.raises(RefusedError, match=r"versions\.torch"):
        begin_retry(job.output.uri)
    assert begin_retry(job.output.uri, accept=["versions.torch"]).attempt == 2


def test_another_configuration_is_taken_of_earlier_runs_and_not_of_the_runs_own_folder(night, root):
    put(root, "a.mp4")
    complete(open_run(night(1)))
    assert len(plan_run(night(2, seed=7)).manifest) == 1
    assert len(plan_run(night(2, seed=7), accept=["seed"]).manifest) == 0
    with pytest.raises(ConfigError, match="--accept seed: it is a key of the configuration"):
        plan_run(night(1, seed=7), accept=["seed"])


def test_the_command_takes_it(tmp_path, capsys):
    assert run_cli("job", ["--config", str(tmp_path / "job.yaml"), "--accept", "versions.torch"]) == 2
    assert "--accept" not in capsys.readouterr().err
