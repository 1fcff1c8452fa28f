"""Damages a finished run of three shards; each kind of damage comes with the violation that must name it."""

import dataclasses
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.inputs.manifest import freeze, manifest_bytes
from pipeline.runs.parquet_sink import SCHEMA, part_name
from pipeline.storage import storage
from tests.support.runs.run_folders import shard_rows


def part_path(run, index=0):
    return os.path.join(run.uri, "data", part_name(index))


def edit_json(name, **changes):
    def damage(run):
        path = os.path.join(run.uri, name)
        with open(path) as file:
            content = json.load(file)
        for key, value in changes.items():
            place, *inner = key.split("__")
            if inner:
                content[place][inner[0]] = value
            else:
                content[place] = value
        storage.write_atomic(path, json.dumps(content).encode())

    return damage


def edit_rows(change, index=0):
    """Write a part again with changed plain rows, everything else as it was."""

    def damage(run):
        table = pq.read_table(part_path(run, index))
        rows = change(table.to_pylist())
        schema = SCHEMA.with_metadata(table.schema.metadata)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part_path(run, index))

    return damage


def set_value(index=0, row=0, **values):
    def change(rows):
        rows[row] |= values
        return rows

    return edit_rows(change, index)


def edit_metadata(**changes):
    def damage(run):
        table = pq.read_table(part_path(run))
        metadata = {**table.schema.metadata, **{f"illava.{k}".encode(): v.encode() for k, v in changes.items()}}
        pq.write_table(table.replace_schema_metadata(metadata), part_path(run))

    return damage


def on_file(index, action):
    return lambda run: action(part_path(run, index))


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 20)


def flip_a_byte(path, seed=0):
    """Somewhere in the rows; the footer is another matter."""
    with open(path, "rb") as file:
        file.seek(-8, 2)
        end_of_rows = file.tell() - int.from_bytes(file.read(4), "little")
    _flip(path, random.Random(seed).randrange(4, end_of_rows))


def flip_a_byte_of_a_page(path):
    """The last one of the first column: in no page's header, whose bytes are not all used."""
    column = pq.read_metadata(path).row_group(0).column(0)
    _flip(path, (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1)


def _flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))


def drop_column(path):
    pq.write_table(pq.read_table(path).drop_columns(["text"]), path)


def empty(path):
    with open(path, "wb"):
        pass


def another_runs_part(run):
    other = dataclasses.replace(run, fingerprint="f" * 32)
    rows = [dataclasses.replace(row, run_fingerprint="f" * 32) for row in shard_rows(run, 0)]
    object.__setattr__(other, "nonce", run.nonce)
    from pipeline.runs.parquet_sink import _part_bytes

    storage.write_atomic(part_path(run), _part_bytes(rows, other.part_metadata(0), "zstd"))


def swap_parts(run):
    a, b = storage.read(part_path(run, 0)), storage.read(part_path(run, 1))
    storage.write_atomic(part_path(run, 0), b)
    storage.write_atomic(part_path(run, 1), a)


def shorten_manifest(run):
    table = run.manifest.table.slice(0, 9)
    data = manifest_bytes(freeze({name: table[name] for name in table.column_names}))
    storage.write_atomic(os.path.join(run.uri, f"manifest-{run.manifest.digest}.parquet"), data)


def touch(name):
    return lambda run: storage.write_atomic(os.path.join(run.uri, name), b"x")


def leave_temporary(run):
    with open(os.path.join(run.uri, "data", ".part-00000.parquet~host~1~00.tmp"), "wb"):
        pass


def late_writer_after_a_retry(run):
    """Shard 2 was made anew by attempt 2; then a writer of attempt 1 put its older part back."""
    edit_json("run.json", attempt=2, retried_shards={"2": [2]})(run)
    edit_json("_RUN.json", attempt=2)(run)


