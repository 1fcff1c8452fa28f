"""Tests ranged reads: the frames of the whole file from a part of its bytes, or a read of the whole file.

How few bytes, and where the index lies, is in `test_smallest_bytes.py`. About 12 s in `make test`; 300 mutants, about
60 s, in `make test-long`.
"""

from pathlib import Path

import numpy as np
import pytest

from illava.families import load_preprocessor
from pipeline.config.schema import FpsSampling, KeyframeSampling, MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.decoding.media import load_video
from pipeline.loading.loader import Loader
from pipeline.loading.sparse_file import SparseCopy
from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError
from pipeline.records import MediaItem
from pipeline.storage import storage
from tests.support.media.clips import write_barcode_video, write_truncated, write_video
from tests.support.media.long_videos import noisy_frames, write_long_video
from tests.support.media.ranged_copies import assert_same, ranged

MEDIA = MediaConfig(num_frames=8)
H264 = {"crf": "23", "preset": "veryfast", "threads": "1", "bf": "3"}
X265 = "log-level=none:pools=1:frame-threads=1"
FRONT = {"movflags": "+faststart"}


VIDEOS = {
    "h264": {"codec": "libx264", "options": H264},
    "h264 open": {"codec": "libx264", "options": {**H264, "x264-params": "open-gop=1"}},
    "hevc": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": X265 + ":open-gop=0"}},
    "hevc open": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": X265}},
    "av1": {"codec": "libsvtav1"},
    "mpeg4": {"codec": "mpeg4", "options": {"b": "3000000"}},
    "mpeg4 with b-frames": {"codec": "mpeg4", "options": {"b": "3000000", "bf": "2"}},
    "turned": {"codec": "libx264", "options": H264, "rotation": 90},
    "variable rate": {"codec": "libx264", "options": H264, "pts": [i + i * i // 9 for i in range(180)]},
}
WHOLE = {"h264 open"}  # x264's open groups begin at frames that are no random access points in h264


@pytest.fixture(scope="module")
def frames():
    return noisy_frames(180)


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_the_whole_file(tmp_path, frames, name):
    path = write_video(tmp_path / "v.mp4", frames, keyframe_interval=10, **VIDEOS[name])
    for media in (MEDIA, MediaConfig(num_frames=5, frame_sampling=FpsSampling(fps=0.4))):
        try:
            found, copy = ranged(path, media)
        except RangeReadUnsafeError:
            found = None
        assert (found is None) == (name in WHOLE)
        if found is None:
            continue
        for decoder in ("auto", "pyav"):
            assert_same(found, load_video(str(path), media, decoder=decoder))
        assert copy.num_bytes < 0.75 * copy.size


def test_eight_frames_of_two_minutes_cost_at_most_fifteen_hundredths(tmp_path):
    path = write_long_video(tmp_path / "v.mp4", tmp_path, duration_s=120, fps=10)
    found, copy = ranged(path, MEDIA)
    assert_same(found, load_video(str(path), MEDIA, decoder="auto"))
    assert copy.num_bytes <= 0.15 * copy.size


@pytest.mark.long
def test_eight_frames_of_twenty_minutes_cost_a_fiftieth(tmp_path):
    path = write_long_video(tmp_path / "v.mp4", tmp_path, duration_s=1200, faststart=True)
    found, copy = ranged(path, MEDIA)
    assert_same(found, load_video(str(path), MEDIA, decoder="auto"))
    assert copy.num_bytes <= 0.02 * copy.size


# ---- what is left to the whole object ----


def unsafe_files(folder):
    h264 = {"options": H264, "keyframe_interval": 10}
    frames = noisy_frames(60)
    whole = write_video(folder / "whole.mp4", frames, container_options=FRONT, **h264)
    fragmented = {"movflags": "frag_keyframe+empty_moov"}
    refresh = {"preset": "fast", "threads": "1", "x264-params": "intra-refresh=1:keyint=20"}
    data = whole.read_bytes()
    (folder / "tail.mp4").write_bytes(data + b"\x00\x00\x00\x10abcd" + bytes(8))
    (folder / "moved.mp4").write_bytes(data[:4] + b"free" + data[8:])
    return {
        write_video(folder / "fragmented.mp4", frames, container_options=fragmented, **h264): "fragmented",
        write_truncated(folder / "cut.mp4", whole): "bytes, of",
        write_video(folder / "v.mkv", frames, **h264): "box",
        write_video(folder / "refresh.mp4", frames, options=refresh): "key frame|needed",
        write_video(
            folder / "vp9.mp4", frames, codec="libvpx-vp9", options={"deadline": "realtime"}
        ): "not been tested",
        folder / "tail.mp4": "box",
        folder / "moved.mp4": "boxes",
    }


def test_everything_unusual_is_unsafe(tmp_path):
    for path, word in unsafe_files(tmp_path).items():
        with pytest.raises(RangeReadUnsafeError, match=word):
            ranged(path, MEDIA)
    with pytest.raises(RangeReadUnsafeError, match="key frames"):
        ranged(tmp_path / "whole.mp4", MediaConfig(num_frames=2, frame_sampling=KeyframeSampling()))


def test_frames_cut_by_an_edit_list_are_unsafe(tmp_path):
    path = write_barcode_video(tmp_path / "v.mp4", 7, num_frames=60, options=H264, container_options=FRONT)
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12  # flags and version, count, then the duration and the start of the one edit
    start = int.from_bytes(data[place + 4 : place + 8])
    data[place + 4 : place + 8] = (start + 20 * 1024).to_bytes(4)
    path.write_bytes(data)
    with pytest.raises(RangeReadUnsafeError):
        ranged(path, MEDIA)


# ---- mutants ----


def mutant(data, rng):
    """A few bytes changed: of the index in half of the cases, of the media in the others."""
    data, moov = bytearray(data), data.index(b"moov")
    length = int.from_bytes(data[moov - 4 : moov])
    first, last = (moov + 4, moov + length - 4) if rng.random() < 0.5 else (moov + length + 8, len(data))
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(first, last))
        data[place] = int(rng.integers(0, 256))
    return bytes(data)


def outcome(read):
    try:
        return read()
    except (RangeReadUnsafeError, ItemError, MemoryError):
        return None


def check_mutants(folder, seeds):
    """How many were read by ranges; each must give what the whole file gives.

    Damage in bytes that no wanted frame needs is seen by a whole read alone, which then may lose frames, and says so.
    """
    frames = noisy_frames(120, side=96)
    bases = [
        write_video(folder / f"{place}.mp4", frames, keyframe_interval=10, container_options=FRONT, **VIDEOS[name])
        for place, name in enumerate(("h264", "hevc open", "mpeg4 with b-frames", "av1"))
    ]
    num_read = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        path = folder / "mutant.mp4"
        path.write_bytes(mutant(bases[seed % len(bases)].read_bytes(), rng))
        found = outcome(lambda path=path: ranged(path, MEDIA)[0])
        if found is None:
            continue
        num_read += 1
        whole = load_video(str(path), MEDIA, decoder="pyav")
        assert found.timestamps_s == whole.timestamps_s or whole.partial, f"seed {seed}"
        frame_at = dict(zip(found.timestamps_s, found.frames, strict=True))
        for time_s, frame in zip(whole.timestamps_s, whole.frames, strict=True):
            assert np.array_equal(frame, frame_at[time_s]), f"seed {seed}"
    return num_read


def test_forty_mutants_give_no_other_frame(tmp_path):
    assert check_mutants(tmp_path, range(40)) > 10


@pytest.mark.long
def test_three_hundred_mutants_give_no_other_frame(tmp_path):
    assert check_mutants(tmp_path, range(1000, 1300)) > 80


# ---- through the loader, from a store over HTTP ----


@pytest.fixture(scope="module")
def preprocessor(onevision_folder):
    return load_preprocessor(str(onevision_folder))


@pytest.fixture
def open_loader(preprocessor, tmp_path, request):
    def make(*, cache_bytes=10_000_000, **media):
        loader = Loader(
            MediaConfig(num_frames=4, **media),
            preprocessor,
            cache_dir=str(tmp_path / "cache"),
            cache_bytes=cache_bytes,
            ranged_from_bytes=100_000,
        )
        request.addfinalizer(loader.close)
        return loader

    return make


def put(uri, path):
    storage.write_atomic(uri, Path(path).read_bytes())
    return storage.stat(uri)


def item_of(info):
    return MediaItem(info.uri, (info.uri,), "video", (info.size,), (info.etag,))


def test_a_stored_video_costs_its_chosen_frames_and_gives_the_same(open_loader, s3_bucket, tmp_path, frames):
    path = write_video(tmp_path / "v.mp4", frames, keyframe_interval=10, options=H264)
    item = item_of(put(f"{s3_bucket}/v.mp4", path))
    loader = open_loader()
    by_ranges, whole = loader.load(item), open_loader(ranged_reads="off").load(item)
    np.testing.assert_array_equal(by_ranges.media[0].tiles, whole.media[0].tiles)
    assert by_ranges.frame_timestamps_s == whole.frame_timestamps_s
    assert (by_ranges.partial, by_ranges.stats.decoder) == (None, "pyav")
    assert by_ranges.stats.bytes_fetched < 0.3 * item.sizes[0]
    assert whole.stats.bytes_fetched == item.sizes[0]
    assert 3 <= by_ranges.stats.storage_requests <= 7
    assert loader.load(item).stats.bytes_fetched == 0  # another question about the same video


def test_what_is_larger_than_the_cache_is_read_by_ranges_or_fails_alone(open_loader, s3_bucket, tmp_path, frames):
    path = write_video(tmp_path / "v.mp4", frames, keyframe_interval=10, options=H264)
    item = item_of(put(f"{s3_bucket}/v.mp4", path))
    small = item_of(put(f"{s3_bucket}/s.mp4", write_video(tmp_path / "s.mp4", frames[:2], options=H264)))
    share = item.sizes[0] - 1
    assert len(open_loader(cache_bytes=share).load(item).frame_timestamps_s) == 4
    whole_only = open_loader(cache_bytes=share, ranged_reads="off")
    with pytest.raises(ItemError, match=rf"runtime\.cache_bytes .* is {share:,}") as caught:
        whole_only.load(item)
    assert caught.value.error_type == "too_large"
    assert len(whole_only.load(small).frame_timestamps_s) == 2


def test_an_unsafe_video_is_read_whole_and_the_index_is_counted(open_loader, s3_bucket, tmp_path, frames):
    path = write_video(tmp_path / "v.mp4", frames, codec="libvpx-vp9", options={"deadline": "realtime", "b": "4M"})
    item = item_of(put(f"{s3_bucket}/v.mp4", path))
    loader = open_loader()
    loaded, whole = loader.load(item), open_loader(ranged_reads="off").load(item)
    np.testing.assert_array_equal(loaded.media[0].tiles, whole.media[0].tiles)
    assert item.sizes[0] < loaded.stats.bytes_fetched < 1.5 * item.sizes[0]
    assert loader.load(item).stats.bytes_fetched == 0


def test_an_object_that_changes_midway_gives_no_frame(open_loader, s3_bucket, tmp_path, frames, monkeypatch):
    old = write_video(tmp_path / "old.mp4", frames, keyframe_interval=10, options=H264)
    new = write_video(tmp_path / "new.mp4", frames[::-1], keyframe_interval=10, options=H264)
    info = put(f"{s3_bucket}/v.mp4", old)
    loader = open_loader()
    fetch = SparseCopy.fetch

    def fetch_then_change(copy, ranges):
        fetch(copy, ranges)
        put(f"{s3_bucket}/v.mp4", new)

    monkeypatch.setattr(SparseCopy, "fetch", fetch_then_change)
    with pytest.raises(ItemError, match="etag") as caught:
        loader.load(item_of(info))
    assert caught.value.error_type == "changed_object"
