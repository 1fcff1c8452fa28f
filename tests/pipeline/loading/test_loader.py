"""Tests loading a manifest's item to media at model size: right frames, correct figures, named errors."""

import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from illava.families import load_preprocessor
from pipeline.config.schema import MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.loader import Loader
from pipeline.records import MediaItem
from pipeline.storage import storage
from tests.support.media.clips import read_barcode, write_audio_only, write_barcode_video, write_truncated
from tests.support.runs.misbehaving import Hangs, ReadsAsFileObject, Rewrites, SignalsItself, Untouched

DATA = Path(__file__).parent / "data"
MEDIA = MediaConfig(num_frames=4, load_timeout_s=60)


@pytest.fixture(scope="session")
def preprocessor(onevision_folder):
    return load_preprocessor(str(onevision_folder))


@pytest.fixture
def open_loader(request, tmp_path):
    """Loaders that are closed at the end; they leave no child and no staged file."""
    children = set(psutil.Process().children())

    def make(preprocessor, media=MEDIA, **options):
        loader = Loader(media, preprocessor, cache_dir=str(tmp_path / "cache"), **options)
        loaders.append(loader)
        return loader

    loaders = []
    before = set(os.listdir(tempfile.gettempdir()))
    yield make
    for loader in loaders:
        loader.close()
    assert set(psutil.Process().children()) <= children
    assert not list((tmp_path / "cache").glob("*"))
    ours = [name for name in set(os.listdir(tempfile.gettempdir())) - before if "illava" in name]
    assert not ours


def item_of(*paths, kind="video"):
    found = [storage.stat(str(path)) for path in paths]
    uris, sizes, etags = zip(*((one.uri, one.size, one.etag) for one in found), strict=True)
    return MediaItem(Path(uris[0]).name, uris, kind, sizes, etags)


def failure(loader, item):
    with pytest.raises(ItemError) as caught:
        loader.load(item)
    return caught.value


def barcodes(loaded):
    return {read_barcode(tile) for tile in loaded.media[0].tiles}


def test_a_video_comes_at_model_size_with_what_it_took(open_loader, preprocessor, tmp_path):
    item = item_of(write_barcode_video(tmp_path / "v.mp4", 1234))
    loaded = open_loader(preprocessor).load(item)
    assert loaded.item is item
    assert loaded.media[0].tiles.shape == (4, 56, 56, 3)
    assert barcodes(loaded) == {1234}
    assert loaded.frame_timestamps_s == pytest.approx((0, 0.6, 1.2, 1.9))
    assert loaded.partial is None
    stats = loaded.stats
    assert (stats.decoder, stats.bytes_fetched, stats.storage_requests) == ("decord", 0, 0)
    assert min(stats.fetch_s, stats.load_s, stats.preprocess_s, stats.cpu_s) > 0


