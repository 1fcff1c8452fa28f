"""docs/rows.md: every column of a result part, from `pipeline.runs.row_schema` and the texts below."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from docs.generators.markdown import GENERATED, attributes, sentence, table
from pipeline.records import FIRST_SCHEMA_VERSION, LATER_COLUMNS, SCHEMA_VERSION
from pipeline.runs.row_schema import SCHEMA
from pipeline.tasks.document import PageRow


class Column(NamedTuple):
    """What is said of one column.

    Attributes:
        unit: ``s``, ``USD``, ``tokens``, ...; "" for text.
        meaning: one sentence.
        empty: when the value is null, or the zero or empty value that stands for "not measured".
    """

    unit: str
    meaning: str
    empty: str = "never"


_FAILED_ZERO = "0 where the item failed before the model answered"
GROUPS: dict[str, dict[str, Column]] = {
    "Which item": {
        "item_id": Column("", "The manifest's `item_id`, or a hash of addresses, sizes and ETags."),
        "uri": Column("", "Address of the item's first object."),
        "uris": Column("", "Addresses of all its objects: one, or the images of a set in order."),
        "media_kind": Column("", "`video`, `image`, `images` or `document`."),
        "media_etag": Column(
            "", "ETag of the first object when the manifest was frozen.", "null where the store gives none"
        ),
        "question_id": Column("", "The manifest's `question_id`.", "null where the manifest has none"),
        "prompt": Column("", "The text the model was asked, as the task worded it."),
        "options": Column("", "The choices of a multiple-choice question.", "null where there are none"),
        "category": Column(
            "", "The manifest's `category`; scores are given for each.", "null where the manifest has none"
        ),
        "fields": Column(
            "", "Every further column of your manifest, as text; goes in a later release, use `user_NAME`."
        ),
    },
    "What came out": {
        "status": Column(
            "",
            "`ok`; `partial`: truncated media (of a picture at least three quarters of the rows are there), a video some of whose frame times had to be mended, or a document some of whose pages failed, or are more than `media.max_pages`; `failed`; `erased`: by `illava erase`, with ids and counts alone.",
        ),
        "text": Column("", "The model's text.", "empty where the model gave no answer"),
        "candidates": Column(
            "",
            "All answers of `task.candidates`; `text` is the first. Of a document, each joined over its windows.",
            "null without `task.candidates`, and where the model gave no answer",
        ),
        "drafts": Column(
            "",
            "The answer before `task.refine` asked once more; `text` is the last. Of a document, joined over its windows.",
            "null without `task.refine`, and where the model gave no answer to the first turn",
        ),
        "answer": Column(
            "",
            "What the task reads out of the text: a letter, yes or no, a number.",
            "null for captions and documents, and where nothing could be read",
        ),
        "reference": Column("", "The manifest's reference answer.", "null where the manifest has none"),
        "score": Column(
            "0 to 1",
            "The answer against the reference by the task's metric.",
            "null without a reference, for metrics over a whole run, and where the item failed",
        ),
        "answer_logprob": Column(
            "nats",
            "Mean log-probability of the answer's tokens by the model itself, before temperature, penalties and grammars.",
            "null without `sampling.logprobs`, and where the model gave no answer",
        ),
        "option_probabilities": Column(
            "share",
            "Of each of `options`, or of yes and no for the metric `yes_no`: the probability that the answer begins with it, judged by its first token. What begins no option is the rest to 1.",
            "null without `sampling.logprobs`, for other questions, and where two options begin with the same token",
        ),
        "pages": Column("", "One entry a page, see below.", "null unless the job is `process_documents`"),
        "num_pages": Column(
            "pages",
            "Pages that the document has. Where they are more than `media.max_pages`, only the first stand in `pages`.",
            "null of what is no document, of failed loads and in parts of an earlier version",
        ),
        "finish_reason": Column(
            "",
            "`stop`: the model ended, or wrote a text of `sampling.stop`; `length`: cut at `sampling.max_new_tokens`; `loop`: the answer repeats itself, see `sampling.loop_tokens`.",
            "null where the model gave no answer",
        ),
        "error_type": Column("", "One of the types in [errors](errors.md).", "null unless `status` is `failed`"),
        "error_message": Column("", "What happened, where and why.", "null where `status` is `ok`"),
        "attempts": Column("tries", "Times the item was started in this attempt of the run."),
    },
    "What the model saw": {
        "decoder": Column(
            "", "`decord`, `pyav`, `pillow` or `pypdfium2`.", "empty where loading failed before one was chosen"
        ),
        "num_frames": Column("frames", "Frames, images or pages given to the model.", _FAILED_ZERO),
        "frame_timestamps_s": Column("s", "Time of each frame in the clip.", "empty for images and documents"),
        "num_patches": Column("tokens", "Tokens entering the vision tower.", _FAILED_ZERO),
        "num_patches_kept": Column(
            "tokens",
            "Tokens leaving it: what merging inside the tower left; 0 where the item failed before the model answered.",
            "null in parts of an earlier version",
        ),
        "num_vision_tokens": Column(
            "tokens", "Visual tokens the unreduced model would give its language model.", _FAILED_ZERO
        ),
        "num_vision_tokens_kept": Column(
            "tokens", "Kept tokens entering the language model's first layer.", _FAILED_ZERO
        ),
        "num_decoder_tokens_kept": Column("tokens", "Kept tokens in its last layer.", _FAILED_ZERO),
        "retention_ratio": Column(
            "share",
            "`num_decoder_tokens_kept / num_vision_tokens`: the share that every screen calls kept. Visual tokens in the language model's last layer, of those the unreduced model has there.",
            "null where the item failed before the model answered, and in parts of an earlier version",
        ),
        "kept_ratio": Column(
            "share",
            "`num_vision_tokens_kept / num_vision_tokens`: into the language model's first layer. 1 where a video's frames are pooled behind the tower and the plan merges in tower and language model only.",
            _FAILED_ZERO,
        ),
        "num_prompt_tokens": Column("tokens", "All tokens entering the language model, text included.", _FAILED_ZERO),
        "num_generated_tokens": Column("tokens", "Tokens drawn, the stop token included.", _FAILED_ZERO),
    },
    "What it took": {
        "bytes_fetched": Column(
            "bytes",
            "Bytes that crossed from the store for this item; 0 where another question's load brought the media.",
        ),
        "fetch_s": Column("s", "Store to the local cache."),
        "load_s": Column("s", "Media bytes to frames, the sandbox process included."),
        "preprocess_s": Column("s", "Frames to uint8 at model size."),
        "queue_s": Column("s", "Every wait between the stages, `model_wait_s` included."),
        "model_wait_s": Column(
            "s",
            "The part of `queue_s` in which no worker had its model loaded yet; 0 in one process, which loads it first.",
            "null in parts of an earlier version",
        ),
        "vision_s": Column(
            "s", "Vision tower, projector and layout: of the whole call, for each request in it.", _FAILED_ZERO
        ),
        "prefill_s": Column(
            "s", "Prefill of the language model: of the whole call, for each request in it.", _FAILED_ZERO
        ),
        "decode_s": Column("s", "First token to last, waiting for other requests' prefill included.", _FAILED_ZERO),
        "latency_s": Column(
            "s",
            "From the load being handed out to the outcome being seen; the seven stages above (`model_wait_s` is a part of one) sum to it.",
        ),
        "finished_at": Column(
            "",
            "When the row was made, by the driver's clock: ISO 8601 in UTC, to the millisecond.",
            "null in parts of an earlier version",
        ),
        "cpu_s": Column("s", "CPU seconds of the reader and its sandbox process, every try included."),
        "gpu_s": Column(
            "s",
            "The item's share, by tokens, of the time of each step of the model that it took part in; so named on a CPU too.",
            _FAILED_ZERO,
        ),
        "cost_usd": Column(
            "USD",
            "Its device seconds, CPU seconds and store requests at the configuration's `prices`; loading the model and idle time stand in `_RUN.json`.",
            "0 where no prices are set",
        ),
    },
    "Which run": {
        "model_id": Column("", "As in the configuration."),
        "model_revision": Column("", "Commit of the hub.", "null for a local folder"),
        "plan_digest": Column("", "Sixteen hex digits of the reduction plan; equal plans have equal digests."),
        "recipe_digest": Column("", "Digest of the config fingerprint: everything that can change a row's content."),
        "run_fingerprint": Column("", "Digest of config fingerprint, frozen manifest and shard size."),
        "shard_index": Column("", "The part the row stands in: `data/part-NNNNN.parquet`."),
    },
}
_HEAD = ("column", "type", "unit", "meaning", "null or empty")


def page() -> str:
    """The whole page.

    Raises:
        SystemExit: a column has no text here, or a text has no column.
    """
    told = {name: column for group in GROUPS.values() for name, column in group.items()}
    if missing := set(told) ^ {field.name for field in SCHEMA}:
        raise SystemExit(f"docs/generators/rows.py and pipeline/records.py: ResultRow differ in {sorted(missing)}")
    parts = [GENERATED, "# Rows", _INTRODUCTION]
    for title, group in GROUPS.items():
        rows = [_row(SCHEMA.field(name), column) for name, column in group.items()]
        parts += [f"## {title}", table(_HEAD, rows)]
    return (
        "\n\n".join(
            [
                *parts,
                "## Your own columns",
                _USER,
                "## An entry of `pages`",
                _PAGES,
                _pages_table(),
                "## Versions",
                _versions(),
            ]
        )
        + "\n"
    )


def _row(field: pa.Field, column: Column) -> tuple[str, ...]:
    if field.nullable != column.empty.startswith("null"):
        raise SystemExit(
            f"docs/generators/rows.py: {field.name} is nullable={field.nullable}, and its text says otherwise"
        )
    return f"`{field.name}`", _type(field.type), column.unit, column.meaning, column.empty


def _type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        inside = "page" if pa.types.is_struct(kind.value_type) else _type(kind.value_type)
        return f"list of {inside}"
    return "map of string to string" if pa.types.is_map(kind) else str(kind)


def _pages_table() -> str:
    said = attributes(PageRow.__doc__)
    entries = SCHEMA.field("pages").type.value_type
    rows = [
        (
            f"`{entry.name}`",
            str(entry.type),
            sentence(said[entry.name]),
            "may be null" if entry.nullable else "never null",
        )
        for entry in entries
    ]
    return table(("field", "type", "meaning", "null"), rows)


def _versions() -> str:
    text = f"Parts say the version of their columns in their metadata (`illava.schema_version`, now {SCHEMA_VERSION}; the oldest that is read is {FIRST_SCHEMA_VERSION}). A column is only ever added."
    later = [
        f"- `{name}` came with version {version}; it is null in older parts." for name, version in LATER_COLUMNS.items()
    ]
    return "\n".join([text, "", *later]).rstrip()


_INTRODUCTION = """\
A job writes one row for each item, failed ones included, into `OUTPUT/data/part-*.parquet`. A part is there whole or
not at all, so reading the folder is right at any moment of a run. Counts are read off tensor shapes while the model
runs; they are never computed from the plan. Seconds are wall time unless a column says CPU. [Operations](operations.md)
shows how to read the rows with pandas, DuckDB and `datasets`."""
_USER = """\
Behind these columns a part has one column `user_NAME` for every further column of your manifest, with the type that it
has there: numbers, booleans, dates and times, lists and structs of these and of text. JSON lines have a type where one
holds all values of a column; CSV has text alone. A missing value, NaN too, is null. Parts of a run that was begun before
this have none. The map `fields` has the same as text; it goes in a later release."""
_PAGES = """\
The column `pages` of a document has one entry for each page, in order. What the model answered to a window of pages
stands with the window's first page; text and counts of the other pages are null, so the pages' counts sum to the row's."""
