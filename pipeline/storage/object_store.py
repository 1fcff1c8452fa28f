"""Reads and writes objects in a bucket, through an fsspec file system that `storage.storage` opened.

The methods are the functions of `local_files`. Exceptions of the client library pass through, and `storage.storage`
translates them. Only calls that take names literally are used: never one that expands ``*`` or ``[``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pipeline.records import ObjectInfo
from pipeline.storage.errors import http_code, is_created_by_another
from pipeline.storage.s3_read import PinnedObject
from pipeline.storage.uris import scheme


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Wraps one store.

    Attributes:
        filesystem: an fsspec file system without listing caches.
    """

    filesystem: Any

    def info(self, uri: str) -> ObjectInfo:
        """Send one HEAD; where it is refused, send a GET, since only the answer to a GET gives the reason."""
        try:
            found = self.filesystem.info(uri, refresh=True)
        except Exception as error:
            if http_code(error) in {"400", "403"}:
                self.read(uri, 0, 1)
            raise
        if found["type"] != "file":
            raise FileNotFoundError("there is no such object, only a prefix of that name")
        return _info(uri, found)

    def find(self, uri: str) -> list[ObjectInfo]:
        """List every object below a prefix, or the object itself; markers of empty folders are left out."""
        found = self.filesystem.find(uri, detail=True)
        if not found:
            self.filesystem.ls(uri.split("/")[2], refresh=True)  # an empty prefix is fine, a missing bucket is not
        kind = scheme(uri)
        return [_info(f"{kind}://{name}", info) for name, info in found.items() if not name.endswith("/")]

    def names(self, uri: str) -> list[str]:
        """List the names directly below a prefix; deeper prefixes end in a slash."""
        try:
            found = self.filesystem.ls(uri, detail=True, refresh=True)
        except FileNotFoundError as error:
            if http_code(error) == "NoSuchBucket":
                raise
            return []
        start = len(uri.partition("://")[2]) + 1
        names = (entry["name"][start:].rstrip("/") + "/" * (entry["type"] == "directory") for entry in found)
        return [name for name in names if name.strip("/")]

    def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        """Read the bytes ``start`` up to, not including, ``end``; none where the object ends before ``start``."""
        try:  # a range even for the whole object: without one the client library sends a HEAD first
            return self.filesystem.cat_file(uri, start=start, end=end)
        except Exception as error:
            if http_code(error) in {"InvalidRange", "416"}:
                return b""
            raise

    def pinned(self, uri: str, etag: str) -> PinnedObject | None:
        """Pin one version of an object; None where the store cannot be asked for a version by its tag."""
        return PinnedObject(self.filesystem, uri, etag) if scheme(uri) == "s3" else None

    def copy(self, uri: str, target: str) -> int:
        """Copy the whole object into a local file, in whichever version it is found."""
        self.filesystem.get_file(uri, target)
        return os.path.getsize(target)

    def write(self, uri: str, data: bytes) -> None:
        """Send one PUT; above 100 MB, a multipart upload that is completed once."""
        self.filesystem.pipe_file(uri, data)

    def upload(self, path: str, uri: str) -> None:
        """Send a local file, a large one in parts."""
        self.filesystem.put_file(path, uri)

    def create(self, uri: str, data: bytes) -> bool | None:
        """Send a conditional PUT twice: a store that refuses the second one honours the condition.

        Returns None where the store does not, so that nothing is decided (the data is written all the same).
        """
        try:
            self.info(uri)
            return False
        except FileNotFoundError:
            pass
        try:
            self.filesystem.pipe_file(uri, data, mode="create")
            self.filesystem.pipe_file(uri, data, mode="create")
        except Exception as error:
            if not is_created_by_another(error):
                raise
            # The first answer to a retried request may be lost: the content tells whether this call created the object.
            return self.read(uri) == data
        return None

    def delete(self, uri: str) -> None:
        """Remove one object."""
        self.filesystem.rm_file(uri)


def _info(uri: str, found: dict[str, Any]) -> ObjectInfo:
    return ObjectInfo(uri, int(found["size"]), str(found.get("ETag") or found.get("etag") or "").strip('"'))