def test_images_keep_their_order_and_one_image_is_tiled(open_loader, preprocessor, tmp_path):
    for shade in (10, 120, 240):
        Image.new("RGB", (80, 60), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
    loader = open_loader(preprocessor)
    several = loader.load(item_of(*(tmp_path / f"{shade}.png" for shade in (240, 10, 120)), kind="images"))
    assert [mm_item.tiles[0, 28, 28, 0] for mm_item in several.media] == [240, 10, 120]
    assert [mm_item.original_size for mm_item in several.media] == [(60, 80)] * 3
    assert (several.stats.decoder, several.frame_timestamps_s) == ("pillow", ())
    (alone,) = loader.load(item_of(tmp_path / "10.png", kind="image")).media
    expected = preprocessor.images([np.array(Image.open(tmp_path / "10.png"))])[0]
    np.testing.assert_array_equal(alone.tiles, expected.tiles)
    assert len(alone.tiles) > 1


def test_objects_of_a_store_give_the_same_and_are_counted(open_loader, preprocessor, tmp_path, s3_bucket):
    path = write_barcode_video(tmp_path / "v.mp4", 77)
    storage.write_atomic(f"{s3_bucket}/v.mp4", path.read_bytes())
    loader = open_loader(preprocessor)
    local, remote = loader.load(item_of(path)), loader.load(item_of(f"{s3_bucket}/v.mp4"))
    np.testing.assert_array_equal(local.media[0].tiles, remote.media[0].tiles)
    assert (remote.stats.bytes_fetched, remote.stats.storage_requests) == (path.stat().st_size, 1)
    assert loader.load(item_of(f"{s3_bucket}/v.mp4")).stats.bytes_fetched == 0


def bad_files(folder):
    good = write_barcode_video(folder / "good.mp4", 1)
    (folder / "empty.mp4").touch()
    (folder / "playlist.mp4").write_bytes(b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n")
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    (folder / "header.mp4").write_bytes(good.read_bytes()[:8] + np.random.default_rng(0).bytes(20_000))
    return {
        folder / "empty.mp4": "empty_media",
        folder / "playlist.mp4": "unsupported_media",
        folder / "noise.mp4": "unsupported_media",
        folder / "header.mp4": "corrupt_media",
        write_truncated(folder / "no_index.mp4", good): "corrupt_media",
        write_audio_only(folder / "audio.mp4"): "no_video_stream",
        DATA / "segfault_a.mp4": "corrupt_media",
        DATA / "segfault_b.mp4": "corrupt_media",
    }


@pytest.mark.parametrize("decoder", ["auto", "decord", "pyav"])
def test_bad_files_are_named_and_their_neighbours_unharmed(open_loader, preprocessor, tmp_path, decoder):
    loader = open_loader(preprocessor, MEDIA.model_copy(update={"decoder": decoder}))
    for value, (path, error_type) in enumerate(bad_files(tmp_path).items()):
        error = failure(loader, item_of(path))
        assert (error.error_type, path.name in str(error)) == (error_type, True), error
        neighbour = item_of(write_barcode_video(tmp_path / f"n{value}.mp4", value))
        assert barcodes(loader.load(neighbour)) == {value}


def test_av1_and_incomplete_files_are_rows(open_loader, preprocessor, tmp_path):
    loader = open_loader(preprocessor)
    av1 = loader.load(item_of(write_barcode_video(tmp_path / "av1.mp4", 9, codec="libsvtav1")))
    assert (barcodes(av1), av1.stats.decoder) == ({9}, "pyav")
    lossless = {"crf": "0", "preset": "ultrafast", "threads": "1"}  # large enough to lose more than its header
    front = {"movflags": "+faststart"}
    whole = write_barcode_video(
        tmp_path / "w.mp4", 9, width=512, height=512, num_frames=40, options=lossless, container_options=front
    )
    partial = loader.load(item_of(write_truncated(tmp_path / "cut.mp4", whole, keep_ratio=0.7)))
    assert "of 40 frames are there" in partial.partial
    assert barcodes(partial) == {9}
    assert len(partial.media[0].tiles) == len(partial.frame_timestamps_s) == 4
    assert partial.frame_timestamps_s[-1] < 3.5


def test_what_decord_refuses_is_read_by_pyav(open_loader, tmp_path):
    item = item_of(write_barcode_video(tmp_path / "pattern%03d.mp4", 5))
    loaded = open_loader(Untouched()).load(item)
    assert (barcodes(loaded), loaded.stats.decoder) == ({5}, "pyav")
    strict = open_loader(Untouched(), MEDIA.model_copy(update={"decoder": "decord"}))
    assert failure(strict, item).error_type == "corrupt_media"


def test_a_crash_of_decord_is_tried_again_with_pyav_in_a_fresh_child(open_loader, tmp_path):
    item = item_of(write_barcode_video(tmp_path / "v.mp4", 6))
    crashing = SignalsItself(signal.SIGSEGV, only_with="decord")
    loaded = open_loader(crashing).load(item)
    assert (barcodes(loaded), loaded.stats.decoder) == ({6}, "pyav")
    strict = open_loader(crashing, MEDIA.model_copy(update={"decoder": "decord"}))
    assert failure(strict, item).error_type == "load_crashed"


def test_a_crash_without_a_way_out_is_named(open_loader, tmp_path):
    item = item_of(write_barcode_video(tmp_path / "v.mp4", 6))
    error = failure(open_loader(ReadsAsFileObject(str(DATA / "segfault_a.mp4"))), item)
    assert error.error_type == "load_crashed"
    assert "SIGSEGV" in str(error)


def test_an_item_that_never_returns_is_ended_at_its_deadline(open_loader, tmp_path):
    item = item_of(write_barcode_video(tmp_path / "v.mp4", 6))
    loader = open_loader(Hangs(), MEDIA.model_copy(update={"load_timeout_s": 1.0}))
    assert failure(loader, item).error_type == "load_timeout"
    assert loader.child_pid is None


def test_a_child_killed_between_items_is_replaced(open_loader, tmp_path):
    item = item_of(write_barcode_video(tmp_path / "v.mp4", 6))
    loader = open_loader(Untouched())
    loader.load(item)
    os.kill(loader.child_pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(loader.child_pid)], timeout=10)
    assert barcodes(loader.load(item)) == {6}


def test_a_file_that_changes_is_noticed_before_and_while_it_is_read(open_loader, tmp_path):
    path = write_barcode_video(tmp_path / "v.mp4", 6)
    item = item_of(path)
    assert failure(open_loader(Rewrites(str(path))), item).error_type == "changed_object"
    assert failure(open_loader(Untouched()), item).error_type == "changed_object"


def test_budgets(open_loader, tmp_path):
    path = write_barcode_video(tmp_path / "v.mp4", 6)
    size = path.stat().st_size
    assert failure(open_loader(Untouched(), MediaConfig(max_bytes=size - 1)), item_of(path)).error_type == "too_large"
    for shade in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{shade}.png")
    images = item_of(*(tmp_path / f"{shade}.png" for shade in range(3)), kind="images")
    assert failure(open_loader(Untouched(), MediaConfig(max_images=2)), images).error_type == "too_large"
    outside = open_loader(Untouched(), allowed_roots=[str(tmp_path / "inside")])
    assert failure(outside, item_of(path)).error_type == "unsafe_uri"


def test_warming_up_starts_the_child_and_harms_nothing(open_loader, preprocessor, tmp_path):
    """Its start takes seconds, a load a few hundredths: an estimate must not count it with the items."""
    loader = open_loader(preprocessor)
    assert loader.child_pid is None
    loader.warm_up()
    pid = loader.child_pid
    assert pid is not None
    loaded = loader.load(item_of(write_barcode_video(tmp_path / "v.mp4", 3)))
    assert (loader.child_pid, loaded.partial, barcodes(loaded)) == (pid, None, {3})
