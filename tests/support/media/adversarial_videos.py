"""Makes videos that are hard to read correctly, and broken ones; files that are no video: `adversarial_documents`."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tests.support.media.adversarial_media import NUM_FRAMES, AdversarialFile, holding
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
    AdversarialFile("h264.mp4", clip(), decoder="decord"),
    AdversarialFile("h264.mov", clip(), decoder="decord"),
    AdversarialFile("h264.mkv", clip(), decoder="decord"),
    AdversarialFile("h264.ts", clip(), decoder="pyav"),
    AdversarialFile("h264.avi", clip(), decoder="pyav"),
    AdversarialFile("camera.m2ts", altered(clip(), timestamped, ".ts"), decoder="pyav"),
    AdversarialFile("hevc.mp4", clip(codec="libx265", options=CLOSED_HEVC), decoder="decord"),
    AdversarialFile("hevc-open.mkv", clip(codec="libx265", options=HEVC, keyframe_interval=6), decoder="pyav"),
    AdversarialFile("hevc-10-bit.mp4", clip(codec="libx265", options=CLOSED_HEVC, pix_fmt="yuv420p10le")),
    AdversarialFile("vp8.webm", clip(codec="libvpx", options=VP9["options"])),
    AdversarialFile("vp9.webm", clip(**VP9)),
    AdversarialFile("vp9.mp4", clip(**VP9)),
    AdversarialFile("av1.mp4", clip(**AV1), decoder="pyav"),
    AdversarialFile("av1.mkv", clip(**AV1), decoder="pyav"),
    AdversarialFile("mpeg4.mp4", clip(codec="mpeg4"), decoder="pyav"),
    AdversarialFile("mpeg4.avi", clip(codec="mpeg4"), decoder="pyav"),
    AdversarialFile("mpeg2.ts", clip(codec="mpeg2video", fps=25), decoder="pyav"),
    AdversarialFile("mjpeg.avi", clip(**MJPEG), decoder="pyav"),
    AdversarialFile("prores.mov", clip(codec="prores", pix_fmt="yuv422p10le"), decoder="pyav"),
    AdversarialFile("ffv1.mkv", clip(codec="ffv1"), decoder="pyav"),
    AdversarialFile("10-bit.mp4", clip(pix_fmt="yuv420p10le")),
    AdversarialFile("444.mp4", clip(pix_fmt="yuv444p")),
    AdversarialFile("grey.mp4", clip(pix_fmt="gray")),
    AdversarialFile("interlaced.mp4", clip(options={**SLOW_264, "flags": "+ildct+ilme"})),
    AdversarialFile("b-frames.mp4", clip(options={**SLOW_264, "bf": "3"})),
    AdversarialFile("open-gop.mp4", clip(options=OPEN_264), decoder="pyav"),
    AdversarialFile("intra-refresh.mkv", clip(options=INTRA), decoder="pyav"),
    AdversarialFile("variable-rate.mkv", clip(pts=[number * number for number in range(NUM_FRAMES)])),
    AdversarialFile("starts-late.mkv", clip(pts=[100 + number for number in range(NUM_FRAMES)])),
    AdversarialFile("starts-late.ts", clip(pts=[100 + number for number in range(NUM_FRAMES)])),
    AdversarialFile("edit-skips-the-start.mp4", altered(clip(), edits((1500, 5 * 1024))), frames=(5, 9, 14, 19)),
    AdversarialFile("edit-skips-the-end.mp4", altered(clip(), edits((1000, 0))), frames=(0, 3, 6, 9)),
    AdversarialFile("edit-delays.mp4", altered(clip(), edits((1000, -1), (2000, 0)))),
    AdversarialFile("edit-repeats.mp4", altered(clip(), edits((1000, 5 * 1024), (500, 0))), frames=(5, 9, 14, 4)),
    AdversarialFile("fragmented.mp4", clip(container_options=FRAGMENTS)),
    AdversarialFile("every-frame-a-fragment.mp4", clip(container_options={"movflags": "frag_every_frame+empty_moov"})),
    AdversarialFile("cmaf.mp4", clip(container_options={"movflags": "+cmaf+frag_keyframe+empty_moov"})),
    AdversarialFile("one-frame.mp4", clip(num_frames=1), frames=(0,)),
    AdversarialFile("one-frame.mkv", clip(num_frames=1), frames=(0,)),
    AdversarialFile("one-frame.ts", clip(num_frames=1), frames=(0,)),
    AdversarialFile("two-frames.webm", clip(num_frames=2, **VP9), frames=(0, 1)),
    AdversarialFile("8k.mp4", clip(num_frames=2, width=7680, height=4320), shape=(4320, 7680), frames=(0, 1)),
    AdversarialFile("ten-hours.mp4", write_ten_hours, frames=(0, 29, 59, 89), media={"max_duration_s": 40000}),
    AdversarialFile("odd-sides.mp4", clip(width=97, height=95, pix_fmt="yuv444p"), shape=(95, 97)),
    AdversarialFile("tiny.mp4", clip(width=16, height=16), shape=(16, 16), decoder="pyav"),
    AdversarialFile("wide.mp4", clip(width=2048, height=64), shape=(64, 2048)),
    AdversarialFile("two-videos.mp4", write_two_videos, decoder="pyav", value=1),
    AdversarialFile("sound-first.mp4", write_sound_first),
    AdversarialFile("mp4-named.mkv", altered(clip(), bytes, ".mp4")),
    AdversarialFile("mkv-named.mp4", altered(clip(), bytes, ".mkv")),
    AdversarialFile("mp4-named.jpg", altered(clip(), bytes, ".mp4")),
    AdversarialFile("pattern%03d.png", write_under_a_pattern, decoder="pyav"),
]
TURNED = [
    AdversarialFile("turned-right.mp4", altered(clip(width=128), matrix(*RIGHT)), shape=(128, 96), undo=np.rot90),
    AdversarialFile(
        "turned-left.mp4", altered(clip(width=128), matrix(*LEFT)), shape=(128, 96), undo=lambda f: np.rot90(f, -1)
    ),
    AdversarialFile(
        "upside-down.mp4",
        altered(clip(width=128), matrix(-1, 0, 0, -1)),
        shape=(96, 128),
        undo=lambda f: np.rot90(f, 2),
    ),
    AdversarialFile("turned.mkv", clip(width=128, rotation=90), shape=(128, 96), undo=lambda f: np.rot90(f, -1)),
    AdversarialFile("mirrored.mp4", altered(clip(width=128), matrix(*MIRROR)), shape=(96, 128), undo=np.fliplr),
    AdversarialFile("flipped.mp4", altered(clip(width=128), matrix(*FLIP)), shape=(96, 128), undo=np.flipud),
    AdversarialFile(
        "transposed.mp4", altered(clip(width=128), matrix(0, 1, 1, 0)), shape=(128, 96), undo=lambda f: f.swapaxes(0, 1)
    ),
    AdversarialFile("zero-matrix.mp4", altered(clip(width=128), matrix(0, 0, 0, 0)), shape=(96, 128)),
]

_front = noisy(options=SLOW_264, container_options=FRONT)
BROKEN = [
    AdversarialFile("zero-bytes.mp4", holding(b""), "empty_media", says="zero bytes"),
    AdversarialFile("one-byte.mp4", holding(b"\0"), "unsupported_media", says="unknown kind"),
    AdversarialFile(
        "only-a-brand.mp4", holding(struct.pack(">I4s4sI4s", 20, b"ftyp", b"isom", 0, b"isom")), "corrupt_media"
    ),
    AdversarialFile("no-index.mp4", cut(clip(), 0.5), "corrupt_media"),
    AdversarialFile(
        "cut-in-its-index.mp4", cut(clip(container_options=FRONT), 0.1), "corrupt_media", says="neither pictures"
    ),
    AdversarialFile("cut-late.mp4", cut(_front, 0.9), "partial", says="of 40 frames are there"),
    AdversarialFile("cut-midway.mp4", cut(_front, 0.6), "partial", says="of 40 frames are there"),
    AdversarialFile("cut.mkv", cut(noisy(options=SLOW_264), 0.6), "partial", says="s of 4.00 s"),
    AdversarialFile("cut.webm", cut(noisy(**VP9), 0.6), "partial", says="s of 4.00 s"),
    AdversarialFile("cut.avi", cut(noisy(codec="mpeg4"), 0.6), "partial", says="of 40 frames are there"),
    AdversarialFile("cut-fragments.mp4", cut(noisy(options=SLOW_264, container_options=FRAGMENTS), 0.6), "partial"),
    AdversarialFile("cut.ts", cut(noisy(options=SLOW_264), 0.6), "partial"),
    AdversarialFile("noise-in-frames.mp4", altered(_front, damage), "partial", media={"num_frames": 40}),
    AdversarialFile("frames-of-zeros.mp4", altered(_front, blank_media), "corrupt_media"),
    AdversarialFile(
        "header-and-noise.mp4", holding(struct.pack(">I4s", 24, b"ftyp") + bytes(range(256)) * 99), "corrupt_media"
    ),
    AdversarialFile("noise.mp4", holding(np.random.default_rng(3).bytes(20_000)), "unsupported_media"),
    AdversarialFile(
        "chunks-beyond-the-end.mp4", altered(clip(), patch(b"stco", 12, b"\x7f\xff\xff\xff")), "corrupt_media"
    ),
    AdversarialFile(
        "billions-of-samples.mp4", altered(clip(), patch(b"stsz", 12, b"\xff\xff\xff\xff")), "corrupt_media"
    ),
    AdversarialFile("endless-atom.mp4", altered(clip(), patch(b"moov", -4, b"\0\0\0\0"))),  # zero: up to the end
    AdversarialFile("header-says-huge.mp4", altered(clip(**MJPEG), patch(b"mp4v", 28, b"\xff\xff\xff\xff"))),
    AdversarialFile("header-says-huge.avi", altered(clip(**MJPEG), patch(b"strf", 12, b"\xff\xff\0\0\xff\xff\0\0"))),
    AdversarialFile("frames-say-huge.avi", altered(clip(**MJPEG), huge_frames), "corrupt_media"),
    AdversarialFile("above-the-budget.mp4", clip(), "too_large", media={"max_pixels_per_frame": 96 * 96 - 1}),
    AdversarialFile("ten-hours-too-long.mp4", write_ten_hours, "too_large", says="max_duration_s"),
    AdversarialFile("audio-only.mp4", write_audio_only, "no_video_stream"),
    AdversarialFile("cover-only.mp4", write_cover_only, "no_video_stream"),
    AdversarialFile("encrypted.mp4", clip(container_options=CENC), "encrypted_video", says="needs a key"),
    AdversarialFile("skewed.mp4", clip(rotation=45), "unsupported_media", says="skewed"),
    AdversarialFile(
        "sizes-in-one-track.mkv", write_sizes_in_one_track, "unsupported_media", says="changes its frame size"
    ),
    AdversarialFile("sizes-in-one-stream.ts", write_two_sizes, "unsupported_media", says="changes its frame size"),
    *(
        AdversarialFile(
            f"segfault_{name}.mp4",
            holding((CRASHERS / f"segfault_{name}.mp4").read_bytes()),
            "corrupt_media",
            says=says,
        )
        for name, says in (("a", "0 of 100"), ("b", "37 of 99"))
    ),
]
