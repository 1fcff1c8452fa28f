"""Videos that are hard to read right, and broken ones. What is no video at all is in `awkward_documents`."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tests.support.media.adversarial_media import NUM_FRAMES, AwkwardFile, holding
from tests.support.media.clips import write_audio_only
from tests.support.media.video_writers import (
    AV1,
    CLOSED_HEVC,
    FRONT,
    HEVC,
    INTRA,
    OPEN_264,
    SLOW_264,
    VP9,
    altered,
    blank_media,
    clip,
    cut,
    damage,
    edits,
    huge_frames,
    matrix,
    noisy,
    patch,
    timestamped,
    write_cover_only,
    write_sizes_in_one_track,
    write_sound_first,
    write_ten_hours,
    write_two_sizes,
    write_two_videos,
    write_under_a_pattern,
)

CRASHERS = Path(__file__).resolve().parents[2] / "pipeline" / "loading" / "data"

FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
KEY = "00112233445566778899aabbccddeeff"
MJPEG = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}
CENC = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": KEY, "encryption_kid": KEY}
RIGHT, LEFT, MIRROR, FLIP = (0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1)

READABLE = [
    AwkwardFile("h264.mp4", clip(), decoder="decord"),
    AwkwardFile("h264.mov", clip(), decoder="decord"),
    AwkwardFile("h264.mkv", clip(), decoder="decord"),
    AwkwardFile("h264.ts", clip(), decoder="pyav"),
    AwkwardFile("h264.avi", clip(), decoder="pyav"),
    AwkwardFile("camera.m2ts", altered(clip(), timestamped, ".ts"), decoder="pyav"),
    AwkwardFile("hevc.mp4", clip(codec="libx265", options=CLOSED_HEVC), decoder="decord"),
    AwkwardFile("hevc-open.mkv", clip(codec="libx265", options=HEVC, keyframe_interval=6), decoder="pyav"),
    AwkwardFile("hevc-10-bit.mp4", clip(codec="libx265", options=CLOSED_HEVC, pix_fmt="yuv420p10le")),
    AwkwardFile("vp8.webm", clip(codec="libvpx", options=VP9["options"])),
    AwkwardFile("vp9.webm", clip(**VP9)),
    AwkwardFile("vp9.mp4", clip(**VP9)),
    AwkwardFile("av1.mp4", clip(**AV1), decoder="pyav"),
    AwkwardFile("av1.mkv", clip(**AV1), decoder="pyav"),
    AwkwardFile("mpeg4.mp4", clip(codec="mpeg4"), decoder="pyav"),
    AwkwardFile("mpeg4.avi", clip(codec="mpeg4"), decoder="pyav"),
    AwkwardFile("mpeg2.ts", clip(codec="mpeg2video", fps=25), decoder="pyav"),
    AwkwardFile("mjpeg.avi", clip(**MJPEG), decoder="pyav"),
    AwkwardFile("prores.mov", clip(codec="prores", pix_fmt="yuv422p10le"), decoder="pyav"),
    AwkwardFile("ffv1.mkv", clip(codec="ffv1"), decoder="pyav"),
    AwkwardFile("10-bit.mp4", clip(pix_fmt="yuv420p10le")),
    AwkwardFile("444.mp4", clip(pix_fmt="yuv444p")),
    AwkwardFile("grey.mp4", clip(pix_fmt="gray")),
    AwkwardFile("interlaced.mp4", clip(options={**SLOW_264, "flags": "+ildct+ilme"})),
    AwkwardFile("b-frames.mp4", clip(options={**SLOW_264, "bf": "3"})),
    AwkwardFile("open-gop.mp4", clip(options=OPEN_264), decoder="pyav"),
    AwkwardFile("intra-refresh.mkv", clip(options=INTRA), decoder="pyav"),
    AwkwardFile("variable-rate.mkv", clip(pts=[number * number for number in range(NUM_FRAMES)])),
    AwkwardFile("starts-late.mkv", clip(pts=[100 + number for number in range(NUM_FRAMES)])),
    AwkwardFile("starts-late.ts", clip(pts=[100 + number for number in range(NUM_FRAMES)])),
    AwkwardFile("edit-skips-the-start.mp4", altered(clip(), edits((1500, 5 * 1024))), frames=(5, 9, 14, 19)),
    AwkwardFile("edit-skips-the-end.mp4", altered(clip(), edits((1000, 0))), frames=(0, 3, 6, 9)),
    AwkwardFile("edit-delays.mp4", altered(clip(), edits((1000, -1), (2000, 0)))),
    AwkwardFile("edit-repeats.mp4", altered(clip(), edits((1000, 5 * 1024), (500, 0))), frames=(5, 9, 14, 4)),
    AwkwardFile("fragmented.mp4", clip(container_options=FRAGMENTS)),
    AwkwardFile("every-frame-a-fragment.mp4", clip(container_options={"movflags": "frag_every_frame+empty_moov"})),
    AwkwardFile("cmaf.mp4", clip(container_options={"movflags": "+cmaf+frag_keyframe+empty_moov"})),
    AwkwardFile("one-frame.mp4", clip(num_frames=1), frames=(0,)),
    AwkwardFile("one-frame.mkv", clip(num_frames=1), frames=(0,)),
    AwkwardFile("one-frame.ts", clip(num_frames=1), frames=(0,)),
    AwkwardFile("two-frames.webm", clip(num_frames=2, **VP9), frames=(0, 1)),
    AwkwardFile("8k.mp4", clip(num_frames=2, width=7680, height=4320), shape=(4320, 7680), frames=(0, 1)),
    AwkwardFile("ten-hours.mp4", write_ten_hours, frames=(0, 29, 59, 89), media={"max_duration_s": 40000}),
    AwkwardFile("odd-sides.mp4", clip(width=97, height=95, pix_fmt="yuv444p"), shape=(95, 97)),
    AwkwardFile("tiny.mp4", clip(width=16, height=16), shape=(16, 16), decoder="pyav"),
    AwkwardFile("wide.mp4", clip(width=2048, height=64), shape=(64, 2048)),
    AwkwardFile("two-videos.mp4", write_two_videos, decoder="pyav", value=1),
    AwkwardFile("sound-first.mp4", write_sound_first),
    AwkwardFile("sizes-in-one-track.mkv", write_sizes_in_one_track, frames=(0, 6, 2, 9)),
    AwkwardFile("mp4-named.mkv", altered(clip(), bytes, ".mp4")),
    AwkwardFile("mkv-named.mp4", altered(clip(), bytes, ".mkv")),
    AwkwardFile("mp4-named.jpg", altered(clip(), bytes, ".mp4")),
    AwkwardFile("pattern%03d.png", write_under_a_pattern, decoder="pyav"),
]
TURNED = [
    AwkwardFile("turned-right.mp4", altered(clip(width=128), matrix(*RIGHT)), shape=(128, 96), undo=np.rot90),
    AwkwardFile(
        "turned-left.mp4", altered(clip(width=128), matrix(*LEFT)), shape=(128, 96), undo=lambda f: np.rot90(f, -1)
    ),
    AwkwardFile(
        "upside-down.mp4",
        altered(clip(width=128), matrix(-1, 0, 0, -1)),
        shape=(96, 128),
        undo=lambda f: np.rot90(f, 2),
    ),
    AwkwardFile("turned.mkv", clip(width=128, rotation=90), shape=(128, 96), undo=lambda f: np.rot90(f, -1)),
    AwkwardFile("mirrored.mp4", altered(clip(width=128), matrix(*MIRROR)), shape=(96, 128), undo=np.fliplr),
    AwkwardFile("flipped.mp4", altered(clip(width=128), matrix(*FLIP)), shape=(96, 128), undo=np.flipud),
    AwkwardFile(
        "transposed.mp4", altered(clip(width=128), matrix(0, 1, 1, 0)), shape=(128, 96), undo=lambda f: f.swapaxes(0, 1)
    ),
    AwkwardFile("zero-matrix.mp4", altered(clip(width=128), matrix(0, 0, 0, 0)), shape=(96, 128)),
]

_front = noisy(options=SLOW_264, container_options=FRONT)
BROKEN = [
    AwkwardFile("zero-bytes.mp4", holding(b""), "empty_media", says="zero bytes"),
    AwkwardFile("one-byte.mp4", holding(b"\0"), "unsupported_media", says="unknown kind"),
    AwkwardFile(
        "only-a-brand.mp4", holding(struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 0, b"isom")), "corrupt_media"
    ),
    AwkwardFile("no-index.mp4", cut(clip(), 0.5), "corrupt_media"),
    AwkwardFile(
        "cut-in-its-index.mp4", cut(clip(container_options=FRONT), 0.1), "corrupt_media", says="neither pictures"
    ),
    AwkwardFile("cut-late.mp4", cut(_front, 0.9), "partial", says="of 40 frames are there"),
    AwkwardFile("cut-midway.mp4", cut(_front, 0.6), "partial", says="of 40 frames are there"),
    AwkwardFile("cut.mkv", cut(noisy(options=SLOW_264), 0.6), "partial", says="s of 4.00 s"),
    AwkwardFile("cut.webm", cut(noisy(**VP9), 0.6), "partial", says="s of 4.00 s"),
    AwkwardFile("cut.avi", cut(noisy(codec="mpeg4"), 0.6), "partial", says="of 40 frames are there"),
    AwkwardFile("cut-fragments.mp4", cut(noisy(options=SLOW_264, container_options=FRAGMENTS), 0.6), "partial"),
    AwkwardFile("cut.ts", cut(noisy(options=SLOW_264), 0.6), "partial"),
    AwkwardFile("noise-in-frames.mp4", altered(_front, damage), "partial", media={"num_frames": 40}),
    AwkwardFile("frames-of-zeros.mp4", altered(_front, blank_media), "corrupt_media"),
    AwkwardFile(
        "header-and-noise.mp4", holding(struct.pack(">I4s", 24, b"ftyp") + bytes(range(256)) * 99), "corrupt_media"
    ),
    AwkwardFile("noise.mp4", holding(np.random.default_rng(3).bytes(20_000)), "unsupported_media"),
    AwkwardFile("chunks-beyond-the-end.mp4", altered(clip(), patch(b"stco", 12, b"\x7f\xff\xff\xff")), "corrupt_media"),
    AwkwardFile("billions-of-samples.mp4", altered(clip(), patch(b"stsz", 12, b"\xff\xff\xff\xff")), "corrupt_media"),
    AwkwardFile("endless-atom.mp4", altered(clip(), patch(b"moov", -4, b"\0\0\0\0"))),  # zero: up to the end
    AwkwardFile("header-says-huge.mp4", altered(clip(**MJPEG), patch(b"mp4v", 28, b"\xff\xff\xff\xff"))),
    AwkwardFile("header-says-huge.avi", altered(clip(**MJPEG), patch(b"strf", 12, b"\xff\xff\0\0\xff\xff\0\0"))),
    AwkwardFile("frames-say-huge.avi", altered(clip(**MJPEG), huge_frames), "corrupt_media"),
    AwkwardFile("above-the-budget.mp4", clip(), "too_large", media={"max_pixels_per_frame": 96 * 96 - 1}),
    AwkwardFile("ten-hours-too-long.mp4", write_ten_hours, "too_large", says="max_duration_s"),
    AwkwardFile("audio-only.mp4", write_audio_only, "no_video_stream"),
    AwkwardFile("cover-only.mp4", write_cover_only, "no_video_stream"),
    AwkwardFile("encrypted.mp4", clip(container_options=CENC), "corrupt_media", says="cannot be decoded"),
    AwkwardFile("skewed.mp4", clip(rotation=45), "unsupported_media", says="skewed"),
    AwkwardFile("sizes-in-one-stream.ts", write_two_sizes, "unsupported_media", says="changes its frame size"),
    *(
        AwkwardFile(
            f"segfault_{name}.mp4",
            holding((CRASHERS / f"segfault_{name}.mp4").read_bytes()),
            "corrupt_media",
            says=says,
        )
        for name, says in (("a", "0 of 100"), ("b", "37 of 99"))
    ),
]
