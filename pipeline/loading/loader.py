"""Loads a manifest's items as media at model size, within a deadline (`Loader`).

Stages the objects, has the disposable child decode and preprocess them, and reports what that took. Every reader owns
one loader.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipeline.errors import ItemError
from pipeline.loading.load_report import LoadMeter
from pipeline.loading.page_limit import num_pages_read
from pipeline.loading.ranged_read import load_by_ranges
from pipeline.loading.sandbox.child import DecordFailedError
from pipeline.loading.sandbox.client import ITEMS_PER_CHILD, MEMORY_BYTES, DecodedMedia, DecoderProcess
from pipeline.loading.staging import Staging, check_unchanged
from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError
from pipeline.records import FailedPage, LoadedItem, MediaItem
from pipeline.storage.uris import is_local

if TYPE_CHECKING:
    from illava.preprocess import Preprocessor
    from pipeline.config.schema import MediaConfig

RANGED_FROM_BYTES = 4_000_000  # for smaller objects the additional requests take longer than the bytes they save


class Loader:
    """Loads one item at a time, for one thread. Use it as a context manager, or call `close`.

    Args:
        media: sampling, decoder and budgets.
        preprocessor: brings frames to model size; runs in the child.
        cache_dir: where fetched objects are staged; None is the system's temporary folder.
        cache_bytes: size of this loader's staging area.
        allowed_roots: local folders that items may name; None where the operator's own configuration names the items.
        memory_bytes: bound on the child's address space.
        items_per_child: number of items after which a child is replaced.
        ranged_from_bytes: objects smaller than this are fetched whole.
        pages_per_request: number of pages of a document that one request shows to the model; None where one request
            shows all of an item.
    """

    def __init__(
        self,
        media: MediaConfig,
        preprocessor: Preprocessor,
        *,
        cache_dir: str | None = None,
        cache_bytes: int = 20_000_000_000,
        allowed_roots: Sequence[str] | None = None,
        memory_bytes: int = MEMORY_BYTES,
        items_per_child: int = ITEMS_PER_CHILD,
        ranged_from_bytes: int = RANGED_FROM_BYTES,
        pages_per_request: int | None = None,
    ) -> None:
        self._media = media
        self._pages_per_request = pages_per_request
        self._ranged_from_bytes = ranged_from_bytes
        self._staging = Staging(
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
            max_object_bytes=media.max_bytes,
            allowed_roots=allowed_roots,
            verify_md5=media.verify_md5 == "auto",
        )
        self._decoder = DecoderProcess(media, preprocessor, memory_bytes=memory_bytes, items_per_child=items_per_child)

    @property
    def child_pid(self) -> int | None:
        """Process id of the running decoder child, for tests that harm the child."""
        return self._decoder.pid

    def load(self, item: MediaItem) -> LoadedItem:
        """Fetch, decode and preprocess one item.

        Raises:
            ItemError: this item cannot be loaded; other items are not affected.
            StorageError: the store or the local disk failed for all items.
            PipelineError: the decoder process cannot be started at all.
        """
        if len(item.uris) > self._media.max_images and not self._has_page_images(item):
            raise ItemError("too_large", f"{len(item.uris)} images; max_images is {self._media.max_images}")
        if item.media_kind != "images" and len(item.uris) != 1:
            raise ItemError(
                "internal_error", f"an item of kind {item.media_kind} has {len(item.uris)} objects, not one"
            )
        meter = LoadMeter(self._staging, self._decoder, child_s=self._media.load_timeout_s)
        try:
            decoded = self._load_by_ranges(item, meter) or self._load_whole(item, meter)
            self._check_unchanged(item, decoded)
        except ItemError as error:
            error.stats = meter.spent()
            raise
        stats = meter.spent(preprocess_s=decoded.preprocess_s, decoder=decoded.decoder)
        return LoadedItem(
            replace(item, passwords=()) if item.passwords else item,
            decoded.media,
            decoded.timestamps_s,
            stats,
            decoded.partial,
            decoded.failed_pages,
            decoded.page_notes,
            decoded.num_pages,
        )

    def warm_up(self) -> None:
        """Start the child, by a file of no bytes: for measurements, so that its start counts to no item."""
        with suppress(ItemError, DecordFailedError):
            deadline_s = time.monotonic() + self._media.load_timeout_s
            self._decoder.load("video", [os.devnull], decoder=self._media.decoder, deadline_s=deadline_s)

    def close(self) -> None:
        """End the child and remove the staged objects. Another `load` starts both again."""
        self._decoder.close()
        self._staging.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _load_by_ranges(self, item: MediaItem, meter: LoadMeter) -> DecodedMedia | None:
        """Load the media from a part of the object's bytes; None where that is off, not worthwhile, or unsafe."""
        wanted = self._media.ranged_reads == "auto" and self._media.decoder != "decord" and item.media_kind == "video"
        if not wanted or item.sizes[0] < self._ranged_from_bytes:
            return None
        copy = self._staging.sparse(item.uris[0], size=item.sizes[0], etag=item.etags[0])
        if copy is None:
            return None
        try:
            return load_by_ranges(copy, self._staging, self._decoder, meter)
        except RangeReadUnsafeError:
            return None
        except ItemError as error:
            raise ItemError(error.error_type, f"{_name(item)}: {error}", retryable=error.retryable) from error

    def _has_page_images(self, item: MediaItem) -> bool:
        return self._pages_per_request is not None and item.media_kind in ("image", "images")

    def _check_unchanged(self, item: MediaItem, decoded: DecodedMedia | None = None) -> None:
        """Check that local objects, which are read in place, did not change meanwhile.

        Page images that failed, or that are over the limit and so were never read, are no matter.
        """
        failed = {page.page for page in decoded.failed_pages} if decoded and len(item.uris) > 1 else set()
        for number, (uri, size, etag) in enumerate(self._objects_read(item)):
            if is_local(uri) and number not in failed:
                check_unchanged(uri, size=size, etag=etag)

    def _objects_read(self, item: MediaItem) -> list[tuple[str, int, str]]:
        """URI, size and entity tag of each object that is read: of page images only those within the limit."""
        objects = list(zip(item.uris, item.sizes, item.etags, strict=True))
        if not self._has_page_images(item):
            return objects
        return objects[: num_pages_read(item.media_kind, len(objects), self._media)]

    def _load_whole(self, item: MediaItem, meter: LoadMeter) -> DecodedMedia:
        if self._has_page_images(item):
            return self._load_page_images(item, meter)
        paths: list[str] = []
        with meter.fetching():
            for uri, size, etag in self._objects_read(item):
                paths.append(self._staging.get(uri, size=size, etag=etag, keep=paths).path)
        return self._decode_named(item, paths, meter)

    def _load_page_images(self, item: MediaItem, meter: LoadMeter) -> DecodedMedia:
        """Load a document of page images: one whose object cannot be had fails alone, unless another try may help."""
        objects = self._objects_read(item)
        paths: list[str] = []
        lost: list[FailedPage] = []
        with meter.fetching():
            for page, (uri, size, etag) in enumerate(objects):
                try:
                    paths.append(self._staging.get(uri, size=size, etag=etag, keep=paths).path)
                except ItemError as error:
                    if error.retryable:
                        raise
                    lost.append(FailedPage(page, error.error_type, str(error)))
        if not paths:
            others = f"; none of its {len(objects)} pages could be had" if len(objects) > 1 else ""
            raise ItemError(lost[0].error_type, f"{lost[0].message}{others}")
        return self._decode_named(item, paths, meter, lost=lost)

    def _decode_named(
        self, item: MediaItem, paths: list[str], meter: LoadMeter, *, lost: Sequence[FailedPage] = ()
    ) -> DecodedMedia:
        try:
            return self._decode(item, paths, meter, lost)
        except ItemError as error:
            self._check_unchanged(item)
            raise ItemError(error.error_type, f"{_name(item)}: {error}", retryable=error.retryable) from error

    def _decode(self, item: MediaItem, paths: list[str], meter: LoadMeter, lost: Sequence[FailedPage]) -> DecodedMedia:
        """Decode with the configured decoder; PyAV, in a new child, takes what decord refuses or crashes on."""
        decoder, per_request = self._media.decoder, self._pages_per_request
        try:
            with meter.child() as deadline_s:
                return self._decoder.load(
                    item.media_kind,
                    paths,
                    decoder=decoder,
                    deadline_s=deadline_s,
                    pages_per_request=per_request,
                    lost=lost,
                    num_pages=len(item.uris) if self._has_page_images(item) else None,
                    passwords=item.passwords,
                )
        except DecordFailedError as failure:
            if decoder == "decord":
                raise failure.error from failure
            with meter.child() as deadline_s:
                return self._decoder.load(item.media_kind, paths, decoder="pyav", deadline_s=deadline_s)


def _name(item: MediaItem) -> str:
    return item.uris[0] if len(item.uris) == 1 else f"{item.uris[0]} and {len(item.uris) - 1} more"
