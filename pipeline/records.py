"""Defines the records that travel: an item, the item loaded, the row it becomes, the shard.

Also holds the closed list of row error types. Plain frozen data; imports neither storage, Ray nor models.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from illava.preprocess import VisualInput

MediaKind = Literal["video", "image", "images", "document"]
SCHEMA_VERSION = 3  # of `ResultRow`; stands in every part's metadata, and changes no run's fingerprint
FIRST_SCHEMA_VERSION = 2  # the oldest whose parts are read
# Column (or ``pages.NAME``) -> the version that brought it: null in older parts, so it may be null. An entry raises the
# version.
LATER_COLUMNS: dict[str, int] = {
    "answer_logprob": 3,
    "option_probabilities": 3,
    "num_patches_kept": 3,
    "retention_ratio": 3,
    "candidates": 3,
    "drafts": 3,
    "model_wait_s": 3,
    "finished_at": 3,
    "num_pages": 3,
}


RowStatus = Literal["ok", "partial", "failed", "erased"]
UNANSWERED = frozenset({"failed", "erased"})  # statuses of rows without an answer
RowErrorType = Literal[
    "unsafe_uri",  # scheme or path outside what is allowed
    "not_found",  # the store has no such object
    "access_denied",  # the store refused this object
    "store_error",  # the store kept failing
    "changed_object",  # size or ETag differ from the manifest's
    "too_large",  # over a budget of bytes, pixels, duration or images
    "empty_media",  # zero bytes, or no frames
    "unsupported_media",  # container or picture format that is not allowed
    "no_video_stream",  # sound, subtitles or data only
    "corrupt_media",  # cannot be decoded
    "encrypted_document",  # opens with a password only
    "encrypted_video",  # needs a key (DRM)
    "dynamic_form",  # an XFA form, whose pages only its own reader makes
    "load_timeout",  # deadline passed; the child was killed
    "load_crashed",  # the decoder's child process died
    "load_out_of_memory",  # the child hit its memory limit
    "media_lost",  # loaded, and gone before the model saw them, repeatedly
    "bad_request",  # the model cannot take this prompt and media
    "prompt_too_long",  # prompt, media and answer are longer than the model's positions
    "cache_too_small",  # more tokens than the whole KV cache holds
    "out_of_memory",  # too large for the device even alone
    "numerical_error",  # logits not finite
    "invalid_answer",  # not the JSON that the task's schema asks for, or none of the grammar
    "reduction_did_not_fire",  # a configured reduction removed nothing
    "worker_died",  # the item ended its worker repeatedly
    "item_timeout",  # never returned
    "internal_error",  # a defect; the message names it
]
ROW_ERROR_TYPES: tuple[str, ...] = get_args(RowErrorType)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Describes one stored object.

    Attributes:
        uri: in normal form.
        size: bytes.
        etag: entity tag without quotes, ``mtime:<ns>`` for a local file, "" where the store gives none.
    """

    uri: str
    size: int
    etag: str


# Neighbours of the manifest that are equal in these are served by one load: the same objects in the same versions, read
# in the same way.
LOAD_FIELDS = ["media_kind", "uris", "sizes", "etags"]


@dataclass(frozen=True, slots=True)
class MediaItem:
    """Holds one line of the frozen manifest: one request's media and one question.

    Attributes:
        item_id: the user's id, or a hash of URIs, sizes and etags.
        uris: one object, or the images of a set in order.
        media_kind: what the objects are.
        sizes: bytes of each object at manifest time, -1 where the listing did not say.
        etags: entity tag (or ``mtime:<ns>``) of each object at manifest time, "" where unknown.
        prompt: overrides the task's prompt.
        question_id, options, reference, category: for question answering.
        fields: every other column of the user's manifest, as text.
        passwords: of an encrypted PDF, to be tried in order; for its reader alone, and never written.
    """

    item_id: str
    uris: tuple[str, ...]
    media_kind: MediaKind
    sizes: tuple[int, ...]
    etags: tuple[str, ...]
    prompt: str | None = None
    question_id: str | None = None
    options: tuple[str, ...] | None = None
    reference: str | None = None
    category: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    passwords: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Shard:
    """Groups consecutive items of the manifest that are published as one Parquet object."""

    index: int
    items: tuple[MediaItem, ...]


