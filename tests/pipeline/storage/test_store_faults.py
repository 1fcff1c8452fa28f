"""Tests a store under trouble: errors, resets, slow and short answers, hangs, changed objects, expiring credentials."""

from __future__ import annotations

import itertools

import pytest

from pipeline.errors import CredentialsError, ItemError
from pipeline.execution.runner import run_job
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.storage import storage
from tests.support.media.clips import write_barcode_video
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, violations
from tests.support.stores.faulty_store import PASSING, FaultyStore, SomeFail


@pytest.fixture
def store(s3_bucket, s3_endpoint, monkeypatch):
    """The bucket as it is seen through the proxy."""
    with FaultyStore(s3_endpoint).serving() as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
        monkeypatch.delenv("AWS_MAX_ATTEMPTS")
        faulty.bucket = s3_bucket
        yield faulty


def put_clips(store, tmp_path, values) -> dict:
    """Clips in the bucket; the ``input`` section."""
    for value in values:
        path = write_barcode_video(tmp_path / f"{value}.mp4", value, num_frames=3)
        storage.write_atomic(f"{store.bucket}/in/{value}.mp4", path.read_bytes())
    return {"uri": f"{store.bucket}/in", "pattern": "*.mp4"}


def rows_of(out: str) -> dict[str, dict]:
    rows = [row for table in read_parts(out, list_parts(out)) for row in table.to_pylist()]
    return {row["uri"].rpartition("/")[2]: row for row in rows}


def run(store, source, name: str, **sections) -> tuple[int, dict[str, dict], int]:
    """Exit code, rows by file name, requests made."""
    out, before = f"{store.bucket}/{name}", store.num_requests
    runtime = {"num_reader_actors": 1}
    config = job_config(out, source, output={"items_per_shard": 8}, runtime=runtime, **sections)
    code = run_job(config, worker_factory=fakes.barcode_worker).exit_code
    num_requests = store.num_requests - before
    store.plan = None
    assert violations(out) == []
    return code, rows_of(out), num_requests


@pytest.mark.long
def test_with_thirty_percent_errors_all_items_are_ok_for_at_most_sixty_percent_more_requests(store, tmp_path) -> None:
    values = range(300, 332)
    source = put_clips(store, tmp_path, values)
    _, calm, num_calm = run(store, source, "calm")
    store.reset(SomeFail(3))
    code, rows, num_requests = run(store, source, "out")
    assert code == 0, [row["error_message"] for row in rows.values() if row["status"] == "failed"]
    assert {name: row["text"] for name, row in rows.items()} == {f"{value}.mp4": str(value) for value in values}
    assert {name: row["text"] for name, row in calm.items()} == {name: row["text"] for name, row in rows.items()}
    assert set(store.faults) == set(PASSING)
    assert sum(store.faults.values()) == pytest.approx(0.3 * num_requests, abs=10)
    print(f"{num_calm} requests without faults, {num_requests} with: {num_requests / num_calm:.2f}x")
    assert num_requests <= 1.6 * num_calm


@pytest.mark.parametrize("kind", [*PASSING, "slow"])
def test_one_bad_answer_is_nobodys_failure(store, kind) -> None:
    data = bytes(range(256)) * 40
    storage.write_atomic(f"{store.bucket}/object", data)
    once = itertools.chain([kind], itertools.repeat(None))
    store.reset(lambda method, path: next(once))
    assert storage.read(f"{store.bucket}/object") == data
    assert store.faults == {kind: 1}


@pytest.mark.parametrize(
    "kind", ["429", "reset", pytest.param("500", marks=pytest.mark.long), pytest.param("503", marks=pytest.mark.long)]
)
def test_one_bad_answer_to_a_head_or_a_write_either(store, kind) -> None:
    for action in (
        lambda: storage.write_atomic(f"{store.bucket}/object", b"data"),
        lambda: storage.stat(f"{store.bucket}/object"),
        lambda: storage.list_names(store.bucket),
        lambda: storage.create_exclusive(f"{store.bucket}/created", b"data"),
        lambda: storage.delete(f"{store.bucket}/created"),
    ):
        once = itertools.chain([kind], itertools.repeat(None))
        store.reset(lambda method, path, once=once: next(once))
        action()
        assert store.faults == {kind: 1}


def test_a_store_that_hangs_is_given_up_and_asked_again(store, monkeypatch, request) -> None:
    filesystem = storage.fsspec.filesystem

    def impatient(kind, **options):
        options["config_kwargs"] = options["config_kwargs"] | {"read_timeout": 1}
        return filesystem(kind, **options)

    monkeypatch.setattr(storage.fsspec, "filesystem", impatient)
    request.addfinalizer(storage._open_store.cache_clear)
    storage._open_store.cache_clear()
    storage.write_atomic(f"{store.bucket}/object", b"data")
    once = itertools.chain(["hang"], itertools.repeat(None))
    store.reset(lambda method, path: next(once))
    assert storage.read(f"{store.bucket}/object") == b"data"
    assert store.faults == {"hang": 1}


def test_an_object_that_changes_gives_a_failed_row_and_never_a_caption_of_other_bytes(store, tmp_path) -> None:
    source = put_clips(store, tmp_path, (401, 402))
    store.reset(lambda method, path: "changed" if "401.mp4" in path and method in ("GET", "HEAD") else None)
    code, rows, _ = run(store, source, "out")
    assert code == 3
    assert (rows["401.mp4"]["status"], rows["401.mp4"]["error_type"]) == ("failed", "changed_object")
    assert rows["402.mp4"]["text"] == "402"


def test_credentials_that_expire_stop_the_job_and_it_resumes_with_new_ones(store, tmp_path) -> None:
    source = put_clips(store, tmp_path, range(501, 513))
    out = f"{store.bucket}/out"
    config = job_config(out, source, output={"items_per_shard": 3}, runtime={"max_open_shards": 1})
    expired = []

    def expire(method, path):
        expired.append(path) if "508.mp4" in path and method == "GET" else None
        return "expired" if expired else None

    store.reset(expire)
    with pytest.raises(CredentialsError, match="same command again: it resumes") as caught:
        run_job(config, worker_factory=fakes.barcode_worker)
    assert caught.value.exit_code == 5
    assert "testing-secret" not in str(caught.value)
    store.reset()
    standing = rows_of(out)
    assert 3 <= len(standing) < 12
    assert {row["status"] for row in standing.values()} == {"ok"}, "no item was failed for it"
    summary = run_job(config, worker_factory=fakes.barcode_worker)
    assert (summary.exit_code, summary.num_done_before) == (0, len(standing))
    assert {name: row["text"] for name, row in rows_of(out).items()} == {f"{n}.mp4": str(n) for n in range(501, 513)}
    assert violations(out) == []


def test_a_store_that_only_fails_is_a_named_row_after_bounded_tries(store, monkeypatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    storage.write_atomic(f"{store.bucket}/object", b"data")
    store.reset(lambda method, path: "503")
    with pytest.raises(ItemError) as caught:
        storage.read(f"{store.bucket}/object")
    assert (caught.value.error_type, caught.value.retryable) == ("store_error", True)
    assert store.num_requests <= 6
