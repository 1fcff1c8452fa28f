"""Media files to uint8 RGB frames: budgets first, then decord, PyAV or Pillow. Runs inside the disposable child.

The container is read once by PyAV without decoding: that gives every frame's time, what is missing, and which frames
to take, so both decoders are asked for the same frames and decord is checked against it. Knows nothing of storage,
models or rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.clip import Clip, Packet, describe_clip, ends_early, stretches, unfit_for_decord
from pipeline.container import HEAD_BYTES, Container, sniff
from pipeline.errors import ItemError
from pipeline.sampling import choose_frames

if TYPE_CHECKING:
    from pipeline.config import MediaConfig

DecoderChoice = Literal["auto", "decord", "pyav"]

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_READ_BYTES = 1 << 18
_NO_FAULTS = 1e-9  # decord: raise instead of handing out a neighbour for a frame it lost; 0 would allow any number


class DecordRefusedError(Exception):
    """decord cannot read this file, or disagrees with its container; PyAV may still."""


@dataclass(frozen=True, slots=True)
class Frames:
    """What decoding one item gave.

    Attributes:
        frames: uint8 [H, W, 3] RGB each, as shown (rotation and orientation applied).
        timestamps_s: of each frame since the clip's first; empty for images.
        decoder: ``decord``, ``pyav`` or ``pillow``.
        partial: why fewer frames came than were there; None when complete.
    """

    frames: list[np.ndarray]
    timestamps_s: tuple[float, ...]
    decoder: str
    partial: str | None = None


def load_video(path: str, media: MediaConfig, *, decoder: DecoderChoice) -> Frames:
    """The chosen frames of one video.

    Args:
        path: a local file.
        media: sampling and budgets.
        decoder: ``auto`` is decord, except for what it is known to get wrong; then PyAV.

    Raises:
        ItemError: with a type of the closed list; budgets are checked before anything is decoded.
        DecordRefusedError: decord was chosen and cannot do it.
    """
    with open(path, "rb") as file:
        container = sniff(file.read(HEAD_BYTES))
    clip = _scan(path, container, media)
    wanted = choose_frames(clip.timeline, media.frame_sampling, num_frames=media.num_frames)
    if not wanted:
        raise ItemError("corrupt_media", "the container marks no key frames; use frame_sampling: {kind: uniform}")
    unfit = unfit_for_decord(clip) or (None if find_spec("decord") else "it is not installed on this machine")
    if decoder == "decord" and unfit:
        raise ItemError("unsupported_media", f"decord cannot read this file: {unfit}; use decoder: auto")
    if decoder == "pyav" or unfit:
        found, name = _read_pyav(path, clip, wanted, media), "pyav"
    else:
        found, name = _read_decord(path, clip, wanted), "decord"
    if not found:
        raise ItemError("corrupt_media", f"none of the {len(wanted)} chosen frames can be decoded ({name})")
    problems = [clip.problem] if clip.problem else []
    if len(found) < len(wanted):
        problems.append(f"{len(wanted) - len(found)} of {len(wanted)} chosen frames cannot be decoded")
    times_s = tuple(clip.timeline.timestamps_s[index] for index in sorted(found))
    return Frames([found[index] for index in sorted(found)], times_s, name, "; ".join(problems) or None)


def load_images(paths: Sequence[str], media: MediaConfig) -> Frames:
    """Pictures in order, as RGB: orientation applied, transparency on white, 16 bit scaled to 8, first frame only.

    Raises:
        ItemError: ``too_large``, ``empty_media``, ``unsupported_media`` or ``corrupt_media``, naming the picture.
    """
    frames = []
    for place, path in enumerate(paths):
        try:
            frames.append(_load_image(path, media.max_pixels_per_frame))
        except ItemError as error:
            if len(paths) == 1:
                raise
            raise ItemError(error.error_type, f"picture {place + 1} of {len(paths)}: {error}") from error
    return Frames(frames, (), "pillow")


def _load_image(path: str, max_pixels: int) -> np.ndarray:
    from PIL import Image, ImageOps, UnidentifiedImageError

    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        raise ItemError("empty_media", "the file has zero bytes")
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ItemError("too_large", f"the picture has more than max_pixels_per_frame = {max_pixels} pixels") from error
    except UnidentifiedImageError as error:
        message = f"not a picture of {', '.join(IMAGE_FORMATS)} (first bytes {head[:12].hex(' ')})"
        raise ItemError("unsupported_media", message) from error
    except (ItemError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken header leads them into
        raise ItemError("corrupt_media", f"the picture cannot be decoded: {error}") from error


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ItemError("unsupported_media", f"a picture of mode {image.mode} has no defined white; save it as 8 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _opened(path: str, container: Container) -> Iterator[tuple[Any, Any]]:
    """The open container and its video stream: one demuxer, no protocol, so nothing in the file can name another."""
    import av

    av.logging.set_level(None)
    options = {"protocol_whitelist": "", "format_whitelist": container}
    with open(path, "rb") as bytes_in:
        try:
            file = av.open(bytes_in, "r", format=container, options=options, buffer_size=_READ_BYTES)
        except MemoryError:
            raise
        except av.error.FFmpegError as error:
            raise ItemError("corrupt_media", f"the {container} container cannot be read: {error.strerror}") from error
        with file:
            stream = file.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise ItemError("no_video_stream", "the file has no video stream")
            if stream.codec_context is None:
                raise ItemError("unsupported_media", "there is no decoder for the codec of the video stream")
            stream.codec_context.thread_count = 1
            yield file, stream


def _scan(path: str, container: Container, media: MediaConfig) -> Clip:
    """Check the budgets, then list every frame without decoding one."""
    with _opened(path, container) as (file, stream):
        _check_pixels(stream.codec_context.width, stream.codec_context.height, media)
        declared_s = (file.duration or 0) / 1e6
        _check_duration(declared_s, media)
        packets, end_s = _read_packets(file, stream)
        clip = describe_clip(
            packets,
            container=container,
            codec=stream.codec_context.codec.canonical_name,
            time_base=stream.time_base,
            frame_rate=stream.average_rate,
            num_declared={"mov": len(stream.index_entries), "avi": stream.frames}.get(container, 0),
            problem_at_end=ends_early(end_s, declared_s),
        )
    _check_duration(clip.timeline.timestamps_s[-1], media)
    return clip


def _read_packets(file: Any, stream: Any) -> tuple[list[Packet], float]:
    """Every packet of the stream, and the time at which the last packet of any stream ends."""
    import av

    packets, end_s, start_s = [], 0.0, (file.start_time or 0) / 1e6
    try:
        for packet in file.demux():
            if not packet.size:
                continue
            if packet.dts is not None and not packet.is_corrupt:
                last = max(packet.dts, packet.pts if packet.pts is not None else packet.dts) + (packet.duration or 0)
                end_s = max(end_s, float(last * packet.time_base) - start_s)
            if packet.stream_index == stream.index:
                flags = packet.is_keyframe, packet.is_corrupt, packet.is_discard
                packets.append(Packet(packet.pts, packet.dts, *flags))
    except MemoryError:
        raise
    except av.error.FFmpegError:
        pass  # a file that ends early: what is missing shows in the counts
    return packets, end_s


def _read_pyav(path: str, clip: Clip, wanted: Sequence[int], media: MediaConfig) -> dict[int, np.ndarray]:
    """The wanted frames that can be decoded, by index: group of pictures by group, sought where that is exact."""
    found: dict[int, np.ndarray] = {}
    with _opened(path, clip.container) as (file, stream):
        decoded, position = _decode(file, stream, clip, start=0), -1
        for key, last in stretches(wanted, clip.timeline.keyframes):
            if key > position + 1 and key in clip.seek_pts:
                file.seek(clip.seek_pts[key], stream=stream)
                decoded = _decode(file, stream, clip, start=key)
            for position, frame in decoded:
                if position in wanted and not frame.is_corrupt:
                    found[position] = _upright_rgb(frame, media)
                if position >= last:
                    break
    if len({frame.shape for frame in found.values()}) > 1:
        raise ItemError("unsupported_media", "the video changes its frame size midway")
    return found


def _decode(file: Any, stream: Any, clip: Clip, *, start: int) -> Iterator[tuple[int, Any]]:
    """Frames with their index, from the container's present position; what cannot be decoded is left out."""
    import av

    count = start
    packets = file.demux(stream)
    while True:
        try:
            packet = next(packets)
            frames = packet.decode()
        except StopIteration:
            return
        except MemoryError:
            raise
        except av.error.EOFError:
            return
        except av.error.InvalidDataError:
            continue
        for frame in frames:
            index = count if clip.order is None else clip.order.get(frame.pts)
            count += 1
            if index is not None:
                yield index, frame