@dataclass(frozen=True, slots=True)
class LoadStats:
    """Counts what loading one item took; durations on the reader's own clock.

    Attributes:
        fetch_s: object storage to the local cache.
        load_s: media bytes to frames, child process included.
        preprocess_s: frames to uint8 at model size.
        cpu_s: CPU seconds of reader and child for this item.
        bytes_fetched: bytes that crossed from the store.
        storage_requests: requests made to the store.
        decoder: ``decord``, ``pyav``, ``pillow`` or ``pypdfium2``; "" where loading failed before one was chosen.
    """

    fetch_s: float = 0.0
    load_s: float = 0.0
    preprocess_s: float = 0.0
    cpu_s: float = 0.0
    bytes_fetched: int = 0
    storage_requests: int = 0
    decoder: str = ""

    def of_shared_load(self) -> LoadStats:
        """Of an item whose media another item's load brought: it only waited."""
        return LoadStats(decoder=self.decoder)


@dataclass(frozen=True, slots=True)
class FailedPage:
    """Names a page of a document that could not be rendered or read; its neighbours could.

    Attributes:
        page: from 0.
        error_type, message: as a failed row has them.
    """

    page: int
    error_type: RowErrorType
    message: str


@dataclass(frozen=True, slots=True)
class LoadedItem:
    """Carries an item with its media at model size from a reader to a VLM actor.

    Attributes:
        item: as in the manifest.
        media: one entry a medium, uint8 at model size (`illava.preprocess.VisualInput`).
        frame_timestamps_s: of every frame given to the model; empty for images.
        stats: what loading took.
        partial: why fewer frames than asked for were decoded (a truncated file); None when complete.
        failed_pages: pages of a document that are not among the media.
        page_notes: what `partial` says of a document beside its failed pages.
        num_pages: pages that a document has, those over ``max_pages`` too; None of what is none.
    """

    item: MediaItem
    media: tuple[VisualInput, ...]
    frame_timestamps_s: tuple[float, ...]
    stats: LoadStats
    partial: str | None = None
    failed_pages: tuple[FailedPage, ...] = ()
    page_notes: str | None = None
    num_pages: int | None = None

    def for_item(self, item: MediaItem) -> LoadedItem:
        """The same media for an item that asks about them too: what loading took stands with the first one."""
        if item.item_id == self.item.item_id:
            return self
        return replace(self, item=item, stats=self.stats.of_shared_load())

    @property
    def nbytes(self) -> int:
        return sum(mm_item.nbytes for mm_item in self.media)


@dataclass(frozen=True, slots=True)
class ResultRow:
    """Holds one Parquet row; field names and order are the schema (see `pipeline.runs.parquet_sink`)."""

    item_id: str
    uri: str
    uris: tuple[str, ...]
    media_kind: str
    media_etag: str | None
    question_id: str | None
    prompt: str
    options: tuple[str, ...] | None
    category: str | None
    text: str
    candidates: tuple[str, ...] | None
    drafts: tuple[str, ...] | None
    answer: str | None
    reference: str | None
    score: float | None
    answer_logprob: float | None
    option_probabilities: tuple[float, ...] | None
    pages: tuple[dict, ...] | None
    num_pages: int | None
    fields: dict[str, str]
    status: RowStatus
    error_type: str | None
    error_message: str | None
    attempts: int
    finish_reason: str | None
    decoder: str
    num_frames: int
    frame_timestamps_s: tuple[float, ...]
    bytes_fetched: int
    num_patches: int
    num_patches_kept: int | None
    num_vision_tokens: int
    num_vision_tokens_kept: int
    num_decoder_tokens_kept: int
    kept_ratio: float
    retention_ratio: float | None
    num_prompt_tokens: int
    num_generated_tokens: int
    fetch_s: float
    load_s: float
    preprocess_s: float
    queue_s: float
    model_wait_s: float | None
    vision_s: float
    prefill_s: float
    decode_s: float
    latency_s: float
    finished_at: str | None
    cpu_s: float
    gpu_s: float
    cost_usd: float
    model_id: str
    model_revision: str | None
    plan_digest: str
    recipe_digest: str
    run_fingerprint: str
    shard_index: int
