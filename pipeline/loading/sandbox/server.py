"""Runs in the disposable child: decodes and preprocesses one item after another for `sandbox.client`.

The parent starts the child as ``python -m``. The child limits its own memory, CPU time and file sizes before it reads
the first byte of media, and it dies with its parent, even when stopped. `media` and `pages` load the decoders, for the
first item.

Protocol on stdin and stdout: 4 bytes of length, then JSON; the tiles of an answer follow as raw bytes. Only the first
message, from the parent, is a pickle. Measured for 14 MB (32 frames of 384 px): 3.3 ms by pipe, 3.8 ms by memfd.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.errors import ItemError
from pipeline.records import FailedPage

if TYPE_CHECKING:
    from illava.preprocess import Preprocessor, VisualInput
    from pipeline.config.schema import MediaConfig

LENGTH = struct.Struct("<I")
_STDERR_BYTES = 1 << 20


def main(alive_read: int, memory_bytes: int) -> None:
    """Answer requests until stdin ends."""
    _die_with_parent(alive_read)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    for limit, most in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, _STDERR_BYTES)):
        _, hard = resource.getrlimit(limit)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (allowed, allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library that prints must not write into the protocol
    media, preprocessor = pickle.loads(_read_message(requests))
    _write_message(answers, {"ready": True})
    while message := _read_message(requests):
        _limit_cpu(media.load_timeout_s)
        answer, tiles = _answer(json.loads(message), media, preprocessor)
        _write_message(answers, answer)
        for array in tiles:
            rest = memoryview(array.reshape(-1).data)
            while rest:
                rest = rest[answers.write(rest) :]
        with contextlib.suppress(OSError):
            os.ftruncate(2, 0)


def _answer(
    request: dict[str, Any], media: MediaConfig, preprocessor: Preprocessor
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the answer to one request, or the error in its place; and the tiles that follow the answer."""
    from illava.errors import PreprocessError
    from pipeline.loading.decoding.media import DecordRefusedError
    from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError

    try:
        return _load(request, media, preprocessor)
    except DecordRefusedError as error:
        return {"refused": str(error)}, []
    except RangeReadUnsafeError as error:
        return {"range_read_unsafe": str(error)}, []
    except ItemError as error:
        error_type, message = error.error_type, str(error)
    except MemoryError:
        error_type, message = "load_out_of_memory", "decoding needs more memory than its process may have"
    except FileNotFoundError:
        error_type, message = "not_found", "the file is gone"
    except PermissionError:
        error_type, message = "access_denied", "the file may not be read"
    except PreprocessError as error:
        error_type, message = "unsupported_media", str(error)
    except Exception as error:
        error_type, message = "internal_error", f"{type(error).__name__} in the decoder process: {error}"
    return {"error_type": error_type, "message": message}, []


def _load(
    request: dict[str, Any], media: MediaConfig, preprocessor: Preprocessor
) -> tuple[dict[str, Any], list[np.ndarray]]:
    from pipeline.loading.decoding.media import load_video
    from pipeline.loading.decoding.pages import load_pages
    from pipeline.loading.decoding.pictures import load_images
    from pipeline.loading.decoding.ranged_video import load_present, needed_ranges

    kind, is_video = request["kind"], request["kind"] == "video"
    if kind == "document" or request["pages_per_request"]:
        pages = load_pages(
            kind,
            request["paths"],
            media,
            preprocessor,
            pages_per_request=request["pages_per_request"],
            lost=[FailedPage(**page) for page in request["lost"]],
            num_pages=request["num_pages"],
            passwords=request["passwords"],
        )
        answer, tiles = _described(pages.inputs)
        answer |= {"timestamps_s": (), "packet_bytes": (), "decoder": pages.decoder, "partial": pages.partial}
        answer |= {"preprocess_s": pages.preprocess_s, "failed_pages": [asdict(page) for page in pages.failed]}
        answer |= {"page_notes": pages.notes, "num_pages": pages.num_pages}
        return answer, tiles
    if request["present"] is not None:
        (path,) = request["paths"]
        if not request["present"]:
            return {"ranges": needed_ranges(path, media)}, []
        frames = load_present(path, media, request["present"])
    elif is_video:
        (path,) = request["paths"]
        frames = load_video(path, media, decoder=request["decoder"])
    else:
        frames = load_images(request["paths"], media)
    started_s = time.perf_counter()
    inputs = (preprocessor.video(frames.frames),) if is_video else preprocessor.images(frames.frames)
    answer, tiles = _described(inputs)
    answer |= {
        "timestamps_s": frames.timestamps_s,
        "packet_bytes": frames.packet_bytes,
        "decoder": frames.decoder,
        "partial": frames.partial,
        "preprocess_s": time.perf_counter() - started_s,
        "failed_pages": [],
        "page_notes": None,
        "num_pages": None,
    }
    return answer, tiles


def _described(inputs: Sequence[VisualInput]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return a description of the tiles that follow the answer, and the tiles."""
    tiles = [np.ascontiguousarray(visual.tiles, dtype=np.uint8) for visual in inputs]
    media = [
        {"kind": visual.kind, "shape": array.shape, "original_size": [int(side) for side in visual.original_size]}
        for visual, array in zip(inputs, tiles, strict=True)
    ]
    return {"media": media}, tiles


def _limit_cpu(item_s: float) -> None:
    """Let the kernel end a child that computes beyond the item's deadline, should the parent not be able to."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    most_s = int(used.ru_utime + used.ru_stime + item_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most_s if hard == resource.RLIM_INFINITY else min(most_s, hard), hard))


def _die_with_parent(alive_read: int) -> None:
    """Have the kernel send SIGKILL when the parent's end of a pipe closes.

    PR_SET_PDEATHSIG would not do: it fires when the *thread* that started this process ends. Nor would end of file on
    stdin: a decoder that hangs never reads it.
    """
    fcntl.fcntl(alive_read, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(alive_read, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(alive_read, fcntl.F_SETFL, fcntl.fcntl(alive_read, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(alive_read, select.POLLHUP)
    if poll.poll(0):
        raise SystemExit("the parent was gone before this process had started")


def _read_message(pipe: BinaryIO) -> bytes:
    head = pipe.read(LENGTH.size)
    return pipe.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _write_message(pipe: Any, answer: dict[str, Any]) -> None:
    text = json.dumps(answer).encode()
    pipe.write(LENGTH.pack(len(text)) + text)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
