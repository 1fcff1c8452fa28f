"""The command line: quick answers, exit codes, errors in words, `--dry-run` without Ray or a model."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import yaml

import pipeline
from docs.generators.parsers import parser_of_script
from illava.errors import PlanError
from pipeline.__main__ import build_parser
from pipeline.__main__ import main as pipeline_main
from pipeline.cli import run_cli
from pipeline.errors import CredentialsError, InterruptedRunError, PipelineError, RefusedError
from pipeline.execution.budget import BUDGET_EXIT_CODE
from pipeline.execution.reporting.failures import FAILURES_EXIT_CODE
from pipeline.execution.runner import run_job
from pipeline.exit_codes import EXIT_CODES, guarded
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, numbered_items
from tests.support.timing import holds_in_one_of_three

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")


@pytest.fixture
def in_root(monkeypatch) -> None:
    """Relative paths of the shipped configs are relative to the repository."""
    monkeypatch.chdir(ROOT)


def _in_under_a_second(code: str) -> subprocess.CompletedProcess:
    """Of a core: a start computes and hardly waits, and what it waits for on a busy machine is not its own."""
    done = []

    def core_s() -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime

    @holds_in_one_of_three
    def attempt(number) -> None:
        before_s = core_s()
        done.append(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False))
        assert core_s() - before_s < 1.0

    return done[-1]


@pytest.mark.parametrize("module", ["pipeline.cli import run_cli as main", "pipeline.__main__ import main"])
def test_help_answers_in_under_a_second_and_loads_nothing_heavy(module) -> None:
    code = (
        f"import sys; from {module}\n"
        "try: main(*(['job'] if main.__name__ == 'run_cli' else []), argv=['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'decord', 'av', 'pyarrow', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = _in_under_a_second(code)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_each_command_helps_in_no_time_and_loads_nothing_heavy() -> None:
    """All of them in one process, in under a second together."""
    code = (
        "import sys; from pipeline.__main__ import build_parser, main\n"
        "for name in build_parser().commands:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: print(f'{name} is shown')\n"
        "heavy = {'torch', 'ray', 'decord', 'av', 'pyarrow', 'transformers', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = _in_under_a_second(code)
    assert done.returncode == 0, done.stderr
    shown = set(re.findall(r"^(\S+) is shown$", done.stdout, flags=re.M))
    assert shown == set(build_parser().commands)
    assert {"caption", "answer", "documents", "sweep", "draw", "status", "verify", "retry", "report"} < shown
    assert {"compare", "export", "convert", "export-for-judge"} < shown


def test_the_console_command_is_the_module() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {
        "illava": "pipeline.__main__:main"
    }


COMMAND_OF_JOB = {
    "answer_questions": "answer",
    "caption_images": "caption",
    "caption_videos": "caption",
    "draw_kept_tokens": "draw",
    "process_documents": "documents",
    "sweep_reduction": "sweep",
}


@pytest.mark.parametrize("job", COMMAND_OF_JOB)
def test_a_job_has_the_flags_of_the_command_that_it_names(job) -> None:
    """Their help, default and form, too."""

    def flags(parser) -> list[dict]:
        parts = ("option_strings", "dest", "default", "type", "choices", "required", "help", "metavar", "nargs")
        return [{part: getattr(action, part) for part in parts} for action in parser._actions]

    script = parser_of_script(f"jobs/{job}.py")
    assert flags(script) == flags(build_parser().commands[COMMAND_OF_JOB[job]])
    assert f"The same as `illava {COMMAND_OF_JOB[job]}`" in script.description


def test_every_job_but_the_demo_is_a_command() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == COMMAND_OF_JOB.keys() | {"demo"}


@pytest.mark.parametrize("command", ["caption", "answer", "documents"])
def test_a_command_runs_what_its_job_runs(command, tmp_path, capsys) -> None:
    """The same words and the same exit codes, for a dry run and for a mistake."""
    path = tmp_path / "job.yaml"
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 3), model={"model_id": f"{ROOT}/configs/demo/model"})
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for flags in (["--dry-run"], ["--dry", "--limit", "2"], ["--set", "media.frames=3"]):
        ours = pipeline_main([command, "--config", str(path), *flags]), capsys.readouterr()
        assert (run_cli("job", ["--config", str(path), *flags]), capsys.readouterr()) == ours
        assert ours[0] == (2 if flags[0] == "--set" else 0)


def test_sweeps_and_drawings_are_commands(in_root, capsys) -> None:
    for command, config in (("sweep", "configs/sweep_demo.yaml"), ("draw", "configs/draw_demo.yaml")):
        assert pipeline_main([command, "--config", config, "--dry-run", "--limit", "1"]) == 0
        assert "output" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "who", "said"),
    [
        ("verfy x", "illava", "unknown command 'verfy'; did you mean verify?"),
        ("zzz", "illava", "unknown command 'zzz'"),
        ("", "illava", "the following arguments are required: COMMAND"),
        ("verify x --dbug", "illava verify", "unknown argument --dbug; by --dbug, did you mean --debug?"),
        (
            "caption --confg=a",
            "illava caption",
            "the following arguments are required: --config; by --confg, did you mean --config?",
        ),
        ("status x y", "illava status", "unknown argument y"),
        ("caption --config x --limit many", "illava caption", "argument --limit: invalid int value: 'many'"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_what_was_meant(arguments, who, said, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        pipeline_main(arguments.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {who}: {said}; what there is: {who} --help\n"


def test_an_unknown_key_is_refused_in_under_a_second_with_its_path_and_the_nearest_key() -> None:
    code = (
        "import sys; from pipeline.cli import run_cli\n"
        f"code = run_cli('job', ['--config', {DEMO!r}, '--set', 'media.num_frame=4'])\n"
        "sys.exit(code if not {'torch', 'ray', 'decord'} & set(sys.modules) else 99)\n"
    )
    done = _in_under_a_second(code)
    assert done.returncode == 2
    assert "media.num_frame" in done.stderr
    assert "media.num_frames" in done.stderr.replace("media.num_frame ", "")
    assert "Traceback" not in done.stderr


def test_plan_prints_tokens_and_shards_without_ray_or_torch_and_writes_nothing(tmp_path) -> None:
    output = tmp_path / "out"
    code = (
        "import sys; from pipeline.cli import run_cli\n"
        f"code = run_cli('job', ['--config', {DEMO!r}, '--dry-run', '--set', 'output.uri={output}'])\n"
        "heavy = {'torch', 'ray', 'decord', 'av'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8 (8 videos)" in done.stdout
    assert "2 of 2 to do" in done.stdout
    for said in (
        "12,544 -> 2,816 out of the tower",  # 8 clips of 8 frames of 196 patches
        "840 into the LLM -> 840 in its last layer",
        "26.7% of the 3,144 tokens the unreduced model has there",
        "patches 1,568 -> 352, tokens 105 -> 105, kept 26.7%",
    ):
        assert said in done.stdout
    assert "(new)" in done.stdout
    assert not output.exists()


def test_plan_counts_stored_objects_that_no_reader_can_hold(tmp_path) -> None:
    """Of two readers: a share of 5 GB, below the 8 GB of ``media.max_bytes``. Local objects are used in place."""
    from pipeline.planning.dry_run import render_dry_run

    sizes = {"s3://bucket/a.mp4": 5 * 10**9 + 1, "gs://bucket/b.mp4": 8 * 10**9, f"{tmp_path}/c.mp4": 6 * 10**9}
    sizes |= {"s3://bucket/d.mp4": 5 * 10**9, "s3://bucket/e.mp4": 8 * 10**9 + 1, "s3://bucket/f.mp4": -1}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(json.dumps({"uri": uri, "size": size}) for uri, size in sizes.items()))
    config = partial(job_config, tmp_path / "out", {"manifest": str(manifest)}, media={"num_frames": 2})
    said = render_dry_run(config(runtime={"cache_bytes": 10**10}))
    assert "2 objects exceed a reader's share of runtime.cache_bytes (5 GB, by" in said
    assert "exceed" not in render_dry_run(config(runtime={"cache_bytes": 16 * 10**9}))


def test_what_the_plan_expects_is_what_the_rows_measure(tmp_path, onevision_folder, capsys) -> None:
    """Videos and image sets through a real model; every count that the plan calls exact."""
    from PIL import Image

    from pipeline.planning.dry_run import render_dry_run
    from tests.support.media import clips

    video = clips.write_barcode_video(tmp_path / "v.mp4", 5)
    for n in range(2):
        Image.fromarray(clips.barcode_frame(n)).save(tmp_path / f"{n}.png")
    lines = [{"id": "v", "uri": str(video)}]
    (tmp_path / "videos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "sets.jsonl").write_text(json.dumps({"id": "s", "uris": [f"{tmp_path}/{n}.png" for n in range(2)]}))
    plan = {
        "steps": [
            {"stage": "vision_block", "layers": [2, 3], "reducer": {"kind": "illava", "num_merged": 12}},
            {"stage": "decoder_layer", "layers": [1], "reducer": {"kind": "illava", "keep_ratio": 0.5}},
        ]
    }
    for name in ("videos", "sets"):
        config = job_config(
            tmp_path / name,
            {"manifest": str(tmp_path / f"{name}.jsonl"), "uri": str(tmp_path)},
            model={"model_id": str(onevision_folder)},
            sampling={"max_new_tokens": 2},
            reduction=plan,
        )
        planned = render_dry_run(config)
        assert "at most" not in planned.partition("  memory ")[0] + planned.partition("  patches ")[2]
        run_job(config)
        [row] = fakes.read_rows(tmp_path / name)
        assert row["status"] == "ok", row["error_message"]
        counts = ("num_patches", "num_patches_kept", "num_vision_tokens", "num_vision_tokens_kept")
        for count in (*counts, "num_decoder_tokens_kept"):
            assert f" {row[count]:,}" in planned, (count, row[count], planned)


def test_plan_of_a_run_begun_says_what_is_left(tmp_path, capsys) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 20))
    run_job(config, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader)
    Path(tmp_path, "out", "data", "part-00001.parquet").unlink()
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert run_cli("job", ["--config", str(path), "--dry-run"]) == 0
    assert "1 of 3 to do" in capsys.readouterr().out


def test_a_whole_job_from_the_command_line_with_set_and_limit(tmp_path, in_root, capsys) -> None:
    """The demo's real model and clips, in one process."""
    arguments = ["--config", DEMO, "--limit", "2", "--set", "runtime.executor=local"]
    arguments += ["--set", f"output.uri={tmp_path / 'out'}", "--set", "sampling.max_new_tokens=2"]
    assert run_cli("job", arguments) == 0
    said = capsys.readouterr().out
    assert "2 ok, 0 partial, 0 failed" in said
    assert f"illava verify {tmp_path / 'out'}" in said
    for row in fakes.read_rows(tmp_path / "out"):
        # The geometric layout restores a frame's grid behind the tower; the cut before the language model is the last.
        assert row["num_decoder_tokens_kept"] == row["num_vision_tokens_kept"] < 0.28 * row["num_vision_tokens"]
    assert pipeline_main(["verify", str(tmp_path / "out")]) == 0
    assert pipeline_main(["status", str(tmp_path / "out")]) == 0
    assert "2 of 2" in capsys.readouterr().out


