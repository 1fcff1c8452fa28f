"""Reads and writes local folders and object stores through the same few functions; the only file that imports fsspec.

The client libraries retry requests with bounded exponential backoff (500, 502, 503, 504, throttling, timeouts;
``AWS_MAX_ATTEMPTS`` is honoured). A body that ends early is read again here. Endpoint, region and credentials come from
the environment, never from a configuration.

A read that fails raises `ItemError`. A listing or a write that fails raises `StorageError`. Missing or expired
credentials raise `CredentialsError` everywhere, so that a run stops instead of failing every item.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.utils import glob_translate

from pipeline.errors import ItemError, MissingPackageError, StorageError
from pipeline.faults import fault_point
from pipeline.missing_packages import install_extra
from pipeline.records import ObjectInfo
from pipeline.storage import local_files
from pipeline.storage.errors import body_ended_early, is_asked_to_wait, item_error, storage_error
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.uris import check_uri, folder_uri, is_local, join, local_path, printable, scheme

__all__ = [
    "Fetched",
    "ObjectInfo",
    "can_read_ranges",
    "check_uri",
    "create_exclusive",
    "delete",
    "exists",
    "fetch",
    "folder_uri",
    "is_local",
    "join",
    "list_names",
    "list_objects",
    "list_split",
    "local_path",
    "read",
    "read_range",
    "read_ranges",
    "stat",
    "sweep_temporaries",
    "temporaries",
    "write_atomic",
    "write_stream",
]

_TRIES = 3
_RETRY_S = 0.2
_SETTLE_S = 2.0
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_MAX_ATTEMPTS",
)
Result = TypeVar("Result")


class Fetched(NamedTuple):
    """Counts the bytes of a copy, and the requests it took."""

    num_bytes: int
    num_requests: int


def list_objects(prefix: str, pattern: str = "**/*") -> list[ObjectInfo]:
    """List the objects below a prefix whose relative name matches a glob, sorted by URI; otherwise as `list_split`."""
    return list_split(prefix, pattern)[0]


def list_split(prefix: str, pattern: str) -> tuple[list[ObjectInfo], list[ObjectInfo], int]:
    """List the objects below a prefix that a glob matches, the others, and how many of these its case alone keeps out.

    Args:
        prefix: folder or key prefix of whole segments; a single object lists itself, whatever the pattern.
        pattern: ``*``, ``?``, ``[...]`` within a segment, ``**`` as a segment for any number of segments.

    Raises:
        StorageError: the folder or bucket does not exist or cannot be listed.
    """
    base = check_uri(prefix).rstrip("/")
    try:
        glob = glob_translate(pattern)
        matches, in_any_case = re.compile(glob).match, re.compile(glob, re.IGNORECASE).match
    except ValueError as error:
        raise StorageError(f"pattern {printable(pattern)}: {error}") from error
    found = sorted(_on_store("list", base, lambda: _backend(base).find(base)), key=lambda info: info.uri)
    start = len(base) + 1
    kept: list[ObjectInfo] = []
    others: list[ObjectInfo] = []
    for info in found:
        (kept if info.uri == base or matches(info.uri[start:]) else others).append(info)
    return kept, others, sum(in_any_case(info.uri[start:]) is not None for info in others)


def list_names(prefix: str) -> list[str]:
    """List the names directly below a prefix, sorted; folders end in a slash; empty where the prefix does not exist."""
    uri = check_uri(prefix).rstrip("/")
    return sorted(_on_store("list", uri, lambda: _backend(uri).names(uri)))


def stat(uri: str) -> ObjectInfo:
    """Return size and entity tag of one object.

    Raises:
        ItemError: ``not_found``, ``access_denied`` or ``store_error``.
    """
    uri = check_uri(uri)
    return _on_object("stat", uri, lambda: _backend(uri).info(uri))


def exists(uri: str) -> bool:
    """Whether the object exists; raises as `stat` does where the store gives no clear answer."""
    try:
        stat(uri)
    except ItemError as error:
        if error.error_type == "not_found":
            return False
        raise
    return True


def read(uri: str) -> bytes:
    """Read all bytes of one object. Raises as `stat` does."""
    uri = check_uri(uri)
    return _on_object("read", uri, lambda: _backend(uri).read(uri))


def read_range(uri: str, start: int, end: int) -> bytes:
    """Read the bytes ``start`` up to, not including, ``end``; fewer where the object ends. Raises as `stat` does."""
    uri = check_uri(uri)
    if not 0 <= start <= end:
        raise ValueError(f"read_range needs 0 <= start <= end; got {start}, {end}")
    return _on_object("read", uri, lambda: _backend(uri).read(uri, start, end)) if start < end else b""


def fetch(uri: str, path: str, *, etag: str = "", verify_md5: bool = True) -> Fetched:
    """Stream an object into a local file, and compare its checksum where the store gives one.

    Args:
        uri: address of the object.
        path: the file to write; incomplete where this function raises.
        etag: the entity tag that the object must have; "" accepts any.
        verify_md5: whether to compare the MD5 with the entity tag, where that is an MD5 by S3's rule.

    Raises:
        ItemError: as `stat`; ``changed_object`` where the tag differs; ``store_error`` where the body repeatedly
            differs from its announced length or checksum.
    """
    uri = check_uri(uri)
    if pinned := _backend(uri).pinned(uri, etag):
        return Fetched(_on_object("fetch", uri, lambda: pinned.copy(path, verify_md5=verify_md5)), 1)
    size = _on_object("fetch", uri, lambda: _backend(uri).copy(uri, path))
    if not etag:
        return Fetched(size, 1)
    now = stat(uri)
    if (now.etag, now.size) != (etag, size):
        raise ItemError("changed_object", f"fetch {uri}: expected etag {etag}, found {now.etag} ({now.size} bytes)")
    return Fetched(size, 2)


def can_read_ranges(uri: str) -> bool:
    """Whether `read_ranges` can pin one version of an object in this store."""
    return _backend(check_uri(uri)).pinned(uri, "") is not None


def read_ranges(uri: str, ranges: Sequence[tuple[int, int]], *, size: int, etag: str) -> list[bytes]:
    """Read the bytes of each half-open range, all of the version with this size and tag.

    Raises:
        ItemError: as `fetch`. No bytes are returned where one answer is of another version.
    """
    uri = check_uri(uri)
    if not all(0 <= start < end <= size for start, end in ranges) or not etag:
        raise ValueError(f"read_ranges needs 0 <= start < end <= {size} and a tag; got {etag!r}, {list(ranges)}")
    pinned = _backend(uri).pinned(uri, etag)
    return _on_object("read", uri, lambda: pinned.read_ranges(ranges, size=size)) if ranges else []


def write_atomic(uri: str, data: bytes) -> None:
    """Write a whole object under its name, completely or not at all.

    Local: a temporary file in the same folder, fsync, rename, fsync of the folder. Object store: one PUT (above 100 MB,
    a multipart upload that is completed once).

    Raises:
        StorageError: the write failed, for the reason in the message; what the name showed before is unchanged.
    """
    uri = check_uri(uri)
    _on_store("write", uri, lambda: _backend(uri).write(uri, data))


def write_stream(uri: str, chunks: Iterable[bytes]) -> None:
    """Write chunks one after the other as one object, completely or not at all; memory holds one chunk at a time.

    For an object store they are gathered in a temporary file, which is then sent.

    Raises:
        StorageError: as `write_atomic`; what ``chunks`` raises passes through.
    """
    uri = check_uri(uri)
    if is_local(uri):
        _on_store("write", uri, lambda: local_files.write_stream(uri, chunks))
        return
    with tempfile.NamedTemporaryFile(prefix="illava-") as file:
        file.writelines(chunks)
        file.flush()
        _on_store("write", uri, lambda: _backend(uri).upload(file.name, uri))


def create_exclusive(uri: str, data: bytes) -> bool:
    """Create an object only if it is absent: True if it now holds this call's data, False if another caller was first.

    Local: a hard link of a complete file, which exactly one caller can make. Object store: a conditional PUT, where a
    probe shows that the store honours the condition. Elsewhere the object is written, and read back after two seconds.
    Of two callers the last writer then wins, and both see the same winner, unless one of them stalls for longer than
    that between its check and its write. The data must name its writer, or two callers cannot be told apart.

    Raises:
        StorageError: the object could not be created or checked.
    """
    uri = check_uri(uri)
    created = _on_store("create", uri, lambda: _backend(uri).create(uri, data))
    if created is None:
        write_atomic(uri, data)
        time.sleep(_SETTLE_S)
        created = read(uri) == data
    return created


def delete(uri: str) -> None:
    """Remove one object; a missing object is no error."""
    uri = check_uri(uri)

    def remove() -> None:
        try:
            _backend(uri).delete(uri)
        except FileNotFoundError:
            return

    _on_store("delete", uri, remove)


def temporaries(prefix: str) -> list[str]:
    """List the temporary files below a local folder; an object store has none."""
    return local_files.temporaries(local_path(prefix)) if is_local(prefix) else []


def sweep_temporaries(prefix: str) -> list[str]:
    """Remove the temporary files that dead writers of this host left below a local folder; return their paths."""
    return local_files.sweep(local_path(prefix)) if is_local(prefix) else []


def _backend(uri: str) -> Any:
    if is_local(uri):
        return local_files
    return _open_store(scheme(uri), os.getpid(), tuple(os.environ.get(name) for name in _ENVIRONMENT))


@lru_cache(maxsize=8)
def _open_store(kind: str, _pid: int, _environment: tuple[str | None, ...]) -> ObjectStore:
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if kind == "s3":
        retries: dict[str, Any] = {"mode": os.environ.get("AWS_RETRY_MODE", "standard")}
        if "AWS_MAX_ATTEMPTS" not in os.environ:
            retries["total_max_attempts"] = 5
        options["config_kwargs"] = {"retries": retries, "connect_timeout": 10, "read_timeout": 60}
    try:
        if kind == "s3":
            from pipeline.storage.s3_session import NoRedirectSession

            options["config_kwargs"]["http_session_cls"] = NoRedirectSession
        filesystem = fsspec.filesystem(kind, **options)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs"}[kind]
        reason = f"{kind}:// needs packages that {sys.executable} does not have ({error})"
        raise MissingPackageError(f"{reason}; run: {install_extra(extra)}") from error
    if kind == "s3":
        filesystem.retries = 1  # botocore retries each request; a second layer would multiply the waiting
    return ObjectStore(filesystem)


def _on_object(verb: str, uri: str, action: Callable[[], Result]) -> Result:
    def read() -> Result:
        fault_point("read", uri)
        return action()

    try:
        return _ask_again(read, lambda error: body_ended_early(error) or is_asked_to_wait(error))
    except Exception as error:
        raise item_error(verb, uri, error) from error


def _on_store(verb: str, uri: str, action: Callable[[], Result]) -> Result:
    try:
        fault_point("write", uri)
        return _ask_again(action, is_asked_to_wait)  # refused before anything was done, so asking again does it once
    except Exception as error:
        raise storage_error(verb, uri, error) from error


def _ask_again(action: Callable[[], Result], may_pass: Callable[[Exception], bool]) -> Result:
    """Run an action, up to `_TRIES` times where its error may pass, with exponential back-off."""
    for attempt in range(1, _TRIES):
        try:
            return action()
        except Exception as error:
            if not may_pass(error):
                raise
            time.sleep(_RETRY_S * 2**attempt)
    return action()
