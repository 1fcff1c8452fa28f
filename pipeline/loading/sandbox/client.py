"""Sends requests to the disposable child process (`sandbox.server`) and interprets its answers.

The child may crash, hang or run out of memory. It is killed at the deadline, and the error says what happened
(`sandbox.child`).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.errors import ItemError
from pipeline.loading.sandbox.child import ChildExitedError, DecordFailedError, SandboxProcess, TimedOutError
from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError
from pipeline.records import ROW_ERROR_TYPES, FailedPage

if TYPE_CHECKING:
    from illava.preprocess import Preprocessor, VisualInput
    from pipeline.config.schema import MediaConfig
    from pipeline.loading.decoding.media import DecoderChoice
    from pipeline.records import MediaKind

MEMORY_BYTES = 4 << 30
ITEMS_PER_CHILD = 200

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class DecodedMedia:
    """Holds the child's answer; ``preprocess_s`` is measured by the child."""

    media: tuple[VisualInput, ...]
    timestamps_s: tuple[float, ...]
    decoder: str
    partial: str | None
    preprocess_s: float
    failed_pages: tuple[FailedPage, ...] = ()
    page_notes: str | None = None
    num_pages: int | None = None


class DecoderProcess:
    """Owns one child, which is started on demand and replaced after a number of items. For one thread at a time."""

    def __init__(
        self,
        media: MediaConfig,
        preprocessor: Preprocessor,
        *,
        memory_bytes: int = MEMORY_BYTES,
        items_per_child: int = ITEMS_PER_CHILD,
    ) -> None:
        self._setup = pickle.dumps((media, preprocessor))
        self._memory_bytes = memory_bytes
        self._items_per_child = items_per_child
        self._child: SandboxProcess | None = None
        self._past_cpu_s = 0.0

    @property
    def pid(self) -> int | None:
        """Process id of the running child; None where none runs."""
        return self._child.process.pid if self._child else None

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all children so far, their start included."""
        return self._past_cpu_s + (self._child.cpu_s if self._child else 0.0)

    def load(
        self,
        kind: MediaKind,
        paths: Sequence[str],
        *,
        decoder: DecoderChoice,
        deadline_s: float,
        present: Sequence[tuple[int, int]] | None = None,
        pages_per_request: int | None = None,
        lost: Sequence[FailedPage] = (),
        num_pages: int | None = None,
        passwords: Sequence[str] = (),
    ) -> DecodedMedia:
        """Decode and preprocess one item.

        Args:
            kind: kind of the files.
            paths: local files.
            decoder: which decoder the child may use.
            deadline_s: when the child is killed, on `time.monotonic`.
            present: the byte ranges that are present of a video that is read by ranges; None for whole files.
            pages_per_request: pictures are pages of a document, of which one request shows so many to the model.
            lost, num_pages: of page images, as `pipeline.loading.decoding.pages.load_pages` takes them.
            passwords: of an encrypted PDF.

        Raises:
            ItemError: the child's own error, or ``load_timeout``, ``load_crashed``, ``load_out_of_memory``.
            DecordFailedError: decord was in use, and refused the file or ended the child.
            RangeReadUnsafeError: the present ranges may give other frames than the whole file.
            PipelineError: the child cannot be started at all.
        """
        request: dict[str, Any] = {"kind": kind, "paths": list(paths), "decoder": decoder, "present": present}
        request |= {"pages_per_request": pages_per_request, "num_pages": num_pages, "passwords": list(passwords)}
        request["lost"] = [asdict(page) for page in lost]
        return self._ask(request, _decoded, deadline_s)

    def needed_ranges(self, path: str, *, deadline_s: float) -> list[tuple[int, int]]:
        """Return the byte ranges of the chosen frames of a video whose index alone is present. Raises as `load`."""
        request = {"kind": "video", "paths": [path], "decoder": "pyav", "present": [], "pages_per_request": None}
        return self._ask(request, _needed_ranges, deadline_s)

    def _ask(
        self,
        request: dict[str, Any],
        read: Callable[[dict[str, Any], SandboxProcess, float], Answer],
        deadline_s: float,
    ) -> Answer:
        child = self._child = self._child or SandboxProcess(self._setup, self._memory_bytes)
        child.num_items += 1
        keep = False
        try:
            child.send(json.dumps(request).encode(), deadline_s)
            answer = read(_checked(child.receive_header(deadline_s)), child, deadline_s)
            keep = child.num_items < self._items_per_child
            return answer
        except TimedOutError:
            raise ItemError("load_timeout", "not loaded within load_timeout_s; its process was killed") from None
        except ChildExitedError:
            used_decord = request["decoder"] != "pyav" and request["kind"] == "video"
            raise child.explain_end(used_decord=used_decord) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ItemError("load_crashed", f"the decoder process sent an invalid answer: {error}") from error
        except RangeReadUnsafeError:
            keep = child.num_items < self._items_per_child
            raise
        except ItemError as error:
            keep = error.error_type != "load_out_of_memory" and child.num_items < self._items_per_child
            raise
        finally:
            if not keep:
                self.close()

    def close(self) -> None:
        """End the child at once. Another `load` starts a new child."""
        child, self._child = self._child, None
        if child:
            child.kill()
            self._past_cpu_s += child.cpu_s


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer; raise the error that the answer carries."""
    if "refused" in answer:
        raise DecordFailedError("corrupt_media", f"decord cannot read this file: {answer['refused']}")
    if "range_read_unsafe" in answer:
        raise RangeReadUnsafeError(answer["range_read_unsafe"])
    if "error_type" in answer:
        if answer["error_type"] not in ROW_ERROR_TYPES:
            raise ValueError(answer["error_type"])
        raise ItemError(answer["error_type"], answer["message"])
    return answer


def _needed_ranges(answer: dict[str, Any], _child: SandboxProcess, _deadline_s: float) -> list[tuple[int, int]]:
    return [(int(start), int(end)) for start, end in answer["ranges"]]


def _decoded(answer: dict[str, Any], child: SandboxProcess, deadline_s: float) -> DecodedMedia:
    from illava.preprocess import VisualInput

    media, times_s, sizes = [], tuple(answer["timestamps_s"]), tuple(int(size) for size in answer["packet_bytes"])
    for visual in answer["media"]:
        shape = tuple(int(size) for size in visual["shape"])
        tiles = child.receive(int(np.prod(shape)), deadline_s).reshape(shape)
        height, width = visual["original_size"]
        is_video = visual["kind"] == "video"
        own_times_s = times_s if is_video and len(times_s) == shape[0] else ()
        own_sizes = sizes if is_video and len(sizes) == shape[0] else ()
        media.append(VisualInput(visual["kind"], tiles, (height, width), own_times_s, packet_bytes=own_sizes))
    details = {key: answer[key] for key in ("decoder", "partial", "preprocess_s", "page_notes", "num_pages")}
    failed = tuple(FailedPage(**page) for page in answer["failed_pages"])
    return DecodedMedia(tuple(media), times_s, **details, failed_pages=failed)
