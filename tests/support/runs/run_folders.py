"""Makes small runs for tests: configurations over media that are never opened, and the rows of a job."""

from pipeline.config.schema import JobConfig
from pipeline.records import ResultRow
from pipeline.storage import storage


def make_config(model_folder, **sections):
    """A valid config; keyword sections replace or add keys."""
    base = {
        "input": {},
        "model": {"model_id": str(model_folder)},
        "task": {"kind": "caption", "prompt": "Describe."},
        "runtime": {"executor": "local", "gpus_per_actor": 0},
        "output": {"uri": "unset", "items_per_shard": 4},
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return JobConfig.model_validate(base)


def put_media(prefix, count, *, start=0):
    """Objects with media names below a prefix."""
    for number in range(start, start + count):
        storage.write_atomic(storage.join(prefix, f"clip-{number:03d}.mp4"), b"x" * (100 + number))


def put_manifest(root, name, content):
    """A manifest below a prefix; its URI."""
    uri = storage.join(root, name)
    storage.write_atomic(uri, content if isinstance(content, bytes) else content.encode())
    return uri


def make_row(run, shard_index, item, **changes):
    """Make the row that a worker would make of an item."""
    values = {
        "item_id": item.item_id,
        "uri": item.uris[0],
        "uris": item.uris,
        "media_kind": item.media_kind,
        "media_etag": item.etags[0] or None,
        "question_id": item.question_id,
        "prompt": item.prompt or run.config.task.prompt,
        "options": item.options,
        "category": item.category,
        "text": f"text of {item.item_id}",
        "candidates": (f"text of {item.item_id}", "another"),
        "drafts": ("a draft",),
        "answer": None,
        "reference": item.reference,
        "score": None,
        "answer_logprob": -0.25,
        "option_probabilities": (0.5, 0.25),
        "pages": None,
        "num_pages": None,
        "fields": item.fields,
        "status": "ok",
        "error_type": None,
        "error_message": None,
        "attempts": 1,
        "finish_reason": "stop",
        "decoder": "decord",
        "num_frames": 8,
        "frame_timestamps_s": tuple(n / 2 for n in range(8)),
        "bytes_fetched": max(item.sizes[0], 0),
        "num_patches": 8 * 729,
        "num_patches_kept": 8 * 361,
        "num_vision_tokens": 1568,
        "num_vision_tokens_kept": 800,
        "num_decoder_tokens_kept": 560,
        "kept_ratio": 800 / 1568,
        "retention_ratio": 560 / 1568,
        "num_prompt_tokens": 830,
        "num_generated_tokens": 20,
        "fetch_s": 0.1,
        "load_s": 0.2,
        "preprocess_s": 0.1,
        "queue_s": 0.3,
        "model_wait_s": 0.2,
        "vision_s": 0.1,
        "prefill_s": 0.1,
        "decode_s": 0.1,
        "latency_s": 1.0,
        "finished_at": "2026-11-30T14:00:00.000+00:00",
        "cpu_s": 0.3,
        "gpu_s": 0.2,
        "cost_usd": 0.001,
        "model_id": run.config.model.model_id,
        "model_revision": run.config.model.revision,
        "plan_digest": run.config.reduction.digest(),
        "recipe_digest": run.config_fingerprint.digest,
        "run_fingerprint": run.fingerprint,
        "shard_index": shard_index,
    }
    return ResultRow(**{**values, **changes})


def failed_row(run, shard_index, item, error_type="corrupt_media"):
    """The row of an item that could not be read."""
    nothing = dict.fromkeys(
        ("num_frames", "num_patches", "num_vision_tokens", "num_vision_tokens_kept", "num_decoder_tokens_kept"), 0
    )
    nothing |= {"num_patches_kept": 0, "retention_ratio": None}
    seconds = dict.fromkeys(("queue_s", "model_wait_s", "vision_s", "prefill_s", "decode_s", "latency_s", "gpu_s"), 0.0)
    return make_row(
        run,
        shard_index,
        item,
        status="failed",
        error_type=error_type,
        error_message="cannot be decoded",
        text="",
        finish_reason=None,
        frame_timestamps_s=(),
        kept_ratio=0.0,
        num_prompt_tokens=0,
        num_generated_tokens=0,
        **nothing,
        **seconds,
    )


def shard_rows(run, shard_index):
    """Rows of a whole shard; every tenth item fails."""
    items = run.shard(shard_index).items
    first = shard_index * run.items_per_shard
    return [
        failed_row(run, shard_index, item) if (first + n) % 10 == 9 else make_row(run, shard_index, item)
        for n, item in enumerate(items)
    ]


def complete(run, *, shards=None):
    """Publish shards (all pending ones if not named) as a runner would, and finish if none is left."""
    from pipeline.runs.parquet_sink import ParquetSink
    from pipeline.runs.run import finish, pending_shards

    sink = ParquetSink(run)
    for index in pending_shards(run) if shards is None else shards:
        sink.publish(index, shard_rows(run, index))
    if not pending_shards(run):
        finish(run, {"wall_s": 1.0})