DAMAGES = {
    "run_file_gone": (lambda run: os.unlink(os.path.join(run.uri, "run.json")), "run_file"),
    "run_file_garbage": (touch("run.json"), "run_file"),
    "run_file_wrong_type": (edit_json("run.json", items_per_shard="4"), "run_file"),
    "recipe_edited": (edit_json("run.json", recipe__seed=7), "fingerprint"),
    "fingerprint_edited": (edit_json("run.json", fingerprint="0" * 32), "fingerprint"),
    "shard_size_edited": (edit_json("run.json", items_per_shard=5), "fingerprint"),
    "manifest_gone": (
        lambda run: os.unlink(os.path.join(run.uri, f"manifest-{run.manifest.digest}.parquet")),
        "manifest",
    ),
    "manifest_shortened": (shorten_manifest, "manifest"),
    "part_gone": (on_file(1, os.unlink), "missing_part"),
    "part_truncated": (on_file(0, truncate), "unreadable_part"),
    "part_empty": (on_file(0, empty), "unreadable_part"),
    "part_with_a_flipped_byte": (on_file(0, flip_a_byte_of_a_page), "unreadable_part"),
    "part_with_a_column_less": (on_file(0, drop_column), "wrong_schema"),
    "part_of_another_run": (another_runs_part, "foreign_part"),
    "parts_swapped": (swap_parts, "foreign_part"),
    "part_of_another_manifest": (edit_metadata(manifest_digest="0"), "foreign_part"),
    "part_of_another_schema_version": (edit_metadata(schema_version="0"), "foreign_part"),
    "part_of_a_newer_program": (edit_metadata(schema_version="99"), "newer_schema"),
    "part_of_a_later_attempt": (edit_metadata(attempt="2"), "stale_part"),
    "part_of_a_late_writer": (late_writer_after_a_retry, "stale_part"),
    "part_too_many": (touch("data/part-00003.parquet"), "foreign_object"),
    "object_between_the_parts": (touch("data/notes.txt"), "foreign_object"),
    "object_in_the_folder": (touch("notes.txt"), "foreign_object"),
    "temporary_file": (leave_temporary, "temporary_file"),
    "row_gone": (edit_rows(lambda rows: rows[1:]), "missing_row"),
    "row_doubled": (edit_rows(lambda rows: [*rows, rows[0]]), "duplicate_row"),
    "row_of_nobody": (set_value(item_id="nobody"), "foreign_row"),
    "rows_in_another_order": (edit_rows(lambda rows: rows[::-1]), "wrong_order"),
    "row_of_another_fingerprint": (set_value(run_fingerprint="0"), "foreign_value"),
    "row_of_another_recipe": (set_value(recipe_digest="0"), "foreign_value"),
    "row_of_another_plan": (set_value(plan_digest="0"), "foreign_value"),
    "row_of_another_model": (set_value(model_id="0"), "foreign_value"),
    "row_of_another_shard": (set_value(shard_index=2), "foreign_value"),
    "row_with_another_address": (set_value(uri="/other.mp4"), "differs_from_manifest"),
    "row_with_other_fields": (set_value(fields=[("a", "b")]), "differs_from_manifest"),
    "failure_without_a_type": (set_value(index=2, row=1, error_type=None), "bad_status"),
    "failure_of_an_unknown_type": (set_value(index=2, row=1, error_type="oops"), "bad_status"),
    "failure_without_a_message": (set_value(index=2, row=1, error_message=None), "bad_status"),
    "success_with_an_error": (set_value(error_type="not_found"), "bad_status"),
    "unknown_status": (set_value(status="done"), "bad_status"),
    "answer_without_a_reason": (set_value(finish_reason=None), "bad_status"),
    "partial_without_a_reason": (set_value(status="partial"), "bad_status"),
    "no_attempt": (set_value(attempts=0), "bad_status"),
    "more_kept_than_there_are": (set_value(num_vision_tokens_kept=1569, num_prompt_tokens=2000), "bad_counts"),
    "decoder_keeps_more": (set_value(num_decoder_tokens_kept=801), "bad_counts"),
    "negative_count": (set_value(num_patches=-1), "bad_counts"),
    "ratio_of_other_counts": (set_value(kept_ratio=0.9), "bad_counts"),
    "retention_of_other_counts": (set_value(retention_ratio=0.9), "bad_counts"),
    "no_retention_of_an_answer": (set_value(retention_ratio=None), "bad_counts"),
    "more_patches_out_than_in": (set_value(num_patches_kept=8 * 729 + 1), "bad_counts"),
    "prompt_shorter_than_its_tokens": (set_value(num_prompt_tokens=100), "bad_counts"),
    "answer_without_tokens": (set_value(num_generated_tokens=0), "bad_counts"),
    "negative_seconds": (set_value(decode_s=-0.1), "bad_seconds"),
    "seconds_not_finite": (set_value(gpu_s=float("nan")), "bad_seconds"),
    "more_wait_for_the_model_than_wait": (set_value(model_wait_s=0.4), "bad_seconds"),
    "negative_cost": (set_value(cost_usd=-1.0), "bad_seconds"),
    "logprob_above_zero": (set_value(answer_logprob=0.1), "bad_probabilities"),
    "logprob_not_finite": (set_value(answer_logprob=float("-inf")), "bad_probabilities"),
    "share_above_one": (set_value(option_probabilities=[0.1, 1.2]), "bad_probabilities"),
    "share_not_a_number": (set_value(option_probabilities=[0.1, float("nan")]), "bad_probabilities"),
    "shares_above_one": (set_value(option_probabilities=[0.7, 0.6]), "bad_probabilities"),
    "shares_of_other_options": (set_value(option_probabilities=[0.1, 0.1, 0.1]), "bad_probabilities"),
    "timestamps_too_few": (set_value(frame_timestamps_s=[0.0]), "bad_seconds"),
    "timestamps_backwards": (set_value(frame_timestamps_s=[1.0] * 7 + [0.0]), "bad_seconds"),
    "stages_do_not_sum": (edit_rows(lambda rows: [row | {"queue_s": 0.5} for row in rows]), "stage_seconds"),
    "not_finished": (lambda run: os.unlink(os.path.join(run.uri, "_RUN.json")), "unfinished"),
    "finished_file_garbage": (touch("_RUN.json"), "finished_file"),
    "finished_file_of_another_run": (edit_json("_RUN.json", fingerprint="0"), "finished_file"),
    "finished_file_with_fewer_items": (edit_json("_RUN.json", num_items=9), "finished_file"),
    "totals_edited": (edit_json("_RUN.json", totals__by_status={"ok": 10}), "wrong_totals"),
    "cost_edited_in_a_row": (set_value(cost_usd=0.5), "wrong_totals"),
    "failure_hidden": (
        set_value(
            index=2,
            row=1,
            status="ok",
            error_type=None,
            finish_reason="stop",
            num_frames=8,
            num_patches=8,
            num_generated_tokens=3,
            latency_s=0.4,
        ),
        "wrong_totals",
    ),
}
