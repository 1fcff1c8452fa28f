"""`illava erase`: rows and manifest lines become blank, all others stay to the bit, through a kill at every step.

Time: 4 s; the real kills 30 s, marked long.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import main
from pipeline.errors import InputError, RefusedError
from pipeline.evaluation.compare import compare_runs
from pipeline.evaluation.comparison_text import render_comparison
from pipeline.faults import injected
from pipeline.inspection.verify import verify_run
from pipeline.report.write import write_report
from pipeline.runs.earlier_runs import done_items
from pipeline.runs.erase import ERASING_FILE, erase_run
from pipeline.runs.parquet_sink import ParquetSink
from pipeline.runs.retry import RetrySink, begin_retry
from pipeline.runs.run import finish, open_run, pending_shards
from pipeline.storage import storage
from tests.support.runs.run_folders import complete, make_config, make_row, put_manifest

ROOT = Path(__file__).resolve().parents[3]
OLD = Path(__file__).parent / "data" / "runs_27c8a0a"
ERASED = {1, 2, 9}
AGE = 7_123_456_789_000  # so long that no digest holds it by chance


def lines() -> str:
    """Ten items; what is secret of each stands in its address, prompt, answer and columns of either type."""
    rows = [
        {
            "id": f"item-{n}",
            "uri": f"SECRET{n}x.mp4",
            "prompt": f"SECRET{n}x?",
            "reference": f"SECRET{n}x",
            "owner": f"SECRET{n}x",
            "age": AGE + n,
        }
        for n in range(10)
    ]
    return "\n".join(map(json.dumps, rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of three parts, with a report beside it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    manifest = put_manifest(str(folder), "items.jsonl", lines())
    sections = {"input": {"manifest": manifest}, "output": {"uri": f"{folder}/run"}}
    run = open_run(make_config(folder / "model", **sections))
    sink = ParquetSink(run)
    for index in pending_shards(run):
        items = run.shard(index).items
        sink.publish(index, [make_row(run, index, one, text=f"A {one.reference}", prompt=one.prompt) for one in items])
    finish(run, {"wall_s": 5.0})
    for name in ("report.html", "scores.json"):
        (folder / "run" / name).write_text("".join(f"SECRET{n}x" for n in range(10)))
    return folder / "run"


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "names").write_text(f"item-1\n\n{finished.parent}/SECRET2x.mp4\nitem-9\n")
    return tmp_path / "run"


def tables(run: Path) -> dict[str, object]:
    return {path.name: pq.read_table(path) for path in sorted(run.rglob("*.parquet"))}


def secrets_in(run: Path) -> set[int]:
    """Numbers of the items of which a secret stands anywhere in the folder."""
    text = "".join(str(table.to_pylist()) for table in tables(run).values())
    text += "".join(path.read_text() for path in run.rglob("*") if path.suffix in (".json", ".html"))
    return {n for n in range(10) if f"SECRET{n}x" in text or str(AGE + n) in text}


def check_erased(run: Path, before: Path) -> None:
    """Everything that must hold at the end, whatever happened on the way."""
    assert [str(one) for one in verify_run(str(run))] == []
    assert secrets_in(run) == set(range(10)) - ERASED
    assert sorted(path.name for path in run.iterdir() if path.suffix in (".json", ".html")) == ["_RUN.json", "run.json"]
    for name, old in tables(before).items():
        new = tables(run)[name]
        assert new.schema.equals(old.schema, check_metadata=name.startswith("part"))
        kept = [place for place, one in enumerate(old["item_id"].to_pylist()) if int(one[5:]) not in ERASED]
        assert new.take(kept).equals(old.take(kept)), name
        assert new["item_id"].to_pylist() == old["item_id"].to_pylist()
    record, was = (json.loads((one / "_RUN.json").read_text()) for one in (run, before))
    assert record["totals"]["by_status"] == {"erased": 3, "ok": 7}
    assert record["totals"]["sums"] == was["totals"]["sums"], "what was spent was spent"
    assert record["summary"] == was["summary"] == {"wall_s": 5.0}


class KilledError(BaseException):
    """Stands for the end of the process: every later fault point raises it too."""


def erase_up_to(run: Path, number: int) -> bool:
    """Erase, and die before this change of the folder; whether there are so many."""
    passed = [0]

    def kill(name: str, subject: str) -> None:
        passed[0] += name == "write" and "." in subject.rpartition("/")[2]  # a write or a removal, and no listing
        if passed[0] >= number:
            raise KilledError

    try:
        with injected(kill):
            erase_run(str(run), f"{run.parent}/names")
    except KilledError:
        return True
    return False


def test_an_erasure_through_a_kill_at_every_step(finished, copied, tmp_path) -> None:
    number, was_seen = 1, 0
    while erase_up_to(copied, number):
        was_seen += any(one.kind == "unfinished_erasure" for one in verify_run(str(copied)))
        for_other = {n for n in range(10) if n not in ERASED}
        assert secrets_in(copied) >= for_other
        erase_run(str(copied), f"{tmp_path}/names")
        check_erased(copied, finished)
        shutil.rmtree(copied)
        shutil.copytree(finished, copied)
        number += 1
    check_erased(copied, finished)
    assert number == 11, "ten changes: two of each JSON file but run.json, two parts, manifest, report, scores"


def test_kills_in_a_row_end_at_the_same(finished, copied, tmp_path) -> None:
    """Each try gets a step farther; what is done stays done."""
    for number in range(1, 40):
        if not erase_up_to(copied, number):
            break
    check_erased(copied, finished)
    assert erase_run(str(copied), put_manifest(str(tmp_path), "ids", "item-1\nitem-2")).num_rows == 0
    check_erased(copied, finished)


@pytest.mark.long
@pytest.mark.parametrize("point", ["write", "rename"])
def test_a_process_killed_by_its_pid_at_every_step(finished, copied, tmp_path, point) -> None:
    """Before each request for the store; and behind each file that is written, before it has its name."""
    number = 0
    while True:
        number += 1
        command = [sys.executable, "-m", "tests.support.runs.erase_until_killed", point, str(number)]
        child = subprocess.Popen(
            [*command, str(copied), f"{tmp_path}/names"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        first = child.stdout.readline()
        was_stopped = first == "here\n"
        if was_stopped:
            child.kill()
        child.communicate()
        if not was_stopped:
            assert child.returncode == 0, first
            break
        assert child.returncode == -9
        assert main(["erase", str(copied), "--items", f"{tmp_path}/names"]) == 0
        check_erased(copied, finished)
        shutil.rmtree(copied)
        shutil.copytree(finished, copied)
    check_erased(copied, finished)
    assert number == {"write": 11, "rename": 7}[point]


def test_the_command_says_what_it_did_and_what_it_cannot(copied, tmp_path, capsys) -> None:
    assert main(["erase", str(copied), "--items", f"{tmp_path}/names"]) == 0
    assert capsys.readouterr().out.startswith(f"{copied}: 3 rows erased\n")
    (tmp_path / "names").write_text("item-1\nitem-0")
    assert main(["erase", str(copied), "--items", f"{tmp_path}/names"]) == 0
    assert capsys.readouterr().out.startswith(f"{copied}: 1 rows erased, 1 erased before\n")


def test_an_erased_run_is_read_by_all_commands(finished, copied, tmp_path) -> None:
    erase_run(str(copied), f"{tmp_path}/names")
    page = storage.read(write_report(str(copied), leave_out=frozenset({"frames"}))).decode()
    assert {n for n in range(10) if f"SECRET{n}x" in page} <= set(range(10)) - ERASED
    compared = compare_runs(str(finished), str(copied))
    assert (compared.num_pairs, compared.num_erased) == (7, 3)
    assert (compared.failed_first, compared.failed_second) == (0, 0), "erased is not failed"
    assert "B 0; 3 erased)" in render_comparison(compared)
    record = json.loads((copied / "run.json").read_text())
    found = done_items(str(copied), record["recipe"], own_run_uri=f"{tmp_path}/tonight")
    assert len(found.item_ids) == 10, "no later night computes an erased item again"
    for file_format in ("csv", "jsonl", "md"):
        assert main(["export", str(copied), "--format", file_format, "--to", f"{tmp_path}/a.{file_format}"]) == 0
        text = (tmp_path / f"a.{file_format}").read_text()
        assert {n for n in range(10) if f"SECRET{n}x" in text} == set(range(10)) - ERASED
    assert main(["status", str(copied)]) == 0


def test_a_retry_that_was_at_work_publishes_no_older_row(finished, copied, tmp_path) -> None:
    part = copied / "data" / "part-00000.parquet"
    table = pq.read_table(part)
    rows = table.to_pylist()
    rows[0] |= {"status": "failed", "error_type": "store_error", "error_message": "x"}
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), part)
    run = begin_retry(str(copied))
    sink = RetrySink(run)
    [item] = sink.open_shard(0).items
    with pytest.raises(RefusedError, match=r"1 of 3 parts are still to be computed.*illava retry"):
        erase_run(str(copied), f"{tmp_path}/names")
    sink.publish(0, [make_row(run, 0, item)])
    late = RetrySink(run)
    late.open_shard(0)
    erase_run(str(copied), f"{tmp_path}/names")
    with pytest.raises(RefusedError, match="another job took the folder over"):
        late.publish(0, [])
    assert secrets_in(copied) == set(range(10)) - ERASED


def test_rows_of_an_erased_run_are_retried_without_the_erased(copied, tmp_path) -> None:
    erase_run(str(copied), f"{tmp_path}/names")
    part = copied / "data" / "part-00000.parquet"
    table = pq.read_table(part)
    rows = table.to_pylist()
    rows[0] |= {"status": "failed", "error_type": "store_error", "error_message": "x"}
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), part)
    run = begin_retry(str(copied))
    sink = RetrySink(run)
    [item] = sink.open_shard(0).items
    sink.publish(0, [make_row(run, 0, item, prompt=item.prompt, text="A SECRET0x")])
    finish(run, {})
    assert [str(one) for one in verify_run(str(copied))] == []
    assert secrets_in(copied) == set(range(10)) - ERASED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no item"),
        ("item-1\nitem-99\n", "1 of 2 lines are neither .* item-99"),
        ("\xff", "not UTF-8"),
    ],
)
def test_a_file_that_names_nothing_here_is_refused_first(finished, copied, tmp_path, text, words) -> None:
    (tmp_path / "names").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        erase_run(str(copied), f"{tmp_path}/names")
    assert secrets_in(copied) == set(range(10))
    assert not (copied / ERASING_FILE).exists()


def test_an_unfinished_run_is_refused(tmp_path, model_folder) -> None:
    manifest = put_manifest(str(tmp_path), "items.jsonl", lines())
    run = open_run(make_config(model_folder, input={"manifest": manifest}, output={"uri": f"{tmp_path}/out"}))
    complete(run, shards=[0])
    with pytest.raises(RefusedError, match=r"2 of 3 parts are still to be computed.*the job's own command"):
        erase_run(run.uri, put_manifest(str(tmp_path), "ids", "item-1"))


def test_an_altered_manifest_is_refused_after_an_erasure_too(copied, tmp_path) -> None:
    erase_run(str(copied), f"{tmp_path}/names")
    [path] = copied.glob("manifest-*.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["prompt"] = "another"
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    assert "manifest" in {one.kind for one in verify_run(str(copied))}


@pytest.mark.parametrize("name", ["finished", "documents", "questions", "retried"])
def test_runs_of_earlier_versions_are_erased_in_their_own_columns(tmp_path, name) -> None:
    shutil.copytree(OLD / name, tmp_path / "run")
    before = [str(one) for one in verify_run(str(tmp_path / "run"))]
    part = next(iter(sorted((tmp_path / "run" / "data").iterdir())))
    schema, first = pq.read_schema(part), pq.read_table(part).to_pylist()[0]
    erase_run(str(tmp_path / "run"), put_manifest(str(tmp_path), "ids", first["item_id"]))
    assert [str(one) for one in verify_run(str(tmp_path / "run"))] == before == []
    assert pq.read_schema(part).equals(schema, check_metadata=True)
    row = pq.read_table(part).to_pylist()[0]
    assert (row["status"], row["text"], row["uri"], row["pages"]) == ("erased", "", "erased:", None)
    assert Path(first["uri"]).name not in str(tables(tmp_path / "run"))
