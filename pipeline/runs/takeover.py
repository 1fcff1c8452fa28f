"""Lets a job take over a folder in which another one began and published nothing: its first start failed.

A driver that is alive after all loses no row: it reads ``run.json`` again before each part, and publishes none in a
folder that is not its own any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.errors import RefusedError
from pipeline.runs.parquet_sink import list_parts
from pipeline.runs.run_folder import Run, is_finished, manifest_uri
from pipeline.runs.run_record import RUN_FILE, read_run_file
from pipeline.runs.sessions import FOLDER, may_be_alive, unended_sessions
from pipeline.storage import storage

logger = logging.getLogger(__name__)


class OtherRunError(RefusedError):
    """The folder holds a run of another configuration or another input."""


def resume_or_replace(run: Run, found: dict[str, Any], resume: Callable[[], Run]) -> Run:
    """Resume the run in the folder, or plan to replace one that never published a part.

    Args:
        run: as this job would create it.
        found: content of ``run.json``.
        resume: resumes it.

    Raises:
        RefusedError: as ``resume``; or a driver of the other run may still be at work.
    """
    try:
        return resume()
    except OtherRunError as mismatch:
        if list_parts(run.uri) or is_finished(run.uri) or found["attempt"] != 1:
            raise
        file = _of_a_living_driver(run.uri, found)
        if file:
            raise OtherRunError(
                f"{mismatch}\nIt has no part yet, and could be taken over, but a job may still be at work there: "
                f"{file} names its machine and process. If it has ended, delete that file, and run this command again"
            ) from mismatch
        return replace(run, replaces=found["nonce"])


def _of_a_living_driver(uri: str, found: dict[str, Any]) -> str:
    """Return the file that names a driver which may be at work in a run folder; "" where there is none.

    Until the driver that created the run has written its session, ``run.json`` alone names it.
    """
    alive = [name for name, driver in unended_sessions(uri) if may_be_alive(driver)]
    if alive:
        return storage.join(uri, FOLDER, f"{alive[0]}.json")
    starts = not any(name.endswith(".json") for name in storage.list_names(storage.join(uri, FOLDER)))
    return storage.join(uri, RUN_FILE) if starts and found.get("driver") and may_be_alive(found["driver"]) else ""


def clear_replaced(run: Run) -> None:
    """Remove what the replaced run wrote: its record first, then its sessions and its manifest.

    Nothing is removed where the folder holds yet another run by now, or parts.
    """
    if not storage.exists(storage.join(run.uri, RUN_FILE)):
        return
    found = read_run_file(run.uri)
    if found["nonce"] != run.replaces or list_parts(run.uri):
        return
    logger.info("%s: a run of another configuration began here and published nothing; this one takes over", run.uri)
    storage.delete(storage.join(run.uri, RUN_FILE))
    for name in storage.list_names(storage.join(run.uri, FOLDER)):
        storage.delete(storage.join(run.uri, FOLDER, name))
    if found["manifest_digest"] != run.manifest.digest:
        storage.delete(manifest_uri(run.uri, found["manifest_digest"]))
