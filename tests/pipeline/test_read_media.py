"""Files, pictures and arrays of one's own become what a request takes, as a job's readers load them. About 5 s."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from illava.errors import ModelLoadError, PreprocessError
from illava.families import load_preprocessor
from pipeline import MediaReader, read_media
from pipeline.config.schema import MediaConfig
from pipeline.errors import ConfigError, ItemError
from pipeline.loading.loader import Loader
from pipeline.records import MediaItem
from tests.support.media.clips import read_barcode, write_barcode_video, write_truncated
from tests.support.media.pdf_files import page, write_pdf
from tests.support.runs.fakes import DEMO_MODEL

MODEL = str(DEMO_MODEL)


@pytest.fixture(scope="module")
def reader():
    with MediaReader(MODEL, num_frames=3) as found:
        yield found


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_barcode_video(tmp_path_factory.mktemp("own") / "clip.mp4", value=77, num_frames=12)


def picture(seed=0, size=(40, 56)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_a_video_is_what_a_job_loads_in_another_process(reader, clip):
    (video,) = reader.read(clip)
    with Loader(MediaConfig(num_frames=3), load_preprocessor(MODEL)) as loader:
        (expected,) = loader.load(MediaItem("a", (str(clip),), "video", (-1,), ("",))).media
    assert (video.kind, video.timestamps_s) == ("video", expected.timestamps_s)
    assert np.array_equal(video.tiles, expected.tiles)
    assert [read_barcode(tile) for tile in video.tiles] == [77] * 3
    assert reader._loaders[False].child_pid is not None, "a process of its own decodes"


def test_a_picture_by_path_by_pillow_and_by_array_is_one_picture(reader, tmp_path):
    pixels, path = picture(), tmp_path / "a.png"
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(path, exif=exif)
    (by_path,), (by_pillow,) = reader.read(str(path)), reader.read(Image.open(path))
    (by_array,) = reader.read(np.ascontiguousarray(np.rot90(pixels, -1)))
    assert np.array_equal(by_path.tiles, by_pillow.tiles)
    assert np.array_equal(by_path.tiles, by_array.tiles)
    assert by_path.original_size == by_array.original_size == (56, 40)
    both = reader.read([path, path])
    assert [one.tiles.shape for one in both] == [one.tiles.shape for one in reader.read([pixels, turned])]


def test_arrays_of_four_axes_are_videos(reader):
    frames = np.stack([picture(n) for n in range(3)])
    (video,) = reader.read(frames)
    assert video.kind == "video"
    assert np.array_equal(video.tiles, load_preprocessor(MODEL).video(frames).tiles)


def test_a_pdf_gives_its_pages_and_a_damaged_file_says_what_is_missing(reader, clip, tmp_path):
    pages = reader.read(write_pdf(tmp_path / "a.pdf", [page(0), page(1)]))
    assert [one.kind for one in pages] == ["image", "image"]
    assert not np.array_equal(pages[0].tiles, pages[1].tiles)
    nameless = tmp_path / "download"
    shutil.copy(tmp_path / "a.pdf", nameless)
    assert len(reader.read(nameless, kind="document")) == 2
    cut = write_truncated(tmp_path / "cut.mkv", write_barcode_video(tmp_path / "b.mkv", value=5, num_frames=60))
    with pytest.warns(UserWarning, match=f"{cut}: .*cut short|{cut}: .*ends|{cut}: .*frames"):
        reader.read(cut)


def test_one_call_ends_its_decoder_process(clip, monkeypatch):
    closed = []
    close = MediaReader.close
    monkeypatch.setattr(MediaReader, "close", lambda self: (closed.append(self), close(self))[1])
    (video,) = read_media(clip, MODEL, num_frames=2)
    assert len(video.tiles) == 2
    assert [reader._loaders[False].child_pid for reader in closed] == [None]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("nowhere.mp4", {}, ItemError, "nowhere.mp4: there is no such file"),
        (__file__, {}, ConfigError, "does not say what the file is; give kind='video', 'image' or 'document'"),
        (__file__, {"kind": "movie"}, ConfigError, "kind is one of video, image, document; got 'movie'"),
        (__file__, {"num_frame": 4}, ConfigError, "num_frame: unknown key; did you mean num_frames"),
        ("https://example.org/a.mp4", {}, ItemError, "scheme 'https' is not allowed"),
        (np.zeros((4, 4, 3), np.float32), {}, PreprocessError, "image 0 is float32"),
        (7, {}, TypeError, "cannot read a int as media: give a path"),
        ([], {}, TypeError, "a list of pictures"),
        ([__file__, np.zeros((4, 4, 3), np.uint8)], {}, TypeError, "all paths or none"),
        (Image.new("F", (4, 4)), {}, ItemError, "no defined white"),
    ],
)
def test_what_cannot_be_read_is_said_in_words(source, options, error, message):
    with pytest.raises(error, match=message):
        read_media(source, MODEL, **options)


def test_the_model_is_a_name_or_what_was_loaded(clip):
    array = picture()
    (by_name,), (by_preprocessor,) = read_media(array, MODEL), read_media(array, load_preprocessor(MODEL))
    assert np.array_equal(by_name.tiles, by_preprocessor.tiles)
    with pytest.raises(ConfigError, match="max_tiles: a loaded model has its limits already"):
        read_media(array, load_preprocessor(MODEL), max_tiles=1)
    with pytest.raises(TypeError, match="give a model's folder or hub id, a VLM, or a Preprocessor"):
        read_media(array, 5)
    with pytest.raises(ModelLoadError, match="no model folder"):
        read_media(array, "./no/model")
    with pytest.raises(ConfigError, match="2 files of kind video; a list is of pictures"):
        read_media([clip, clip], MODEL)
