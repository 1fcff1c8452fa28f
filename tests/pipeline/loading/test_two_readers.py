"""Tests that decord and PyAV agree over every video of the corpus: frames, times, orientation, or a refusal in words.

What both give is also compared with PyAV's plain decoding of every frame. About 10 s.
"""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.config.schema import FpsSampling, KeyframeSampling, MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.decoding.media import DecordRefusedError, Frames, load_video
from tests.support.media.adversarial_media import MEDIA, AdversarialFile
from tests.support.media.adversarial_videos import BROKEN, READABLE, TURNED
from tests.support.media.decoded import every_frame

SAMPLINGS = ({}, {"frame_sampling": FpsSampling(fps=3)}, {"frame_sampling": KeyframeSampling()})
LARGE = {"8k.mp4", "ten-hours.mp4", "ten-hours-too-long.mp4"}  # in `make test-long`
FILES = [
    pytest.param(file, marks=pytest.mark.long) if file.name in LARGE else file for file in (*READABLE, *TURNED, *BROKEN)
]
# decord must read these, and not refuse them all.
READ_BY_DECORD = {file.name for file in READABLE if file.decoder == "decord"}


def outcome(path: str, media: MediaConfig, decoder: str) -> Frames | str:
    """The frames, or the words of the refusal."""
    try:
        return load_video(path, media, decoder=decoder)
    except (ItemError, DecordRefusedError) as error:
        return str(error)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_readers_agree(tmp_path, file: AdversarialFile) -> None:
    file.write(tmp_path / file.name)
    path = str(tmp_path / file.name)
    for sampling in SAMPLINGS:
        media = MediaConfig(**{**MEDIA, **file.media, **sampling})
        by_pyav, by_decord = outcome(path, media, "pyav"), outcome(path, media, "decord")
        if isinstance(by_decord, str):
            assert file.name not in READ_BY_DECORD, by_decord
            is_own = by_decord.startswith(("decord cannot", "sees", "gives", "reads", "DECORDError"))
            assert is_own or by_decord == by_pyav, by_decord
            continue
        assert isinstance(by_pyav, Frames), by_pyav
        assert by_decord.timestamps_s == by_pyav.timestamps_s
        assert by_decord.partial == by_pyav.partial
        for one, other in zip(by_decord.frames, by_pyav.frames, strict=True):
            np.testing.assert_array_equal(one, other)


WHOLE = [file for file in READABLE if file.name not in {*LARGE, "edit-skips-the-start.mp4"}]


@pytest.mark.parametrize("file", WHOLE, ids=lambda file: file.name)
def test_the_frames_are_all_that_the_decoder_gives(tmp_path, file: AdversarialFile) -> None:
    file.write(tmp_path / file.name)
    frames = load_video(str(tmp_path / file.name), MediaConfig(num_frames=100), decoder="pyav")
    expected = every_frame(tmp_path / file.name)
    assert len(frames.frames) == len(expected)
    for one, (_, other) in zip(frames.frames, expected, strict=True):
        np.testing.assert_array_equal(one, other)