def test_every_public_name_stands_where_the_package_says() -> None:
    assert {"JobConfig", "load_config", "run_job"} <= set(pipeline.__all__)
    assert pipeline.run_job is run_job
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'run_jobs'"):
        pipeline.run_jobs  # noqa: B018
    with pytest.raises(ImportError):
        from pipeline import run_jobs  # noqa: F401


def test_questions_are_scored_below_the_summary_by_any_job_and_captions_are_not(tmp_path, in_root, capsys) -> None:
    questions = str(ROOT / "configs" / "demo_questions.yaml")
    for name, config, scored in (("asked", questions, True), ("told", DEMO, False)):
        arguments = ["--config", config, "--limit", "1", "--set", "runtime.executor=local"]
        arguments += ["--set", f"output.uri={tmp_path / name}", "--set", "sampling.max_new_tokens=1"]
        assert run_cli("job", arguments) == 0
        assert ("scores (mean, 95 % interval" in capsys.readouterr().out) == scored


def test_verify_says_what_is_wrong_with_exit_code_4(tmp_path, capsys) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 9))
    run_job(config, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader)
    Path(tmp_path, "out", "data", "part-00000.parquet").unlink()
    assert pipeline_main(["verify", str(tmp_path / "out")]) == 4
    assert "part-00000" in capsys.readouterr().out


