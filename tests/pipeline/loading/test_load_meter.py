"""Tests that all tries of a load count and share one deadline: an unsafe ranged read, decord before PyAV."""

import time

import pytest

from pipeline.config.schema import MediaConfig
from pipeline.loading.loader import Loader
from pipeline.loading.sandbox.client import DecoderProcess
from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError
from pipeline.records import MediaItem
from pipeline.storage import storage
from tests.support.media.clips import write_barcode_video
from tests.support.runs.misbehaving import SpinsThenDies, Untouched

LIMIT_S = 600.0
TRY_S = 0.4


def load(uri, tmp_path, preprocessor, **media):
    found = storage.stat(uri)
    item = MediaItem("item", (found.uri,), "video", (found.size,), (found.etag,))
    config = MediaConfig(num_frames=2, load_timeout_s=LIMIT_S, **media)
    with Loader(config, preprocessor, cache_dir=str(tmp_path / "staged"), ranged_from_bytes=1) as loader:
        return loader.load(item)


@pytest.fixture
def asked(monkeypatch):
    """Seconds that each try of a whole file was still given."""
    left_s, real = [], DecoderProcess.load

    def watched(process, *args, deadline_s, **options):
        left_s.append(deadline_s - time.monotonic())
        return real(process, *args, deadline_s=deadline_s, **options)

    monkeypatch.setattr(DecoderProcess, "load", watched)
    return left_s


def test_an_unsafe_ranged_read_is_loading_time_and_shortens_the_deadline(s3_bucket, tmp_path, asked, monkeypatch):
    path = write_barcode_video(tmp_path / "v.mp4", 6)
    storage.write_atomic(f"{s3_bucket}/v.mp4", path.read_bytes())

    def unsafe(*_, **__):
        time.sleep(TRY_S)
        raise RangeReadUnsafeError("made up")

    monkeypatch.setattr(DecoderProcess, "needed_ranges", unsafe)
    began_s = time.perf_counter()
    stats = load(f"{s3_bucket}/v.mp4", tmp_path, Untouched()).stats
    took_s = time.perf_counter() - began_s
    assert asked[0] <= LIMIT_S - TRY_S
    assert stats.load_s >= TRY_S
    assert stats.fetch_s + stats.load_s + stats.preprocess_s <= took_s
    assert stats.fetch_s <= took_s - TRY_S
    assert stats.bytes_fetched > path.stat().st_size, "the index, then the whole"


def test_decord_s_try_before_pyav_counts_with_its_cpu_and_its_time(tmp_path, asked):
    path = write_barcode_video(tmp_path / "v.mp4", 6)
    calm = load(str(path), tmp_path, Untouched(), decoder="pyav").stats
    stats = load(str(path), tmp_path, SpinsThenDies(only_with="decord", cpu_s=2 * TRY_S)).stats
    assert stats.decoder == "pyav"
    assert stats.cpu_s > calm.cpu_s + TRY_S, "also another child's start"
    assert stats.load_s >= 2 * TRY_S
    assert asked[-1] <= asked[-2] - 2 * TRY_S
