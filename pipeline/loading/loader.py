"""`Loader`: a manifest's item to its media at model size, within a deadline. What a reader owns.

Stages the objects, has them decoded and preprocessed in the disposable child, and says what it took. Knows nothing of
Ray, of models or of what becomes of the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipeline.errors import ItemError
from pipeline.loading.decoding.mp4_index import RangeReadUnsafeError
from pipeline.loading.load_report import LoadMeter
from pipeline.loading.ranged_read import load_by_ranges
from pipeline.loading.sandbox.child import DecordFailedError
from pipeline.loading.sandbox.client import ITEMS_PER_CHILD, MEMORY_BYTES, DecodedMedia, DecoderProcess
from pipeline.loading.staging import Staging, check_unchanged
from pipeline.records import LoadedItem, MediaItem
from pipeline.storage.uris import is_local

if TYPE_CHECKING:
    from illava.preprocess import Preprocessor
    from pipeline.config.schema import MediaConfig

RANGED_FROM_BYTES = 4_000_000  # below, the further requests take longer than the bytes


class Loader:
    """Loads one item at a time; for one thread. Use it as a context manager, or `close` it.

    Args:
        media: sampling, decoder and budgets.
        preprocessor: brings frames to model size; runs in the child.
        cache_dir: where fetched objects are staged; None is the system's temporary folder.
        cache_bytes: size of this loader's staging area.
        allowed_roots: local folders that items may name; None where the operator's own configuration named them.
        memory_bytes: address space of the child.
        items_per_child: a child is replaced after so many items.
        ranged_from_bytes: smaller objects are fetched whole.
        pages_per_request: every item is a document, of which the model is shown so many pages at once; None where it
            is shown all of an item.
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
        """Of the running decoder process, for tests that harm it."""
        return self._decoder.pid

    def load(self, item: MediaItem) -> LoadedItem:
        """Fetch, decode and preprocess one item.

        Raises:
            ItemError: whatever is wrong with this item; the next one is not affected.
            StorageError: the store or the local disk failed for all items.
            PipelineError: the decoder process cannot be started at all.
        """
        if len(item.uris) > self._media.max_images:
            raise ItemError("too_large", f"{len(item.uris)} images; max_images is {self._media.max_images}")
        if item.media_kind != "images" and len(item.uris) != 1:
            raise ItemError(
                "internal_error", f"an item of kind {item.media_kind} has {len(item.uris)} objects, not one"
            )
        meter = LoadMeter(self._staging, self._decoder, child_s=self._media.load_timeout_s)
        try:
            decoded = self._load_by_ranges(item, meter) or self._load_whole(item, meter)
            _check_unchanged(item)
        except ItemError as error:
            error.stats = meter.spent()
            raise
        stats = meter.spent(preprocess_s=decoded.preprocess_s, decoder=decoded.decoder)
        return LoadedItem(item, decoded.media, decoded.timestamps_s, stats, decoded.partial, decoded.failed_pages)

    def close(self) -> None:
        """End the child and remove what was staged. Another `load` starts afresh."""
        self._decoder.close()
        self._staging.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _load_by_ranges(self, item: MediaItem, meter: LoadMeter) -> DecodedMedia | None:
        """The media from a part of the object's bytes; None where that is not asked for, not worth it or doubtful."""
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

    def _load_whole(self, item: MediaItem, meter: LoadMeter) -> DecodedMedia:
        paths: list[str] = []
        with meter.fetching():
            for uri, size, etag in zip(item.uris, item.sizes, item.etags, strict=True):
                paths.append(self._staging.get(uri, size=size, etag=etag, keep=paths).path)
        try:
            return self._decode(item, paths, meter)
        except ItemError as error:
            _check_unchanged(item)
            raise ItemError(error.error_type, f"{_name(item)}: {error}", retryable=error.retryable) from error

    def _decode(self, item: MediaItem, paths: list[str], meter: LoadMeter) -> DecodedMedia:
        """With the configured decoder; what decord refuses or dies of, with PyAV in a fresh child."""
        decoder, per_request = self._media.decoder, self._pages_per_request
        try:
            with meter.child() as deadline_s:
                return self._decoder.load(
                    item.media_kind, paths, decoder=decoder, deadline_s=deadline_s, pages_per_request=per_request
                )
        except DecordFailedError as failure:
            if decoder == "decord":
                raise failure.error from failure
            with meter.child() as deadline_s:
                return self._decoder.load(item.media_kind, paths, decoder="pyav", deadline_s=deadline_s)


def _check_unchanged(item: MediaItem) -> None:
    """Local objects are read in place: what changed meanwhile must not pass for what the manifest names."""
    for uri, size, etag in zip(item.uris, item.sizes, item.etags, strict=True):
        if is_local(uri):
            check_unchanged(uri, size=size, etag=etag)


def _name(item: MediaItem) -> str:
    return item.uris[0] if len(item.uris) == 1 else f"{item.uris[0]} and {len(item.uris) - 1} more"
