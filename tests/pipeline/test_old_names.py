"""Names of an earlier version, typed by users: each works as today's does, and one line on stderr says today's.

Time: 3 s of one core.
"""

from __future__ import annotations

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.cli import run_cli
from pipeline.config.load import load_as, load_config, parse_config
from pipeline.errors import ConfigError
from pipeline.old_names import COMMANDS, KEYS
from pipeline.runs.run_record import RENAMED_KEYS, recorded_config
from pipeline.sweep.command import sweep_cli
from pipeline.sweep.config import SweepConfig
from tests.support.runs.fakes import job_config, numbered_items

NOTE = "note: {} is called {} now; the next release no longer knows the old name\n"
SAID = NOTE.format("input.skip_done_in", "input.exclude_runs")


@pytest.fixture
def logged(caplog):
    """What was logged since the last call."""

    def read() -> str:
        lines = "".join(f"{line}\n" for line in caplog.messages)
        caplog.clear()
        return lines

    return read


@pytest.fixture
def job_file(tmp_path):
    """Writes a job's file with more keys of `input`."""

    def write(**more):
        data = job_config(tmp_path / "out", numbered_items(tmp_path, 20)).model_dump(mode="json")
        del data["input"]["exclude_runs"]
        data["input"] |= more
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(data))
        return str(path)

    return write


def test_an_old_key_in_a_file_is_todays_key_with_one_line(job_file, logged) -> None:
    todays = load_config(job_file(exclude_runs="runs/"))
    assert logged() == ""
    assert load_config(job_file(skip_done_in="runs/")) == todays
    assert logged() == SAID


@pytest.mark.parametrize("override", ["input.skip_done_in=there/", " input.skip_done_in =there/"])
def test_an_old_key_in_set_is_todays_key_with_one_line(override, job_file, logged) -> None:
    """It wins over the file, whichever name that has; two old names are told once."""
    for path in (job_file(), job_file(exclude_runs="here/"), job_file(skip_done_in="here/")):
        assert load_config(path, [override]).input.exclude_runs == "there/"
        assert logged() == SAID


def test_an_old_key_in_a_whole_section_of_set_is_found(job_file, logged) -> None:
    assert load_config(job_file(), ["input={uri: x, skip_done_in: there/}"]).input.exclude_runs == "there/"
    assert logged() == SAID


def test_todays_key_in_set_wins_over_the_old_one_in_the_file(job_file, logged) -> None:
    assert load_config(job_file(skip_done_in="here/"), ["input.exclude_runs=there/"]).input.exclude_runs == "there/"
    assert logged() == SAID


def test_both_names_at_once_are_refused(job_file) -> None:
    """In one file, in one section given by --set, in two --set."""
    with pytest.raises(ConfigError, match=r"job.yaml: input.skip_done_in is the old name of input.exclude_runs, and"):
        load_config(job_file(skip_done_in="a/", exclude_runs="a/"))
    with pytest.raises(ConfigError, match=r"--set input=.*both are given"):
        load_config(job_file(), ["input={uri: x, skip_done_in: a/, exclude_runs: a/}"])
    for order in (1, -1):
        with pytest.raises(ConfigError, match=r"--set input.skip_done_in .*both are given"):
            load_config(job_file(), ["input.skip_done_in=a/", "input.exclude_runs=b/"][::order])


def test_a_sweep_takes_an_old_key_too(tmp_path, logged) -> None:
    data = {"input": {"uri": "in", "skip_done_in": "there/"}, "models": {"m": {"model_id": "model"}}}
    data |= {"tables": {"t": [{"name": "none", "plan": {}}]}, "output": {"uri": "out"}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(data))
    assert load_as(SweepConfig, str(path)).input.exclude_runs == "there/"
    assert logged() == SAID


def test_an_unknown_key_of_input_is_still_refused_with_the_nearest(job_file) -> None:
    with pytest.raises(ConfigError, match=r"input.exclude_run: unknown key; did you mean input.exclude_runs\?"):
        load_config(job_file(exclude_run="there/"))


