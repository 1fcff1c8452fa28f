"""Tests that a failed item's row has what the load cost: bytes, the child's CPU seconds, and their price."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pipeline.config.schema import MediaConfig
from pipeline.errors import ItemError
from pipeline.execution.runner import run_job
from pipeline.loading.loader import Loader
from pipeline.records import MediaItem
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.storage import storage
from tests.support.media.clips import write_barcode_video
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config
from tests.support.runs.misbehaving import SignalsItself, Spins, Untouched

NOISE = np.random.default_rng(0).bytes(50_000)


@pytest.fixture
def failed(tmp_path):
    """Load one object that fails; what was spent on it."""

    def load(uri: str, preprocessor, **media):
        found = storage.stat(uri)
        item = MediaItem("item", (found.uri,), "video", (found.size,), (found.etag,))
        config = MediaConfig(num_frames=2, **media)
        with Loader(config, preprocessor, cache_dir=str(tmp_path / "staged")) as loader:
            with pytest.raises(ItemError) as caught:
                loader.load(item)
            return caught.value

    return load


def test_bytes_of_a_fetched_file_that_cannot_be_decoded(failed, s3_bucket) -> None:
    storage.write_atomic(f"{s3_bucket}/noise.mp4", b"\x00\x00\x00\x20ftypisom" + NOISE)
    error = failed(f"{s3_bucket}/noise.mp4", Untouched())
    assert error.error_type == "corrupt_media"
    assert error.stats.bytes_fetched > 0
    assert error.stats.storage_requests >= 1
    assert error.stats.load_s > 0


def test_cpu_of_a_child_that_was_killed_at_its_deadline(failed, tmp_path) -> None:
    path = write_barcode_video(tmp_path / "v.mp4", 6)
    error = failed(str(path), Spins(), load_timeout_s=2.0)
    assert error.error_type == "load_timeout"
    assert 0.05 < error.stats.cpu_s < 30, "the reader itself only waited; the machine may be busy"


def test_cpu_of_a_child_that_ended_itself(failed, tmp_path) -> None:
    path = write_barcode_video(tmp_path / "v.mp4", 6)
    error = failed(str(path), SignalsItself())
    assert error.error_type == "load_crashed"
    assert error.stats.cpu_s > 0.05, "two children were started for it"


def test_the_row_carries_it_with_its_price(tmp_path, s3_bucket) -> None:
    storage.write_atomic(f"{s3_bucket}/in/noise.mp4", b"\x00\x00\x00\x20ftypisom" + NOISE)
    out = f"{s3_bucket}/out"
    config = job_config(out, {"uri": f"{s3_bucket}/in"}, prices={"cpu_hour_usd": 3600.0, "storage_request_usd": 1.0})
    assert run_job(config, worker_factory=partial(fakes.barcode_worker)).exit_code == 3
    [row] = [row for table in read_parts(out, list_parts(out)) for row in table.to_pylist()]
    assert row["error_type"] == "corrupt_media"
    assert row["bytes_fetched"] > 0
    assert row["cpu_s"] > 0
    assert row["cost_usd"] == pytest.approx(row["cpu_s"] + round(row["cost_usd"] - row["cpu_s"]), abs=1e-6)
    assert row["cost_usd"] - row["cpu_s"] > 0.9, "a request was paid for"
