"""Says which failures another night would only repeat: the medium's own, under limits that stand as before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.schema import JobConfig
from pipeline.inputs.passwords import has_password_for_all

# Of the medium's bytes, or of limits that are in the config fingerprint. A mended file has another ETag.
PERMANENT = frozenset(
    {
        "empty_media",
        "unsupported_media",
        "no_video_stream",
        "corrupt_media",
        "encrypted_document",
        "encrypted_video",
        "dynamic_form",
        "bad_request",
    }
)
# Permanent while these keys are what they were; they change no row that can be made, so no fingerprint has them.
PERMANENT_UNDER: dict[str, tuple[str, ...]] = {
    "too_large": ("runtime.cache_bytes", "runtime.num_reader_actors"),
    "cache_too_small": ("model.kv_cache_bytes",),
    "prompt_too_long": ("model.kv_cache_bytes",),  # of runs in which it was the cache, too
}


def permanent_types(recorded: Mapping[str, Any], config: JobConfig) -> frozenset[str]:
    """Return the error types that a job would only meet again.

    Args:
        recorded: the earlier run's configuration, as ``run.json`` has it.
        config: the present job.
    """
    now = config.model_dump(mode="json")
    same = {name for name, keys in PERMANENT_UNDER.items() if all(_at(recorded, key) == _at(now, key) for key in keys)}
    opened = {"encrypted_document"} if has_password_for_all() else set[str]()
    return (PERMANENT - opened) | same


def _at(data: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return (data.get(section) or {}).get(name)
