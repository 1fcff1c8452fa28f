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

from pipeline.errors import ItemError
from pipeline.loading.clip import Clip, Packet, check_duration, check_pixels, describe_clip, ends_early
from pipeline.loading.container import HEAD_BYTES, Container, sniff
from pipeline.loading.nal import starts_afresh
from pipeline.loading.sampling import choose_frames

if TYPE_CHECKING:
    from pipeline.config import MediaConfig

DecoderChoice = Literal["auto", "decord", "pyav"]

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_READ_BYTES = 1 << 18
_FIRST_PTS = -(1 << 63)
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
    unfit = clip.unfit_for_decord or (None if find_spec("decord") else "it is not installed on this machine")
    if decoder == "decord" and unfit:
        raise ItemError(
            "corrupt_media" if clip.problem else "unsupported_media",
            f"decord cannot read this file: {unfit}; use decoder: auto",
        )
    if decoder == "pyav" or unfit:
        found, name = _read_pyav(path, clip, wanted, media), "pyav"
    else:
        found, name = _read_decord(path, clip, wanted), "decord"
    problems = [clip.problem] if clip.problem else []
    if missing := len(wanted) - len(found):
        problems.append(f"{missing} of {len(wanted)} chosen frames cannot be decoded whole")
    if not found:
        raise ItemError("corrupt_media", f"no frame left ({name}): {'; '.join(problems)}")
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
            where = f"picture {place + 1} of {len(paths)}: " if len(paths) > 1 else ""
            raise ItemError(error.error_type, f"{where}{error}") from error
    return Frames(frames, (), "pillow")


def _load_image(path: str, max_pixels: int) -> np.ndarray:
    from PIL import Image, ImageOps, UnidentifiedImageError

    with open(path, "rb") as file:
        if not (head := file.read(12)):
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
        message = f"not a picture of {', '.join(IMAGE_FORMATS)} (first bytes {head.hex(' ')})"
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
    only = {"protocol_whitelist": "", "format_whitelist": container}
    with open(path, "rb") as bytes_in:
        try:
            file = av.open(bytes_in, "r", format=container, options=only, buffer_size=_READ_BYTES)
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
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
        check_pixels(stream.codec_context.width, stream.codec_context.height, most=media.max_pixels_per_frame)
        declared_s = (file.duration or 0) / 1e6
        check_duration(declared_s, most_s=media.max_duration_s)
        packets, end_s = _read_packets(file, stream)
        num_listed = {"mov": sum(entry.size > 0 for entry in stream.index_entries), "avi": stream.frames}
        clip = describe_clip(
            packets,
            container=container,
            codec=stream.codec_context.codec.canonical_name,
            time_base=stream.time_base,
            frame_rate=stream.average_rate,
            num_declared=num_listed.get(container, 0),
            problem_at_end=ends_early(end_s, declared_s),
        )
    check_duration(clip.timeline.timestamps_s[-1], most_s=media.max_duration_s)
    return clip


def _read_packets(file: Any, stream: Any) -> tuple[list[Packet], float]:
    """Every packet of the stream, and the time at which the last packet of any stream ends."""
    packets, end_s, start_s = [], 0.0, (file.start_time or 0) / 1e6
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata
    for packet in _demux(file):
        if not packet.size:
            continue
        if packet.dts is not None and not packet.is_corrupt:
            last = max(packet.dts, packet.pts if packet.pts is not None else packet.dts) + (packet.duration or 0)
            end_s = max(end_s, float(last * packet.time_base) - start_s)
        if packet.stream_index == stream.index:
            is_fresh = packet.is_keyframe and starts_afresh(bytes(packet), codec=codec, extradata=extradata)
            flags = packet.is_keyframe, is_fresh, packet.is_corrupt, packet.is_discard
            packets.append(Packet(packet.pts, packet.dts, *flags))
    return packets, end_s


def _read_pyav(path: str, clip: Clip, wanted: Sequence[int], media: MediaConfig) -> dict[int, np.ndarray]:
    """The wanted frames that can be decoded, by index; sought where seeking is exact, else decoded from the start."""
    found: dict[int, np.ndarray] = {}
    for seek_pts in (clip.seek_pts, {}):
        with _opened(path, clip.container) as (file, stream):
            decoded, position = _decode(file, stream, clip), -1
            for key, last in clip.stretches(wanted):
                if key > position + 1 and key in seek_pts:
                    file.seek(seek_pts[key], stream=stream)
                    decoded = _decode(file, stream, clip)
                for position, frame in decoded:
                    if position in wanted:
                        found[position] = _upright_rgb(frame, media)
                    if position >= last:
                        break
        if len(found) == len(wanted) or not seek_pts:  # else something that was skipped may have been needed
            break
    if len({frame.shape for frame in found.values()}) > 1:
        raise ItemError("unsupported_media", "the video changes its frame size midway")
    return found


def _decode(file: Any, stream: Any, clip: Clip) -> Iterator[tuple[int, Any]]:
    """Frames with their index, from the container's present position.

    Left out are frames that cannot be decoded and those behind them up to the next key frame, predicted from them.
    """
    import av

    count, damaged_pts = 0, None
    for packet in _demux(file, stream):
        try:
            frames = None if packet.is_corrupt else packet.decode()
        except av.error.EOFError:
            return
        except av.error.InvalidDataError:
            frames = None
        if frames is None:
            if clip.order is None:
                return  # frames are counted here: behind a lost one, every number would be wrong
            damaged_pts = _FIRST_PTS if packet.pts is None else packet.pts
            continue
        for frame in frames:
            index = count if clip.order is None else clip.order.get(frame.pts)
            count += 1
            pts = _FIRST_PTS if frame.pts is None else frame.pts
            if frame.is_corrupt:
                damaged_pts = pts
            elif frame.key_frame and damaged_pts is not None and pts > damaged_pts:
                damaged_pts = None
            if index is not None and (damaged_pts is None or pts < damaged_pts):
                yield index, frame


def _demux(file: Any, *streams: Any) -> Iterator[Any]:
    """Packets until the file ends, early or not: what is missing then shows in the counts."""
    import av

    try:
        yield from file.demux(*streams)
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise


def _upright_rgb(frame: Any, media: MediaConfig) -> np.ndarray:
    check_pixels(frame.width, frame.height, most=media.max_pixels_per_frame)
    turns, rest = divmod(frame.rotation, 90)
    if rest:
        raise ItemError("unsupported_media", f"turned by {frame.rotation} degrees; only multiples of 90 are read")
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
        if not np.allclose(
            shown_s[1:] - shown_s[0], [clip.timeline.timestamps_s[i] for i in wanted], rtol=1e-6, atol=2e-3
        ):
            raise DecordRefusedError("gives other times than the container")
        return {index: reader[index].asnumpy() for index in wanted}
    except (DecordRefusedError, MemoryError):
        raise
    except Exception as error:  # decord raises its own error, RuntimeError and AssertionError alike
        raise DecordRefusedError(f"{type(error).__name__}: {str(error).strip()[:300].partition(chr(10))[0]}") from error
