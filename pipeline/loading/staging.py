"""Stages objects of a store on the local disk: fetched once, checked against the manifest, bounded in bytes.

One `Staging` belongs to one reader. Closing it removes its folder. The next reader on the same disk removes the folder
of a reader that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ItemError, StorageError
from pipeline.loading.sparse_file import SparseCopy
from pipeline.storage import storage
from pipeline.storage.errors import is_disk_full

_PREFIX = "illava-staging-"
_LOCK = "owner.lock"


@dataclass(frozen=True, slots=True)
class StagedObject:
    """Names an object's local file.

    Attributes:
        path: path of the object itself where it is local, else of its copy.
        bytes_fetched: bytes received from the store for this call.
        num_requests: requests to the store for this call.
    """

    path: str
    bytes_fetched: int = 0
    num_requests: int = 0


class Staging:
    """Keeps fetched objects in a bounded folder; the least recently used goes first. For one thread at a time.

    Args:
        cache_dir: where the folder is made; None is the system's temporary folder.
        cache_bytes: bound on the bytes of all copies together.
        max_object_bytes: larger objects are refused before they are fetched.
        allowed_roots: local folders that may be read; None where the operator's own configuration names the files.
        verify_md5: as in `storage.fetch`.

    Attributes:
        bytes_fetched: bytes received from the store so far, those of refused objects included.
        num_requests: requests to the store so far, likewise.
    """

    def __init__(
        self,
        *,
        cache_dir: str | None,
        cache_bytes: int,
        max_object_bytes: int,
        allowed_roots: Sequence[str] | None = None,
        verify_md5: bool = True,
    ) -> None:
        self.bytes_fetched = self.num_requests = 0
        self._cache_bytes = cache_bytes
        self._max_object_bytes = max_object_bytes
        self._allowed_roots = allowed_roots
        self._verify_md5 = verify_md5
        self._base = Path(cache_dir or tempfile.gettempdir())
        self._folder: Path | None = None
        self._lock: int | None = None
        self._num_files = 0
        self._copies: OrderedDict[tuple[str, int, str], Path] = OrderedDict()
        self._sparse: SparseCopy | None = None

    def get(self, uri: str, *, size: int = -1, etag: str = "", keep: Sequence[str] = ()) -> StagedObject:
        """Return the object as a local file; a local object is used in place.

        Args:
            uri: address of the object.
            size: bytes in the manifest, -1 for unknown.
            etag: entity tag in the manifest, "" for unknown.
            keep: paths that must not be evicted for this object (the other images of a set).

        Raises:
            ItemError: ``unsafe_uri``, ``too_large``, ``changed_object``, or what the store said.
            StorageError: the local disk cannot take the copy.
        """
        uri = storage.check_uri(uri, allowed_roots=self._allowed_roots)
        if storage.is_local(uri):
            self._check_size(uri, check_unchanged(uri, size=size, etag=etag))
            return StagedObject(uri)
        if (uri, size, etag) in self._copies:
            self._copies.move_to_end((uri, size, etag))
            return StagedObject(str(self._copies[uri, size, etag]))
        num_requests = 0
        if size < 0:
            self.num_requests += 1
            found = storage.stat(uri)
            size, etag, num_requests = found.size, etag or found.etag, 1
        self._check_size(uri, size)
        self._drop_sparse()
        key = uri, size, etag
        self._make_room(size, keep)
        path = self._new_path()
        self.num_requests += 1
        try:
            with self._raising_where_disk_is_full():
                fetched = storage.fetch(uri, str(path), etag=etag, verify_md5=self._verify_md5)
            if fetched.num_bytes != size:
                raise ItemError(
                    "changed_object", f"{uri}: the manifest has {size} bytes, the store {fetched.num_bytes}"
                )
        except BaseException:
            self.bytes_fetched += path.stat().st_size if path.exists() else 0
            path.unlink(missing_ok=True)
            raise
        self.bytes_fetched += fetched.num_bytes
        self.num_requests += fetched.num_requests - 1
        self._copies[key] = path
        return StagedObject(str(path), fetched.num_bytes, num_requests + fetched.num_requests)

    def sparse(self, uri: str, *, size: int, etag: str) -> SparseCopy | None:
        """Return a sparse copy, for `fill` to fetch ranges into; None where ranges cannot be read or a copy is staged.

        The same copy is returned until another object is staged.

        Args:
            uri: address of the object.
            size, etag: as in the manifest; both must be known.

        Raises:
            ItemError, StorageError: as `get`.
        """
        uri = storage.check_uri(uri, allowed_roots=self._allowed_roots)
        known = size >= 0 and etag and not storage.is_local(uri) and (uri, size, etag) not in self._copies
        if not known or not storage.can_read_ranges(uri):
            return None
        self._check_size(uri, size)
        if self._sparse is None or (self._sparse.uri, self._sparse.size, self._sparse.etag) != (uri, size, etag):
            self._drop_sparse()
            self._sparse = SparseCopy(str(self._new_path()), uri, size, etag)
        return self._sparse

    def fill(self, copy: SparseCopy, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch those parts of half-open ranges that a sparse copy lacks. Raises as `get`."""
        missing = copy.missing(ranges)
        self._make_room(sum(end - start for start, end in missing), ())
        self.num_requests += len(missing)
        with self._raising_where_disk_is_full():
            copy.fetch(missing)
        self.bytes_fetched += sum(end - start for start, end in missing)

    def _drop_sparse(self) -> None:
        if self._sparse:
            Path(self._sparse.path).unlink(missing_ok=True)
        self._sparse = None

    def close(self) -> None:
        """Remove the folder. Another `get` makes a new one."""
        self._copies.clear()
        self._drop_sparse()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self._folder = self._lock = None

    def _check_size(self, uri: str, size: int) -> None:
        if size > self._max_object_bytes:
            raise ItemError("too_large", f"{uri} has {size:,} bytes; max_bytes is {self._max_object_bytes:,}")

    @contextlib.contextmanager
    def _raising_where_disk_is_full(self) -> Iterator[None]:
        """Turn an error of a full disk into one that ends the run: the next item would fail as well."""
        try:
            yield
        except (OSError, ItemError) as error:
            if not is_disk_full(error):
                raise
            raise StorageError(
                f"no space is left below {self._base} for fetched objects: set runtime.cache_dir, or lower "
                "runtime.cache_bytes; then run the same command again: it resumes"
            ) from error

    def _make_room(self, num_bytes: int, keep: Sequence[str]) -> None:
        kept_bytes = sum(size for (_, size, _), path in self._copies.items() if str(path) in keep)
        if kept_bytes + num_bytes > self._cache_bytes:
            raise ItemError(
                "too_large",
                f"{kept_bytes + num_bytes:,} bytes must be staged at once; a reader's share of runtime.cache_bytes (by "
                f"runtime.num_reader_actors) is {self._cache_bytes:,}. Raise it and retry with --only too_large",
            )
        for key, path in list(self._copies.items()):
            sparse_bytes = self._sparse.num_bytes if self._sparse else 0
            if sum(size for _, size, _ in self._copies) + sparse_bytes + num_bytes <= self._cache_bytes:
                return
            if str(path) not in keep:
                path.unlink(missing_ok=True)
                del self._copies[key]

    def _new_path(self) -> Path:
        if self._folder is None:
            try:
                self._base.mkdir(parents=True, exist_ok=True)
                _sweep(self._base)
                self._folder, self._lock = _locked_folder(self._base)
            except OSError as error:
                raise StorageError(f"cannot stage below {self._base}: {error}; set runtime.cache_dir") from error
        self._num_files += 1
        return self._folder / f"{self._num_files:06d}"


def _locked_folder(base: Path) -> tuple[Path, int]:
    """Make a folder and lock it; make another one where another reader removed the first before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)


def check_unchanged(uri: str, *, size: int, etag: str) -> int:
    """Compare an object with the manifest (size -1 and etag "" are unknown there); return its size in bytes.

    Raises:
        ItemError: ``changed_object``, or the store's own error.
    """
    found = storage.stat(uri)
    if size not in {-1, found.size} or etag not in {"", found.etag}:
        raise ItemError(
            "changed_object",
            f"{uri}: the manifest has {size} bytes ({etag or 'no etag'}), now it has {found.size} ({found.etag})",
        )
    return found.size


def _sweep(base: Path) -> None:
    """Remove the folders of readers that ended: no process holds the lock."""
    for folder in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another reader removes the folder too, or it belongs to another user
            lock = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