def test_status_tells_and_does_not_judge(tmp_path, capsys) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 9))
    loader = partial(fakes.fake_loader, failing={"item-3": "store_error"})
    assert run_job(config, worker_factory=fakes.barcode_worker, loader_factory=loader).exit_code == 3
    assert pipeline_main(["status", config.output.uri]) == 0
    assert "1 store_error" in capsys.readouterr().out
    Path(tmp_path, "out", "_RUN.json").unlink()
    Path(tmp_path, "out", "data", "part-00000.parquet").unlink()
    assert pipeline_main(["status", config.output.uri]) == 0
    assert "unfinished; the same command resumes" in capsys.readouterr().out
    assert pipeline_main(["status", str(tmp_path / "nowhere")]) == 4


def test_readme_help_and_errors_agree_on_exit_codes() -> None:
    readme = " ".join((ROOT / "README.md").read_text().replace("|", " ").split())  # they stand in a table
    for meaning in " ".join(re.sub(r" \(.*?\)", "", EXIT_CODES).split()).removeprefix("exit codes: ").split(" · "):
        assert meaning in readme
    told = {int(code) for code in re.findall(r"\d+", EXIT_CODES)}
    raised = {kind.exit_code for kind in PipelineError.__subclasses__()}
    assert told == raised | {0, 3, BUDGET_EXIT_CODE, FAILURES_EXIT_CODE, 130, 143}


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (RefusedError("another run"), 4),
        (InterruptedRunError("by SIGTERM", 143), 143),
        (CredentialsError("expired"), 5),
        (PlanError("no layer 99"), 2),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("a defect"), 5),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_errors_become_words_and_an_exit_code(error, exit_code, debug, capsys) -> None:
    def command() -> int:
        raise error

    assert guarded(command, debug=debug) == exit_code
    said = capsys.readouterr().err
    assert str(error) in said
    assert ("Traceback" in said) == (debug and not isinstance(error, KeyboardInterrupt))


# Sweeps have a schema of their own (test_sweep.py), compared methods are read by the accuracy benchmark.
JOBS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith(("sweep_", "compare_"))]


NO_COMMIT_SEEN = "process_documents_olmocr"  # its users pin one; until then the id is refused: test_document_configs.py


@pytest.mark.parametrize("config", JOBS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_pin_their_weights(config, in_root) -> None:
    from pipeline.config.load import load_config

    job = load_config(str(config))
    assert job.model.revision is not None or Path(job.model.model_id).is_dir() or config.stem == NO_COMMIT_SEEN


@pytest.mark.parametrize("text", ["'a word'", "'a word' * 10_000"], ids=["at the end", "in the middle"])
def test_a_reader_that_has_gone_is_no_error(text) -> None:
    """As in `illava status RUN | head -1`; the message was that a server did not answer."""
    command = f"guarded(lambda: print({text}) or 0, debug=False)"
    code = f"import sys; from pipeline.exit_codes import guarded; sys.exit({command})"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (141, "")
