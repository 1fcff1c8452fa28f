"""Decodes video files to uint8 RGB frames: checks budgets, then uses decord or PyAV. Runs in the sandbox child.

PyAV first reads the container once without decoding (`pyav_scan.scan`). The scan gives every frame's time, what is
missing, and which frames to take. Both decoders are therefore asked for the same frames, and decord's answers are
checked against the scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.errors import ItemError
from pipeline.loading.decoding.pyav_file import encrypted
from pipeline.loading.decoding.pyav_scan import scan
from pipeline.loading.decoding.pyav_video import list_frames, read_pyav
from pipeline.loading.video_index import mp4_boxes
from pipeline.loading.video_index.clip import Clip
from pipeline.loading.video_index.container import HEAD_BYTES, sniff
from pipeline.loading.video_index.frame_sampling import choose_frames
from pipeline.loading.video_index.packet_bytes import packet_bytes

if TYPE_CHECKING:
    from pipeline.config.schema import MediaConfig

DecoderChoice = Literal["auto", "decord", "pyav"]

_NO_FAULTS = 1e-9  # makes decord raise instead of returning a neighbour for a lost frame; 0 would allow any number


class DecordRefusedError(Exception):
    """decord cannot read this file, or disagrees with its container; PyAV may still."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Holds the decoded frames of one item.

    Attributes:
        frames: uint8 [H, W, 3] RGB each, as shown (rotation and orientation applied).
        timestamps_s: seconds of each frame since the clip's first frame; empty for images.
        decoder: ``decord``, ``pyav`` or ``pillow``.
        partial: why frames are missing; None where none is.
        packet_bytes: bytes that code what is new in each frame; empty for images, and where not known.
    """

    frames: list[np.ndarray]
    timestamps_s: tuple[float, ...]
    decoder: str
    partial: str | None = None
    packet_bytes: tuple[int, ...] = ()


def load_video(path: str, media: MediaConfig, *, decoder: DecoderChoice) -> Frames:
    """Decode the chosen frames of one video.

    Args:
        path: a local file.
        media: sampling and budgets.
        decoder: ``auto`` is decord, and PyAV for files that decord is known to decode wrongly.

    Raises:
        ItemError: with a type of the closed list; budgets are checked before anything is decoded.
        DecordRefusedError: decord was chosen and cannot decode the file.
    """
    with open(path, "rb") as file:
        container = sniff(file.read(HEAD_BYTES))
    clip, packets = scan(path, container, media)
    if clip.unsure_until:
        clip = list_frames(path, clip, packets)
    wanted = _choose(clip, media)
    unfit = clip.unfit_for_decord or (None if find_spec("decord") else "it is not installed on this machine")
    if decoder == "decord" and unfit:
        raise ItemError(
            "corrupt_media" if clip.problem else "unsupported_media",
            f"decord cannot read this file: {unfit}; use decoder: auto",
        )
    if decoder == "pyav" or unfit:
        found, damage = read_pyav(path, clip, packets, wanted, media)
        if len(found) < len(wanted) and not damage.is_seen:  # some packets show no frame, and nothing else says so
            clip = list_frames(path, clip, packets)
            wanted = _choose(clip, media)
            found, _ = read_pyav(path, clip, packets, wanted, media)
        name = "pyav"
    else:
        found, name = _read_decord(path, clip, wanted), "decord"
    problems = [said for said in (clip.problem, clip.repair) if said]
    if missing := len(wanted) - len(found):
        problems.append(f"{missing} of {len(wanted)} chosen frames cannot be decoded whole")
    if not found:
        if container == "mov" and mp4_boxes.is_encrypted(path):
            raise encrypted()
        raise ItemError("corrupt_media", f"no frame left ({name}): {'; '.join(problems)}")
    indices = sorted(found)
    times_s = tuple(clip.timeline.timestamps_s[index] for index in indices)
    sizes = packet_bytes(packets, clip, indices)
    return Frames([found[index] for index in indices], times_s, name, "; ".join(problems) or None, sizes)


def _choose(clip: Clip, media: MediaConfig) -> tuple[int, ...]:
    wanted = choose_frames(clip.timeline, media.frame_sampling, num_frames=media.num_frames)
    if not wanted:
        raise ItemError("corrupt_media", "the container marks no key frames; use frame_sampling: {kind: uniform}")
    return wanted


def _read_decord(path: str, clip: Clip, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    """Decode the wanted frames with decord, after checking that decord sees the same clip as the scan."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    if "%" in path:
        raise DecordRefusedError("reads a % in a file's name as a pattern for other files")
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, fault_tol=_NO_FAULTS)
        if len(reader) != len(clip.timeline.timestamps_s):
            raise DecordRefusedError(f"sees {len(reader)} frames of {len(clip.timeline.timestamps_s)}")
        shown_s = reader.get_frame_timestamp([0, *wanted])[:, 0]
        if not np.allclose(
            shown_s[1:] - shown_s[0], [clip.timeline.timestamps_s[i] for i in wanted], rtol=1e-6, atol=2e-3
        ):
            raise DecordRefusedError("gives other times than the container")
        found = {index: reader[index].asnumpy() for index in wanted}
        if any(frame.shape[2] != 3 for frame in found.values()):  # below 32 px of width it hands out padded rows
            raise DecordRefusedError("gives frames of other than three colours")
        return found
    except (DecordRefusedError, MemoryError):
        raise
    except Exception as error:  # decord raises its own error, RuntimeError and AssertionError alike
        raise DecordRefusedError(f"{type(error).__name__}: {str(error).strip()[:300].partition(chr(10))[0]}") from error