def _upright_rgb(frame: Any, media: MediaConfig) -> np.ndarray:
    _check_pixels(frame.width, frame.height, media)
    turns, rest = divmod(frame.rotation, 90)
    if rest:
        raise ItemError(
            "unsupported_media", f"the video is turned by {frame.rotation} degrees; multiples of 90 are read"
        )
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def _read_decord(path: str, clip: Clip, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    """The wanted frames, after decord has shown that it sees the same clip as the container's own list."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, fault_tol=_NO_FAULTS)
        if len(reader) != len(clip.timeline.timestamps_s):
            raise DecordRefusedError(f"sees {len(reader)} frames of {len(clip.timeline.timestamps_s)}")
        shown_s = reader.get_frame_timestamp([0, *wanted])[:, 0]
        if not np.allclose(shown_s[1:] - shown_s[0], [clip.timeline.timestamps_s[i] for i in wanted], atol=2e-3):
            raise DecordRefusedError("gives other times than the container")
        return {index: reader[index].asnumpy() for index in wanted}
    except (DecordRefusedError, MemoryError):
        raise
    except Exception as error:  # decord raises its own error, RuntimeError and AssertionError alike
        raise DecordRefusedError(
            str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
        ) from error


def _check_pixels(width: int, height: int, media: MediaConfig) -> None:
    if width * height > media.max_pixels_per_frame:
        raise ItemError(
            "too_large", f"frames of {width}x{height} px exceed max_pixels_per_frame = {media.max_pixels_per_frame}"
        )


def _check_duration(duration_s: float, media: MediaConfig) -> None:
    if duration_s > media.max_duration_s:
        raise ItemError("too_large", f"a clip of {duration_s:.1f} s exceeds max_duration_s = {media.max_duration_s}")