def test_a_frozen_configuration_is_read_in_silence(logged) -> None:
    frozen = {"input": {"uri": "in", "skip_done_in": "there/"}, "model": {"model_id": "m"}, "output": {"uri": "out"}}
    assert recorded_config({"config": frozen}, source="run.json").input.exclude_runs == "there/"
    assert logged() == ""
    assert parse_config(frozen, source="a file").input.exclude_runs == "there/"  # what is not frozen is told
    assert logged() == SAID


def test_every_old_key_is_known_in_frozen_configurations_for_ever() -> None:
    assert RENAMED_KEYS.items() >= KEYS.items()


def test_plan_is_a_dry_run_with_one_line(job_file, tmp_path, capsys) -> None:
    job = ["--config", job_file(), "--set", "model.model_id=configs/demo/model"]
    assert run_cli("job", [*job, "--dry-run"]) == 0
    todays = capsys.readouterr()
    assert "nothing is run or written" in todays.out
    assert todays.err == ""
    for run in (lambda: run_cli("job", [*job, "--plan"]), lambda: main(["caption", *job, "--plan"])):
        assert run() == 0
        assert capsys.readouterr() == (todays.out, NOTE.format("--plan", "--dry-run"))
    assert not (tmp_path / "out").exists()


def test_plan_and_probe_is_an_estimate_with_one_line(job_file, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.planning.probe.probe", lambda config, count, debug, accept: f"{count} media, {debug}")
    monkeypatch.setattr("pipeline.planning.probe.render_probe", str)
    job = ["--config", job_file(), "--set", "model.model_id=configs/demo/model"]
    for flags in (["--estimate", "4"], ["--dry-run", "--estimate", "4"]):
        assert run_cli("job", [*job, *flags]) == 0
        todays = capsys.readouterr()
        assert todays.out.endswith("4 media, False\n")
        assert todays.err == ""
    assert run_cli("job", [*job, "--plan", "--probe", "4"]) == 0
    assert capsys.readouterr() == (todays.out, NOTE.format("--plan --probe N", "--estimate N"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--probe", "4"], "--probe measures for a dry run; give --estimate 4"),
        (["--plan", "--probe", "4", "--estimate", "4"], "--probe is the old name of --estimate, and both are given"),
        (["--estimate", "4", "--one-line"], "--estimate runs no job, so --budget and --one-line mean nothing"),
        (["--dry-run", "--budget", "3h"], "--dry-run runs no job, so --budget and --one-line mean nothing"),
    ],
)
def test_flags_that_mean_nothing_together_are_refused(flags, said, job_file, tmp_path, capsys) -> None:
    assert run_cli("job", ["--config", job_file(), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plan_of_what_is_no_job_is_a_dry_run_with_one_line(monkeypatch, capsys) -> None:
    """Sweeps and drawings share the flags."""
    monkeypatch.setattr("pipeline.sweep.command.render_sweep_dry_run", lambda config: config.name)
    for flag, said in (("--dry-run", ""), ("--plan", NOTE.format("--plan", "--dry-run"))):
        assert sweep_cli("", ["--config", "configs/sweep_demo.yaml", flag]) == 0
        assert capsys.readouterr() == ("sweep-demo\n", said)


def test_adapt_is_convert_with_one_line(tmp_path, capsys) -> None:
    assert main(["convert", "nothing", "a", "--media", "b", "--manifest", "c.jsonl"]) == 2
    todays = capsys.readouterr()
    assert "no converter for benchmark 'nothing'" in todays.err
    assert main(["adapt", "nothing", "a", "--media", "b", "--manifest", "c.jsonl"]) == 2
    note = NOTE.format("`illava adapt`", "`illava convert`")
    assert capsys.readouterr() == (todays.out, note + todays.err)


@pytest.mark.parametrize("command", ["", "retry"])
def test_help_names_no_old_name(command, capsys) -> None:
    for run in (lambda: run_cli("job", ["--help"]), lambda: main([*command.split(), "--help"])):
        with pytest.raises(SystemExit):
            run()
        said = capsys.readouterr().out
        assert not any(f"{old} " in said for old in ("--plan", "--probe", *COMMANDS))
